"""Tokens per second of one folded Llama: our graph, its fused form, onnxruntime-genai's own."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import WORK, Row

# 0.2 billion parameters: what a step costs is reading the weights, as with larger ones
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 16000,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
GRAPHS = ("model", "fused", "genai/model")


def tokens(
    sizes: dict[str, int] = SIZES, *, rounds: int = 9, steps: int = 32, prompt: int = 32
) -> list[Row]:
    """Greedy steps after a prompt: our graph, --fuse, onnxruntime-genai's builder; same weights."""
    folder = WORK / f"tokens-{sizes['hidden_size']}-{sizes['num_hidden_layers']}"
    made(folder, sizes)
    runs = {name: Greedy(folder / f"{name}.onnx", sizes) for name in GRAPHS}
    said = {name: run(steps, prompt)[1] for name, run in runs.items()}  # warms them too
    assert said["model"] == said["fused"] == said["genai/model"], "not the same tokens"
    speeds: dict[str, list[float]] = {name: [] for name in GRAPHS}
    for at in range(rounds):
        for name in GRAPHS[at % 3 :] + GRAPHS[: at % 3]:
            speeds[name].append(runs[name](steps, prompt)[0])
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    rows = []
    for name, words, wanted in (("model", "our graph", None), ("fused", "fused", 0.95)):
        pairs = zip(speeds[name], speeds["genai/model"], strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        ratio = statistics.median(ratios)
        rows.append(
            Row(
                "tokens",
                f"{words}: {middle[name]:.1f} tokens/s",
                f"onnxruntime-genai's graph: {middle['genai/model']:.1f} tokens/s "
                f"(medians of {rounds}; ratios {ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{ratio:.2f} x",
                f">= {wanted} x" if wanted else "-",
                ratio >= wanted if wanted else None,
            )
        )
    return rows


def made(folder: Path, sizes: dict[str, int]) -> None:
    """A base, a LoRA adapter folded into it by us, and the three graphs of the result."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import loratools
    from loratools.exporting.fusing import fuse
    from loratools.exporting.layouts import genai
    from tests.exporting.flat_graphs import causal
    from tests.exporting.test_layouts import checkpoint

    if (folder / "genai" / "model.onnx").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    base = LlamaForCausalLM(config)
    checkpoint(folder / "base", base, sizes["vocab_size"])
    wanted = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, wanted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.02)  # a few percent of the base, as trainings end
    adapted.save_pretrained(folder / "adapter")
    loratools.merge([folder / "adapter"], folder / "base", out=folder / "folded")
    folded = LlamaForCausalLM.from_pretrained(folder / "folded", dtype=torch.float32)
    causal(folded.eval(), folder / "model.onnx")
    fuse(folder / "model.onnx", folder / "fused.onnx", config.to_dict())
    genai(folder / "folded", folder / "genai", precision="fp32")


class Greedy:
    """A session and the loop that feeds its cache back, the same for every graph."""

    def __init__(self, path: Path, sizes: dict[str, int]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.sizes = sizes
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, steps: int, prompt: int) -> tuple[float, list[int]]:
        """Tokens a second after the prompt, and the tokens."""
        import numpy as np

        heads = self.sizes["num_key_value_heads"]
        size = self.sizes["hidden_size"] // self.sizes["num_attention_heads"]
        empty = np.zeros((1, heads, 0, size), np.float32)
        past: dict[str, Any] = {n: empty for n in self.inputs if n.startswith("past")}
        ids, before, said, seconds = np.arange(5, 5 + prompt)[None], 0, [], 0.0
        for step in range(steps + 1):
            total = before + ids.shape[1]
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **past}
            if "position_ids" in self.inputs:
                feeds["position_ids"] = np.arange(before, total)[None]
            start = time.perf_counter()
            found = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
            seconds += (time.perf_counter() - start) * (step > 0)
            past = {n: found[n.replace("past_key_values", "present")] for n in past}
            ids = found["logits"][:, -1:].argmax(-1)
            before = total
            said.append(int(ids[0, 0]))
        return steps / seconds, said
