"""Hub addresses wherever a path is taken: the commands, in process and as a child."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import loratools
from loratools.adapter import Origin
from loratools.commands.check import check
from loratools.commands.convert import convert
from loratools.commands.inspect import inspect
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.errors import FitError, LoratoolsError, NetworkError, NotFoundError
from tests.test_startup import COMMAND, heavy_after
from tests.tiny import write_adapter, write_base
from tests.weights.test_pipeline import lora, pipeline


@pytest.fixture
def seeded(hub, tmp_path, monkeypatch):
    """A base and two adapters, on disk and as repositories; nothing else lies where we work."""
    base = write_base(tmp_path / "base", 2)
    one = write_adapter(tmp_path / "one", base_model_name_or_path="org/base")
    two = write_adapter(tmp_path / "two", seed=5, base_model_name_or_path="org/base")
    hub.put("org/base", base)
    hub.put("org/one", one)
    hub.put("me/two", two, private=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return hub


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "loratools.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def head(hub, repo: str) -> str:
    return hub.repos[repo].head.oid


# ------------------------------------------------------------------------------- commands


def test_a_fold_from_the_hub_is_the_fold_of_the_same_files(seeded, tmp_path):
    there = merge(["org/one", "me/two"], "org/base", out="x", weights=[0.7, 0.3])
    here = merge(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "base", out="y", weights=[0.7, 0.3]
    )
    assert bytes_of(Path("x")) == bytes_of(Path("y"))
    assert there.targets == here.targets == 8


def test_a_merge_from_the_hub_is_the_merge_of_the_same_files(seeded, tmp_path):
    merge(["org/one", "hf://me/two"], out="x", weights=[0.7, 0.3])
    merge([tmp_path / "one", tmp_path / "two"], out="y", weights=[0.7, 0.3])
    assert bytes_of(Path("x")) == bytes_of(Path("y"))


def test_the_receipt_names_what_came_from_the_hub_by_commit(seeded):
    merge(["org/one", "me/two"], "org/base", out="x", weights=[0.7, 0.3])
    recipe = json.loads(Path("x/loratools.json").read_text())["recipe"]
    for entry, repo in zip(
        [recipe["base"], *recipe["adapters"]], ["org/base", "org/one", "me/two"], strict=True
    ):
        commit = head(seeded, repo)
        assert (entry["id"], entry["revision"]) == (repo, commit)
        assert entry["source"] == f"{repo}@{commit}"
        assert len(entry["fingerprint"]) == 64


def test_an_adapter_is_inspected_from_its_header(seeded):
    (found,) = inspect("org/one")
    assert (found.format, found.targets, found.base) == ("peft", 4, "org/base")
    assert found.source == "org/one"
    assert not list(seeded.cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "typed", ["hf://org/one", "{url}/org/one", "{url}/org/one/tree/main", "org/one@main"]
)
def test_every_way_to_write_an_address_is_read(seeded, typed):
    (found,) = inspect(typed.format(url=seeded.url))
    assert (found.format, found.targets) == ("peft", 4)


def test_the_hashes_of_an_adapter_on_the_hub_are_those_of_the_file(seeded, tmp_path):
    (there,), (here,) = inspect("org/one", hash=True), inspect(tmp_path / "one", hash=True)
    assert there.hashes == here.hashes is not None


def test_a_repository_of_many_adapters_is_a_table_ready_to_paste(hub, tmp_path):
    one = write_adapter(tmp_path / "one")
    two = write_adapter(tmp_path / "two", rank=2)
    files = {f"a/{p.name}": p for p in one.iterdir()} | {f"b/c/{p.name}": p for p in two.iterdir()}
    hub.put("org/many", files)
    found = inspect("org/many")
    assert [f.source for f in found] == ["org/many:a", "org/many:b/c"]
    assert [list(f.ranks) for f in found] == [[4], [2]]
    assert inspect(found[1].source)[0].ranks == {2: 4}
    hub.put("org/many", {f"d/{p.name}": p for p in two.iterdir()})
    with pytest.raises(FitError, match="several adapters:\n  org/many@main:a\n  org/many@main:d"):
        check(["org/many@main"])


def test_the_only_adapter_in_a_folder_of_a_repository_is_found_and_fetched(hub, tmp_path):
    one = write_adapter(tmp_path / "one")
    hub.put("org/run", {f"checkpoint-10/{p.name}": p for p in one.iterdir()})
    adapter = loratools.load("org/run")
    assert adapter.origin == Origin("org/run", head(hub, "org/run"), "checkpoint-10")
    assert adapter.folder == hub.cache / "models--org--run/snapshots" / head(hub, "org/run") / (
        "checkpoint-10"
    )
    assert len(adapter.deltas) == 4


def test_a_file_in_a_repository_is_fetched_alone(hub, tmp_path):
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", rank=2)
    weights = {n: (f / "adapter_model.safetensors") for n, f in (("a", one), ("b", two))}
    hub.put("org/files", {f"{n}.safetensors": p for n, p in weights.items()})
    adapter = loratools.load("org/files:b.safetensors", assume={"alpha": "2"})
    assert {d.rank for d in adapter.deltas.values()} == {2}
    snapshot = hub.cache / "models--org--files/snapshots" / head(hub, "org/files")
    assert [p.name for p in snapshot.iterdir()] == ["b.safetensors"]


def test_an_adapter_of_torch_is_read_by_our_own_reader(hub, tmp_path):
    one = write_adapter(tmp_path / "one")
    weights = load_file(one / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter_model.bin")
    config = one / "adapter_config.json"
    hub.put("org/old", {"adapter_model.bin": tmp_path / "adapter_model.bin", config.name: config})
    convert("org/old", to="peft", out=tmp_path / "new")
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert new.keys() == weights.keys()
    assert all(torch.equal(new[k], weights[k]) for k in new)


def test_adapters_from_the_hub_are_converted_under_the_names_of_their_repositories(seeded):
    results = convert(["org/one", "me/two"], to="peft", out="both")
    assert [r.output for r in results] == [Path("both/one"), Path("both/two")]
    assert all(r.lossless for r in results)


def test_an_output_may_be_called_like_a_repository(seeded):
    convert("org/one", to="peft", out="org/one")
    assert Path("org/one/adapter_model.safetensors").is_file()


def test_a_dry_run_fetches_no_base(seeded):
    result = merge(["org/one"], "org/base", out="x", dry_run=True)
    assert result.update_kept is not None
    assert not list(seeded.cache.glob("models--org--base/snapshots"))


def test_a_base_that_does_not_fit_is_not_fetched(seeded, tmp_path):
    hub = seeded
    wrong = write_adapter(tmp_path / "wrong", modules=["model.layers.9.self_attn.q_proj"])
    with pytest.raises(FitError):
        merge([wrong], "org/base", out="x")
    assert not list(hub.cache.glob("models--org--base/snapshots"))


def test_of_a_base_only_what_a_fold_reads_and_carries_on_is_fetched(hub, tmp_path):
    base = write_base(tmp_path / "base", 2)
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    (base / "README.md").write_text("a card")
    (base / "original").mkdir()
    (base / "original" / "consolidated.pth").write_bytes(b"more weights")
    (base / "original" / "params.json").write_text("{}")
    (base / "modules").mkdir()
    (base / "modules" / "config.json").write_text("{}")
    hub.put("org/base", base)
    merge([write_adapter(tmp_path / "one")], "org/base", out=tmp_path / "x")
    merge([tmp_path / "one"], base, out=tmp_path / "y")
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "y")
    snapshot = hub.cache / "models--org--base/snapshots" / head(hub, "org/base")
    there = {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}
    assert there == set(bytes_of(tmp_path / "x"))


@pytest.mark.parametrize("folder", ["", "sub/pipe"])
def test_a_pipeline_of_diffusers_is_folded_from_the_hub(hub, tmp_path, folder):
    place = pipeline(tmp_path / "pipe", text_encoder_2=["transformers", "CLIPTextModel"])
    (place / "unet" / "other.bin").write_bytes(b"other weights")
    front, typed = (f"{folder}/", f"org/pipe:{folder}") if folder else ("", "org/pipe")
    files = [p for p in place.rglob("*") if p.is_file()]
    hub.put("org/pipe", {front + p.relative_to(place).as_posix(): p for p in files})
    adapter = lora(tmp_path / "lora.safetensors")
    assert check([adapter], typed).matched == 2
    merge([adapter], typed, out=tmp_path / "x")
    merge([adapter], place, out=tmp_path / "y")
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "y")
    snapshot = hub.cache / "models--org--pipe/snapshots" / head(hub, "org/pipe")
    assert not (snapshot / front / "unet/other.bin").exists()


def test_shards_in_a_folder_of_a_repository_are_a_base(hub, tmp_path):
    base = write_base(tmp_path / "base", 3)
    hub.put("org/many", {f"models/a/{p.name}": p for p in base.iterdir()})
    one = write_adapter(tmp_path / "one")
    merge([one], "org/many:models/a", out=tmp_path / "x")
    merge([one], base, out=tmp_path / "y")
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "y")
    merge([one], "org/many:models/a/model.safetensors.index.json", out=tmp_path / "z")
    weights = [n for n in bytes_of(tmp_path / "x") if n.endswith(".safetensors")]
    assert {n: bytes_of(tmp_path / "z")[n] for n in weights} == {
        n: bytes_of(tmp_path / "x")[n] for n in weights
    }


# ------------------------------------------------------------------------------- which is it


def test_what_lies_on_this_machine_needs_no_library_of_the_hub(tmp_path):
    base = write_base(tmp_path / "base", 2)
    one = write_adapter(tmp_path / "one")
    assert heavy_after(COMMAND, "check", str(one), "--base", str(base)) == []
    loaded = heavy_after(COMMAND, "merge", str(one), "-b", str(base), "-o", str(tmp_path / "x"))
    assert "huggingface_hub" not in loaded


def test_an_existing_path_wins(seeded, tmp_path):
    write_adapter(Path("org/one"), rank=2)
    seeded.log.clear()
    assert inspect("org/one")[0].ranks == {2: 4}
    assert seeded.log == []


def test_what_is_neither_says_how_it_was_read(seeded):
    with pytest.raises(NotFoundError) as caught:
        inspect("org/none")
    assert caught.value.message.startswith("no file or folder named org/none here; on the Hub: ")


def test_a_path_that_may_be_meant_for_the_hub_is_answered_with_the_address(seeded):
    with pytest.raises(NotFoundError) as caught:
        inspect("org/one/adapter_model.safetensors")
    assert "org/one:adapter_model.safetensors" in caught.value.problems[0].advice
    assert not seeded.log


@pytest.mark.parametrize("name", ["nothing", "./org/one", "org/one/", "a/b/c", "../x", "org/ one"])
def test_what_can_only_be_a_path_asks_nobody(seeded, name):
    with pytest.raises(NotFoundError, match="no file or folder named"):
        inspect(name)
    assert seeded.log == []


def test_offline_what_is_neither_says_how_it_was_read(seeded, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError) as caught:
        merge(["org/one"], "org/base", out="x")
    assert caught.value.code == "offline"
    assert caught.value.message.startswith("no file or folder named org/one here; on the Hub: ")
    assert seeded.log == []


def test_offline_what_was_fetched_is_folded_again(seeded, monkeypatch):
    merge(["org/one"], "org/base", out="x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seeded.log.clear()
    merge(["org/one"], "org/base", out="y")
    assert bytes_of(Path("x")) == bytes_of(Path("y"))
    assert seeded.log == []


def test_offline_headers_that_were_never_cached_are_said_to_be_missing_there(seeded, monkeypatch):
    inspect("org/one")  # by ranges, which are not kept
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="offline"):
        inspect("org/one")


def test_a_revision_is_pinned_at_the_first_contact(seeded, tmp_path):
    adapter = loratools.load("org/one")
    seeded.put("org/one", write_adapter(tmp_path / "newer", seed=9))
    assert adapter.origin is not None
    again = loratools.load(str(adapter.origin))
    assert again.origin == adapter.origin
    assert loratools.load("org/one").origin != adapter.origin


# ------------------------------------------------------------------------------- --base auto


def test_the_base_that_the_adapters_name_is_taken(seeded):
    merge(["org/one", "me/two"], "auto", out="x", weights=[1, 1])
    merge(["org/one", "me/two"], "org/base", out="y", weights=[1, 1])
    assert bytes_of(Path("x")) == bytes_of(Path("y"))
    assert check(["org/one"], "auto").matched == 4


def test_the_revision_that_an_adapter_names_is_taken(hub, tmp_path):
    old = hub.put("org/base", write_base(tmp_path / "base"))
    hub.put("org/base", {"config.json": "{}"})
    one = write_adapter(tmp_path / "one", base_model_name_or_path="org/base", revision=old.oid)
    plan = check([one], "auto").plan
    assert plan is not None
    assert plan.base.bundle.origin == Origin("org/base", old.oid)


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ([None], "base_unnamed"),
        (["/home/me/llama"], "base_unnamed"),
        (["./llama"], "base_unnamed"),
        (["org/base", None], "base_unnamed"),
        (["org/base", "org/other"], "other_base"),
    ],
)
def test_adapters_that_do_not_name_one_base_are_refused_with_the_reason(seeded, named, code):
    adapters = [
        write_adapter(Path(f"a{n}"), seed=n, base_model_name_or_path=name)
        for n, name in enumerate(named)
    ]
    with pytest.raises(LoratoolsError) as caught:
        check(adapters, "auto")
    assert caught.value.code == code
    assert caught.value.message.startswith("--base auto: ")


# ------------------------------------------------------------------------------- verify


def test_a_published_fold_is_pulled_and_proved(seeded, tmp_path):
    merge(["org/one"], "org/base", out="x")
    seeded.put("me/folded", Path("x"))
    result = verify("me/folded")
    assert (result.ok, result.proved) == (True, "replay"), result.notes
    assert result.checked > 0


def test_a_published_adapter_is_pulled_and_proved(seeded):
    merge(["org/one", "me/two"], out="x", weights=[0.5, 0.5])
    seeded.put("me/merged", Path("x"))
    assert verify("me/merged", require="replay").ok


def test_a_changed_file_of_a_published_output_is_found(seeded):
    merge(["org/one"], "org/base", out="x")
    seeded.put("me/folded", Path("x"))
    seeded.put("me/folded", {"config.json": "{}", "extra.safetensors": b"12345678"})
    result = verify("me/folded")
    assert not result.ok
    assert {m.file for m in result.mismatches} == {"config.json", "extra.safetensors"}


def test_a_published_fold_of_another_tool_is_proved_by_its_inputs(seeded, tmp_path):
    merge(["org/one"], "org/base", out="x")
    Path("x/loratools.json").unlink()
    seeded.put("me/folded", Path("x"))
    result = verify("me/folded", base="org/base", adapters=["org/one"])
    assert (result.ok, result.proved) == (True, "replay")


def test_a_recipe_finds_its_inputs_in_the_cache(seeded, monkeypatch):
    merge(["org/one", "me/two"], "org/base", out="x", weights=[0.7, 0.3])
    seeded.put("org/one", {"adapter_config.json": "{}"})  # main has moved on
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merge([], recipe="x/loratools.json", out="again")
    assert bytes_of(Path("x")) == bytes_of(Path("again"))
    recipes = [
        json.loads(Path(f"{o}/loratools.json").read_text())["recipe"] for o in ("x", "again")
    ]
    assert recipes[0] == recipes[1]


# ------------------------------------------------------------------------------- the program


def test_the_program_takes_addresses(seeded, tmp_path):
    ended = seeded.cli("inspect", "org/one", "--json")
    assert (ended.status, ended.json["format"]) == (0, "peft")
    ended = seeded.cli("merge", "org/one:0.5", "-b", "auto", "-o", tmp_path / "x", "--json")
    assert (ended.status, ended.json["targets"]) == (0, 4)
    ended = seeded.cli("check", "org/one", "--base", "org/none")
    assert ended.status == 10
    assert "org/none" in ended.err


@pytest.mark.parametrize(
    ("token", "repo", "status"), [(None, "me/two", 10), ("hf_wrong", "org/one", 9)]
)
def test_the_program_says_who_may_not_read(seeded, token, repo, status):
    assert seeded.cli("inspect", repo, token=token).status == status


def test_the_program_offline(seeded):
    ended = seeded.cli("inspect", "org/one", env={"HF_HUB_OFFLINE": "1"})
    assert ended.status == 11
    assert "HF_HUB_OFFLINE" in ended.err
    assert seeded.log == []


def test_the_program_without_a_network(seeded):
    ended = seeded.cli("inspect", "org/one", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert ended.status == 11
    assert "no file or folder named org/one here" in ended.err
