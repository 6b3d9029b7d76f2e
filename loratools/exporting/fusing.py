"""Graphs with onnxruntime's own operators in the place of many small ones, proven to be equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from loratools.errors import ProofError, error, shown
from loratools.exporting import graph_files
from loratools.exporting.attention import Shape, fuse_cached
from loratools.exporting.net import DOMAIN
from loratools.exporting.norms import fuse_norms

TOLERANCE: Final = 1e-4  # of the largest number that the graph gives, at least of 1
# Models by how onnxruntime's optimizer calls their like: onnxruntime/transformers/optimizer.py
LIKE: Final = {
    "albert": "bert", "bert": "bert", "camembert": "bert", "deberta": "bert", "distilbert": "bert",
    "electra": "bert", "mpnet": "bert", "roberta": "bert", "xlm-roberta": "bert", "vit": "vit",
    "deit": "vit", "gpt2": "gpt2", "t5": "t5", "mt5": "t5", "bart": "bart", "mbart": "bart",
    "whisper": "bart", "clip": "clip", "swin": "swin",
}  # fmt: skip


def fuse(
    source: Path, out: Path, config: Mapping[str, Any], *, notes: list[str] | None = None
) -> dict[str, int]:
    """Write the fused graph; how many nodes of each of onnxruntime's operators it has.

    Decoders with a KV cache get one GroupQueryAttention for each layer and the rotation of its
    queries and keys, and sums that flow into norms go into one node with them; all weights stay
    as they were. The others get what onnxruntime's optimizer finds. It is kept only
    if it gives the outputs of the unfused graph (`proof_failed`); inputs and outputs keep their
    names. Where onnxruntime refuses the attention (heads whose size is no multiple of 8), the rest
    is fused and `notes` says why. Where nothing fits it is `not_exportable`. What
    GroupQueryAttention refuses, loudly: several rows of several tokens each after a past.
    """
    why = ""
    ways = [Way(True, True), Way(True, False)] if _hides_nothing_else(config) else [Way(True)]
    for way in (*ways, Way(False)):
        model, beside = graph_files.read(source)
        counts = _fused(model, source, config, way, why)
        written = [out.with_name(name) for name in graph_files.write(model, out, external=beside)]
        try:
            prove_equal(source, out)
        except BaseException as problem:
            for path in written:
                path.unlink(missing_ok=True)
            if way.plain_mask and isinstance(problem, ProofError):
                continue  # a mask of another sort, of which the config says nothing
            if not way.attention or not type(problem).__module__.startswith("onnxruntime."):
                raise
            why = _refusal(problem)
            continue
        if why and notes is not None:
            notes.append(f"attention is not fused: {why}")
        return counts
    raise AssertionError("the last way returns or raises")


@dataclass(frozen=True, slots=True)
class Way:
    """How a graph is fused: its attention too, and whether by a mask that hides padding alone."""

    attention: bool
    plain_mask: bool = False


def _refusal(problem: BaseException) -> str:
    """What onnxruntime says, without the name of the node and codes."""
    return shown(str(problem).rpartition("Status Message:")[2].strip() or str(problem))


def _hides_nothing_else(config: Mapping[str, Any]) -> bool:
    """Whether the config names no attention but the causal one over everything before."""
    window = config.get("sliding_window") and config.get("use_sliding_window", True)
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    return not (window or kinds or config.get("attention_chunk_size") or config.get("alibi"))


def _fused(
    model: onnx.ModelProto, source: Path, config: Mapping[str, Any], way: Way, why: str
) -> dict[str, int]:
    """Fuse a graph in place; how many nodes of each operator it has now."""
    entries = graph_files.props(model)
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    if not way.attention:
        fuse_norms(model)
    elif fuse_cached(model, lambda: _shape(model, config), plain_mask=way.plain_mask) is None:
        made = _optimised(model, config)
        if made is not model:
            model.CopyFrom(made)
    _remove_dead(model.graph)
    del model.graph.value_info[:]
    graph_files.put_in_order(model.graph)
    graph_files.remove_unused(model)
    counts = _counts(model)
    if not counts:
        raise error(
            "not_exportable",
            f"{shown(source.name)}: nothing in this graph ({shown(config.get('model_type'))}) that "
            "onnxruntime has one operator for"
            + (f", and of its attention it says: {why}" * bool(why)),
        )
    for old, new in ((inputs, model.graph.input), (outputs, model.graph.output)):
        if old != [value.name for value in new]:
            raise error("proof_failed", f"{shown(source.name)}: fusing changed inputs or outputs")
    graph_files.use_domain(model, DOMAIN)
    how = ",".join(f"{kind}:{count}" for kind, count in sorted(counts.items()))
    graph_files.set_props(model, entries | {"loratools.fused": how})
    graph_files.renamed_sidecar(model, {})
    return counts


def _shape(model: onnx.ModelProto, config: Mapping[str, Any]) -> Shape:
    """Heads and their size, by the cache's inputs and the config."""
    for value in model.graph.input:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.name.startswith("past") and len(dims) == 4 and dims[1] and dims[3]:
            said = config.get("num_attention_heads") or config.get("n_head") or dims[1]
            return Shape(int(said), dims[1], dims[3])
    raise error("not_exportable", "the cache's inputs do not say how many heads they have")


def _counts(model: onnx.ModelProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def _optimised(model: onnx.ModelProto, config: Mapping[str, Any]) -> onnx.ModelProto:
    """What onnxruntime's transformers optimizer makes of it, without the session's own passes."""
    with graph_files.quiet():
        from onnxruntime.transformers import optimizer  # type: ignore[import-untyped]

    like = LIKE.get(str(config.get("model_type")), "bert")
    heads = (
        config.get("num_attention_heads") or config.get("n_head") or config.get("num_heads") or 0
    )
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    kind = optimizer.MODEL_TYPES[like][0]
    with graph_files.quiet():
        options = optimizer.FusionOptions(like)
        made = kind(model, int(heads), int(hidden))
        made.optimize(options)
        made.model.producer_name = model.producer_name
    result: onnx.ModelProto = made.model
    return result


def _remove_dead(graph: onnx.GraphProto) -> None:
    """Take out the nodes that no output needs."""
    made_by = {name: node for node in graph.node for name in node.output if name}
    needed: set[int] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting.extend(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.extend(n for inner in attribute.g.node for n in inner.input)
    kept = [node for node in graph.node if id(made_by.get(_first(node))) in needed]
    del graph.node[:]
    graph.node.extend(kept)


def _first(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "")


# --------------------------------------------------------------------------- the proof


def prove_equal(first: Path, second: Path) -> float:
    """The largest difference of two graphs' outputs; `proof_failed` above the tolerance.

    Three runs where there is a cache (a prompt with a padded row, one step after it, a longer
    prompt), two without; only rows that the mask shows count. Logits are compared as they are.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    both = [
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for path in (first, second)
    ]
    worst = 0.0
    for feeds, shows in _runs(both[0]):
        names = [value.name for value in both[0].get_outputs()]
        expected, found = (session.run(None, feeds) for session in both)
        for name, a, b in zip(names, expected, found, strict=True):
            if a.shape != b.shape:
                raise error(
                    "proof_failed", f"{shown(name)}: {b.shape} after fusing, before {a.shape}"
                )
            rows = _visible(name, a, shows), _visible(name, b, shows)
            size = max(1.0, float(np.abs(rows[0]).max(initial=0.0)))
            apart = float(np.abs(rows[0] - rows[1]).max(initial=0.0)) / size
            if not apart <= TOLERANCE:
                raise error(
                    "proof_failed",
                    f"the fused graph differs by {apart:.2g} in {shown(name)} "
                    f"({TOLERANCE:g} is allowed); nothing was kept",
                )
            worst = max(worst, apart)
    return worst


def _visible(name: str, array: NDArray[Any], shows: NDArray[np.bool_]) -> NDArray[Any]:
    """The rows of an output that are not padding: (batch, sequence, ...) or (batch, heads, ...)."""
    if array.ndim == 4 and name.startswith("present") and array.shape[2] == shows.shape[1]:
        return array.swapaxes(1, 2)[shows]
    if array.ndim == 3 and 0 < array.shape[1] <= shows.shape[1]:
        return array[shows[:, shows.shape[1] - array.shape[1] :]]
    return array


def _runs(session: Any) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]]:
    """Inputs for both graphs, and which positions the mask shows."""
    cached = any(value.name.startswith("past") for value in session.get_inputs())
    draw = np.random.default_rng(0)
    for rows, now, before in (
        ((2, 6, 0), (2, 1, 5), (1, 9, 4)) if cached else ((2, 6, 0), (3, 9, 0))
    ):
        shows = np.ones((rows, now + before), bool)
        if rows > 1:
            shows[0, : 2 if cached else 0] = False
            shows[0, now + before - (0 if cached else 2) :] = False
        feeds: dict[str, NDArray[Any]] = {}
        for value in session.get_inputs():
            names = {"batch": rows, "sequence": now, "past_sequence": before}
            shape = [
                n if isinstance(n, int) else names.get(n, rows if i == 0 else now)
                for i, n in enumerate(value.shape)
            ]
            match value.name:
                case "attention_mask":
                    made: NDArray[Any] = shows.astype(np.int64)
                case "position_ids":
                    made = (shows.cumsum(-1) - 1).clip(0)[:, -now:].astype(np.int64)
                case name if name.endswith("attention_mask"):
                    made = np.ones(shape, np.int64)
                case "token_type_ids":
                    made = np.zeros(shape, np.int64)
                case _ if value.name.startswith("past"):
                    shape[2] = before
                    made = draw.normal(size=shape).astype(np.float32)
                case _ if value.type == "tensor(int64)":
                    made = draw.integers(3, 30, shape)
                case _ if value.type == "tensor(float)":
                    made = draw.normal(size=shape).astype(np.float32)
                case _:
                    raise error("proof_failed", f"{shown(value.name)} is a {shown(value.type)}")
            feeds[value.name] = made
        yield feeds, shows
