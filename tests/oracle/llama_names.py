"""An adapter's deltas under Hugging Face's names, by the rules of a family, for the tests."""

from collections.abc import Iterable

from loratools.adapter import Adapter, Kind
from loratools.algebra import shape
from loratools.names.heads import Facts, inverse, order_of, sizes_of
from loratools.names.rules import Names, Rule
from loratools.rewriting import permute, rows

FACTS = Facts(heads=4, kv_heads=2, head_dim=4, hidden=16, intermediate=24, layers=2)


def as_hf(adapter: Adapter, rules: Iterable[Rule], facts: Facts = FACTS) -> dict[str, Kind]:
    """Every delta of an adapter by the names of the parts that it covers."""
    names, found = Names(rules), {}
    for key, delta in adapter.deltas.items():
        module, _, parameter = key.rpartition(".")
        place = names.of_whole(module)
        assert place is not None, module
        out, into = shape(delta)[:2]
        sizes = sizes_of(place.rule, out, into, facts)
        order = order_of(place.rule, sizes, facts)
        if order is not None:
            delta = permute(delta, inverse(order))
        start = 0
        for name, size in zip(place.parts, sizes, strict=True):
            whole = len(sizes) == 1
            found[f"{name}.{parameter}"] = delta if whole else rows(delta, start, start + size)
            start += size
    return found
