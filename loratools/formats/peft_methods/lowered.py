"""Methods that are a LoRA once their parts are put together: GraLoRA, TinyLoRA, Uni-LoRA, Poly.

Nothing is put together before it is opened.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import Leaf, LowRank
from loratools.errors import error, shown
from loratools.formats.peft_methods.found import Found, Method, real, seed, whole
from loratools.formats.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor


def _misfit(reading: Reading, module: str, parts: Mapping[str, Leaf], more: str = "") -> None:
    said = ", ".join(f"{part} is {leaf.shape}" for part, leaf in sorted(parts.items()))
    reading.problem("shape_factors", f"{shown(module)}: {said}{more}", module)


def _wide(leaf: Leaf) -> Tensor:
    import torch

    return leaf.tensor().to(torch.float64)


# ------------------------------------------------------------------------------- GraLoRA


def read_gralora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Pairs of an input and an output block, each of low rank, and with hybrid_r a LoRA of all."""
    count, hybrid = whole(config, "gralora_k", 2), whole(config, "hybrid_r", 0)
    for module, parts in found.each(reading, "gralora_A", "gralora_B"):
        a, b = parts["gralora_A"], parts["gralora_B"]
        down, up = (parts.get(f"gralora_{side}_general.weight") for side in "AB")
        rank = a.shape[2] if len(a.shape) == 3 else 0
        good = rank > 0 and len(b.shape) == 3 and 0 < count == a.shape[0] == b.shape[0]
        good = good and rank == b.shape[1] and rank % count == 0
        if good and down is not None and up is not None:
            wanted = ((hybrid, count * a.shape[1]), (count * b.shape[2], hybrid))
            good = (down.shape, up.shape) == wanted
        elif hybrid or down is not None or up is not None:
            good = False
        if not good:
            _misfit(reading, module, parts, f", with gralora_k={count} and hybrid_r={hybrid}")
            continue
        scaling = real(config, "alpha", 64) / (rank + hybrid)
        reading.deltas[f"{module}.weight"] = _blockwise(a, b, down, up, scaling)


def _blockwise(a: Leaf, b: Leaf, down: Leaf | None, up: Leaf | None, scaling: float) -> LowRank:
    """Rank k·r: of an input block's rank, share j goes to output block j.

    A is (k, in/k, r), B (k, r, out/k) (peft:tuners/gralora/layer.py).
    """
    count, inner, rank = a.shape
    outer, share = b.shape[2], rank // count

    def lower() -> Tensor:
        import torch

        blocks = _wide(a).transpose(1, 2)  # (n, j·share + s, i), for input block n
        return torch.block_diag(*blocks)  # type: ignore[no-untyped-call, no-any-return]

    def upper() -> Tensor:
        blocks = _wide(b).reshape(count, count, share, outer)  # (j, n, s, o)
        found = blocks.new_zeros(count, outer, count, count, share)  # (j, o, n, j, s)
        for j in range(count):
            found[j, :, :, j] = blocks[j].permute(2, 0, 1)
        return found.reshape(count * outer, count * rank)

    low = views.later(a.name, "F64", (count * rank, count * inner), lower)
    high = views.later(b.name, "F64", (count * outer, count * rank), upper)
    if down is not None and up is not None:
        low, high = views.joined([low, down]), views.joined([high, up], 1)
    return LowRank(low, high, scaling)


# ------------------------------------------------------------------------------- TinyLoRA


def read_tinylora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """ΔW = B·(Σ v_i·P_i)·A (arXiv 2602.04118); A, B, and mostly P, are in the file.

    Which v is a module's own, the file does not say: PEFT counts modules as the model has them,
    and draws P from a seed plus that count, so that P itself tells it.
    """
    vectors = {
        name.partition(".")[2]: leaf
        for name, leaf in found.shared.items()
        if name.startswith("tinylora_v.")
    }
    first, size = seed(config, "projection_seed", 42), whole(config, "u", 64)
    tying = real(config, "weight_tying", 0.0)
    count = len(found.modules)
    groups = max(1, round(count * (1.0 - tying)))
    length = max(1, count // groups)
    used = {str(min(i // length, groups - 1)) for i in range(count)}
    if set(vectors) != used or any(v.shape != (size,) for v in vectors.values()):
        listed = ", ".join(sorted(vectors)) or "none"
        message = f"its vectors are {shown(listed)}; {count} modules with u={size} have {len(used)}"
        reading.problem("config_conflict", message)
        return
    for module, parts in found.each(reading, "tinylora_A", "tinylora_B"):
        a, b, p = (parts.get(f"tinylora_{side}") for side in "ABP")
        assert a is not None
        assert b is not None
        rank = a.shape[0]
        good = len(a.shape) == len(b.shape) == 2 and b.shape[1] == rank > 0
        if not good or (p is not None and p.shape != (size, rank, rank)):
            _misfit(reading, module, parts, f", with u={size}")
            continue
        if p is None and count > 1:
            message = (
                f"{shown(module)}: its projections are not in the file, and their seed counts the "
                "modules in the model's own order; save with save_projection=True"
            )
            reading.problem("missing", message, module)
            continue
        place = None if p is None else functools.partial(_place, p, rank, first, size, count)
        between = functools.partial(_between, vectors, p, place, length, groups, first, rank)
        low = views.later(a.name, "F64", a.shape, functools.partial(_turned, between, a))
        key = f"{module}.weight"
        # What looks tokens up is B (tokens, r) and A (r, dim) of the stored table itself.
        reading.deltas[key] = LowRank(low, b, 1.0)


def _turned(between: Any, a: Leaf) -> Tensor:
    found: Tensor = between() @ _wide(a)
    return found


def _drawn(start: int, size: int, rank: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(start % 2**64)
    return torch.normal(0.0, 1.0 / rank**0.5, size=(size, rank, rank), generator=generator)


def _place(p: Leaf, rank: int, first: int, size: int, count: int) -> int:
    """Which of the modules this one is: the count whose seed draws its P."""
    stored = p.tensor()
    for place in range(count):
        drawn = _drawn(first + place, size, rank).to(stored.dtype)
        if bool((drawn.double() - stored.double()).abs().max() <= 1e-6):
            return place
    raise error(
        "config_conflict",
        f"{shown(p.name)}: no module's seed (projection_seed={first} and on) draws these numbers, "
        "so that its vector is not known",
    )


def _between(
    vectors: Mapping[str, Leaf], p: Leaf | None, place: Any, length: int, groups: int, first: int,
    rank: int,
) -> Tensor:  # fmt: skip
    """Σ v_i·P_i of a module, with the vector of its group."""
    import torch

    at = place() if place is not None and groups > 1 else 0
    v = _wide(vectors[str(min(at // length, groups - 1))])
    drawn = _wide(p) if p is not None else _drawn(first, len(v), rank).to(torch.float64)
    return torch.einsum("i,ijk->jk", v, drawn)


# ------------------------------------------------------------------------------- Uni-LoRA


def read_unilora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """A and B picked number by number from one vector, each times its scale."""
    theta = found.shared.get("unilora_theta_d")
    if theta is None or len(theta.shape) != 1 or not theta.numel:
        reading.problem("missing", "the file has no vector unilora_theta_d")
        return
    if not found.modules:
        reading.problem(
            "missing",
            "the file names no module: PEFT draws their places in one vector again, in the model's "
            "own order of modules; save with save_indices=True",
        )
        return
    sides = [f"unilora_{what}_{side}" for side in "AB" for what in ("indices", "scales")]
    for module, parts in found.each(reading, *sides):
        at_a, scale_a, at_b, scale_b = (parts[side] for side in sides)
        good = len(at_a.shape) == len(at_b.shape) == 2 and at_a.shape[0] == at_b.shape[1] > 0
        if not good or at_a.shape != scale_a.shape or at_b.shape != scale_b.shape:
            _misfit(reading, module, parts)
            continue
        low, high = (
            views.later(at.name, "F64", at.shape, functools.partial(_picked, theta, at, scale))
            for at, scale in ((at_a, scale_a), (at_b, scale_b))
        )
        reading.deltas[f"{module}.weight"] = LowRank(low, high, 1.0)


def _picked(theta: Leaf, at: Leaf, scale: Leaf) -> Tensor:
    import torch

    where = at.tensor().to(torch.int64)
    if not 0 <= int(where.min()) <= int(where.max()) < theta.numel:
        raise error("malformed", f"{shown(at.name)} names places outside {shown(theta.name)}")
    return _wide(theta)[where] * _wide(scale)


# ------------------------------------------------------------------------------- Poly


def read_poly(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """A mixture of skills, by split of the inputs and outputs, that a task's own logits weigh."""
    tasks = whole(config, "n_tasks", 1)
    said = reading.assume.get("task")
    if said is None and tasks != 1:
        reading.problem(
            "not_foldable",
            f"it holds {tasks} tasks, whose weights differ: --assume task=0 folds one of them",
        )
        return
    if said is not None and not (said.isascii() and said.isdigit() and int(said[:9]) < tasks):
        raise error("usage", f"--assume task={shown(said)}: its tasks are 0 to {tasks - 1}")
    task = int(said or 0)
    needed = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
    for module, parts in found.each(reading, *needed):
        a, b, logits = (parts[part] for part in needed)
        good = len(a.shape) == len(b.shape) == 4 and a.shape[:2] == b.shape[:2]
        splits, skills, inner, rank = a.shape if good else (0, 0, 0, 0)
        if not good or b.shape[2] != rank or logits.shape != (tasks, splits * skills) or not rank:
            _misfit(reading, module, parts, f", with {tasks} tasks")
            continue
        weights = functools.partial(_mixture, logits, task, splits, skills)
        shape_a, shape_b = (rank, splits * inner), (splits * b.shape[3], rank)
        low = views.later(a.name, "F64", shape_a, functools.partial(_mixed, weights, a, False))
        high = views.later(b.name, "F64", shape_b, functools.partial(_mixed, weights, b, True))
        reading.deltas[f"{module}.weight"] = LowRank(low, high, 1 / rank)


def _mixture(logits: Leaf, task: int, splits: int, skills: int) -> Tensor:
    chosen = _wide(logits)[task].reshape(splits, skills).sigmoid()
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-12)


def _mixed(weights: Any, leaf: Leaf, outputs: bool) -> Tensor:
    """(splits, skills, in, r) as (r, splits · in), or (splits, skills, r, out) as (… · out, r)."""
    import torch

    mixed = torch.einsum("qs,qsdr->qdr", weights(), _wide(leaf))
    if outputs:
        return mixed.transpose(1, 2).reshape(-1, mixed.shape[1])
    return mixed.reshape(-1, mixed.shape[2]).T.contiguous()


METHODS = {
    "GRALORA": Method.of(
        read_gralora,
        "gralora_A gralora_B gralora_A_general.weight gralora_B_general.weight",
        fields="r hybrid_r alpha gralora_dropout gralora_k",
    ),
    "TINYLORA": Method.of(
        read_tinylora,
        "tinylora_A tinylora_B tinylora_P",
        shared="tinylora_v.*",
        fields="r u weight_tying projection_seed save_projection tinylora_dropout init_v_bound",
    ),
    "UNILORA": Method.of(
        read_unilora,
        "unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B",
        shared="unilora_theta_d",
        fields="r theta_d_length proj_seed unilora_dropout init_theta_d_bound save_indices",
    ),
    "POLY": Method.of(
        read_poly,
        "poly_lora_A poly_lora_B poly_router.module_logits",
        fields="r poly_type n_tasks n_skills n_splits",
    ),
}
