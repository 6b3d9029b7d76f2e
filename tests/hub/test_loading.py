"""The lines of a card that load what is published are run, on what would be published."""

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from markdown_it import MarkdownIt
from onnx import TensorProto, helper, numpy_helper

import loratools
from loratools.commands import published
from loratools.hub.markdown import front_matter

REPO, BASE = "me/published", "org/base"
WORDS = ["<unk>", "Hello", "a", "photo"]


def sent(folder: Path, out: Path, **options: Any) -> dict[str, str]:
    """Everything that would be published, in another place, and the lines of its card."""
    options = {"license": "mit", "base_model": [BASE], **options}
    found = published.planned(folder, base_models=options["base_model"])
    assert [p.message for p in found.problems] == []
    made = published.card_of(found, options, repo=REPO, ask=False)
    assert [p.message for p in made.problems if p.severity == "error"] == []
    for file in found.files:
        (out / file.name).parent.mkdir(parents=True, exist_ok=True)
        raw = file.path.read_bytes() if file.replaced is None else file.replaced
        (out / file.name).write_bytes(raw)
    (out / "README.md").write_text(made.text)
    blocks = MarkdownIt().parse(front_matter(made.text)[2])
    return {t.info: t.content for t in reversed(blocks) if t.type == "fence"}


def run(lines: str, there: Path, base: Path | None = None) -> dict[str, Any]:
    """The lines with local folders in the place of the Hub's names; what they leave."""
    lines = lines.replace(f'snapshot_download("{REPO}")', repr(str(there)))
    lines = lines.replace(f'hf_hub_download("{REPO}", ', f'"{there}" + "/" + (')
    lines = lines.replace(f'"{REPO}"', repr(str(there)))
    if base is not None:
        lines = lines.replace(f'"{BASE}"', repr(str(base)))
    assert REPO not in lines
    found: dict[str, Any] = {}
    exec(compile(lines, "card", "exec"), found)
    return found


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """As peft saves it, with its own card, which names the base by the path it had."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM",
                        init_lora_weights=False)  # fmt: skip
    get_peft_model(model, config).save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]])).logits


def test_an_adapter_of_peft(adapter, base, tmp_path):
    assert "/base" in (adapter / "README.md").read_text()
    lines = sent(adapter, tmp_path / "x")
    assert str(base.parent) not in (tmp_path / "x" / "README.md").read_text()
    found = run(lines["python"], tmp_path / "x", base)
    from peft import AutoPeftModelForCausalLM

    direct = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(logits(found["model"]), logits(direct))
    assert found["tokenizer"]("Hello").input_ids == [1]
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE


def test_a_folded_model(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loratools.merge([adapter], base, out="folded", allow=["large_update"])
    lines = sent(tmp_path / "folded", tmp_path / "x")
    found = run(lines["python"], tmp_path / "x")
    whole = run(
        'from peft import AutoPeftModelForCausalLM as A\nmodel = A.from_pretrained("me/published")',
        adapter,
    )
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
    assert torch.allclose(logits(found["model"]), logits(whole["model"]), atol=1e-5)
    assert found["tokenizer"]("Hello").input_ids == [1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with a tokenizer, as diffusers saves it."""
    from transformers import CLIPTokenizer

    from tests.oracle.image_bases import pipeline

    folder = tmp_path_factory.mktemp("images") / "sd1"
    made = pipeline("sd1")
    vocab = ["<|startoftext|>", "<|endoftext|>", "a</w>", "photo</w>", *"aphot"]
    words = CLIPTokenizer(vocab={w: i for i, w in enumerate(vocab)}, merges=[], model_max_length=10)
    made.register_modules(tokenizer=words)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def style(images: Path) -> Path:
    """A LoRA of its U-Net, as diffusers' own training scripts save it."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = diffusers.UNet2DConditionModel.from_pretrained(images / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    folder = images.parent / "style"
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet)
    )
    return folder


def steps(lines: str) -> str:
    """With one step in the place of fifty."""
    return re.sub(r'pipeline\(("[^"]*")\)', r"pipeline(\1, num_inference_steps=1)", lines)


def test_an_adapter_of_diffusers(style, images, tmp_path):
    lines = sent(style, tmp_path / "x")
    found = run(steps(lines["python"]), tmp_path / "x", images)
    assert found["pipeline"].get_active_adapters() == ["default_0"]
    assert found["image"].size[0] > 0


def test_an_adapter_in_one_file_of_kohyas(style, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loratools.convert(style, to="kohya", out="style.safetensors")
    lines = sent(tmp_path / "style.safetensors", tmp_path / "x")
    assert 'weight_name="style.safetensors"' in lines["python"]
    found = run(steps(lines["python"]), tmp_path / "x", images)
    assert found["pipeline"].get_active_adapters() == ["default_0"]


def test_a_folded_pipeline(style, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loratools.merge([style], images, out="folded")
    lines = sent(tmp_path / "folded", tmp_path / "x")
    found = run(lines["python"], tmp_path / "x")
    assert type(found["pipeline"]).__name__ == "StableDiffusionPipeline"


def graph(path: Path) -> None:
    """An encoder of sorts: the row of a table for each token."""
    table = numpy_helper.from_array(torch.rand(8, 4).numpy(), "table")
    shape = ["batch", "sequence"]
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, shape)
        for n in ("input_ids", "attention_mask")
    ]
    out = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, 4])
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["kept"]),
        helper.make_node("Gather", ["table", "kept"], ["last_hidden_state"]),
    ]
    whole = helper.make_graph(nodes, "g", ids, [out], [table])
    made = helper.make_model(whole, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(made, path)


def test_a_graph_for_onnxruntime(tmp_path):
    graph(tmp_path / "m" / "model.onnx")
    tokenizer(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "bert"}')
    lines = sent(tmp_path / "m", tmp_path / "x")
    found = run(lines["python"], tmp_path / "x")
    assert found["outputs"][0].shape == (1, 1, 4)
    bare = tmp_path / "bare"
    graph(bare / "model.onnx")
    found = run(sent(bare, tmp_path / "y")["python"], tmp_path / "y")
    assert [i.name for i in found["session"].get_inputs()] == ["input_ids", "attention_mask"]


def test_a_folder_for_transformers_js_is_loaded_by_it(tmp_path):
    graph(tmp_path / "m" / "onnx" / "model_quantized.onnx")
    tokenizer(tmp_path / "m")
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    lines = sent(tmp_path / "m", tmp_path / "x")
    assert 'pipeline("feature-extraction", "me/published", { dtype: "q8" })' in lines["js"]
    data = front_matter((tmp_path / "x" / "README.md").read_text())[0]
    assert data["library_name"] == "transformers.js"


def test_an_adapter_of_onnxruntime(tmp_path):
    import onnxruntime

    (tmp_path / "a").mkdir()
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    names = ("layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight")
    made.set_parameters(
        {n: onnxruntime.OrtValue.ortvalue_from_numpy(torch.rand(4, 4).numpy()) for n in names}
    )
    made.export_adapter(str(tmp_path / "a" / "style.onnx_adapter"))
    found = run(sent(tmp_path / "a", tmp_path / "x")["python"], tmp_path / "x")
    assert type(found["options"]).__name__ == "RunOptions"
