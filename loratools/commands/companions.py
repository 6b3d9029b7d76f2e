"""The files beside folded weights: config, tokenizer, the rest of the base's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.adapter import TORCH_NAMES, Adapter
from loratools.containers.bundle import folders
from loratools.errors import error, shown
from loratools.plan import Plan
from loratools.weights.base import HEADS, Base, text_config
from loratools.weights.pipeline import is_index

TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja "
    "chat_template.json"
).split()
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot",
)  # fmt: skip
LEFT = (".onnx_data", ".lock", ".partial")
SMALL = 50_000_000  # bytes of a companion file; larger ones are weights of some other sort
# transformers 5 takes tie_word_embeddings=false for "do not scale" unless this key says otherwise.
SAYS_SCALED = ("t5", "longt5", "pop2piano")
SCALED_WHEN_TIED = ("umt5", "switch_transformers", "udop")  # and there is no such key
# Of a head of several layers, the one whose rows are labels.
LAST_LAYERS = ("classifier", "out_proj", "score")
# The task a PEFT task_type stands for, as transformers' class names end.
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}


@dataclass(slots=True)
class Companions:
    """Files to write (as bytes or to copy), and what was decided, in words."""

    files: dict[str, bytes | Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> list[str]:
        """Write all of them; the names written."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return list(self.files)


def plan_companions(
    plan: Plan, *, dtype: str | None = None, tokenizer: str | None = None
) -> Companions:
    """Decide every file beside the weights: config from the base, tokenizer by design §5.

    FitError `tokenizer_conflict` where several adapters carry different tokenizers and
    `tokenizer` ("base", "adapter" or a path) does not decide.
    """
    found = Companions()
    folder = plan.base.bundle.path
    if folder is None or plan.base.bundle.chosen is not None:
        return found
    if plan.base.components:
        if tokenizer is not None and tokenizer != "base":
            raise error("usage", "--tokenizer: each text encoder of a pipeline keeps its own")
        _pipeline(plan.base, found, folder, dtype)
        return found
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_companion(path.name, path.stat().st_size):
            found.files[path.name] = path
            if path.suffix == ".py":
                found.notes.append(f"{path.name} is copied; it is code that loading may run")
    for inner in folders(folder):
        files = [p for p in inner.rglob("*") if p.is_file()]
        if len(files) <= 100 and all(
            is_companion(p.name, p.stat().st_size) and p.stat().st_size < 1e6 for p in files
        ):
            found.files.update({str(p.relative_to(folder)): p for p in files})
    _tokenizer(plan, found, tokenizer)
    if plan.base.config:
        config = changed_config(plan, dtype)
        if config != plan.base.config:
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            found.files["config.json"] = text.encode()
            keys = [k for k in config if config[k] != plan.base.config.get(k)]
            found.notes.append(f"config.json: {', '.join(keys)} changed")
    return found


def _pipeline(base: Base, found: Companions, folder: Path, dtype: str | None) -> None:
    """Every file of a pipeline but weights: model_index.json, configs, tokenizers, scheduler."""
    left = []
    for place in (folder, *folders(folder)):
        files = folder.iterdir() if place == folder else place.rglob("*")
        for path in sorted(path for path in files if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if is_companion(path.name, path.stat().st_size):
                found.files[name] = path
                if path.suffix == ".py":
                    found.notes.append(f"{shown(name)} is copied; it is code that loading may run")
            elif path.name.lower().endswith(WEIGHTS) and not _is_read(base, name):
                left.append(name)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        found.notes.append(f"{shown(left[0])}{more}: other weights than those read, left out")
    for component, config in base.components.items():
        changed = {k: TORCH_NAMES[dtype] for k in ("dtype", "torch_dtype") if k in config and dtype}
        if any(config[k] != value for k, value in changed.items()):
            text = json.dumps({**config, **changed}, indent=2, ensure_ascii=False) + "\n"
            found.files[f"{component}/config.json"] = text.encode()
            found.notes.append(f"{component}/config.json: {', '.join(changed)} changed")


def _is_read(base: Base, name: str) -> bool:
    return any(shard.name == name for shard in base.shards)


def is_companion(file: str, size: int) -> bool:
    """Whether a file beside weights goes with them: no weights itself, and not large."""
    name = file.lower()
    if (
        name.startswith((".", "readme"))
        or name == "loratools.json"
        or name.endswith(LEFT)
        or is_index(name)
    ):
        return False
    return not name.endswith(WEIGHTS) and size <= SMALL


def _tokenizer(plan: Plan, found: Companions, asked: str | None) -> None:
    if asked == "base":
        return
    if asked is not None and asked != "adapter":
        source = Path(asked)
        carried = {n: source / n for n in TOKENIZER if (source / n).is_file()}
        if not carried:
            raise error("not_found", f"--tokenizer {shown(asked)}: no tokenizer files there")
        _use(found, carried, shown(asked))
        return
    own = [(a, _carried(a)) for a in plan.adapters]
    differing = [(a, files) for a, files in own if _differs(files, found.files)]
    kinds = {tuple(sorted((n, p.read_bytes()) for n, p in f.items())) for _, f in differing}
    if len(kinds) > 1:
        names = " and ".join(shown(a.name) for a, _ in differing)
        raise error("tokenizer_conflict", f"{names} carry different tokenizers")
    if differing:
        adapter, files = differing[0]
        _use(found, files, shown(adapter.name))
    elif asked == "adapter":
        raise error("usage", "--tokenizer adapter: no adapter carries one unlike the base's")


def _carried(adapter: Adapter) -> dict[str, Path]:
    folder = adapter.folder
    if folder is None:
        return {}
    return {n: folder / n for n in TOKENIZER if (folder / n).is_file()}


def _differs(files: Mapping[str, Path], base: Mapping[str, bytes | Path]) -> bool:
    for name, path in files.items():
        there = base.get(name)
        if there is None:
            # A chat template or added tokens alone are a difference; a copy in another layout
            # (tokenizer.json beside vocab files) of a base without any is one too.
            return True
        mine = path.read_bytes()
        if mine != (there if isinstance(there, bytes) else there.read_bytes()):
            return True
    return False


def _use(found: Companions, files: Mapping[str, Path], whose: str) -> None:
    for name in TOKENIZER:
        found.files.pop(name, None)
    found.files.update(files)
    found.notes.append(f"tokenizer from {whose}")


# ------------------------------------------------------------------------------- config.json


def changed_config(plan: Plan, dtype: str | None) -> dict[str, Any]:
    """The base's config.json with what the fold makes untrue put right, and nothing else."""
    config: dict[str, Any] = json.loads(json.dumps(plan.base.config))
    if plan.untied:
        kind = config.get("model_type")
        if kind in SAYS_SCALED:
            config["scale_decoder_outputs"] = True
        elif kind in SCALED_WHEN_TIED:
            raise error("tied", f"{kind} scales its outputs only while tied: --untie changes them")
        config["tie_word_embeddings"] = False
        inner = text_config(config)
        if inner is not config and "tie_word_embeddings" in inner:
            config["text_config"]["tie_word_embeddings"] = False
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = TORCH_NAMES[dtype]
    rows = set(plan.resized.values())
    if len(rows) == 1:
        language = config.get("text_config")
        holder = config if "vocab_size" in config or language is None else language
        holder["vocab_size"] = rows.pop()
    heads = [n for n in plan.new if n.rpartition(".")[0] not in HEADS]
    if heads:
        _new_head(config, plan, heads)
    return config


def _new_head(config: dict[str, Any], plan: Plan, heads: Sequence[str]) -> None:
    tasks = {a.config.get("task_type") for a in plan.adapters} & set(TASKS)
    mapped = {
        m.get("base_model_class")
        for a in plan.adapters
        if isinstance(m := a.config.get("auto_mapping"), Mapping)
    } - {None}
    before = (config.get("architectures") or [""])[0]
    family = re.sub(r"(LMHeadModel|PreTrainedModel|Model|For[A-Z]\w*)$", "", before)
    if len(mapped) == 1 and re.fullmatch(r"[A-Za-z]\w{0,99}", str(next(iter(mapped)))):
        config["architectures"] = [next(iter(mapped))]
    elif len(tasks) == 1 and family:
        config["architectures"] = [family + TASKS[str(next(iter(tasks)))]]
    named = str((config.get("architectures") or [""])[0])
    if tasks & {"SEQ_CLS", "TOKEN_CLS"} or named.endswith("Classification"):
        weights = [n for n in heads if n.endswith(".weight")]
        last = [n for n in weights if n.split(".")[-2] in LAST_LAYERS] or weights
        labels = min(plan.targets[n].shape[0] for n in last)
        if len(config.get("id2label") or {}) != labels:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
