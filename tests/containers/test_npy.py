"""Arrays of numpy and mlx: numpy itself writes them, and headers that lie, each in one way."""

import io
import struct
import zipfile
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loratools.containers import npy
from loratools.errors import MalformedError
from tests.refusing import refused


@dataclass
class Bytes:
    """A file in memory that counts what is read of it."""

    raw: bytes
    name: str = "made.npz"
    taken: int = 0

    @property
    def size(self):
        return len(self.raw)

    def read(self, offset, length):
        assert 0 <= offset <= offset + length <= self.size
        self.taken += length
        return self.raw[offset : offset + length]


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def zipped(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return Bytes(file.getvalue())


KINDS = ["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "<u2", "|u1", "|b1", "<c8"]


@given(
    array=st.sampled_from(KINDS).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    fortran=st.booleans(),
)
def test_every_array_that_numpy_saves_is_read(array, fortran):
    array = np.array(array, order="F" if fortran else "C")
    for leaf in (
        npy.array(Bytes(saved(array)), "x"),
        npy.arrays(zipped(x=array))["x"],
    ):
        assert leaf.shape == array.shape
        assert leaf.read() == array.tobytes()
        assert leaf.tensor().numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_the_three_versions(version):
    file = io.BytesIO()
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    np.lib.format.write_array(file, array, version=version)
    assert npy.array(Bytes(file.getvalue()), "x").numbers() == tuple(range(6))


def test_names_stay_and_nothing_but_headers_is_read():
    arrays = {f"model.layers.{i}.q.lora_a": np.zeros((400, 100), np.float32) for i in range(4)}
    source = zipped(**arrays)
    assert npy.is_npz(source)
    assert list(npy.arrays(source)) == list(arrays)
    assert source.taken < 8192


def literal(text):
    """A .npy of 24 bytes of data with this header."""
    raw = text if isinstance(text, bytes) else text.encode()
    return npy.MAGIC + b"\1\0" + struct.pack("<H", len(raw)) + raw + bytes(24)


HONEST = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }          \n"
VALID = {
    "as numpy writes it": HONEST,
    "without spaces": "{'descr':'<f4','fortran_order':False,'shape':(2,3)}",
    "in another order": "{'shape': (2, 3, ), 'fortran_order': False, 'descr': '<f4'}",
    "of Python 2": "{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }",
}


@pytest.mark.parametrize("row", VALID)
def test_spellings_of_one_header(row):
    leaf = npy.array(Bytes(literal(VALID[row])), "x")
    assert (leaf.dtype, leaf.shape, leaf.strides) == ("F32", (2, 3), None)


def changed(old, new):
    assert old in HONEST
    return literal(HONEST.replace(old, new))


HOSTILE = {
    "4 TB of nothing": (changed("(2, 3)", "(1024, 1024, 1048576)"), "truncated"),
    "beyond 64 bits": (changed("(2, 3)", "(999999999999999999, 9)"), "malformed"),
    "many digits": (changed("(2, 3)", f"({'9' * 4000},)"), "malformed"),
    "many extents": (changed("(2, 3)", f"({'1, ' * 65})"), "malformed"),
    "negative": (changed("(2, 3)", "(-2, 3)"), "malformed"),
    "a number as shape": (changed("(2, 3)", "(6)"), "malformed"),
    "an expression": (changed("(2, 3)", "(2, 3*1)"), "malformed"),
    "a call": (changed("(2, 3)", "tuple([2, 3])"), "malformed"),
    "nested": (changed("(2, 3)", "(" * 1500 + "2, 3" + ")" * 1500), "malformed"),
    "too few bytes": (changed("(2, 3)", "(2, 4)"), "truncated"),
    "too many bytes": (changed("(2, 3)", "(2, 2)"), "malformed"),
    "objects": (changed("<f4", "|O"), "hostile"),
    "objects in fields": (changed("'<f4'", "[('a', '|O8')]"), "hostile"),
    "fields": (changed("'<f4'", "[('a', '<f4')]"), "dtype_unusable"),
    "big-endian": (changed("<f4", ">f4"), "dtype_unusable"),
    "text": (changed("<f4", "<U6"), "dtype_unusable"),
    "dates": (changed("'<f4'", "'<M8[ns]'"), "dtype_unusable"),
    "void": (changed("<f4", "|V4"), "dtype_unusable"),
    "a key twice": (changed("'descr': '<f4'", "'descr': '<f4', 'descr': '<f4'"), "malformed"),
    "a key more": (changed("'descr'", "'x': 1, 'descr'"), "malformed"),
    "a key less": (changed("'fortran_order': False, ", ""), "malformed"),
    "another order": (changed("False", "0"), "malformed"),
    "something behind": (changed("}", "} + {}"), "malformed"),
    "no end": (changed("}", ""), "malformed"),
    "version 9": (literal(HONEST).replace(b"\1\0", b"\x09\0", 1), "malformed"),
    "a long header": (npy.MAGIC + b"\2\0" + struct.pack("<I", 1 << 31), "malformed"),
    "a header cut short": (literal(HONEST)[:40], "truncated"),
    "half a magic": (b"\x93NUM", "not_weights"),
    "no version": (npy.MAGIC, "malformed"),
    "nothing": (b"", "not_weights"),
}


@pytest.mark.parametrize("row", HOSTILE)
def test_a_header_that_lies_is_refused(row):
    raw, code = HOSTILE[row]
    source = Bytes(raw)
    message = refused(code, npy.array, source, "x.lora_a")
    assert "x.lora_a" in message
    assert source.taken <= len(raw)


def test_numpy_agrees_about_what_is_dangerous():
    """The same bytes: numpy refuses to unpickle, and loads what we do not (row 35)."""
    for row in ("objects", "objects in fields", "negative", "a call"):
        with pytest.raises(ValueError, match=r"allow_pickle|dimensions|malformed"):
            np.load(io.BytesIO(HOSTILE[row][0]), allow_pickle=False)
    for row in ("fields", "big-endian"):
        np.load(io.BytesIO(HOSTILE[row][0]), allow_pickle=False)


def test_a_bomb_is_refused_before_it_grows():
    source = zipped(np.savez_compressed, x=np.zeros((1 << 12, 1 << 12), np.float32))
    assert source.size < 1 << 18
    assert "savez" in refused("malformed", npy.arrays, source)
    assert source.taken < 4 * source.size


def test_an_archive_of_other_things_is_no_npz():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert not npy.is_npz(Bytes(file.getvalue()))
    refused("not_weights", npy.arrays, Bytes(file.getvalue()))
    for raw in (b"", b"PK", b"PK\3\4" + bytes(60)):
        assert not npy.is_npz(Bytes(raw))


def test_bfloat16_is_written_as_two_bytes_of_nothing(tmp_path):
    """By mlx, and by numpy where ml_dtypes gives it the dtype."""
    mx.save(str(tmp_path / "x.npy"), mx.array([1.0, -2.5]).astype(mx.bfloat16))
    leaf = npy.array(Bytes((tmp_path / "x.npy").read_bytes()), "x")
    assert (leaf.dtype, leaf.numbers()) == ("BF16", (1.0, -2.5))


@given(at=st.integers(0, 70), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused(at, byte):
    raw = bytearray(literal(HONEST))
    raw[at] = byte
    try:
        leaf = npy.array(Bytes(bytes(raw)), "x")
    except MalformedError:
        return
    assert len(leaf.read()) == 24
