"""The safetensors container: bytes spelt out, a hostile corpus, and the library as the judge."""

import hashlib
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import DTYPE_BITS, TORCH_NAMES, Leaf
from loratools.containers import safetensors as ours
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError, MalformedError
from tests.containers.safetensors_corpus import ACCEPTED, HOSTILE, Memory, built, entry


def read(raw: bytes) -> ours.Header:
    return ours.read_header(Memory(raw))


# ------------------------------------------------------------------------- what is read, in bytes


def test_header_spelt_out():
    raw = (
        b"\x88\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"U8","shape":[],"data_offsets":[4,5]},'
        b'"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
        b"\x00\x3c\x00\xc0\x07"
    )
    header = read(raw)
    assert list(header.leaves) == ["b", "a"]
    assert header.metadata == {"format": "pt"}
    assert header.data_start == 8 + 0x88
    assert header.digest == hashlib.sha256(raw[: 8 + 0x88]).hexdigest()
    a, b = header.leaves["a"], header.leaves["b"]
    assert (a.name, a.dtype, a.shape, a.offset) == ("a", "U8", (), 8 + 0x88 + 4)
    assert (b.name, b.dtype, b.shape, b.offset) == ("b", "F16", (2,), 8 + 0x88)
    assert a.read() == b"\x07"
    assert b.numbers() == (1.0, -2.0)


def test_layout_spelt_out():
    head, offsets = ours.plan_layout(
        [("é", "F32", (2, 1)), ("half", "BF16", (3,)), ("none", "F4", (0, 5))],
        {"z": "1", "format": "pt"},
    )
    text = (
        '{"__metadata__":{"format":"pt","z":"1"},'
        '"é":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"half":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},'
        '"none":{"dtype":"F4","shape":[0,5],"data_offsets":[14,14]}}'
    ).encode()
    assert len(text) == 213
    text += b"   "
    assert head == struct.pack("<Q", len(text)) + text
    assert offsets == {"é": len(head), "half": len(head) + 8, "none": len(head) + 14}


def test_nothing_at_all():
    assert ours.plan_layout([], {}) == (b"\x08\0\0\0\0\0\0\0{}      ", {})
    assert read(b"\x08\0\0\0\0\0\0\0{}      ").leaves == {}


@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted_as_by_the_library(row):
    assert_library_agrees(ACCEPTED[row], read(ACCEPTED[row]))


def assert_library_agrees(raw: bytes, header: ours.Header) -> None:
    found = safetensors.deserialize(raw)
    assert {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found} == {
        name: (leaf.dtype, leaf.shape, leaf.read()) for name, leaf in header.leaves.items()
    }


def test_metadata_as_by_the_library(tmp_path):
    for i, raw in enumerate(ACCEPTED.values()):
        path = tmp_path / str(i)
        path.write_bytes(raw)
        with safetensors.safe_open(path, "pt") as file:
            assert read(raw).metadata == (file.metadata() or {})


@pytest.mark.parametrize("row", HOSTILE)
def test_refused(row):
    raw, code, fragment = HOSTILE[row]
    with pytest.raises(MalformedError) as caught:
        read(raw)
    assert caught.value.code == code
    assert fragment in caught.value.message
    assert caught.value.message.startswith("x.safetensors")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


# ------------------------------------------------------------------------ the library as the judge


def mutated(draw: st.DrawFn) -> bytes:
    """A sound file, or one with up to two things changed."""
    names = draw(st.lists(st.sampled_from(["a", "b", "é", "", "ab"]), max_size=4, unique=True))
    pairs: list[tuple[str, object]] = []
    at = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3))
        shape += [4] * (DTYPE_BITS[dtype] < 8)
        nbytes = Leaf(name, dtype, tuple(shape)).nbytes
        pairs.append((name, entry(dtype, shape, at, at + nbytes)))
        at += nbytes
    if draw(st.booleans()):
        pairs.append(
            ("__metadata__", draw(st.sampled_from([{}, {"a": "b"}, None, {"a": "1", "b": "2"}])))
        )
    pairs = draw(st.permutations(pairs))
    raw = bytearray(built(pairs, bytes(at)))
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.integers(0, len(raw)))
        piece = draw(st.sampled_from([b"", b"0", b"1", b"-", b" ", b",", b'"', b"{", b"}", b"[]"]))
        raw[where : where + draw(st.integers(0, 1))] = piece
        if where > 8:  # mostly the header is to be judged, not its length
            found = raw.rfind(b"}") + 1
            raw[:8] = struct.pack("<Q", max(0, found - 8))
    return bytes(raw)


@settings(max_examples=400)
@given(st.composite(mutated)())
def test_what_we_accept_the_library_accepts_alike(raw):
    try:
        header = read(raw)
    except MalformedError:
        return
    assert_library_agrees(raw, header)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(TORCH_NAMES)),
            st.lists(st.integers(0, 3), max_size=4),
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), st.text('ab\\"{}é\n')),
)
def test_what_the_library_writes_is_accepted(tensors, metadata):
    held = {
        name: torch.zeros(shape, dtype=getattr(torch, TORCH_NAMES[dtype]))
        for name, (dtype, shape) in tensors.items()
    }
    # Of no tensors and an empty dict, 0.8.0 makes a header that it cannot read back itself.
    raw = safetensors.torch.save(held, metadata if held else metadata or None)
    header = read(raw)
    assert_library_agrees(raw, header)
    assert header.metadata == (metadata or {})


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.sampled_from([0, 4, 8]), max_size=4)
        ),
        max_size=6,
    ).filter(lambda found: all(DTYPE_BITS[d] > 7 or s for d, s in found.values())),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text('ab\\"{}é\n')),
)
def test_what_we_lay_out_the_library_loads(tensors, metadata):
    described = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    order = ours.aligned(described)
    head, offsets = ours.plan_layout(order, metadata)
    end = len(head)
    for name, dtype, shape in order:
        assert offsets[name] == end
        assert end * 8 % DTYPE_BITS[dtype] == 0 or DTYPE_BITS[dtype] == 6
        end += Leaf(name, dtype, shape).nbytes
    raw = head + bytes(i % 251 for i in range(end - len(head)))
    header = read(raw)
    assert_library_agrees(raw, header)
    assert list(header.leaves) == [name for name, _, _ in order]
    assert header.metadata == metadata
    assert header.data_start == len(head)


def test_aligned_keeps_the_order_among_equals():
    described = [
        ("c", "F4", (2,)),
        ("b", "BF16", ()),
        ("d", "F64", ()),
        ("a", "F16", ()),
        ("e", "U8", ()),
    ]
    assert "".join(name for name, _, _ in ours.aligned(described)) == "dbaec"


@pytest.mark.parametrize(
    ("described", "metadata", "code", "fragment"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], {}, "duplicate", '"a" twice'),
        ([("__metadata__", "U8", (1,))], {}, "duplicate", '"__metadata__" twice'),
        ([("a", "F4", (3,))], {}, "malformed", "no whole number of bytes"),
        ([("a", "U8", (1,) * 9)], {}, "malformed", "9 dimensions"),
        ([("a", "U8", (2**41,))], {}, "malformed", "larger than any"),
        ([("\ud800", "U8", (1,))], {}, "malformed", "half a character"),
        ([], {"a": "\udc00"}, "malformed", "half a character"),
        ([], {"a": 1}, "malformed", "strings by name"),
        ([("x" * 50_000_000, "U8", ())], {}, "malformed", "at most 50000000 are read"),
    ],
)
def test_what_could_not_be_read_is_not_laid_out(described, metadata, code, fragment):
    with pytest.raises(LoratoolsError, match=fragment) as caught:
        ours.plan_layout(described, metadata)
    assert caught.value.code == code


# ----------------------------------------------------------------------------------------- writing


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {
        name: torch.randn(3, 5).mul(40).to(getattr(torch, dtype))
        for name, dtype in TORCH_NAMES.items()
    }
    found["scalar"] = torch.tensor(1.5)
    found["none"] = torch.empty(0, 4)
    found["turned"] = torch.arange(6.0).reshape(2, 3).T
    found["../é\n"] = torch.tensor([float("nan"), -0.0])
    return found


def leaves() -> dict[str, Leaf]:
    return {name: Leaf.of(name, tensor) for name, tensor in tensors().items()}


def test_written_files_load_bit_for_bit(tmp_path):
    path = tmp_path / "w.safetensors"
    digest = ours.write(path, leaves(), {"format": "pt", "a": "é"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for leaf in ours.read_header(LocalFile(path)).leaves.values():
        assert leaf.offset * 8 % DTYPE_BITS[leaf.dtype] == 0
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), bits)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "é"}


def test_copies_from_file_to_file_are_equal(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    written = ours.write(first, leaves(), {"b": "1", "a": "2"})
    header = ours.read_header(LocalFile(first))
    assert ours.write(second, header.leaves, {"a": "2", "b": "1"}) == written
    assert first.read_bytes() == second.read_bytes()


def test_a_stored_view_is_written_row_by_row(tmp_path):
    stored = Memory(struct.pack("<6f", *range(6)))
    turned = Leaf("t", "F32", (3, 2), stored, 0, (1, 3))
    ours.write(tmp_path / "w", {"t": turned}, {})
    loaded = safetensors.torch.load_file(tmp_path / "w")["t"]
    assert torch.equal(loaded, torch.arange(6.0).reshape(2, 3).T)


def test_mode_is_the_umask_and_data_reach_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "w"
    synced = []

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    before = os.umask(0o027)
    try:
        ours.write(path, leaves(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert synced == [path.stat().st_size]


@pytest.mark.parametrize(("path", "code"), [("/dev/full", "disk_full"), ("no/such", "storage")])
def test_failing_writes(tmp_path, monkeypatch, path, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoratoolsError, match="cannot be written") as caught:
        ours.write(Path(path), leaves(), {})
    assert caught.value.code == code


# --------------------------------------------------------------- in 300 MB, in time, without torch

CHILD = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
signal.setitimer(signal.ITIMER_PROF, int(sys.argv[2]))  # seconds of the processor, not of the wall
signal.alarm(120)
from pathlib import Path
from loratools.containers.local import LocalFile
from loratools.containers.safetensors import read_header
from loratools.errors import LoratoolsError
try:
    print("accepted", len(read_header(LocalFile(Path(sys.argv[1]))).leaves))
except LoratoolsError as refused:
    print(refused.code)
assert not {"torch", "numpy", "safetensors"} & set(sys.modules)
"""


def empties(count: int) -> bytes:
    one = b'"layers.%d.mlp.experts.weight.lora_A":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{%b}" % b",".join(one % i for i in range(count))


def experts(count: int) -> bytes:
    one = (
        b'"base_model.model.model.layers.%d.mlp.experts.%d.gate_proj.lora_A.weight":'
        b'{"dtype":"BF16","shape":[8,2048],"data_offsets":[%d,%d]}'
    )
    members = (one % (i // 2000, i % 2000, i << 15, i + 1 << 15) for i in range(count))
    return b"{%b}" % b",".join(members)


def write_raw(path: Path, raw: bytes, size: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    if size is not None:
        os.truncate(path, 8 + len(raw) + size)


MB = 1_000_000
BOMBS = {
    "length 2^63": (lambda path: path.write_bytes(b"\0\0\0\0\0\0\0\x80{}"), "malformed"),
    "600,000 empty tensors": (lambda path: write_raw(path, empties(600_000)), "malformed"),
    "FIFO": (os.mkfifo, "not_weights"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not_weights"),
    "empty lists": (
        lambda path: write_raw(path, b'{"a":[' + b"[]," * (16 * MB) + b"[]]}"), "malformed"
    ),
    "short strings": (
        lambda path: write_raw(path, b'{"a":{"dtype":[' + b'"ab",' * (9 * MB) + b'""]}}'),
        "malformed",
    ),
    "short metadata": (
        lambda path: write_raw(path, b'{"__metadata__":{' + b'"ab":"",' * (6 * MB) + b'"":""}}'),
        "malformed",
    ),
    "brackets": (lambda path: write_raw(path, b"{" + b"[" * (49 * MB)), "malformed"),
    "blanks": (lambda path: write_raw(path, b"{" + b" " * (49 * MB)), "malformed"),
    "backslashes": (lambda path: write_raw(path, b'{"' + b"\\" * (49 * MB)), "malformed"),
    "138,850 honest tensors": (
        lambda path: write_raw(path, experts(138_850), 138_850 << 15), "accepted 138850"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", BOMBS)
def test_bombs(tmp_path, row):
    make, expected = BOMBS[row]
    path = tmp_path / "x.safetensors"
    make(path)
    # The honest one may take as long as a busy machine needs.
    seconds = "60" if expected.startswith("accepted") else "5"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path, seconds], capture_output=True, text=True
    )
    path.unlink()
    assert (child.stdout.strip(), child.stderr) == (expected, "")


# -------------------------------------------------------------------------------- files of others


def test_field_headers_as_by_the_library(field_data):
    paths = sorted(field_data.rglob("*.safetensors"))
    assert len(paths) > 3
    for path in paths:
        header = ours.read_header(LocalFile(path))
        with safetensors.safe_open(path, "pt") as file:
            assert header.metadata == (file.metadata() or {})
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            assert {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()} == {
                name: (leaf.dtype, leaf.shape) for name, leaf in header.leaves.items()
            }
