"""Which parameter each stored tensor of a graph is: by our own list, its name, its nodes' places.

A parameter is found by how nodes use it: each use has a role (weight, bias) by operator and input,
and a module's path by what the exporter wrote on the node (specs/onnx.md).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratools.adapter import FLOATS
from loratools.containers.onnx_graph import Graph, Node
from loratools.containers.onnx_tensors import Tensor
from loratools.containers.strict_json import loads
from loratools.errors import error, shown
from loratools.weights.quantised import HOLDERS, Quantised, at_run_time, plain_name, quantised

SIDECAR = "loratools.weights"  # of the model's own texts: initialiser → [parameter, turned]
LIMIT = 1 << 26

# How a tensor came to its name, the surest first.
HOW = ("our list", "its name", "its node's module", "the bias behind it")

# Inputs of an operator that are parameters; of products the first column's orientation follows.
_ROLES: dict[str, dict[int, str]] = {
    "MatMul": {1: "weight"},
    "FusedMatMul": {1: "weight"},
    "MatMulNBits": {1: "weight", 5: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "FusedGemm": {1: "weight", 2: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "FusedConv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "SkipLayerNormalization": {2: "weight", 3: "bias"},
    "SimplifiedLayerNormalization": {1: "weight"},
    "SkipSimplifiedLayerNormalization": {2: "weight"},
    "RMSNormalization": {1: "weight"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "InstanceNormalization": {1: "weight", 2: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    "Add": {0: "bias", 1: "bias"},
    "Mul": {0: "weight", 1: "weight"},
    "PRelu": {1: "weight"},
}  # fmt: skip
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits")
_VECTORS = ("Add", "Mul")
_QUANTISED = ("DequantizeLinear", "QuantizeLinear")
_THROUGH = ("Identity", "Transpose", "Cast", "QuantizeLinear", "DequantizeLinear")
_ROUNDED = ""  # stands among the aliases of what a QuantizeLinear rounds

_PARAMETER = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*\.[A-Za-z_]\w*", re.ASCII)
_QUOTED = re.compile(r"'([^']{0,1000})'")
# Modules that stand around the real one, where an exporter was given a wrapper.
_WRAPPERS = frozenset("m module wrapped wrapper inner _orig_mod".split())
_ROOTS = frozenset(
    """model transformer bert roberta distilbert deberta electra albert camembert xlm_roberta
    gpt_neox backbone base_model lm_head classifier score cls vit encoder decoder""".split()
)


@dataclass(frozen=True, slots=True)
class Use:
    """One node's use of a stored tensor; `first` is the node and input that take it directly."""

    tensor: str
    first: tuple[int, int]
    node: int
    role: str | None
    path: str | None
    in_out: bool | None  # whether the product takes the tensor as (in, out)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter as a graph stores it: transposed where `turned`, for some or all of its users."""

    tensor: Tensor
    turned: bool
    in_out: bool | None  # whether products take the parameter itself as (in, out)
    uses: tuple[Use, ...]
    alone: bool  # no other parameter is in the same tensor
    how: str


@dataclass(slots=True)
class Found:
    """All parameters of a graph, and those that several tensors could be."""

    stored: dict[str, Stored] = field(default_factory=dict)
    ambiguous: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)  # whose content is not the reference's
    by_content: set[str] = field(default_factory=set)  # which names alone did not find
    paths: frozenset[str] = frozenset()  # modules that nodes come from
    listed: bool = False  # by our own list
    uses: Mapping[str, int] = field(default_factory=dict)  # how many each tensor has
    fused: bool = False  # operators of onnxruntime's own, or quantised ones
    gone: tuple[str, ...] = ()  # tensors of our list that are no longer there
    quantised: Mapping[str, Quantised] = field(default_factory=dict)  # by the tensor of codes
    running: str | None = None  # an operator that takes codes as they are


def parameters(graph: Graph, *, conv1d: frozenset[str]) -> Found:
    """The parameters of a graph by name; `conv1d` are layers whose weights torch has (in, out).

    Raises malformed for a list of ours that does not fit the graph.
    """
    codes, odd = quantised(graph)
    tensors, aside = _as_weights(graph, codes, odd)
    uses = list(_uses(graph, tensors))
    by_tensor: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        by_tensor[use.tensor].append(use)
    listed = _listed(graph)
    biases = _behind(graph, by_tensor)
    claims: dict[str, list[tuple[int, str, tuple[Use, ...]]]] = defaultdict(list)
    for name in (n for n in tensors if n not in aside):
        plain = plain_name(name) if name in codes or name in odd else name
        for rank, parameter, group in _named(name, plain, by_tensor[name], listed, biases):
            claims[parameter].append((rank, name, group))
    front = _wrapper([p for p, c in claims.items() if c[0][0]], _paths(graph))
    found = Found(
        paths=frozenset(_bare(p, front) for p in _paths(graph)),
        listed=bool(listed),
        uses={name: len(some) for name, some in by_tensor.items()},
        fused=any(_is_fused(n, codes) for n in graph.nodes),
        gone=tuple(name for name in listed if name not in graph.tensors),
        quantised=codes,
        running=at_run_time(n.op_type for n in graph.nodes),
    )
    for claimed, each in claims.items():
        best = min(rank for rank, _, _ in each)
        chosen = [c for c in each if c[0] == best]
        parameter = claimed if best == 0 else _bare(claimed, front)
        holding = {name for _, name, _ in chosen}
        if len(holding) > 1:
            listing = " and ".join(shown(n) for n in sorted(holding)[:3])
            found.ambiguous[parameter] = f"{listing} could each be it"
            continue
        rank, name, _ = chosen[0]
        group = tuple(use for _, _, some in chosen for use in some)
        turned = listed[name][1] if rank == 0 else None
        said = _stored(graph, tensors[name], parameter, group, turned, conv1d, rank)
        found.stored[parameter] = said
        if name in odd:
            found.ambiguous[parameter] = odd[name]
        elif any(_ROUNDED in u.aliases for u in group):
            found.ambiguous[parameter] = "a QuantizeLinear rounds it, whose scale is the old one's"
    _share(found, by_tensor)
    return found


def _as_weights(
    graph: Graph, codes: Mapping[str, Quantised], odd: Mapping[str, str]
) -> tuple[dict[str, Tensor], set[str]]:
    """The graph's tensors, those with codes as the weights that they are; and scales, set aside."""
    tensors = dict(graph.tensors)
    for name, one in codes.items():
        leaf = one.leaf(name)
        tensors[name] = replace(tensors[name], shape=leaf.shape, leaf=leaf, patchable=False)
    for name in odd:
        tensors[name] = replace(tensors[name], leaf=None)
    aside = {name for one in codes.values() for name in one.form.parts} - codes.keys()
    return tensors, aside


def _is_fused(node: Node, codes: Mapping[str, Quantised]) -> bool:
    slot = HOLDERS.get(node.op_type)
    if slot is not None and len(node.inputs) > slot and node.inputs[slot] in codes:
        return False
    return node.domain not in ("", "ai.onnx") or node.op_type in _QUANTISED


# ------------------------------------------------------------------------------- uses


def _uses(graph: Graph, tensors: Mapping[str, Tensor]) -> Iterator[Use]:
    """Every use of a stored tensor, through nodes that only turn, copy, cast or dequantise it."""
    seen: dict[str, tuple[str, tuple[int, int] | None, bool, tuple[str, ...]]] = {
        name: (name, None, False, ()) for name in tensors
    }
    for at, node in enumerate(graph.nodes):
        for slot, value in enumerate(node.inputs):
            if value not in seen:
                continue
            tensor, first, turned, aliases = seen[value]
            start = first or (at, slot)
            shape = tensors[tensor].shape
            if node.op_type in _THROUGH and slot == 0 and _follows(node, shape):
                flips = turned != (node.op_type == "Transpose")
                named = (node.outputs[0],) if node.op_type not in _QUANTISED else ()
                named = (_ROUNDED,) if node.op_type == "QuantizeLinear" else named
                seen[node.outputs[0]] = (tensor, start, flips, (*aliases, *named))
                continue
            role = _role(node, slot, shape)
            in_out = _in_out(node, slot, shape, turned) if role == "weight" else None
            yield Use(tensor, start, at, role, _path(node), in_out, aliases)


def _follows(node: Node, shape: Sequence[int]) -> bool:
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return False
    if node.op_type != "Transpose":
        return True
    return len(shape) == 2 and node.attributes.get("perm", (1, 0)) == (1, 0)


def _role(node: Node, slot: int, shape: Sequence[int]) -> str | None:
    role = _ROLES.get(node.op_type, {}).get(slot)
    if node.op_type in _VECTORS and (len(shape) != 1 or shape[0] < 2):
        return None
    whole = len(shape) == 2 or node.op_type == "MatMulNBits"
    if node.op_type in (*_PRODUCTS, "Gather") and role == "weight" and not whole:
        return None
    return role


def _in_out(node: Node, slot: int, shape: Sequence[int], turned: bool) -> bool | None:
    if node.op_type not in _PRODUCTS or len(shape) != 2:
        return None
    return (node.attributes.get("transB", 0) == 1) == turned


def _path(node: Node) -> str | None:
    """The module that a node comes from, as torch's exporters say it."""
    if node.scopes:
        parts = _QUOTED.findall(node.scopes)
        return parts[-2] if len(parts) > 1 else None
    if node.name.startswith("/"):
        return ".".join(node.name.split("/")[1:-1])
    return None


def _paths(graph: Graph) -> set[str]:
    return {p for node in graph.nodes if (p := _path(node))}


def _behind(graph: Graph, by_tensor: Mapping[str, Sequence[Use]]) -> dict[int, str]:
    """Of a product followed by the sum with a named bias: the product's node → the module."""
    makers = {name: at for at, node in enumerate(graph.nodes) for name in node.outputs}
    found = {}
    for name, uses in by_tensor.items():
        if len(uses) != 1 or not name.endswith(".bias") or not _PARAMETER.fullmatch(name):
            continue
        node = graph.nodes[uses[0].node]
        others = [makers[i] for i in node.inputs if i in makers]
        if node.op_type == "Add" and len(others) == 1:
            found[others[0]] = name.removesuffix(".bias")
    return found


# ------------------------------------------------------------------------------- names


def _listed(graph: Graph) -> dict[str, tuple[str, bool]]:
    """Our own list, where the graph carries it and still has every tensor of it."""
    text = graph.metadata.get(SIDECAR)
    if text is None:
        return {}
    what = f"{graph.source.name}: {SIDECAR}"
    table = loads(text.encode(), what, limit=LIMIT)
    good = isinstance(table, dict) and all(
        isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) and isinstance(v[1], bool)
        for v in table.values()
    )
    if not good:
        raise error("malformed", f"{shown(what)} is no list of parameters")
    assert isinstance(table, dict)
    return {name: (v[0], v[1]) for name, v in table.items()}


def _named(
    name: str,
    plain: str,
    uses: Sequence[Use],
    listed: Mapping[str, tuple[str, bool]],
    biases: Mapping[int, str],
) -> Iterator[tuple[int, str, tuple[Use, ...]]]:
    """The parameters that one tensor is: (how sure, name, the uses that are this parameter).

    `plain` is its name without what a quantiser put behind it.
    """
    if name in listed:
        parameter = listed[name][0]
        mine = tuple(u for u in uses if _agrees(parameter, u)) or tuple(uses)
        yield 0, parameter, mine
        rest = [u for u in uses if u not in mine]
    elif _PARAMETER.fullmatch(plain):
        mine = tuple(u for u in uses if _agrees(plain, u))
        if mine or not uses:
            yield 1, plain, mine
        rest = [u for u in uses if u not in mine]
    else:
        rest = list(uses)
    by_parameter: dict[tuple[int, str], list[Use]] = defaultdict(list)
    for use in rest:
        alias = next((a for a in use.aliases if _PARAMETER.fullmatch(a)), None)
        if alias is not None:
            by_parameter[1, alias].append(use)
        elif use.path and use.role:
            by_parameter[2, f"{use.path}.{use.role}"].append(use)
        elif use.in_out is not None and use.node in biases:
            by_parameter[3, f"{biases[use.node]}.weight"].append(use)
    for (rank, parameter), group in by_parameter.items():
        yield rank, parameter, tuple(group)


def _agrees(parameter: str, use: Use) -> bool:
    """Whether a use may be that of the parameter: by its own module, or one around it."""
    if not use.path or not use.role:
        return True
    module = parameter.rpartition(".")[0]
    return f"{module}.".startswith(f"{use.path}.") or f".{use.path}.".endswith(f".{module}.")


def _wrapper(names: Sequence[str], paths: set[str]) -> str:
    """The modules around all others ("m."), which the model itself does not have."""
    whole = [*names, *(p for p in paths if "." in p)]
    front = ""
    while whole:
        firsts = {n.removeprefix(front).partition(".")[0] for n in whole if n.startswith(front)}
        if len(firsts) != 1:
            return front
        (first,) = firsts
        after = {n.removeprefix(f"{front}{first}.").partition(".")[0] for n in whole}
        doubled = first == "model" and after & _ROOTS
        if first not in _WRAPPERS and not doubled:
            return front
        front = f"{front}{first}."
    return front


def _bare(name: str, front: str) -> str:
    return name.removeprefix(front)


# ------------------------------------------------------------------------------- as stored


def _stored(
    graph: Graph,
    tensor: Tensor,
    parameter: str,
    uses: tuple[Use, ...],
    turned: bool | None,
    conv1d: frozenset[str],
    rank: int,
) -> Stored:
    said = Counter(u.in_out for u in uses if u.in_out is not None)
    in_out = next(iter(said)) if len(said) == 1 else None
    if turned is None:
        layer = parameter.split(".")[-2] if "." in parameter else ""
        # torch keeps the name of what it does not turn, and Conv1D is (in, out) in torch too
        as_it_is = rank == 1 and graph.producer == "pytorch"
        turned = bool(in_out) and not as_it_is and layer not in conv1d
    seen = None if in_out is None else in_out != turned
    return Stored(tensor, turned, seen, uses, True, HOW[rank])


def _share(found: Found, by_tensor: Mapping[str, Sequence[Use]]) -> None:
    """Which parameters have their tensor for themselves; who has no name makes it doubtful."""
    owners = Counter(s.tensor.name for s in found.stored.values())
    for parameter, stored in list(found.stored.items()):
        uses = by_tensor[stored.tensor.name]
        alone = owners[stored.tensor.name] == 1 and len(stored.uses) == len(uses)
        several = {u.node for u in stored.uses}
        nameless = [u for u in stored.uses if not u.path]
        kinds = stored.tensor.leaf is not None and stored.tensor.leaf.dtype in FLOATS
        if not found.listed and len(several) > 1 and nameless and kinds:
            count = len(several)
            found.ambiguous[parameter] = (
                f"{count} nodes use {shown(stored.tensor.name)}, which may stand for parameters "
                "of equal numbers"
            )
        if not alone:
            found.stored[parameter] = Stored(
                stored.tensor, stored.turned, stored.in_out, stored.uses, False, stored.how
            )
