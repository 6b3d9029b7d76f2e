"""Tensors, parameters and storages as pickles tell of them, with all that they may lie about."""

import struct

import pytest

from tests.containers.torch_bytes import (
    ORDERED,
    REBUILD,
    Op,
    built,
    called,
    named,
    put,
    refused,
    stored,
    tensor,
)  # fmt: skip

SHARED = named("torch._utils", "_rebuild_parameter")
V3 = named("torch._utils", "_rebuild_tensor_v3")

TYPED = named("torch._tensor", "_rebuild_from_type_v2")
TENSOR = named("torch", "Tensor")
PLAIN = (stored(), 0, (4,), (1,), False, {})


CALL = (REBUILD, TENSOR, PLAIN, {})
CALLS = b"(" + TYPED + TENSOR  # the first two arguments of a call of a call

TENSORS = {
    "2^34 elements of stride 0": (
        tensor(None, 0, (1 << 34,), (0,)), "hostile", "its storage has 16"
    ),
    "5 elements of stride 0": (tensor(None, 0, (5,), (0,)), "hostile", "its storage has 16"),
    "overlapping windows": (tensor(None, 0, (3, 2), (1, 1)), "hostile", "its storage has 16"),
    "behind its storage": (tensor(None, 1, (4,)), "hostile", "reaches byte 20 of a storage of 16"),
    "a long stride": (tensor(None, 0, (2,), (1 << 59,)), "hostile", "reaches byte"),
    "a negative stride": (tensor(None, 3, (4,), (-1,)), "malformed", "no whole numbers"),
    "a negative extent": (tensor(None, 0, (-4,)), "malformed", "no whole numbers"),
    "a negative offset": (tensor(None, -1, (1,)), "malformed", "no whole numbers"),
    "a huge stride": (tensor(None, 0, (1,), (1 << 63,)), "malformed", "no whole numbers"),
    "a bool as extent": (tensor(None, 0, (True,)), "malformed", "no whole numbers"),
    "a float as extent": (
        tensor(None, 0, (Op(b"G" + struct.pack(">d", 4)),)), "malformed", "whole"
    ),
    "text as offset": (tensor(None, "0"), "malformed", "arguments"),
    "more strides than extents": (
        tensor(None, 0, (4,), (1, 1)), "malformed", "1 extents, 2 strides"
    ),
    "10,000 dimensions": (tensor(None, 0, (1,) * 9999, (1,) * 9999), "malformed", "at most 64"),
    "nothing, but huge": (tensor(None, 0, (0, 1 << 62), (1, 1)), "malformed", "no whole numbers"),
    "nothing, of large extents": (
        tensor(None, 0, (0, 1 << 41), (1, 1)), "malformed", "larger than"
    ),
    "nothing, of many extents": (
        tensor(None, 0, (0, 1 << 40, 1 << 40), (1, 1, 1)), "malformed", "larger than"
    ),
    "another storage": (tensor(stored("1")), "malformed", 'storage "1" should have 16 bytes'),
    "a path as storage": (tensor(stored("../version")), "malformed", "the zip has nothing for it"),
    "a storage of 2^31-1": (
        tensor(stored("0", 2**31 - 1)), "malformed", "should have 8589934588 bytes, the zip has 16"
    ),
    "a smaller storage": (tensor(stored("0", 3), 0, (3,)), "malformed", "should have 12 bytes"),
    "a storage of -1": (tensor(stored("0", -1)), "malformed", "names a storage"),
    "a number as key": (tensor(stored(0)), "malformed", "names a storage"),
    "a storage of two dtypes": (
        [tensor(), tensor(stored("0", 4, "IntStorage"))], "malformed", 'storage "0" in two ways'
    ),
    "a view of a storage": (
        tensor(stored("0", 4, "FloatStorage", None)), "malformed", "names a storage"
    ),
    "another persistent id": (Op(put(("module", "x")) + b"Q"), "malformed", "names a storage"),
    "a list as persistent id": (Op(put(["storage"]) + b"Q"), "malformed", "names a storage"),
    "a storage that is text": (tensor(Op(put("x"))), "malformed", "arguments"),
    "too few arguments": (called(REBUILD, stored()), "malformed", "hooks, or"),
    "hooks": (tensor(None, 0, (4,), (1,), False, {"a": 1}), "malformed", "hooks"),
    "a conjugated view": (
        tensor(None, 0, (4,), (1,), False, {}, {"conj": True}), "malformed", "conjugated"
    ),
    "a parameter of text": (called(SHARED, "x", True, {}), "malformed", "parameter"),
    "a parameter with hooks": (called(SHARED, tensor(), True, {"a": 1}), "malformed", "parameter"),
    "complex numbers of 128 bits": (
        tensor(stored("0", 1, "ComplexDoubleStorage")), "dtype_unusable", "is complex128"
    ),
    "quantised numbers": (tensor(stored("0", 16, "QInt8Storage")), "dtype_unusable", "is qint8"),
    "4-bit numbers": (
        {"w": called(V3, stored(), 0, (4,), (1,), False, {}, named("torch", "float4_e2m1fn_x2"))},
        "dtype_unusable", 'tensor "w": is float4_e2m1fn_x2',
    ),
    "a tensor of another class": (
        called(TYPED, REBUILD, ORDERED, PLAIN, {}), "malformed", "another class"
    ),
    "calls in calls": (
        Op(TYPED + CALLS * 10_000 + put(CALL) + b"}t" * 10_000 + b"R"), "malformed", "another class"
    ),
    "a dtype that is text": (
        called(V3, stored(), 0, (4,), (1,), False, {}, "float32"), "malformed", "arguments"
    ),
    "a size of a number": (called(named("torch", "Size"), 4), "malformed", "torch.Size"),
    "a device of a number": (called(named("torch", "device"), 4), "malformed", "torch.device"),
    "bytes of another encoding": (
        called(named("_codecs", "encode"), "x", "rot13"), "malformed", "latin1"
    ),
    "bytes that are none": (
        called(named("_codecs", "encode"), "漢", "latin1"), "malformed", "ordinal"
    ),
    "a counter of text": (called(named("collections", "Counter"), "x"), "malformed", "Counter"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_a_hostile_tensor_is_refused(name):
    value, code, message = TENSORS[name]
    refused(built(value), code, message)
