"""Maps of names carried out on numbered rows, to be compared with where a converter puts them."""

import torch

from loratools.names.orders import ORDERS, SIZES, TURNED
from loratools.names.rules import Names, asked, filled, pattern


def on_meta(make):
    """A real model of any size, without its numbers."""
    with torch.device("meta"):
        return make()


def numbered(model):
    """A state dict in which every row has a number of its own, and the columns that it has."""
    state, columns, at = {}, {}, 0
    for key, tensor in model.state_dict().items():
        rows = tensor.shape[0]
        shape = (rows, 1) if tensor.ndim > 1 else (rows,)
        state[key] = torch.arange(at, at + rows).reshape(shape)
        module = key.rpartition(".")[0]
        columns[module] = tensor.shape[1] if tensor.ndim > 1 else columns.get(module, 0)
        at += rows
    return state, columns


def merged(rules, state, columns, component):
    """A diffusers state dict in the other vocabulary; every key must be explained."""
    names = Names(rules)
    parts, rule_of, widths = {}, {}, {}
    for key, tensor in state.items():
        hit = asked(names.of_part, f"{component}.{key}")
        assert hit is not None, f"{component}.{key}"
        found, rest = hit
        whole = found.whole + rest
        width = columns[key.rpartition(".")[0]]
        if found.rule.order and found.rule.order != TURNED:
            tensor = tensor[ORDERS[found.rule.order](len(tensor), columns=width)]
        there = parts.setdefault(whole, {})
        assert found.part not in there, f"{whole} has two {found.part}. parts"
        there[found.part] = tensor
        rule_of[whole], widths[whole] = found.rule, width
    for whole, there in parts.items():
        assert sorted(there) == list(range(len(rule_of[whole].parts))), whole
    return {w: torch.cat([t[i] for i in sorted(t)]) for w, t in parts.items()}, widths


def divided(rules, state, widths):
    """The way back, from wholes and their columns alone."""
    names, parts = Names(rules), {}
    for key, tensor in state.items():
        hit = asked(names.of_whole, key)
        assert hit is not None, key
        found, rest = hit
        count, width = len(found.parts), widths[key]
        rows = [len(tensor)] if count == 1 else SIZES[found.rule.sizes](len(tensor), width, count)
        for part, piece in zip(found.parts, tensor.split(rows), strict=True):
            if found.rule.order and found.rule.order != TURNED:
                piece = piece[ORDERS[found.rule.order](len(piece), columns=width)]
            parts[part + rest] = piece
    return parts


def agree(rules, model, convert, component="transformer", flat=()):
    """Whether diffusers' converter makes of our original names the state dict that it was."""
    state, columns = numbered(model)
    original, widths = merged(rules, state, columns, component)
    back = divided(rules, original, widths)
    assert back.keys() == {f"{component}.{key}" for key in state}
    assert all(torch.equal(back[f"{component}.{key}"], value) for key, value in state.items())
    converted = convert({key.removeprefix("diffusion_model."): t for key, t in original.items()})
    assert converted.keys() == state.keys()
    for key, value in state.items():
        if key not in flat:
            assert torch.equal(converted[key], value), key
    return original


def one_to_one(rules):
    """No two rules have a name in common, on either side, whatever the numbers are."""
    for side in (lambda r: r.parts, lambda r: (r.whole,)):
        names = [name for rule in rules for name in side(rule)]
        assert len(set(names)) == len(names)
        first = {filled(name, dict.fromkeys("nmk", "7")): name for name in names}
        literal = [name for name in names if "{" not in name]
        open_ones = [pattern(name) for name in names if "{" in name]
        assert len(first) == len(names)
        assert not [name for name in literal if any(each.fullmatch(name) for each in open_ones)]


def modules(model):
    """The names of modules that have parameters of their own."""
    return [name for name, each in model.named_modules() if name and each._parameters]
