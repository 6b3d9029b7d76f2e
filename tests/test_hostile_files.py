"""Hostile files of the containers that are one file each: refused by every command, by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.cli import main
from tests.hostile_files import FILES, File
from tests.test_hostile import is_safe, not_hanging, snapshot
from tests.test_house import ROOT
from tests.tiny import write_base


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_base(tmp_path / "base")
    config = {
        "model_type": "llama", "tie_word_embeddings": False, "hidden_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("row", FILES, ids=str)
def test_it_is_stopped_and_said(row: File, here, capsys):
    row.make(here)
    before = snapshot(here)
    status = row.inspect if row.check is None else row.check
    calls = [
        (("inspect", row.name), row.inspect),
        (("check", row.name, "-b", "base"), status),
        (("merge", row.name, "-b", "base", "-o", "out"), status),
    ]
    for arguments, expected in calls:
        capsys.readouterr()
        with not_hanging():
            ended = main(list(arguments))
        out, err = capsys.readouterr()
        assert ended == expected, (arguments, out, err)
        assert is_safe(out + err), out + err
        assert "Traceback" not in err
        assert len(out) + len(err) < 10_000
    assert row.says in err
    assert snapshot(here) == before  # nothing is written, and nothing ran


NAMES = (
    "a.gguf", "a.npz", "a.nemo", "a.onnx_adapter", "a.safetensors", "a.pt", "lit_model.pth.lora",
    "adapters.npz", "a.ckpt",
)  # fmt: skip
SORTS = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "a pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:"),
        "git lfs pull",
    ),
    "a page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html></html>"), "a web page"),
    "a FIFO": (os.mkfifo, "a FIFO"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sort", SORTS)
def test_what_is_no_file_of_weights_at_all(sort, name, here, capsys):
    """Rows 15 and 16, under the names that each format's files have."""
    make, says = SORTS[sort]
    make(here / name)
    for arguments in (["inspect", name], ["check", name, "-b", "base"]):
        with not_hanging():
            ended = main(arguments)
        out, err = capsys.readouterr()
        assert (ended, says in err) == (3, True), (arguments, out, err)
        assert name in err


CHILD = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
for name in ("torch", "numpy"):
    sys.modules[name] = None  # importing it fails
from loratools.cli import main
found = {}
for name in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        status = main(["inspect", name])
    found[name] = [status, err.getvalue()]
print(json.dumps(found))
"""


def test_none_of_them_needs_torch_or_numpy(tmp_path):
    """One process for all, in which neither can be imported."""
    paths = {}
    for i, row in enumerate(FILES):
        folder = tmp_path / str(i)
        folder.mkdir()
        paths[str(row.make(folder))] = row
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(list(paths))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for path, (status, said) in json.loads(done.stdout).items():
        assert status == paths[path].inspect, (paths[path], said)
        if status:
            assert paths[path].says in said
