"""litgpt's container: keys, blocks, refusals; what litgpt itself makes is in tests/oracle."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace
from loratools.algebra import materialise
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import litgpt
from loratools.names.heads import group_order

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "litgpt.md"
OLD = Path(__file__).parents[1] / "data" / "litgpt_0_4_13.safetensors"
QKV = "transformer.h.0.attn.qkv"
HEADINGS = "Files Recognise Keys Shapes Scaling Kinds Cannot-say Variants Sources".split()
SLOTS = ("lora_query", "lora_key", "lora_value")
BASE = {"n_head": 4, "n_query_groups": 2, "head_size": 4, "n_embd": 16, "n_layer": 1}


def hyper(*slots, **more):
    return {"lora_r": 3, "lora_alpha": 5, **dict(zip(SLOTS, slots, strict=True)), **more}


def key_table():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(("key", "module", "part"), key_table())
@pytest.mark.parametrize("front", ["", "module.", "_orig_mod."])
def test_the_reader_has_the_keys_of_the_specification(key, module, part, front):
    key, module = (re.sub(r"\b[NM]\b", "31", text) for text in (key, module))
    assert litgpt.part_of(front + key) == (module, part)


def test_the_specification_has_every_module():
    described = {re.sub(r"\bM\b", "{m}", re.sub(r"\bN\b", "{n}", m)) for _, m, _ in key_table()}
    assert described == set(litgpt.MODULES)
    headings = re.findall(r"^## (.+)$", SPEC.read_text(), re.MULTILINE)
    assert [h.replace(" ", "-") for h in headings] == HEADINGS


@pytest.mark.parametrize(
    "key",
    ["transformer.h.0.attn.c_attn.lora_A", f"{QKV}.lora_A.weight", "lora_A", f"{QKV}.adapter_wte"],
)
def test_other_keys_are_none(key):
    assert litgpt.part_of(key) is None


def write(folder, tensors, config=None, base=BASE, name="lit_model.pth.lora"):
    folder.mkdir(exist_ok=True)
    found = {k: v if isinstance(v, torch.Tensor) else torch.ones(v) for k, v in tensors.items()}
    torch.save({"model": found}, folder / name)
    if config is not None:
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(config))
    if base is not None:
        (folder / "model_config.yaml").write_text(yaml.safe_dump(base))
    return folder


def fused(rows, blocks, module=QKV):
    return {f"{module}.lora_A": (3 * blocks, 16), f"{module}.lora_B": (rows, 3)}


PROJ = {"transformer.h.0.attn.proj.lora_A": (3, 16), "transformer.h.0.attn.proj.lora_B": (16, 3)}
ALL = hyper(True, True, True)
ROWS = {
    "no alpha": (PROJ, {"lora_r": 3}, BASE, "alpha_missing", "--assume alpha="),
    "rank": (PROJ, ALL | {"lora_r": 4}, BASE, "config_conflict", "lora_r=4, lora_B has rank 3"),
    "no b": ({f"{QKV}.lora_A": (9, 16)}, ALL, BASE, "missing", "lora_A without lora_B"),
    "blocks": (fused(32, 2), ALL, BASE, "config_conflict", "has 2 blocks, the config says lora_q"),
    "part of a block": (
        {f"{QKV}.lora_A": (8, 16), f"{QKV}.lora_B": (32, 3)}, ALL, BASE, "shape_factors", "8, 16"
    ),
    "rows": (fused(30, 3), ALL, BASE, "config_conflict", "lora_B has 30 rows"),
    "which blocks": (fused(24, 2), None, BASE, "missing", "enable_lora=true,false,true"),
    "the rest of q": (fused(16, 1), hyper(True, False, False), None, "missing", "unknown"),
    "old rows": (
        fused(24, 2, "transformer.h.0.attn.attn"), hyper(True, False, True), None,
        "missing", "unknown",
    ),
    "a stranger": (PROJ | {"transformer.wte.lora_A": (3, 4)}, ALL, BASE, "unexplained", "wte"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_contradictions_are_named(row, tmp_path):
    tensors, config, base, code, message = ROWS[row]
    adapter = litgpt.read(local(write(tmp_path, tensors, config, base)), assume={})
    found = [p for p in adapter.problems if p.code == code and p.severity == "error"]
    assert found
    assert re.search(message, found[0].message)


def test_what_the_files_do_not_say_is_assumed(tmp_path):
    write(tmp_path, fused(24, 2))
    assumed = {"alpha": "6", "enable_lora": "true,false,true"}
    adapter = litgpt.read(local(tmp_path), assume=assumed)
    assert adapter.problems == ()
    pair = adapter.deltas[f"{QKV}.weight"]
    assert (pair.a.shape, pair.b.shape, pair.scaling) == ((6, 16), (32, 6), 2)
    assert not materialise(pair)[16:24].any()
    write(tmp_path, fused(24, 2), hyper(True, False, True))
    for wrong in ("true,true", "1,0,1", "true,true,false"):
        with pytest.raises(LoratoolsError) as refused:
            litgpt.read(local(tmp_path), assume={"enable_lora": wrong})
        assert refused.value.exit == 2


@pytest.mark.parametrize("name", ["all", "qv", "k", "equal"])
def test_files_of_litgpt_0_4(name, tmp_path):
    """Made by litgpt 0.4.13 (tests/data/litgpt_0_4_13.py): its forward and its merge."""
    old = load_file(OLD)
    slots = {"all": (1, 1, 1), "qv": (1, 0, 1), "k": (0, 1, 0), "equal": (1, 1, 0)}[name]
    groups = {"all": 2, "qv": 2, "k": 1, "equal": 4}[name]
    module = "transformer.h.0.attn.attn"
    tensors = {f"{module}.{part}": old[f"{name}.{part}"] for part in ("lora_A", "lora_B")}
    base = BASE | {"n_query_groups": groups}
    write(tmp_path, tensors, hyper(*map(bool, slots)), base)
    adapter = litgpt.read(local(tmp_path), assume={})
    assert adapter.problems == ()
    ours = materialise(adapter.deltas[f"{module}.weight"]).float()
    torch.testing.assert_close(ours, old[f"{name}.merged"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, old[f"{name}.forward"], rtol=1e-5, atol=1e-5)
    litgpt.write(adapter, tmp_path)  # as attn.qkv, whose rows are [q; k; v]
    again = litgpt.read(local(tmp_path), assume={})
    now = materialise(again.deltas[f"{QKV}.weight"]).float()
    order = list(group_order(4, groups, 4))
    torch.testing.assert_close(now[order], ours, rtol=1e-5, atol=1e-5)


def test_detection(tmp_path):
    write(tmp_path, PROJ, ALL)
    assert litgpt.detect(local(tmp_path))
    assert litgpt.detect(local(tmp_path / "lit_model.pth.lora"))
    write(tmp_path / "b", PROJ, name="x.pt")
    assert litgpt.detect(local(tmp_path / "b" / "x.pt"))
    assert not litgpt.detect(local(tmp_path / "b"))
    write(tmp_path / "c", {"transformer.h.0.attn.c_attn.lora_A": (3, 4)}, name="x.pt")
    assert not litgpt.detect(local(tmp_path / "c" / "x.pt"))
    (tmp_path / "c" / "y.pt").write_text("no")
    assert not litgpt.detect(local(tmp_path / "c" / "y.pt"))


# ------------------------------------------------------------------------------- writing


def leaf(*shape):
    return Leaf.of("x", torch.randn(*shape))


def lora(out=16, rank=2, into=16, scaling=2.0):
    return LowRank(leaf(rank, into), leaf(out, rank), scaling)


LOST = {
    "a bias": (f"{QKV}.bias", Dense(leaf(4)), "Dense"),
    "a full tensor": ("lm_head.weight", Replace(leaf(4, 6)), "Replace"),
    "dora": (f"{QKV}.weight", Renormed(lora(32), leaf(32)), "Renormed"),
    "an embedding": ("transformer.wte.weight", lora(), "no such linear layer"),
    "a convolution": ("lm_head.weight", LowRank(leaf(2, 6, 3), leaf(4, 2, 1), 1.0), "convolution"),
}


@pytest.mark.parametrize("row", LOST)
def test_what_cannot_be_held_is_named(row, tmp_path):
    key, kind, message = LOST[row]
    adapter = Adapter({key: kind, "transformer.h.0.attn.proj.weight": lora()})
    problems = litgpt.lost(adapter)
    assert [(p.code, p.target) for p in problems] == [("loss", key)]
    assert message in problems[0].message
    litgpt.write(adapter, tmp_path)
    assert set(litgpt.read(local(tmp_path), assume={}).deltas) == {
        "transformer.h.0.attn.proj.weight"
    }


def test_without_the_bases_counts_blocks_that_overlap_are_refused(tmp_path):
    """Which rows are q's is guessed only where the update itself agrees."""
    adapter = Adapter({f"{QKV}.weight": lora(32)})
    with pytest.raises(LoratoolsError) as refused:
        litgpt.write(adapter, tmp_path)
    assert refused.value.code == "needs_base"
    odd = Adapter({f"{QKV}.weight": lora(31)})
    with pytest.raises(LoratoolsError, match="31 rows"):
        litgpt.write(odd, tmp_path)
    b = torch.block_diag(torch.ones(16, 1), torch.ones(8, 1), torch.ones(8, 1))
    three = LowRank(leaf(3, 16), Leaf.of("b", b), 1.0)
    litgpt.write(Adapter({f"{QKV}.weight": three}), tmp_path)
    written = torch.load(tmp_path / "lit_model.pth.lora", weights_only=True)["model"]
    assert torch.equal(written[f"{QKV}.lora_B"], torch.ones(32, 1))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_the_other_layers_of_an_mlp_get_zeros(model_type, tmp_path):
    module = "transformer.h.1.mlp.proj"
    base = {"model_type": model_type, "num_hidden_layers": 3}
    adapter = Adapter({f"{module}.weight": lora(16, 2, 24)}, config={"base_config": base})
    litgpt.write(adapter, tmp_path)
    written = torch.load(tmp_path / "lit_model.pth.lora", weights_only=True)["model"]
    first = ["fc"] if model_type == "gpt_neox" else ["fc_1", "fc_2"]
    assert set(written) == {
        f"transformer.h.{n}.mlp.{name}.{part}"
        for n in range(3) for name in (*first, "proj") for part in ("lora_A", "lora_B")
    }  # fmt: skip
    assert {k for k, v in written.items() if v.any()} == {f"{module}.lora_A", f"{module}.lora_B"}
    assert written[f"transformer.h.0.mlp.{first[0]}.lora_B"].shape == (24, 2)
    said = yaml.safe_load((tmp_path / "hyperparameters.yaml").read_text())
    assert said["lora_mlp"] is True
    assert not any(said[name] for name in (*SLOTS, "lora_projection", "lora_head"))
