"""What the shapes of LyCORIS's parts tell: the weight's, DoRA's axis, GLoRA's age."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from loratools.adapter import Leaf


def axis_of(magnitude: Leaf, out: int, width: int | None) -> Literal["out", "in"]:
    """Which side magnitudes are of: (out, 1, ...) or (1, in, ...); out where both fit."""
    shape = magnitude.shape
    if len(shape) < 2 or (shape[1] == 1 and shape[0] == out):
        return "out" if shape[:1] == (out,) or width is None or shape[:1] != (width,) else "in"
    if len(shape) > 2 and shape[0] == 1 and shape[1] == out and width is not None:
        # PEFT's (1, out, 1, 1) for convolutions, where it cannot be LyCORIS's (1, in, 1, 1).
        return "in" if shape[1] == width else "out"
    return "in"


def glora_age(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which order GLoRA's factors are in: "new", "old", "both" or "" (neither).

    New: a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, ...); old: a1 (r, in), a2 (in, r),
    b1 (r, in), b2 (out, r). Where both fit, the rank is the smaller number, for no rank is larger
    than its weight (ComfyUI:comfy/weight_adapter/glora.py asks the weight).
    """
    if any(len(shapes[name]) < 2 or 0 in shapes[name] for name in ("a1", "a2", "b1", "b2")):
        return ""
    a1, a2, b1, b2 = (shapes[name][:2] for name in ("a1", "a2", "b1", "b2"))
    if a1 != a2[::-1]:
        return ""
    core = shapes.get("bm")
    new, old = b2 == a2 and b1[1] == a2[0], b1 == a1 and b2[1] == a1[0] and core is None
    if core is not None and (len(core) < 3 or core[:2] != (a2[0], a2[0])):
        return ""
    if new and old:
        return "both" if a1[0] == a1[1] else "new" if a1[1] < a1[0] else "old"
    return "new" if new else "old" if old else ""


def is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf has two extents, none of them 0."""
    return len(leaf.shape) == 2 and 0 not in leaf.shape


def kernel(core: Leaf, first: int, second: int) -> tuple[int, ...] | None:
    """The kernel of a core (r, r, k...) between factors of these ranks; None where it is none."""
    fits = len(core.shape) > 2 and core.shape[:2] == (first, second) and 0 not in core.shape
    return core.shape[2:] if fits else None


def kronecker_shape(w: Mapping[str, Leaf]) -> tuple[int, ...] | None:
    """The weight's shape by the parts of a LoKr; None where they do not multiply."""
    factors = [leaf for name, leaf in w.items() if name not in ("w2", "t2")]
    if not all(is_matrix(leaf) for leaf in factors):
        return None
    whole = w.get("w2")
    if whole is not None and (len(whole.shape) < 2 or 0 in whole.shape):
        return None
    if "w1" not in w and w["w1_a"].shape[1] != w["w1_b"].shape[0]:
        return None
    out1, in1 = w["w1"].shape if "w1" in w else (w["w1_a"].shape[0], w["w1_b"].shape[1])
    if whole is not None:
        return None if "t2" in w else (out1 * whole.shape[0], in1 * whole.shape[1],
                                       *whole.shape[2:])  # fmt: skip
    a, b = w["w2_a"].shape, w["w2_b"].shape
    if "t2" not in w:
        return (out1 * a[0], in1 * b[1]) if a[1] == b[0] else None
    window = kernel(w["t2"], a[0], b[0])
    return None if window is None or a[0] != b[0] else (out1 * a[1], in1 * b[1], *window)
