"""What is a function of the weight made an update of it, given the base: factors where it has them.

Where it has none exactly, the whole task vector W - W0 stands there, to be cut to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import kinds
from loratools.adapter import (
    Adapter,
    Additive,
    Chained,
    Dense,
    Experts,
    Kind,
    Leaf,
    LowRank,
    Made,
    Relative,
    Renormed,
    Replace,
    Rotated,
    Spectral,
)
from loratools.bind import bind
from loratools.errors import Problem, shown
from loratools.fitting import fitted
from loratools.views import later, reshaped, turned

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.weights.base import Base


RESIDUAL = ("pissa", "olora")  # of `Chained`: pairs that fit what was left of the base


def plain_upon(
    adapter: Adapter, base: Base, *, cut: bool, chosen: Callable[[str], bool]
) -> tuple[Adapter, list[Problem]]:
    """The adapter as a plain LoRA upon a base, as far as its updates have factors.

    `cut` says that a rank comes afterwards: a DoRA then becomes its task vector too. The problems
    are those of updates that do not fit the base. Weights are read when the leaves are opened.
    """
    other = adapter.config.get("peft_type", "LORA") not in ("LORA", "TRAINABLE_TOKENS")
    other = other or bool(adapter.config.get("use_bdlora"))
    if not other and not any(_concerned(d, cut) for k, d in adapter.deltas.items() if chosen(k)):
        return adapter, []
    wanted = {k for k, d in adapter.deltas.items() if chosen(k) and not _is_value(d)}
    some = replace(adapter, deltas={k: adapter.deltas[k] for k in adapter.deltas if k in wanted})
    own = {id(delta): key for key, delta in some.deltas.items()}
    here = fitted(some, base.tensors, base.config).adapter.deltas
    names = {there: own[id(delta)] for there, delta in here.items() if id(delta) in own}
    plan = bind([some], base)
    errors = [p for p in plan.problems if p.severity == "error" and p.code != "no_effect"]
    if any(p.code != "unmatched" for p in errors):
        return adapter, errors
    new = dict(adapter.deltas)
    for target in plan.targets.values():
        for term in target.terms:
            if target.base is None or term.key not in names:
                continue
            weight = turned(target.base) if term.place.transposed else target.base
            new[names[term.key]] = _plain(term.delta, weight, cut)
    gone = wanted - set(names.values())
    absent = {k for k in wanted if k.endswith(".bias") and new[k] is adapter.deltas[k]}
    kept = {k: d for k, d in new.items() if k not in absent or k in gone}
    lost = [p for p in errors if p.code == "unmatched"]
    config = adapter.config
    if any(isinstance(d, Chained) and d.method in RESIDUAL for d in adapter.deltas.values()):
        config = {**config, "init_lora_weights": True}  # the new pairs fit the plain base
    return replace(adapter, deltas=kept, config=config, original={}), lost


def _is_value(delta: Kind) -> bool:
    return isinstance(delta, Replace) and delta.then is None


def _concerned(delta: Kind, cut: bool) -> bool:
    """Whether a delta is more than a plain LoRA, a bias or values in full."""
    match delta:
        case LowRank() | Dense() | Experts():
            return False
        case Renormed(axis="out", delta=LowRank()):
            return cut
        case Replace(then=then):
            return then is not None and _concerned(then, cut)
        case _:
            return True


def _plain(delta: Kind, weight: Leaf, cut: bool) -> Kind:
    """A delta upon a weight (out, in, *kernel) as factors, or else as its whole task vector."""
    if isinstance(delta, Replace):
        then = delta.then
        upon = delta.value if delta.rows is None else weight
        return delta if then is None else replace(delta, then=_plain(then, upon, cut))
    if not _concerned(delta, cut):
        return _in_kernel(delta, weight.shape)
    if len(weight.shape) < 2:  # a bias, a norm: its new values
        return Replace(
            later(weight.name, weight.dtype, weight.shape, lambda: _values(delta, weight))
        )
    made = _factors(delta, weight)
    if made is not None:
        return _in_kernel(made, weight.shape)
    shape = weight.shape
    whole = later(
        weight.name, "F64", (shape[0], math.prod(shape[1:])), lambda: _change(delta, weight)
    )
    return Spectral("made", {"whole": whole}, shape)


def _factors(delta: Kind, weight: Leaf) -> LowRank | None:
    """Factors that say the same, of a rank below the weight's size."""
    if isinstance(delta, Made):
        return kinds.low_rank(delta)
    given = None
    if isinstance(delta, Rotated | Chained):
        wide = _matrix(weight)
        given = (kinds.rotated if isinstance(delta, Rotated) else kinds.chained).given(delta, wide)
    return given


def _in_kernel(delta: Kind, shape: tuple[int, ...]) -> Kind:
    """Factors of a convolution's weight as a matrix, in the shapes of its kernel."""
    if isinstance(delta, Renormed) and isinstance(delta.delta, LowRank):
        return replace(delta, delta=_in_kernel(delta.delta, shape))  # type: ignore[arg-type]
    if not isinstance(delta, LowRank) or len(shape) < 3 or delta.a.shape[1:] == shape[1:]:
        return delta
    if math.prod(delta.a.shape[1:]) != math.prod(shape[1:]):
        return delta
    ones = [1 for _ in shape[2:]]
    a = reshaped(delta.a, delta.rank, *shape[1:])
    return replace(delta, a=a, b=reshaped(delta.b, delta.b.shape[0], delta.rank, *ones))


def _matrix(weight: Leaf) -> Tensor:
    import torch

    from loratools.stored import scale_of

    wide = weight.tensor().to(torch.float64) * scale_of(weight)
    return wide.reshape(weight.shape[0], -1)


def _change(delta: Kind, weight: Leaf) -> Tensor:
    """W - W0 (out, in * kernel) in float64."""
    from loratools.algebra import materialise

    wide = _matrix(weight)
    if isinstance(delta, Additive):
        return materialise(delta).reshape(wide.shape)
    return materialise(delta, wide)


def _values(delta: Kind, weight: Leaf) -> Tensor:
    """The new values of a vector, in its own dtype."""
    wide = _matrix(weight)
    from loratools.algebra import materialise

    whole = wide + materialise(delta, wide)
    kind = weight.tensor().dtype
    return whole.reshape(weight.shape).to(kind)


def needs_base(adapter: Adapter, chosen: Callable[[str], bool], *, cut: bool) -> list[Problem]:
    """The updates that are functions of the weight, where no base is given to apply them to."""
    bound = [
        k
        for k, d in adapter.deltas.items()
        if chosen(k) and isinstance(_top(d), Relative | Renormed)
    ]
    if not bound or not cut:
        return []
    kind = type(_top(adapter.deltas[bound[0]])).__name__
    what, reason = f"functions of the base's weights ({kind})", "what they change depends on W0"
    if kind == "Renormed":
        what, reason = "DoRA", "the magnitudes belong to W0 + BA"
    message = (
        f"{len(bound)} targets are {what}, {shown(bound[0])} first: their rank cannot be reduced "
        f"alone, since {reason}"
    )
    remedy = "give the base (--base) with --to peft, or convert it without --rank and --energy"
    return [Problem("needs_base", message, "error", adapter.name, bound[0], remedy)]


def _top(delta: Kind) -> Kind:
    return _top(delta.then) if isinstance(delta, Replace) and delta.then is not None else delta


__all__ = ["needs_base", "plain_upon"]
