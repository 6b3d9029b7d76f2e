"""The test Hub is one to the real client: uploads, pull requests, ranges, links, faults."""

import hashlib
import threading
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    close_session,
    constants,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from tests.hub_fixture import Hub
from tests.hub_server import OTHER, READ, Blob

CARD = "---\nbase_model: org/base\ntags:\n- lora\nlicense: mit\n---\nhello\n"
WEIGHTS = bytes(range(256)) * 40_000  # 10 MB


@pytest.fixture
def api() -> HfApi:
    disable_progress_bars()
    return HfApi(endpoint=constants.ENDPOINT)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "f" / "sub").mkdir(parents=True)
    (tmp_path / "f" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "f" / "README.md").write_text(CARD)
    (tmp_path / "f" / "sub" / "empty.txt").write_text("")
    return tmp_path / "f"


def add(path, held=b"x"):
    return CommitOperationAdd(path, held)


def test_a_folder_goes_up_and_comes_down(hub, api, folder, tmp_path):
    made = api.create_repo("me/x", private=True)
    assert made.repo_id == "me/x"
    assert hub.repos["me/x"].private
    api.create_repo("me/x", exist_ok=True)
    oid = api.upload_folder(repo_id="me/x", folder_path=folder).oid
    assert hub.repos["me/x"].head.oid == oid
    assert hub.repos["me/x"].files["model.safetensors"].lfs
    assert not hub.repos["me/x"].files["sub/empty.txt"].lfs
    assert [c.title for c in api.list_repo_commits("me/x")] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]
    puts = len(hub.asked("PUT"))
    assert api.upload_folder(repo_id="me/x", folder_path=folder).oid == oid
    assert len(hub.asked("PUT")) == puts
    assert not api.verify_repo_checksums("me/x", local_dir=folder, revision=oid).mismatches
    down = snapshot_download("me/x", local_dir=tmp_path / "down")
    for file in folder.rglob("*.*"):
        assert (tmp_path / down / file.relative_to(folder)).read_bytes() == file.read_bytes()
    asked = len(hub.log)
    snapshot_download("me/x", revision=oid)
    assert len(hub.log) > asked
    asked = len(hub.log)
    snapshot_download("me/x", revision=oid)
    assert len(hub.log) == asked


def test_what_is_told_of_a_repository(hub, api):
    hub.put("org/x", {"README.md": CARD, "a/b.safetensors": b"123", "a/c.txt": "12"}, gated="auto")
    said = api.model_info("org/x", files_metadata=True)
    by_name = {s.rfilename: s for s in said.siblings}
    assert by_name["a/b.safetensors"].lfs.sha256 == hashlib.sha256(b"123").hexdigest()
    assert by_name["a/c.txt"].size == 2
    assert (said.private, said.gated, said.author) == (False, "auto", "org")
    assert said.card_data.base_model == "org/base"
    assert said.tags == ["lora", "base_model:org/base"]
    assert api.model_info("org/x", expand=["sha", "gated"]).sha == hub.repos["org/x"].head.oid
    assert api.repo_exists("org/x")
    assert not api.repo_exists("org/y")
    assert api.revision_exists("org/x", "main")
    assert not api.revision_exists("org/x", "other")
    entries = list(api.list_repo_tree("org/x", recursive=True, expand=True))
    assert [e.path for e in entries] == [
        *(".gitattributes", "README.md", "a", "a/b.safetensors", "a/c.txt")
    ]
    assert [e.path for e in api.list_repo_tree("org/x")] == [".gitattributes", "README.md", "a"]
    assert [e.path for e in api.list_repo_tree("org/x", "a")] == ["a/b.safetensors", "a/c.txt"]
    found = api.get_paths_info("org/x", ["a", "a/c.txt", "none"], expand=True)
    assert [f.path for f in found] == ["a", "a/c.txt"]
    assert api.whoami()["name"] == "me"


def test_a_long_tree_comes_in_pages(hub, api):
    hub.entries = 10
    hub.put("org/x", {f"{n:02}.txt": str(n) for n in range(34)})
    assert len(api.list_repo_files("org/x")) == 35
    assert len(hub.asked("GET", "/tree/")) == 4


def test_branches_and_tags(hub, api):
    commit = hub.put("me/x", {"a.txt": "1"})
    api.create_branch("me/x", branch="feature/a")
    with pytest.raises(HfHubHTTPError):
        api.create_branch("me/x", branch="feature/a")
    api.create_branch("me/x", branch="feature/a", exist_ok=True)
    api.create_commit("me/x", [add("b.txt")], commit_message="b", revision="feature/a")
    assert "b.txt" not in hub.repos["me/x"].files
    assert "b.txt" in hub.repos["me/x"].at("feature/a").files
    api.create_tag("me/x", tag="v1", revision=commit.oid)
    refs = api.list_repo_refs("me/x")
    assert {b.name for b in refs.branches} == {"main", "feature/a"}
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", commit.oid)]
    assert hf_hub_download("me/x", "a.txt", revision="v1").endswith(f"{commit.oid}/a.txt")
    api.delete_tag("me/x", tag="v1")
    api.delete_branch("me/x", branch="feature/a")
    assert set(hub.repos["me/x"].refs) == {"refs/heads/main"}


def test_one_commit_adds_and_removes(hub, api):
    head = hub.put("me/x", {"a.txt": "1", "sub/b.txt": "2"}).oid
    made = api.create_commit(
        "me/x",
        [add("c.safetensors"), CommitOperationDelete("sub/"), CommitOperationDelete("a.txt")],
        commit_message="m",
        commit_description="d",
        parent_commit=head,
    )
    now = hub.repos["me/x"].head
    assert (now.oid, now.parent, now.title, now.message) == (made.oid, head, "m", "d")
    assert set(now.files) == {".gitattributes", "c.safetensors"}
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit("me/x", [add("d.txt")], commit_message="m", parent_commit=head)
    assert caught.value.response.status_code == 412


def test_pull_requests(hub, api):
    hub.put("other/x", {"a.txt": "1"})
    main = hub.repos["other/x"].head.oid
    made = api.create_commit("other/x", [add("b.txt")], commit_message="b", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    pull = api.create_pull_request("other/x", title="two", description="why")
    assert (pull.num, pull.git_reference, pull.status) == (2, "refs/pr/2", "draft")
    api.create_commit("other/x", [add("c.bin")], commit_message="c", revision="refs/pr/2")
    assert hub.repos["other/x"].head.oid == main
    assert hf_hub_download("other/x", "c.bin", revision="refs/pr/2")
    assert [d.num for d in api.get_repo_discussions("other/x")] == [1, 2]
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request("other/x", 2)
    HfApi(token=OTHER).merge_pull_request("other/x", 2)
    assert "c.bin" in hub.repos["other/x"].files
    assert api.get_discussion_details("other/x", 2).merge_commit_oid
    api.comment_discussion("other/x", 1, comment="hello")
    api.change_discussion_status("other/x", 1, "closed")
    assert hub.repos["other/x"].pulls[1].status == "closed"


def test_large_files_go_up_in_parts(hub, api):
    hub.chunk = 4_000_000
    hub.put("me/x", {})
    api.create_commit("me/x", [add("w.safetensors", WEIGHTS)], commit_message="w")
    assert [a.size for a in hub.asked("PUT", "/part/")] == [4_000_000, 4_000_000, 2_240_000]
    assert hub.repos["me/x"].files["w.safetensors"].content == WEIGHTS


def test_links_to_the_second_origin_carry_no_token(hub, api):
    hub.redirect = True
    hub.put("me/x", {"w.safetensors": WEIGHTS, "a.txt": "1"}, private=True)
    assert Path(hf_hub_download("me/x", "w.safetensors")).read_bytes() == WEIGHTS
    (link,) = [a for a in hub.log if not a.is_hub]
    assert link.token is None
    refused = get_session().get(hub.cdn + link.url, headers={"Authorization": "Bearer x"})
    assert refused.status_code == 400
    assert hf_hub_download("me/x", "a.txt")


@pytest.mark.parametrize("redirect", [False, True])
def test_ranges(hub, redirect):
    hub.redirect = redirect
    hub.put("org/x", {"w.safetensors": bytes(range(100))})
    url = hub.url + "/org/x/resolve/main/w.safetensors"

    def part(wanted):
        return get_session().get(url, headers={"Range": wanted}, follow_redirects=True)

    assert part("bytes=10-19").content == bytes(range(10, 20))
    assert part("bytes=10-19").headers["Content-Range"] == "bytes 10-19/100"
    assert part("bytes=90-").content == bytes(range(90, 100))
    assert part("bytes=-5").content == bytes(range(95, 100))
    assert part("bytes=90-1000").status_code == 206
    assert part("bytes=100-").status_code == 416


def test_a_huge_file_costs_nothing(hub, api):
    header = b'{"t":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
    held = len(header).to_bytes(8, "little") + header
    blob = Blob(held, lfs=True, claimed=len(held) + 4_000_000_000)
    hub.put("org/x", {"model.safetensors": blob})
    assert api.get_safetensors_metadata("org/x").parameter_count == {"F32": 10**9}
    assert hub.sent < 200_000
    with pytest.raises(HfHubHTTPError):
        api.get_sharded_safetensors_metadata("org/x")


def test_who_may_do_what(hub, api):
    hub.put("me/mine", {"a.txt": "1"}, private=True)
    hub.put("other/theirs", {"a.txt": "1"}, private=True)
    hub.put("other/gated", {"a.txt": "1"}, gated="manual")
    api.auth_check("me/mine", write=True)
    for repo in ("other/theirs", "other/gated", "other/none"):
        with pytest.raises(HfHubHTTPError):
            api.auth_check(repo)
    with pytest.raises(HfHubHTTPError):
        HfApi(token=READ).auth_check("me/mine", write=True)
    HfApi(token=READ).auth_check("me/mine")
    hub.repos["other/gated"].accepted.add("me")
    api.auth_check("other/gated")
    api.delete_repo("me/mine")
    assert "me/mine" not in hub.repos


@pytest.mark.parametrize("status", ["drop", "drop-after-apply", 503])
def test_faults_happen_as_often_as_they_should(hub, api, status):
    hub.put("me/x", {})
    hub.fault("POST", "/commit/main", status)
    close_session()
    with pytest.raises((httpx2.RemoteProtocolError, HfHubHTTPError)):
        api.create_commit("me/x", [add("a.txt")], commit_message="a")
    assert ("a.txt" in hub.repos["me/x"].files) == (status == "drop-after-apply")
    api.create_commit("me/x", [add("a.txt")], commit_message="a")
    assert [c.title for c in hub.repos["me/x"].history()] == ["a", "seeded", "initial commit"]


def test_a_download_that_was_cut_goes_on(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**20)
    hub.put("org/x", {"w.safetensors": WEIGHTS})
    hub.fault("GET", "w.safetensors", "cut")
    assert Path(hf_hub_download("org/x", "w.safetensors")).read_bytes() == WEIGHTS
    assert hub.asked("GET", "w.safetensors")[-1].headers["range"] == f"bytes={4 * 2**20}-"


def test_a_missing_file_says_at_which_commit(hub):
    commit = hub.put("org/x", {})
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        hf_hub_download("org/x", "none.txt")
    assert caught.value.response.headers["X-Repo-Commit"] == commit.oid


def test_a_card_the_hub_refuses(hub, api):
    hub.put("me/x", {})
    with pytest.raises(ValueError, match="base_model"):
        api.create_commit(
            "me/x", [add("README.md", b"---\nbase_model: ./local/dir\n---\n")], commit_message="m"
        )
    assert hub.asked("POST", "/commit/") == []


def test_bytes_that_are_not_what_was_announced_are_refused(hub):
    sha = hashlib.sha256(b"right").hexdigest()
    answer = get_session().put(f"{hub.cdn}/put/{sha}", content=b"wrong")
    assert answer.status_code == 400
    assert hub.stored == {}
    assert b"wrong" in hub.received


def test_many_at_once(hub):
    hub.put("org/x", {f"{n}.txt": str(n) for n in range(20)})
    found = {}

    def get(n):
        found[n] = httpx2.get(f"{hub.url}/org/x/resolve/main/{n}.txt").text

    threads = [threading.Thread(target=get, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(20)}


def test_the_command_line_finds_this_hub(hub):
    ended = hub.cli("--version")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("loratools ")


def test_two_hubs_at_once(hub, tmp_path):
    with Hub(tmp_path) as second:
        second.put("org/x", {"a.txt": "second"})
        assert HfApi(endpoint=second.url).repo_exists("org/x")
        assert not HfApi(endpoint=hub.url).repo_exists("org/x")
