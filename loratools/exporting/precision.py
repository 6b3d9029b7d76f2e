"""A float32 graph in float16: half the size, the same inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from loratools.errors import error, shown
from loratools.exporting import graph_files

LARGEST: Final = 65504.0  # of float16
ROUNDS_TO_INFINITY: Final = 65520.0
# Fillers of attention masks: what they hide stays hidden at the most negative float16.
FILLER: Final = -1e30
PROTOBUF_LIMIT: Final = 2_000_000_000  # shape inference serialises the graph


def to_fp16(source: Path, out: Path) -> None:
    """Write the graph with float16 weights and sums; inputs and outputs stay float32.

    A weight that float16 cannot hold is refused by name (`overflow`); a number that only hides
    masked positions becomes the most negative float16. External data stay external.
    """
    with graph_files.quiet():
        from onnxruntime.transformers import float16  # type: ignore[import-untyped]

    model, beside = graph_files.read(source)
    entries = graph_files.props(model)
    refuse_overflow(model)
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    made = float16.convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=size > PROTOBUF_LIMIT
    )
    del made.graph.value_info[:]  # its types are those of before
    graph_files.put_in_order(made.graph)  # the casts of the inputs were put at the end
    graph_files.set_props(made, entries | {"loratools.dtype": "fp16"})
    graph_files.write(made, out, external=beside)


def refuse_overflow(model: onnx.ModelProto) -> None:
    """Refuse finite float32 numbers that would become infinite, other than fillers of masks."""
    parameters = graph_files.sidecar(model)
    for name, tensor in graph_files.tensors(model):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        finite = values[np.isfinite(values)]
        if finite.size == 0 or max(abs(float(finite.max())), abs(float(finite.min()))) <= LARGEST:
            continue
        said = parameters.get(name, (name, False))[0]
        wrong = finite[(np.abs(finite) >= ROUNDS_TO_INFINITY) & (finite > FILLER)]
        if name in parameters:
            wrong = finite[np.abs(finite) >= ROUNDS_TO_INFINITY]
        if wrong.size:
            worst = float(wrong[np.abs(wrong).argmax()])
            raise error(
                "overflow",
                f"{shown(said)}: {wrong.size} of {values.size} numbers do not fit float16 "
                f"(the largest is {worst:.6g}, float16 ends at {LARGEST:.0f}); keep fp32",
            )
