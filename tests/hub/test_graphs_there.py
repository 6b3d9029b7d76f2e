"""ONNX graphs on the Hub: as bases, whose weights lie behind links, and at the end of a chain."""

import shutil
from pathlib import Path

import huggingface_hub
import onnx
import pytest

from loratools import receipt
from loratools.commands.check import check
from loratools.commands.export import export
from loratools.commands.merge import merge
from loratools.commands.push import push
from loratools.commands.verify import verify
from tests.exporting import graph_bases as bases
from tests.hub.test_chains import all_of, named, on_hub


@pytest.mark.parametrize("inside", ["", "onnx/"])
def test_a_graph_is_checked_and_folded_from_the_hub(hub, tmp_path, inside):
    base = bases.folder(tmp_path / "base", "llama")
    lora = bases.adapter(tmp_path / "lora", base, "llama")
    plain = bases.export(bases.loaded(base, "llama"), tmp_path / "plain.onnx", "legacy")
    here = tmp_path / "here"
    (here / inside).mkdir(parents=True)
    onnx.save_model(
        onnx.load(plain), here / inside / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=0,
    )  # fmt: skip
    shutil.copy(base / "config.json", here)
    hub.put("org/graph", here)
    typed = "org/graph"
    assert check([lora], typed).matched == check([lora], here).matched > 0
    assert not list(hub.cache.glob("models--org--graph/snapshots"))
    merge([lora], typed, out=tmp_path / "x")
    merge([lora], here, out=tmp_path / "y")
    for name in ("model.onnx", "model.onnx_data"):
        one, other = (next(Path(tmp_path / o).rglob(name)).read_bytes() for o in "xy")
        assert one == other
    found = receipt.read(tmp_path / "x")
    assert found is not None
    assert {e.get("id") for e in receipt.made_from(found)} == {"org/graph", None}


@pytest.mark.slow
def test_the_whole_way_to_onnx_names_every_ancestor(hub, tmp_path, monkeypatch):
    """Adapters merged, published, folded, published, exported, published, and pulled again."""
    monkeypatch.chdir(tmp_path)
    base = bases.folder(Path("base"), "llama")
    hub.put("org/base", base)
    for n in (1, 2):
        hub.put(f"org/a{n}", bases.adapter(Path(f"a{n}"), base, "llama", seed=n))
    more = {"license": "mit", "base_model": ["org/base"]}
    merge(["org/a1", "org/a2"], out="both", weights=[0.5, 0.5])
    push("both", "me/both", **more)
    merge(["me/both"], "org/base", out="folded")
    push("folded", "me/folded", **more)
    export("me/folded", out="graph", task="text-generation")
    push("graph", "me/graph", **more)
    assert verify("me/both", require="replay").ok
    assert verify("me/folded", require="replay").ok
    assert verify("me/graph").ok
    place = huggingface_hub.snapshot_download("me/graph")
    found = all_of(place)
    parts = ("org/a1", "org/a2", "org/base", "me/both", "me/folded")
    assert on_hub(found) == named(hub, *parts)
    assert all(len(e["fingerprint"]) == 64 for e in found)
