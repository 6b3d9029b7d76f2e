"""What `push` publishes: the files, by what `inspect` says they are, and the facts of the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import formats, receipt
from loratools.commands.inspect import Inspection, inspect
from loratools.containers import onnx_graph
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.weights.base import headers

if TYPE_CHECKING:
    from loratools.hub.artefact import Artefact
    from loratools.hub.card import Card
    from loratools.hub.facts import Facts, Parent

Progress = Callable[[int, int], None]
README = "README.md"
GRAPH = 200_000_000  # bytes of a graph that is walked for a card
BITS = {"MatMulNBits": 4, "DynamicQuantizeLinear": 8, "QuantizeLinear": 8, "DequantizeLinear": 8}
OPTIONS = ("license", "license_name", "license_link", "eval_results")


def planned(
    path: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    inside: str = "",
    base_models: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artefact:
    """What would be published of a path, with all that is wrong at once; nobody is asked."""
    from loratools.hub.artefact import artefact, hub_id

    found = inspected(path)
    planned = artefact(
        path,
        include=include,
        exclude=exclude,
        inside=inside,
        format=found.format if found else None,
        base_models=base_models,
        progress=progress,
    )
    base = hub_id(found.base) if found else None
    if base is None or planned.base_ids or planned.base_path:
        return planned
    return replace(planned, base_ids=(base,))  # as the file's own metadata names it


def inspected(path: str | Path) -> Inspection | None:
    """What `inspect` says of one adapter; None for all else (what is wrong is told elsewhere)."""
    try:
        found = inspect(path)
    except (LoratoolsError, OSError):
        return None
    return found[0] if len(found) == 1 and found[0].format is not None else None


def facts(artefact: Artefact) -> Facts:
    """What the card tells of an artefact; from its headers, its receipt and its config."""
    from loratools.hub.facts import Facts

    made = artefact.receipt
    recipe = made.get("recipe") if made else None
    found = Facts(
        parents=tuple(_parents(artefact)),
        recipe=recipe if isinstance(recipe, Mapping) else {},
        versions=_versions(artefact),
        **_figures(made),
    )
    if artefact.kind == "onnx":
        return replace(found, **_graph(artefact))
    one = inspected(artefact.path) if artefact.kind == "adapter" else None
    if one is None:
        return found
    adapter = one.adapter
    addresses = adapter.deltas if adapter else ()
    return replace(
        found,
        format=one.format,
        vocabulary=adapter.vocabulary if adapter else None,
        kinds=one.kinds,
        ranks=one.ranks,
        targets=one.targets,
        parameters=one.parameters,
        dtypes=one.dtypes,
        task=one.task,
        is_unet=any("down_blocks" in a or "input_blocks" in a for a in addresses),
        trigger_words=one.trigger_words,
    )


def card_of(
    artefact: Artefact,
    options: Mapping[str, Any],
    *,
    existing: str | None = None,
    repo: str | None = None,
    ask: bool = True,
) -> Card:
    """The card of an artefact, from the options of `push`.

    `existing` is the card on the Hub; one of somebody's own beside the files comes before one of
    ours there. `ask`: cards of parents that stand nowhere here are asked of the Hub, for their
    licenses.
    """
    from loratools.hub.card import MARKER, card
    from loratools.hub.cards import cards

    found = facts(artefact)
    bases = tuple(options.get("base_model") or ())
    if bases:
        found = found.with_bases(bases)
    mode = options.get("card") or "auto"
    if mode != "none":
        unread = [(p.id, p.revision) for p in found.parents if p.id and p.card is None]
        found = found.with_cards(cards(unread, ask=ask))
    own = artefact.readme
    notes: tuple[str, ...] = ()
    if own is not None and (existing is None or MARKER in existing):
        existing = own
    elif own is not None and MARKER not in own and own != existing:
        notes = (f"the Hub has another card than {README} here; --card {README} sends this one",)
    made = card(
        artefact,
        found,
        base_models=bases,
        mode=mode,
        existing=existing,
        repo=repo,
        **{key: options.get(key) for key in OPTIONS},
    )
    return replace(made, notes=(*made.notes, *notes))


# ------------------------------------------------------------------------------- parents


def _parents(artefact: Artefact) -> Iterator[Parent]:
    """The base and the adapters, with the cards that stand beside them here."""
    from loratools.hub.facts import Parent, parents_of

    found = parents_of(artefact.receipt)
    entries = receipt.made_from(artefact.receipt) if artefact.receipt and found else []
    if not any(p.role == "base" for p in found) and artefact.base_ids:
        id, revision = artefact.base_ids[0], artefact.config.get("revision")
        commit = revision if isinstance(revision, str) else None
        yield Parent(id.rpartition("/")[2], "base", id, commit)
    for parent in found:
        if parent.role == "base" and parent.id is None and artefact.base_ids:
            parent = replace(parent, id=artefact.base_ids[0])
        entry = next((e for e in entries if _last(e) == parent.name), None)
        card = None if entry is None or parent.id else _card_beside(artefact, entry)
        yield replace(parent, card=card)


def _last(entry: Mapping[str, Any]) -> str:
    return str(entry.get("source", "")).rstrip("/").rpartition("/")[2]


def _card_beside(artefact: Artefact, entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The card of an input that is still here under its name, and still the same by its bytes."""
    from loratools.hub.cards import metadata

    source = Path(str(entry.get("source", "")))
    for folder in (artefact.path.resolve().parent, Path()):
        for name in dict.fromkeys((source, Path(source.name))):
            place = folder / name
            if name.is_absolute() or ".." in name.parts or not place.is_dir():
                continue
            said = metadata(place / README)
            if said and _is_input(place, entry):
                return said
    return None


def _is_input(place: Path, entry: Mapping[str, Any]) -> bool:
    try:
        if entry.get("role") == "adapter":
            return receipt.fingerprint(formats.read(place)) == entry.get("fingerprint")
        return receipt.base_fingerprint(headers(place)) == entry.get("fingerprint")
    except LoratoolsError:
        return False


# ------------------------------------------------------------------------------- figures


def _versions(artefact: Artefact) -> dict[str, str]:
    made = artefact.receipt
    said = (
        {"loratools": made.get("loratools"), "torch": made.get("arithmetic", "torch")}
        if made
        else {}
    )
    return {k: v for k, v in said.items() if isinstance(v, str)}


def _figures(made: receipt.Receipt | None) -> dict[str, Any]:
    """What came of it, as the receipt has it."""
    if made is None:
        return {}
    truncation, targets = made.get("truncation", "error"), made.get("targets")
    kept = [
        float(entry["update_kept"])
        for entry in (targets.values() if isinstance(targets, Mapping) else ())
        if isinstance(entry, Mapping) and isinstance(entry.get("update_kept"), int | float)
    ]
    found: dict[str, Any] = {
        "makes": made.get("makes"),
        "targets": len(targets) if isinstance(targets, Mapping) else 0,
    }
    if isinstance(truncation, int | float):
        found["truncation_error"] = float(truncation)
    if kept:
        found |= {"update_kept": sum(kept) / len(kept), "least_kept": min(kept)}
    return found


def _graph(artefact: Artefact) -> dict[str, Any]:
    """The inputs of a graph, and the bits of its weights where they are quantised."""
    graphs = [f for f in artefact.weights if f.name.endswith(".onnx") and f.size <= GRAPH]
    if not graphs:
        return {}
    file = min(graphs, key=lambda f: len(f.name))
    try:
        graph = onnx_graph.read(local(file.path), file.path.name)
    except LoratoolsError:
        return {}  # it is among the problems
    own = [name for name in graph.inputs if name not in graph.tensors]
    bits = [
        int(node.attributes.get("bits", BITS[node.op_type]))  # type: ignore[arg-type]
        for node in graph.nodes
        if node.op_type in BITS
    ]
    return {"inputs": tuple(own), "bits": min(bits, default=None)}
