"""LoHa, LoKr and (IA)³ as PEFT saves them: tensors and config of an adapter of one kind."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratools import views
from loratools.adapter import Adapter, Hadamard, Kind, Kronecker, Leaf, Replace, Scaled
from loratools.formats.peft_config import exactly, plain_number
from loratools.formats.peft_keys import BASE, PREFIX

# What a config of another type says of the base or the task, and stays true.
CARRIED = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")


@dataclass(slots=True)
class Written:
    """Tensors by key, rank and scaling by module, what else the config says, what has no place."""

    tensors: dict[str, Leaf]
    pairs: dict[str, tuple[int, float]]
    said: dict[str, Any]
    beyond: dict[str, str]


def flavour(adapter: Adapter) -> str | None:
    """The type, other than LoRA, under which PEFT holds all deltas of an adapter; else None."""
    kinds = {type(d) for d in adapter.deltas.values() if not _is_saved(d)}
    if kinds == {Hadamard}:
        return "LOHA"
    if kinds == {Kronecker}:
        return "LOKR"
    by = {d.by for d in adapter.deltas.values() if isinstance(d, Scaled)}
    return "IA3" if kinds == {Scaled} and "elements" not in by else None


def _is_saved(delta: Kind) -> bool:
    return isinstance(delta, Replace) and delta.rows is None and delta.then is None


def written(adapter: Adapter, kind: str) -> Written:
    """What PEFT would save for an adapter of a flavour."""
    found = Written({}, {}, {}, {})
    deltas = {key: d for key, d in adapter.deltas.items() if not _is_saved(d)}
    match kind:
        case "LOHA":
            _write_loha(deltas, found)
        case "LOKR":
            _write_lokr(deltas, found)
        case _:
            _write_ia3(deltas, found)
    for key, delta in adapter.deltas.items():
        if isinstance(delta, Replace) and key not in deltas:
            module, _, parameter = key.rpartition(".")
            inside = f".{BASE}" if f"{module}.weight" in deltas else ""
            found.tensors[f"{PREFIX}{module}{inside}.{parameter}"] = delta.value
    return found


def method_config(adapter: Adapter, kind: str, found: Written) -> dict[str, Any]:
    """The config beside them; fields that hold whatever the type are carried over."""
    source = {k: adapter.config[k] for k in CARRIED if adapter.config.get(k) is not None}
    config = {"peft_type": kind, "base_model_name_or_path": None, "task_type": None, **source}
    modules = sorted({key.rpartition(".")[0] for key, d in adapter.deltas.items()
                      if not _is_saved(d)})  # fmt: skip
    config |= {"inference_mode": True, "target_modules": modules}
    saved = {key.rpartition(".")[0] for key, d in adapter.deltas.items() if _is_saved(d)}
    named = source.get("modules_to_save") or []
    if saved and not all(any(f"{s}.".endswith(f"{n}.") for n in named) for s in saved):
        config["modules_to_save"] = sorted(saved)
    if found.pairs:
        config |= _ranks(found.pairs)
    return config | found.said


def _ranks(pairs: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    alphas = {m: plain_number(scaling * rank) for m, (rank, scaling) in pairs.items()}
    rank = Counter(r for r, _ in pairs.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {exactly(m): r for m, (r, _) in pairs.items() if r != rank},
        "alpha_pattern": {exactly(m): a for m, a in alphas.items() if a != alpha},
    }


def _named(parts: Mapping[str, Leaf | None], module: str) -> Iterator[tuple[str, Leaf]]:
    for part, leaf in parts.items():
        if leaf is not None:
            yield f"{PREFIX}{module}.{part}", leaf


def _in_conv2d(core: Leaf | None) -> Leaf | None:
    """A core as PEFT keeps it: one kernel axis is followed by one of 1."""
    if core is None or len(core.shape) != 3:
        return core
    return views.reshaped(core, *core.shape, 1)


# ------------------------------------------------------------------------------- LoHa


def _write_loha(deltas: Mapping[str, Kind], found: Written) -> None:
    cores = any(isinstance(d, Hadamard) and d.t1 is not None for d in deltas.values())
    found.said = {"use_effective_conv2d": cores}
    for key, delta in deltas.items():
        module = key.rpartition(".")[0]
        if not isinstance(delta, Hadamard):
            continue
        if cores and delta.t1 is None and math.prod(delta.shape[2:]) > 1:
            found.beyond[key] = "a LoHa of a convolution without cores beside others with them"
            continue
        parts = {"hada_w1_a": delta.w1_a, "hada_w1_b": delta.w1_b, "hada_w2_a": delta.w2_a,
                 "hada_w2_b": delta.w2_b, "hada_t1": _in_conv2d(delta.t1),
                 "hada_t2": _in_conv2d(delta.t2)}  # fmt: skip
        found.tensors |= dict(_named(parts, module))
        found.pairs[module] = (delta.w1_b.shape[0], delta.scaling)


# ------------------------------------------------------------------------------- LoKr


def factors_of(size: int, factor: int) -> tuple[int, int]:
    """How PEFT splits a size in two: by the factor, else the smaller first (lokr/layer.py)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= limit)
    return small, size // small


def _write_lokr(deltas: Mapping[str, Kind], found: Written) -> None:
    pairs = {k: d for k, d in deltas.items() if isinstance(d, Kronecker)}
    tried = [-1, *sorted({s for d in pairs.values() for s in _sides(d)[0]}, reverse=True)]
    fit = {f: sum(_split_by(d, f) is not None for d in pairs.values()) for f in tried}
    factor = max(tried, key=lambda f: fit[f])
    both = any(d.w1 is None for d in pairs.values())
    cores = any(d.t2 is not None for d in pairs.values())
    found.said = {
        "decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": cores
    }  # fmt: skip
    for key, delta in pairs.items():
        split = _split_by(delta, factor)
        if split is None:
            small, large = _sides(delta)
            found.beyond[key] = f"a LoKr of {small} and {large}, which its factors do not allow"
        elif cores and delta.t2 is None and delta.w2 is None and math.prod(delta.shape[2:]) > 1:
            found.beyond[key] = "a LoKr of a convolution without a core beside others with one"
        else:
            _write_product(key.rpartition(".")[0], delta, *split, both, found)


Side = tuple[int, int]
KERNELS = (1, 9, 3, 25, 5, 49, 7, 27)


def _sides(delta: Kronecker) -> tuple[Side, Side]:
    """Rows and columns of W1 and of W2, the kernel left out."""
    if delta.w1 is not None:
        first = delta.w1.shape[0], delta.w1.shape[1]
    else:
        assert delta.w1_a is not None
        assert delta.w1_b is not None
        first = delta.w1_a.shape[0], delta.w1_b.shape[1]
    return first, (delta.shape[0] // first[0], delta.shape[1] // first[1])


def _split_by(delta: Kronecker, factor: int) -> tuple[Side, Side] | None:
    """The sides of both factors where PEFT would split the weight so; else None.

    A convolution's W2 may stand as a matrix, in2 * kernel wide; the usual kernels are tried.
    """
    small, (height, width) = _sides(delta)
    flat = len(delta.shape) == 2 and delta.w2 is None
    for kernel in KERNELS if flat else KERNELS[:1]:
        large = height, width // kernel
        sizes = zip(small, large, strict=True)
        if width % kernel == 0 and all(factors_of(m * n, factor) == (m, n) for m, n in sizes):
            return small, large
    return None


def _write_product(
    module: str, delta: Kronecker, small: Side, large: Side, both: bool, found: Written
) -> None:
    """The factors under a rank by which PEFT has just these whole, and these not."""
    rank, whole1, whole2 = _rank_for(delta, max(small), max(large), both)
    w1, w2 = delta.w1, delta.w2
    parts: dict[str, Leaf | None] = {}
    if whole1:
        parts["lokr_w1"] = w1 if w1 is not None else _product(delta.w1_a, delta.w1_b, small)
    else:
        parts |= {"lokr_w1_a": delta.w1_a, "lokr_w1_b": delta.w1_b}
    if whole2:
        inner = (*large, *delta.shape[2:])
        parts["lokr_w2"] = w2 if w2 is not None else _second(delta, inner)
    else:
        core = _in_conv2d(delta.t2)
        parts |= {"lokr_w2_a": delta.w2_a, "lokr_w2_b": delta.w2_b, "lokr_t2": core}
    found.tensors |= dict(_named(parts, module))
    found.pairs[module] = (rank, delta.scaling)


def _rank_for(delta: Kronecker, small: int, large: int, both: bool) -> tuple[int, bool, bool]:
    """A rank by which PEFT has whole what must be, and whether W1 and W2 are whole then.

    PEFT factors a side only below half of its larger extent, and both sides at one rank.
    """
    own = [None if b is None else b.shape[0] for b in (delta.w1_b, delta.w2_b)]
    rank = next((r for r in own if r is not None), -(-large // 2))
    for _ in range(3):  # each round keeps one side more whole
        wholes = not (both and rank < small / 2), rank >= large / 2
        if not wholes[0] and own[0] != rank:
            rank = max(rank, -(-small // 2))
        elif not wholes[1] and own[1] != rank:
            rank = max(rank, -(-large // 2))
    return rank, not (both and rank < small / 2), rank >= large / 2


def _product(a: Leaf | None, b: Leaf | None, shape: tuple[int, ...]) -> Leaf:
    assert a is not None
    assert b is not None
    left, right = a, b
    return views.later(
        a.name, "F32", shape, lambda: (left.tensor().double() @ right.tensor().double()).float()
    )


def _second(delta: Kronecker, shape: tuple[int, ...]) -> Leaf:
    """W2 whole, where PEFT would not factor it."""
    a, b, core = delta.w2_a, delta.w2_b, delta.t2
    assert a is not None
    assert b is not None

    def make() -> Any:
        import torch

        up, down = a.tensor().double(), b.tensor().double()
        if core is None:
            return (up @ down).reshape(shape).float()
        whole = torch.einsum("ij...,jn,ip->pn...", core.tensor().double(), down, up)
        return whole.reshape(shape).float()

    return views.later(a.name, "F32", shape, make)


# ------------------------------------------------------------------------------- (IA)³


def _write_ia3(deltas: Mapping[str, Kind], found: Written) -> None:
    columns = []
    for key, delta in deltas.items():
        module, _, parameter = key.rpartition(".")
        weight = deltas.get(f"{module}.weight")
        if not isinstance(delta, Scaled) or not isinstance(delta.factor, Leaf):
            continue
        if parameter == "bias":
            if not isinstance(weight, Scaled) or weight.by != "rows" or not _same(weight, delta):
                found.beyond[key] = "a scaled bias whose weight's rows are not scaled alike"
            continue
        if delta.by == "rows" and f"{module}.bias" not in deltas:
            found.beyond[key] = "scaled rows that leave the bias as it is: PEFT scales it too"
            continue
        if delta.by == "columns":
            columns.append(module)
        found.tensors[f"{PREFIX}{module}.ia3_l"] = _vector(delta, delta.factor)
    rows = [k.rpartition(".")[0] for k, d in deltas.items()
            if isinstance(d, Scaled) and d.by == "rows" and k.endswith(".weight")]  # fmt: skip
    clash = any(other.endswith(name) for name in columns for other in rows)
    found.said = {"feedforward_modules": "|".join(map(_escaped, columns)) if clash else columns}


def _same(one: Scaled, other: Scaled) -> bool:
    return one.factor == other.factor and one.offset == other.offset


def _vector(delta: Scaled, factor: Leaf) -> Leaf:
    """The factor as PEFT shapes it: (out, 1) or (1, in), of a convolution (1, n, 1, ...)."""
    n, kernel = factor.numel, [1 for _ in factor.shape[2:]]
    shape = (1, n, *kernel) if kernel or delta.by == "columns" else (n, 1)
    flat = views.reshaped(factor, *shape)
    if not delta.offset:
        return flat
    return views.later(
        factor.name, "F32", shape, lambda: (flat.tensor().double() + delta.offset).float()
    )


def _escaped(name: str) -> str:
    return re.sub(r"(\W)", r"\\\1", name)
