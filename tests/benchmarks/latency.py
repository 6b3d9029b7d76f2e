"""What an adapter costs when a graph runs: the LoRA paper's Table 1, for a small Llama, here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.measuring import WORK, Row

SIZES = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
         "max_position_embeddings": 1024}  # fmt: skip
RANK = 16
# Batch, tokens, tokens in the cache (the paper has 32 x 512, 16 x 256 and 1 x 128 of GPT-2).
SHAPES = ((1, 1, 128), (1, 128, 0), (8, 64, 0))


def base(sizes: Mapping[str, int] = SIZES) -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def with_lora(model: Any) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


def with_bottlenecks(model: Any) -> Any:
    """Houlsby's two to a layer, of about as many parameters as the LoRA."""
    from loratools.adapter import Adapter, Leaf, Runtime
    from loratools.exporting.with_runtime import with_runtime

    hidden, width = model.config.hidden_size, 2 * RANK
    tensors = {}
    for layer in range(model.config.num_hidden_layers):
        for place in ("attention_adapters", "output_adapters"):
            front = f"model.layers.{layer}.{place}.adapters.task"
            for name, shape in (
                ("adapter_down.0.weight", (width, hidden)), ("adapter_down.0.bias", (width,)),
                ("adapter_up.weight", (hidden, width)), ("adapter_up.bias", (hidden,)),
            ):  # fmt: skip
                key = f"{front}.{name}"
                tensors[key] = Leaf.of(key, 0.02 * torch.randn(shape))
    adapter = Adapter(
        {}, "adapterhub", config={"config": {"non_linearity": "relu"}},
        runtime=Runtime("bottleneck", tensors, {}),
    )  # fmt: skip
    with_runtime(model, adapter)
    return model


def graphs(folder: Path, sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """All graphs that are timed, by name, and the switchable one's pack."""
    from loratools import formats
    from loratools.exporting.switchable import pack, switchable
    from loratools.proving.latency import Timed
    from tests.exporting.flat_graphs import causal

    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.onnx" for name in ("base", "merged", "unmerged", "bottleneck")}
    causal(base(sizes), paths["base"])
    live = with_lora(base(sizes))
    live.save_pretrained(folder / "lora")
    causal(live.base_model.model, paths["unmerged"])
    causal(live.merge_and_unload(), paths["merged"])
    causal(with_bottlenecks(base(sizes)), paths["bottleneck"])
    causal(base(sizes), paths["base"])  # whose config is the one beside the graphs
    adapter = formats.read(folder / "lora")
    switchable(paths["base"], folder / "switchable.onnx", [adapter])
    pack(adapter, folder / "switchable.onnx", folder / "lora.onnx_adapter")
    found: dict[str, Any] = {name: Timed(path) for name, path in paths.items()}
    found["base, again"] = Timed(paths["base"])  # what its ratio is off 1 by is noise
    found["switchable, idle"] = Timed(folder / "switchable.onnx")
    found["switchable, active"] = Timed(folder / "switchable.onnx", folder / "lora.onnx_adapter")
    return found


def feeds(
    shape: tuple[int, int, int], sizes: Mapping[str, int] = SIZES, dtype: Any = np.float32
) -> dict[str, Any]:
    rows, tokens, past = shape
    heads = sizes["num_key_value_heads"]
    size = sizes["hidden_size"] // sizes["num_attention_heads"]
    draw = np.random.default_rng(0)
    found: dict[str, Any] = {
        "input_ids": draw.integers(3, sizes["vocab_size"], (rows, tokens)),
        "attention_mask": np.ones((rows, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (rows, 1)),
    }
    for layer in range(sizes["num_hidden_layers"]):
        for word in ("key", "value"):
            state = draw.standard_normal((rows, heads, past, size)).astype(dtype)
            found[f"past_key_values.{layer}.{word}"] = state
    return found


def latency() -> list[Row]:
    """Base, merged, unmerged, switchable, bottleneck: one interleaved run on one thread."""
    from loratools.proving.latency import measure

    some = graphs(WORK / "latency")
    rows = []
    for shape in SHAPES:
        calls = 15 if shape[1] == 1 else 3
        found = {row.name: row for row in measure(some, feeds(shape), 7, calls=calls)}
        text = f"batch {shape[0]}, {shape[1]} tokens" + (f" after {shape[2]}" if shape[2] else "")
        first, noise = found["base"], max(0.05, abs(found["base, again"].ratio - 1))
        for name, row in found.items():
            if name == "base":
                continue
            merged = name == "merged"
            rows.append(
                Row(
                    "latency",
                    f"{name}: {row.seconds * 1e3:.2f} ms",
                    f"base: {first.seconds * 1e3:.2f} ms, {text}; spread {row.spread:.0%}",
                    f"{row.ratio:.2f} x",
                    f"1.00 x, to {noise:.0%}" if merged else "-",
                    row.ratio <= 1 + noise if merged else None,
                )
            )
    return rows


def onnx() -> list[Row]:
    """On a GPU: a merged graph in float16 with its cache bound, packs switched, against the CPU."""
    from loratools.exporting.precision import to_fp16
    from loratools.exporting.runtime import generate, session
    from loratools.proving.latency import Timed, measure

    sizes = {**SIZES, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    folder = WORK / "latency-gpu"
    some = graphs(folder, sizes)
    half = folder / "merged-fp16.onnx"
    to_fp16(some["merged"].path, half)
    given = feeds((4, 64, 0), sizes)
    cpu, gpu = session(some["merged"].path), session(some["merged"].path, providers=["cuda"])
    right = cpu.run(given)["logits"]
    scale = float(np.abs(right).max())
    narrow = session(half, providers=["cuda"])
    switched = session(folder / "switchable.onnx", providers=["cuda"])
    pack = some["switchable, active"].adapter
    differences = {
        "fp32": np.abs(gpu.run(given)["logits"] - right).max() / scale,
        "fp32, bound": np.abs(gpu.bound(given)["logits"].numpy() - right).max() / scale,
        "fp16": np.abs(narrow.run(given)["logits"].astype(np.float32) - right).max() / scale,
        "switched": np.abs(switched.run(given, adapter=pack)["logits"] - right).max() / scale,
    }
    limits = {"fp32": 2e-3, "fp32, bound": 2e-3, "fp16": 2e-2, "switched": 2e-3}  # TF32
    ids = given["input_ids"][:, :16]
    same = np.array_equal(generate(gpu, ids, steps=16, bind=True), generate(gpu, ids, steps=16))
    rows = [
        Row(
            "onnx on a GPU", f"{name}: {value:.1e} of the largest logit",
            "the same graph on the CPU", "-", f"<= {limits[name]:.0e}", value <= limits[name],
        )
        for name, value in differences.items()
    ]  # fmt: skip
    rows.append(Row("onnx on a GPU", "greedy tokens, cache bound", "unbound", "-", "equal", same))
    del cpu, gpu, narrow, switched
    one = (1, 1, 512)
    timed = {
        "merged": some["merged"],
        "merged, bound": Timed(some["merged"].path, bind=True),
        "switchable, active": some["switchable, active"],
    }
    for row in measure(timed, feeds(one, sizes), 5, calls=50, providers=["cuda"], threads=None):
        text = f"{row.name}: {row.seconds * 1e3:.2f} ms"
        rows.append(
            Row("onnx on a GPU", text, "merged, one token after 512", f"{row.ratio:.2f} x", "-")
        )
    return rows
