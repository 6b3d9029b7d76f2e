"""PEFT's rotations, transforms and sums over W0, folded, give PEFT's own outputs; Poly by task."""

import contextlib
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import nn

from loratools import formats
from loratools.adapter import Leaf, Rotated
from loratools.errors import LoratoolsError, refusal
from loratools.formats.peft import READ_TYPES, assemble
from loratools.formats.peft_methods import METHODS, REFUSED
from loratools.formats.peft_prompts import RUNTIME
from tests.oracle import methods
from tests.oracle.folds import fold
from tests.oracle.methods import CASES_A, CASES_B, case
from tests.refusing import refused


@pytest.mark.parametrize(("name", "layer"), methods.cells(CASES_B))
def test_a_method_on_a_layer_is_as_the_specification_says(name, layer, tmp_path):
    cell, why = methods.outcome(CASES_B[name], layer, tmp_path)
    assert (cell, why) == (methods.said(name)[layer], why)


def test_every_type_of_peft_is_read_or_refused_by_name():
    known = {*METHODS, *READ_TYPES, *REFUSED, *RUNTIME}
    assert {t.value for t in PeftType} <= known
    tested = {name.partition(" ")[0] for name in (*CASES_A, *CASES_B)}
    by_hand = {"BONE", "POLY"}  # an old name of MISS's; below
    assert set(METHODS) <= tested | by_hand
    assert not set(METHODS) & set(REFUSED)


SAVES = [n for n in CASES_B if " " not in n and methods.said(n)["Linear"] == "yes"]


@pytest.mark.parametrize("name", SAVES)
def test_saved_modules_come_with_every_method(name, tmp_path):
    chosen = methods.with_options(CASES_B[name], modules_to_save=["head"])
    assert methods.outcome(chosen, "Linear", tmp_path) == ("yes", "")
    assert {"head.weight", "head.bias"} <= set(formats.read(tmp_path / "adapter").deltas)


@pytest.mark.parametrize("name", [n for n in SAVES if "bias" in CASES_B[n].fields])
def test_trained_biases_come_with_every_method_that_has_them(name, tmp_path):
    chosen = methods.with_options(CASES_B[name], bias="all")
    assert methods.outcome(chosen, "Linear", tmp_path) == ("yes", "")


def test_reading_opens_nothing_and_imports_no_torch(tmp_path):
    made = [methods.make(CASES_B[name], "Linear", tmp_path / name) for name in SAVES]
    script = (
        "import sys\nfrom loratools import formats\n"
        "for path in sys.argv[1:]:\n    assert formats.read(path).deltas, path\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, *(str(one.adapter) for one in made)]
    subprocess.run(command, check=True, timeout=300)


# ------------------------------------------------------------------------------- OFT's flag


@pytest.fixture
def oft(tmp_path):
    return methods.make(case("OFT", oft_block_size=4), "Linear", tmp_path)


def rewritten(made, change):
    path = made.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return made.adapter


def test_oft_without_its_flag_is_refused_with_the_option_that_settles_it(oft):
    path = rewritten(oft, lambda config: config.pop("use_cayley_neumann"))
    problems = formats.read(path).problems
    assert [p.code for p in problems] == ["missing"]
    assert "--assume oft=neumann or oft=exact" in problems[0].message
    for said, terms in (("neumann", 5), ("exact", None)):
        adapter = formats.read(path, assume={"oft": said})
        assert not adapter.problems
        assert {d.settings.get("terms") for d in adapter.deltas.values()} == {terms}
    refused("usage", formats.read, path, assume={"oft": "both"})


@pytest.mark.parametrize("version", ["0.17.1", None, "0.9", "nonsense"])
def test_series_of_older_pefts_are_theirs(oft, version):
    path = rewritten(oft, lambda config: config.update(peft_version=version))
    adapter = formats.read(path)
    assert [p.severity for p in adapter.problems] == ["note"]
    assert all(isinstance(d, Rotated) and d.settings["old"] for d in adapter.deltas.values())


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2", "1.0.0.dev0@main", "0.18.0.dev0"])
def test_newer_series_are_not(oft, version):
    path = rewritten(oft, lambda config: config.update(peft_version=version))
    adapter = formats.read(path)
    assert not adapter.problems
    assert not any("old" in d.settings for d in adapter.deltas.values())


def test_oft_of_before_0_16_is_refused_by_name(oft):
    save_file(
        {f"base_model.model.{m}.oft_r": torch.randn(2, 4, 4) for m in ("first", "second")},
        oft.adapter / "adapter_model.safetensors",
    )
    problems = formats.read(oft.adapter).problems
    assert {p.code for p in problems} == {"unknown_type"}
    assert "PEFT before 0.16" in problems[0].message


@pytest.mark.parametrize(
    "field",
    [{"coft": "yes"}, {"use_cayley_neumann": 1}, {"num_cayley_neumann_terms": 2.5}],
)
def test_flags_are_no_words(oft, field):
    path = rewritten(oft, lambda config: config.update(field))
    refused("malformed", formats.read, path)


# ------------------------------------------------------------------------------- TinyLoRA


def test_a_projection_that_no_seed_draws_is_refused_when_opened(tmp_path):
    made = methods.make(CASES_B["TINYLORA"], "Linear", tmp_path)
    path = made.adapter / "adapter_model.safetensors"
    tensors = {k: v + ("_P" in k) for k, v in load_file(path).items()}
    save_file(tensors, path)
    adapter = formats.read(made.adapter)
    assert not adapter.problems
    refused("config_conflict", fold, adapter, made.base)


# ------------------------------------------------------------------------------- Poly


class Line(nn.Module):
    """Poly's layers take the task beside the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 12)

    def forward(self, x, task_ids=None):
        return self.first(x)


def poly(folder, tasks):
    base = folder / "base"
    base.mkdir()
    save_file(Line().state_dict(), base / "model.safetensors")
    config = peft.PolyConfig(target_modules=["first"], r=3, n_tasks=tasks, n_skills=4, n_splits=2)
    model = peft.get_peft_model(Line(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter", model.base_model.model.first


@pytest.mark.parametrize(("tasks", "task"), [(1, None), (1, "0"), (3, "0"), (3, "2")])
def test_one_task_of_poly_folds(tmp_path, tasks, task):
    base, path, layer = poly(tmp_path, tasks)
    adapter = formats.read(path, assume={} if task is None else {"task": task})
    assert not adapter.problems
    folded = fold(adapter, base)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        wanted = layer(x, task_ids=torch.full((2,), int(task or 0)))
    found = nn.functional.linear(x, folded["first.weight"], folded["first.bias"])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_several_tasks_of_poly_are_refused_with_the_option_that_takes_one(tmp_path):
    _, path, _ = poly(tmp_path, 3)
    problems = formats.read(path).problems
    assert [p.code for p in problems] == ["not_foldable"]
    assert "--assume task=0" in problems[0].message
    refused("usage", formats.read, path, assume={"task": "3"})


# ------------------------------------------------------------------------------- broken files

FOLDS = [n for n in CASES_B if methods.said(n)["Linear"] == "yes"]


def broken(tensor, how):
    """A tensor of another shape, dtype or value, in the way that a number says."""
    match how:
        case 0:
            return tensor.reshape(-1)
        case 1:
            return tensor[..., :0]
        case 2:
            return tensor[: len(tensor) // 2]
        case 3:
            return tensor.transpose(0, -1).contiguous()
        case 4:
            return tensor[None]
        case 5:
            return tensor.int() if tensor.is_floating_point() else tensor * 1.5
        case 6:
            return torch.cat([tensor, tensor], -1)
        case _:
            return tensor * 0 + 10**9


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_wrong_in_a_file_is_refused_with_a_code(name, tmp_path):
    """Nothing but our own errors comes of it, whatever tensor is broken in whatever way."""
    made = methods.make(CASES_B[name], "Linear", tmp_path)
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    for key in tensors:
        for how in range(8):
            changed = {**tensors, key: broken(tensors[key], how)}
            held = {k: Leaf.of(k, v) for k, v in changed.items()}
            with contextlib.suppress(LoratoolsError):
                adapter = assemble(held, config, name="broken")
                if refusal(adapter.problems) is None:
                    fold(adapter, made.base)


HUGE = [
    ("OFT", "num_cayley_neumann_terms"),
    ("PSOFT pissa", "num_cayley_neumann_terms"),
    ("PSOFT lowrank", "psoft_svd_lowrank_niter"),
    ("PSOFT lowrank", "random_seed"),
    ("FOURIERFT", "random_loc_seed"),
    ("WAVEFT", "random_loc_seed"),
    ("RANDLORA", "projection_prng_key"),
    ("TINYLORA", "projection_seed"),
]


@pytest.mark.parametrize(("name", "field"), HUGE)
@pytest.mark.parametrize("value", [10**40, -(10**40)])
def test_numbers_out_of_reason_are_refused(name, field, value, tmp_path):
    made = methods.make(CASES_B[name], "Linear", tmp_path)
    path = rewritten(made, lambda config: config.update({field: value}))
    refused("malformed", formats.read, path)


# ------------------------------------------------------------------------------- raw dumps

DUMPED = [n for n in SAVES if n not in ("SHIRA",)] + ["PEANUT deep", "OSF"]


@pytest.mark.parametrize("name", DUMPED)
def test_names_of_adapters_left_in_keys_are_read_past(name, tmp_path):
    """What `model.state_dict()` calls its tensors, cut to those that PEFT saves."""
    made = methods.make(CASES_B[name], "Linear", tmp_path)
    path = made.adapter / "adapter_model.safetensors"
    saved = load_file(path)
    dump = {
        k: v.contiguous()
        for k, v in made.model.state_dict().items()
        if k.replace(".default", "") in saved
    }
    assert {k.replace(".default", "") for k in dump} == set(saved)
    wanted = formats.read(made.adapter)
    folded = fold(wanted, made.base)
    save_file({k: v.clone() for k, v in dump.items()}, path)
    found = formats.read(made.adapter)
    assert not [p for p in found.problems if p.severity == "error"]
    assert list(found.deltas) == list(wanted.deltas)
    for key, tensor in fold(found, made.base).items():
        assert torch.equal(tensor, folded[key])
