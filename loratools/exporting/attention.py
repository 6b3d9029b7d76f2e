"""Attention over a KV cache, found in an exported graph and made one GroupQueryAttention node.

Found from its Softmax outwards, so that both of torch's exporters are served: what lies between
(reshapes, the repeat of key heads, scalings on either side) is walked through, not spelled out.
The operator: onnxruntime:docs/ContribOperators.md, com.microsoft.GroupQueryAttention; with
`position_ids` and `attention_bias` it needs onnxruntime 1.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from loratools.exporting.net import DOMAIN, Net, attribute, permutes
from loratools.exporting.norms import fuse_skips

HEADS_FIRST = (0, 2, 1, 3)
LOWEST = -3.0e38  # of a mask: a row that hides everything stays a number, as 0 * NaN would spread


@dataclass(slots=True)
class Walk:
    """A way up from a value: where it ended, and what it was multiplied with."""

    name: str
    scale: float = 1.0


def upward(net: Net, name: str, *, turned: bool = False) -> Walk:
    """Through reshapes, repeats, casts, scalings (and with `turned` the transpose of the last two
    axes) to what a product of heads was made from.
    """
    walk = Walk(name)
    while (node := net.made_by.get(walk.name)) is not None:
        match node.op_type:
            case "Reshape" | "Expand" | "Unsqueeze" | "Identity" | "Cast":
                walk.name = node.input[0]
            case "Transpose" if turned and (permutes(node, 0, 1, 3, 2) or permutes(node, 0, 2, 1)):
                walk.name = node.input[0]
            case "Mul" | "Div":
                first, second = node.input
                if (number := net.scalar(second)) is not None:
                    walk.scale *= number if node.op_type == "Mul" else 1 / number
                    walk.name = first
                elif node.op_type == "Mul" and (number := net.scalar(first)) is not None:
                    walk.scale *= number
                    walk.name = second
                else:
                    return walk
            case "Concat" if len(node.input) == 1:
                walk.name = node.input[0]
            case _:
                return walk
    return walk


@dataclass(frozen=True, slots=True)
class Rotation:
    """x · cos + rotated(x) · sin, with cos and sin of shape (batch, sequence, size)."""

    x: str
    cos: str
    sin: str


def rotation(net: Net, name: str) -> Rotation | None:
    """The rotary embedding of halves that makes a value, if one does."""
    total = net.maker(name, "Add")
    if total is None:
        return None
    for first, second in (total.input, reversed(total.input)):
        plain, turned = net.maker(first, "Mul"), net.maker(second, "Mul")
        if plain is None or turned is None:
            continue
        for half, sin in (turned.input, reversed(turned.input)):
            joined = net.maker(half, "Concat")
            minus = net.maker(joined.input[0], "Neg") if joined and len(joined.input) == 2 else None
            if joined is None or minus is None:
                continue
            upper, lower = net.maker(minus.input[0], "Slice"), net.maker(joined.input[1], "Slice")
            if upper is None or lower is None or upper.input[0] != lower.input[0]:
                continue
            x = upper.input[0]
            if x not in plain.input:
                continue
            cos = plain.input[1] if plain.input[0] == x else plain.input[0]
            tables = [net.maker(t, "Unsqueeze") for t in (cos, sin)]
            if tables[0] is not None and tables[1] is not None:
                return Rotation(x, tables[0].input[0], tables[1].input[0])
    return None


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention with its cache: the nodes at its edges and the values that go in."""

    query: str  # (batch, heads, sequence, size), before a rotation that both sides have
    key: str
    value: str
    past_key: str
    past_value: str
    present_key: onnx.NodeProto
    present_value: onnx.NodeProto
    bias: str | None
    scale: float
    merged: onnx.NodeProto  # the Reshape to (batch, sequence, heads * size)
    rotated: tuple[str, str] | None  # cos and sin


@dataclass(slots=True)
class Shape:
    """Heads of the queries and of the keys, and the numbers in each."""

    heads: int
    key_heads: int
    size: int


def find(net: Net, softmax: onnx.NodeProto) -> Attention | None:
    """The attention around a Softmax; None where it is none over a cache."""
    merged, value = _below(net, softmax.output[0])
    scored = _above(net, softmax.input[0])
    if merged is None or value is None or scored is None:
        return None
    left, right, bias, scale = scored
    query, key = upward(net, left), upward(net, right, turned=True)
    values = upward(net, value)
    caches = [_cache(net, walk.name) for walk in (key, values)]
    if caches[0] is None or caches[1] is None or not math.isclose(values.scale, 1.0):
        return None
    (key_node, past_key, new_key), (value_node, past_value, new_value) = caches[0], caches[1]
    turned_query, turned_key = rotation(net, query.name), rotation(net, new_key)
    rotated = None
    query_name = query.name
    if turned_query is not None and turned_key is not None:
        same = (turned_query.cos, turned_query.sin) == (turned_key.cos, turned_key.sin)
        if same:
            rotated = turned_query.cos, turned_query.sin
            query_name, new_key = turned_query.x, turned_key.x
    return Attention(
        query_name, new_key, new_value, past_key, past_value, key_node, value_node, bias,
        scale * query.scale * key.scale, merged, rotated,
    )  # fmt: skip


def _below(net: Net, probabilities: str) -> tuple[onnx.NodeProto | None, str | None]:
    """From the Softmax's output to the merge of the heads; and the values that it weighs."""
    name = probabilities
    for reader in net.readers[name]:
        if reader.op_type == "Where" and reader.input[2] == name:
            name = reader.output[0]  # rows that hide everything give 0 instead of NaN
            break
    while len(net.readers[name]) == 1 and net.readers[name][0].op_type in ("Cast", "Identity"):
        name = net.readers[name][0].output[0]
    products = [n for n in net.readers[name] if n.op_type == "MatMul" and n.input[0] == name]
    if len(products) != 1:
        return None, None
    value, at = products[0].input[1], products[0].output[0]
    turned = False
    for _ in range(6):
        nexts = [n for n in net.readers[at] if n.op_type != "Shape"]
        if len(nexts) != 1:
            return None, None
        if turned and nexts[0].op_type == "Reshape":
            return nexts[0], value
        turned = turned or permutes(nexts[0], *HEADS_FIRST)
        if nexts[0].op_type not in ("Reshape", "Transpose", "Identity"):
            return None, None
        at = nexts[0].output[0]
    return None, None


def _above(net: Net, name: str) -> tuple[str, str, str | None, float] | None:
    """The two sides of the product of scores, the bias that is added, the factor in between."""
    bias: str | None = None
    scale = 1.0
    while (node := net.made_by.get(name)) is not None:
        match node.op_type:
            case "MatMul":
                return node.input[0], node.input[1], bias, scale
            case "Cast" | "Identity":
                name = node.input[0]
            case "Add" if bias is None:
                first, second = node.input
                scored = net.made_by.get(first)
                swapped = scored is None or scored.op_type not in ("MatMul", "Mul", "Div", "Cast")
                name, bias = (second, first) if swapped else (first, second)
            case "Mul" | "Div" if (number := net.scalar(node.input[1])) is not None:
                scale *= number if node.op_type == "Mul" else 1 / number
                name = node.input[0]
            case _:
                return None
    return None


def _cache(net: Net, name: str) -> tuple[onnx.NodeProto, str, str] | None:
    """The Concat of a graph input and new states that is a graph output too."""
    node = net.maker(name, "Concat")
    if node is None or len(node.input) != 2 or attribute(node, "axis") not in (2, -2):
        return None
    past = upward(net, node.input[0]).name
    there = {name} | {r.output[0] for r in net.readers[name] if r.op_type == "Identity"}
    return (node, past, node.input[1]) if past in net.inputs and there & net.outputs else None


# --------------------------------------------------------------------------- the one node


@dataclass(slots=True)
class Fused:
    """Values that all layers share, by what they were made from."""

    net: Net
    shape: Shape
    plain_mask: bool  # nothing is hidden but padding and what comes later
    count: int = 0
    lengths: tuple[str, str] | None = None
    caches: dict[tuple[str, str], tuple[str, str, str]] = field(default_factory=dict)

    def replace(self, found: Attention) -> None:
        """Put a GroupQueryAttention in the place of an attention."""
        net, stem = self.net, f"fused_attention_{self.count}"
        self.count += 1
        three = [
            linear(net, name) or self.merge(name, f"{stem}_{word}")
            for word, name in (("q", found.query), ("k", found.key), ("v", found.value))
        ]
        seqlens, total = self.sequence(found)
        if found.rotated is not None:
            tables = self.tables(*found.rotated)
            for at, heads in enumerate((self.shape.heads, self.shape.key_heads)):
                three[at] = net.add(
                    "RotaryEmbedding", [three[at], *tables], f"{stem}_{'qk'[at]}_rotated",
                    num_heads=heads, domain=DOMAIN,
                )  # fmt: skip
        bias = ""
        if self.plain_mask:
            bias = self.padding()
        elif found.bias is not None:
            least = net.initialiser("fused_lowest", np.array(LOWEST, np.float32))
            bias = net.add("Max", [found.bias, least], f"{stem}_bias")
        inputs = [*three, found.past_key, found.past_value, seqlens, total, "", "", "", bias]
        outputs = [f"{stem}_output", found.present_key.output[0], found.present_value.output[0]]
        node = helper.make_node("GroupQueryAttention", inputs, outputs, stem, domain=DOMAIN)
        said = {
            "num_heads": self.shape.heads, "kv_num_heads": self.shape.key_heads,
            "scale": found.scale,
        }  # fmt: skip
        node.attribute.extend(helper.make_attribute(k, v) for k, v in sorted(said.items()))
        net.fresh.append(node)
        gone = [found.present_key, found.present_value]
        for old in gone:
            net.graph.node.remove(old)
        found.merged.op_type = "Identity"
        del found.merged.attribute[:]
        found.merged.input[:] = [outputs[0]]

    def padding(self) -> str:
        """What hides padding, (batch, 1, sequence, total); the operator itself is causal."""
        net = self.net
        said = net.add("Cast", ["attention_mask"], "fused_shown", to=onnx.TensorProto.BOOL)
        least = net.initialiser("fused_lowest", np.array(LOWEST, np.float32))
        zero = net.initialiser("fused_nothing", np.array(0, np.float32))
        rows = net.add("Where", [said, zero, least], "fused_hidden")
        each = net.add("Unsqueeze", [rows, net.ints(1, 2)], "fused_hidden_rows")
        ids = net.add("Shape", ["input_ids"], "fused_ids_shape")
        length = net.add("Gather", [ids, net.ints(1)], "fused_length", axis=0)
        one = net.ints(1)
        shape = net.add("Concat", [one, one, length, one], "fused_bias_shape", axis=0)
        return net.add("Expand", [each, shape], "fused_bias")

    def merge(self, name: str, stem: str) -> str:
        """(batch, heads, sequence, size) as (batch, sequence, heads * size)."""
        node = self.net.made_by.get(name)
        if node is not None and permutes(node, *HEADS_FIRST):
            rows = node.input[0]
        else:
            rows = self.net.add("Transpose", [name], f"{stem}_rows", perm=list(HEADS_FIRST))
        return self.net.add("Reshape", [rows, self.net.ints(0, 0, -1)], f"{stem}_merged")

    def sequence(self, found: Attention) -> tuple[str, str]:
        """(length - 1) of every row and the length, past included; padding is the bias's affair."""
        if self.lengths is None:
            net = self.net
            one, zero = net.ints(1), net.ints(0)
            past = net.add("Shape", [found.past_key], "fused_past_shape")
            ids = net.add("Shape", ["input_ids"], "fused_ids_shape")
            before = net.add("Gather", [past, net.ints(2)], "fused_past_length", axis=0)
            now = net.add("Gather", [ids, one], "fused_length", axis=0)
            total = net.add("Add", [before, now], "fused_total")
            narrow = net.add("Cast", [total], "fused_total_int32", to=onnx.TensorProto.INT32)
            last = net.add("Sub", [total, one], "fused_last")
            rows = net.add("Gather", [ids, zero], "fused_rows", axis=0)
            every = net.add("Expand", [last, rows], "fused_last_of_rows")
            seqlens = net.add("Cast", [every], "fused_seqlens", to=onnx.TensorProto.INT32)
            scalar = net.initialiser("fused_scalar", np.array([], np.int64))
            self.lengths = seqlens, net.add("Reshape", [narrow, scalar], "fused_total_scalar")
        return self.lengths

    def tables(self, cos: str, sin: str) -> tuple[str, str, str]:
        """The row of every token, and each token's own cos and sin as tables with a row for each.

        So any scaling of the angles and any position holds. The rotation inside of
        GroupQueryAttention would do without, but gives every row of a first prompt the positions
        of the first one (1.31: group_query_attention.cc, position_ids_format 0).
        """
        if (cos, sin) not in self.caches:
            net, half = self.net, self.shape.size // 2
            stem = f"fused_rotary_{len(self.caches)}"
            ids = net.add("Shape", ["input_ids"], "fused_ids_shape")
            shape = net.add("Concat", [ids, net.ints(half)], "fused_rotary_shape", axis=0)
            made = []
            for word, name in (("cos", cos), ("sin", sin)):
                cut = net.add(
                    "Slice",
                    [name, net.ints(0), net.ints(half), net.ints(-1)],
                    f"{stem}_{word}_half",
                )
                every = net.add("Expand", [cut, shape], f"{stem}_{word}_each")
                made.append(net.add("Reshape", [every, net.ints(-1, half)], f"{stem}_{word}"))
            count = net.add("ReduceProd", [ids], "fused_tokens", keepdims=0)
            first = net.initialiser("fused_first", np.array(0, np.int64))
            step = net.initialiser("fused_step", np.array(1, np.int64))
            numbers = net.add("Range", [first, count, step], "fused_numbers")
            places = net.add("Reshape", [numbers, ids], "fused_places")
            self.caches[cos, sin] = places, made[0], made[1]
        return self.caches[cos, sin]


def linear(net: Net, name: str) -> str | None:
    """The (batch, sequence, heads * size) that a value was split into heads from, with no step
    (such as a norm of each head) in between.
    """
    node = net.made_by.get(name)
    split = net.maker(node.input[0], "Reshape") if node and permutes(node, *HEADS_FIRST) else None
    if split is None or net.maker(split.input[0], "MatMul", "Add") is None:
        return None
    return str(split.input[0])


def fuse_cached(
    model: onnx.ModelProto, shape: Callable[[], Shape], *, plain_mask: bool = False
) -> Fused | None:
    """Every attention over a KV cache as one node; None where there is none.

    With `plain_mask` the graph's own mask is not looked at: the caller knows that it hides
    padding and later positions only, or finds out by comparing.
    """
    net = Net(model)
    found = [find(net, n) for n in model.graph.node if n.op_type == "Softmax"]
    caches = [f for f in found if f is not None]
    if not caches or len(caches) != len(found):
        return None
    has_mask = "attention_mask" in net.inputs and all(f.bias is not None for f in caches)
    done = Fused(net, shape(), plain_mask and has_mask)
    for one in caches:
        done.replace(one)
    fuse_skips(net)
    model.graph.node.extend(net.fresh)
    return done
