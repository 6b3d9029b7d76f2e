"""Adapters folded straight into the weights of an existing ONNX graph: planned whole, then written.

Every weight is computed as in any other fold (float64, rounded once, the same tiles), so that the
graph is the one that exporting the folded model would give (specs/onnx.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from loratools.adapter import FLOATS
from loratools.containers.onnx_graph import Graph
from loratools.containers.onnx_tensors import Tensor
from loratools.containers.protobuf import (
    Edit,
    Field,
    Span,
    as_bytes,
    as_head,
    as_number,
    moved,
    with_lengths,
)
from loratools.errors import error, shown
from loratools.plan import Plan, Target
from loratools.weights.graph_names import SIDECAR, Stored, Use
from loratools.weights.graphs import GraphBase

INLINE = 1 << 20  # bytes up to which a weight that gets a copy of its own stands in the graph
ALIGNED = 4096  # where weights begin in a data file: onnxruntime maps pages
LIMIT = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Patch:
    """One folded weight and where its bytes go; `turned`: stored as the target's transpose."""

    target: Target
    tensor: str  # the initialiser that holds it in the output
    turned: bool
    file: str | None  # beside the graph, or None: in it
    offset: int
    nbytes: int
    part: str = ""  # of a weight that is codes: the base's initialiser that this takes the place of


class Piece(NamedTuple):
    """Bytes of a file that are copied: from where, to where, how many."""

    start: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that the output's files will be, known before the first byte is written."""

    patches: tuple[Patch, ...]
    edits: tuple[Edit, ...]  # of the graph's file, lengths included
    sizes: Mapping[str | None, int]  # of the files with weights, by location; None: the graph
    split: tuple[str, ...]  # parameters that got a tensor of their own

    def pieces(self, file: str | None, size: int) -> list[Piece]:
        """What is copied of a file of the base: all but what is edited or written anew."""
        edits = self.edits if file is None else ()
        holes = sorted((p.offset, p.offset + p.nbytes) for p in self.patches if p.file == file)
        found: list[Piece] = []
        at = 0
        for start, after in (*((e.start, e.end) for e in edits), (size, size)):
            if start > at:
                found += _around(at, moved(at, edits), start - at, holes)
            at = after
        return found


def _around(start: int, to: int, length: int, holes: Sequence[tuple[int, int]]) -> Iterable[Piece]:
    at, stop = to, to + length
    for low, high in holes:
        if high <= at or low >= stop:
            continue
        if low > at:
            yield Piece(start + at - to, at, low - at)
        at = max(at, high)
    if at < stop:
        yield Piece(start + at - to, at, stop - at)


class _New(NamedTuple):
    """A tensor that is written anew: for one parameter of several, or in another encoding."""

    target: Target
    name: str
    tensor: Tensor
    turned: bool
    part: str = ""

    @property
    def nbytes(self) -> int:
        content = self.tensor.content
        assert content is not None
        return content.nbytes


def laid_out(plan: Plan, texts: Mapping[str, str]) -> Layout:
    """Where every changed byte of the output goes; `texts` become texts of the model's own.

    Raises graph_changed for what the graph cannot take: a weight of another size, a new one, bytes
    that two tensors share.
    """
    base = plan.base.graph
    assert base is not None
    there = plan.base.tensors
    changed = [t for t in plan.targets.values() if t.terms or t.name not in there]
    patches: list[Patch] = []
    new: list[_New] = []
    edits: list[Edit] = []
    split: list[str] = []
    together = _together(base, changed)
    for target in changed:
        if together.get(target.name, target.name) != target.name:
            continue  # the same numbers in the same tensor as another target's
        stored, uses = _where(plan, base, target)
        if uses == []:
            continue
        uses = None if target.name in together else uses
        tensor = stored.tensor
        if (codes := base.found.quantised.get(tensor.name)) is not None:
            users = _users(base, stored, uses, together)
            for part in codes.form.parts:
                here = base.graph.tensors[part]
                others = _slots(base.graph, part, users)
                if others is None and here.patchable and here.content is not None:
                    place = (here.file, here.content.offset, here.content.nbytes, part)
                    patches.append(Patch(target, part, stored.turned, *place))
                    continue
                name = part if others is None else _free(base.graph, part, new)
                new.append(_New(target, name, here, stored.turned, part))
                edits += _renamed(base.graph, others or (), name)
                if others is not None and part == codes.name:
                    split.append(target.name)
            continue
        if uses is not None:
            name = _free(base.graph, target.name, new)
            new.append(_New(target, name, tensor, stored.turned))
            edits += _rewired(base.graph, uses, name)
            split.append(target.name)
        elif tensor.patchable:
            leaf = tensor.leaf
            assert leaf is not None
            patches.append(
                Patch(target, tensor.name, stored.turned, tensor.file, leaf.offset, leaf.nbytes)
            )
        else:
            new.append(_New(target, tensor.name, tensor, stored.turned))
    _require_own_bytes(base.graph, patches)
    return _with_new(base, patches, new, edits, split, texts)


def _where(plan: Plan, base: GraphBase, target: Target) -> tuple[Stored, list[Use] | None]:
    """How a target is stored, and the uses to be given a tensor of their own (None: all stay)."""
    name, leaf = target.name, target.base
    tie = plan.base.tied()
    if leaf is None or (leaf.shape != target.shape):
        what = "is no tensor of the graph"
        if leaf is not None:
            what = f"changes from {leaf.shape} to {target.shape}, and a graph keeps its shapes"
        raise error("graph_changed", f"{shown(name)} {what}; export the folded model instead")
    if leaf.dtype not in FLOATS:
        raise error("quantised_base", f"{shown(name)} is stored as {leaf.dtype}")
    if name not in base.found.stored:  # a head within the embedding's tensor
        assert tie is not None
        stored = base[tie[1]]
        uses = [u for u in stored.uses if u.in_out is not None]
        if not uses and target.terms:
            raise error("graph_changed", f"{shown(name)}: no product of the graph is this head")
        return stored, uses
    stored = base[name]
    if stored.alone:
        return stored, None
    if not stored.uses:
        raise error("graph_changed", f"{shown(name)}: which nodes use it the graph does not say")
    return stored, list(stored.uses)


def _users(
    base: GraphBase, stored: Stored, uses: Sequence[Use] | None, together: Mapping[str, str]
) -> set[int]:
    """The nodes that make numbers of a weight's codes, for this target or all that change alike."""
    alike = [base[n] for n in together if base[n].tensor.name == stored.tensor.name]
    some = uses if uses is not None else [u for s in (stored, *alike) for u in s.uses]
    return {use.first[0] for use in some}


def _slots(graph: Graph, part: str, users: set[int]) -> list[tuple[int, int]] | None:
    """Where these nodes take an initialiser that others take too; None where no others do."""
    slots = [
        (at, slot)
        for at, node in enumerate(graph.nodes)
        for slot, name in enumerate(node.inputs)
        if name == part
    ]
    if {at for at, _ in slots} <= users and part not in graph.outputs:
        return None
    return [place for place in slots if place[0] in users]


def _together(base: GraphBase, changed: Iterable[Target]) -> dict[str, str]:
    """Targets that change one tensor, used by nobody else, alike: each → the first of them."""
    by_tensor: dict[str, list[Target]] = {}
    for target in changed:
        stored = base.found.stored.get(target.name)
        if stored is not None and not stored.alone:
            by_tensor.setdefault(stored.tensor.name, []).append(target)
    found = {}
    for name, targets in by_tensor.items():
        users = [base[t.name] for t in targets]
        sums = {
            tuple((t.weight, id(t.delta), t.place.transposed) for t in target.terms)
            for target in targets
        }
        count = sum(len(s.uses) for s in users)
        alike = len(sums) == 1 and len({s.turned for s in users}) == 1
        if alike and count == base.found.uses.get(name):
            found.update(dict.fromkeys((t.name for t in targets), targets[0].name))
    return found


def _free(graph: Graph, wanted: str, new: Iterable[_New]) -> str:
    taken = set(graph.tensors) | set(graph.twice) | set(graph.sparse) | set(graph.inputs)
    taken |= {n for node in graph.nodes for n in (*node.inputs, *node.outputs)}
    taken |= {one.name for one in new}
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name


def _rewired(graph: Graph, uses: Iterable[Use], name: str) -> list[Edit]:
    """The inputs of the nodes that take a tensor directly, renamed."""
    return _renamed(graph, dict.fromkeys(use.first for use in uses), name)


def _renamed(graph: Graph, slots: Iterable[tuple[int, int]], name: str) -> list[Edit]:
    edits = []
    for at, slot in slots:
        node = graph.nodes[at]
        f: Field = node.input_fields[slot]
        edits.append(Edit(f.tag, f.end, as_bytes(1, name.encode()), node.within))
    return edits


def _require_own_bytes(graph: Graph, patches: Iterable[Patch]) -> None:
    """That no other tensor lies where a patched one does."""
    spans = sorted(
        (t.file or "", leaf.offset, leaf.offset + leaf.nbytes, t.name)
        for t in graph.tensors.values()
        if (leaf := t.content) is not None and t.patchable and leaf.nbytes
    )
    names = {p.tensor for p in patches}
    end, before, file = 0, "", ""
    for where, start, stop, name in spans:
        if where != file:
            end, before, file = 0, "", where
        if start < end and names & {name, before}:
            message = f"{shown(name)} and {shown(before)} lie in the same bytes of {shown(where)}"
            raise error("graph_changed", message)
        if stop > end:
            end, before = stop, name


def _with_new(
    base: GraphBase,
    patches: list[Patch],
    new: Sequence[_New],
    edits: list[Edit],
    split: Sequence[str],
    texts: Mapping[str, str],
) -> Layout:
    """The patches with those of new tensors, whose messages hold zeros until they are written."""
    graph = base.graph
    sizes: dict[str | None, int] = {file: s.size for file, s in graph.files.items()}
    late: list[tuple[_New, Edit, int]] = []  # inline: how far its bytes are into the edit
    for one in new:
        nbytes = one.nbytes
        file = one.tensor.file if nbytes > INLINE else None
        if file is not None:
            offset = -(-sizes[file] // ALIGNED) * ALIGNED
            sizes[file] = offset + nbytes
            patches.append(Patch(*one[:2], one.turned, file, offset, nbytes, one.part))
            said = (("location", file), ("offset", str(offset)), ("length", str(nbytes)))
            body = _tensor_head(one) + b"".join(
                as_bytes(13, as_bytes(1, k.encode()) + as_bytes(2, v.encode())) for k, v in said
            )
            body += as_number(14, 1)
        else:
            body = _tensor_head(one) + as_head(9, nbytes)
        data = b"" if file is not None else bytes(nbytes)
        if one.name == one.tensor.name:  # where it stood, in another encoding
            at = one.tensor.at
            edit = Edit(at.start, at.end, body + data, one.tensor.within)
        else:
            content = as_head(5, len(body) + len(data)) + body + data
            edit = Edit(graph.span.end, graph.span.end, content, (graph.span,))
        edits.append(edit)
        if file is None:
            late.append((one, edit, len(edit.content) - nbytes))
    edits += _texts(graph, {**texts, **_sidecar(base, new)})
    whole = with_lengths(edits)
    sizes[None] = graph.source.size + sum(len(e.content) - (e.end - e.start) for e in whole)
    if sizes[None] > LIMIT:
        raise error("graph_changed", f"the graph would have {sizes[None]} bytes, {LIMIT} at most")
    placed = [p if p.file is not None else _moved(p, moved(p.offset, whole)) for p in patches]
    for one, edit, inside in late:
        offset = _begin(edit, whole) + inside
        placed.append(Patch(*one[:2], one.turned, None, offset, one.nbytes, one.part))
    return Layout(tuple(placed), tuple(whole), sizes, tuple(split))


def _moved(patch: Patch, offset: int) -> Patch:
    return replace(patch, file=None, offset=offset)


def _begin(edit: Edit, edits: Sequence[Edit]) -> int:
    """Where the content of an edit begins in the output."""
    at = edit.start
    for one in edits:
        if one is edit:
            return at
        at += len(one.content) - (one.end - one.start)
    raise AssertionError(edit)


def _tensor_head(one: _New) -> bytes:
    """All of a tensor's message but its numbers (onnx/onnx:onnx/onnx.proto, TensorProto)."""
    dims = b"".join(as_number(1, n) for n in one.tensor.shape)
    return dims + as_number(2, one.tensor.data_type) + as_bytes(8, one.name.encode())


def _sidecar(base: GraphBase, new: Iterable[_New]) -> dict[str, str]:
    """Our own list of parameters, where the graph has it or content alone found some of them."""
    graph, found = base.graph, base.found
    codes = found.quantised
    added = {
        n.name: [n.target.name, n.turned]
        for n in new
        if n.name not in graph.tensors and (not n.part or n.part in codes)
    }
    known: dict[str, Any] = {}
    if SIDECAR in graph.metadata:
        known = json.loads(graph.metadata[SIDECAR])
    elif found.by_content:
        stored = sorted(found.stored.items())
        known = {s.tensor.name: [name, s.turned] for name, s in stored if s.alone}
    if not known or not (added or found.by_content):
        return {}
    return {SIDECAR: json.dumps({**known, **added}, separators=(",", ":"))}


def _texts(graph: Graph, texts: Mapping[str, str]) -> list[Edit]:
    """Texts of the model's own, in place of those with the same key."""
    edits = []
    for key, value in sorted(texts.items()):
        old = graph.metadata_fields.get(key)
        content = as_bytes(14, as_bytes(1, key.encode()) + as_bytes(2, value.encode()))
        where = Span(0, graph.source.size, graph.source.size)
        start, end = (where.start, where.end) if old is None else (old.tag, old.end)
        edits.append(Edit(start, end, content))
    return edits
