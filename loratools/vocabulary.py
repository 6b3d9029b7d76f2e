"""Embeddings, heads and their rows: tied tensors, grown vocabularies, the output's shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.adapter import Kind, Leaf, LowRank, Replace
from loratools.errors import Problem, shown
from loratools.plan import Target, Term, Ties, stored_shape
from loratools.weights.base import EMBEDDINGS, HEADS, Base


def last(target: str) -> str:
    return target.split(".")[-2] if "." in target else target


def is_head(target: str) -> bool:
    return target.rpartition(".")[0] in HEADS


def output_shape(
    name: str, leaf: Leaf | None, terms: Sequence[Term], problems: list[Problem]
) -> tuple[int, ...]:
    """The stored shape in the output: the base's, or that of what replaces it."""
    whole = [t for t in terms if isinstance(t.delta, Replace) and t.delta.rows is None]
    shapes = {stored_shape(t.delta, False) for t in whole}
    if leaf is None and len(shapes) > 1:
        listed = " and ".join(str(s) for s in sorted(shapes))
        problems.append(
            Problem(
                "head_conflict", f"{shown(name)} is {listed} in different adapters", target=name
            )
        )
    if leaf is None:
        return min(shapes)
    if not whole:
        rows = [max(t.delta.rows) for t in terms if isinstance(t.delta, Replace) and t.delta.rows]
        if rows and max(rows) >= leaf.shape[0]:
            message = f"{shown(name)}: token {max(rows)} is trained, the base has {leaf.shape[0]}"
            problems.append(Problem("vocabulary", message, target=name))
        return leaf.shape
    shape = max(shapes)
    if len(shapes) > 1:
        listed = " and ".join(str(s) for s in sorted(shapes))
        message = f"{shown(name)} is {listed} in different adapters"
        problems.append(Problem("vocabulary", message, target=name))
    elif shape[0] < leaf.shape[0] and (len(terms) > 1 or terms[0].weight != 1):
        problems.append(
            Problem(
                "vocabulary",
                f"{shown(name)}: {shape[0]} rows replace {leaf.shape[0]}, which only one adapter "
                "of weight 1 can do",
                target=name,
            )
        )
    return shape


def settle_ties(
    base: Base, merged: dict[str, list[Term]], ties: Ties | None, problems: list[Problem]
) -> bool:
    """Embedding and head in one tensor: move the head's deltas, write both, or say what to ask."""
    tie = base.tied()
    if tie is None or not (tie[0] in merged or tie[1] in merged):
        return False
    head, embedding = tie
    by_head, by_embedding = merged.get(head, []), merged.get(embedding, [])
    if not by_head and all(isinstance(t.delta, Replace) and t.delta.rows for t in by_embedding):
        return False  # trained token rows: PEFT trains and serves them for both
    if ties == "untied":
        return True
    if ties is None and not _agree(by_head, by_embedding):
        touched = " and ".join(n for n in (head, embedding) if n in merged)
        problems.append(
            Problem(
                "tied",
                f"{shown(head)} and {shown(embedding)} are one tensor in the base, and the "
                f"adapters change {shown(touched)}",
                target=touched,
            )
        )
    if by_head and _agree(by_head, by_embedding):
        merged.pop(head)
    elif by_head:
        moved = [replace(t, place=replace(t.place, target=embedding)) for t in merged.pop(head)]
        merged[embedding] = [*by_embedding, *moved]
    if head in base.tensors and embedding in merged:
        merged[head] = [replace(t, place=replace(t.place, target=head)) for t in merged[embedding]]
    return False


def _agree(by_head: Sequence[Term], by_embedding: Sequence[Term]) -> bool:
    """Whether both sides are changed by the same numbers."""
    return len(by_head) == len(by_embedding) > 0 and all(
        h.weight == e.weight and _same(h.delta, e.delta)
        for h, e in zip(by_head, by_embedding, strict=True)
    )


def _same(head: Kind | None, embedding: Kind | None) -> bool:
    match head, embedding:
        case Replace(), Replace():
            alike = head.rows == embedding.rows and _equal(head.value, embedding.value)
            return alike and _same(head.then, embedding.then)
        case LowRank(a=a, b=b), LowRank(a=embedding_a, b=embedding_b):
            # An embedding's module is (dim, tokens), a head's (tokens, dim).
            turned = _equal(b, embedding_a, turned=True) and _equal(a, embedding_b, turned=True)
            return turned and head.scaling == embedding.scaling
        case None, None:
            return True
        case _:
            return False


def _equal(x: Leaf, y: Leaf, *, turned: bool = False) -> bool:
    shape = y.shape[::-1] if turned else y.shape
    if x.dtype != y.dtype or x.shape != shape:
        return False
    return x.read() == (_turned(y) if turned else y.read())


def _turned(leaf: Leaf) -> bytes:
    """The bytes of the transposed matrix; this room has no torch."""
    raw, (rows, columns) = leaf.read(), leaf.shape
    size = len(raw) // (rows * columns)
    at = (r * columns + c for c in range(columns) for r in range(rows))
    return b"".join(raw[i * size : (i + 1) * size] for i in at)


def one_vocabulary(targets: Mapping[str, Target], base: Base, problems: list[Problem]) -> None:
    """A resized embedding needs its head resized alike, where the head is a tensor of its own."""
    rows = {
        n: t.shape[0]
        for n, t in targets.items()
        if t.base is not None and t.shape[:1] != t.base.shape[:1]
    }
    vocabulary = {n for n in base.tensors if last(n) in EMBEDDINGS or is_head(n)}
    heads = {n for n in vocabulary if is_head(n) or last(n) in EMBEDDINGS}
    for name, count in rows.items():
        others = {
            n: (targets[n].shape[0] if n in targets else base.tensors[n].shape[0])
            for n in heads
            if n.endswith(".weight") and base.tensors[n].shape[0] == base.tensors.get(
                name, base.tensors[n]).shape[0]
        }  # fmt: skip
        unlike = {n: c for n, c in others.items() if c != count}
        if unlike:
            other, size = next(iter(unlike.items()))
            message = f"{shown(name)} would have {count} rows and {shown(other)} {size}"
            problems.append(Problem("vocabulary", message, target=name))
            return
        problems.append(
            Problem(
                "vocabulary",
                f"{shown(name)} changes to {count} rows; config.json follows",
                "note",
                target=name,
            )
        )
