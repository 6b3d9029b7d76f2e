"""A fold into a graph of 2 GB beside it, against copying it and against exporting it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.benchmarks.measuring import WORK, Row, child, copy_and_sync, in_turn, warm

SIZE, LAYERS, RANK = 4096, 32, 8  # 2.15 GB of float32

FOLD = (
    "import sys, time, torch, loratools\n"
    "start = time.perf_counter()\n"
    "loratools.merge([sys.argv[1]], sys.argv[2], out=sys.argv[3], hash='none')\n"
    "RESULT = {'seconds': time.perf_counter() - start}\n"
)
EXPORT = (
    "import sys, time, torch\n"
    "size, layers = int(sys.argv[2]), int(sys.argv[3])\n"
    "rows = [torch.nn.Linear(size, size, bias=False, device='meta') for _ in range(layers)]\n"
    "model = torch.nn.Sequential(*rows).to_empty(device='cpu').eval()\n"
    "start = time.perf_counter()\n"
    "with torch.no_grad():\n"
    "    torch.onnx.export(model, (torch.zeros(1, size),), sys.argv[1], dynamo=True,\n"
    "                      verbose=False, external_data=True)\n"
    "RESULT = {'seconds': time.perf_counter() - start}\n"
)


def graph(folder: Path, size: int = SIZE, layers: int = LAYERS) -> Path:
    """A chain of products whose weights lie in one file beside the graph, as dynamo leaves them."""
    import numpy as np
    from onnx import TensorProto, helper

    path = folder / "model.onnx"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    nbytes = 4 * size * size
    tensors, nodes = [], []
    draw = np.random.default_rng(0)
    with (folder / "model.onnx.data").open("wb") as file:
        for i in range(layers):
            tensor = TensorProto(name=f"val_{i}", data_type=1, dims=[size, size], data_location=1)
            said = {"location": "model.onnx.data", "offset": i * nbytes, "length": nbytes}
            for key, value in said.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            name = f"/{i}/MatMul"
            made = f"h{i + 1}" if i + 1 < layers else "y"
            nodes.append(helper.make_node("MatMul", [f"h{i}", f"val_{i}"], [made], name=name))
            file.write(draw.standard_normal((size, size), "f4").tobytes())
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, size]) for n in ("h0", "y")]
    made_of = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(made_of, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def adapter(folder: Path, size: int = SIZE, layers: int = LAYERS) -> Path:
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors = {}
    for i in range(layers):
        front = f"base_model.model.{i}"
        tensors[f"{front}.lora_A.weight"] = torch.randn(RANK, size) * 0.01
        tensors[f"{front}.lora_B.weight"] = torch.randn(size, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [str(i) for i in range(layers)]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def graph_fold(size: int = SIZE, layers: int = LAYERS, rounds: int = 3) -> list[Row]:
    """A fold into a graph of 2 GB: time against cp and against an export, and memory."""
    base = graph(WORK / f"graph-{size}-{layers}", size, layers)
    lora = adapter(WORK / f"graph-lora-{size}-{layers}", size, layers)
    out, peaks = WORK / "graph-folded", list[float]()

    def ours() -> float:
        shutil.rmtree(out, ignore_errors=True)
        warm(base.parent)
        result = child(FOLD, lora, base, out)
        shutil.rmtree(out)
        peaks.append(result["peak_mib"])
        return result["seconds"]

    mine, copied, ratio = in_turn(
        ours, lambda: copy_and_sync(base.parent, WORK / "graph-copied"), rounds
    )
    again = WORK / "graph-exported"
    again.mkdir(exist_ok=True)
    exported = child(EXPORT, again / "model.onnx", size, layers)["seconds"]
    shutil.rmtree(again)
    idle = child("import torch, loratools")["peak_mib"]
    bound = 4 * 4 * size * size / 2**20 + 200
    held = max(peaks) - idle
    return [
        Row(
            "graph fold",
            f"{mine:.1f} s",
            f"cp + sync of the same files: {copied:.1f} s (medians of {rounds})",
            f"{1 / ratio:.2f} x",
            "<= 1.5 x",
            1 / ratio <= 1.5,
        ),
        Row(
            "graph fold",
            f"{mine:.1f} s",
            f"dynamo's export of the model in memory (once): {exported:.1f} s",
            f"{exported / mine:.1f} x faster",
            "-",
        ),
        Row(
            "graph fold",
            f"{held:.0f} MiB over the imports' {idle:.0f}",
            "4 x the largest tensor + 200 MB",
            f"{held / bound:.2f} x",
            "<= 1 x",
            held <= bound,
        ),
    ]
