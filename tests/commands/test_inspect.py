"""`inspect` over folders: every file and sub-folder, hashes, trigger words, the same file twice."""

import hashlib
import json
import os
import shutil
import struct

import pytest

from loratools.commands import listing
from loratools.commands.inspect import SORTS, inspect
from loratools.containers import bundle
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from tests.tiny import SIZE, numbers, write_adapter, write_base

STEM = "base_model.model.model.layers.0.self_attn"


def lora(path, seed=1, rank=4, metadata=None, modules=("q_proj",)):
    """One file of a LoRA, with what trainers write into its header."""
    header = {"__metadata__": metadata} if metadata is not None else {}
    body = b""
    for module in modules:
        a, b = numbers(rank * SIZE, seed, 1.0), numbers(SIZE * rank, seed + 1, 0.02)
        for name, shape, raw in (("A", [rank, SIZE], a), ("B", [SIZE, rank], b)):
            at = [len(body), len(body) + len(raw)]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": at}
            header[f"{STEM}.{module}.lora_{name}.weight"] = entry
            body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def names(found):
    return [f.source for f in found]


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """A folder as people have it: files, folders in folders, and things that are no adapter."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "loras"
    lora(folder / "b.safetensors", 1, rank=8)
    lora(folder / "a.safetensors", 2, rank=2)
    lora(folder / "styles" / "ink" / "c.safetensors", 3, modules=("q_proj", "v_proj"))
    write_adapter(folder / "runs" / "checkpoint-1000", 4)
    write_adapter(folder / "runs" / "checkpoint-500", 5)
    write_base(folder / "some-base")
    (folder / "readme.txt").write_text("no weights")
    (folder / ".hidden.safetensors").write_bytes(b"x")
    return folder


EVERYTHING = [
    "loras/a.safetensors",
    "loras/b.safetensors",
    "loras/runs/checkpoint-500",
    "loras/runs/checkpoint-1000",
    "loras/styles/ink/c.safetensors",
    "loras/some-base",
]


def test_a_folder_is_all_that_lies_in_it(loras):
    found = inspect("loras")
    assert names(found) == EVERYTHING
    assert [f.format for f in found] == ["peft"] * 5 + [None]
    assert found[-1].looks_like.startswith("a base model")
    assert not any(f.error or f.duplicate_of for f in found)


@pytest.mark.parametrize(
    ("by", "first"),
    [("name", "a.safetensors"), ("rank", "b.safetensors"), ("targets", "runs/checkpoint-500"),
     ("size", "runs/checkpoint-500")],
)  # fmt: skip
def test_sorted(loras, by, first):
    assert names(inspect("loras", sort=by))[0] == f"loras/{first}"


def test_every_order_takes_everything(loras):
    (loras / "bad.safetensors").write_bytes(b"\0" * 100)
    for by in SORTS:
        assert sorted(names(inspect("loras", sort=by))) == sorted(
            [*EVERYTHING, "loras/bad.safetensors"]
        )
    with pytest.raises(LoratoolsError, match="known are name, format"):
        inspect("loras", sort="colour")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "not_weights"),
        (b"<!doctype html><html></html>", "not_weights"),
        (b"", "truncated"),
        (None, "truncated"),
        (b"\xff" * 100, "malformed"),
    ],
)
def test_one_bad_file_does_not_hide_the_others(loras, raw, code):
    bad = loras / "bad.safetensors"
    bad.write_bytes((loras / "a.safetensors").read_bytes()[:-9] if raw is None else raw)
    found = {f.source: f for f in inspect("loras")}
    assert set(found) == {*EVERYTHING, "loras/bad.safetensors"}
    wrong = found["loras/bad.safetensors"].error
    assert (wrong.code, wrong.exit) == (code, 3)
    assert "bad.safetensors" in wrong.message
    if raw is None:
        assert "9 bytes are missing" in wrong.message
    with pytest.raises(LoratoolsError) as alone:
        inspect(bad)
    assert alone.value.code == code


def test_a_broken_adapter_in_a_sub_folder_is_one_row(loras):
    (loras / "runs" / "checkpoint-500" / "adapter_config.json").write_text("{")
    found = {f.source: f.error for f in inspect("loras")}
    assert set(found) == set(EVERYTHING)
    assert found["loras/runs/checkpoint-500"].code == "malformed"


def test_what_is_not_there_is_an_error_even_among_others(loras):
    with pytest.raises(LoratoolsError) as caught:
        inspect("loras", "nothing")
    assert caught.value.code == "not_found"


def test_links_in_a_circle_end(loras):
    (loras / "styles" / "again").symlink_to(loras, target_is_directory=True)
    assert sorted(names(inspect("loras"))) == sorted(EVERYTHING)


def test_a_folder_that_cannot_be_read_is_a_row(loras, monkeypatch):
    def denied(path):
        if str(path).endswith("styles"):
            raise PermissionError(13, "Permission denied", str(path))
        return local(path)

    monkeypatch.setattr(bundle, "local", denied)
    found = {f.source: f.error for f in inspect("loras")}
    assert found["loras/styles"].exit == 3
    assert found["loras/a.safetensors"] is None


def test_a_folder_of_everything_is_not_cut_short_in_silence(loras, monkeypatch):
    monkeypatch.setattr(listing, "MOST", 3)
    with pytest.raises(LoratoolsError, match="more than 3 files; name folders within it"):
        inspect("loras")


def test_a_folder_of_one_file_is_that_file(tmp_path):
    lora(tmp_path / "x" / "only.safetensors")
    [found] = inspect(tmp_path / "x")
    assert found.source.startswith(str(tmp_path / "x"))


# ------------------------------------------------------------------------------- hashes


def test_hashes_are_of_the_file_and_of_its_tensors(tmp_path):
    path = lora(tmp_path / "x.safetensors")
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    whole, tensors = (hashlib.sha256(part).hexdigest() for part in (raw, raw[start:]))
    [found] = inspect(path)
    assert found.as_json()["hashes"] is None
    [found] = inspect(path, hash=True)
    assert found.as_json()["hashes"] == {
        "sha256": whole,
        "autov1": found.hashes.autov1,
        "autov2": whole[:10].upper(),
        "autov3": tensors[:12].upper(),
        "stored": None,
        "agrees": None,
    }


def test_a_stored_hash_is_compared(tmp_path):
    path = lora(tmp_path / "x.safetensors")
    raw = path.read_bytes()
    tensors = hashlib.sha256(raw[8 + struct.unpack("<Q", raw[:8])[0] :]).hexdigest()
    lora(path, metadata={"sshs_model_hash": tensors})
    [found] = inspect(path, hash=True)
    assert found.hash_agrees is True
    assert "no_match" not in [p.code for p in found.problems]
    lora(path, metadata={"sshs_model_hash": hashlib.sha256().hexdigest()})
    [found] = inspect(path, hash=True)
    assert found.hash_agrees is False
    problem = found.problems[-1]
    assert (problem.code, problem.severity) == ("no_match", "warning")
    assert "the hash of nothing" in problem.message
    assert "no_match" not in [p.code for p in inspect(path)[0].problems]  # not compared, not said


# ------------------------------------------------------------------------------- the same twice


def test_the_same_tensors_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = lora(tmp_path / "d" / "a.safetensors", metadata={"ss_output_name": "one"})
    lora(tmp_path / "d" / "b.safetensors", metadata={"ss_output_name": "another title"})
    lora(tmp_path / "d" / "c.safetensors", 7)
    shutil.copy(one, tmp_path / "d" / "e.safetensors")
    os.link(one, tmp_path / "d" / "f.safetensors")
    found = {f.source: f.duplicate_of for f in inspect("d")}
    assert found == {
        "d/a.safetensors": None,
        "d/b.safetensors": "d/a.safetensors",
        "d/c.safetensors": None,
        "d/e.safetensors": "d/a.safetensors",
        "d/f.safetensors": "d/a.safetensors",
    }
    twice = inspect("d/c.safetensors", "d/c.safetensors")
    assert [f.duplicate_of for f in twice] == [None, "d/c.safetensors"]


def test_files_that_only_end_alike_are_not_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = lora(tmp_path / "a.safetensors", rank=300)
    raw = bytearray(one.read_bytes())
    raw[600] ^= 1
    (tmp_path / "b.safetensors").write_bytes(raw)
    assert [f.duplicate_of for f in inspect(".")] == [None, None]


# ------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "ohwx man, in  ink"}, ("ohwx man", "in ink")),
        ({"trained_words": '["one", "two", 3, "one"]'}, ("one", "two")),
        ({"trained_words": "[not json"}, ("[not json",)),
        ({"instance_prompt": "a photo of sks dog"}, ("a photo of sks dog",)),
        ({"modelspec.trigger_phrase": " , "}, ()),
        ({}, ()),
    ],
)
def test_trigger_words(tmp_path, metadata, words):
    [found] = inspect(lora(tmp_path / "x.safetensors", metadata=metadata))
    assert found.trigger_words == words


def test_sidecars_of_civitai_and_a1111(tmp_path):
    path = lora(tmp_path / "x.safetensors", metadata={"trained_words": "inside"})
    (tmp_path / "x.civitai.info").write_text('{"trainedWords": ["beside", "inside"]}')
    (tmp_path / "x.json").write_text('{"activation text": "typed, here"}')
    assert inspect(path)[0].trigger_words == ("inside", "beside", "typed", "here")
    (tmp_path / "x.json").write_text("[" * 100_000)
    (tmp_path / "x.civitai.info").write_bytes(b"\xff\xfe{")
    assert inspect(path)[0].trigger_words == ("inside",)


def test_tags_title_and_architecture(tmp_path):
    tags = {"10_x": {"ink": 5, "1girl": 9, "bad": "many"}, "2_y": {"ink": 6, "no": True, "neg": -1}}
    metadata = {
        "ss_tag_frequency": json.dumps(tags),
        "ss_output_name": "my_ink",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }
    [found] = inspect(lora(tmp_path / "x.safetensors", metadata=metadata))
    assert found.tags == {"ink": 11, "1girl": 9}
    assert list(found.tags) == ["ink", "1girl"]
    assert (found.title, found.architecture) == ("my_ink", "stable-diffusion-xl-v1-base")
    for odd in ("[1]", "{", '{"a": 1}', "9" * 100_000):
        lora(tmp_path / "x.safetensors", metadata={"ss_tag_frequency": odd})
        assert inspect(tmp_path / "x.safetensors")[0].tags == {}


def test_at_most_some_tags_and_words(tmp_path):
    metadata = {
        "ss_tag_frequency": json.dumps({"a": {f"t{i}": i for i in range(1, 1000)}}),
        "trained_words": ",".join(f"w{i}" for i in range(1000)),
    }
    [found] = inspect(lora(tmp_path / "x.safetensors", metadata=metadata))
    assert list(found.tags)[:2] == ["t999", "t998"]
    assert len(found.tags) == 10
    assert len(found.trigger_words) == 20


@pytest.mark.parametrize(
    ("config", "options", "kind"),
    [
        ("LoHaConfig", {}, "Hadamard"),
        ("LoKrConfig", {}, "Kronecker"),
        ("LoKrConfig", {"decompose_both": True, "decompose_factor": 8}, "Kronecker"),
        ("LoraConfig", {"use_dora": True, "lora_alpha": 6}, "Renormed"),
    ],
)
def test_every_kind_that_has_a_rank_says_it(config, options, kind, tmp_path):
    """As PEFT saves them, whose layers have r and scaling themselves."""
    import peft
    import torch

    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(64, 64))
    if config != "LoraConfig":
        options = {**options, "alpha": 6, "init_weights": False}
    settings = getattr(peft, config)(r=3, target_modules=["fc"], **options)
    live = peft.get_peft_model(model, settings)
    live.save_pretrained(tmp_path / "a")
    layer = live.base_model.model.fc
    [found] = inspect(tmp_path / "a")
    assert found.kinds == {kind: 1}
    assert found.ranks == {layer.r["default"]: 1} == {3: 1}
    assert found.scalings == {layer.scaling["default"]: 1} == {2.0: 1}
    assert inspect(tmp_path / "a", sort="rank")[0].as_json()["ranks"] == {"3": 1}
