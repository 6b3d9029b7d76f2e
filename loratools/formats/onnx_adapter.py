"""onnxruntime's .onnx_adapter: factors by the names that a graph gives them, scaling in B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Kind, Leaf, LowRank, Renormed
from loratools.containers import flatbuffer
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats.reading import Reading
from loratools.views import later, renamed, scaled, turned, widest

SUFFIX: str | None = ".onnx_adapter"
VOCABULARY = "hf"

NAMES = "onnx_names"  # of config: module → (name of A, name of B), as the file has them
VERSIONS = ("adapter_version", "model_version")
PREFIX = "base_model.model."
NATIVE = ("F32", "F16", "F64")

# Olive's X.lora_A.weight, the X.lora_A.MatMul.weight of onnxruntime-genai, X.lora_A.
_LORA = re.compile(r"(.+)\.lora_([AB])(\.MatMul)?(?:\.weight)?")
_LETTER = re.compile(r"(?<![A-Za-z0-9])([AaBb])(?![A-Za-z0-9])")
_QUANTISED = re.compile(r".+\.quant\.(weight|scale|zero_point)")
# genai's graphs say attn where transformers says self_attn (microsoft/Olive:
# olive/cli/extract_adapters.py).
_ATTENTION = re.compile(r"(model\.layers\.\d{1,9})\.attn\.(.+)")


def detect(bundle: Bundle) -> bool:
    """Whether a file has the identifier TORT; of a folder, its only file named .onnx_adapter."""
    name = _file(bundle)
    try:
        return name is not None and flatbuffer.is_adapter(bundle.open(name))
    except LoratoolsError:
        return False


def _file(bundle: Bundle) -> str | None:
    if bundle.chosen is not None:
        return bundle.chosen
    found = [name for name in bundle.names if name.endswith(".onnx_adapter")]
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------- reading


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An .onnx_adapter from its tables; contradictions become `problems`."""
    name = _file(bundle)
    if name is None:
        raise error("not_found", f"{shown(bundle.name)} holds no single .onnx_adapter")
    file = flatbuffer.read(bundle.open(name))
    reading = Reading(bundle.name, assume)
    names: dict[str, list[str]] = {}
    for module, (a, b) in _pairs(reading, file.leaves).items():
        _take(reading, module, a, b)
        if a is not None and b is not None:
            names[module] = [a.name, b.name]
    versions = (file.adapter_version, file.model_version)
    return Adapter(
        deltas=reading.deltas,
        format="onnx_adapter",
        vocabulary=VOCABULARY,
        config={NAMES: names},
        metadata={k: str(v) for k, v in zip(VERSIONS, versions, strict=True)},
        name=bundle.name,
        folder=bundle.path,
        files=(name,),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _pairs(
    reading: Reading, leaves: Mapping[str, Leaf]
) -> dict[str, tuple[Leaf | None, Leaf | None]]:
    """Parameters by module: A and B; what is neither becomes a problem by name."""
    sides: dict[str, dict[str, Leaf]] = {}
    rest: dict[str, Leaf] = {}
    quantised: list[str] = []
    for name, leaf in leaves.items():
        found = _LORA.fullmatch(name.removeprefix(PREFIX))
        if _QUANTISED.fullmatch(name):
            quantised.append(name)
        elif found is None:
            rest[name] = leaf
        elif sides.setdefault(_module(found), {}).setdefault(found[2], leaf) is not leaf:
            raise error("duplicate", f"{shown(name)}: {found[1]} has a second {found[2]}")
    for name in quantised:
        message = f"{shown(name)} is of 4 bits; convert the adapter without quantising it"
        reading.problem("unknown_type", message, shown(name))
    for name in list(rest):
        twin = _twin(name)
        module = _LETTER.sub("", name).strip("._/") or name
        if twin in rest and module not in sides:
            a, b = rest.pop(name), rest.pop(twin)
            message = f"{shown(name)} and {shown(twin)} are taken for A and B of {shown(module)}"
            reading.problem("unexplained", message, module, "note")
            sides[module] = {"A": a, "B": b}
    reading.unexplained(list(rest))
    return {module: (found.get("A"), found.get("B")) for module, found in sides.items()}


def _module(found: re.Match[str]) -> str:
    attention = _ATTENTION.fullmatch(found[1]) if found[3] else None
    return f"{attention[1]}.self_attn.{attention[2]}" if attention else found[1]


def _twin(name: str) -> str | None:
    """The name of B beside the name of an A, where exactly one word of it is the letter."""
    letters = _LETTER.findall(name)
    if letters not in (["a"], ["A"]):
        return None
    return _LETTER.sub({"a": "b", "A": "B"}[letters[0]], name)


def _take(reading: Reading, module: str, a: Leaf | None, b: Leaf | None) -> None:
    """Take in a pair: A (in, rank), B (rank, out), or as PyTorch has them where only that fits."""
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        flat = [x for x in (a, b) if x is not None and len(x.shape) != 2]
        if flat:
            message = f"{shown(flat[0].name)} is {flat[0].shape}, expected (in, rank), (rank, out)"
            reading.problem("shape_factors", message, module)
        else:
            reading.pair(module, a, b, words=("A", "B"))
        return
    if a.shape[1] == 0 == b.shape[0]:
        message = f"{shown(module)} has rank 0: the graph's own weight, unchanged"
        reading.problem("no_effect", message, module, "note")
        return
    here, there = a.shape[1] == b.shape[0], a.shape[0] == b.shape[1]
    said = reading.assume.get("orientation")
    if said not in (None, "in_out", "out_in"):
        raise error("usage", f"--assume orientation={shown(said)}: in_out or out_in")
    if here and there and said is None and a.shape[1] > a.shape[0]:
        reading.problem(
            "orientation",
            f"{shown(module)}: A is {a.shape}, B is {b.shape}; as (in, rank) and (rank, out) the "
            "rank would be larger than the weight (--assume orientation=in_out or out_in)",
            module,
        )
    torch_like = (there and not here) or (here and there and said == "out_in")
    if not torch_like:
        reading.pair(module, turned(a), turned(b), scaling=1.0, words=("A", "B"))
        return
    if said is None:
        message = f"{shown(module)}: A is {a.shape}, B is {b.shape}: (rank, in) and (out, rank)"
        reading.problem("orientation", message, module, "note")
    reading.pair(module, a, b, scaling=1.0, words=("A", "B"))


# ------------------------------------------------------------------------------- writing


def lost(adapter: Adapter) -> list[Problem]:
    """What graphs have no parameters for: all that is no pair of matrices on a linear weight."""
    problems: list[Problem] = []
    for key, delta in adapter.deltas.items():
        why = _refused(adapter, key, delta)
        if why:
            message = f"{shown(key)}: {why}"
            problems.append(Problem("loss", message, "error", adapter.name, key))
    return problems


def _refused(adapter: Adapter, key: str, delta: Kind) -> str | None:
    match delta:
        case LowRank(a=a):
            if not key.endswith(".weight") or len(a.shape) != 2:
                return "an .onnx_adapter has factors of matrices only"
            if key in adapter.transposed:
                return "graphs have no factors for embeddings"
            return None
        case Renormed():
            return "onnxruntime adds x·A·B and does not renormalise (DoRA): fold it instead"
        case _:
            return f"an .onnx_adapter has no place for this {type(delta).__name__}"


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write the .onnx_adapter `out`: A (in, rank), B (rank, out) with the scaling in it.

    Names are those of the file it was read from, or Olive's; all parameters get one dtype, the
    widest of them: float16, float32 (also for bfloat16 and 8 bits), float64.
    """
    names = adapter.config.get(NAMES)
    known: Mapping[str, Any] = names if isinstance(names, dict) else {}
    leaves: dict[str, Leaf] = {}
    for key, delta in adapter.deltas.items():
        if isinstance(delta, LowRank) and _refused(adapter, key, delta) is None:
            name_a, name_b = _names(known, key.removesuffix(".weight"))
            if name_a in leaves or name_b in leaves or name_a == name_b:
                raise error("duplicate", f"{NAMES}: {shown(key)} has a name that another has too")
            leaves[name_a] = turned(delta.a)
            leaves[name_b] = turned(scaled(delta.b, delta.scaling))
    dtype = widest([x.dtype if x.dtype in NATIVE else "F32" for x in leaves.values()] or ["F32"])
    held = {name: renamed(_cast(leaf, dtype), name) for name, leaf in leaves.items()}
    versions = [_version(adapter.metadata.get(word)) for word in VERSIONS]
    digest = flatbuffer.write(out, held, adapter_version=versions[0], model_version=versions[1])
    return {out.name: digest}


def _names(known: Mapping[str, Any], module: str) -> tuple[str, str]:
    found = known.get(module)
    if isinstance(found, list | tuple) and len(found) == 2 and all(type(x) is str for x in found):
        return found[0], found[1]
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _version(text: str | None) -> int:
    good = text is not None and text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if good and text is not None else 0


def _cast(leaf: Leaf, dtype: str) -> Leaf:
    if leaf.dtype == dtype:
        return leaf

    def make() -> Any:
        import torch

        kinds = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16}
        return leaf.tensor().to(kinds[dtype])

    return later(leaf.name, dtype, leaf.shape, make)
