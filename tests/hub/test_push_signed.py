"""`push --sign-key`, and what was signed where it is pulled again."""

import subprocess
import sys
from pathlib import Path

import loratools
from tests.hub.keys import pair
from tests.hub.pushed import NAMES, PLAIN, commits, downloaded, held, push, refused


def test_a_signed_push_verifies_where_it_is_pulled(hub, adapter, tmp_path, run):
    private, public = pair(tmp_path)
    ended = run("push", adapter, "me/style", *PLAIN, "--sign-key", private)
    assert ended.status == 0, ended.err
    assert set(held(hub)) == {*NAMES, "model.sig"}
    pulled = downloaded(hub, tmp_path / "pulled")
    program = Path(sys.executable).with_name("model_signing")
    found = subprocess.run(
        [program, "verify", "key", pulled, "--signature", pulled / "model.sig",
         "--public_key", public],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    result = loratools.verify(pulled, key=public)
    assert (result.ok, result.proved, result.signed) == (True, "signature", 2)
    assert private.read_bytes() not in hub.received
    (pulled / "adapter_config.json").write_text("{}")
    ended = run("verify", pulled, "--key", public)
    assert ended.status == 8
    assert "adapter_config.json: is not the file that was signed" in ended.out


def test_what_a_signature_says_is_said_of_the_address(hub, adapter, tmp_path, run):
    private, public = pair(tmp_path)
    _, other = pair(tmp_path, "other")
    push(adapter)
    ended = run("verify", "me/style", "--key", public)
    assert ended.status == 10
    assert "me/style has no model.sig: nobody signed it" in ended.err
    push(adapter, sign_key=private)
    ended = run("verify", "me/style", "--key", other)
    assert ended.status == 8
    assert "model.sig of me/style was made with another key than" in ended.err
    assert str(hub.home) not in ended.err
    hub.put("me/style", {"more.txt": b"x"})
    ended = run("verify", "me/style", "--key", public)
    assert ended.status == 8
    assert "more.txt: is there and was not signed" in ended.out
    assert "1 mismatch\n" in ended.out


def test_a_signed_push_done_again_changes_nothing(hub, adapter, tmp_path):
    private, _ = pair(tmp_path)
    push(adapter, sign_key=private)
    assert push(adapter, sign_key=private).uploaded == 0
    assert commits(hub) == 1
    other, _ = pair(tmp_path, "other")
    assert [f["action"] for f in push(adapter, sign_key=other).files] == ["same", "same", "changed"]


def test_a_signature_covers_a_folder_of_the_repository(hub, adapter, tmp_path):
    private, public = pair(tmp_path)
    push(adapter, sign_key=private, path_in_repo="lora")
    assert "lora/model.sig" in held(hub)
    pulled = downloaded(hub, tmp_path / "pulled")
    assert loratools.verify(pulled / "lora", key=public).ok


def test_a_signature_that_would_not_hold_is_said(hub, adapter, tmp_path):
    private, _ = pair(tmp_path)
    push(adapter, sign_key=private)
    (adapter / "README.txt").write_text("x")
    result = push(adapter, include=["README.txt"])
    assert [p.code for p in result.problems] == ["signature"]
    assert result.problems[0].severity == "warning"
    (adapter / "model.sig").write_bytes(held(hub)["model.sig"])
    caught = refused("signature", adapter, include=["README.txt"])
    assert "--sign-key" in caught.problems[0].advice
    assert push(adapter, "me/again", exclude=["README.txt"]).verified == 3


def test_files_on_the_hub_that_nobody_signed_are_named(hub, adapter, tmp_path):
    private, public = pair(tmp_path)
    hub.put("me/style", {"old.txt": "x"}, private=True)
    result = push(adapter, sign_key=private)
    assert "old.txt" in result.problems[0].message
    found = loratools.verify(downloaded(hub, tmp_path / "pulled"), key=public)
    assert [m.file for m in found.mismatches] == ["old.txt"]


def test_a_key_that_cannot_sign_is_found_before_anything_is_sent(hub, adapter, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ed25519

    private, _ = pair(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    assert "Ed25519" in refused("usage", adapter, sign_key=private).message
    assert hub.log == []
