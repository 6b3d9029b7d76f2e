"""What a folder of weights says of itself: shards, index, config, and every lie they may tell."""

import json
import os
from pathlib import Path

import pytest
import torch

from loratools.containers.bundle import local
from loratools.errors import LoratoolsError, MalformedError
from loratools.weights.base import embedding_name, headers, is_hub_id
from tests.bases import Headed, base, bundle, shard, whole
from tests.small_models import INDEX, file_of, index_of, model, tensor

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refused(code: str, *files: Headed, chosen: str | None = None) -> str:
    with pytest.raises(LoratoolsError) as caught:
        headers(bundle(*files, chosen=chosen))
    assert caught.value.code == code
    assert caught.value.message.isprintable()
    return caught.value.message


def two(index: object) -> list[Headed]:
    """Two shards, of one tensor each, with an index."""
    said = index if isinstance(index, bytes | str) else json.dumps(index)
    return [shard(A, {"x": [2]}), shard(B, {"y": [3]}), whole(INDEX, said)]


# ------------------------------------------------------------------------------- what is read


def test_one_file_and_its_config():
    found = base({"x.weight": [2, 3], "n": ("I64", [])}, {"model_type": "llama"})
    assert [s.name for s in found.shards] == ["model.safetensors"]
    assert {n: (x.dtype, x.shape) for n, x in found.tensors.items()} == {
        "x.weight": ("F32", (2, 3)),
        "n": ("I64", ()),
    }
    assert found.config == {"model_type": "llama"}
    assert found.nbytes == 32
    assert (found.index, found.problems, found.quantised) == (None, (), None)


def test_shards_are_found_by_their_index_alone():
    files = [*two({"weight_map": {"x": A, "y": B}}), shard("other.safetensors", {"z": [1]})]
    found = headers(bundle(*files))
    assert [s.name for s in found.shards] == [A, B]
    assert set(found.tensors) == {"x", "y"}
    assert found.index == INDEX
    assert found.problems == ()


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["model.safetensors", INDEX, "pytorch_model.bin"], "model.safetensors"),
        ([INDEX, "pytorch_model.bin"], A),
        (["only.safetensors"], "only.safetensors"),
        (["only.safetensors", "config.json"], "only.safetensors"),
    ],
)
def test_files_are_preferred_as_transformers_does(names, read):
    known = {
        "model.safetensors": shard("model.safetensors", {"x": [1]}),
        "only.safetensors": shard("only.safetensors", {"x": [1]}),
        INDEX: whole(INDEX, {"weight_map": {"x": A}}),
        "config.json": whole("config.json", {}),
        "pytorch_model.bin": whole("pytorch_model.bin", b"never read"),
    }
    files = [known[n] for n in names] + [shard(A, {"x": [1]})] * (INDEX in names)
    found = headers(bundle(*files))
    assert [s.name for s in found.shards] == [read]


def test_a_named_file_is_the_one_that_is_read():
    files = [shard("a.safetensors", {"x": [1]}), shard("b.safetensors", {"y": [1]})]
    assert set(headers(bundle(*files, chosen="b.safetensors")).tensors) == {"y"}
    named = headers(bundle(*two({"weight_map": {"x": A, "y": B}}), chosen=INDEX))
    assert set(named.tensors) == {"x", "y"}


def test_torch_files_with_an_index(tmp_path: Path):
    torch.save({"x.weight": tensor(1, 2, 3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"y": tensor(2, 3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    where = {f"pytorch_model-0000{i}-of-00002.bin": [n] for i, n in ((1, "x.weight"), (2, "y"))}
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(index_of(where))
    found = headers(tmp_path)
    assert {n: x.shape for n, x in found.tensors.items()} == {"x.weight": (2, 3), "y": (3,)}
    assert torch.equal(found.tensors["y"].tensor(), tensor(2, 3))


def test_a_single_torch_file(tmp_path: Path):
    torch.save({"x.weight": tensor(1, 2, 3)}, tmp_path / "pytorch_model.bin")
    assert headers(tmp_path).tensors["x.weight"].shape == (2, 3)
    assert headers(tmp_path / "pytorch_model.bin").tensors["x.weight"].shape == (2, 3)


def test_links_that_the_user_named_are_followed(tmp_path: Path):
    kept = model(tmp_path / "blobs", {"x": tensor(1, 2)}, {"y": tensor(2, 3)})
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in kept.iterdir():
        (linked / path.name).symlink_to(path)
    assert set(headers(linked).tensors) == {"x", "y"}


# ------------------------------------------------------------------------------- lies


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "a/x.safetensors",
        "/etc/x.safetensors",
        "..",
        ".",
        "",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
    ],
)
def test_an_index_never_leads_out_of_the_folder(name: str):
    message = refused("hostile", *two({"weight_map": {"x": A, "y": name}}))
    assert "outside" in message


def test_no_file_outside_is_opened_even_where_it_exists(tmp_path: Path):
    model(tmp_path, {"x": tensor(1, 2)})
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / INDEX).write_bytes(index_of({"../model.safetensors": ["x"]}))
    with pytest.raises(MalformedError, match="outside"):
        headers(inside)


@pytest.mark.parametrize(
    ("index", "code"),
    [
        ({"weight_map": {"x": A, "y": "model-00003.safetensors"}}, "base_incomplete"),
        ({"weight_map": {}}, "malformed"),
        ({"weight_map": [["x", A]]}, "malformed"),
        ({"weight_map": {"x": 5, "y": B}}, "malformed"),
        ({"weight_map": {"x": None, "y": B}}, "malformed"),
        ({"weight_map": {"x": [A], "y": B}}, "malformed"),
        ({"metadata": {}}, "malformed"),
        ([], "malformed"),
        ("{", "malformed"),
        ('{"weight_map": {"x": "%s", "x": "%s"}}' % (A, B), "duplicate"),  # noqa: UP031
        ({"weight_map": {"x": A, "y": "config.json"}}, "not_weights"),
    ],
)
def test_an_index_that_is_wrong_is_refused(index: object, code: str):
    refused(code, *two(index), whole("config.json", {}))


def test_what_the_index_lists_and_no_shard_has_is_a_problem():
    for where in ({"x": A, "y": B, "lm_head.weight": B}, {"x": B, "y": A}):
        [problem] = headers(bundle(*two({"weight_map": where}))).problems
        assert (problem.code, problem.severity) == ("base_incomplete", "error")
        assert next(iter(where)) in problem.message or "lm_head.weight" in problem.message


def test_what_a_shard_has_beyond_the_index_is_refused():
    files = [shard(A, {"x": [2], "\x1b[2Jz": [1]}), shard(B, {"y": [3]}),
             whole(INDEX, {"weight_map": {"x": A, "y": B}})]  # fmt: skip
    assert "x1b[2Jz" in refused("malformed", *files)


def test_one_tensor_in_two_shards_is_refused():
    files = [shard(A, {"x": [2]}), shard(B, {"x": [2], "y": [3]}),
             whole(INDEX, {"weight_map": {"x": A, "y": B}})]  # fmt: skip
    assert B in refused("duplicate", *files)


def test_a_total_size_that_is_wrong_is_said():
    said = {"metadata": {"total_size": 20}, "weight_map": {"x": A, "y": B}}
    assert headers(bundle(*two(said))).problems == ()
    said["metadata"] = {"total_size": 24}
    [problem] = headers(bundle(*two(said))).problems
    assert problem.severity in ("note", "warning")
    assert "24" in problem.message
    assert "20" in problem.message


def test_a_shard_cut_short_is_found_in_the_header(tmp_path: Path):
    folder = model(tmp_path, {"x": tensor(1, 200)}, {"y": tensor(2, 300)})
    path = folder / B
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MalformedError, match="100 bytes are missing") as caught:
        headers(folder)
    assert caught.value.code == "truncated"


@pytest.mark.parametrize(
    "config", ["[]", "3", '"x"', "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100000]
)
def test_a_config_that_is_no_plain_object_is_refused(config: str):
    files = [shard("model.safetensors", {"x": [1]}), whole("config.json", config)]
    with pytest.raises(MalformedError, match=r"config\.json"):
        headers(bundle(*files))


def test_a_config_of_many_bytes_is_not_read():
    big = Headed("config.json", b"", 50_000_000)
    refused("malformed", shard("model.safetensors", {"x": [1]}), big)
    assert big.reads == []


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path):
    assert "model.safetensors" in refused("not_found", whole("config.json", {}))
    message = refused("not_found", shard("a.safetensors", {}), shard("b.safetensors", {}))
    assert "2 safetensors files and no index" in message
    for missing in (tmp_path / "no such", tmp_path):
        with pytest.raises(LoratoolsError) as caught:
            headers(missing)
        assert caught.value.code == "not_found"


def test_files_of_other_sorts_are_named(tmp_path: Path):
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(MalformedError, match="git lfs pull"):
        headers(tmp_path)
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoratoolsError) as caught:
        headers(tmp_path / "w.gguf")
    assert caught.value.code == "not_weights"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "model.safetensors")
        with pytest.raises(LoratoolsError) as caught:
            headers(tmp_path)
        assert caught.value.code == "not_weights"


# ------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("org_1/m.2", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./llama", False),
        ("../llama", False),
        ("/models/llama", False),
        ("~/llama", False),
        ("C:\\models\\llama", False),
        ("https://x/y", False),
        ("a/b\n", False),
        ("", False),
        (None, False),
        (5, False),
        (["a/b"], False),
    ],
)
def test_hub_ids(text: object, is_one: bool):
    assert is_hub_id(text) is is_one


@pytest.mark.parametrize(
    ("folders", "config", "wanted"),
    [
        ("hub/models--org--m.1/snapshots/0123abc", {}, "org/m.1"),
        ("hub/models--org--m-2-it/snapshots/0123abc", {"_name_or_path": "x/y"}, "org/m-2-it"),
        # A published model's config often names its parent.
        ("models/m", {"_name_or_path": "org/m"}, None),
        ("models/m", {}, None),
    ],
)
def test_the_id_of_a_base(tmp_path: Path, folders: str, config: dict, wanted: str | None):
    folder = model(tmp_path / folders, {"x": tensor(1, 2)}, config=config)
    assert headers(folder).id == wanted
    assert headers(folder / "model.safetensors").id == wanted


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"quantization_config": None}, None),
        ({}, None),
    ],
)
def test_quantised(config: dict, wanted: str | None):
    assert base({"x": [1]}, config).quantised == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], "model.embed_tokens.weight"),
        (["shared.weight", "encoder.embed_tokens.weight"], "shared.weight"),
        (["b.wte.weight", "a.wte.weight"], "a.wte.weight"),
        (["model.embed_positions.weight", "embed_tokens"], None),
        ([], None),
    ],
)
def test_the_embedding_is_found_by_name(names: list[str], wanted: str | None):
    assert embedding_name(base({n: [5, 4] for n in names}).tensors) == wanted


def test_a_vector_is_no_embedding():
    assert embedding_name(base({"wte.weight": [5]}).tensors) is None


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("names", "config", "wanted"),
    [
        ([EMBED], {"tie_word_embeddings": True}, (HEAD, EMBED)),
        ([EMBED, HEAD], {"tie_word_embeddings": True}, (HEAD, EMBED)),
        ([EMBED, HEAD], {"tie_word_embeddings": False}, None),
        ([EMBED], {"tie_word_embeddings": False}, None),
        ([EMBED], {}, (HEAD, EMBED)),
        ([EMBED, HEAD], {}, None),
        ([HEAD], {"tie_word_embeddings": True}, None),
        ([EMBED], {"text_config": {"tie_word_embeddings": False}}, None),
        ([EMBED, HEAD], {"text_config": {"tie_word_embeddings": True}}, (HEAD, EMBED)),
        ([EMBED], {"text_config": {}, "tie_word_embeddings": False}, None),
        (
            ["bert.embeddings.word_embeddings.weight"],
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ),
        (
            ["transformer.wte.weight"],
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            (HEAD, "transformer.wte.weight"),
        ),
        # These have no head that could share the embedding.
        (["embeddings.word_embeddings.weight"], {"architectures": ["BertModel"]}, None),
        (["bert.embeddings.word_embeddings.weight"],
         {"architectures": ["BertForSequenceClassification"]}, None),
        (["wte.weight"], {"architectures": ["GPT2Model"]}, None),
        ([EMBED], {"architectures": ["LlamaForTokenClassification"]}, None),
        ([EMBED], {"architectures": []}, (HEAD, EMBED)),
    ],
)  # fmt: skip
def test_which_head_shares_the_embedding(names, config, wanted):
    assert base({n: [5, 4] for n in names}, config).tied() == wanted


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_some_architectures_store_in_out(kind: str):
    assert base({"x": [1]}, {"model_type": kind}).is_conv1d is (kind == "gpt2")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": ["gpt2"]},
        {"model_type": 3},
        {"architectures": "LlamaModel"},
        {"tie_word_embeddings": "no"},
        {"quantization_config": "none"},
    ],
)
def test_a_field_that_decides_something_must_be_what_it_should(config: dict):
    with pytest.raises(MalformedError, match=next(iter(config))):
        base({"x": [1]}, config)


def test_a_component_may_be_the_one_with_conv1d():
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    assert base({"x": [1]}, config).is_conv1d
    for other in ("llama", ["gpt2"], None):
        assert not base({"x": [1]}, {**config, "decoder": {"model_type": other}}).is_conv1d


def test_a_head_of_another_shape_shares_nothing():
    there = base({EMBED: [5, 4], HEAD: [6, 4]}, {"tie_word_embeddings": True})
    assert there.tied() is None


def test_a_base_on_disk_has_the_name_that_was_typed(tmp_path: Path, monkeypatch):
    (tmp_path / "m.safetensors").write_bytes(file_of({"x": tensor(1, 2)}))
    monkeypatch.chdir(tmp_path)
    assert headers("m.safetensors").name == "m.safetensors"
    assert headers(local("m.safetensors")).shards[0].name == "m.safetensors"
