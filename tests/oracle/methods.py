"""Every PEFT method on every kind of layer: made, trained for two steps, and saved by PEFT."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratools import formats
from loratools.errors import LoratoolsError, refusal
from tests.oracle.folds import fold

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "peft_methods.md"

# ------------------------------------------------------------------------------- layers


class Two(nn.Module):
    """Two layers of one sort, of different sizes, one after the other."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(8, 12), make(12, 16)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.norm(x)).tanh())
        return self.head(x.tanh())


class Channels(Two):
    """The same over images or sequences: channels come second."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, -1)).transpose(1, -1)
        x = self.second(self.first(x).tanh()).tanh()
        return self.head(x.flatten(2).mean(-1))


class Tokens(Two):
    """Two embeddings, side by side."""

    def __init__(self) -> None:
        super().__init__(lambda n, out: nn.Embedding(n + 3, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(x)[..., :4], self.second(x)[..., 4:]], -1).tanh())


class Square(Two):
    """Layers of as many inputs as outputs, where rows and columns are told apart by rule alone."""

    def __init__(self) -> None:
        super().__init__(lambda _, __: nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "Linear": lambda: Two(nn.Linear),
    "square": Square,
    "no bias": lambda: Two(lambda n, out: nn.Linear(n, out, bias=False)),
    "Conv1D": lambda: Two(lambda n, out: Conv1D(out, n)),
    "Conv1d": lambda: Channels(lambda n, out: nn.Conv1d(n, out, 3)),
    "Conv2d 1x1": lambda: Channels(lambda n, out: nn.Conv2d(n, out, 1)),
    "Conv2d 3x3": lambda: Channels(lambda n, out: nn.Conv2d(n, out, 3, stride=2, padding=1)),
    "Conv2d grouped": lambda: Channels(lambda n, out: nn.Conv2d(n, out, 3, groups=2)),
    "Embedding": Tokens,
}
LAYERS = tuple(NETS)


def inputs(layer: str) -> Tensor:
    made = torch.Generator().manual_seed(5)
    if layer == "Embedding":
        return torch.arange(11).reshape(1, 11)
    shape = {"Conv1d": (3, 8, 9)}.get(layer, (3, 8, 8, 7) if "Conv2d" in layer else (3, 5, 8))
    return torch.randn(*shape, generator=made)


def net(layer: str) -> nn.Module:
    torch.manual_seed(11)
    return NETS[layer]().eval()


# ------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Case:
    """One method with its options, by PEFT's class of its config."""

    config: type[peft.PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Any = ("first", "second")
    after: Callable[[nn.Module], Any] = lambda model: None  # to the trained model, before it saves

    @property
    def fields(self) -> set[str]:
        return {field.name for field in fields(self.config)}


def with_options(chosen: Case, **more: Any) -> Case:
    return replace(chosen, options={**chosen.options, **more})


def case(name: str, targets: Any = ("first", "second"), **options: Any) -> Case:
    return Case(getattr(peft, f"{name}Config"), options, targets)


PATTERNS = {"rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}}

PATTERNS_LOKR = {"rank_pattern": {"first": 1}, "alpha_pattern": {"second": 5}}

BLOCKS = BdLoraConfig(target_modules_bd_a=["irs"], target_modules_bd_b=["second"], nblocks=4)


def pruned(chosen: Case) -> Case:
    """An AdaLoRA that lost ranks in training, which its config then tells by masks."""
    masks = {"first.lora_E": [True, False, True, True], "second.lora_E": [False, True, False, True]}

    def prune(model: nn.Module) -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(f"base_model.model.{name}.default")[~torch.tensor(mask)] = 0
        model.peft_config["default"].rank_pattern = masks

    return replace(chosen, after=prune)


# Those of tests/oracle/test_methods_a.py.
CASES_A: dict[str, Case] = {
    "LORA": case("Lora", r=4, lora_alpha=5),
    "LORA DoRA": case("Lora", r=4, use_dora=True),
    "LORA blocks": case("Lora", r=4, use_bdlora=BLOCKS),
    "LORA QA-LoRA": case("Lora", r=4, use_qalora=True, qalora_group_size=4),
    "LORA KaSA": case("Lora", r=4, kasa_config=peft.KasaConfig()),
    "LORA MonteCLoRA": case("Lora", r=4, monteclora_config=peft.MontecloraConfig()),
    "LORA aLoRA": case("Lora", r=4, alora_invocation_tokens=[1]),
    "LORA PiSSA": case("Lora", r=4, init_lora_weights="pissa"),
    "LOHA": case("LoHa", r=2, alpha=3),
    "LOHA patterns": case("LoHa", r=2, alpha=3, **PATTERNS),
    "LOHA effective": case("LoHa", r=2, alpha=3, use_effective_conv2d=True),
    "LOKR": case("LoKr", r=1, alpha=3),
    "LOKR whole": case("LoKr", r=8, alpha=3),
    "LOKR both": case("LoKr", r=1, alpha=3, decompose_both=True, decompose_factor=4),
    "LOKR effective": case("LoKr", r=1, alpha=3, use_effective_conv2d=True, **PATTERNS_LOKR),
    "ADALORA": case("AdaLora", init_r=4, target_r=2, lora_alpha=3, total_step=10),
    "ADALORA pruned": pruned(case("AdaLora", init_r=4, target_r=2, lora_alpha=3, total_step=10)),
    "DELORA": case("Delora", r=3, delora_lambda=5),
    "DELORA patterns": case("Delora", r=3, rank_pattern={"first": 2}, lambda_pattern={"second": 9}),
    "MISS": case("Miss", r=3),
    "MISS mini": case("Miss", r=2, mini_r=4, init_weights="mini"),
    "MISS bat": case("Miss", r=4, init_weights="bat"),
    "VERA": case("Vera", r=5, save_projection=True),
    "VERA seeded": case("Vera", r=5, save_projection=False, projection_prng_key=1234),
    "PVERA": case("Pvera", r=3, save_projection=True),
    "PVERA seeded": case("Pvera", r=3, save_projection=False, projection_prng_key=77),
    "VBLORA": case("VBLoRA", r=3, num_vectors=9, vector_length=4, topk=2),
    "VBLORA best": case(
        "VBLoRA", r=3, num_vectors=9, vector_length=4, topk=3, save_only_topk_weights=True
    ),
    "IA3": case("IA3", feedforward_modules=[]),
    "IA3 feedforward": case("IA3", feedforward_modules=["second"]),
    "HIRA": case("Hira", r=3),
    "LN_TUNING": case("LNTuning", targets=("norm",)),
    "BEFT": case("Beft"),
}

# Those of tests/oracle/test_methods_b.py.
CASES_B: dict[str, Case] = {
    "OFT": case("OFT", oft_block_size=4),
    "OFT exact": case("OFT", oft_block_size=4, use_cayley_neumann=False),
    "OFT terms": case("OFT", r=2, oft_block_size=0, num_cayley_neumann_terms=3),
    "OFT shared": case("OFT", oft_block_size=4, block_share=True),
    "OFT constrained": case("OFT", oft_block_size=4, coft=True, eps=0.05),
    "BOFT": case("BOFT", boft_block_size=4),
    "HRA": case("HRA", r=3),
    "HRA orthogonal": case("HRA", r=4, apply_GS=True),
    "ROAD 1": case("Road", variant="road_1", group_size=4),
    "ROAD 2": case("Road", variant="road_2", group_size=4),
    "ROAD 4": case("Road", variant="road_4", group_size=4),
    "PSOFT": case("Psoft", r=3, psoft_alpha=5),
    "PSOFT pissa": case("Psoft", r=3, ab_svd_init="pissa_init", use_cayley_neumann=True),
    "PSOFT bounded": case("Psoft", r=4, use_cayley_neumann=True, cayley_neumann_eps=0.4),
    "PSOFT free": case("Psoft", r=3, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False),
    "PSOFT lowrank": case("Psoft", r=3, psoft_svd="lowrank", random_seed=9),
    "FOURIERFT": case("FourierFT", n_frequency=40, random_loc_seed=5),
    "FOURIERFT patterns": case("FourierFT", n_frequency=40, n_frequency_pattern={"second": 30}),
    "WAVEFT": case("WaveFT", n_frequency=40),
    "WAVEFT db3": case("WaveFT", n_frequency=40, wavelet_family="db3", scaling=3.0),
    "WAVEFT sym5": case("WaveFT", n_frequency=40, wavelet_family="sym5", scaling=3.0),
    "WAVEFT coif2": case("WaveFT", n_frequency=40, wavelet_family="coif2", scaling=3.0),
    "WAVEFT places": case("WaveFT", n_frequency=40, use_idwt=False, proportional_parameters=True),
    "SHIRA": case("Shira", r=2),
    "SUPERTUNING": case("Supertuning", sparsity=0.7),
    "SUPERTUNING pair": case("Supertuning", sparsity=0.7, r=2, lora_alpha=3),
    "SUPERTUNING unsaved": case("Supertuning", sparsity=0.7, save_precomputed_indices=False),
    "C3A": case("C3A", block_size=4),
    "GRALORA": case("Gralora", r=4, alpha=3, gralora_k=2),
    "GRALORA hybrid": case("Gralora", r=4, alpha=3, gralora_k=4, hybrid_r=2),
    "RANDLORA": case("RandLora", r=3, randlora_alpha=5),
    "RANDLORA seeded": case("RandLora", r=3, randlora_alpha=5, save_projection=False),
    "RANDLORA sparse": case(
        "RandLora", r=3, randlora_alpha=5, save_projection=False, sparse=True,
        projection_prng_key=7,
    ),
    "RANDLORA very sparse": case(
        "RandLora", r=3, randlora_alpha=5, save_projection=False, very_sparse=True
    ),
    "TINYLORA": case("TinyLora", r=3, u=6),
    "TINYLORA tied": case("TinyLora", r=3, u=6, weight_tying=1.0),
    "TINYLORA unsaved": case("TinyLora", r=3, u=6, save_projection=False),
    "UNILORA": case("UniLora", r=3, theta_d_length=20, save_indices=True),
    "UNILORA unsaved": case("UniLora", r=3, theta_d_length=20),
    "FROD": case("Frod", sparse_rate=0.1, progressbar=False),
    "FROD unsaved": case("Frod", sparse_rate=0.1, progressbar=False, save_projection=False),
    "GLORA": case("Glora", r=3),
    "GLORA vectors": case("Glora", config_A_B="vector", config_C="vector", config_D_E="vector"),
    "GLORA numbers": case("Glora", config_A_B="constant", config_C="none"),
    "DEFT": case("Deft", r=3, alpha=5),
    "DEFT qr": case("Deft", r=3, decomposition_method="qr"),
    "DEFT para": case("Deft", r=3, decomposition_method="qr", para=True),
    "OSF": case("OSF", effective_rank=3),
    "PEANUT": case("Peanut", r=3),
    "PEANUT deep": case("Peanut", r=3, depth=2, act_fn="gelu", scaling=0.5),
    "ADAMSS": case("Adamss", r=4, num_subspaces=2),
    "LILY": case("Lily", r=3),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A base on disk, the adapter that PEFT saved, and the model that it was."""

    layer: str
    base: Path
    adapter: Path
    model: nn.Module

    @property
    def outputs(self) -> Tensor:
        with torch.no_grad():
            return self.model(inputs(self.layer))


class PeftRefuses(Exception):
    """PEFT itself makes no such adapter, or its own forward or saving fails."""


def make(chosen: Case, layer: str, folder: Path) -> Made:
    """An adapter that PEFT trained for two steps: nothing in it is zero or as it began."""
    plain = net(layer)
    base = folder / "base"
    base.mkdir(parents=True)
    stored = {k: v.detach().clone().contiguous() for k, v in plain.state_dict().items()}
    save_file(stored, base / "model.safetensors")
    targets = chosen.targets
    targets = list(targets) if isinstance(targets, tuple) else targets
    given = {} if targets is None else {"target_modules": targets}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            model = peft.get_peft_model(plain, chosen.config(**given, **chosen.options))
            train(model, layer)
            chosen.after(model)
            model.save_pretrained(folder / "adapter")
            model.eval()
            made = Made(layer, base, folder / "adapter", model)
            assert torch.isfinite(made.outputs).all()
    except Exception as cause:  # PEFT has no error of its own for this
        first = next(iter(str(cause).splitlines()), "")
        raise PeftRefuses(f"{type(cause).__name__}: {first[:160]}") from cause
    return made


def train(model: nn.Module, layer: str) -> None:
    """Two large steps, after everything trained was moved a little from where it began."""
    made = torch.Generator().manual_seed(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            if parameter.is_floating_point():
                parameter += 0.3 * torch.randn(parameter.shape, generator=made)
    optimiser = torch.optim.Adam(trained, lr=0.05)
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        out = model(inputs(layer))
        (out - torch.linspace(-1, 1, 3)).square().mean().backward()
        optimiser.step()


# ------------------------------------------------------------------------------- judging


def outcome(chosen: Case, layer: str, folder: Path) -> tuple[str, str]:
    """What becomes of one cell of the table, and why: "yes", "PEFT" (it refuses), or our code.

    "yes" is asserted: the folded weights give PEFT's own outputs, in float32 to 1e-5, and what
    merge_and_unload gives where PEFT has it.
    """
    try:
        made = make(chosen, layer, folder)
    except PeftRefuses as cause:
        return "PEFT", str(cause)
    try:
        adapter = formats.read(made.adapter)
        refused = refusal(adapter.problems)
        if refused is not None:
            raise refused
        folded = fold(adapter, made.base)
    except LoratoolsError as cause:
        return cause.code, cause.message
    expected = made.outputs
    ours = net(layer)
    with torch.no_grad():
        moved = (expected - ours(inputs(layer))).abs().max()
    assert moved > 1e-3, "the adapter does nothing"
    ours.load_state_dict(folded)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs(layer)), expected, atol=1e-5, rtol=1e-5)
    merged(made, folded)
    return "yes", ""


def merged(made: Made, folded: Mapping[str, Tensor]) -> None:
    """The weights against those that PEFT merges, where it merges rightly by its own forward."""
    expected = made.outputs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = made.model.merge_and_unload()
        with torch.no_grad():
            right = torch.allclose(whole(inputs(made.layer)), expected, atol=1e-4)
    except Exception:  # no merge of its own, or one that fails
        return
    if right and whole.state_dict().keys() <= folded.keys():
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(folded[key].to(value.dtype), value, atol=1e-5, rtol=1e-5)


def said(name: str) -> dict[str, str]:
    """The row of a case in specs/formats/peft_methods.md: cell by layer."""
    return dict(_said()[name])


@cache
def _said() -> dict[str, dict[str, str]]:
    text = "| peft_type |" + SPEC.read_text().partition("| peft_type |")[2].partition("\n\n")[0]
    table = [[c.strip() for c in row.split("|")] for row in re.findall(r"^\|(.*)\|$", text, re.M)]
    columns = table[0]
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in table}


def cells(cases: Mapping[str, Case]) -> list[Any]:
    """All cells of some rows; what PEFT refuses, and the sorts of layers beside the main ones,
    are slow."""
    return [
        pytest.param(name, layer, marks=() if is_main(name, layer) else pytest.mark.slow)
        for name in cases
        for layer in LAYERS
    ]


def is_main(name: str, layer: str) -> bool:
    beside = ("square", "no bias", "Conv2d 1x1")
    return layer not in beside and said(name)[layer] != "PEFT"
