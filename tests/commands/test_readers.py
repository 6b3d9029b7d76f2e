"""What readers make of adapters: every rule, its page, its versions, the programs themselves."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
from typer.main import get_command

from loratools import load
from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace
from loratools.cli.app import build
from loratools.commands.check import check
from loratools.commands.reader_rules import PEFT_FIELDS, READERS, RULES
from loratools.commands.readers import Reader, applies, document, findings, keys_of, parsed
from loratools.errors import LoratoolsError
from tests.tiny import write_adapter, write_base

PAGE = Path(__file__).parents[2] / "specs" / "readers.md"
LAYER = "model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{n}_proj" for n in "qkv")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def pair(module, rank=4, scaling=1.0, names=(".lora_A.weight", ".lora_B.weight")):
    stem = f"base_model.model.{module}"
    a, b = Leaf(stem + names[0], "F32", (rank, 8)), Leaf(stem + names[1], "F32", (8, rank))
    return LowRank(a, b, scaling, scaling * rank)


def dora(module, axis="out", name=".lora_magnitude_vector"):
    return Renormed(pair(module), Leaf(f"base_model.model.{module}{name}", "F32", (8,)), axis)


def made(*deltas, format="peft", vocabulary="hf", config=None, name="x", files=()):
    table = {m if m.endswith(".weight") else f"{m}.weight": d for m, d in deltas}
    said = CONFIG | (config or {}) if format == "peft" else (config or {})
    said = {k: v for k, v in said.items() if v != "absent"}
    return Adapter(table, format, vocabulary, said, name=name, files=files)


def plain(**config):
    return made((Q, pair(Q)), (V, pair(V)), config=config)


def full(name):
    return Replace(Leaf(f"base_model.model.{name}", "F32", (8, 8)))


def image(*deltas, names=(".lora_down.weight", ".lora_up.weight"), alpha=True, **kw):
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    start = [(module, pair(module, names=names))] if not deltas else []
    if alpha:
        start.append(("a", Dense(Leaf(f"{module}.alpha", "F32", ()))))
    kw = {"format": "kohya", "vocabulary": "kohya"} | kw
    return made(*start, *deltas, **kw)


def tensor(name):
    return Dense(Leaf(name, "F32", (8,)))


GGUF = made(("blk.0.attn_q", pair("blk.0.attn_q")), format="gguf", vocabulary="gguf")
FLUX = "transformer.single_transformer_blocks.0.attn.to_q"
DIFFUSERS = made((FLUX, pair(FLUX)), format="diffusers", vocabulary="diffusers")
MLX = made((Q, pair(Q)), format="mlx", files=("adapters.safetensors",))
ONNX = made((Q, pair(Q)), format="onnx_adapter")
ACCEPTED = {
    "vllm": plain(), "sglang": plain(), "llama.cpp": GGUF, "ollama": plain(), "comfyui": image(),
    "a1111": image(), "diffusers": image(), "mlx": MLX, "onnxruntime": ONNX,
    "tensorrt-llm": plain(), "peft": plain(),
}  # fmt: skip

LAST = {"use_dora": True}
MIXED = made((Q, pair(Q)), (V, pair(V, rank=2)), config={"rank_pattern": {"v_proj": 2}})
# What sets off each rule: the reader with a version, the rule's name, the adapter.
CASES = [
    *((r, "format", ACCEPTED["mlx" if r in ("peft", "vllm") else "vllm"])
      for r in ("vllm", "llama.cpp", "mlx", "onnxruntime", "peft")),
    ("sglang", "format", GGUF), ("tensorrt-llm", "format", GGUF), ("ollama", "format", image()),
    *((r, "format", made((f"down_blocks.0.{Q}", pair(Q)))) for r in ("comfyui", "a1111")),
    ("diffusers", "format", made(("transformer_blocks.0.attn.to_q", pair(Q)))),
    *((r, "sort", plain()) for r in ("comfyui", "a1111", "diffusers")),
    *((r, "config", plain(lora_alpha="absent")) for r in ("vllm", "sglang", "tensorrt-llm")),
    *((r, "kind", plain(peft_type="IA3")) for r in ("vllm", "sglang")),
    *((r, "dora", made((Q, dora(Q)), config=LAST))
      for r in ("vllm", "sglang", "sglang@0.5.3", "llama.cpp", "ollama", "onnxruntime",
                "tensorrt-llm")),
    ("vllm@0.6.6", "rslora", plain(use_rslora=True)),
    ("vllm@0.30", "modules_to_save", plain(modules_to_save=["score"])),
    ("vllm", "modules_to_save", plain(modules_to_save=["lm_head"])),
    ("vllm", "bias", plain(bias="all")), ("vllm@0.11.1", "bias", plain(bias="lora_only")),
    ("vllm", "lora_bias", plain(lora_bias=True)),
    ("vllm@0.31.0", "scaling", made((Q, pair(Q, scaling=2.0)), config={"alpha_pattern": {"q": 8}})),
    ("sglang", "scaling", made((Q, pair(Q, scaling=2.0)), config={"use_rslora": True})),
    ("tensorrt-llm", "scaling", made((Q, pair(Q, scaling=2.0)))),
    ("ollama", "scaling", made((Q, pair(Q, scaling=2.0)), config={"use_rslora": True})),
    ("llama.cpp", "own_converter", made((Q, pair(Q, scaling=2.0)), config={"use_rslora": True})),
    ("onnxruntime", "own_converter", made((Q, pair(Q, scaling=2.0)))),
    ("vllm@0.7", "rank", made((Q, pair(Q, rank=300)), config={"r": 300, "lora_alpha": 300})),
    ("vllm", "rank", made((Q, pair(Q, rank=600)), config={"r": 600, "lora_alpha": 600})),
    *((r, "residual", plain(init_lora_weights="pissa"))
      for r in ("vllm", "vllm@0.30", "sglang", "tensorrt-llm")),
    *((r, "alora", plain(alora_invocation_tokens=[1, 2])) for r in ("vllm", "vllm@0.31")),
    ("vllm", "layout", plain(layer_replication=[[0, 4]])),
    *((r, "saved_embeddings", made(("e", full("model.embed_tokens.base_layer.weight"))))
      for r in ("vllm", "vllm@0.16")),
    ("vllm", "tensors", made(("lm_head", full("lm_head.weight")))),
    ("sglang", "targets", plain(target_modules=".*q_proj")),
    ("sglang", "rank", MIXED),
    ("sglang", "q_without_v", made((Q, pair(Q)))),
    ("sglang", "kv_without_q", made((K, pair(K)))),
    ("sglang", "full_weights", made(("lm_head", full("lm_head.weight")))),
    ("sglang", "bias", plain(bias="all")),
    ("llama.cpp", "full_weights", made(("lm_head", full("lm_head.weight")))),
    ("ollama", "full_weights", made(("lm_head", full("lm_head.weight")))),
    ("llama.cpp", "norms", made(("blk.0.attn_norm.weight", tensor("n")), format="gguf")),
    ("ollama", "alpha", plain(lora_alpha=4.0)),
    ("ollama", "mlx_scale", made((Q, pair(Q, scaling=20.0)), format="mlx")),
    ("comfyui", "scaling", made((FLUX, pair(FLUX, scaling=2.0)), format="diffusers",
                                vocabulary="diffusers")),
    ("comfyui", "dora", image(("m", dora("m", name=".dora_scale")))),
    ("comfyui", "magnitude", made((FLUX, dora(FLUX)), format="diffusers", vocabulary="diffusers")),
    ("comfyui", "bias", image(("b", tensor("x.lora_B.bias")))),
    ("comfyui", "embeddings", image(("b", tensor("bundle_emb.me.string_to_param.*")))),
    ("a1111", "names", DIFFUSERS),
    ("a1111", "transformers", image(("f", pair("lora_unet_double_blocks_0_img_attn_qkv")))),
    ("diffusers", "lycoris", image(("l", tensor("lora_unet_x.hada_w1_a")))),
    ("diffusers", "dora", image(("m", dora("m", name=".dora_scale")))),
    ("diffusers@0.39", "mixed_ranks", image(("m", pair("m", rank=2)), ("n", pair("n")),
                                            alpha=False)),
    ("mlx", "file", made((Q, pair(Q)), format="mlx", files=("0000100_adapters.safetensors",))),
    *((r, "rank", made((Q, pair(Q)), (V, pair(V, rank=2)), format="mlx"))
      for r in ("mlx", "mlx@0.30")),
    ("tensorrt-llm", "modules", made((f"{LAYER}.c_attn", pair(f"{LAYER}.c_attn")))),
    ("tensorrt-llm", "tensors", made(("score", full("score.weight")))),
    ("tensorrt-llm", "embeddings", made(("lm_head", pair("lm_head")))),
    ("peft@0.13", "lora_bias", plain(lora_bias=False)),
    ("peft@0.14.0", "target_parameters", plain(target_parameters=["experts.gate_up_proj"])),
]  # fmt: skip


def rules_of(reader, *adapters, base=None):
    found = findings(Reader.of(reader), adapters, base)
    return {p.target: p for p in found.problems}


@pytest.mark.parametrize(("reader", "name", "adapter"), CASES)
def test_a_rule_is_set_off(reader, name, adapter):
    reader_name = reader.partition("@")[0]
    problem = rules_of(reader, adapter)[f"{reader_name}.{name}"]
    [rule] = [r for r in RULES if r.id == problem.target and applies(r, Reader.of(reader))]
    assert problem.code == f"reader_{rule.effect}"
    assert problem.severity == ("warning" if rule.effect == "ignores" else "error")
    assert problem.exit == 5
    assert problem.waivable
    assert rule.what in problem.message
    assert problem.adapter == "x"


SEVERAL = {"ollama.several", "onnxruntime.overlap", "ollama.architecture"}


def test_every_rule_has_such_a_case():
    tested = {f"{reader.partition('@')[0]}.{name}" for reader, name, _ in CASES} | SEVERAL
    assert {r.id for r in RULES if r.reader != "peft" or r.name == "format"} <= tested


@pytest.mark.parametrize("reader", READERS)
def test_what_a_reader_takes_sets_off_nothing(reader):
    assert rules_of(reader, ACCEPTED[reader]) == {}
    for version in ("0.0.1", "0.5", "1.2.3", "99"):
        if reader != "peft":
            assert rules_of(f"{reader}@{version}", ACCEPTED[reader]) == {}


def test_rules_over_several_adapters_and_a_base():
    assert "ollama.several" in rules_of("ollama", plain(), dataclasses.replace(plain(), name="y"))
    both = rules_of("onnxruntime", ONNX, dataclasses.replace(ONNX, name="y"))
    assert "onnxruntime.overlap" in both
    assert "ollama.architecture" in rules_of("ollama", plain(), base={"model_type": "qwen2"})
    for known in ({"model_type": "llama"}, {}, None):
        assert "ollama.architecture" not in rules_of("ollama", plain(), base=known)
    assert "ollama.architecture" not in rules_of("ollama", GGUF, base={"model_type": "qwen2"})


def test_a_rule_ends_with_its_version():
    scaled = made((Q, pair(Q, scaling=2.0)), config={"alpha_pattern": {"q_proj": 8}})
    for version, there in (("0.11", True), ("0.31.9", True), ("0.32.0rc1", True), ("0.32", False)):
        assert ("vllm.scaling" in rules_of(f"vllm@{version}", scaled)) is there
    assert "vllm.scaling" not in rules_of("vllm", scaled)
    assert "vllm.bias" not in rules_of("vllm@0.11.0", plain(bias="all"))


# ------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("lower", "higher"),
    [("0.9", "0.11.0"), ("0.11.0rc1", "0.11"), ("0.11.0rc1", "0.11.0rc2"), ("0.11", "0.11.0.1"),
     ("0.11.0", "1"), ("b999", "b4242"), ("v0.10.2", "0.11.0.dev3")],
)  # fmt: skip
def test_versions_compare_as_versions(lower, higher):
    assert parsed(lower) < parsed(higher)


def test_the_same_version_in_other_words():
    assert parsed("0.11") == parsed("v0.11.0") == parsed("0.11.0+cu128") == parsed("0.11.0.post1")
    assert parsed("") is None
    assert parsed("main") is None
    assert str(Reader.of("vLLM@0.11")) == "vllm@0.11"
    assert str(Reader.of("vllm@latest")) == "vllm"
    assert Reader.of("mlx-lm").name == "mlx"


@pytest.mark.parametrize("text", ["x", "0.", ".1", "1..2", "1.2.3.4.5.6", "1" * 50, "0.1\n", "٣"])
def test_what_is_no_version(text):
    with pytest.raises(LoratoolsError) as caught:
        parsed(text)
    assert caught.value.code == "usage"


# ------------------------------------------------------------------------------- the page


def test_the_page_is_made_of_the_rules():
    made_by = "python -m loratools.cli.readers_page > specs/readers.md"
    assert PAGE.read_text(encoding="utf-8") == document(), f"stale; run: {made_by}"


def test_page_and_rules_say_the_same():
    rows = re.findall(
        r"^\| `([\w.-]+)` \| (\w+) \| ([\d.]*) \| ([\d.]*) \| (.+?) \|",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert rows == [(r.id, r.effect, r.since, r.until, r.what) for r in RULES]


def test_every_rule_names_its_source_and_versions():
    for rule in RULES:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+:[\w./-]+", rule.source), rule.id
        since, until = parsed(rule.since), parsed(rule.until)
        assert since is None or until is None or since < until
    same = [(r.id, r.since, r.until) for r in RULES]
    assert len(same) == len(set(same))


def test_every_way_is_a_command_of_ours():
    app = get_command(build())
    for way in {r.way for r in RULES if r.way}:
        words = shlex.split(way.replace("RANK", "4").replace("ONES", "1,1").replace("ALL", "a b"))
        assert words[0] == "loratools"
        app.commands[words[1]].make_context(words[1], words[2:])


# ------------------------------------------------------------------------------- the line


@pytest.mark.parametrize(
    ("reader", "line"),
    [
        ("vllm", "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules x=x"),
        ("sglang", "python -m sglang.launch_server --model-path BASE --enable-lora "
         "--max-lora-rank 4 --lora-paths x=x"),
        ("llama.cpp", "llama-server -m BASE.gguf --lora x"),
        ("ollama", "printf 'FROM BASE\\nADAPTER x\\n' > Modelfile && "
         "ollama create x -f Modelfile"),
        ("comfyui", "cp x ComfyUI/models/loras/"),
        ("a1111", "cp x stable-diffusion-webui/models/Lora/  # then, in the prompt: <lora:x:1>"),
        ("diffusers", "pipeline.load_lora_weights('x', adapter_name='x')"),
        ("mlx", "mlx_lm.generate --model BASE --adapter-path x"),
        ("onnxruntime", "a_x = onnxruntime.LoraAdapter(); a_x.Load('x'); "
         "run_options.add_active_adapter(a_x)"),
        ("tensorrt-llm", "trtllm-build --checkpoint_dir BASE --lora_plugin auto "
         "--max_lora_rank 4 --lora_dir x"),
        ("peft", "model = peft.PeftModel.from_pretrained(model, 'x')"),
    ],
)  # fmt: skip
def test_the_line_that_loads(reader, line):
    adapter = ACCEPTED[reader]
    assert findings(Reader.of(reader), [adapter]).line([], [adapter], None) == line


def line_of(reader, adapter, base=None, allow=()):
    found = findings(Reader.of(reader), [adapter])
    left = [p for p in found.problems if p.code not in allow]
    return found.line(left, [adapter], base)


def test_the_line_that_makes_it_acceptable():
    scaled = made((Q, pair(Q, scaling=2.0)), (V, pair(V, scaling=2.0)))
    assert line_of("sglang", scaled) == ("loratools convert x --to peft --rank 4 -o x-sglang")
    folded = "loratools merge x --base 'my base' -o x-folded"
    assert line_of("vllm", made((Q, dora(Q))), "my base") == folded
    # GGUF cannot hold it either: folded, not converted.
    assert line_of("llama.cpp", made((Q, dora(Q))), "my base") == folded
    assert line_of("vllm", plain(alora_invocation_tokens=[1])) is None
    assert line_of("comfyui", plain()) is None
    assert line_of("vllm", made((Q, dora(Q))), allow=("reader_refuses",)).startswith("vllm serve")


def test_several_adapters_on_one_line():
    two = [plain(), dataclasses.replace(plain(), name="dir/other one")]
    line = findings(Reader.of("vllm"), two).line([], two, "b")
    assert line.endswith("--max-loras 2 --lora-modules x=x 'other-one=dir/other one'")
    found = findings(Reader.of("ollama"), two)
    assert found.line(found.problems, two, None) == (
        "loratools merge x 'dir/other one' --weights 1,1 -o x-folded"
    )


@pytest.mark.parametrize(
    "base", ["; rm -rf ~", "$(x)", "--trust-remote-code", "a b", "../x", "a\nb"]
)
def test_a_base_named_by_a_file_is_repeated_only_where_it_is_a_hub_id(base):
    adapter = plain(base_model_name_or_path=base)
    assert line_of("vllm", adapter).startswith("vllm serve BASE --enable")
    known = plain(base_model_name_or_path="org/Model-1.5")
    assert line_of("vllm", known).startswith("vllm serve org/Model-1.5 --enable")


def test_paths_are_quoted():
    adapter = dataclasses.replace(plain(), name="my dir/it's; x")
    words = shlex.split(line_of("vllm", adapter))
    assert words[-1] == "it-s-x=my dir/it's; x"
    assert shlex.split(line_of("llama.cpp", adapter))[2] == "my dir/it's; x"


# ------------------------------------------------------------------------------- from files


def test_check_of_a_folder_sees_the_names_in_its_file(tmp_path):
    folder = write_adapter(tmp_path / "a")
    base = write_base(tmp_path / "base")
    result = check([folder], base, for_="vllm@0.11.0")
    assert (result.ok, result.reader) == (True, "vllm@0.11.0")
    assert result.line.endswith(f"--lora-modules a={folder}")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert key in keys_of(load(folder))
    with pytest.raises(LoratoolsError, match="no such reader"):
        check([folder], for_="word")


# ------------------------------------------------------------------------------- the programs


def test_the_fields_of_peft_are_all_dated():
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    first = {  # of PEFT 0.5.0, and of every PEFT config
        "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
        "inference_mode", "peft_version",
    }  # fmt: skip
    assert known - first == {name for name, _, _ in PEFT_FIELDS}


def test_what_peft_saves_is_taken_by_readers_of_peft(tmp_path):
    net = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "v_proj": torch.nn.Linear(8, 8)})
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
    peft.get_peft_model(net, config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["use_rslora"] is True
    adapter = load(tmp_path)
    assert rules_of("vllm", adapter) == {}
    assert rules_of("peft", adapter) == {}
    assert set(rules_of("sglang", adapter)) == {"sglang.scaling"}
    # An older PEFT stops at the first field that it does not know.
    fields = {name for name, first, _ in PEFT_FIELDS if parsed(first) > parsed("0.7.1")}
    fields.discard("runtime_config")  # never saved
    assert {t.removeprefix("peft.") for t in rules_of("peft@0.7.1", adapter)} == fields


def test_diffusers_filters_dora_scale_out():
    from diffusers import StableDiffusionPipeline

    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    state = {
        f"{stem}.lora_down.weight": torch.zeros(4, 8),
        f"{stem}.lora_up.weight": torch.zeros(8, 4),
        f"{stem}.dora_scale": torch.ones(8, 1),
    }
    read, _ = StableDiffusionPipeline.lora_state_dict(dict(state))
    assert len(read) == 2
    assert not any("dora" in k or "magnitude" in k for k in read)


def test_diffusers_of_today_gives_each_rank_its_own_alpha():
    from diffusers.utils.peft_utils import get_peft_kwargs

    ranks = {"a.lora_B.weight": 4, "b.lora_B.weight": 2}
    state = {k: torch.zeros(8, r) for k, r in ranks.items()}
    kwargs = get_peft_kwargs(ranks, None, state)
    assert kwargs["alpha_pattern"] == kwargs["rank_pattern"] != {}


def test_mlx_refuses_another_rank(tmp_path):
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.tuner.utils import load_adapters

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block()]

    said = {
        "fine_tune_type": "lora", "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    tensors = {"layers.0.q_proj.lora_a": mx.zeros((8, 2))}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    with pytest.raises(ValueError, match="incompatible tensors"):
        load_adapters(Net(), str(tmp_path))


def test_onnxruntime_has_the_calls_of_the_line():
    import onnxruntime

    assert hasattr(onnxruntime.LoraAdapter(), "Load")
    assert hasattr(onnxruntime.RunOptions(), "add_active_adapter")
