"""An adapter under the names of another vocabulary: renamed, split, fused, its rows reordered.

Nothing is read for it: what the new deltas hold is computed when somebody opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratools import rewriting
from loratools.adapter import Adapter, Kind, Leaf, Renormed, Replace
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.names import gguf, heads, llama, orders
from loratools.names.architectures import BY_NAME, ORIGINAL, Alike, modules, several, stated
from loratools.names.heads import Facts, facts_from
from loratools.names.mangling import architecture, explaining, mangled, unmangled
from loratools.names.rules import Found, Names, Rule, asked

# Vocabularies of language models, each beside Hugging Face's; those of image models share another.
LANGUAGE: dict[str, Callable[[Facts], Sequence[Rule] | None]] = {
    "gguf": lambda facts: gguf.rules_for(facts.model_type),
    "torchtune": lambda facts: llama.torchtune(facts.model_type),
    "litgpt": lambda facts: llama.litgpt(facts.model_type),
    "megatron": lambda facts: llama.MEGATRON,
}
IMAGE = ("diffusers", "original", "kohya")
COMPONENTS = ("transformer", "unet", "prior", "text_encoder")  # what a PEFT adapter may be of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(slots=True)
class Translated:
    """An adapter in another vocabulary, and the keys for which that one has no name."""

    adapter: Adapter
    unknown: tuple[str, ...] = ()
    architecture: str | None = None


def translate(
    adapter: Adapter,
    to: str,
    *,
    facts: Facts | None = None,
    shapes: Shapes | None = None,
    alike: Callable[[Leaf, Leaf], bool] = rewriting.same_place,
) -> Translated:
    """The same adapter in the vocabulary `to`; fused and split weights by the table's rules.

    `facts` are those of the base (heads, ...), else what the adapter's own config says; `shapes`
    are a base's, by name, in the vocabulary `to`; `alike` tells whether parts to be fused have one
    A. What cannot be rewritten becomes a problem of
    the adapter. UsageError where no base has names of both vocabularies.
    """
    job = _Job(adapter, facts or facts_from(adapter.config), shapes or {}, alike)
    start = adapter.vocabulary
    for vocabulary in (start, to):
        if vocabulary not in (*LANGUAGE, *IMAGE, "hf"):
            raise error("usage", f"no vocabulary is called {shown(vocabulary)}")
    if start != to:
        if any(a in LANGUAGE and b in IMAGE for a, b in ((start, to), (to, start))):
            raise error(
                "loss",
                f"{shown(adapter.name)} has {start} names and {to} names are those of other "
                "models: no base has both",
            )
        if start in LANGUAGE:
            job.to_parts(job.table(start))
        if to in LANGUAGE:
            job.to_wholes(job.table(to))
        elif start in IMAGE or to in IMAGE:
            job.image(start, to)
    return job.done(to)


def regrouped(adapter: Adapter, names: Names, *, shapes: Shapes) -> Adapter:
    """The adapter with the parts that these rules know put together; all else stays as it is."""
    job = _Job(adapter, facts_from(adapter.config), shapes, rewriting.same_place)
    job.to_wholes(names, keep=True)
    return job.done(adapter.vocabulary).adapter


@dataclass(slots=True)
class _Job:
    """One translation under way: deltas by their names so far."""

    adapter: Adapter
    facts: Facts
    shapes: Shapes
    alike: Callable[[Leaf, Leaf], bool]
    deltas: dict[str, Kind] = field(init=False)
    transposed: set[str] = field(init=False)
    problems: list[Problem] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deltas = dict(self.adapter.deltas)
        self.transposed = set(self.adapter.transposed)

    def done(self, to: str) -> Translated:
        new = replace(
            self.adapter,
            deltas=self.deltas,
            vocabulary=to,
            transposed=frozenset(self.transposed),
            problems=(*self.adapter.problems, *self.problems),
        )
        found = self.architectures
        return Translated(new, tuple(self.unknown), found[0] if len(found) == 1 else None)

    def problem(self, cause: LoratoolsError, key: str) -> None:
        self.problems.append(
            Problem(cause.code, f"{shown(key)}: {cause.message}", "error", self.adapter.name, key)
        )

    def twice(self, name: str, key: str) -> None:
        what = f"another tensor is {shown(name)} too; are there two adapters in one file?"
        self.problem(error("duplicate", what), key)

    def table(self, vocabulary: str) -> Names:
        rules = LANGUAGE[vocabulary](self.facts)
        if rules is None:
            said = shown(self.facts.model_type or "nothing")
            raise error(
                "needs_base",
                f"{shown(self.adapter.name)}: the names of {vocabulary} depend on the "
                f"architecture, and what is known of it is {said}; {self.way}",
            )
        return Names(rules)

    @property
    def way(self) -> str:
        """The command that brings in what only the base can tell; `merge --base` would fold."""
        return f"give the base: loratools convert {shown(self.adapter.name)} --base BASE -o OUT"

    # --------------------------------------------------------------------------- image models

    def image(self, start: str, to: str) -> None:
        """Between the vocabularies of image models, and Hugging Face's (one bare component)."""
        if start == "hf":
            self.put_in_front()
        elif start == "kohya":
            self.unmangle()
        if not self.architectures:
            self.architectures = self.explained(_modules(self.deltas))
        if to == "kohya":
            self.mangle()
        elif self.architectures:
            self.toward(to)
        if to == "hf":
            self.take_away()

    def explained(self, names: Sequence[str]) -> list[str]:
        """The architectures that these modules may be of: one, or some that nothing tells apart."""
        there = architecture(_modules(self.shapes)) if self.shapes else None
        widths = {
            key.rpartition(".")[0]: n
            for key, delta in self.deltas.items()
            if (n := rewriting.columns(delta)) is not None
        }
        return explaining(names, widths, said=there or stated(self.adapter.metadata))

    def toward(self, to: str) -> None:
        """To diffusers' names (Hugging Face's are these), or to the original ones."""
        names = Alike(self.architectures)
        if to == "original":
            self.to_wholes(names, keep=True)
        else:
            self.to_parts(names, keep=True)

    def unmangle(self) -> None:
        names = _modules(self.deltas)
        said = architecture(_modules(self.shapes)) if self.shapes else None
        said = said or stated(self.adapter.metadata)
        result = unmangled(names, _modules(self.shapes), architecture=said)
        self.architectures = [result.architecture] if result.architecture else []
        self.problems += (replace(p, adapter=self.adapter.name) for p in result.problems)
        self.rename({name: address for name, (_, address) in result.found.items()})

    def mangle(self) -> None:
        if not self.architectures:
            raise error(
                "loss",
                f"{shown(self.adapter.name)}: no known image model explains "
                f"{shown(next(iter(self.deltas), 'nothing'))}, so kohya's name for it is not known",
            )
        self.toward(BY_NAME[self.architectures[0]].kohya)
        new = {}
        for name in _modules(self.deltas):
            try:
                forms = {mangled(name, known) for known in self.architectures}
                if len(forms) > 1:
                    raise several(name, self.architectures)
                new[name] = forms.pop()
            except LoratoolsError as cause:
                self.problem(cause, name)
        self.rename(new)

    def put_in_front(self) -> None:
        """PEFT names modules of one component: find which, by whose architecture has them."""
        names = _modules(self.deltas)
        for component in (*COMPONENTS, ORIGINAL):
            front = [f"{component}.{name}" for name in names]
            found = self.explained(front)
            if found and _all_known(front, found[0]):
                self.rename(dict(zip(names, front, strict=True)))
                self.architectures = found
                return
        raise error(
            "loss",
            f"{shown(self.adapter.name)}: the names of diffusers and of kohya are known for image "
            f"models only, and {shown(names[0] if names else 'nothing')} is no module of one",
        )

    def take_away(self) -> None:
        """One component's modules without its name; several have no place in one PEFT adapter."""
        names = _modules(self.deltas)
        fronts = sorted({name.partition(".")[0] for name in names})
        if len(fronts) > 1:
            raise error(
                "loss",
                f"{shown(self.adapter.name)} changes {', '.join(fronts)}, and only one component "
                "of a pipeline has a place there; choose it with --only or --skip",
            )
        self.rename({name: name.partition(".")[2] for name in names})

    def rename(self, modules: Mapping[str, str]) -> None:
        """Other names for modules; those that have none are left out (a problem says why)."""
        new: dict[str, Kind] = {}
        turned = set()
        for key, delta in self.deltas.items():
            module, _, parameter = key.rpartition(".")
            if module in modules:
                to = f"{modules[module]}.{parameter}"
                if to in new:
                    self.twice(to, key)
                    continue
                new[to] = delta
                if key in self.transposed:
                    turned.add(to)
        self.deltas, self.transposed = new, turned

    # --------------------------------------------------------------------------- by rules

    def to_parts(self, names: Names | Alike, *, keep: bool = False) -> None:
        """Every whole cut into its parts; with `keep` what is no whole stays as it is."""
        old, new, turned = self.deltas, dict[str, Kind](), set[str]()
        for key, delta in old.items():
            try:
                hit = asked(names.of_whole, key)
            except LoratoolsError as cause:
                self.problem(cause, key)
                continue
            if hit is None:
                if key in new:
                    self.twice(key, key)
                elif keep:
                    new[key] = delta
                    turned |= {key} & self.transposed
                else:
                    self.unknown.append(key)
                    new[key] = delta
                continue
            found, parameter = hit
            try:
                pieces = self.split(found, key, delta)
            except LoratoolsError as cause:
                self.problem(cause, key)
                continue
            for part, piece in zip(found.parts, pieces, strict=True):
                if part + parameter in new:
                    self.twice(part + parameter, key)
                    continue
                new[part + parameter] = piece
                if key in self.transposed:
                    turned.add(part + parameter)
        self.deltas, self.transposed = new, turned

    def split(self, found: Found, key: str, delta: Kind) -> list[Kind]:
        """A whole's delta as those of its parts."""
        rule, extents = found.rule, rewriting.shape(delta)
        if rule.order == orders.TURNED:
            return [rewriting.transpose(delta)]
        if len(found.parts) == 1 and not rule.order:
            return [delta]
        if extents is None:
            raise error("loss", "single rows of a fused weight have no place in its parts")
        sizes = heads.sizes_of(rule, extents[0], self.columns(key, delta), self.facts)
        order = heads.order_of(rule, sizes, self.facts, self.columns(key, delta))
        if order is not None:
            delta = rewriting.permute(delta, heads.inverse(order))
        if len(sizes) == 1:
            return [delta]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [rewriting.rows(delta, e - n, e) for e, n in zip(ends, sizes, strict=True)]

    def to_wholes(self, names: Names | Alike, *, keep: bool = False) -> None:
        """All parts put together to their wholes; with `keep` what is no part stays as it is."""
        new: dict[str, Kind] = {}
        turned: set[str] = set()
        parts: dict[str, tuple[Found, dict[int, tuple[str, Kind]]]] = {}
        for key, delta in self.deltas.items():
            try:
                hit = asked(names.of_part, key)
            except LoratoolsError as cause:
                self.problem(cause, key)
                continue
            if hit is None:
                if key in new:
                    self.twice(key, key)
                    continue
                new[key] = delta
                turned |= {key} & self.transposed
                if not keep:
                    self.unknown.append(key)
                continue
            found, parameter = hit
            whole = found.whole + parameter
            if (whole in new and whole not in parts) or found.part in parts.get(whole, (0, {}))[1]:
                self.twice(whole, key)
                continue
            parts.setdefault(whole, (found, {}))[1][found.part] = (key, delta)
            new[whole] = delta  # its place in the order; what stands there comes below
        for whole, (found, have) in parts.items():
            first = next(iter(have.values()))[0]
            try:
                new[whole] = self.fuse(found, have)
            except LoratoolsError as cause:
                self.problem(cause, first)
                del new[whole]
                continue
            if first in self.transposed:
                turned.add(whole)
        self.deltas, self.transposed = new, turned

    def fuse(self, found: Found, have: Mapping[int, tuple[str, Kind]]) -> Kind:
        """The delta of a whole from those of its parts; parts that are not there change nothing."""
        rule, count = found.rule, len(found.parts)
        key, one = next(iter(have.values()))
        if rule.order == orders.TURNED:
            return rewriting.transpose(one)
        if count == 1 and not rule.order:
            return one
        extents = [rewriting.shape(delta) for _, delta in have.values()]
        if any(e is None for e in extents):
            raise error("loss", "single rows of a part have no place in the fused weight")
        known = {i: rewriting.shape(delta) for i, (_, delta) in have.items()}
        sizes = self.part_sizes(found, {i: s[0] for i, s in known.items() if s}, key, one)
        if len(have) == count:
            joined = one
            if count > 1:
                joined = rewriting.stack([have[i][1] for i in range(count)], self.alike)
        else:
            alone = [d for _, d in have.values() if isinstance(d, Renormed | Replace)]
            if alone:
                lost = ", ".join(p for i, p in enumerate(found.parts) if i not in have)
                raise error(
                    "loss",
                    f"{shown(found.whole)} also holds {shown(lost)}, which the adapter leaves as "
                    f"it is; a {type(alone[0]).__name__} has no part of a weight's rows",
                )
            joined = rewriting.added(
                [rewriting.spread(d, sum(sizes[:i]), sum(sizes)) for i, (_, d) in have.items()]
            )
        order = heads.order_of(rule, sizes, self.facts, self.columns(key, one))
        return joined if order is None else rewriting.permute(joined, order)

    def part_sizes(
        self, found: Found, known: Mapping[int, int], key: str, delta: Kind
    ) -> tuple[int, ...]:
        """The rows of every part, those included that the adapter does not change."""
        count = len(found.parts)
        if len(known) == count:
            return tuple(known[i] for i in range(count))
        parameter = key.rpartition(".")[2]
        base = self.shapes.get(f"{found.whole}.{parameter}")
        columns = self.columns(key, delta)
        if base is not None:
            return heads.sizes_of(found.rule, base[0], columns, self.facts)
        for rows in self.candidates(found, known, columns):
            try:
                sizes = heads.sizes_of(found.rule, rows, columns, self.facts)
            except LoratoolsError:
                continue
            if all(sizes[i] == n for i, n in known.items()):
                return sizes
        lost = ", ".join(p for i, p in enumerate(found.parts) if i not in known)
        what = f"{shown(found.whole)} also holds {shown(lost)}, whose size the adapter does not say"
        raise error("needs_base", f"{what}; {self.way}")

    def candidates(self, found: Found, known: Mapping[int, int], columns: int) -> Iterable[int]:
        """Rows that a whole may have, by what is known of its parts."""
        count, some = len(found.parts), next(iter(known.values()))
        yield some * count
        facts = self.facts
        if facts.heads and facts.kv_heads and facts.head_dim:
            yield (facts.heads + 2 * facts.kv_heads) * facts.head_dim
        if count - 1 in known:
            yield columns * (count - 1) + known[count - 1]

    def columns(self, key: str, delta: Kind) -> int:
        """The columns of the weight that a delta belongs to; of a bias, its module's weight's."""
        found = rewriting.columns(delta)
        if found is not None:
            return found
        weight = self.deltas.get(f"{key.rpartition('.')[0]}.weight")
        return (rewriting.columns(weight) if weight is not None else None) or 0


def _modules(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))


def _all_known(names: Sequence[str], name: str) -> bool:
    table = modules(name)
    return all(table.of_part(n) or table.of_whole(n) for n in names)
