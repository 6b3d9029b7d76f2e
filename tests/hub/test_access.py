"""Every fault of the Hub that the real client meets becomes ours: code, exit status, words."""

import re
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    close_session,
    constants,
    hf_hub_download,
    snapshot_download,
)

from loratools.errors import LoratoolsError, error
from loratools.hub.access import api, endpoint, offline, scrubbed, token_source, translated
from tests.hub_fixture import point_to
from tests.hub_server import READ, WRITE

RESUME = "loratools push out me/x"


@contextmanager
def refused(code, exit, words="", remedy="", **more):
    """The block's fault comes out as ours, with these words in it and no token."""
    with pytest.raises(LoratoolsError) as caught, translated("push to me/x", repo="me/x", **more):
        yield caught
    ours = caught.value
    assert (ours.code, ours.exit) == (code, exit), ours.message
    assert ours.message.startswith("push to me/x: ")
    assert words in ours.message
    (problem,) = ours.problems
    assert remedy in problem.advice
    for text in (ours.message, problem.advice):
        assert not re.search(r"hf_(write|read|other|bad|very)", text), text
        assert text.isprintable()


def commit(hub_api=None, path="a.txt", held=b"1", **more):
    operations = [CommitOperationAdd(path, held)]
    return (hub_api or api()).create_commit("me/x", operations, commit_message="m", **more)


def without_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def test_the_client_asks_the_hub_that_the_environment_names(hub):
    hub.put("me/x", {}, private=True)
    assert api().model_info("me/x").private
    assert endpoint() == hub.url
    assert all("loratools/" in a.headers["user-agent"] for a in hub.asked("GET", "/models/"))


def test_our_own_errors_and_those_of_python_pass(hub):
    for cause in (error("usage", "x"), KeyError("x"), ValueError("x"), OSError(28, "full")):
        with pytest.raises(type(cause)) as caught, translated("x"):
            raise cause
        assert caught.value is cause
    with pytest.raises(ConnectionResetError), translated("x"):
        raise ConnectionResetError("of a pipe of ours")
    with pytest.raises(KeyboardInterrupt), translated("x"):
        raise KeyboardInterrupt


def test_nobody_is_logged_in(hub, monkeypatch):
    without_token(monkeypatch)
    hub.put("me/x", {})
    with refused("not_logged_in", 9, "nobody is logged in", "hf auth login"):
        api().whoami()
    with refused("not_logged_in", 9, "nobody is logged in", "hf auth login"):
        commit()
    assert token_source() is None


def test_a_bad_token_and_where_it_comes_from(hub, monkeypatch):
    hub.put("me/x", {})
    bad = "hf_bad" + "bad" * 10
    monkeypatch.setenv("HF_TOKEN", bad)
    with refused("not_logged_in", 9, "refuses HF_TOKEN; it goes before", "hf auth login"):
        commit()
    with refused("not_logged_in", 9, "HF_TOKEN"):
        api().whoami()
    without_token(monkeypatch)
    (hub.home / "token").write_text(bad)
    with refused("not_logged_in", 9, f"the token in {hub.home}/token"):
        commit()


def test_a_token_that_no_header_can_carry(hub, monkeypatch):
    hub.put("me/x", {})
    for odd in ("hf_very\x01secret", "hf_very\nsecret", "hf_verysécret", "hf_very secret"):
        monkeypatch.setenv("HF_TOKEN", odd + "t" * 20)
        with refused("not_logged_in", 9, "HF_TOKEN"):
            commit()


def test_a_token_that_may_only_read(hub):
    hub.put("me/x", {})
    reader = HfApi(token=READ)
    assert reader.create_repo("me/x", exist_ok=True)
    with refused("no_access", 9, "may not do this with me/x", "--create-pr"):
        reader.auth_check("me/x", write=True)
    with refused("no_access", 9, "may not do this with me/x"):
        commit(reader)
    assert hub.asked("PUT") == []


def test_a_name_space_of_others(hub):
    with refused("no_access", 9, "under other", "--create-pr"):
        api().create_repo("other/new")


def test_a_repository_that_cannot_be_seen(hub, monkeypatch):
    hub.put("other/x", {"a.txt": "1"}, private=True)
    for repo in ("other/x", "other/none"):
        with refused("not_found", 10, f"not on {hub.url}, or it is private and the account of HF"):
            api().repo_info(repo)
        with refused("not_found", 10, "or it is private"):
            hf_hub_download(repo, "a.txt")
    without_token(monkeypatch)
    with refused("not_found", 10, "private and nobody is logged in", "hf auth login"):
        api().repo_info("other/x")


def test_a_gated_repository(hub, monkeypatch):
    hub.put("other/x", {"a.txt": "1"}, gated="manual")
    with refused("gated", 10, "me/x is gated", f"{hub.url}/me/x"):
        hf_hub_download("other/x", "a.txt")
    with refused("gated", 10, "me/x is gated"):
        snapshot_download("other/x")
    without_token(monkeypatch)
    with refused("gated", 10, "gated", "hf auth login"):
        hf_hub_download("other/x", "a.txt")


def test_a_branch_or_a_file_that_is_not_there(hub):
    hub.put("me/x", {})
    with refused("not_found", 10, "(revision v9)", "--create-branch", revision="v9"):
        commit(revision="v9")
    with refused("not_found", 10, "no branch, tag or commit"):
        hf_hub_download("me/x", "a.txt", revision="v9")
    with refused("not_found", 10, "me/x has no file sub/no name.txt"):
        hf_hub_download("me/x", "sub/no name.txt")
    with refused("not_found", 10, "me/x has no file none"):
        list(api().list_repo_tree("me/x", "none"))


def test_a_name_that_cannot_be_one(hub):
    for name in ("a/b/c", "a--b", "me/.x"):
        with refused("usage", 2, "", "org/name"):
            api().repo_info(name)
    assert hub.log == []


def test_a_card_that_the_hub_refuses(hub):
    hub.put("me/x", {})
    card = b"---\nbase_model: /home/me/base\n---\n"
    with refused("card", 5, '"base_model" with value "/home/me/base" is not valid'):
        commit(path="README.md", held=card)
    hub.fault("POST", "/commit/", 400, words="Invalid metadata in README.md: bad")
    with refused("card", 5, "Invalid metadata in README.md: bad"):
        commit(path="README.md")


def test_a_branch_that_moved(hub):
    head = hub.put("me/x", {}).oid
    hub.put("me/x", {"b.txt": "2"})
    with refused("remote_changed", 7, "me/x changed meanwhile", f"; then: {RESUME}", resume=RESUME):
        commit(parent_commit=head)


def test_too_many_requests(hub):
    hub.put("me/x", {})
    limit = {"RateLimit": '"api";r=0;t=55'}
    hub.fault("POST", "/commit/", 429, headers=limit)
    with refused("network", 11, "too many requests", "wait 55 seconds"):
        commit()
    hub.fault("GET", "/api/models/me/x", 429, headers={"Retry-After": "7"})
    with refused("network", 11, "429", "wait 7 seconds; then: " + RESUME, resume=RESUME):
        api().repo_info("me/x")
    hub.fault("GET", "/whoami", 429)
    with refused("network", 11, "too many", "wait some minutes"):
        api().whoami()


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_the_hub_has_a_fault_of_its_own(hub, status):
    hub.put("me/x", {})
    hub.fault("POST", "/commit/", status, words="the database is away")
    with refused("network", 11, f"answers {status}: the database is away", "not moved twice"):
        commit()


@pytest.mark.parametrize(
    ("status", "code", "exit", "remedy"),
    [(402, "no_access", 9, "/settings/billing"), (413, "network", 11, "fewer")],
)
def test_too_much(hub, status, code, exit, remedy):
    hub.put("me/x", {})
    hub.fault("POST", "/commit/", status, words="quota of me: 100 GB")
    with refused(code, exit, f"{status}: quota of me: 100 GB", remedy):
        commit()


def test_a_file_that_does_not_get_through(hub):
    hub.put("me/x", {})
    hub.fault("PUT", "/put/", 403, words="Request has expired")
    with refused("no_access", 9, "Request has expired"):
        commit(path="a.bin")
    hub.fault("PUT", "/put/", 400, words="BadDigest")
    with refused("network", 11, "answers 400: BadDigest"):
        commit(path="a.bin")


def test_an_error_for_one_object(hub, monkeypatch):
    from tests import hub_pages

    def batch(here, id):
        objects = [
            o | {"error": {"code": 422, "message": "no"}} for o in here.asked.json["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    pages = [p if "/batch" not in p[1].pattern else (*p[:2], batch) for p in hub_pages.HUB]
    monkeypatch.setattr(hub_pages, "HUB", pages)
    hub.put("me/x", {})
    with refused("network", 11, "LFS batch API returned errors"):
        commit(path="a.bin")


@pytest.mark.parametrize("what", ["drop", "drop-after-apply"])
def test_a_connection_that_ends(hub, what):
    hub.put("me/x", {})
    hub.fault("POST", "/commit/", what)
    with refused("network", 11, hub.url, "not moved twice", resume=RESUME) as caught:
        commit()
    assert RESUME in caught.value.problems[0].advice


@pytest.fixture
def nowhere() -> str:
    """A port on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_host_that_is_down(hub, nowhere, monkeypatch):
    point_to(nowhere, monkeypatch)
    with refused("network", 11, f"{nowhere}: "):
        api().repo_info("me/x")
    with refused("network", 11, nowhere):
        snapshot_download("me/x")
    with refused("network", 11):
        api().resolve_revision("me/x", revision="main")


def test_a_proxy_that_is_down(hub, nowhere, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", nowhere.replace("://", "://me:secret@"))
    close_session()
    with refused("network", 11, hub.url, "HTTP_PROXY names 127.0.0.1") as caught:
        api().repo_info("me/x")
    assert "secret" not in str(caught.value.problems)
    assert hub.log == []


def test_something_that_is_not_the_hub(hub, monkeypatch):
    hub.put("me/x", {"a.txt": "1"})
    from tests import hub_downloads

    monkeypatch.setattr(hub_downloads, "part", lambda here, blob, headers: b"<html>hello</html>")
    with refused("network", 11, "is not the Hub", "HF_ENDPOINT"):
        hf_hub_download("me/x", "a.txt")


def test_offline_mode(hub, monkeypatch):
    oid = hub.put("me/x", {"a.txt": "1", "b.txt": "2"}).oid
    hf_hub_download("me/x", "a.txt", revision=oid)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert offline()
    asked = len(hub.log)
    with refused("offline", 11, "HF_HUB_OFFLINE=1 is set"):
        api().repo_info("me/x")
    with refused("offline", 11, "the cache lacks"):
        hf_hub_download("me/x", "b.txt", revision=oid)
    with refused("offline", 11, "HF_HUB_OFFLINE=1"):
        api().resolve_revision("me/none", revision="main")
    assert hf_hub_download("me/x", "a.txt", revision=oid)
    assert len(hub.log) == asked


XET = """
import sys
from loratools.errors import LoratoolsError
from loratools.hub.access import api, translated
try:
    with translated("push to me/x"):
        api().hf_hub_download("me/x", "w.safetensors")
except LoratoolsError as ours:
    print(ours.code, ours.exit, ours.message, ours.problems[0].advice)
"""


def test_the_other_stack_of_large_files(hub, nowhere):
    from dataclasses import replace

    from tests.hub_repos import Blob

    hub.put("me/x", {"w.safetensors": replace(Blob(b"12345", lfs=True), xet="ab" * 32)})
    hub.xet = hub.home / "cas"
    ended = subprocess.run(
        [sys.executable, "-c", XET],
        env=hub.env(HF_HUB_DISABLE_XET="0"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.stdout.startswith("network 11 push to me/x: "), ended.stderr
    assert WRITE not in ended.stdout + ended.stderr


def test_a_token_stays_where_it_is(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "old-style-secret")
    (hub.home / "token").write_text("api_stored\n")
    said = scrubbed(
        "api_stored old-style-secret Bearer abc.def hf_abcdefghijklmnopqrstuvwxyz "
        "https://me:pw@host/x?sig=1&b=2 'https://host/y?sig=3'"
    )
    assert said == ("<token> <token> Bearer <token> <token> https://host/x 'https://host/y'")


def test_what_a_server_says_is_made_safe(hub):
    hub.put("me/x", {})
    hub.fault("POST", "/commit/", 403, words=f"\t{WRITE} " + "long " * 200)
    with refused("no_access", 9, "<token>") as caught:
        commit()
    assert len(caught.value.message) < 400
