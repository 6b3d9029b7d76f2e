"""What would be published: the right files, the right kind, and all that is wrong at once."""

import hashlib
import json
import os
import pickle
import re
import shutil
import socket
from collections import OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import loratools
from loratools.commands import published
from loratools.errors import LoratoolsError
from loratools.hub.artefact import Artefact, artefact, hub_id
from tests.small_models import index_of
from tests.tiny import write_adapter, write_base

TOKEN = "hf_" + "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xYz1"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_base(tmp_path / "model", shards=2)


def names(found: Artefact) -> list[str]:
    return [f.name for f in found.files]


def codes(found: Artefact, severity: str = "error") -> list[str]:
    return sorted(p.code for p in found.problems if p.severity == severity)


def said(found: Artefact) -> str:
    return "\n".join(p.message for p in found.problems)


# ------------------------------------------------------------------------------- what is sent


def test_an_adapter_as_a_trainer_leaves_it_is_sent_without_what_training_left(adapter, tmp_path):
    saved = {"w": torch.zeros(2)}
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "x.bin"):
        torch.save(saved, adapter / name)
    for name in (".env", "trainer_state.json", "notes.txt", "run.py", "tokenizer.json"):
        (adapter / name).write_text(f'{{"key": "{TOKEN if name == ".env" else ""}"}}')
    for folder in ("checkpoint-50", "runs/a", ".git", "__pycache__", "wandb"):
        (adapter / folder).mkdir(parents=True)
        (adapter / folder / "config.json").write_text("{}")
    shutil.copy(adapter / "adapter_model.safetensors", adapter / "checkpoint-50")
    (adapter / "secret.txt").symlink_to("/etc/hostname")
    found = artefact(adapter)
    assert found.kind == "adapter"
    assert found.problems == ()
    assert names(found) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    why = dict(found.skipped)
    assert why[".env"] == "hidden"
    assert why["training_args.bin"] == "left over from training"
    assert "pickle" in why["x.bin"]
    assert "checkpoint-50/adapter_model.safetensors" in why
    assert not any(name.startswith(".git") for name in why)
    assert found.base_ids == ("org/base",)


def test_a_file_that_keeps_passwords_is_refused_whatever_it_holds(adapter):
    (adapter / ".env").write_text("DB_PASSWORD=hunter2\n")
    found = artefact(adapter, include=[".env"])
    assert codes(found) == ["secret"]
    assert ".env is a file that keeps passwords" in said(found)
    assert "hunter2" not in said(found)


def test_paths_in_the_metadata_of_weights_are_noted(tmp_path):
    save_file(
        {"lora_unet_a.lora_down.weight": torch.zeros(2, 4)},
        tmp_path / "a.safetensors",
        metadata={"ss_sd_model_name": "/home/me/sd15.safetensors", "ss_output_name": "a"},
    )
    (note,) = [n for n in artefact(tmp_path).notes if "metadata" in n]
    assert note == (
        "a.safetensors: its metadata name paths of this machine (ss_sd_model_name), and go with it"
    )


def test_of_many_secrets_the_first_are_told(adapter):
    (adapter / "log.txt").write_text(f"login {TOKEN}\n" * 5000)
    found = artefact(adapter, include=["log.txt"])
    assert [p.message for p in found.problems][-2:] == [
        "log.txt, line 10: an access token of the Hub",
        "log.txt, 4990 more lines",
    ]


def test_include_and_exclude_decide_and_content_is_checked_all_the_same(adapter):
    (adapter / "notes.txt").write_text("plain")
    (adapter / "bad.txt").write_bytes(pickle.dumps(OrderedDict(a=1)))
    (adapter / ".env").write_text(f"x\nHF_TOKEN={TOKEN}\n")
    (adapter / "LICENSE").write_text("Apache")
    found = artefact(adapter, include=["*.txt", ".env"], exclude=["LICENSE"])
    assert set(names(found)) >= {"notes.txt", "bad.txt", ".env"}
    assert "LICENSE" not in names(found)
    assert codes(found) == ["pickled", "secret"]
    assert ".env, line 2" in said(found)
    assert TOKEN not in repr(found.problems)
    assert ".env" not in names(artefact(adapter, include=["*"]))
    with pytest.raises(LoratoolsError, match="matches no file") as refused:
        artefact(adapter, include=["*.nothing"])
    assert refused.value.exit == 2


def test_everything_wrong_is_found_at_once(model, tmp_path):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    (model / shards[0]).unlink()
    (model / shards[1]).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 99\n"
    )
    (model / "vocab.json").write_bytes(pickle.dumps(OrderedDict(a=1), protocol=2))
    (model / "generation_config.json").write_text(f'{{\n"token": "{TOKEN}"}}')
    (model / "tokenizer.json").symlink_to("/etc/hostname")
    (model / "model-00007-of-00009.safetensors").write_bytes(b"")
    found = artefact(model)
    assert {"unpublishable", "pickled", "secret", "links"} <= set(codes(found))
    text = said(found)
    for part in (shards[0], "git-lfs pointer", "vocab.json", "line 2", "/etc/hostname", "00009"):
        assert part in text


def test_the_order_of_files_and_hashes_are_those_of_the_disk(adapter):
    found = artefact(adapter)
    assert names(found) == sorted(names(found))
    for file in found.files:
        raw = (adapter / file.name).read_bytes()
        assert (file.size, file.sha256()) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_a_folder_of_the_repository_is_put_before_every_name(adapter):
    found = artefact(adapter, inside="loras/style/")
    assert names(found)[0] == "loras/style/adapter_config.json"
    assert found.local(found.files[0]) == "adapter_config.json"
    for wrong in ("../up", "/etc", "a/../b", "a//b", ".git/hooks", "a\\b"):
        with pytest.raises(LoratoolsError) as refused:
            artefact(adapter, inside=wrong)
        assert refused.value.code == "usage"


# ------------------------------------------------------------------------------- links, names


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.json", "nowhere", "config.json"])
def test_links_out_of_the_folder_are_refused_where_they_would_be_sent(model, tmp_path, target):
    (tmp_path / "outside.json").write_text("{}")
    (model / "tokenizer_config.json").symlink_to(target)
    found = artefact(model)
    inside = target == "config.json"
    assert codes(found) == ([] if inside else ["links"])
    assert ("tokenizer_config.json" in names(found)) is inside


def test_a_snapshot_of_the_hubs_cache_is_links_to_blobs_and_refused(adapter, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(adapter.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    found = artefact(snapshot)
    assert codes(found).count("links") == 2
    assert names(found) == []


def test_what_is_no_regular_file_is_refused_at_once(adapter):
    os.mkfifo(adapter / "tokenizer.json")
    server = socket.socket(socket.AF_UNIX)
    os.chdir(adapter)
    try:
        server.bind("vocab.json")
        found = artefact(adapter)
    finally:
        os.chdir("/")
        server.close()
    assert codes(found) == ["unpublishable", "unpublishable"]


def test_names_that_no_system_or_not_every_system_holds(adapter):
    for name in ("LICENSE", "license", "LICENSE\nx", "NOTICE a\\b", "NOTICE:1", "NOTICE.con. "):
        (adapter / name).write_text("text")
    found = artefact(adapter, include=["license"])
    assert codes(found) == ["unpublishable"] * 3
    assert codes(found, "warning") == ["unpublishable"] * 2
    assert "\n" not in said(found).replace("\n", "", len(found.problems) - 1)


# ------------------------------------------------------------------------------- whole or not


def shards_of(model: Path) -> list[str]:
    table = json.loads((model / "model.safetensors.index.json").read_text())
    return sorted(set(table["weight_map"].values()))


def test_a_whole_model_of_shards_is_published(model):
    found = artefact(model)
    assert found.kind == "model"
    assert found.problems == ()
    assert names(found) == sorted(
        [*shards_of(model), "config.json", "model.safetensors.index.json"]
    )


def without_a_shard(model: Path) -> str:
    (model / shards_of(model)[1]).unlink()
    return "the index names it|names it, and it is not there"


def without_index(model: Path) -> str:
    for number, shard in enumerate(shards_of(model), 1):
        (model / shard).rename(model / f"model-{number:05d}-of-00002.safetensors")
    (model / "model.safetensors.index.json").unlink()
    return "shards without their index"


def with_old_shards(model: Path) -> str:
    save_file({"w": torch.zeros(1)}, model / "model-00003-of-00003.safetensors")
    return "no index names them"


def with_one_file_too(model: Path) -> str:
    save_file({"w": torch.zeros(1)}, model / "model.safetensors")
    return "read the first and never the shards"


def with_a_tensor_elsewhere(model: Path) -> str:
    first, second = shards_of(model)
    where = {"model.embed_tokens.weight": first, "not.there": second}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return "lacks not.there"


def with_a_path_in_the_index(model: Path) -> str:
    (model / "model.safetensors.index.json").write_bytes(index_of({"../x.safetensors": ["w"]}))
    return "outside the folder"


def with_a_broken_shard(model: Path) -> str:
    path = model / shards_of(model)[0]
    path.write_bytes(path.read_bytes()[:-3])
    return "bytes"


def without_config(model: Path) -> str:
    (model / "config.json").unlink()
    (model / "model.safetensors.index.json").unlink()
    for shard in shards_left(model):
        shard.unlink()
    save_file({"model.layers.0.mlp.w": torch.zeros(1)}, model / "model.safetensors")
    return "config.json is missing"


def shards_left(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def as_pickles_only(model: Path) -> str:
    for shard in shards_left(model):
        shard.unlink()
    (model / "model.safetensors.index.json").unlink()
    torch.save({"w": torch.zeros(1)}, model / "pytorch_model.bin")
    return "pytorch_model.bin: the only weights"


def with_an_adapter(model: Path) -> str:
    write_adapter(model / "x")
    for file in (model / "x").iterdir():
        file.rename(model / file.name)
    save_file({"w": torch.zeros(1)}, model / "model.safetensors")
    return "adapter_config.json and model.safetensors in one folder"


BROKEN = [
    without_a_shard, without_index, with_old_shards, with_one_file_too, with_a_tensor_elsewhere,
    with_a_path_in_the_index, with_a_broken_shard, without_config, as_pickles_only,
    with_an_adapter,
]  # fmt: skip


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda f: f.__name__)
def test_what_is_not_whole_is_refused_and_named(model, breaking):
    pattern = breaking(model)
    found = artefact(model)
    assert any(p.severity == "error" and re.search(pattern, p.message) for p in found.problems)


def test_adapters_without_weights_or_without_their_config(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "b")
    (adapter / "adapter_model.safetensors").unlink()
    (tmp_path / "b" / "adapter_config.json").unlink()
    assert codes(artefact(adapter)) == ["unpublishable"]
    assert "adapter_config.json is missing" in said(published.planned(tmp_path / "b"))
    alone = published.planned(adapter.parent / "b" / "adapter_model.safetensors")
    assert "cannot be loaded without its adapter_config.json" in said(alone)


def test_a_pipeline_needs_the_components_that_its_index_names(tmp_path):
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder in ("unet", "samples"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    found = artefact(tmp_path)
    assert found.kind == "pipeline"
    assert [p.target for p in found.problems] == ["vae"]
    assert names(found)[1:] == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert "samples/config.json" in dict(found.skipped)


def test_a_component_that_is_only_a_pickle(tmp_path):
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder in ("unet", "text_encoder"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        torch.save({"w": torch.zeros(1)}, tmp_path / folder / "pytorch_model.bin")
    save_file({"w": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    found = artefact(tmp_path)
    assert "unet/pytorch_model.bin" in dict(found.skipped)
    [problem] = found.problems
    assert (problem.code, problem.target) == ("pickled", "text_encoder/pytorch_model.bin")
    assert "the only weights of text_encoder" in problem.message
    assert problem.advice == "merge --dtype makes safetensors of every component"

    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    both = sorted((p.code, p.target) for p in artefact(tmp_path).problems)
    assert both == [("pickled", f"{n}/pytorch_model.bin") for n in ("text_encoder", "unet")]


def graph(path: Path, location: str | None) -> None:
    weight = numpy_helper.from_array(torch.rand(64).numpy(), "w")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    made = helper.make_model(
        helper.make_graph([node], "g", [value], [out], [weight]), ir_version=9,
        opset_imports=[helper.make_opsetid("", 17)],
    )  # fmt: skip
    path.parent.mkdir(exist_ok=True, parents=True)
    outside = {"save_as_external_data": True, "location": location, "size_threshold": 0}
    onnx.save(made, path, **(outside if location else {}))


@pytest.mark.parametrize("location", [None, "model.onnx_data", "model.onnx.data", "weights.bin"])
def test_onnx_weights_beside_the_graph_are_sent_or_missed(tmp_path, location):
    graph(tmp_path / "onnx" / "model.onnx", location)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found = artefact(tmp_path)
    assert found.kind == "onnx"
    if location == "weights.bin":
        assert "weights.bin, which is not among the files" in said(found)
        found = artefact(tmp_path, include=["onnx/weights.bin"])
    assert found.problems == ()
    assert names(found) == sorted(
        ["config.json", "onnx/model.onnx", *([f"onnx/{location}"] if location else [])]
    )
    if location:
        (tmp_path / "onnx" / location).unlink()
        assert "unpublishable" in codes(artefact(tmp_path))


def test_nothing_of_a_model_is_said_to_be_so(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    found = artefact(tmp_path)
    assert found.kind is None
    assert codes(found) == ["unpublishable"]
    with pytest.raises(LoratoolsError) as refused:
        artefact(tmp_path / "nowhere")
    assert refused.value.code == "not_found"


# ------------------------------------------------------------------------------- bases, paths


def test_a_path_of_this_machine_is_never_sent_and_stays_on_disk(tmp_path):
    here = str(tmp_path / "private" / "llama")
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path=here)
    before = (adapter / "adapter_config.json").read_bytes()
    found = artefact(adapter)
    assert found.base_ids == ()
    assert found.base_path == here
    config = next(f for f in found.files if f.name == "adapter_config.json")
    assert b"private" not in (config.replaced or b"")
    assert config.size == len(config.replaced or b"")
    named = artefact(adapter, base_models=["org/llama"])
    sent = json.loads(next(f.replaced for f in named.files if f.replaced) or b"")
    assert sent["base_model_name_or_path"] == "org/llama"
    assert {k: v for k, v in json.loads(before).items() if "base" not in k} == {
        k: v for k, v in sent.items() if "base" not in k
    }
    assert (adapter / "adapter_config.json").read_bytes() == before
    assert "adapter_config.json" in named.notes[0]


def test_what_names_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "llama").mkdir(parents=True)
    assert hub_id("org/name") == "org/name"
    assert hub_id("gpt2") == "openai-community/gpt2"
    for path in ("out/llama", "/srv/llama", "llama", "./a", "a/b/c", "", None, "a b/c", "x" * 9999):
        assert hub_id(path) is None


# ------------------------------------------------------------------------------- the receipt


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        write_adapter(tmp_path / f"a{number}", number, base_model_name_or_path="/srv/llama")
    loratools.merge(["a1", "a2"], weights=[0.7, 0.3], rank=4, out="merged", hash="none")
    return tmp_path / "merged"


def sent(found: Artefact, out: Path) -> Path:
    for file in found.files:
        (out / file.name).parent.mkdir(parents=True, exist_ok=True)
        (out / file.name).write_bytes(
            file.path.read_bytes() if file.replaced is None else file.replaced
        )
    return out


def test_what_is_sent_proves_itself_by_its_own_receipt(merged, tmp_path):
    found = published.planned(merged, base_models=["org/llama"])
    assert found.problems == ()
    there = sent(found, tmp_path / "there")
    assert b"/srv" not in b"".join(p.read_bytes() for p in there.iterdir())
    outputs = json.loads((there / "loratools.json").read_text())["outputs"]
    assert all("sha256" in entry for entry in outputs.values())
    proved = loratools.verify(there, inputs=[tmp_path])
    assert proved.ok
    assert {f.name: f.sha256() for f in found.files if f.name in outputs} == {
        name: entry["sha256"] for name, entry in outputs.items()
    }


def test_weights_that_are_not_those_of_the_receipt_are_refused(merged):
    path = merged / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    path.write_bytes(bytes(raw) + b"")
    receipt = json.loads((merged / "loratools.json").read_text())
    receipt["outputs"][path.name]["sha256"] = "0" * 64
    (merged / "loratools.json").write_text(json.dumps(receipt))
    assert codes(artefact(merged)) == ["proof_failed"]
    path.unlink()
    assert "the receipt names it" in said(artefact(merged))
    assert codes(artefact(merged, exclude=["loratools.json"])) == ["unpublishable"]


def test_a_file_is_published_with_the_receipt_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a")
    write_base(tmp_path / "base")
    loratools.merge(["a"], "base", out="one.safetensors")
    found = published.planned("one.safetensors")
    assert found.kind == "model"
    assert names(found) == ["one.safetensors", "one.safetensors.loratools.json"]
    assert found.receipt is not None
    assert found.problems == ()


def test_a_card_beside_the_files_is_read_and_not_sent_as_a_file(adapter):
    (adapter / "README.md").write_bytes("# Ünser\r\n".encode())
    found = artefact(adapter)
    assert found.readme == "# Ünser\r\n"
    assert "README.md" not in names(found)
    assert artefact(adapter, exclude=["README.md"]).readme is None
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    assert codes(artefact(adapter)) == ["card"]


def test_plots_of_a_report_are_sent_and_other_pictures_stay(adapter):
    (adapter / "report").mkdir()
    for name in ("report/overlap.png", "me.png", "report/data.csv"):
        (adapter / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    found = artefact(adapter)
    assert found.pictures == ("report/overlap.png",)
    assert set(dict(found.skipped)) == {"me.png", "report/data.csv"}
