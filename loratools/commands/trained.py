"""What a file's metadata says of its training: trigger words, tags, title, base; never believed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratools.containers.bundle import Bundle

LIMIT = 8_000_000  # characters of ss_tag_frequency; big datasets take some hundred thousand
SIDECAR = 1_000_000  # bytes of a .civitai.info or .json beside the file
TAGS = 10
WORDS = 20
_LENGTH = 200  # characters of one word or tag

# Where trainers put the words that call an adapter up: Stability-AI/ModelSpec, ostris/ai-toolkit,
# kohya-ss/sd-scripts, Civitai's trainer, diffusers' training scripts.
_PHRASES = (
    "modelspec.trigger_phrase", "trained_words", "trainedWords", "trigger_words", "trigger_word",
    "ss_trigger_words", "instance_prompt", "activation text",
)  # fmt: skip


def trigger_words(metadata: Mapping[str, str], bundle: Bundle | None = None) -> tuple[str, ...]:
    """The words that a file, or the Civitai or A1111 sidecar beside it, gives as its own."""
    found: list[str] = []
    for table in (metadata, *_sidecars(bundle)):
        for key in _PHRASES:
            found += _words(table.get(key))
    clean = (" ".join(w.split())[:_LENGTH] for w in found)
    return tuple(dict.fromkeys(w for w in clean if w))[:WORDS]


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [w for w in value[:WORDS] if isinstance(w, str)]
    if not isinstance(value, str) or len(value) > LIMIT:
        return []
    if value.startswith("["):
        listed = _parsed(value)
        if isinstance(listed, list):
            return _words(listed)
    return value.split(",")[:WORDS]


def _sidecars(bundle: Bundle | None) -> list[Mapping[str, Any]]:
    if bundle is None or bundle.chosen is None:
        return []
    stem = bundle.chosen.rpartition(".")[0] or bundle.chosen
    found: list[Mapping[str, Any]] = []
    for name in (f"{stem}.civitai.info", f"{stem}.json"):
        if name in bundle:
            source = bundle.open(name)
            raw = source.read(0, source.size) if source.size <= SIDECAR else b""
            table = _parsed(raw.decode(errors="replace"))
            if isinstance(table, dict):
                found.append(table)
    return found


def frequent_tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """The tags that most of the training captions had, with how often, all data sets together."""
    text = metadata.get("ss_tag_frequency", "")
    table = _parsed(text) if len(text) <= LIMIT else None
    counts: Counter[str] = Counter()
    for tags in table.values() if isinstance(table, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and not isinstance(count, bool) and 0 < count < 1 << 53:
                counts[" ".join(tag.split())[:_LENGTH]] += count
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:TAGS])


def architecture(metadata: Mapping[str, str]) -> str | None:
    """The sort of base that the metadata names (`sdxl_base_v1-0`)."""
    named = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    return (named or metadata.get("ss_base_model_version", ""))[:_LENGTH] or None


def title(metadata: Mapping[str, str]) -> str | None:
    """The name that the trainer gave, which prompts of A1111 use too."""
    named = metadata.get("modelspec.title") or metadata.get("ss_output_name", "")
    return named[:_LENGTH] or None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
