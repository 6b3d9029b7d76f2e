"""The page specs/parity.md and the table behind it: `python -m tests.exporting.parity_table`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from tests.exporting.exportable_models import MODELS

HEAD = """# What is exported, and proven

Made by `python -m tests.exporting.parity_table > specs/parity.md`; do not edit it by hand. Each
cell is a case of `tests/exporting/test_parity_table.py` (all of them: `make test-all`) or of
`tests/field/test_field_export.py`.

- *exporters*: the graph gives what torch gives, to 1e-5 (real weights: 1e-4), at sizes and paddings
  that were never traced; language models token by token. X: that exporter cannot, and says so;
  `--exporter auto` takes the next one.
- *folded*: `export MODEL --adapter A`; every initialiser is the weight that PEFT's own merge of
  the adapter gives, to 1e-6 of the largest, and the graph is proven as above.
- *in the graph*: `merge A --base GRAPH` on the graph of the unfolded model; =: all bytes are those
  of the folded export, but for the lineage.

"""
EXPORTERS = ("hf", "dynamo", "legacy")


@dataclass(frozen=True)
class Row:
    """A model of the table, and what of it an adapter changes."""

    says: str
    config: dict[str, Any]  # of peft's LoraConfig
    tied: bool = False
    cannot: tuple[str, ...] = ()  # exporters
    graphs: tuple[str, ...] = ("model.onnx",)
    not_folded: tuple[str, ...] = ("dynamo",)  # its route is hf's
    pruned: str = ""  # target modules that no graph computes

    def folded(self) -> list[str]:
        """The exporters by which it is proven folded."""
        return [e for e in EXPORTERS if e not in (*self.cannot, *self.not_folded)]


def modules(*names: str, **more: Any) -> dict[str, Any]:
    """A LoraConfig's arguments for these modules."""
    return {"r": 4, "lora_alpha": 8, "target_modules": list(names), **more}


TWO = ("encoder_model.onnx", "decoder_model_merged.onnx")
LLAMA = modules("q_proj", "v_proj", "down_proj")
BERT = modules("query", "value", "dense")
# Experts count their tokens and T5 views rows that lie apart: transformers patches both.
TABLE: dict[str, Row] = {
    "llama": Row("Llama", modules("q_proj", "v_proj", "down_proj", "lm_head")),
    "llama-tied": Row("Llama, tied", modules("q_proj", "embed_tokens"), tied=True),
    "qwen3": Row("Qwen3", LLAMA),
    "gpt2": Row("GPT-2", modules("c_attn", "c_proj", fan_in_fan_out=True)),
    "gemma3": Row("Gemma 3", LLAMA),
    "mistral": Row("Mistral, sliding window", LLAMA),
    "phi3": Row("Phi-3", modules("qkv_proj", "o_proj", "gate_up_proj")),
    "mixtral": Row("Mixtral", modules("q_proj", "o_proj"), cannot=("dynamo", "legacy")),
    "bert": Row("BERT, masked words", BERT),
    "bert-bare": Row("BERT, states", BERT, pruned="pooler.*"),
    "bert-tokens": Row("BERT, tokens classified", BERT),
    "bert-answers": Row("BERT, answers", BERT),
    "distilbert": Row("DistilBERT, classified", modules("q_lin", "v_lin", "lin2")),
    "roberta": Row(
        "RoBERTa, classified", modules("query", "value", modules_to_save=["classifier"])
    ),
    "t5": Row("T5", modules("q", "v", "wo"), cannot=("dynamo",), graphs=TWO),
    "marian": Row("Marian", modules("q_proj", "v_proj", "fc1"), graphs=TWO),
    "whisper": Row("Whisper", modules("q_proj", "v_proj", "fc1"), graphs=TWO),
    "vit": Row("ViT, classified", modules("q_proj", "v_proj", "fc1")),
    "unet": Row("U-Net of diffusers", modules("to_q", "to_v", "conv1"), not_folded=()),
}  # fmt: skip
# Real weights; their tests lie elsewhere or take no exporter as an argument.
REAL = {
    "minilm": Row("MiniLM L6 v2, its weights", BERT, pruned="pooler.*"),
    "stories260k": Row("stories260K, its weights", LLAMA),
}


def page() -> str:
    """The text of specs/parity.md."""
    rows = ["| model | class | hf | dynamo | legacy | graphs | folded | in the graph |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in {**TABLE, **REAL}.items():
        saved = MODELS[name][0] if name in MODELS else SAVED[name]
        proven = PROVEN.get(name, EXPORTERS)
        cells = ["X" if e in row.cannot else "equal" if e in proven else "" for e in EXPORTERS]
        by = ", ".join(e for e in row.folded() if e in proven)
        graphs = ", ".join(f"`{g}`" for g in row.graphs)
        rows.append(f"| {row.says} | {saved} | {' | '.join(cells)} | {graphs} | {by} | = ({by}) |")
    return HEAD + "\n".join(rows) + "\n"


SAVED = {"unet": "UNet2DConditionModel", "minilm": "BertModel", "stories260k": "LlamaForCausalLM"}
PROVEN = {"minilm": ("hf", "legacy"), "stories260k": ("hf", "legacy")}


if __name__ == "__main__":
    sys.stdout.write(page())
