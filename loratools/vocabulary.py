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


def trained_rows(delta: Kind | None) -> tuple[int, ...]:
    """The rows that a delta replaces one by one, upon other replacements too."""
    return (delta.rows or ()) + trained_rows(delta.then) if isinstance(delta, Replace) else ()


def output_shape(
    name: str, leaf: Leaf | None, terms: Sequence[Term], problems: list[Problem]
) -> tuple[int, ...]:
    """The stored shape in the output: the base's, or that of what replaces it."""
    whole = [t for t in terms if isinstance(t.delta, Replace) and t.delta.rows is None]
    shapes = {stored_shape(t.delta, False) for t in whole}
    shape = max(shapes) if whole else leaf.shape if leaf is not None else ()
    tokens = [max(rows) for t in terms if (rows := trained_rows(t.delta))]
    if tokens and max(tokens) >= shape[0]:
        message = f"{shown(name)}: token {max(tokens)} is trained, there are {shape[0]} rows"
        problems.append(Problem("vocabulary", message, target=name))
    if len(shapes) > 1:
        listed = " and ".join(str(s) for s in sorted(shapes))
        message = f"{shown(name)} is {listed} in different adapters"
        alike = len({s[1:] for s in shapes if s}) == 1 and all(shapes)
        code = ("head_conflict" if leaf is None else "vocabulary") if alike else "shape_mismatch"
        problems.append(Problem(code, message, target=name))
    elif leaf and shape[:1] < leaf.shape[:1] and (len(terms) > 1 or terms[0].weight != 1):
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
    if ties == "untied":
        return True
    # Trained token rows PEFT trains and serves for both.
    tokens = all(isinstance(d := t.delta, Replace) and d.rows and not d.then for t in by_embedding)
    if ties is None and (by_head or not tokens) and not _agree(by_head, by_embedding):
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
    stored = {**base.tensors, **{n: t.base for n, t in targets.items() if t.base is not None}}
    rows = {n: (targets[n].shape if n in targets else leaf.shape)[:1] for n, leaf in stored.items()}
    vocabulary = [n for n in stored if last(n) in EMBEDDINGS or is_head(n)]
    for name in targets:
        if name not in stored or rows[name] == stored[name].shape[:1]:
            continue
        count = rows[name][0]
        alike = [n for n in vocabulary if stored[n].shape[:1] == stored[name].shape[:1]]
        unlike = next((n for n in alike if rows[n] != rows[name]), None)
        if unlike is not None:
            size = rows[unlike][0]
            message = f"{shown(name)} would have {count} rows and {shown(unlike)} {size}"
            problems.append(Problem("vocabulary", message, target=name))
            return
        message = f"{shown(name)} changes to {count} rows; config.json follows"
        problems.append(Problem("vocabulary", message, "note", target=name))
