"""Base weights from their headers: shards, tensors, and the facts that config.json states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Leaf
from loratools.containers import safetensors, torch_zip
from loratools.containers.bundle import Bundle, local
from loratools.containers.strict_json import loads, require
from loratools.errors import Problem, error, shown
from loratools.weights import pipeline
from loratools.weights.pipeline import WEIGHTS
from loratools.weights.scaled import with_scales

if TYPE_CHECKING:
    from loratools.weights.graphs import GraphBase

TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_LIMIT = 50_000_000
AT_ONCE = 8  # headers that are asked for together

# Architectures whose linear layers are transformers' Conv1D, stored (in, out), and those layers.
CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

# The fields of config.json that decide something, and what they must hold.
FIELDS = {
    "model_type": "text",
    "architectures": "a list of texts",
    "tie_word_embeddings": "true or false",
    "quantization_config": "an object",
    "text_config": "an object",
    "id2label": "an object",
}

# How names of an image model's single file begin, which has no embedding and head in one tensor.
IMAGE_FRONTS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "cond_stage_model.",
    "conditioner.embedders.",
    "first_stage_model.",
    "text_encoders.",
)

# Last names of input embeddings and of heads that may share their tensor.
EMBEDDINGS = (
    "embed_tokens wte word_embeddings shared embed_in tok_embeddings token_embedding tokens_embed"
).split()
HEADS = (
    "lm_head cls.predictions.decoder lm_head.decoder embed_out proj_out output "
    "generator_lm_head vocab_projector mlm_head.decoder"
).split()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its name, its tensors in file order, its own metadata.

    In a pipeline the name is a path (`unet/model.safetensors`), and the tensors' names begin with
    `prefix`, which the file does not hold.
    """

    name: str
    leaves: Mapping[str, Leaf]
    metadata: Mapping[str, str]
    digest: str  # of its header
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model as its headers and config.json describe it; no weight has been read.

    Of a pipeline, `components` has the config.json of each component that holds weights, and
    `config` is empty.
    """

    bundle: Bundle
    shards: tuple[Shard, ...]
    tensors: Mapping[str, Leaf]
    config: Mapping[str, Any]
    index: str | None = None  # the index file's name, where the base is sharded
    problems: tuple[Problem, ...] = ()
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    indexes: Mapping[str, str] = field(default_factory=dict)  # of a pipeline, by component
    graph: GraphBase | None = field(default=None, repr=False)  # where it is an ONNX graph

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.tensors.values())

    @property
    def is_conv1d(self) -> bool:
        parts = [self.config, *(v for v in self.config.values() if isinstance(v, Mapping))]
        return any(str(part.get("model_type")) in CONV1D_TYPES for part in parts)

    @property
    def id(self) -> str | None:
        """The Hub id, where it was read from there or the path is a cache folder.

        A config's `_name_or_path` is no help: a published model's often names its parent.
        """
        if self.bundle.origin is not None:
            return self.bundle.origin.repo
        found = re.search(r"models--([\w.-]{1,96})--([\w.-]{1,96})(?:/|$)", str(self.bundle.path))
        return f"{found[1]}/{found[2]}" if found else None

    @property
    def quantised(self) -> str | None:
        """The quantisation method that config.json names."""
        said = self.config.get("quantization_config")
        if isinstance(said, Mapping):
            return str(said.get("quant_method", "an unnamed method"))
        return None

    @property
    def is_image(self) -> bool:
        """Whether this is seen to be an image model: a pipeline, a part of one, a single file."""
        said = bool(self.components) or "_class_name" in self.config
        return said or any(name.startswith(IMAGE_FRONTS) for name in self.tensors)

    def tied(self) -> tuple[str, str] | None:
        """(head, embedding) weight names where both are one tensor."""
        if self.is_image:
            return None
        embedding = embedding_name(self.tensors)
        if embedding is None:
            return None
        stored = [n for n in self.tensors if n.removesuffix(".weight") in HEADS]
        if stored and self.tensors[stored[0]].shape != self.tensors[embedding].shape:
            return None  # whatever its config says
        said = text_config(self.config).get("tie_word_embeddings")
        if said is None:
            said = self.config.get("tie_word_embeddings", not stored)
        if not said or (not stored and not self._has_vocabulary_head()):
            return None
        return (stored[0] if stored else self._head_name()), embedding

    def _has_vocabulary_head(self) -> bool:
        """Whether the class in config.json has one; a classifier has no tensor to tie."""
        named = self.config.get("architectures")
        name = str(named[0]) if isinstance(named, list) and named else ""
        if name.endswith("Model"):
            return re.search(r"LMHead|DoubleHeads|MTModel|EncoderDecoder|Chat", name) is not None
        return not name.endswith(("Classification", "QuestionAnswering", "MultipleChoice"))

    def _head_name(self) -> str:
        kind = str(self.config.get("model_type", ""))
        if kind in ("bert", "electra", "distilbert"):
            return "cls.predictions.decoder.weight"
        if kind in ("roberta", "xlm-roberta", "camembert"):
            return "lm_head.decoder.weight"
        if kind == "whisper":
            return "proj_out.weight"
        return "embed_out.weight" if kind == "gpt_neox" else "lm_head.weight"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that speaks of the language model (models of several components)."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def embedding_name(tensors: Mapping[str, Leaf]) -> str | None:
    """The weight name of the input embedding, the shortest where several could be it."""
    found = [
        n
        for n, leaf in tensors.items()
        if n.endswith(".weight") and n.split(".")[-2] in EMBEDDINGS and len(leaf.shape) == 2
    ]
    return min(found, key=lambda n: (n.count("."), n), default=None)


def is_hub_id(text: object) -> bool:
    """Whether a text has the form of a Hub id (`org/name`)."""
    part = r"[A-Za-z0-9_][\w.-]{0,95}"  # a path may begin with a dot
    return isinstance(text, str) and re.fullmatch(f"{part}/{part}", text, re.ASCII) is not None


def headers(source: str | Path | Bundle) -> Base:
    """A base from headers alone: a Hugging Face folder, a diffusers pipeline or one component of
    it, one safetensors file, torch shards, an ONNX graph.

    Raises NotFoundError, MalformedError (an index with paths, a shard cut short, a name twice);
    what the index promises and no shard holds is among `problems`.
    """
    bundle = source if isinstance(source, Bundle) else local(source)
    from loratools.weights import graphs

    graph = graphs.file_of(bundle)
    if graph is not None:
        return graphs.graph_base(bundle, graph)
    return _pipeline(bundle) if pipeline.is_pipeline(bundle) else _folder(bundle)


def _pipeline(bundle: Bundle) -> Base:
    """All components with weights, each read as a folder of its own, under one roof."""
    bundle = replace(bundle, chosen=None)
    shards: list[Shard] = []
    configs: dict[str, Mapping[str, Any]] = {}
    indexes: dict[str, str] = {}
    problems: list[Problem] = pipeline.absent(bundle)
    for component, inner in pipeline.components(bundle):
        if not any(n.endswith((".safetensors", *TORCH_FILES)) for n in inner.names):
            continue  # a scheduler, a tokenizer
        one = _folder(inner)
        problems += (replace(p, message=f"{component}: {p.message}") for p in one.problems)
        configs[component] = one.config
        if one.index is not None:
            indexes[component] = one.index
        for shard in one.shards:
            front = f"{component}."
            leaves = {front + n: replace(x, name=front + n) for n, x in shard.leaves.items()}
            name = f"{component}/{shard.name}"
            shards.append(replace(shard, name=name, leaves=leaves, prefix=front))
    if not shards:
        raise error("not_found", f"{shown(bundle.name)}: no component of this pipeline has weights")
    tensors = {name: leaf for shard in shards for name, leaf in shard.leaves.items()}
    return Base(bundle, tuple(shards), tensors, {}, None, tuple(problems), configs, indexes)


def _folder(bundle: Bundle) -> Base:
    config: Mapping[str, Any] = {}
    if "config.json" in bundle:
        what = f"{bundle.name}/config.json"
        config = require(loads(bundle.read("config.json", 1_000_000), what), FIELDS, what)
    found, aside = bundle.chosen, list[str]()
    if found is None:
        found, aside = pipeline.weights_in(bundle.names, bundle.name)
    if found is not None and pipeline.is_index(found):
        mapping, size = _weight_map(bundle, found)
        base = _assembled(bundle, sorted(set(mapping.values())), config, found, mapping, size)
    elif found is not None:
        base = _assembled(bundle, [found], config)
    else:
        files = [n for n in bundle.names if n.endswith(".safetensors")]
        if len(files) != 1:
            there = f"{len(files)} safetensors files and no index" if files else "no weights"
            wanted = ", ".join(n for n in WEIGHTS if not n.endswith(".json"))
            raise error("not_found", f"{shown(bundle.name)}: {there}; expected {wanted}")
        base = _assembled(bundle, files, config)
    if not aside:
        return base
    message = f"{shown(found)} is read; the variants {', '.join(aside)} beside it are left out"
    return replace(base, problems=(*base.problems, Problem("base_incomplete", message, "note")))


def _weight_map(bundle: Bundle, index: str) -> tuple[dict[str, str], object]:
    """The shard of every tensor, and the total size as the index has it."""
    what = f"{bundle.name}/{index}"
    table = loads(bundle.read(index, INDEX_LIMIT), what, limit=INDEX_LIMIT)
    mapping = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise error("malformed", f"{shown(what)} has no weight_map")
    if not all(isinstance(v, str) for v in mapping.values()):
        raise error("malformed", f"{shown(what)}: weight_map must map names to file names")
    for shard in sorted(set(mapping.values())):
        plain = shard not in ("", ".", "..") and not any(c in shard for c in "/\\:\0")
        if not plain:
            raise error(
                "hostile", f"{shown(what)} names a shard outside the folder: {shown(shard)}"
            )
        if shard not in bundle:
            raise error(
                "base_incomplete", f"{shown(what)} names {shown(shard)}, which is not there"
            )
    about = table.get("metadata")
    return mapping, about.get("total_size") if isinstance(about, dict) else None


def _assembled(
    bundle: Bundle,
    names: list[str],
    config: Mapping[str, Any],
    index: str | None = None,
    mapping: Mapping[str, str] | None = None,
    total: object = None,
) -> Base:
    shards = _shards(bundle, names)
    shards = [replace(shard, leaves=with_scales(shard.leaves, shard.metadata)) for shard in shards]
    tensors: dict[str, Leaf] = {}
    for shard in shards:
        for name, leaf in shard.leaves.items():
            if name in tensors:
                raise error(
                    "duplicate",
                    f"{shown(name)} stands in two shards, {shard.name} among them; remove the "
                    "shard that the index does not name",
                )
            tensors[name] = leaf
    problems = []
    if mapping is not None:
        where = {n: s.name for s in shards for n in s.leaves}
        lost = [n for n, shard in mapping.items() if where.get(n) != shard]
        extra = [n for n in tensors if n not in mapping]
        if extra:
            raise error(
                "malformed",
                f"{shown(bundle.name)}: {shown(extra[0])} and {len(extra) - 1} more tensors stand "
                f"in shards and not in {index}: shards of two runs are mixed",
            )
        if lost:
            message = f"{index} lists {shown(lost[0])} in {mapping[lost[0]]}, which lacks it"
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            problems.append(Problem("base_incomplete", message + more))
        has = sum(leaf.nbytes for leaf in tensors.values())
        if total is not None and total != has:
            message = f"{index} says {shown(total)} bytes in all, the shards hold {has}"
            problems.append(Problem("base_incomplete", message, "note"))
    return Base(bundle, tuple(shards), tensors, config, index, tuple(problems))


def _shards(bundle: Bundle, names: list[str]) -> list[Shard]:
    if bundle.path is not None or len(names) == 1:
        return [_shard(bundle, name) for name in names]
    # Far away each header is a request: time is what they wait for, not what they carry.
    with ThreadPoolExecutor(AT_ONCE, "header") as pool:
        return list(pool.map(lambda name: _shard(bundle, name), names))


def _shard(bundle: Bundle, name: str) -> Shard:
    source = bundle.open(name)
    if name.endswith(".safetensors"):
        header = safetensors.read_header(source)
        return Shard(name, header.leaves, header.metadata, header.digest)
    if name.endswith(TORCH_FILES):
        file = torch_zip.state_dict(source)
        return Shard(name, dict(file.tensors), {}, "")
    raise error("not_weights", f"{shown(source.name)} is neither safetensors nor a torch file")
