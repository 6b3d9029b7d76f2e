"""torchtune adapters: adapter_model.pt with torchtune's own names, alpha in a config beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Kind, Leaf, LowRank, Renormed
from loratools.containers import plain_yaml, strict_json, torch_saving
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats.evening import Even, evened
from loratools.formats.reading import Reading, contents, unwrapped
from loratools.names.heads import config_of, facts_from
from loratools.names.llama import UNROTATED

SUFFIX: str | None = None
VOCABULARY = "torchtune"
WEIGHTS, CONFIG, RECIPE = "adapter_model.pt", "adapter_config.json", "torchtune_config.yaml"
EXPORTS = ("adapter_model.safetensors", "adapter_model.bin")
FRONT = "base_model.model."
PARTS = {".lora_a.weight": "lora_a", ".lora_b.weight": "lora_b", ".magnitude": "magnitude"}
ENDS = tuple(PARTS)
# The linear layers that torchtune can adapt, with the name that Hugging Face gives them.
TARGETS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "output": "lm_head",
}


def part_of(key: str) -> tuple[str, str] | None:
    """The module and the part of a key; None for any other tensor."""
    if not key.endswith(ENDS):
        return None
    bare = unwrapped(key).removeprefix(FRONT)
    for suffix, part in PARTS.items():
        if bare.endswith(suffix) and len(bare) > len(suffix):
            return bare.removesuffix(suffix), part
    return None


def detect(bundle: Bundle) -> bool:
    """Whether a bundle holds torchtune's own keys, and no faithful PEFT export of them."""
    if bundle.chosen is not None:
        usual = bundle.chosen.endswith((".pt", ".bin", ".safetensors", ".ckpt"))
        return usual and _is_native(_keys(bundle, bundle.chosen))
    weights = _weights(bundle)
    if weights is None:
        return False
    keys = _keys(bundle, weights)
    if not _is_native(keys):
        return False
    export = next((name for name in EXPORTS if name in bundle), None)
    exported = _keys(bundle, export) if export not in (None, weights) else ()
    if not exported or _is_native(exported):  # none, none that can be read, or the same names
        return True
    # The export has Hugging Face's names and needs no head counts, so it is the better source
    # wherever torchtune exports rightly: not for magnitudes, nor for bases that it left unrotated
    # (torchtune:models/convert_weights.py `tune_to_peft_adapter_weights`).
    dora = any(found and found[1] == "magnitude" for found in map(part_of, keys))
    return dora or facts_from(_beside(bundle, "config.json")).model_type in UNROTATED


def _weights(bundle: Bundle) -> str | None:
    """The file of a folder: adapter_model.pt, one epoch's adapter_N.pt (the last), or an export."""
    if WEIGHTS in bundle:
        return WEIGHTS
    epochs = [n for n in bundle.names if n.startswith("adapter_") and n[8:-3].isdigit()]
    epochs = [n for n in epochs if n.endswith(".pt") and len(n) < 20]
    if epochs:
        return max(epochs, key=lambda name: int(name[8:-3]))
    return next((name for name in EXPORTS if name in bundle), None)


def _keys(bundle: Bundle, name: str) -> tuple[str, ...]:
    try:
        return tuple(contents(bundle, name)[0])
    except LoratoolsError:
        return ()  # whoever knows the file by its name will say what is wrong with it


def _is_native(keys: tuple[str, ...]) -> bool:
    return any(found and found[1] != "magnitude" for found in map(part_of, keys))


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """A torchtune adapter from its headers; alpha from the config, the recipe or `assume`."""
    weights = bundle.chosen or _weights(bundle)
    if weights is None:
        raise error("not_found", f"{shown(bundle.name)} holds no {WEIGHTS}")
    tensors, metadata, extras = contents(bundle, weights)
    reading = Reading(bundle.name, assume)
    config, files = _config(bundle, reading)
    alpha = _alpha(config, reading)
    modules: dict[str, dict[str, Leaf]] = {}
    other: list[str] = []
    for key, leaf in tensors.items():
        found = part_of(key)
        if found is None:
            other.append(key)
        elif found[1] in modules.setdefault(found[0], {}):
            raise error("duplicate", f"{shown(weights)}: two tensors are {shown(key)}")
        else:
            modules[found[0]][found[1]] = leaf
    for module, parts in modules.items():
        pair = reading.pair(
            module,
            parts.get("lora_a"),
            parts.get("lora_b"),
            alpha=alpha,
            magnitude=parts.get("magnitude"),
            words=("lora_a", "lora_b"),
        )
        said = config.get("r")
        if pair is not None and said is not None and said != pair.rank:
            message = f"{shown(module)}: config says r={shown(said)}, lora_a has {pair.rank} rows"
            reading.problem("config_conflict", message, module)
    reading.unexplained(other)
    reading.extras(extras, weights)
    _exports(reading, bundle, weights)
    return Adapter(
        deltas=reading.deltas,
        format="torchtune",
        vocabulary=VOCABULARY,
        config=config,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(weights, *files),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _exports(reading: Reading, bundle: Bundle, weights: str) -> None:
    """What is said of PEFT exports beside the file that is read."""
    there = [n for n in EXPORTS if n in bundle and n != weights]
    if weights in EXPORTS or bundle.chosen is not None:
        reading.mention(bundle, weights, there)
        return
    for name in there:
        if _keys(bundle, name):
            message = (
                f"{name} lies beside {weights} and was not read: torchtune exports magnitudes, and "
                "all of some bases, with their rows in the wrong order"
            )
            reading.problem("unexplained", message, severity="note")
        else:
            reading.mention(bundle, weights, [name])


def _beside(bundle: Bundle, name: str) -> dict[str, Any]:
    """A small JSON object or YAML mapping in the folder; empty where there is none."""
    if name not in bundle:
        return {}
    raw = bundle.read(name, 1_000_000)
    parse = plain_yaml.parse if name.endswith(".yaml") else strict_json.loads
    found = parse(raw, f"{bundle.name}/{name}")
    return found if isinstance(found, dict) else {}


def _config(bundle: Bundle, reading: Reading) -> tuple[dict[str, Any], list[str]]:
    """What the files beside say: adapter_config.json, the recipe's config, the base's config."""
    config = _beside(bundle, CONFIG)
    files = [CONFIG] if config else []
    recipe = _beside(bundle, RECIPE).get("model")
    if isinstance(recipe, dict):
        files.append(RECIPE)
        for ours, theirs in (("r", "lora_rank"), ("lora_alpha", "lora_alpha")):
            if theirs in recipe and config.setdefault(ours, recipe[theirs]) != recipe[theirs]:
                message = (
                    f"{CONFIG} says {ours}={shown(config[ours])}, {RECIPE} {shown(recipe[theirs])}"
                )
                reading.problem("config_conflict", message)
    base = config_of(facts_from(_beside(bundle, "config.json")))
    return (config | {"base_config": base} if base else config), files


def _alpha(config: Mapping[str, Any], reading: Reading) -> float | None:
    said, given = config.get("lora_alpha"), reading.number("alpha")
    if said is None:
        if given is None:
            message = f"neither {CONFIG} nor {RECIPE} says lora_alpha (--assume alpha=)"
            reading.problem("alpha_missing", message)
        return given
    if isinstance(said, bool) or not isinstance(said, int | float):
        raise error("malformed", f"{CONFIG}: lora_alpha is {shown(said)}, expected a number")
    if given is not None and given != said:
        raise error("usage", f"--assume alpha={given:g}, but {CONFIG} says {shown(said)}")
    return float(said)


# ------------------------------------------------------------------------------- writing


def lost(adapter: Adapter) -> list[Problem]:
    """What torchtune cannot hold, by name: all but LoRA, or DoRA by rows, of its linear layers."""
    dora = any(isinstance(d, Renormed) for d in adapter.deltas.values())
    reasons = {key: _refusal(key, kind, dora) for key, kind in adapter.deltas.items()}
    return [
        Problem("loss", f"{shown(key)}: {reason}", "error", adapter.name, key)
        for key, reason in reasons.items()
        if reason
    ]


def _refusal(key: str, kind: Kind, dora: bool) -> str:
    module, _, parameter = key.rpartition(".")
    pair = kind.delta if isinstance(kind, Renormed) else kind
    if not isinstance(pair, LowRank) or parameter != "weight":
        return f"torchtune has low-rank updates of weights only, this is {type(kind).__name__}"
    if len(pair.a.shape) != 2:
        return "torchtune adapts linear layers only, this is a convolution"
    if module.rpartition(".")[2] not in TARGETS:
        return f"torchtune adapts {', '.join(TARGETS)} only"
    if isinstance(kind, Renormed) and kind.axis != "out":
        return "torchtune's DoRA has magnitudes of rows, these are of columns"
    if dora and isinstance(kind, LowRank):
        return "torchtune's use_dora is for all layers, and this one has no magnitude"
    return ""


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write adapter_model.pt and adapter_config.json into a folder; sha256 by file name.

    torchtune has one rank and one alpha for all layers: smaller ranks are padded with zeros, what
    another scaling says goes into B. Layers without an update get one of zeros, since torchtune
    loads all layers or none.
    """
    left = {p.target for p in lost(adapter)}
    kept = {k.removesuffix(".weight"): d for k, d in adapter.deltas.items() if k not in left}
    pairs = {m: d.delta if isinstance(d, Renormed) else d for m, d in kept.items()}
    even = evened({m: p for m, p in pairs.items() if isinstance(p, LowRank)})
    tensors: dict[str, Leaf] = {}
    dora = any(isinstance(d, Renormed) for d in kept.values())
    layers = facts_from(adapter.config).layers
    filled = {} if dora else _missing(even, layers)
    for module, (a, b) in {**even.factors, **filled}.items():
        tensors[f"{module}.lora_a.weight"], tensors[f"{module}.lora_b.weight"] = a, b
        kind = kept.get(module)
        if isinstance(kind, Renormed):
            tensors[f"{module}.magnitude"] = kind.magnitude
    digest = torch_saving.write(out / WEIGHTS, tensors)
    names = {module.rpartition(".")[2] for module in (*even.factors, *filled)}
    config: dict[str, Any] = {
        "r": even.rank,
        "lora_alpha": int(even.alpha) if even.alpha.is_integer() else even.alpha,
        "target_modules": [name for name in TARGETS if name in names],
        **({"use_dora": True} if dora else {}),
    }
    base = adapter.config.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        config["base_model_name_or_path"] = base
    known = config_of(facts_from(adapter.config))
    if known:
        config["base_config"] = known
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")
    return {WEIGHTS: digest}


def _missing(even: Even, layers: int | None) -> dict[str, tuple[Leaf, Leaf]]:
    """Pairs of zeros for what torchtune expects too: every layer, and w1, w2, w3 together."""
    some: dict[str, tuple[Leaf, Leaf]] = {}
    count = layers or 0
    for module, pair in even.factors.items():
        pieces = module.split(".")
        if len(pieces) == 4 and pieces[0] == "layers" and pieces[1].isdigit():
            some.setdefault(".".join(pieces[2:]), pair)
            count = max(count, int(pieces[1]) + 1)
    gated = next((some[f"mlp.{w}"] for w in ("w1", "w3") if f"mlp.{w}" in some), None)
    shapes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in some.items()}
    if gated is not None or "mlp.w2" in some:
        wide = shapes.get("mlp.w1") or shapes.get("mlp.w3")
        into, out = wide if wide is not None else shapes["mlp.w2"][::-1]
        for name, shape in (("w1", (into, out)), ("w3", (into, out)), ("w2", (out, into))):
            shapes.setdefault(f"mlp.{name}", shape)
    wanted = {
        f"layers.{n}.{name}": s for n in range(min(count, 4096)) for name, s in shapes.items()
    }
    dtype = next((a.dtype for a, _ in some.values()), "F32")
    return {
        module: even.zeros(module, into, out, dtype)
        for module, (into, out) in wanted.items()
        if module not in even.factors
    }
