"""NeMo's archives and Megatron-Bridge's keys, built from their rules: neither program runs here."""

import io
import re
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from loratools.adapter import Renormed
from loratools.algebra import materialise
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import nemo

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "nemo.md"
HEADINGS = "Files Recognise Keys Shapes Scaling Kinds Cannot-say Variants Sources".split()
LAYER = "model.decoder.layers.{}."
QKV = "self_attention.adapter_layer.lora_kqv_adapter"
DENSE = "self_attention.adapter_layer.lora_dense_attention_adapter"
FC1 = "mlp.adapter_layer.lora_hto4h_adapter"
FC2 = "mlp.adapter_layer.lora_4htoh_adapter"
# Columns and rows of the modules: 4 heads of 4 in 2 groups, a gated MLP of 24.
SIZES = {QKV: (16, 32), DENSE: (16, 16), FC1: (16, 48), FC2: (24, 16)}
TARGETS = {
    QKV: "self_attention.linear_qkv", DENSE: "self_attention.linear_proj",
    FC1: "mlp.linear_fc1", FC2: "mlp.linear_fc2",
}  # fmt: skip
RANK = 4


def config(**tuning):
    return {
        "num_layers": 4, "num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 16,
        "ffn_hidden_size": 24, "activation": "fast-swiglu", "restore_from_path": "/models/base",
        "peft": {
            "peft_scheme": "lora",
            "lora_tuning": {"adapter_dim": RANK, "target_modules": ["all"], **tuning},
        },
    }  # fmt: skip


def key_table():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(("key", "module", "part"), key_table())
@pytest.mark.parametrize("front", ["", "model.", "model.module.", "module."])
def test_the_reader_has_the_keys_of_the_specification(key, module, part, front):
    key, module = (re.sub(r"\bN\b", "31", text) for text in (key, module))
    assert nemo.part_of(front + key) == (module, part)
    older = key.replace("decoder.", "language_model.encoder.", 1)
    assert nemo.part_of(f"model.{older}") == (module, part)


def test_the_specification_has_every_adapter():
    text = " ".join(key for key, _, _ in key_table())
    assert all(name in text for name in (*nemo.ADAPTERS, *nemo.UNFUSED))
    headings = re.findall(r"^## (.+)$", SPEC.read_text(), re.MULTILINE)
    assert [h.replace(" ", "-") for h in headings] == HEADINGS


@pytest.mark.parametrize(
    "key",
    [
        "model.decoder.layers.0.self_attention.linear_qkv.weight",
        "model.decoder.layers.0.adapter_layer.adapter_1.linear_in.weight",
        "model.decoder.layers.0.mlp.adapter_layer.lora_unfused_hto4h_adapter.x.linear_in.weight",
        "decoder.layers.0.mlp.linear_fc1.adapter.adapter_x.linear_in.weight",
        "enc_dec_model.enc_dec_model.encoder.layers.0.adapter.linear_in.weight",
        "linear_in.weight",
    ],
)
def test_other_keys_are_none(key):
    assert nemo.part_of(key) is None


def trained(layers=4):
    """The tensors of a training on one rank."""
    torch.manual_seed(2)
    return {
        f"{LAYER.format(n)}{name}.{side}.weight": torch.randn(
            (RANK, columns) if side == "linear_in" else (rows, RANK)
        )
        for n in range(layers)
        for name, (columns, rows) in SIZES.items()
        for side in ("linear_in", "linear_out")
    }


def archive(path, files, mode="w"):
    """A .nemo of these members: YAML of dicts, torch.save of tensors."""
    with tarfile.open(path, mode) as packed:
        for name, content in files.items():
            if name.endswith(".yaml"):
                raw = yaml.safe_dump(content).encode()
            else:
                buffer = io.BytesIO()
                torch.save(content, buffer)
                raw = buffer.getvalue()
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            packed.addfile(entry, io.BytesIO(raw))
    return path


def whole(path, said=None, tensors=None, mode="w"):
    files = {"./model_config.yaml": said or config(alpha=8), "./model_weights.ckpt": tensors}
    files["./model_weights.ckpt"] = trained() if tensors is None else tensors
    return archive(path, files, mode)


def expected(tensors, scaling):
    """ΔW of every module, computed here."""
    out = {}
    for key, a in tensors.items():
        if key.endswith(".linear_in.weight"):
            stem = key.removesuffix(".linear_in.weight").removeprefix("model.")
            front, name = ".".join(stem.split(".")[:3]), ".".join(stem.split(".")[3:])
            b = tensors[key.replace("linear_in", "linear_out")]
            out[f"{front}.{TARGETS[name]}.weight"] = scaling * b @ a
    return out


def agree(adapter, wanted):
    assert [p.message for p in adapter.problems if p.severity == "error"] == []
    assert adapter.deltas.keys() == wanted.keys()
    for key, delta in wanted.items():
        ours = materialise(adapter.deltas[key]).float()
        torch.testing.assert_close(ours, delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_of_one_rank(mode, tmp_path):
    path = whole(tmp_path / "lora.nemo", mode=mode)
    for place in (path, tmp_path):
        assert nemo.detect(local(place))
        adapter = nemo.read(local(place), assume={})
        agree(adapter, expected(trained(), 2.0))
    assert (adapter.vocabulary, adapter.files) == ("megatron", ("lora.nemo",))
    assert adapter.config["base_config"]["num_key_value_heads"] == 2
    assert adapter.config["base_model_name_or_path"] == "/models/base"


@pytest.mark.parametrize(
    ("alpha", "scaling"), [({}, 1.0), ({"alpha": None}, 1.0), ({"alpha": 1}, 0.25)]
)
def test_without_alpha_it_is_the_rank(alpha, scaling, tmp_path):
    adapter = nemo.read(local(whole(tmp_path / "x.nemo", config(**alpha))), assume={})
    agree(adapter, expected(trained(), scaling))


def divided(tensors, width):
    """What each tensor-parallel rank saves."""
    ranks = [{} for _ in range(width)]
    for key, tensor in tensors.items():
        columns = "linear_in" in key and (DENSE in key or FC2 in key)
        if FC1 in key and "linear_out" in key:  # every rank has a part of gate and one of up
            gates, ups = (half.chunk(width) for half in tensor.chunk(2))
            pieces = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        else:
            pieces = tensor.chunk(width, dim=1 if columns else 0)
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[key] = piece.clone()
    return ranks


def staged(tensors, stages):
    """What each pipeline rank saves: its layers, counted from 0."""
    per = 4 // stages
    found = [{} for _ in range(stages)]
    for key, tensor in tensors.items():
        layer = int(key.split(".")[3])
        front, rest = LAYER.format(layer % per), key.removeprefix(LAYER.format(layer))
        found[layer // per][front + rest] = tensor
    return found


@pytest.mark.parametrize(("stages", "width"), [(1, 2), (2, 1), (2, 2), (4, 4)])
def test_parallel_parts_are_put_together(stages, width, tmp_path):
    files = {"model_config.yaml": config(alpha=8)}
    for p, stage in enumerate(staged(trained(), stages)):
        for t, part in enumerate(divided(stage, width)):
            name = f"tp_rank_{t:02}_pp_rank_{p:03}" if stages > 1 else f"mp_rank_{t:02}"
            files[f"{name}/model_weights.ckpt"] = part
    adapter = nemo.read(local(archive(tmp_path / "x.nemo", files)), assume={})
    agree(adapter, expected(trained(), 2.0))


def bridge(**more):
    """A canonical q beside a fused fc1 with DoRA, as Megatron-Bridge names them."""
    front = "module.decoder.layers.0."
    return {
        f"{front}self_attention.linear_qkv.adapter.adapter_q.linear_in.weight": torch.ones(4, 16),
        f"{front}self_attention.linear_qkv.adapter.adapter_q.linear_out.weight": torch.ones(16, 4),
        f"{front}mlp.linear_fc1.adapter.linear_in.weight": torch.ones(4, 16),
        f"{front}mlp.linear_fc1.adapter.linear_out.weight": torch.ones(48, 4),
        f"{front}mlp.linear_fc1.adapter.weight_magnitude": torch.ones(48),
        **more,
    }


def test_a_file_of_megatron_bridges_keys(tmp_path):
    save_file(bridge(), tmp_path / "x.safetensors")
    bundle = local(tmp_path / "x.safetensors")
    assert nemo.detect(bundle)
    adapter = nemo.read(bundle, assume={})
    assert [p.code for p in adapter.problems] == ["alpha_missing"]
    run = {"peft": {"dim": 4, "alpha": 2}, "model": {"num_attention_heads": 4, "hidden_size": 16}}
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump(run))
    adapter = nemo.read(local(tmp_path / "x.safetensors"), assume={})
    assert adapter.problems == ()
    assert adapter.config["base_config"]["head_dim"] == 4
    q = adapter.deltas["decoder.layers.0.self_attention.linear_qkv.q.weight"]
    fc1 = adapter.deltas["decoder.layers.0.mlp.linear_fc1.weight"]
    assert (q.scaling, fc1.delta.scaling) == (0.5, 0.5)
    assert isinstance(fc1, Renormed)


def test_states_of_transformer_engine_are_a_note(tmp_path):
    tensors = trained() | {f"{LAYER.format(0)}{QKV}.linear_in._extra_state": b"state"}
    adapter = nemo.read(local(whole(tmp_path / "x.nemo", tensors=tensors)), assume={})
    assert [(p.code, p.severity) for p in adapter.problems] == [("unexplained", "note")]


TENSORS = trained(1)
ROWS = {
    "rank": (config(adapter_dim=9), TENSORS, "config_conflict", "rank 9, linear_in has 4"),
    "a stranger": (config(), TENSORS | {"model.x": torch.ones(2)}, "unexplained", "model.x"),
    "no out": (
        config(), {k: v for k, v in TENSORS.items() if QKV not in k or "in.w" in k},
        "missing", "linear_in without linear_out",
    ),
    "another method": (
        config() | {"peft": {"peft_scheme": "ia3"}},
        {"model.decoder.layers.0.mlp.adapter_layer.mlp_infused_adapter.scalers": torch.ones(4)},
        "unknown_type", "ia3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_contradictions_are_named(row, tmp_path):
    said, tensors, code, message = ROWS[row]
    adapter = nemo.read(local(whole(tmp_path / "x.nemo", said, tensors)), assume={})
    found = [p for p in adapter.problems if p.code == code and p.severity == "error"]
    assert found
    assert re.search(message, found[0].message)


ONE = {"model_config.yaml": config()}
REFUSED = {
    "no weights": (ONE | {"model_weights/x": {}}, "unknown_type"),
    "no config": ({"model_weights.ckpt": TENSORS}, "malformed"),
    "a rank absent": (
        ONE | {f"tp_rank_0{i}_pp_rank_000/model_weights.ckpt": TENSORS for i in (0, 2)}, "missing"
    ),
    "uneven stages": (
        ONE | {f"tp_rank_00_pp_rank_00{i}/model_weights.ckpt": TENSORS for i in range(3)}, "missing"
    ),
    "ranks that differ": (
        ONE | {"mp_rank_00/model_weights.ckpt": TENSORS, "mp_rank_01/model_weights.ckpt": {}},
        "missing",
    ),
    "an alpha that is none": (
        {"model_config.yaml": config(alpha="${x.y}"), "model_weights.ckpt": TENSORS}, "malformed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_archives_that_cannot_be_read(row, tmp_path):
    files, code = REFUSED[row]
    with pytest.raises(LoratoolsError) as refused:
        nemo.read(local(archive(tmp_path / "x.nemo", files)), assume={})
    assert refused.value.code == code


def test_a_hostile_archive_is_ours_to_refuse(tmp_path):
    path = tmp_path / "x.nemo"
    with tarfile.open(path, "w") as packed:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)
    assert nemo.detect(local(path))
    with pytest.raises(LoratoolsError) as refused:
        nemo.read(local(path), assume={})
    assert refused.value.code == "hostile"


def test_nothing_in_a_config_is_called(tmp_path):
    """reliability row 39: `_target_` is text, and a tag of Python's makes no object."""
    said = config(alpha=8)
    said["peft"]["lora_tuning"]["_target_"] = "os.system"
    path = whole(tmp_path / "x.nemo", said)
    adapter = nemo.read(local(path), assume={})
    assert adapter.config["peft"]["_target_"] == "os.system"
    agree(adapter, expected(trained(), 2.0))


def test_a_distributed_checkpoint_is_named(tmp_path):
    (tmp_path / "run_config.yaml").write_text("peft: {dim: 8}")
    assert not nemo.detect(local(tmp_path))
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert nemo.detect(local(tmp_path))
    with pytest.raises(LoratoolsError, match="export_adapter_weights"):
        nemo.read(local(tmp_path), assume={})


def test_whole_models_and_other_files_are_not_ours(tmp_path):
    base = config() | {"peft": {"peft_scheme": None}}
    assert not nemo.detect(local(whole(tmp_path / "a.nemo", base)))
    assert not nemo.detect(local(whole(tmp_path / "b.nemo", {"num_layers": 2})))
    assert not nemo.detect(local(tmp_path))  # two archives in one folder
    for name, raw in {"c.nemo": b"no", "d.pt": b"no", "e.txt": b"no"}.items():
        (tmp_path / name).write_bytes(raw)
        assert not nemo.detect(local(tmp_path / name))
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "f.safetensors")
    assert not nemo.detect(local(tmp_path / "f.safetensors"))
