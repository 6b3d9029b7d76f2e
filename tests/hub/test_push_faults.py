"""`push` where the Hub or the network fails, or somebody else is at work; and pull requests."""

import shlex
import signal
import threading
import time

import pytest

from tests.hub.pushed import NAMES, PLAIN, changes, commits, held, local, push, refused
from tests.hub_server import OTHER, WRITE


@pytest.mark.parametrize(
    "path", ["/commit/", "/api/repos/create", "auth-check", "/models/me/style$"]
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for(hub, adapter, path, status, caplog):
    hub.fault(".*", path, status, times=2, headers={"Retry-After": "0"})
    result = push(adapter)
    assert commits(hub) == 1
    assert result.verified == 2
    said = [r.getMessage() for r in caplog.records if "trying again" in r.getMessage()]
    assert len(said) == 2
    assert f"the Hub answers {status}; trying again in 0 s (1 of 4)" in said[0]


def test_a_busy_hub_is_not_waited_for_without_end(hub, adapter):
    hub.fault("POST", "/commit/", 503, times=9, headers={"Retry-After": "0"})
    caught = refused("network", adapter)
    assert len(hub.asked("POST", "/commit/")) == 5
    assert "the private repository me/style" in caught.message
    assert "loratools push" in caught.problems[0].advice


def test_a_wait_that_is_too_long_is_said_instead(hub, adapter):
    hub.fault("POST", "/commit/", 429, headers={"Retry-After": "86400"})
    caught = refused("network", adapter)
    assert len(hub.asked("POST", "/commit/")) == 1
    assert "86400" in caught.problems[0].advice


def test_an_answer_that_is_lost_leaves_one_commit(hub, adapter, run):
    hub.fault("POST", "/commit/", "drop-after-apply")
    ended = run("push", adapter, "me/style", *PLAIN)
    assert ended.status == 0, ended.err
    assert "only the answer to it was lost" in ended.err
    assert commits(hub) == 1
    assert held(hub) == local(adapter)


def test_a_connection_that_ends_before_is_tried_again(hub, adapter):
    hub.fault("POST", "/commit/", "drop")
    assert push(adapter).verified == 2
    assert commits(hub) == 1


def test_a_repository_that_moves_meanwhile(hub, adapter):
    """Somebody else commits between the look and ours."""
    hub.put("me/style", {"a.txt": "x"}, private=True)
    hub.fault("POST", "/preupload/", slow=0.7)
    before = hub.repos["me/style"].head.oid

    def meddle():
        wait_for(lambda: hub.asked("POST", "/preupload/"))
        hub.put("me/style", {"theirs.txt": "x"})

    meddling = threading.Thread(target=meddle)
    meddling.start()
    caught = refused("remote_changed", adapter)
    meddling.join()
    assert caught.exit == 7
    now = hub.repos["me/style"].head.oid
    assert f"moved from {before[:12]} to {now[:12]}" in caught.message
    assert set(held(hub)) == {"a.txt", "theirs.txt"}
    assert push(adapter).uploaded == 2


def test_a_file_that_changes_while_it_is_sent_is_not_committed(hub, adapter):
    weights = adapter / "adapter_model.safetensors"
    hub.fault("PUT", "", slow=0.7)

    def meddle():
        wait_for(lambda: hub.asked("POST", "/objects/batch"))
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")

    meddling = threading.Thread(target=meddle)
    meddling.start()
    caught = refused("input_changed", adapter)
    meddling.join()
    assert "adapter_model.safetensors was written to" in caught.message
    assert commits(hub) == 0


def test_a_large_file_is_hashed_once(hub, adapter, monkeypatch):
    def hashed(*_):
        raise AssertionError("the library hashes what is hashed already")

    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", hashed)
    assert push(adapter).verified == 2


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_bytes_that_are_not_ours_on_the_hub_are_found(hub, adapter):
    hub.fault("POST", "/commit/", slow=0.7)

    def spoil():
        wait_for(lambda: hub.asked("POST", "/commit/"))
        for digest in hub.stored:
            hub.stored[digest] = hub.stored[digest][:-1] + b"!"

    spoiling = threading.Thread(target=spoil)
    spoiling.start()
    caught = refused("proof_failed", adapter)
    spoiling.join()
    assert caught.exit == 8
    assert "adapter_model.safetensors: the Hub holds" in caught.message
    assert "commit " in caught.message


def test_a_failed_upload_says_what_is_there_and_goes_on_from_it(hub, adapter, run):
    hub.fault("PUT", "/put/", 403, times=9)
    ended = run("push", adapter, "me/style", *PLAIN, "--commit-message", "it's mine")
    assert ended.status == 9, ended.err
    assert "on the Hub already: the private repository me/style" in ended.err
    line = next(li for li in ended.err.splitlines() if "to go on: " in li)
    again = shlex.split(line.partition("to go on: ")[2])
    assert again[:4] == ["loratools", "push", str(adapter), "me/style"]
    hub.faults.clear()
    ended = run(*again[1:])
    assert ended.status == 0, ended.err
    assert hub.repos["me/style"].head.title == "it's mine"


def test_stopped_in_the_middle_it_says_how_to_go_on(hub, adapter):
    hub.fault("POST", "/commit/", slow=30)
    child = hub.start_cli("push", str(adapter), "me/style", *PLAIN)
    wait_for(lambda: hub.asked("POST", "/commit/"))
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 130
    assert f"to go on: loratools push {adapter} me/style --card none" in err
    assert "interrupted" in err
    assert WRITE not in out + err


# ------------------------------------------------------------------------------- pull requests


def test_a_pull_request_to_somebody_elses_repository(hub, adapter):
    hub.put("other/style", {"a.txt": "x"}, private=False)
    before = hub.repos["other/style"].head.oid
    ended = hub.cli("push", adapter, "other/style", "--create-pr", *PLAIN)
    assert ended.status == 0, ended.err
    there = hub.repos["other/style"]
    assert there.head.oid == before
    assert set(there.at("refs/pr/1").files) == {"a.txt", ".gitattributes", *NAMES}
    assert f"{hub.url}/other/style/discussions/1" in ended.out
    assert "a draft" in ended.out
    assert "loratools inspect other/style@refs/pr/1" in ended.out


def test_a_pull_request_is_gone_on_with_and_no_second_one_opened(hub, adapter, run):
    hub.put("other/style", {"a.txt": "x"}, private=False)
    hub.fault("POST", "/commit/", 503, times=5, headers={"Retry-After": "0"})
    ended = run("push", adapter, "other/style", "--create-pr", *PLAIN)
    assert ended.status == 11
    assert "pull request 1" in ended.err
    line = next(li for li in ended.err.splitlines() if "to go on: " in li)
    again = shlex.split(line.partition("to go on: ")[2])
    assert again[-2:] == ["--revision", "refs/pr/1"] or "refs/pr/1" in again
    assert "--create-pr" not in again
    ended = run(*again[1:])
    assert ended.status == 0, ended.err
    there = hub.repos["other/style"]
    assert list(there.pulls) == [1]
    assert set(there.at("refs/pr/1").files) == {"a.txt", ".gitattributes", *NAMES}
    assert push(adapter, "other/style", revision="refs/pr/1").uploaded == 0


def test_a_pull_request_that_would_change_nothing_is_not_opened(hub, adapter):
    hub.put("other/style", adapter, private=False)
    result = push(adapter, "other/style", create_pr=True)
    assert (result.uploaded, result.pr) == (0, None)
    assert hub.repos["other/style"].pulls == {}


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, adapter):
    hub.put("other/style", {"a.txt": "x"}, private=False)
    hub.fault("POST", "/discussions$", "drop-after-apply")
    caught = refused("network", adapter, "other/style", create_pr=True)
    assert f"{hub.url}/other/style/discussions" in caught.problems[0].advice
    assert caught.problems[0].advice.endswith(" other/style --revision refs/pr/N --card none")
    assert list(hub.repos["other/style"].pulls) == [1]
    assert push(adapter, "other/style", revision="refs/pr/1").verified == 2


def test_a_pull_request_needs_a_repository(hub, adapter):
    refused("not_found", adapter, "other/nowhere", create_pr=True)
    assert changes(hub) == []


def test_an_owner_asks_for_a_pull_request_too(hub, adapter, monkeypatch):
    hub.put("other/style", {"a.txt": "x"}, private=True)
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert push(adapter, "other/style", create_pr=True).pr == 1
    assert set(held(hub, "other/style")) == {"a.txt"}
