"""`push` against a Hub on loopback: what it holds afterwards, what it was sent, what stops it."""

import json

import pytest

from loratools.errors import LoratoolsError
from tests.hub.pushed import NAMES, PLAIN, changes, commits, held, local, push, refused
from tests.hub_fixture import running
from tests.hub_server import READ

DRAWN = "kQ7XwV9NmL2OiU5TrE8QaSdF4HjKl6CxvB"  # nobody's token

# ------------------------------------------------------------------------------- what arrives


def test_one_commit_in_a_private_repository_with_these_bytes(hub, adapter):
    ended = hub.cli("push", adapter, "me/style", *PLAIN)
    assert ended.status == 0, ended.err
    assert hub.repos["me/style"].private
    assert commits(hub) == 1
    assert held(hub) == local(adapter)
    assert hub.repos["me/style"].head.files["adapter_model.safetensors"].lfs
    lines = ended.out.splitlines()
    assert lines[0] == "push: adapter -> me/style, new and private"
    assert any(line.startswith("  2 files sent") for line in lines)
    assert "2 of 2 verified on the Hub" in ended.out
    assert f"{hub.url}/me/style" in ended.out


def test_pushed_again_nothing_is_sent(hub, adapter):
    push(adapter)
    before = len(changes(hub))
    result = push(adapter)
    assert (result.uploaded, result.unchanged, result.verified) == (0, 2, 2)
    assert result.commit == hub.repos["me/style"].head.oid
    assert commits(hub) == 1
    assert changes(hub)[before:] == []


def test_only_what_changed_is_sent_and_nothing_is_deleted(hub, adapter):
    hub.put("me/style", {"notes.txt": "mine", "sub/x.safetensors": b"1"}, private=True)
    push(adapter)
    (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text() + "\n"
    )
    puts = len(hub.asked("PUT"))
    result = push(adapter)
    assert [f["action"] for f in result.files] == ["changed", "same"]
    assert result.kept == ("notes.txt", "sub/x.safetensors")
    assert len(hub.asked("PUT")) == puts
    assert held(hub) == {**local(adapter), "notes.txt": b"mine", "sub/x.safetensors": b"1"}


def test_public_when_asked(hub, adapter):
    push(adapter, public=True)
    assert not hub.repos["me/style"].private


def test_an_organisation_a_name_without_owner_and_a_link(hub, adapter):
    assert push(adapter, "team/style").repo == "team/style"
    assert push(adapter, "mine").repo == "me/mine"
    assert push(adapter, f"{hub.url}/me/linked").repo == "me/linked"
    assert push(adapter, "hf://me/linked").uploaded == 0
    assert set(hub.repos) == {"team/style", "me/mine", "me/linked"}


def test_the_json_is_one_object_with_these_keys(hub, adapter, run):
    table = run("push", adapter, "me/style", *PLAIN, "--json", "--tag", "v1").json
    assert (table["repo"], table["visibility"], table["created"]) == ("me/style", "private", True)
    assert table["commit"] == hub.repos["me/style"].head.oid
    assert (table["uploaded"], table["unchanged"], table["verified"]) == (2, 0, 2)
    assert table["url"] == f"{hub.url}/me/style"
    assert table["pr"] is None
    assert table["tag"] == "v1"
    assert {f["path"]: f["storage"] for f in table["files"]} == {
        "adapter_config.json": "regular",
        "adapter_model.safetensors": "lfs",
    }
    assert all(len(f["sha256"]) == 64 and f["action"] == "new" for f in table["files"])


def test_a_folder_of_the_repository(hub, adapter):
    hub.put("me/style", {"model.safetensors": b"mine"}, private=True)
    result = push(adapter, path_in_repo="lora/v2")
    assert set(held(hub)) == {"model.safetensors", *(f"lora/v2/{n}" for n in NAMES)}
    assert result.verified == 2
    assert push(adapter, "me/style:lora/v2").uploaded == 0


def test_large_files_go_in_parts(tmp_path, tmp_path_factory, monkeypatch):
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "big.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.rand(4, 200_000)}, file)
    home = tmp_path_factory.mktemp("hf_home")
    with running(home, monkeypatch, chunk=1_000_000) as hub:
        push(file)
        assert len(hub.asked("PUT", "/part/")) == 4
        assert held(hub)["big.safetensors"] == file.read_bytes()


def test_through_the_xet_storage_where_the_library_can(hub, adapter, tmp_path):
    """hf_xet's own stand-in for its server, a folder; a version that lacks it says so."""
    hub.xet = tmp_path / "xet"
    hub.xet.mkdir()
    ended = hub.cli("push", adapter, "me/style", *PLAIN, env={"HF_HUB_DISABLE_XET": None})
    if ended.status == 0:
        assert hub.asked("GET", "xet-write-token")
        assert set(held(hub)) == NAMES
    else:
        assert ended.status == 11, ended.err


# ------------------------------------------------------------------------------- dry runs


def test_a_dry_run_asks_and_changes_nothing(hub, adapter, run):
    hub.put("me/style", {"adapter_config.json": "{}"}, private=True)
    ended = run("push", adapter, "me/style", "--dry-run", *PLAIN)
    assert ended.status == 0
    assert ended.out.splitlines()[-1] == "Nothing was sent."
    assert "2 files to send" in ended.out
    assert changes(hub) == []
    table = run("push", adapter, "me/style", "-n", *PLAIN, "--json").json
    assert [f["action"] for f in table["files"]] == ["changed", "new"]
    assert table["dry_run"]
    assert table["commit"] is None


def test_a_dry_run_lists_what_the_push_then_sends(hub, adapter):
    planned = push(adapter, dry_run=True)
    assert planned.created
    assert "me/style" not in hub.repos
    pushed = push(adapter)
    assert [(f["path"], f["sha256"], f["action"]) for f in planned.files] == [
        (f["path"], f["sha256"], f["action"]) for f in pushed.files
    ]


def test_a_dry_run_needs_neither_a_login_nor_a_network(hub, adapter):
    alone = hub.cli("push", adapter, "me/style", "-n", *PLAIN, token=None)
    assert alone.status == 0, alone.err
    assert "not compared with the Hub: nobody is logged in" in alone.out
    away = hub.cli("push", adapter, "me/style", "-n", *PLAIN, env={"HF_HUB_OFFLINE": "1"})
    assert away.status == 0
    assert "not compared with the Hub: HF_HUB_OFFLINE=1 is set" in away.out
    assert hub.log == []


# ------------------------------------------------------------------------------- what stops it


@pytest.mark.parametrize(("private", "option"), [(False, "private"), (True, "public")])
def test_a_repository_of_the_other_visibility_stops_it(hub, adapter, private, option):
    hub.put("me/style", {"a.txt": "x"}, private=private)
    assert refused("visibility", adapter, **{option: True}).exit == 5
    assert changes(hub) == []


def test_an_existing_repository_keeps_its_visibility(hub, adapter):
    hub.put("me/style", {"a.txt": "x"}, private=False)
    assert push(adapter).visibility == "public"
    assert not hub.repos["me/style"].private


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_may_only_read_stops_before_any_byte(hub, adapter, exists, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ)
    if exists:
        hub.put("me/style", {"a.txt": "x"}, private=True)
    ended = run("push", adapter, "me/style", *PLAIN)
    assert ended.status == 9
    assert "error[no_access]" in ended.err
    assert hub.asked("PUT") == hub.asked("POST", "preupload|commit|batch") == []


def test_nobody_is_logged_in(hub, adapter, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    ended = run("push", adapter, "me/style", *PLAIN)
    assert ended.status == 9
    assert "hf auth login" in ended.err
    assert hub.log == []


def test_a_bad_token_is_named_by_where_it_comes_from(hub, adapter):
    ended = hub.cli("push", adapter, "me/style", *PLAIN, token="hf_expiredEXPIREDexpiredEXPIRED")
    assert ended.status == 9
    assert "HF_TOKEN" in ended.err
    assert "hf_expired" not in ended.err + ended.out


def test_offline_mode_and_a_host_that_is_down(hub, adapter):
    ended = hub.cli("push", adapter, "me/style", *PLAIN, env={"HF_HUB_OFFLINE": "1"})
    assert ended.status == 11
    assert "push needs the network" in ended.err
    assert hub.log == []
    ended = hub.cli("push", adapter, "me/style", *PLAIN, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert ended.status == 11
    assert "http://127.0.0.1:9" in ended.err


def test_somebody_elses_repository_names_the_pull_request(hub, adapter):
    hub.put("other/style", {"a.txt": "x"}, private=False)
    caught = refused("no_access", adapter, "other/style")
    assert "--create-pr" in caught.problems[0].advice
    assert hub.asked("PUT") == []


def test_what_must_not_leave_never_does(hub, adapter, tmp_path):
    secret = "AKIA" + "J7QX2M9KZP4WT6RB"
    (adapter / ".env").write_text(f"KEY={secret}")
    (adapter / "training_args.bin").write_bytes(b"\x80\x04UNWANTED-PICKLE.")
    (adapter / "notes.txt").write_text("UNWANTED-NOTES")
    (tmp_path / "outside.json").write_text('{"x": "UNWANTED-LINK"}')
    push(adapter)
    assert set(held(hub)) == NAMES
    (adapter / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    refused("links", adapter)
    (adapter / "tokenizer.json").unlink()
    refused("pickled", adapter, include=["training_args.bin"])
    (adapter / "tokenizer_config.json").write_text(json.dumps({"key": secret}))
    caught = refused("secret", adapter)
    assert secret not in caught.message
    assert b"UNWANTED" not in hub.received
    assert secret.encode() not in hub.received
    assert commits(hub) == 1


def test_all_that_is_wrong_is_said_at_once(hub, adapter):
    hub.put("me/style", {"adapter_model-00001-of-00002.safetensors": b"1"}, private=False)
    (adapter / "special_tokens_map.json").write_text(json.dumps({"k": "hf_" + DRAWN}))
    with pytest.raises(LoratoolsError) as caught:
        push(adapter, private=True)
    assert {p.code for p in caught.value.problems} == {"secret", "stale_shards", "visibility"}
    assert changes(hub) == []


def test_shards_of_another_model_stop_it(hub, adapter):
    stale = {
        "adapter_model-00001-of-00002.safetensors": b"1",
        "adapter_model-00002-of-00002.safetensors": b"2",
        "adapter_model.safetensors.index.json": b"{}",
        "model-00001-of-00001.safetensors": b"of another family",
    }
    hub.put("me/style", stale, private=True)
    caught = refused("stale_shards", adapter)
    assert "3 files" in caught.message
    assert "hf repos delete-files me/style adapter_model-00001-of-0" in caught.problems[0].advice
    assert push(adapter, path_in_repo="v2").uploaded == 2


def test_more_files_than_one_commit_takes(hub, adapter):
    for number in range(260):
        (adapter / f"extra{number}.txt").write_text(str(number))
    caught = refused("unpublishable", adapter, include=["extra*.txt"])
    assert "262 files" in caught.message
    assert "me/style" not in hub.repos


# ------------------------------------------------------------------------------- branches, tags


def test_a_branch_is_made_when_asked_and_only_then(hub, adapter):
    hub.put("me/style", {"a.txt": "x"}, private=True)
    before = hub.repos["me/style"].head.oid
    caught = refused("not_found", adapter, revision="dev")
    assert "--create-branch" in caught.problems[0].advice
    assert changes(hub) == []
    result = push(adapter, revision="dev", create_branch=True)
    assert hub.repos["me/style"].head.oid == before
    assert set(held(hub, revision="dev")) == {"a.txt", *NAMES}
    assert result.url == f"{hub.url}/me/style/tree/dev"
    assert push(adapter, "me/style@dev").uploaded == 0


def test_a_branch_of_a_new_repository(hub, adapter):
    push(adapter, revision="dev", create_branch=True)
    assert set(held(hub, revision="dev")) == NAMES
    assert held(hub) == {}


def test_a_tag_names_the_verified_commit_and_is_never_moved(hub, adapter):
    result = push(adapter, tag="v1")
    assert hub.repos["me/style"].refs["refs/tags/v1"] == result.commit
    assert push(adapter, tag="v1").uploaded == 0  # it is there already
    (adapter / "adapter_config.json").write_text("{}\n")
    caught = refused("output_exists", adapter, tag="v1", exclude=["loratools.json"])
    assert "choose another --tag" in caught.problems[0].advice
    assert commits(hub) == 1
    assert hub.repos["me/style"].refs["refs/tags/v1"] == result.commit


def test_hashing_is_told_before_anybody_is_asked(hub, adapter):
    total = sum(p.stat().st_size for p in adapter.iterdir())
    told = []

    def progress(done, of):
        assert hub.log == []
        told.append((done, of))

    push(adapter, dry_run=True, progress=progress)
    assert told[-1] == (total, total)
    assert told == sorted(told)
