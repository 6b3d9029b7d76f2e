"""Stored tensors are compared bit by bit, whatever their dtype, and what differs is counted."""

import struct

import pytest
import torch

from loratools.adapter import Leaf
from loratools.containers.local import LocalFile
from loratools.proving.differences import Mismatch, compare_leaves, each


def on_disk(folder, name, dtype, shape, raw, strides=None):
    path = folder / name
    path.write_bytes(b"head" + raw)
    return Leaf(name, dtype, shape, LocalFile(path), 4, strides)


@pytest.mark.parametrize(
    ("dtype", "form", "before", "after", "distance"),
    [
        ("I64", "q", 7, 9, 2),
        ("BOOL", "?", False, True, 1),
        ("U8", "B", 3, 250, 247),
        ("F32", "f", 1.5, -1.0, 2.5),
        ("F32", "f", 0.0, -0.0, 0.0),
        ("F16", "e", 1.5, 2.0, 0.5),
        ("F64", "d", 1.0, 1 + 2**-52, 2**-52),
        ("F8_E4M3", "B", 0x38, 0x40, 1.0),
        ("F4", "B", 0x11, 0x21, 16),
    ],
)
def test_one_changed_element_is_found(dtype, form, before, after, distance, tmp_path):
    count = 12 if dtype == "F4" else 6
    values = [before] * 6
    one = on_disk(tmp_path, "a", dtype, (2, count // 2), struct.pack(f"<6{form}", *values))
    same = on_disk(tmp_path, "b", dtype, (2, count // 2), struct.pack(f"<6{form}", *values))
    values[4] = after
    other = on_disk(tmp_path, "c", dtype, (2, count // 2), struct.pack(f"<6{form}", *values))
    assert compare_leaves(one, same).mismatch("x", "t", same, "f") is None
    found = compare_leaves(one, other)
    assert (found.elements, found.first) == (1, 4)
    if dtype != "F4":  # two of them share a byte
        expected = Mismatch("x", "t", "f", 1, (1, 1), pytest.approx(distance % 256))
        assert found.mismatch("x", "t", other, "f") == expected


def test_tensors_in_memory_and_with_strides_are_compared(tmp_path):
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    stored = on_disk(tmp_path, "a", "F32", (3, 4), values.numpy().tobytes())
    turned = on_disk(tmp_path, "b", "F32", (3, 4), values.T.contiguous().numpy().tobytes(), (1, 3))
    assert compare_leaves(Leaf.of("x", values), stored).elements == 0
    assert compare_leaves(turned, stored).elements == 0
    values[2, 1] = torch.nan
    found = compare_leaves(Leaf.of("x", values), stored)
    assert found.mismatch("x", "t", stored, None) == Mismatch("x", "t", None, 1, (2, 1), torch.inf)
    assert found.mismatch("x", "t", stored, None).as_json()["worst"] is None


def test_another_dtype_is_compared_after_rounding():
    wide = torch.tensor([1.0, 1 + 2.0**-9, 1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    narrow = torch.tensor([1.0, 1.0, 1 + 2.0**-7], dtype=torch.bfloat16)
    assert compare_leaves(Leaf.of("a", wide), Leaf.of("b", narrow)).elements == 0
    assert compare_leaves(Leaf.of("b", narrow), Leaf.of("a", wide)).elements == 2


def test_empty_and_single_numbers_are_compared():
    for shape in ((0,), (0, 3), (3, 0), ()):
        one = Leaf.of("a", torch.zeros(shape))
        assert compare_leaves(one, one).elements == 0
    assert (
        compare_leaves(Leaf.of("a", torch.tensor(1.0)), Leaf.of("b", torch.tensor(2.0))).first == 0
    )


def test_results_come_in_order_and_errors_come_out():
    done = []
    found = each(lambda n: n * n, [3, 1, 2], sizes=[3, 1, 2], progress=lambda *at: done.append(at))
    assert found == [9, 1, 4]
    assert sorted(done)[-1] == (6, 6)
    with pytest.raises(ZeroDivisionError):
        each(lambda n: 1 / n, [1, 0], sizes=[1, 1], progress=None)
