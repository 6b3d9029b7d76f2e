"""The skips of a run: three reasons are counted, any other one fails it."""

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")
MARKERS = "[pytest]\nmarkers =\n  field\n  gpu\n  oracle\n"


def run(folder: Path, files: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text(MARKERS)
    for number, tests in enumerate(files):
        (folder / f"test_{number}.py").write_text(f"import pytest\n{tests}")
    nowhere = str(folder / "nowhere")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)],
        env=os.environ
        | {"LORATOOLS_FIELD": nowhere, "LORATOOLS_ORACLES": nowhere, "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_skips_for_the_three_reasons_are_counted(tmp_path):
    tests = """
def test_a(field_data): assert 0
@pytest.mark.field
def test_b(): assert 0
@pytest.mark.oracle("litgpt")
def test_c(): assert 0
@pytest.mark.gpu
def test_d(): assert 0
def test_e(): pass
"""
    done = run(tmp_path, [tests], "-n", "2")
    assert done.returncode == 0, done.stdout
    assert "skipped: 2 x no field data" in done.stdout
    assert "skipped: 1 x no oracle environment" in done.stdout
    assert "skipped: 1 x no GPU" in done.stdout


def test_any_other_skip_fails_the_run(tmp_path):
    reasons = ["later", "tired", "known", "gone", "no_such_module"]
    files = [
        "@pytest.mark.skip(reason='later')\ndef test_a(): pass",
        "def test_a(): pytest.skip('tired')\ndef test_b(): pass",
        "@pytest.mark.xfail(reason='known')\ndef test_a(): assert 0",
        "@pytest.mark.xfail(reason='gone')\ndef test_a(): pass",
        "pytest.importorskip('no_such_module')\ndef test_a(): pass",
    ]
    done = run(tmp_path, files)
    assert done.returncode == 1, done.stdout
    refused = [line for line in done.stdout.splitlines() if "neither skip nor xfail" in line]
    assert len(refused) == len(files)
    for number, (line, reason) in enumerate(zip(refused, reasons, strict=True)):
        assert f"test_{number}.py" in line
        assert reason in line


def test_another_skip_fails_the_run_of_several_workers_too(tmp_path):
    tests = "@pytest.mark.skip\ndef test_a(): pass\ndef test_b(): pass"
    done = run(tmp_path, [tests], "-n", "2")
    assert done.returncode == 1, done.stdout
