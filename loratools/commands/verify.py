"""`verify`: prove that an output is what its receipt, or the maths, says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loratools import receipt
from loratools.adapter import Adapter
from loratools.commands import sources
from loratools.commands.check import fit, load_all, ties_from
from loratools.commands.judging import judge
from loratools.commands.weighing import Given, weights_for
from loratools.errors import Problem, error, refusal, shown
from loratools.plan import Plan, Ties
from loratools.weights.base import Base, headers, text_config

if TYPE_CHECKING:
    from loratools.proving.differences import Mismatch
    from loratools.proving.foreign import Signal
    from loratools.proving.inventory import Inventory

Proved = Literal["hashes", "replay", "signature"]
Progress = Callable[[int, int], None]
UNCLEAR = "too little signal to tell"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was proved of an output; `ok` when nothing is otherwise than it should be."""

    ok: bool
    proved: Proved
    checked: int
    mismatches: tuple[Mismatch, ...]
    rule: str | None = None  # the rounding rule of another tool's fold
    strength: tuple[float, float] | str | None = None  # scaling and its standard error
    notes: tuple[str, ...] = ()
    signed: int | None = None  # files that a signature names, where one was checked
    unit: str = "tensors"  # what `checked` counts

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        strength: Any = self.strength
        if isinstance(strength, tuple):
            strength = {"scaling": strength[0], "standard_error": strength[1]}
        return {
            "ok": self.ok,
            "proved": self.proved,
            "checked": self.checked,
            "mismatches": [m.as_json() for m in self.mismatches],
            "rule": self.rule,
            "strength": strength,
            "notes": list(self.notes),
            "signed": self.signed,
            "unit": self.unit,
        }


def verify(
    model: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    weights: Sequence[Given] | Mapping[str, Any] | str | None = None,
    require: str | None = None,
    inputs: Sequence[str | Path] = (),
    key: str | Path | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    tied: bool = False,
    untie: bool = False,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> VerifyResult:
    """Prove an output by its receipt, or a fold of another tool by its base and adapters.

    With a receipt, hashes are compared, and where the inputs are found (among `base`, `adapters`
    and `inputs`, beside the output, in the working folder) everything is computed again.
    Without, each touched tensor must agree with one of the known ways to round W0 + ΔW, and each
    other one with the base. With `key`, a public one in PEM form, the folder's `model.sig` is
    checked over all its files, and what the receipt says as well. A mismatch is no exception: see
    `ok`. Raises ProofError where `require="replay"` cannot be met or where another key signed, and
    what reading the inputs raises.
    """
    if require not in (None, "hashes", "replay"):
        raise error("usage", f"--require {shown(require)}: expected hashes or replay")
    name, model = model, sources.pulled(model, every=key is not None, progress=progress)
    signed = None if key is None else _signed(model, key, str(name))
    if signed is not None and not signed.ok:
        return signed
    found = receipt.read(model)
    if found is None and signed is not None and base is None and not adapters:
        if require is not None:
            raise error("proof_failed", f"{shown(model)} is signed and has no receipt to prove")
        return signed
    if found is None:
        if base is None or not adapters:
            raise error(
                "usage",
                f"{shown(model)} has no receipt: give the --base and every --adapter it was "
                "folded from",
            )
        result = _foreign(
            model, base, adapters, weights, only=only, skip=skip, ties=ties_from(tied, untie),
            allow=allow, progress=progress,
        )  # fmt: skip
        return _with_signature(result, signed, model, require)
    if weights is not None or only or skip or tied or untie or allow:
        raise error(
            "usage",
            f"{shown(found.path)} says how it was made: leave weights, choice and waivers out",
        )
    from loratools.commands.replayed import by_receipt

    result = by_receipt(found, Path(model), base, adapters, inputs, progress=progress)
    if require == "replay" and result.ok and result.proved != "replay":
        missing = next(iter(result.notes), "inputs are missing")
        raise error("proof_failed", f"{shown(model)}: no replay was possible; {missing}")
    return _with_signature(result, signed, model, require)


# ------------------------------------------------------------------------------- signatures


def _signed(model: str | Path, key: str | Path, name: str) -> VerifyResult:
    """What a signature says of a folder's files; `name` is what the user calls it."""
    from loratools.hub import signing
    from loratools.proving.differences import Mismatch

    found = signing.check(model, key, name=name)
    words = (
        (found.changed, "is not the file that was signed"),
        (found.missing, "was signed and is not there"),
        (found.unsigned, "is there and was not signed"),
    )
    return VerifyResult(
        ok=found.ok,
        proved="signature",
        checked=0,
        mismatches=tuple(Mismatch(what, None, file) for files, what in words for file in files),
        signed=len(found.files),
    )


def _with_signature(
    result: VerifyResult, signed: VerifyResult | None, model: str | Path, require: str | None
) -> VerifyResult:
    """The proof of what an output says, beside that of who says it."""
    if signed is None:
        file = Path(model) / "model.sig"
        there = (f"{file.name} is there: --key PUBLIC.pem checks it",) if file.is_file() else ()
        return replace(result, notes=result.notes + there)
    if not result.ok or require is not None:
        return replace(result, signed=signed.signed)
    also = f"its receipt is proved by {result.proved} too: {result.checked} {result.unit} checked"
    return replace(result, proved="signature", signed=signed.signed, notes=(also, *result.notes))


# ------------------------------------------------------------------------------- other tools


def _foreign(
    model: str | Path,
    base: str | Path,
    adapters: Sequence[str | Path],
    weights: Sequence[Given] | Mapping[str, Any] | str | None,
    *,
    only: Sequence[str],
    skip: Sequence[str],
    ties: Ties | None,
    allow: Sequence[str],
    progress: Progress | None,
) -> VerifyResult:
    from loratools.proving.differences import Mismatch
    from loratools.proving.inventory import compare_all, said, take_inventory, wrong_size

    written = headers(model)
    paths, factors = weights_for([str(a) for a in adapters], weights, required=False)
    loaded = load_all(paths, ())
    over = sources.here(sources.base(base, loaded), progress)
    plan, problems = fit(
        loaded, over, weights=factors, only=only, skip=skip, ties=ties or _ties(over, written)
    )
    assert plan is not None
    inventory = take_inventory(plan, written)
    notes = _judged(inventory, [*problems, *_nonfinite(loaded)], allow)
    compared = compare_all(inventory, written, progress=progress)
    mismatches = [Mismatch(p.message) for p in written.problems] + compared.mismatches
    off = wrong_size(compared.signal)
    mismatches += ([] if off is None else [off]) + vocabulary(plan, written.config)
    if inventory.prefix.added or inventory.prefix.removed:
        notes.append(f"names: {inventory.prefix}")
    if compared.converted:
        notes.append(f"{compared.converted} untouched tensors are the base's in another dtype")
    return VerifyResult(
        ok=not mismatches,
        proved="replay",
        checked=compared.checked,
        mismatches=tuple(mismatches),
        rule=said(compared.rules),
        strength=_strength(compared.signal),
        notes=tuple(notes),
    )


def _ties(base: Base, written: Base) -> Ties | None:
    """Whether a tool left embedding and head tied, as its output shows it."""
    if base.tied() is None:
        return None
    return "untied" if written.tied() is None else "tied"


def _nonfinite(adapters: Sequence[Adapter]) -> list[Problem]:
    from loratools.commands.numbers import adapter_numbers

    return [p for p in adapter_numbers(adapters) if p.code == "nonfinite"]


def _judged(inventory: Inventory, problems: Sequence[Problem], allow: Sequence[str]) -> list[str]:
    """Raise what does not fit; missing tensors that `allow` lets through leave the inventory."""
    lost = {
        name: Problem("missing", f"{shown(name)} is not in the model", target=name)
        for name in inventory.missing
    }
    judged = judge([*problems, *lost.values()], allow)
    refused = refusal(p for p in judged.problems if lost.get(p.target or "") != p)
    if refused:
        raise refused
    let = [p.target for p in judged.waived if p.code == "missing" and p.target in lost]
    inventory.missing = [name for name in inventory.missing if name not in let]
    return [p.message for p in judged.problems if p.severity != "error"]


def vocabulary(plan: Plan, config: Mapping[str, Any]) -> list[Mismatch]:
    """Whether config.json still has as many words as the embedding has rows."""
    from loratools.proving.differences import Mismatch

    before = text_config(plan.base.config).get("vocab_size")
    after = text_config(config).get("vocab_size")
    rows = set(plan.resized.values())
    due = rows.pop() if len(rows) == 1 else before
    if before is None or after == due:
        return []
    return [Mismatch(f"vocab_size is {shown(after)}, expected {due}", None, "config.json")]


def _strength(signal: Signal) -> tuple[float, float] | str | None:
    if signal.scaling is None:
        return None if not signal.update else UNCLEAR
    return (signal.scaling, signal.error) if signal.is_clear or signal.is_off else UNCLEAR
