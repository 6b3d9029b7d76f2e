"""What one reader, of one version, makes of adapters: findings, and the line to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, leaves
from loratools.commands.reader_rules import FOLD, READERS, RULES, Rule
from loratools.commands.reader_triggers import Seen, pairs
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError, Problem, Severity, error, shown
from loratools.formats.reading import contents

Version = tuple[int, ...]
NEWEST = ("", "latest", "main", "master", "nightly", "dev", "head")
ALIASES = {
    "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "comfy": "comfyui", "automatic1111": "a1111",
    "webui": "a1111", "mlx-lm": "mlx", "mlx_lm": "mlx", "ort": "onnxruntime",
    "onnxruntime-genai": "onnxruntime", "trtllm": "tensorrt-llm", "tensorrt": "tensorrt-llm",
    "tensorrt_llm": "tensorrt-llm",
}  # fmt: skip
_LISTED = 3
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vllm-project/vllm:vllm/config/lora.py


@dataclass(frozen=True, slots=True)
class Reader:
    """A program that loads adapters; without a version, the newest that the rules know."""

    name: str
    said: str = ""  # the version as typed
    version: Version | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.said}" if self.version else self.name

    @staticmethod
    def of(text: str) -> Reader:
        """`NAME[@VERSION]`; a usage error where it is no reader or no version."""
        name, _, said = text.strip().partition("@")
        name = ALIASES.get(name.lower(), name.lower())
        if name not in READERS:
            known = ", ".join(READERS)
            raise error("usage", f"--for {shown(text)}: no such reader; known are {known}")
        return Reader(name, shown(said), parsed(said))


def parsed(text: str) -> Version | None:
    """A version as numbers that compare: 0.11 is 0.11.0, a pre-release comes before its release.

    None for the newest. UsageError where it is no version.
    """
    if text.lower() in NEWEST:
        return None
    found = re.fullmatch(
        r"[vb]?(\d{1,9}(?:\.\d{1,9}){0,4})(?:[-_.]?(a|b|rc|alpha|beta|dev|pre)\.?(\d{0,9}))?"
        r"(?:[.-]?post\d{1,9})?(?:[+-][\w.]{1,40})?",
        text,
        re.ASCII,
    )
    if not found:
        raise error("usage", f"version {shown(text)}: expected numbers and dots, as in 0.11.0")
    numbers = [int(n) for n in found[1].split(".")]
    numbers += [0] * (5 - len(numbers))
    before = (-1, int(found[3] or 0)) if found[2] else (0, 0)
    return (*numbers, *before)


def applies(rule: Rule, reader: Reader) -> bool:
    """Whether a rule is one of this reader in its version."""
    if rule.reader != reader.name:
        return False
    if reader.version is None:
        return not rule.until
    since, until = parsed(rule.since), parsed(rule.until)
    return (since is None or reader.version >= since) and (until is None or reader.version < until)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a reader does to some adapters; `ways` are the commands that help, by problem."""

    reader: Reader
    problems: tuple[Problem, ...]
    ways: tuple[str, ...]  # for each problem; empty where only the adapter's author can help

    def line(
        self,
        judged: Sequence[Problem],
        adapters: Sequence[Adapter],
        base: str | None,
    ) -> str | None:
        """The line to paste: the command that makes the adapter acceptable, or that loads it.

        None where neither exists. `judged` are all problems after `--allow`.
        """
        named = base or _named_base(adapters)
        errors = [p for p in judged if p.severity == "error"]
        still = {(p.code, p.adapter, p.target) for p in errors}
        ways = [
            (way, p)
            for p, way in zip(self.problems, self.ways, strict=True)
            if (p.code, p.adapter, p.target) in still
        ]
        if len(errors) > len(ways) or any(not way for way, _ in ways):
            return None
        # What no format of the reader can hold is folded: converting would only lose it.
        ways.sort(key=lambda w: w[0] != FOLD)
        for way, problem in ways:
            one = next(a for a in adapters if a.name == problem.adapter)
            return _filled(way, one, adapters, named, self.reader.name)
        return loading(self.reader, adapters, named)


def findings(
    reader: Reader, adapters: Sequence[Adapter], base: Mapping[str, Any] | None = None
) -> Findings:
    """Everything that a reader refuses, ignores or misreads in these adapters.

    A Problem's target is the rule, as specs/readers.md names it. `base` is its config.
    """
    rules = [r for r in RULES if applies(r, reader)]
    found: list[Problem] = []
    ways: list[str] = []
    for i, adapter in enumerate(adapters):
        others = (*adapters[:i], *adapters[i + 1 :])
        seen = Seen(adapter, keys_of(adapter), others, base)
        for rule in rules:
            details = list(rule.finds(seen))
            if details:
                found.append(_problem(rule, reader, adapter, details))
                ways.append(rule.way)
    order = sorted(range(len(found)), key=lambda i: _WEIGHT[found[i].code])
    return Findings(reader, tuple(found[i] for i in order), tuple(ways[i] for i in order))


_EFFECTS: dict[str, tuple[str, Severity]] = {
    "refuses": ("refuses it", "error"),
    "misreads": ("misreads it", "error"),
    "ignores": ("ignores part of it", "warning"),
}
_WEIGHT = {"reader_refuses": 0, "reader_misreads": 1, "reader_ignores": 2}


def _problem(rule: Rule, reader: Reader, adapter: Adapter, details: Sequence[str]) -> Problem:
    words, severity = _EFFECTS[rule.effect]
    listed = ", ".join(shown(d) for d in details[:_LISTED])
    more = f" and {len(details) - _LISTED} more" if len(details) > _LISTED else ""
    message = f"{shown(adapter.name)}: {reader} {words}: {rule.what} ({listed}{more})"
    remedy = f"{rule.remedy} (specs/readers.md, {rule.id})"
    return Problem(f"reader_{rule.effect}", message, severity, adapter.name, rule.id, remedy)


def keys_of(adapter: Adapter) -> tuple[str, ...]:
    """The tensors' names as they stand in the adapter's file; in memory, those of its leaves."""
    if adapter.folder is not None and adapter.files:
        name = adapter.files[0]
        path = adapter.folder / name
        if path.exists() and name.endswith((".safetensors", ".bin", ".pt", ".ckpt", ".pth")):
            try:
                return tuple(contents(local(path), name)[0])
            except LoratoolsError:
                pass  # a container in which only its own format finds its tensors
    return tuple(leaf.name for d in adapter.deltas.values() for leaf in leaves(d))


# ------------------------------------------------------------------------------- the line to paste


def loading(reader: Reader, adapters: Sequence[Adapter], base: str | None) -> str:
    """The command, or the call, with which the reader loads these adapters."""
    paths = [a.name for a in adapters]
    names = [_stem(p) for p in paths]
    quoted = [shlex.quote(p) for p in paths]
    over = shlex.quote(base) if base else "BASE"
    pairs_ = " ".join(shlex.quote(f"{n}={p}") for n, p in zip(names, paths, strict=True))
    rank = max((p.rank for a in adapters for p in pairs(a).values()), default=0)
    match reader.name:
        case "vllm":
            top = next((r for r in VLLM_RANKS if r >= rank), rank)
            bias = any(a.config.get("bias", "none") != "none" for a in adapters)
            flag = " --enable-lora-bias" if bias and _before(reader, "0.11.1") else ""
            several = f" --max-loras {len(paths)}" if len(paths) > 1 else ""
            return (
                f"vllm serve {over} --enable-lora --max-lora-rank {top}{flag}{several} "
                f"--lora-modules {pairs_}"
            )
        case "sglang":
            return (
                f"python -m sglang.launch_server --model-path {over} --enable-lora "
                f"--max-lora-rank {rank} --lora-paths {pairs_}"
            )
        case "llama.cpp":
            files = " ".join(f"--lora {q}" for q in quoted)
            return f"llama-server -m {over if base else 'BASE.gguf'} {files}"
        case "ollama":
            lines = shlex.quote(f"FROM {base or 'BASE'}\\nADAPTER {paths[0]}\\n")
            return f"printf {lines} > Modelfile && ollama create {names[0]} -f Modelfile"
        case "comfyui":
            return f"cp {' '.join(quoted)} ComfyUI/models/loras/"
        case "a1111":
            prompt = " ".join(f"<lora:{n}:1>" for n in names)
            folder = "stable-diffusion-webui/models/Lora/"
            return f"cp {' '.join(quoted)} {folder}  # then, in the prompt: {prompt}"
        case "diffusers":
            calls = (
                f"pipeline.load_lora_weights({p!r}, adapter_name={n!r})"
                for n, p in zip(names, paths, strict=True)
            )
            return "; ".join(calls)
        case "mlx":
            return f"mlx_lm.generate --model {over} --adapter-path {quoted[0]}"
        case "onnxruntime":
            calls = (
                f"{n} = onnxruntime.LoraAdapter(); {n}.Load({p!r}); "
                f"run_options.add_active_adapter({n})"
                for n, p in zip((re.sub(r"\W", "_", f"a_{n}") for n in names), paths, strict=True)
            )
            return "; ".join(calls)
        case "tensorrt-llm":
            return (
                f"trtllm-build --checkpoint_dir {over} --lora_plugin auto "
                f"--max_lora_rank {rank} --lora_dir {' '.join(quoted)}"
            )
        case _:
            return f"model = peft.PeftModel.from_pretrained(model, {paths[0]!r})"


def _before(reader: Reader, version: str) -> bool:
    limit = parsed(version)
    return reader.version is not None and limit is not None and reader.version < limit


def _filled(
    way: str, adapter: Adapter, adapters: Sequence[Adapter], base: str | None, reader: str
) -> str:
    """A way with the paths of this adapter in it, quoted for the shell."""
    stem = _stem(adapter.name)
    out = f"{stem}-folded" if " merge " in way else f"{stem}-{reader}"
    rank = max((p.rank for p in pairs(adapter).values()), default=1)
    words = {
        "ADAPTER": shlex.quote(adapter.name),
        "BASE": shlex.quote(base) if base else "BASE",
        "OUT": shlex.quote(out),
        "RANK": str(rank),
        "ALL": " ".join(shlex.quote(a.name) for a in adapters),
        "ONES": ",".join("1" for _ in adapters),
    }
    return re.sub(r"\b(?:ADAPTER|BASE|OUT|RANK|ALL|ONES)\b", lambda m: words[m[0]], way)


def _stem(path: str) -> str:
    """A name for an adapter: the last part of its path, without what a name may not have."""
    name = re.sub(r"[^\w.-]+", "-", Path(path).name or "adapter").strip("-.") or "adapter"
    return re.sub(r"\.(?:safetensors|gguf|bin|pt|onnx_adapter)$", "", name) or "adapter"


def _named_base(adapters: Sequence[Adapter]) -> str | None:
    """The Hub id that an adapter's config names; anything else from a file is not repeated."""
    for adapter in adapters:
        said = adapter.config.get("base_model_name_or_path")
        if isinstance(said, str) and re.fullmatch(r"[\w][\w.-]{0,95}(?:/[\w][\w.-]{0,95})?", said):
            return said
    return None


# ------------------------------------------------------------------------------- the page


def document() -> str:
    """The page specs/readers.md in Markdown, made from the rules."""
    lines = [
        "# Readers",
        "",
        "What programs that load adapters refuse, ignore or misread: the rules of `loratools check "
        "--for READER[@VERSION]`.",
        "Made by `python -m loratools.cli.readers_page > specs/readers.md`; do not edit it by "
        "hand.",
        "",
        "`since` is the first version that does it, `until` the first that no longer does; an "
        "empty one means all that were looked at. Where only some versions could be looked at, it",
        "is the nearest of them. `RANK` is the adapter's largest rank. A rule's name is the "
        "`target` of its problem: `--allow reader_misreads:sglang.scaling`.",
        "Looked at: vllm 0.6.6, 0.7.0, 0.8.5, 0.10.2, 0.11.0, 0.11.1, 0.12.0, 0.13.0, 0.14.0, "
        "0.16.0, 0.20.0, 0.26.0, 0.30.0 to 0.33.0; sglang 0.4.10, 0.5.3, 0.5.10, 0.5.23;",
        "peft 17 releases from 0.5.0 to 0.21.2; diffusers 0.36.0 to 0.42.1; mlx-lm 0.25.0, "
        "0.28.0, 0.30.0, 0.32.2; and by commit: ollama fb307609, llama.cpp 0650ea8c and 0b03adaa,",
        "ComfyUI 17358c8f, 14c20852 and 02b5222d, A1111 873edba4, TensorRT-LLM 007e181b, Olive "
        "19fd0567. Only read about: the later DoRA of ComfyUI, what A1111 lacks, "
        "`onnxruntime.overlap`.",
    ]
    for reader in READERS:
        lines += ["", f"## {reader}", ""]
        lines += ["| rule | effect | since | until | what | remedy | way | source |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for rule in RULES:
            if rule.reader == reader:
                way = f"`{rule.way}`" if rule.way else ""
                cells = (
                    f"`{rule.id}`", rule.effect, rule.since, rule.until, rule.what, rule.remedy,
                    way, f"`{rule.source}`",
                )  # fmt: skip
                lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"
