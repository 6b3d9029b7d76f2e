"""Receipts over several hops: what was made of what was made names the first ones too."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from loratools import receipt
from loratools.commands.convert import convert
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from tests.tiny import write_adapter, write_base
from tests.weights.test_pipeline import lora


@pytest.fixture
def seeded(hub, tmp_path, monkeypatch):
    hub.put("org/base", write_base(tmp_path / "base"))
    for n, name in enumerate(("one", "two", "three")):
        hub.put(f"org/{name}", write_adapter(tmp_path / name, seed=n, rank=2))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return hub


def named(hub, *repos: str) -> set[tuple[str, str]]:
    return {(repo, hub.repos[repo].head.oid) for repo in repos}


def all_of(folder: str | Path) -> list[dict]:
    found = receipt.read(folder)
    assert found is not None
    return receipt.made_from(found)


def on_hub(entries: list[dict]) -> set[tuple[str, str]]:
    return {(e["id"], e["revision"]) for e in entries if "id" in e}


def test_a_merge_of_a_merge_names_the_first_adapters(seeded):
    merge(["org/one", "org/two"], out="both", weights=[0.5, 0.5])
    seeded.put("me/both", Path("both"))
    merge(["me/both", "org/three"], out="all", weights=[1, 1])
    found = all_of("all")
    assert on_hub(found) == named(seeded, "me/both", "org/one", "org/two", "org/three")
    prints = {e["id"]: e["fingerprint"] for e in found}
    into = {e["id"]: e.get("into") for e in found}
    assert into["org/one"] == into["org/two"] == prints["me/both"]
    assert into["me/both"] is into["org/three"] is None
    assert {e["id"]: e.get("weight") for e in found}["org/one"] == 0.5


def test_a_fold_of_published_parts_names_every_ancestor(seeded):
    merge(["org/one", "org/two"], out="both", weights=[0.5, 0.5])
    seeded.put("me/both", Path("both"))
    merge(["org/three"], "org/base", out="folded")
    seeded.put("me/folded", Path("folded"))
    merge(["me/both"], "me/folded", out="last")
    seeded.put("me/last", Path("last"))
    found = all_of("last")
    parts = ("org/one", "org/two", "org/three", "org/base", "me/both", "me/folded")
    assert on_hub(found) == named(seeded, *parts)
    assert all(len(e["fingerprint"]) == 64 for e in found)
    roles = {e["id"]: e["role"] for e in found}
    assert roles == {
        "org/one": "adapter", "org/two": "adapter", "org/three": "adapter", "org/base": "base",
        "me/both": "adapter", "me/folded": "base",
    }  # fmt: skip
    result = verify("me/last", require="replay")
    assert result.ok, result.mismatches


def test_a_conversion_passes_its_ancestors_on(seeded):
    merge(["org/one", "org/two"], out="both", weights=[0.5, 0.5])
    convert("both", rank=1, out="small")
    convert("small", dtype="fp16", out="half")
    assert on_hub(all_of("half")) == named(seeded, "org/one", "org/two")


def test_adapters_of_one_file_have_their_receipts_beside_them(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.put("org/styles", {f"{n}.safetensors": lora(Path(f"{n}.safetensors")) for n in "ab"})
    merge(["org/styles:a.safetensors", "org/styles:b.safetensors"], out="ab.safetensors",
          weights=[1, 1])  # fmt: skip
    both = ("ab.safetensors", "ab.safetensors.loratools.json")
    hub.put("me/merged", {f"styles/{name}": Path(name) for name in both})
    convert("me/merged:styles/ab.safetensors", rank=1, out="small.safetensors")
    found = all_of("small.safetensors")
    assert {(e["id"], e["inside"]) for e in found} == {
        ("me/merged", "styles/ab.safetensors"), ("org/styles", "a.safetensors"),
        ("org/styles", "b.safetensors"),
    }  # fmt: skip
    assert verify("me/merged:styles/ab.safetensors").ok


def test_local_parents_are_named_by_path_and_fingerprint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"))
    write_adapter(Path("a"))
    write_adapter(Path("b"), seed=3)
    merge(["a", "b"], out="ab", weights=[1, 1])
    merge(["ab"], "base", out="folded")
    assert {(e["role"], e["source"]) for e in all_of("folded")} == {
        ("base", "base"), ("adapter", "ab"), ("adapter", "a"), ("adapter", "b"),
    }  # fmt: skip


def test_an_ancestor_of_many_stands_there_once(tmp_path, monkeypatch):
    """Each step merges the last two: without care their lists would double with each."""
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("s0"))
    write_adapter(Path("s1"), seed=3)
    for n in range(2, 10):
        merge([f"s{n - 2}", f"s{n - 1}"], out=f"s{n}", weights=[0.5, 0.5], rank=4)
    found = all_of("s9")
    assert {e["source"] for e in found} == {f"s{n}" for n in range(9)}
    assert len(found) == 2 * 8  # each as a part of the two that were made of it
    assert Path("s9/loratools.json").stat().st_size < 20_000


@pytest.mark.parametrize("what", ["other bytes", "no json", "no receipt"])
def test_a_receipt_of_something_else_is_not_followed_and_that_is_said(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate("abc"):
        write_adapter(Path(name), seed=n)
    merge(["a", "b"], out="ab", weights=[1, 1])
    if what == "other bytes":
        weights = bytearray(Path("ab/adapter_model.safetensors").read_bytes())
        weights[-1] ^= 1
        Path("ab/adapter_model.safetensors").write_bytes(weights)
    else:
        Path("ab/loratools.json").write_text("{" if what == "no json" else "{}")
    merge(["ab", "c"], out="abc", weights=[1, 1])
    assert {e["source"] for e in all_of("abc")} == {"ab", "c"}
    entry = json.loads(Path("abc/loratools.json").read_text())["recipe"]["adapters"][0]
    assert "not followed" in entry["receipt"]


def test_ancestors_of_a_hostile_receipt_are_plain_and_few(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate("abc"):
        write_adapter(Path(name), seed=n)
    merge(["a", "b"], out="ab", weights=[1, 1])
    path = Path("ab/loratools.json")
    table = json.loads(path.read_text())
    first = table["recipe"]["adapters"][0]
    first["deep"] = {"x": [1] * 100}
    first["ancestors"] = [{"fingerprint": {"not": "text"}, "source": "s"}, 7, {"fingerprint": "f"}]
    path.write_text(json.dumps(table))
    merge(["ab", "c"], out="abc", weights=[1, 1])
    assert all(isinstance(v, str | float | int) for e in all_of("abc") for v in e.values())
    first["ancestors"] = [{"fingerprint": str(n)} for n in range(2000)]
    path.write_text(json.dumps(table))
    merge(["ab", "c"], out="more", weights=[1, 1])
    entry = json.loads(Path("more/loratools.json").read_text())["recipe"]["adapters"][0]
    assert "over 1000 ancestors" in entry["receipt"]


def test_a_snapshot_of_the_cache_named_by_its_path_is_named_by_its_commit(seeded):
    place = huggingface_hub.snapshot_download("org/one")
    merge([place], "org/base", out="x")
    (entry,) = json.loads(Path("x/loratools.json").read_text())["recipe"]["adapters"]
    assert {(entry["id"], entry["revision"])} == named(seeded, "org/one")


def test_a_receipt_leads_to_no_other_place_than_the_cache(seeded):
    merge(["org/one"], "org/base", out="x")
    path = Path("x/loratools.json")
    for change in (
        {"id": "../../x"},
        {"revision": "../" * 13 + "x"},
        {"inside": "../../secret"},
        {"revision": "main"},
        {"id": 7},
    ):
        table = json.loads(path.read_text())
        table["recipe"]["adapters"][0] |= {"source": "nowhere", **change}
        shutil.copytree("x", "y")
        Path("y/loratools.json").write_text(json.dumps(table))
        result = verify("y")
        assert result.proved == "hashes"
        assert any("was not found" in note for note in result.notes)
        shutil.rmtree("y")
    assert os.listdir() == ["x"]
