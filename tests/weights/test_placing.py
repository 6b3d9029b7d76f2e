"""Every reason why an output may not go where it was sent, and what is left as it was then."""

import os
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import OutputError, StorageError, UsageError
from loratools.weights import disk
from tests.weights.outputs import NEW, OLD, PLAN, make, put, refused, seen, within


def test_an_output_that_is_an_input_under_any_name(tmp_path: Path) -> None:
    base = put(tmp_path / "base", {"model.safetensors": "w", "sub/x": "y"})
    (tmp_path / "link").symlink_to("base")
    os.link(base / "model.safetensors", tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to("base/model.safetensors")
    (tmp_path / "deep").symlink_to("base/sub")
    put(tmp_path / "out", {"adapter_config.json": "{}"})
    (tmp_path / "out" / "linked").symlink_to(base)
    put(tmp_path / "next.partial", {"model.safetensors": "w"})
    before = sorted(tmp_path.rglob("*"))
    weights = base / "model.safetensors"
    relative = Path(os.path.relpath(base))
    for out, source, as_file in (
        (base, base, False),
        (relative, base, False),
        (base, relative, False),
        (tmp_path / "sub" / ".." / "base", base, False),
        (base / "out", base, False),
        (base / "sub" / "deep" / "out", base, False),
        (tmp_path / "link", base, False),
        (tmp_path / "link" / "out", base, False),
        (base, tmp_path / "link", False),
        (tmp_path, base, False),  # the input lies in the output
        (base, weights, False),
        (tmp_path / "link", weights, False),
        (base, tmp_path / "deep", False),
        (tmp_path / "out", tmp_path / "out" / "linked", False),  # would lose the link
        (tmp_path / "next", tmp_path / "next.partial", False),  # would be taken for a leftover
        (weights, weights, True),
        (weights, base, True),
        (tmp_path / "hard.safetensors", weights, True),
        (tmp_path / "hard.safetensors", base, True),
        (tmp_path / "soft.safetensors", weights, True),
        (tmp_path / "soft.safetensors", base, True),
        (base / "new.gguf", base, True),
    ):
        inputs = [Path("elsewhere"), source]
        said = refused(out, UsageError, "same_path", inputs=inputs, force=True, as_file=as_file)
        assert said.endswith("choose another output"), (out, source)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_in_another_case_is_the_same_where_the_file_system_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = os.path.samefile

    def samefile(a: Path, b: Path) -> bool:
        return native(*(str(path).replace("BASE", "base") for path in (a, b)))

    monkeypatch.setattr(os.path, "samefile", samefile)
    put(tmp_path / "base", {"model.safetensors": "w"})
    refused(tmp_path / "BASE" / "out", UsageError, "same_path", inputs=[tmp_path / "base"])


def test_an_output_beside_its_inputs_is_fine(tmp_path: Path) -> None:
    base = put(tmp_path / "base", {"model.safetensors": "w"})
    os.link(base / "model.safetensors", tmp_path / "other")
    inputs = [base, tmp_path / "other", tmp_path / "absent"]
    make(tmp_path / "base-new", inputs=inputs)
    make(tmp_path / "y.bin", lambda o: put(o.folder, {"y.bin": "y"}), inputs=inputs, as_file=True)
    others = {"base/model.safetensors": "w", "other": "w", "y.bin": "y"}
    assert seen(tmp_path) == within("base-new", NEW) | others


@pytest.mark.parametrize(
    ("files", "known"),
    [
        ({"adapter_config.json": ""}, True),
        ({"loratools.json": ""}, True),
        ({"model_index.json": ""}, True),
        ({"config.json": '{"model_type": "llama"}', "tokenizer.json": ""}, True),
        ({"w.safetensors": ""}, True),
        ({"pytorch_model.BIN": ""}, True),
        ({"m.gguf": ""}, True),
        ({"m.onnx": ""}, True),
        ({"config.json": '{"port": 80}', "index.js": ""}, False),
        ({"config.json": '["model_type"]'}, False),
        ({"config.json": "not json"}, False),
        ({"thesis.tex": ""}, False),
        ({"sub/w.safetensors": ""}, False),
    ],
)
def test_only_adapters_and_models_are_replaced(
    tmp_path: Path, files: dict[str, str], known: bool
) -> None:
    out = put(tmp_path / "out", files)
    assert "--force to replace" in refused(out, OutputError, "output_exists")
    if known:
        make(out, force=True)
    else:
        assert "no adapter or model" in refused(out, OutputError, "output_exists", force=True)
    assert seen(tmp_path) == within("out", NEW if known else files)


def test_what_stands_at_the_name_of_a_single_file(tmp_path: Path) -> None:
    put(tmp_path, {"a.safetensors": "", "b.txt": "", "c.bin.loratools.json": "", "d.bin/x.bin": ""})
    os.mkfifo(tmp_path / "e.bin")
    before = sorted(os.listdir(tmp_path))
    for name in ("a.safetensors", "c.bin"):
        said = refused(tmp_path / name, OutputError, "output_exists", as_file=True)
        assert "--force to replace" in said
    for name in ("b.txt", "d.bin", "e.bin"):
        said = refused(tmp_path / name, OutputError, "output_exists", as_file=True, force=True)
        assert "no adapter or model" in said
    refused(tmp_path / "a.safetensors", OutputError, "output_exists", force=True)  # for a folder
    assert sorted(os.listdir(tmp_path)) == before


def test_links_at_the_output(tmp_path: Path) -> None:
    for name in ("none", "empty", "full", "file.bin", "loose.bin"):
        (tmp_path / name).symlink_to(f"real-{name}")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "real-empty").mkdir()
    put(tmp_path / "real-full", OLD)
    put(tmp_path, {"real-file.bin": "w"})
    for name in ("none", "empty"):
        make(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert seen(tmp_path / f"real-{name}") == NEW
    said = refused(tmp_path / "full", OutputError, "output_exists", force=True)
    assert "name that path itself" in said
    for name in ("file.bin", "loose.bin", "circle"):
        refused(tmp_path / name, OutputError, "output_exists", force=True, as_file=True)
    refused(tmp_path / "circle", OutputError, "output_exists")
    assert seen(tmp_path / "real-full") == OLD
    assert not [name for name in os.listdir(tmp_path) if "partial" in name or "lock" in name]


def test_links_within_an_old_output_are_removed_and_not_written_through(tmp_path: Path) -> None:
    blob = put(tmp_path / "blobs", {"abc": "precious"}) / "abc"
    snapshot = put(tmp_path / "snapshot", {"config.json": '{"architectures": []}'})
    (snapshot / "loratools.json").symlink_to(blob)
    make(snapshot, force=True)
    assert seen(snapshot) == NEW
    assert blob.read_text() == "precious"


def test_too_little_space_is_known_before_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 16_000_000)
    said = refused(tmp_path / "a" / "out", StorageError, "disk_full", needed=15_000_000)
    assert f"out: 16,048,576 bytes needed, 16,000,000 free in {tmp_path}/a; " in said
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    refused(tmp_path / "out", StorageError, "disk_full", needed=10**18)
    make(tmp_path / "out", needed=1_000_000)


def test_a_parent_that_takes_no_folder(tmp_path: Path) -> None:
    put(tmp_path, {"file": "x"})
    for out in (
        tmp_path / "file" / "out",
        tmp_path / "file" / "deep" / "out",
        tmp_path / ("n" * 300),
        Path("/proc/loratools-out"),  # where root may not write either
        Path("/proc/loratools/out"),
    ):
        refused(out, StorageError, "storage")
    assert seen(tmp_path) == {"file": "x"}


def test_foreign_folders_with_our_name_are_not_touched(tmp_path: Path) -> None:
    foreign = put(tmp_path / "out.partial", {"my.download": "precious"})
    options: list[dict[str, Any]] = [{}, {"restart": True}, {"plan": PLAN}, {"force": True}]
    for option in options:
        said = refused(tmp_path / "out", OutputError, "output_exists", **option)
        assert "out.partial is in the way" in said
    assert seen(tmp_path) == {"out.partial/my.download": "precious"}
    os.rename(foreign, tmp_path / "mine")
    foreign.symlink_to("mine")
    refused(tmp_path / "out", OutputError, "output_exists")
    assert seen(tmp_path / "mine") == {"my.download": "precious"}
    foreign.unlink()
    foreign.mkdir()  # an empty one costs nobody anything
    make(tmp_path / "out")
    assert seen(tmp_path / "out") == NEW
