"""The examples run: the demo proves what it prints, the committed adapters are what was trained."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "examples" / "adapters"


def test_the_demo_ends_well(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ok: 36 of 36 targets match the base" in done.stdout
    assert "proved by replay: 104 tensors checked" in done.stdout
    assert "error" not in done.stderr
    apart = float(re.search(r"against folded model (\S+)", done.stdout)[1])
    assert apart < 1e-5
    assert not any(tmp_path.iterdir())


def test_the_committed_adapters_are_small_and_name_no_path_of_this_machine():
    for folder in ("docstrings", "prose"):
        files = list((ADAPTERS / folder).iterdir())
        assert sum(f.stat().st_size for f in files) < 400_000
        assert (
            '"sentence-transformers/all-MiniLM-L6-v2"'
            in (ADAPTERS / folder / "adapter_config.json").read_text()
        )


def test_the_prose_adapter_scores_what_its_page_says():
    from peft import PeftModel
    from transformers import AutoModel

    spec = spec_from_file_location("training", ROOT / "examples" / "train_demo_adapters.py")
    training = module_from_spec(spec)
    spec.loader.exec_module(training)
    said = re.findall(r"([\d.]+)%", (ADAPTERS / "prose" / "README.md").read_text())
    _, held_out = training.split(training.prose_pairs())
    base = AutoModel.from_pretrained(training.MODEL)
    before = training.accuracy(base, held_out)
    after = training.accuracy(PeftModel.from_pretrained(base, ADAPTERS / "prose"), held_out)
    assert after > before + 0.2
    # The text is Python's own: another Python has other sentences and other figures.
    if sys.version_info[:3] == (3, 11, 7):
        assert abs(before - float(said[0]) / 100) < 0.01
        assert abs(after - float(said[1]) / 100) < 0.01
