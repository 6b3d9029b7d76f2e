"""Files on the Hub, read by ranges and fetched into the library's cache."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, scan_cache_dir

from loratools.adapter import Origin
from loratools.commands.check import check
from loratools.containers.local import LocalFile
from loratools.errors import MalformedError, NetworkError, NotFoundError, StorageError
from loratools.hub import ranges, remote
from loratools.hub.address import Address
from tests import hub_downloads
from tests.hub_pages import Answer
from tests.hub_repos import Blob
from tests.sparse_files import sparse

NUMBERS = bytes(range(256)) * 4096  # 1 MB of which each place tells its own


def fetched_bytes(hub) -> int:
    return sum(a.sent for a in hub.asked("GET", "/resolve/"))


# ------------------------------------------------------------------------------- ranges


@pytest.fixture
def file(hub):
    hub.put("org/big", {"numbers.bin": NUMBERS})
    return remote.bundle(Address("org/big")).open("numbers.bin")


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 1), (7, 8), (65_535, 2), (65_536, 65_536), (1, 200_000), (len(NUMBERS) - 3, 3)],
)
def test_a_range_is_the_bytes_of_the_file(file, offset, length):
    assert file.size == len(NUMBERS)
    assert file.read(offset, length) == NUMBERS[offset : offset + length]


def test_reads_in_any_order_are_the_bytes_and_what_is_known_is_not_asked_for_again(hub, file):
    for offset in (900_000, 0, 400_000, 100, 70_000, 400_100, 901_000):
        assert file.read(offset, 100) == NUMBERS[offset : offset + 100]
    assert len(hub.asked("GET", "numbers.bin")) == 4
    assert fetched_bytes(hub) == 4 * ranges.BLOCK


def test_a_long_read_is_one_request_and_nothing_of_it_is_kept(hub, monkeypatch):
    monkeypatch.setattr(ranges, "LARGE", 100_000)
    hub.put("org/big", {"numbers.bin": NUMBERS})
    file = remote.bundle(Address("org/big")).open("numbers.bin")
    assert file.read(5, 500_000) == NUMBERS[5:500_005]
    assert [a.headers["range"] for a in hub.asked("GET", "numbers.bin")] == ["bytes=5-500004"]


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, -1), (len(NUMBERS), 1)])
def test_bytes_that_the_file_has_not_are_an_error(file, offset, length):
    with pytest.raises(StorageError, match="were asked for"):
        file.read(offset, length)


def test_a_connection_that_ends_early_goes_on_where_it_ended(hub, file):
    hub.fault("GET", "numbers.bin", "cut", times=2)
    assert file.read(0, 300_000) == NUMBERS[:300_000]
    assert len(hub.asked("GET", "numbers.bin")) == 3
    starts = [a.headers["range"] for a in hub.asked("GET", "numbers.bin")]
    assert len(set(starts)) == 3, "what has arrived is not asked for again"


def test_a_connection_that_always_ends_early_is_an_error(hub, file):
    hub.fault("GET", "numbers.bin", "cut", times=100)
    with pytest.raises(NetworkError, match="ended after"):
        file.read(0, len(NUMBERS))


def test_what_failed_just_now_is_not_tried_again_by_the_next_reader(hub, file, monkeypatch):
    hub.fault("GET", "numbers.bin", "cut", times=9)
    monkeypatch.setattr(ranges, "ATTEMPTS", 2)
    with pytest.raises(NetworkError) as first:
        file.read(0, 100_000)
    asked = len(hub.log)
    with pytest.raises(NetworkError) as second:
        file.read(0, 8)
    assert second.value is first.value
    assert len(hub.log) == asked
    hub.faults.clear()
    monkeypatch.setattr(ranges, "RESPITE", 0.0)
    assert file.read(0, 8) == NUMBERS[:8]


def test_a_hub_that_is_busy_is_asked_again(hub, file):
    hub.fault("GET", "numbers.bin", 503)
    assert file.read(5, 5) == NUMBERS[5:10]
    assert len(hub.asked("GET", "numbers.bin")) == 2


def test_a_server_without_ranges_serves_what_stands_at_the_start(hub, file, monkeypatch):
    def whole(here, blob, headers):
        return Answer(blob, 200, headers)

    monkeypatch.setattr(hub_downloads, "part", whole)
    monkeypatch.setattr(ranges, "SKIPPED", 100_000)
    assert file.read(0, 10) == NUMBERS[:10]
    assert file.read(70_000, 10) == NUMBERS[70_000:70_010]
    with pytest.raises(NetworkError, match="gives no ranges"):
        file.read(900_000, 10)


def test_the_fingerprint_of_a_large_file_is_the_hubs_and_of_a_small_one_its_own(hub):
    hub.put("org/two", {"a.safetensors": NUMBERS, "b.txt": b"text"})
    found = remote.bundle(Address("org/two"))
    assert found.open("a.safetensors").fingerprint() == hashlib.sha256(NUMBERS).hexdigest()
    assert hub.asked("GET", "/resolve/") == []
    assert found.open("b.txt").fingerprint() == hashlib.sha256(b"text").hexdigest()


def test_ranges_come_from_the_second_origin_without_the_token(hub):
    hub.redirect = True
    hub.put("me/secret", {"numbers.bin": NUMBERS}, private=True)
    file = remote.bundle(Address("me/secret")).open("numbers.bin")
    assert file.read(70_000, 9) == NUMBERS[70_000:70_009]
    second = hub.asked("GET", "/blob/")
    assert second
    assert not any("authorization" in a.headers for a in second)


# ------------------------------------------------------------------------------- bundles


def test_a_repository_is_its_files_and_folders_pinned_to_the_commit(hub):
    first = hub.put("org/x", {"a.txt": b"1", "sub/b.txt": b"2", "sub/deep/c.txt": b"3"})
    found = remote.bundle(Address("org/x"))
    assert (found.names, found.folders) == ((".gitattributes", "a.txt"), ("sub",))
    assert found.origin == Origin("org/x", first.oid)
    hub.put("org/x", {"a.txt": b"changed"})
    assert found.read("a.txt", 10) == b"1"
    inner = found.inner("sub")
    assert (inner.name, inner.names, inner.folders) == ("org/x:sub", ("b.txt",), ("deep",))
    assert inner.inner("deep").name == "org/x:sub/deep"
    assert inner.inner("deep").read("c.txt", 10) == b"3"
    assert inner.origin == Origin("org/x", first.oid, "sub")


def test_an_address_inside_is_a_folder_or_a_file_with_its_neighbours(hub):
    hub.put("org/x", {"sub/a.txt": b"1", "sub/b.txt": b"2"})
    assert remote.bundle(Address("org/x", None, "sub")).names == ("a.txt", "b.txt")
    chosen = remote.bundle(Address("org/x", None, "sub/b.txt"))
    assert (chosen.chosen, chosen.names) == ("b.txt", ("a.txt", "b.txt"))
    with pytest.raises(NotFoundError, match=r"has no sub/c\.txt; it has .*sub"):
        remote.bundle(Address("org/x", None, "sub/c.txt"))


@pytest.mark.parametrize("how", ["branch", "tag", "commit"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, how):
    old = hub.put("me/x", {"a.txt": b"old"})
    hub.put("me/x", {"a.txt": b"new"}, revision="main" if how == "commit" else "v1")
    if how == "tag":
        huggingface_hub.HfApi(endpoint=hub.url).create_tag("me/x", tag="t1", revision="v1")
    revision = {"branch": "v1", "tag": "t1", "commit": old.oid}[how]
    wanted = b"old" if how == "commit" else b"new"
    assert remote.bundle(Address("me/x", revision)).read("a.txt", 10) == wanted


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\b", "./x", "a/" * 3000 + "x"])
def test_a_name_that_leaves_the_repository_is_refused(hub, path):
    hub.put("org/x", {path: b"1"})
    with pytest.raises(MalformedError) as caught:
        remote.bundle(Address("org/x"))
    assert caught.value.code == "hostile"


ODD = [
    {"CON": b"1"},
    {"aux.json": b"1"},
    {"a:b.json": b"1"},
    {"a./x.json": b"1"},
    {"A.json": b"1", "a.json": b"2"},
]


@pytest.mark.parametrize("files", ODD)
def test_a_name_that_not_every_system_can_hold_is_not_fetched(hub, files):
    hub.put("org/x", {"config.json": b"{}", **files})
    assert remote.fetched(Address("org/x"), ["config.json"]).path is not None
    with pytest.raises(MalformedError) as caught:
        remote.fetched(Address("org/x"))
    assert caught.value.code == "hostile"
    assert not any((hub.cache).rglob(next(iter(files))))


def test_a_list_without_end_is_refused(hub, monkeypatch):
    monkeypatch.setattr(remote, "MOST", 100)
    hub.put("org/x", {f"{n}.txt": b"1" for n in range(200)})
    hub.put("org/deep", {f"{n}/a/b/c.txt": b"1" for n in range(60)})
    hub.entries = 20
    for name, words in (("org/x", "more than 100 files"), ("org/deep", "more than 100 folders")):
        with pytest.raises(MalformedError, match=words):
            remote.bundle(Address(name))
    assert len(hub.asked("GET", "org/x/tree")) < 8  # of ten pages


def test_folders_in_one_another_have_an_end(hub):
    hub.put("org/x", {"a/" * 60 + "x": b"1"})
    with pytest.raises(MalformedError) as caught:
        remote.bundle(Address("org/x"))
    assert caught.value.code == "hostile"


def test_a_hub_that_is_busy_when_the_commit_is_asked_for(hub, caplog, capfd):
    hub.put("org/x", {"a.txt": b"1"})
    hub.fault("GET", "/api/models/org/x", 503, times=2, headers={"Retry-After": "0"})
    assert remote.bundle(Address("org/x")).names == (".gitattributes", "a.txt")
    assert [r.name for r in caplog.records] == ["loratools.hub.patience"] * 2
    assert "Retrying" not in capfd.readouterr().err


def test_what_the_library_says_is_said_in_our_words_and_once(hub, caplog, capfd):
    hub.put("org/x", {"a.txt": b"1"})
    hub.fault("GET", "/tree/", 503, times=2, headers={"Retry-After": "0"})
    remote.bundle(Address("org/x"))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("loratools")]
    assert said == ["the Hub does not answer, or is busy; trying again"]
    assert capfd.readouterr().err == ""


def test_a_commit_from_the_cache_is_said_to_be_one(hub, caplog, capfd):
    hub.put("org/x", {"a.txt": b"1"})
    remote.fetched(Address("org/x"))
    hub.put("org/x", {"a.txt": b"22"})
    hub.fault("GET", "/api/models/org/x", 503, times=9, headers={"Retry-After": "0"})
    assert remote.bundle(Address("org/x")).open("a.txt").size == 1
    said = [r.getMessage() for r in caplog.records if r.name.startswith("loratools")]
    assert said == ["the Hub cannot be reached: the commit that is in the cache is read"]
    assert capfd.readouterr().err == ""


def test_a_repository_that_is_not_there_or_not_yours(hub):
    hub.put("other/secret", {"a": b"1"}, private=True)
    for name in ("org/none", "other/secret"):
        with pytest.raises(NotFoundError) as caught:
            remote.bundle(Address(name))
        assert caught.value.code == "not_found"


def test_a_gated_file_says_that_terms_are_to_be_accepted(hub):
    hub.put("org/gated", {"a.safetensors": NUMBERS}, gated="manual")
    with pytest.raises(NotFoundError) as caught:
        remote.bundle(Address("org/gated")).open("a.safetensors").read(0, 8)
    assert caught.value.code == "gated"


# ------------------------------------------------------------------------------- fetching


def test_what_is_fetched_lies_in_the_librarys_cache_and_is_found_there(hub):
    commit = hub.put("org/x", {"a.bin": NUMBERS, "sub/b.txt": b"2", "c.txt": b"3"}).oid
    found = remote.fetched(Address("org/x"), ["a.*", "sub/*"])
    assert found.path == hub.cache / "models--org--x" / "snapshots" / commit
    assert isinstance(found.open("a.bin"), LocalFile)
    assert isinstance(found.inner("sub").open("b.txt"), LocalFile)
    assert not isinstance(found.open("c.txt"), LocalFile), "nobody asked for it"
    assert {repo.repo_id for repo in scan_cache_dir(hub.cache).repos} == {"org/x"}
    there = huggingface_hub.hf_hub_download("org/x", "a.bin", local_files_only=True)
    assert Path(there).read_bytes() == NUMBERS


def test_what_is_cached_costs_no_request(hub):
    commit = hub.put("org/x", {"a.bin": NUMBERS, "c.txt": b"3"}).oid
    remote.fetched(Address("org/x"), ["a.bin"])
    hub.log.clear()
    again = remote.fetched(Address("org/x", commit), ["a.bin"])
    assert again.open("a.bin").read(0, 9) == NUMBERS[:9]
    assert hub.log == []


def test_a_file_cut_short_in_the_cache_is_not_taken_for_whole(hub):
    commit = hub.put("org/x", {"a.bin": NUMBERS}).oid
    found = remote.fetched(Address("org/x"))
    place = found.path / "a.bin"
    place.resolve().write_bytes(NUMBERS[:1000])
    file = remote.bundle(Address("org/x", commit)).open("a.bin")
    assert file.read(2000, 5) == NUMBERS[2000:2005]


def test_what_does_not_fit_the_disk_is_not_begun(hub):
    hub.put("org/huge", {"model.safetensors": Blob(b"", lfs=True, claimed=1 << 60)})
    with pytest.raises(StorageError) as caught:
        remote.fetched(Address("org/huge"))
    assert caught.value.code == "disk_full"
    assert hub.asked("GET", "/resolve/") == []


def test_another_content_than_the_hub_lists_is_noticed(hub, monkeypatch):
    hub.put("org/x", {"a.bin": NUMBERS})
    (sha,) = hub.stored
    real = hub.repos["org/x"].head.files["a.bin"]
    found = remote.bundle(Address("org/x"))
    assert found.open("a.bin").sha256 == sha
    lie = Blob(NUMBERS[:-1] + b"?", lfs=True)
    lie.__dict__["sha256"] = real.sha256
    hub.repos["org/x"].head.files["a.bin"] = lie
    with pytest.raises(StorageError, match="did not arrive as the Hub lists it"):
        remote.fetched(Address("org/x"))


# ------------------------------------------------------------------------------- offline


@pytest.fixture
def offline(monkeypatch):
    def turn_on() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return turn_on


@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_offline_what_is_cached_is_found_by_branch_and_by_commit(hub, offline, revision):
    commit = hub.put("org/x", {"a.bin": NUMBERS, "sub/b.txt": b"2"}).oid
    remote.fetched(Address("org/x"))
    offline()
    hub.log.clear()
    found = remote.fetched(Address("org/x", commit if revision == "commit" else revision))
    assert found.open("a.bin").read(0, 5) == NUMBERS[:5]
    assert found.inner("sub").read("b.txt", 5) == b"2"
    assert hub.log == []


def test_offline_what_is_not_cached_is_an_error_and_no_request(hub, offline):
    hub.put("org/x", {"a.bin": NUMBERS, "b.bin": NUMBERS[::-1]})
    offline()
    with pytest.raises(NetworkError) as caught:
        remote.bundle(Address("org/x"))
    assert caught.value.code == "offline"
    assert hub.log == []


def test_offline_a_part_of_a_snapshot_is_known_to_be_one(hub, offline):
    hub.put("org/x", {"a.bin": NUMBERS, "b.bin": NUMBERS[::-1]})
    remote.fetched(Address("org/x"), ["a.bin"])
    offline()
    assert remote.fetched(Address("org/x"), ["a.bin"]).open("a.bin").size == len(NUMBERS)
    for act in (
        lambda: remote.fetched(Address("org/x")),
        lambda: remote.bundle(Address("org/x")).open("b.bin").read(0, 1),
    ):
        with pytest.raises(NetworkError) as caught:
            act()
        assert caught.value.code == "offline"


# ------------------------------------------------------------------------------- a large base


def llama_70b(shards: int = 30) -> Iterator[tuple[str, Blob]]:
    """The files of a 70B base: real headers, and 141 GB of zeros that nobody holds."""
    wide, kv, mlp, words = 8192, 1024, 28672, 128256
    layer = {
        "input_layernorm": [wide], "mlp.down_proj": [wide, mlp], "mlp.gate_proj": [mlp, wide],
        "mlp.up_proj": [mlp, wide], "post_attention_layernorm": [wide],
        "self_attn.k_proj": [kv, wide], "self_attn.o_proj": [wide, wide],
        "self_attn.q_proj": [wide, wide], "self_attn.v_proj": [kv, wide],
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [words, wide]}
    for n in range(80):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": [wide], "lm_head.weight": [words, wide]}
    names, where, total = list(shapes), {}, 0
    assert len(names) == 723
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names[n * len(names) // shards : (n + 1) * len(names) // shards]:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            where[name], at = file, at + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield file, Blob(struct.pack("<Q", len(text)) + text, lfs=True, claimed=8 + len(text) + at)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": where}
    yield "model.safetensors.index.json", Blob(json.dumps(index, indent=1).encode())
    config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": words}
    yield "config.json", Blob(json.dumps(config).encode())


def test_an_adapter_is_checked_against_a_70b_base_by_headers_alone(hub, tmp_path):
    commit = hub.put("org/Llama-70B", dict(llama_70b())).oid
    folder = tmp_path / "lora"
    folder.mkdir()
    shapes = {}
    for n in range(80):
        front = f"base_model.model.model.layers.{n}.self_attn"
        for name, rows in (("q_proj", 8192), ("v_proj", 1024)):
            shapes[f"{front}.{name}.lora_A.weight"] = [16, 8192]
            shapes[f"{front}.{name}.lora_B.weight"] = [rows, 16]
    sparse(folder / "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = check([folder], "org/Llama-70B")
    assert (result.ok, result.matched, result.total) == (True, 160, 160)
    assert result.plan is not None
    assert result.plan.base.id == "org/Llama-70B"
    assert result.plan.base.nbytes > 141e9
    assert result.plan.base.bundle.origin == Origin("org/Llama-70B", commit)
    assert hub.sent < 5_000_000
    assert len(hub.log) <= 36, [a.url for a in hub.log]
    assert not list(hub.cache.rglob("*.safetensors")), "nothing is fetched"

    # The same for one that does not fit.
    shapes[next(iter(shapes))] = [16, 4096]
    sparse(folder / "adapter_model.safetensors", shapes)
    result = check([folder], "org/Llama-70B")
    assert [p.code for p in result.problems if p.severity == "error"] == ["shape_mismatch"]


def test_progress_is_told_and_nothing_is_printed(hub, capfd, monkeypatch):
    hub.put("org/x", {"a.bin": NUMBERS, "b.bin": NUMBERS[::-1], "c.txt": b"3"})
    told = []
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    remote.fetched(Address("org/x"), progress=lambda done, total: told.append((done, total)))
    total = 2 * len(NUMBERS) + 1 + len(hub.repos["org/x"].head.files[".gitattributes"].content)
    assert [t for _, t in told] == [total] * len(told)
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert told[-1] == (total, total)
    assert capfd.readouterr() == ("", "")
