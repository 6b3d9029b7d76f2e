"""Adapters under Megatron's names: .nemo archives of NeMo 1, files of Megatron-Bridge's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter import Adapter, Leaf, Source
from loratools.containers import plain_yaml, tar, torch_zip
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.reading import Reading, contents, unwrapped
from loratools.names.heads import config_of, facts_from
from loratools.views import joined, part

SUFFIX: str | None = None
VOCABULARY = "megatron"
CONFIG, WEIGHTS, RUN = "model_config.yaml", "model_weights.ckpt", "run_config.yaml"
LEAVES = {".linear_in.weight": "linear_in", ".linear_out.weight": "linear_out"}
MAGNITUDE = ".weight_magnitude"
ENDS = (*LEAVES, MAGNITUDE)
# What NeMo 1 calls its adapters, and the module of Megatron's that each is added to.
ADAPTERS = {
    "self_attention.adapter_layer.lora_kqv_adapter": "self_attention.linear_qkv",
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attention.linear_proj",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.linear_fc2",
}
# The same of each part before fusing: with `.q_adapter` behind it, and so on.
UNFUSED = {
    "self_attention.adapter_layer.lora_unfused_kqv_adapter": "self_attention.linear_qkv",
    "mlp.adapter_layer.lora_unfused_hto4h_adapter": "mlp.linear_fc1",
}
PIECES = ("q", "k", "v", "gate", "up")  # of Megatron-Bridge's canonical adapters
ROWWISE = (".linear_proj", ".linear_fc2")  # their inputs are divided among tensor-parallel ranks


def part_of(key: str) -> tuple[str, str] | None:
    """The module and the part of a key; None for any other tensor."""
    if not key.endswith(ENDS):
        return None
    bare = unwrapped(key).removeprefix("model.").removeprefix("module.")
    if bare.startswith("language_model.encoder."):  # Megatron before its core library
        bare = "decoder." + bare.removeprefix("language_model.encoder.")
    found = next((s for s in ENDS if bare.endswith(s)), None)
    if found is None or not bare.startswith("decoder."):
        return None
    stem, what = bare.removesuffix(found), LEAVES.get(found, "magnitude")
    module, adapter, piece = stem.partition(".adapter")
    if adapter and not piece:
        return module, what
    if adapter and piece.startswith(".adapter_") and piece[9:] in PIECES:
        return f"{module}.{piece[9:]}", what
    pieces = stem.split(".")
    inner, last = ".".join(pieces[3:]), pieces[-1].removesuffix("_adapter")
    if found != MAGNITUDE and inner in ADAPTERS:
        return ".".join([*pieces[:3], ADAPTERS[inner]]), what
    unfused = UNFUSED.get(".".join(pieces[3:-1]))
    if found != MAGNITUDE and unfused and last in PIECES and pieces[-1].endswith("_adapter"):
        return ".".join([*pieces[:3], unfused, last]), what
    return None


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is an adapter of NeMo or Megatron-Bridge."""
    name = bundle.chosen or _archive(bundle)
    if name is None:
        return RUN in bundle and _is_sharded(bundle)
    if name.endswith(".nemo"):
        return _is_adapter(bundle.open(name))
    try:
        if name.endswith((".pt", ".ckpt", ".safetensors", ".bin")):
            return any(part_of(key) for key in contents(bundle, name)[0])
    except LoratoolsError:
        return False
    return False


def _is_adapter(source: Source) -> bool:
    """Whether an archive is one of an adapter, or so broken that reading must say how."""
    try:
        return tar.is_tar(source) and _scheme(_first_config(source)) is not None
    except LoratoolsError:
        return True


def _archive(bundle: Bundle) -> str | None:
    archives = [name for name in bundle.names if name.endswith(".nemo")]
    return archives[0] if len(archives) == 1 else None


def _is_sharded(bundle: Bundle) -> bool:
    return any(n in (".metadata", "common.pt") or n.endswith(".distcp") for n in bundle.names)


def _first_config(source: Source) -> dict[str, Any]:
    for name, member in tar.walk(source):
        if name == CONFIG:
            return _mapping(member)
    return {}


def _mapping(member: Source) -> dict[str, Any]:
    if member.size > plain_yaml.LIMIT:
        raise error("malformed", f"{shown(member.name)}: {member.size} bytes of YAML")
    found = plain_yaml.parse(member.read(0, member.size), member.name)
    return found if isinstance(found, dict) else {}


def _scheme(config: Mapping[str, Any]) -> str | None:
    """What sort of adapter a NeMo config is of; None of a whole model."""
    peft = config.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, dict) else None
    return scheme if isinstance(scheme, str) and scheme not in ("", "none", "null") else None


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter of NeMo 1 or Megatron-Bridge from its headers."""
    name = bundle.chosen or _archive(bundle)
    reading = Reading(bundle.name, assume)
    if name is None:
        raise error(
            "unknown_type",
            f"{shown(bundle.name)} is a distributed checkpoint of Megatron-Bridge, whose parts "
            "only Megatron puts together; export it there with `AutoBridge.export_adapter_weights`",
        )
    if name.endswith(".nemo"):
        metadata: dict[str, str] = {}
        tensors, extras, config = _unpacked(bundle.open(name))
    else:
        tensors, metadata, beyond = contents(bundle, name)
        run = _mapping(bundle.open(RUN)) if RUN in bundle else {}
        extras, config = [*beyond], run
    said = _settings(config)
    alpha, neutral = _alpha(said, reading, archive=name.endswith(".nemo"))
    modules: dict[str, dict[str, Leaf]] = {}
    other: list[str] = []
    for key, leaf in tensors.items():
        found = part_of(key)
        if found is None:
            other.append(key)
        elif found[1] in modules.setdefault(found[0], {}):
            raise error("duplicate", f"{shown(name)}: two tensors are {shown(key)}")
        else:
            modules[found[0]][found[1]] = leaf
    dim = said.get("adapter_dim", said.get("dim"))
    for module, parts in modules.items():
        pair = reading.pair(
            module,
            parts.get("linear_in"),
            parts.get("linear_out"),
            alpha=alpha,
            scaling=1.0 if neutral else None,
            magnitude=parts.get("magnitude"),
            words=("linear_in", "linear_out"),
        )
        if pair is not None and isinstance(dim, int) and dim != pair.rank:
            message = f"{shown(module)}: the config says rank {dim}, linear_in has {pair.rank} rows"
            reading.problem("config_conflict", message, module)
    states = [key for key in (*other, *extras) if key.endswith("_extra_state")]
    if states:
        message = f"{len(states)} entries named _extra_state are Transformer Engine's, not weights"
        reading.problem("unexplained", message, severity="note")
    reading.unexplained([key for key in other if key not in states])
    reading.extras([key for key in extras if key not in states], name)
    scheme = _scheme(config)
    if scheme is not None and not scheme.startswith(("lora", "canonical_lora", "qlora")):
        message = f"peft_scheme {shown(scheme)}: only LoRA of NeMo is read"
        reading.problem("unknown_type", message)
    base = config.get("restore_from_path")
    kept: dict[str, Any] = {"peft": said, "base_config": config_of(facts_from(config))}
    if isinstance(base, str) and base:
        kept["base_model_name_or_path"] = base
    return Adapter(
        deltas=reading.deltas,
        format="nemo",
        vocabulary=VOCABULARY,
        config=kept,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(name,),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA's own settings: `peft.lora_tuning` of NeMo 1, `peft` of Megatron-Bridge."""
    peft = config.get("peft")
    if not isinstance(peft, dict):
        return {}
    tuning = peft.get("lora_tuning")
    return dict(tuning) if isinstance(tuning, dict) else dict(peft)


def _alpha(
    said: Mapping[str, Any], reading: Reading, *, archive: bool
) -> tuple[float | None, bool]:
    """Alpha, and whether the scaling is 1 because none is said: in NeMo alpha is the rank then."""
    alpha, given = said.get("alpha"), reading.number("alpha")
    if alpha is None:
        if given is not None:
            return given, False
        if not archive and not said:
            message = f"there is no {RUN} that says alpha (--assume alpha=)"
            reading.problem("alpha_missing", message)
        return None, True
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise error("malformed", f"the config's alpha is {shown(alpha)}, expected a number")
    if given is not None and given != alpha:
        raise error("usage", f"--assume alpha={given:g}, but the config says {shown(alpha)}")
    return float(alpha), False


# ------------------------------------------------------------------------------- parallel parts


@dataclass(frozen=True, slots=True)
class Rank:
    """Which part of a divided training a file of weights is of."""

    pipeline: int
    tensor: int


def _unpacked(source: Source) -> tuple[dict[str, Leaf], list[str], dict[str, Any]]:
    """The tensors, entries that are none, and the config of a .nemo archive."""
    members = tar.members(source)
    if CONFIG not in members:
        raise error("malformed", f"{shown(source.name)} has no {CONFIG}")
    config = _mapping(members[CONFIG])
    files: dict[Rank, Source] = {}
    for name, member in members.items():
        folder, _, last = name.rpartition("/")
        rank = _rank(folder) if last == WEIGHTS else None
        if rank is not None:
            files[rank] = member
    if not files:
        listed = ", ".join(shown(n) for n in list(members)[:8])
        raise error("unknown_type", f"{shown(source.name)} has no {WEIGHTS}, but {listed}")
    stages = 1 + max(rank.pipeline for rank in files)
    width = 1 + max(rank.tensor for rank in files)
    if len(files) != stages * width:
        raise error(
            "missing",
            f"{shown(source.name)}: {len(files)} parts of {stages} pipeline times {width} tensor "
            "ranks; convert it to one rank with NeMo first",
        )
    per_stage = _layers_per_stage(config, stages, source)
    gated = "glu" in str(config.get("activation", "")).lower()
    tensors: dict[str, Leaf] = {}
    extras: dict[str, None] = {}
    for stage in range(stages):
        parts = [torch_zip.state_dict(files[Rank(stage, i)]) for i in range(width)]
        extras |= {key: None for file in parts for key in file.extras}
        keys = {key: None for file in parts for key in file.tensors}
        for key in keys:
            if any(key not in file.tensors for file in parts):
                raise error("missing", f"{shown(key)} stands in some tensor-parallel parts only")
            leaf = _together(key, [file.tensors[key] for file in parts], gated)
            tensors[_moved(key, stage * per_stage)] = leaf
    return tensors, [*extras], config


def _rank(folder: str) -> Rank | None:
    """The rank that a folder's name says: none, mp_rank_00, tp_rank_00_pp_rank_000."""
    pieces = folder.split("_")
    match pieces:
        case [""]:
            return Rank(0, 0)
        case ["mp", "rank", tensor] if _is_count(tensor):
            return Rank(0, int(tensor))
        case ["tp", "rank", tensor, "pp", "rank", pipe] if _is_count(tensor + pipe):
            return Rank(int(pipe), int(tensor))
        case _:
            return None


def _layers_per_stage(config: Mapping[str, Any], stages: int, source: Source) -> int:
    """How many layers each pipeline rank has, each of which counts them from 0."""
    layers = facts_from(config).layers
    if stages == 1:
        return 0
    if layers is None or layers % stages:
        raise error(
            "missing",
            f"{shown(source.name)}: {shown(layers)} layers on {stages} pipeline ranks; convert "
            "it to one rank with NeMo first",
        )
    return layers // stages


def _together(key: str, leaves: list[Leaf], gated: bool) -> Leaf:
    """One tensor of its tensor-parallel parts; of gate and up each part has a half of both."""
    found = part_of(key)
    if len(leaves) == 1 or found is None:
        return leaves[0]
    module, what = found
    if any(len(leaf.shape) != len(leaves[0].shape) or not leaf.shape for leaf in leaves):
        raise error("shape_factors", f"{shown(key)}: its tensor-parallel parts are of other shapes")
    if what == "linear_in" and module.endswith(ROWWISE):
        return joined(leaves, axis=1)
    if what != "linear_in" and gated and module.endswith(".linear_fc1"):
        halves = [leaf.shape[0] // 2 for leaf in leaves]
        gates = [part(leaf, 0, n) for leaf, n in zip(leaves, halves, strict=True)]
        ups = [part(leaf, n, 2 * n) for leaf, n in zip(leaves, halves, strict=True)]
        return joined([*gates, *ups])
    return joined(leaves)


def _moved(key: str, layers: int) -> str:
    """A key with its layer's number counted from the first pipeline rank's first layer."""
    pieces = key.split(".")
    at = next((i + 1 for i, p in enumerate(pieces) if p == "layers"), 0)
    if not layers or not at or at >= len(pieces) or not _is_count(pieces[at]):
        return key
    return ".".join([*pieces[:at], str(int(pieces[at]) + layers), *pieces[at + 1 :]])


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 8
