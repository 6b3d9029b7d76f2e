"""The model card: what was made from what, how, under which license, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError, Problem, shown
from loratools.hub import contents, loading
from loratools.hub.artefact import README_LIMIT, Artefact, hub_id, told
from loratools.hub.body import body, tags_of
from loratools.hub.choosing import README
from loratools.hub.facts import Facts, parents_of
from loratools.hub.markdown import dumped, front_matter, with_keys
from loratools.hub.results import model_index
from loratools.hub.terms import licensed

MARKER = "<!-- loratools-card -->"
TAKE_OVER = "<!-- Remove the line above, and loratools leaves this text as you write it. -->"
# A template that nobody filled in (huggingface_hub: templates/modelcard_template.md has 40).
UNFILLED, BLANKS = "[More Information Needed]", 25
# What a template's metadata may still say truly.
SURVIVES = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


@dataclass(frozen=True, slots=True)
class Card:
    """A card as it is sent; `text` is empty where none is."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)  # its metadata
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def card(
    artefact: Artefact,
    facts: Facts,
    *,
    base_models: Sequence[str] = (),
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    eval_results: str | Path | None = None,
    mode: str = "auto",
    existing: str | None = None,
    repo: str | None = None,
) -> Card:
    """The card of an artefact, with everything that is wrong with it at once.

    `existing` is the text that stands there already: beside the files, else on the Hub. `mode`:
    "auto" writes ours where none stands or ours does and keeps any other; "keep" keeps what
    stands; "none" sends none; else a file that is sent as it is. What is kept gets the metadata
    that it lacks, and loses nothing.
    """
    problems: list[Problem] = []
    said, yaml_text, said_body = _read(existing, problems)
    bases, faults = _bases(artefact, base_models or _bases_of(said))
    problems += faults
    facts = replace(facts.with_bases(bases), format=facts.format or artefact.format)
    notes: list[str] = []
    if mode == "none":
        # Without a card nobody needs an id; a path in a config that is sent is wrong all the same.
        named = bool(base_models) or artefact.base_path is not None
        return Card("", {}, tuple(problems) if named else ())
    if mode not in ("auto", "keep"):
        return _given(mode, problems)
    template = said_body.count(UNFILLED) >= BLANKS
    if template and mode == "auto":
        notes.append("README.md is a template that nobody filled in: the card is written anew")
        said = {k: v for k, v in said.items() if k in SURVIVES}
    terms, faults, more = licensed(facts, said, license, license_name, license_link)
    problems, notes = problems + faults, notes + more
    measured, faults = model_index(eval_results, shown(artefact.path.resolve().name))
    problems += faults
    data = {**_metadata(artefact, facts, bases, terms), **measured}
    ours = existing is None or MARKER in existing or template
    if existing is None or (mode == "auto" and ours):
        rest = body(artefact, facts, data, repo or loading.PLACEHOLDER)
        text = f"---\n{dumped(data)}---\n{MARKER}\n{TAKE_OVER}\n\n{rest}"
    else:
        given = {k: v for k, v in (("license", license), *terms.items()) if license and v}
        text, data = _kept(existing, said, yaml_text, data, given, problems, notes)
    problems += _leaks(text)
    return Card(text, data, tuple(problems), tuple(notes))


def _read(existing: str | None, problems: list[Problem]) -> tuple[dict[str, Any], str | None, str]:
    if existing is None:
        return {}, None, ""
    try:
        return front_matter(existing)
    except LoratoolsError as cause:
        problems.append(Problem("card", cause.message, target=README))
        return {}, None, existing


def _bases_of(said: Mapping[str, Any]) -> list[str]:
    """The bases that a card names, where all of them are ids."""
    named = said.get("base_model")
    every = named if isinstance(named, list) else [named]
    ids = [each for each in every if isinstance(each, str) and _is_id(each)]
    return ids if len(ids) == len(every) else []


def _leaks(text: str) -> list[Problem]:
    return told(README, contents.secrets_in(text, contents.own_tokens()))


# ------------------------------------------------------------------------------- bases


def _bases(artefact: Artefact, given: Sequence[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """The Hub ids of the base (and further ones that the user names); never a path."""
    problems = [
        Problem("base_unnamed", f"--base-model {shown(g)} is no id of the Hub, such as ORG/NAME")
        for g in given
        if hub_id(g) is None and (contents.is_local_path(g) or not _is_id(g))
    ]
    if given:
        ids = tuple(dict.fromkeys(hub_id(g) or g for g in given if _is_id(g)))
        if artefact.kind == "adapter" and len(ids) > 1:
            message = f"an adapter has one base, and {len(ids)} are named: {', '.join(ids)}"
            problems.append(Problem("base_unnamed", message))
        return ids, problems
    if artefact.base_ids:
        ids = artefact.base_ids
        return (ids[:1] if artefact.kind == "adapter" else ids), problems
    made = any(p.role == "base" for p in parents_of(artefact.receipt))
    if artefact.base_path:
        path = artefact.base_path
        said = f"what it was made from is named {shown(path)}, "
        looks = not contents.is_local_path(path) and _is_id(path)
        why = "and a folder of that name stands here" if looks else "which is no id of the Hub"
        remedy = f"--base-model {shown(path)}, if that is its id" if looks else None
        problems.append(Problem("base_unnamed", said + why, remedy=remedy))
    elif artefact.kind == "adapter" or made:
        problems.append(Problem("base_unnamed", "nothing here names the base's id on the Hub"))
    return (), problems


def _is_id(text: str) -> bool:
    """Whether a text has the form of an id, with an owner or, as the oldest ones, without."""
    part = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
    return re.fullmatch(f"{part}(?:/{part})?", text) is not None and ".." not in text


# ------------------------------------------------------------------------------- metadata


def _metadata(
    artefact: Artefact, facts: Facts, bases: tuple[str, ...], terms: Mapping[str, str]
) -> dict[str, Any]:
    """The front matter, in the order in which it is written."""
    found: dict[str, Any] = {}
    adapters = [p.id for p in facts.parents if p.role == "adapter" and p.id]
    # An adapter's parents stay out: the Hub would take it for a merge and serve it no more.
    ids = list(dict.fromkeys([*bases, *adapters])) if artefact.kind != "adapter" else list(bases)
    if ids:
        found["base_model"] = ids[0] if len(ids) == 1 else ids
        relation = _relation(artefact, facts, ids)
        if relation:
            found["base_model_relation"] = relation
    library = loading.library(artefact, facts)
    if library:
        found["library_name"] = library
    found.update(terms)
    base_card = next((p.card or {} for p in facts.parents if p.role == "base"), {})
    tag = base_card.get("pipeline_tag") or loading.task(artefact, facts)
    if isinstance(tag, str) and re.fullmatch(r"[a-z0-9-]{1,60}", tag):
        found["pipeline_tag"] = tag
    for key in ("language", "datasets"):
        union = _union(facts, key)
        if union:
            found[key] = union
    found["tags"] = _tags(artefact, facts, library)
    return found


def _relation(artefact: Artefact, facts: Facts, ids: list[str]) -> str | None:
    match artefact.kind:
        case "adapter":
            return "adapter"
        case "onnx":
            return "quantized" if facts.bits in (4, 8) else None
        case _:
            return "merge" if len(ids) > 1 else "finetune"


def _union(facts: Facts, key: str) -> list[str]:
    """The values of all parents' cards, in order; only what the Hub takes for such a value."""
    found: list[str] = []
    for parent in facts.parents:
        said = (parent.card or {}).get(key)
        for value in said if isinstance(said, list) else [said]:
            # YAML takes a lone `no` (Norwegian) for false.
            text = "no" if value is False and key == "language" else value
            if isinstance(text, str) and re.fullmatch(r"[\w./-]{1,200}", text, re.ASCII):
                found.append(text)
    return [v for v in dict.fromkeys(found) if not contents.is_local_path(v)]


def _tags(artefact: Artefact, facts: Facts, library: str | None) -> list[str]:
    merged = sum(p.role == "adapter" for p in facts.parents) > 1
    tags: list[str] = []
    if artefact.kind == "adapter":
        tags += tags_of(list(facts.kinds))
        tags += [facts.format] if facts.format in ("peft", "mlx", "gguf") else []
        tags += ["diffusers"] if library == "diffusers" else []
        tags += ["onnx"] if facts.format == "onnx_adapter" else []
        tags += ["merge"] if merged else []
    elif artefact.kind == "onnx":
        tags += ["onnx"]
    elif any(p.role == "adapter" for p in facts.parents):
        tags += ["merge", "lora"]
    return [*dict.fromkeys(tags), "loratools"]


# ------------------------------------------------------------------------------- cards of others


def _kept(
    existing: str,
    said: Mapping[str, Any],
    yaml_text: str | None,
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    problems: list[Problem],
    notes: list[str],
) -> tuple[str, dict[str, Any]]:
    """A card of somebody's own, with the metadata that it lacks."""
    if any(p.code == "card" for p in problems):
        return existing, dict(said)
    problems += _metadata_faults(said)
    missing = {k: v for k, v in data.items() if said.get(k) is None and k != "tags"}
    if said.get("tags") is None:
        missing["tags"] = data["tags"]
    if "license" in said:  # its name and link belong to it
        missing = {k: v for k, v in missing.items() if not k.startswith("license")}
    if "base_model" in said:
        missing.pop("base_model_relation", None)
        if said["base_model"] != data.get("base_model", said["base_model"]):
            notes.append(
                f"README.md names the base {shown(said['base_model'])}, and the files say "
                f"{shown(data['base_model'])}; the card is kept as it is"
            )
    if given and said.get("license") not in (None, given["license"]):
        message = (
            f"README.md says license {shown(said['license'])}, and --license says "
            f"{shown(given['license'])}; mend the card"
        )
        problems.append(Problem("license", message, target=README))
    empty = [k for k in missing if k in said]
    if empty:
        lines = ", ".join(empty)
        notes.append(f"README.md has {lines} without a value; it is kept as it is")
        missing = {k: v for k, v in missing.items() if k not in said}
    kept = "README.md is kept as it is"
    notes.append(f"{kept}, with metadata added: {', '.join(missing)}" if missing else kept)
    return with_keys(existing, missing), {**said, **missing}


def _given(path: str, problems: list[Problem]) -> Card:
    """A file that is sent to the letter, if the Hub would take it."""
    found = list(problems)
    try:
        source = LocalFile(Path(path))
        if source.size > README_LIMIT:
            raise LoratoolsError("card", f"{shown(path)} has {source.size} bytes")
        text = source.read(0, source.size).decode("utf-8")
        data, _, _ = front_matter(text)
    except UnicodeDecodeError:
        found.append(Problem("card", f"{shown(path)} is not UTF-8"))
        return Card("", {}, tuple(found))
    except LoratoolsError as cause:
        code = cause.code if cause.code == "not_found" else "card"
        found.append(Problem(code, cause.message.replace(README, shown(path))))
        return Card("", {}, tuple(found))
    found += _metadata_faults(data)
    if _bases_of(data):
        found = [p for p in found if p.code != "base_unnamed"]
    for key in ("license", "base_model"):
        if not data.get(key):
            message = f"{shown(path)} names no {key}"
            found.append(Problem("card", message, "warning"))
    return Card(text, data, tuple(found + _leaks(text)), (f"the card is {shown(path)}",))


def _metadata_faults(data: Mapping[str, Any]) -> list[Problem]:
    """What the Hub refuses in a card's metadata, before anything is sent."""
    problems: list[Problem] = []
    for key in ("base_model", "datasets"):
        said = data.get(key)
        for value in said if isinstance(said, list) else [said]:
            if value is not None and not (isinstance(value, str) and _is_id(value)):
                message = f"the card's {key} is {shown(value)}, which is no id of the Hub"
                problems.append(Problem("card", message, target=README))
    if data.get("license") == "other" and not (
        data.get("license_name") and data.get("license_link")
    ):
        message = "the card's license is other, which needs license_name and license_link"
        problems.append(Problem("card", message, target=README))
    return problems
