"""The GGUF container: bytes spelt out, a hostile corpus, and the gguf package as the judge."""

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.containers import gguf as ours
from loratools.containers.local import LocalFile
from loratools.errors import MalformedError
from tests.containers.gguf_corpus import ACCEPTED, DATA, HOSTILE, ONE, Memory, built, info, u32


def test_header_spelt_out():
    raw = (
        b"GGUF\x03\0\0\0"
        b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0a\x08\0\0\0\x02\0\0\0\0\0\0\0hi"
        b"\x01\0\0\0\0\0\0\0b\x06\0\0\0\0\0\x80\x3f"
        b"\x01\0\0\0\0\0\0\0t\x02\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0"
        b"\0\0\0\0\0\0\0\0"
        b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        b"\x00\x3c\x00\xc0\x00\x38"
    )
    header = ours.read_header(Memory(raw))
    assert (header.version, header.big) == (3, False)
    assert header.values == {"a": "hi", "b": 1.0}
    assert header.tensors == {"t": ours.Info("t", "F16", (1, 3), len(raw) - 6, 6)}
    assert header.leaf("t").numbers() == (1.0, -2.0, 0.5)


@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted_as_by_the_gguf_package(row, tmp_path):
    header = ours.read_header(Memory(ACCEPTED[row]))
    (tmp_path / "x").write_bytes(ACCEPTED[row])
    assert_package_agrees(tmp_path / "x", header)


def assert_package_agrees(path: Path, header: ours.Header) -> None:
    found = gguf.GGUFReader(path)
    fields = {k: f for k, f in found.fields.items() if not k.startswith("GGUF.")}
    assert list(header.values) == list(fields)
    for key, value in header.values.items():
        theirs = fields[key].contents()
        if isinstance(value, ours.Omitted):
            assert value.count == len(theirs)
        else:
            assert value == theirs
            assert type(value) is type(theirs)
    assert list(header.tensors) == [t.name for t in found.tensors]
    for theirs in found.tensors:
        mine = header.tensors[theirs.name]
        assert mine.type == theirs.tensor_type.name
        assert mine.shape == tuple(theirs.shape.tolist()[::-1])
        assert (mine.nbytes, mine.offset) == (theirs.n_bytes, theirs.data_offset)
        if ours.TYPES[theirs.tensor_type.value][1] == 1:
            native = theirs.data.astype(theirs.data.dtype.newbyteorder("<"))
            assert header.leaf(theirs.name).read() == native.tobytes()


def test_the_table_of_types_is_the_package_s():
    theirs = {
        kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType
    }
    assert theirs == ours.TYPES


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_files_of_both_byte_orders(order, tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    writer.add_uint32("number", 70_000)
    writer.add_float32("half", 0.5)
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["a", "bc"])
    draw = np.random.default_rng(0)
    for name, dtype in {"f32": "f4", "f16": "f2", "f64": "f8", "i16": "i2", "i8": "i1"}.items():
        writer.add_tensor(name, (draw.normal(size=(3, 5)) * 9).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = ours.read_header(LocalFile(path))
    assert header.big == (order == gguf.GGUFEndian.BIG)
    assert header.values["number"] == 70_000
    assert_package_agrees(path, header)
    leaf = header.leaf("f32")
    assert leaf.tensor().tolist() == [list(leaf.numbers())[i : i + 5] for i in (0, 5, 10)]


def test_a_quantised_tensor_is_named():
    header = ours.read_header(Memory(ACCEPTED["quantised"]))
    assert header.leaf("b").read() == b"1234"
    with pytest.raises(MalformedError, match='tensor "a" is Q8_0, quantised') as refused:
        header.leaf("a")
    assert refused.value.code == "dtype_unusable"


def test_one_value_without_the_rest():
    raw = built([u32("a", 1), u32("b", 2), u32("b", 3)])  # twice: not noticed by then
    assert ours.value_of(Memory(raw), "a") == 1
    assert ours.value_of(Memory(raw), "b") == 2
    assert ours.value_of(Memory(raw), "c") is None
    assert ours.is_gguf(Memory(raw))
    assert not ours.is_gguf(Memory(b"GG"))


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("row", HOSTILE)
def test_refused_by_code_and_name(row):
    raw, code, message = HOSTILE[row]
    with pytest.raises(MalformedError) as refused:
        ours.read_header(Memory(raw))
    assert refused.value.code == code
    assert message in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("row", ["every type", "a long vocabulary", "padding between"])
def test_cut_short_anywhere(row):
    raw = ACCEPTED[row]
    whole = len(raw)
    for end in range(0, whole, max(1, whole // 300)):
        with pytest.raises(MalformedError):
            ours.read_header(Memory(raw[:end]))


@given(st.data())
def test_only_our_own_errors_escape(data):
    raw = bytearray(ACCEPTED[data.draw(st.sampled_from(["every type", "padding between"]))])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = ours.read_header(Memory(bytes(raw)))
    except MalformedError:
        pass
    else:
        for tensor in header.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(raw)


def test_a_header_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(ours, "HEADER_LIMIT", 10_000)
    monkeypatch.setattr(ours, "_PIECE", 100)
    raw = built([u32(f"key {i}", i) for i in range(500)])
    with pytest.raises(MalformedError, match="longer than 10000 bytes"):
        ours.read_header(Memory(raw))


def test_hostile_files_take_no_memory():
    """In a process of its own: 2^40 promised elements, and the peak stays that of Python."""
    code = (
        "import resource, sys\n"
        "from loratools.containers import gguf\n"
        "from loratools.errors import LoratoolsError\n"
        "from tests.containers.gguf_corpus import HOSTILE, Memory\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for raw, _, _ in HOSTILE.values():\n"
        "    try: gguf.read_header(Memory(raw))\n"
        "    except LoratoolsError: pass\n"
        "    else: sys.exit('read')\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 20_000, grown\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=300)


@pytest.mark.parametrize("size", [1, 9, 1000])
def test_the_header_may_be_read_in_pieces_of_any_size(size, monkeypatch):
    whole = {row: ours.read_header(Memory(raw)) for row, raw in ACCEPTED.items()}
    monkeypatch.setattr(ours, "_PIECE", size)
    for row, raw in ACCEPTED.items():
        found = ours.read_header(Memory(raw))
        assert (found.values, found.tensors) == (whole[row].values, whole[row].tensors)


def test_data_may_be_read_in_parts(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(
        built([], [ONE, info("b", [2], 0, 32)], DATA + b"\0" * 8 + struct.pack("<2f", 1, 2))
    )
    assert ours.read_header(LocalFile(path)).leaf("b").numbers() == (1.0, 2.0)
