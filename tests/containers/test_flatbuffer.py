"""Flatbuffers that lie, each in one way; onnxruntime reads every file that we read."""

import struct
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from loratools.adapter import Leaf
from loratools.containers import flatbuffer
from loratools.containers.local import LocalFile
from loratools.errors import MalformedError
from tests.refusing import refused

A, B = "q.lora_A.weight", "q.lora_B.weight"
ROOT, VECTOR = 20, 40  # of the files written here: the root table, the list of parameters
ONE, TWO = 52, 72  # the tables of the parameters: -, name, dims, data_type, raw_data


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    path = tmp_path_factory.mktemp("honest") / "made.onnx_adapter"
    tensors = {A: torch.arange(8.0).reshape(4, 2), B: torch.ones(2, 3, dtype=torch.float16)}
    flatbuffer.write(path, {name: Leaf.of(name, t) for name, t in tensors.items()})
    return path.read_bytes()


def number(raw, at):
    return struct.unpack_from("<I", raw, at)[0]


def place(raw, at):
    """Where the offset at a place leads."""
    return at + number(raw, at)


def put(raw, at, value, form="<I"):
    size = struct.calcsize(form)
    return raw[:at] + struct.pack(form, value) + raw[at + size :]


# What is done to the honest bytes, the code, and what the message names.
ROWS = {
    "another identifier": (lambda r: r[:4] + b"TFL3" + r[8:], "not_weights", "TORT"),
    "nothing": (lambda r: b"", "not_weights", "TORT"),
    "seven bytes": (lambda r: r[:7], "not_weights", "TORT"),
    "a head alone": (lambda r: r[:8], "malformed", "byte 0"),
    "a root far away": (lambda r: put(r, 0, 1 << 31), "malformed", "byte 0"),
    "a root of itself": (lambda r: put(r, 0, 0), "malformed", "byte 0"),
    "a root between words": (lambda r: put(r, 0, 21), "malformed", "byte 0"),
    "fields before the file": (lambda r: put(r, ROOT, 24), "malformed", "fields lies at -4"),
    "fields behind the file": (lambda r: put(r, ROOT, -(1 << 30), "<i"), "malformed", "byte 1"),
    "fields without end": (lambda r: put(r, 8, 65534, "<H"), "malformed", "byte 8"),
    "a table without end": (lambda r: put(r, 10, 65532, "<H"), "malformed", "byte 8"),
    "a field outside its table": (lambda r: put(r, 12, 18, "<H"), "malformed", "field 0"),
    "format 2": (lambda r: put(r, ROOT + 4, 2), "malformed", "version 2"),
    "no list": (lambda r: put(r, 18, 0, "<H"), "malformed", "parameters is missing"),
    "a list of 2^32": (lambda r: put(r, VECTOR, 0xFFFFFFFF), "malformed", "4294967295 items"),
    "a list of one too many": (lambda r: put(r, VECTOR, 3), "malformed", "byte"),
    "one parameter twice": (
        lambda r: put(r, VECTOR + 8, number(r, VECTOR + 4) - 4), "duplicate", A
    ),
    "a name of 2^31": (lambda r: put(r, place(r, ONE + 4), 1 << 31), "malformed", "2147483648"),
    "a name without zero": (
        lambda r: put(r, place(r, ONE + 4) + 4 + len(A), 65, "<B"), "malformed", "zero"
    ),
    "a name that is no text": (
        lambda r: put(r, place(r, ONE + 4) + 4, 0xFF, "<B"), "malformed", "UTF-8"
    ),
    "an empty name": (
        lambda r: put(put(r, place(r, ONE + 4) + 4, 0), place(r, ONE + 4), 0), "malformed", "empty"
    ),
    "a negative extent": (
        lambda r: put(r, place(r, ONE + 8) + 4, -4, "<q"), "malformed", r"(-4, 2)"
    ),
    "a shape of 2^80": (
        lambda r: put(put(r, place(r, ONE + 8) + 4, 1 << 40, "<q"),
                      place(r, ONE + 8) + 12, 1 << 40, "<q"),
        "malformed", "it has 32",
    ),
    "more extents than the file": (
        lambda r: put(r, place(r, ONE + 8), 1 << 30), "malformed", "1073741824 items"
    ),
    "the shape of others": (
        lambda r: put(r, place(r, ONE + 8) + 4, 5, "<q"), "malformed", "it has 32"
    ),
    "text as data": (lambda r: put(r, ONE + 12, 8), "dtype_unusable", "data type 8"),
    "a dtype of tomorrow": (lambda r: put(r, ONE + 12, 99), "dtype_unusable", "data type 99"),
    "data of 2^32": (
        lambda r: put(r, place(r, ONE + 16), 0xFFFFFFFF), "malformed", "4294967295 items"
    ),
    "data cut short": (lambda r: r[:-1], "malformed", "12 items"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_file_that_lies_is_refused_with_its_byte(row, honest, tmp_path):
    change, code, text = ROWS[row]
    path = tmp_path / "changed.onnx_adapter"
    path.write_bytes(change(honest))
    assert text in refused(code, flatbuffer.read, LocalFile(path))


def test_data_that_two_parameters_share_is_refused(tmp_path):
    """Else a small file may have any number of large tensors."""
    path = tmp_path / "made.onnx_adapter"
    zeros = Leaf.of("", torch.zeros(4, 2))
    flatbuffer.write(path, {"one": zeros, "two": zeros})
    raw = path.read_bytes()
    flatbuffer.read(LocalFile(path))
    path.write_bytes(put(raw, TWO + 16, place(raw, ONE + 16) - TWO - 16))
    assert '"two"' in refused("hostile", flatbuffer.read, LocalFile(path))


def test_onnxruntime_reads_all_that_is_read_here(honest, tmp_path):
    """Every byte changed in several ways: what we take, it takes, and finds the same in it."""
    ort.set_default_logger_severity(4)
    path, both = tmp_path / "changed.onnx_adapter", 0
    for at in range(len(honest)):
        for value in {0, 4, 128, 255, honest[at] ^ 1} - {honest[at]}:
            path.write_bytes(put(honest, at, value, "<B"))
            try:
                ours = flatbuffer.read(LocalFile(path)).leaves
            except MalformedError:
                continue
            file = ort.AdapterFormat.read_adapter(str(path))
            theirs = file.get_parameters()
            assert {k: tuple(v.shape()) for k, v in theirs.items()} == {
                k: leaf.shape for k, leaf in ours.items()
            }
            both += 1
    assert both > 100


def test_headers_of_many_parameters_are_read_without_their_data(tmp_path):
    path = tmp_path / "made.onnx_adapter"
    rows = torch.zeros(64, 8)
    flatbuffer.write(path, {f"layer.{i}.lora_A.weight": Leaf.of("", rows) for i in range(3000)})

    class Counting:
        name, size, calls = "made", path.stat().st_size, 0

        def read(self, offset, length):
            Counting.calls += 1
            return LocalFile(Path(path)).read(offset, length)

    assert len(flatbuffer.read(Counting()).leaves) == 3000
    assert Counting.calls < 3000


def test_what_has_no_place_is_refused(tmp_path):
    odd = Leaf.of("x", torch.zeros(2, 2).to(torch.float8_e8m0fnu))
    refused("loss", flatbuffer.write, tmp_path / "x", {"x": odd})
    big = Leaf("x", "F32", (1 << 15, 1 << 15))
    assert "2147483647" in refused("loss", flatbuffer.write, tmp_path / "x", {"x": big})
