"""Graphs on the Hub as bases: checked from headers and ranges, folded from the cache."""

import json

import onnx
import pytest
from onnx import numpy_helper

from loratools.commands.check import check
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.errors import FitError
from tests.exporting.test_graph_fold import graph_of, lora, product, weight

SIZE = 256  # 256 KiB a weight, so that headers alone are visibly less


@pytest.fixture
def seeded(hub, tmp_path, monkeypatch):
    """A repository in the layout of transformers.js, its weights beside the graph."""
    folder = tmp_path / "graph"
    nodes = [product("a", "v", y="h"), product("b", "w", x="h")]
    some = [weight("v", SIZE, SIZE), weight("w", SIZE, SIZE, seed=1)]
    path = graph_of(folder / "onnx" / "model.onnx", nodes, *some, size=SIZE)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data",
              size_threshold=0)  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    hub.put("org/graph", folder)
    lora(tmp_path / "lora", b=(SIZE, SIZE))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return hub


def sent(hub):
    """How many bytes the Hub has sent."""
    return sum(asked.sent for asked in hub.log)


def test_a_check_reads_headers_alone(seeded, tmp_path):
    found = check([tmp_path / "lora"], "org/graph")
    assert found.ok
    assert (found.matched, found.total) == (1, 1)
    assert sent(seeded) < SIZE * SIZE
    ended = seeded.cli("check", tmp_path / "lora", "--base", "org/graph", "--json")
    assert (ended.status, ended.json["matched"]) == (0, 1)
    inside = check([tmp_path / "lora"], "org/graph:onnx/model.onnx")
    assert inside.ok
    assert inside.plan.base.config["model_type"] == "bert"


def test_what_does_not_fit_is_said_before_anything_is_fetched(seeded, tmp_path):
    with pytest.raises(FitError):
        merge([lora(tmp_path / "other", b=(SIZE, 8))], "org/graph", out="x")
    assert sent(seeded) < SIZE * SIZE


@pytest.mark.parametrize("address", ["org/graph", "org/graph:onnx", "org/graph:onnx/model.onnx"])
def test_a_fold_from_the_hub_is_the_fold_of_the_same_files(seeded, tmp_path, address):
    merge([tmp_path / "lora"], address, out="x")
    local = tmp_path / "graph" / address.partition(":")[2]
    merge([tmp_path / "lora"], local, out="y")
    work = tmp_path / "work"
    mine, theirs = (
        {p.relative_to(work / n).as_posix(): p for p in (work / n).rglob("*") if p.is_file()}
        for n in "xy"
    )
    assert mine.keys() == theirs.keys()
    assert any(name.endswith("model.onnx_data") for name in mine)
    for name, path in mine.items():
        if name.endswith((".onnx", ".onnx_data", "config.json", "tokenizer.json")):
            if path.suffix != ".onnx":
                assert path.read_bytes() == theirs[name].read_bytes(), name
                continue
            tensors = [
                {t.name: numpy_helper.to_array(t).tobytes() for t in onnx.load(p).graph.initializer}
                for p in (path, theirs[name])
            ]
            assert tensors[0] == tensors[1]
    recipe = json.loads((work / "x" / "loratools.json").read_text())["recipe"]
    assert recipe["base"]["id"] == "org/graph"
    assert len(recipe["base"]["revision"]) == 40
    proved = verify("x", adapters=[tmp_path / "lora"])
    assert (proved.mismatches, proved.proved) == ((), "replay")
