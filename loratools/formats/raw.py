"""Any other state dict with the factors of updates, lora_A and lora_B or the like, either way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loratools.adapter import Adapter, Leaf
from loratools.containers.bundle import Bundle
from loratools.errors import error, shown
from loratools.formats.reading import Reading, contents, number, unwrapped
from loratools.formats.state_dicts import (
    ask,
    flag,
    is_table,
    keys_of,
    note_rest,
    others_in,
    take_full,
    unwrapped_all,
    weights_in,
)
from loratools.views import turned

VOCABULARY = "hf"
DOWN = ("lora_A", "lora_a", "lora_down", "lora_embedding_A")
UP = ("lora_B", "lora_b", "lora_up", "lora_embedding_B")
SIDES = {**dict.fromkeys(DOWN, "down"), **dict.fromkeys(UP, "up")}
TABLE = ("lora_embedding_A", "lora_embedding_B")
ALPHA = ("alpha", "lora_alpha")
MAGNITUDE = ("lora_magnitude_vector", "dora_scale")
# What programs put between a module's name and a factor: PEFT's base layer, minLoRA's hook.
_INSIDE = ("base_layer", "base_model.model.", ".parametrizations.weight.0")
_MERGES = "the file does not say whether the weight contains it"
IN_OUT, OUT_IN = "in_out", "out_in"


@dataclass(frozen=True, slots=True)
class Part:
    """What one key names: a `side` ("down", "up", "alpha", "magnitude") of a module's update."""

    module: str
    side: str
    adapter: str = ""


def part_of(key: str) -> Part | None:
    """A key in the grammar of specs/formats/raw.md; None for a parameter in full."""
    pieces = key.split(".")
    for i in range(len(pieces) - 1, max(0, len(pieces) - 4), -1):
        word, tail = pieces[i], pieces[i + 1 :]
        if word in SIDES or word in MAGNITUDE or (word in ALPHA and not tail):
            side = SIDES.get(word, "magnitude" if word in MAGNITUDE else "alpha")
            if tail and tail[-1] == "weight":
                tail.pop()
            if len(tail) <= 1 and tail != ["bias"]:
                return Part(_bare(".".join(pieces[:i])), side, "".join(tail))
    return None


def _bare(module: str) -> str:
    module = module.removeprefix(_INSIDE[1]).removesuffix(_INSIDE[2])
    return ".".join(piece for piece in module.split(".") if piece != _INSIDE[0])


def detect(bundle: Bundle) -> bool:
    """Whether a bundle's one file of weights has both factors of some module by known names."""
    sides: dict[str, set[str]] = {}
    keys = keys_of(bundle)
    if "lora_controlnet" in keys:
        return False
    for key in keys:
        part = part_of(unwrapped(key))
        if part is not None and part.module:
            sides.setdefault(part.module, set()).add(part.side)
    return any({"down", "up"} <= found for found in sides.values())


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """The adapter in a state dict, from its headers; which way round its factors are is proven.

    Understands `--assume` alpha, orientation, embedding, fan_in_fan_out and merged.
    """
    file = weights_in(bundle)
    assert file is not None
    tensors, metadata, extras = contents(bundle, file)
    reading = Reading(bundle.name, assume)
    modules: dict[str, dict[str, Leaf]] = {}
    tables: set[str] = set()
    adapters: set[str] = set()
    full: dict[str, Leaf] = {}
    for key, leaf in unwrapped_all(tensors).items():
        part = part_of(key)
        if part is None:
            name = _bare(key)
            if name in full:
                raise error("duplicate", f"{shown(key)} and {shown(full[name].name)} are one")
            full[name] = leaf
            continue
        sides = modules.setdefault(part.module, {})
        if part.adapter:
            adapters.add(part.adapter)
        if part.side in sides and not part.adapter:
            raise error("duplicate", f"{shown(key)} and {shown(sides[part.side].name)} are one")
        sides[part.side] = leaf
        if any(word in key for word in TABLE) or is_table(part.module, assume):
            tables.add(f"{part.module}.weight")
    for module in [m for m, sides in modules.items() if not {"down", "up"} & set(sides)]:
        for leaf in modules.pop(module).values():  # a parameter that is called alpha
            full[_bare(unwrapped(leaf.name))] = leaf
    if len(adapters) > 1:
        listed = ", ".join(shown(name) for name in sorted(adapters))
        reading.problem("unexplained", f"the file holds {len(adapters)} adapters: {listed}")
    unsaid = _orient(reading, modules)
    _pairs(reading, modules)
    take_full(reading, full, _MERGES)
    note_rest(reading, extras, file)
    reading.mention(bundle, file, others_in(bundle, file))
    config: dict[str, object] = {"orientation_unsaid": unsaid} if unsaid else {}
    stored = flag(assume, "fan_in_fan_out")
    if stored is not None:
        config["fan_in_fan_out"] = stored
    return Adapter(
        deltas=reading.deltas,
        format="raw",
        vocabulary=VOCABULARY,
        config=config,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(file,),
        transposed=frozenset(tables & reading.deltas.keys()),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _pairs(reading: Reading, modules: Mapping[str, Mapping[str, Leaf]]) -> None:
    given = reading.number("alpha")
    silent: list[str] = []
    for module, sides in modules.items():
        alpha = given
        if "alpha" in sides:
            alpha = number(sides["alpha"])
            if given is not None and given != alpha:
                key = shown(sides["alpha"].name)
                raise error("usage", f"--assume alpha={given:g}, but {key} is {alpha:g}")
        elif alpha is None:
            silent.append(module)
        reading.pair(
            module,
            sides.get("down"),
            sides.get("up"),
            alpha=alpha,
            magnitude=sides.get("magnitude"),
            words=("the factor A", "the factor B"),
        )
    if silent:
        message = f"{shown(reading.name)} does not say the alpha of {len(silent)} modules"
        remedy = "--assume alpha=16 (from the training script)"
        ask(reading, "alpha_missing", message, remedy, silent[0])


# ------------------------------------------------------------------------------- orientation


def _orient(reading: Reading, modules: dict[str, dict[str, Leaf]]) -> tuple[str, ...]:
    """Turn (in, rank) and (rank, out) to (rank, in) and (out, rank), all in one file alike.

    A module proves its orientation where only one reading shares a rank; one such module proves
    it for the file. Where none does, the rank is the shorter side; the keys of such modules come
    back, and those whose factors are square become a problem.
    """
    said = reading.assume.get("orientation")
    if said is not None and said not in (IN_OUT, OUT_IN):
        raise error("usage", f"--assume orientation={shown(said)}: expected in_out or out_in")
    ways = {module: tuple(_ways(sides)) for module, sides in modules.items()}
    proven = {way[0] for way in ways.values() if len(way) == 1}
    if said is not None and proven - {said}:
        other = next(module for module, way in ways.items() if len(way) == 1 and way[0] != said)
        shapes = " and ".join(str(modules[other][side].shape) for side in ("down", "up"))
        raise error(
            "usage", f"--assume orientation={said}, but {shown(other)} is {shapes}: the other one"
        )
    if len(proven) > 1:
        message = "some modules have factors (rank, in) and (out, rank), others the other way round"
        reading.problem("orientation", message)
    settled = said or (next(iter(proven)) if len(proven) == 1 else None)
    unsaid: list[str] = []
    square: list[str] = []
    for module, way in ways.items():
        if not way:
            continue
        chosen = way[0] if len(way) == 1 else settled
        down = modules[module]["down"]
        if chosen is None:
            chosen = OUT_IN if down.shape[0] <= down.shape[1] else IN_OUT
            unsaid.append(f"{module}.weight")
            if down.shape[0] == down.shape[1]:
                square.append(module)
        if chosen == IN_OUT:
            for side in ("down", "up"):
                modules[module][side] = turned(modules[module][side])
    if square:
        ask(
            reading,
            "orientation",
            f"{shown(square[0])} has square factors, and no module of the file shows whether A is "
            "(rank, in) or (in, rank)",
            "--assume orientation=out_in for (rank, in), in_out for (in, rank)",
            square[0],
        )
    elif unsaid:
        message = (
            f"{shown(unsaid[0])}: both readings of its factors multiply; taken is the one whose "
            "rank is the smaller (--assume orientation=out_in or in_out says it)"
        )
        reading.problem("orientation", message, unsaid[0], "note")
    return tuple(unsaid)


def _ways(sides: Mapping[str, Leaf]) -> Iterator[str]:
    """The orientations in which a module's factors share a rank; none but "out_in" of a kernel."""
    a, b = sides.get("down"), sides.get("up")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        return
    if a.shape[0] == b.shape[1]:
        yield OUT_IN
    if len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]:
        yield IN_OUT
