"""GGUF adapters beside llama.cpp itself: its converters, its runtime and its own fold."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf as package
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratools import merge
from loratools.adapter import Adapter, Leaf, LowRank, Replace
from loratools.containers.bundle import local
from loratools.containers.gguf import read_header
from loratools.containers.local import LocalFile
from loratools.formats import gguf
from loratools.formats import peft as peft_format
from loratools.names.gguf import architecture_of, rules_for
from loratools.names.heads import facts_from, order_of
from loratools.names.rules import Names
from loratools.translating import translate
from tests import environments
from tests.oracle import models

pytestmark = pytest.mark.oracle("llamacpp")

INSIDE = Path(__file__).with_name("llamacpp_inside.py")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SMALL = models.LLAMA | {"pad_token_id": 0}
HALF = ["llama-half"]
TIED = {"tie_word_embeddings": True}
# Bases by name: the class of transformers, and its config where tests/oracle/models.py has none.
BASES = {
    "llama": None,
    "llama-half": ("LlamaForCausalLM", SMALL),
    "llama-biases": None,
    "qwen3": None,
    "gpt2": None,
    "mistral": ("MistralForCausalLM", SMALL),
    "granite": ("GraniteForCausalLM", SMALL),
    "qwen2": ("Qwen2ForCausalLM", SMALL),
    "gemma": ("GemmaForCausalLM", SMALL | TIED | {"head_dim": 4}),
    "gemma2": ("Gemma2ForCausalLM", SMALL | TIED | {"head_dim": 4}),
    "phi3": ("Phi3ForCausalLM", SMALL),
    "olmo": ("OlmoForCausalLM", SMALL),
    "olmo2": ("Olmo2ForCausalLM", SMALL),
    "smollm3": ("SmolLM3ForCausalLM", SMALL),
    "starcoder2": ("Starcoder2ForCausalLM", SMALL),
    "phi": ("PhiForCausalLM", SMALL),
    "stablelm": ("StableLmForCausalLM", SMALL),
}
ADAPTERS = {
    "plain": ("llama", {"target_modules": ALL, "lora_alpha": 6}),
    "biases": ("llama-biases", {"target_modules": ALL, "lora_alpha": 6}),
    "qwen3": ("qwen3", {"target_modules": ALL, "lora_alpha": 6}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "rslora": ("llama", {"target_modules": ALL, "r": 4, "use_rslora": True, "lora_alpha": 6}),
    "patterns": (
        "llama",
        {
            "target_modules": ALL,
            "lora_alpha": 6,
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {"v_proj": 1, "0.mlp.up_proj": 9},
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}
# What convert_lora_to_gguf.py makes rightly, and where it does not.
RIGHT = ["plain", "biases", "qwen3", "embedding"]
WRONG = ["rslora", "patterns", "gpt2"]


def run(command: str, *arguments: str) -> None:
    python = environments.python("llamacpp")
    done = subprocess.run(
        [str(python), str(INSIDE), command, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny bases, each with its GGUF beside it."""
    root = tmp_path_factory.mktemp("gguf-bases")
    for name, made in BASES.items():
        if made is None:
            models.save_base(name, root / name)
            if name == "gpt2":  # as older versions of transformers write it, and llama.cpp reads it
                config = config_of(root / name)
                (root / name / "config.json").write_text(json.dumps(config | {"n_ctx": 32}))
            continue
        torch.manual_seed(3)
        made_by = getattr(transformers, made[0])
        model = made_by(made_by.config_class(**made[1]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.to(torch.float16 if name in HALF else torch.float32).save_pretrained(root / name)
    return {name: root / name for name in BASES}


@pytest.fixture(scope="session")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    """Folders of PEFT adapters."""
    root = tmp_path_factory.mktemp("gguf-adapters")
    for name, (base, options) in ADAPTERS.items():
        config = peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM"} | options)
        models.trained(base, bases[base], config).save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="session")
def converted(bases, adapters) -> Callable[[Path], Path]:
    """llama.cpp's own conversion of a base or an adapter."""

    def beside(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.gguf")

    jobs = []
    for name, b in bases.items():
        jobs.append(["convert_hf_to_gguf.py", str(b), "--outfile", str(beside(b)), "--outtype"])
        jobs[-1].append("f16" if name in HALF else "f32")
    for name, (base, _) in ADAPTERS.items():
        a, b = adapters[name], bases[base]
        jobs.append(["convert_lora_to_gguf.py", str(a), "--base", str(b), "--outfile"])
        jobs[-1] += [str(beside(a)), "--outtype", "f32"]
    run("convert", json.dumps(jobs))
    return beside


def config_of(base: Path) -> dict:
    return json.loads((base / "config.json").read_text())


def order(rule, rows: int, base: Path) -> list[int]:
    found = order_of(rule, [rows], facts_from(config_of(base)))
    return list(range(rows)) if found is None else list(found)


def renamed(adapter: Adapter, base: Path, to: str) -> Adapter:
    """The adapter in the other vocabulary, for this base."""
    config = config_of(base)
    found = translate(adapter, to, facts=facts_from(config))
    assert found.unknown == ()
    said = dict(adapter.config) | {"gguf_architecture": architecture_of(config["model_type"])}
    return replace(found.adapter, config=said)


def pairs_of(adapter: Adapter) -> dict[str, LowRank]:
    """The pairs by key, also where PEFT put a copy of the base's weight beside one."""
    inner = {k: d.then if isinstance(d, Replace) else d for k, d in adapter.deltas.items()}
    return {k: d for k, d in inner.items() if isinstance(d, LowRank)}


def ours(folder: Path, base: Path, out: Path) -> Path:
    """A PEFT adapter as our GGUF."""
    adapter = renamed(peft_format.read(local(folder), assume={}), base, "gguf")
    assert {p.severity for p in gguf.lost(adapter)} <= {"note"}
    gguf.write(adapter, out)
    return out


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", BASES)
def test_weights_are_where_and_how_the_converter_puts_them(name, bases, converted):
    base = bases[name]
    header = read_header(LocalFile(converted(base)))
    kind = config_of(base)["model_type"]
    assert header.values["general.architecture"] == architecture_of(kind)
    names = Names(rules_for(kind))
    left = set(header.tensors)
    for key, weight in load_file(base / "model.safetensors").items():
        module, _, parameter = key.rpartition(".")
        found = names.of_part(module)
        target = f"{found.whole}.{parameter}"
        left.remove(target)
        if "norm" in target:  # of gemma with 1 added, and no low-rank pair has any
            continue
        if kind == "gpt2" and module.endswith(("c_attn", "c_proj", "c_fc")) and weight.ndim == 2:
            weight = weight.T
        theirs = header.leaf(target).tensor()
        assert torch.equal(theirs, weight[order(found.rule, len(weight), base)])
    assert left <= {"output.weight"}  # tied: written again


# ------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", RIGHT)
def test_what_llama_cpp_wrote_is_what_peft_saved(name, bases, adapters, converted):
    base = bases[ADAPTERS[name][0]]
    read = gguf.read(local(converted(adapters[name])), assume={})
    assert [p.message for p in read.problems] == []
    found = renamed(read, base, "hf")
    expected = peft_format.read(local(adapters[name]), assume={})
    pairs = pairs_of(expected)
    assert set(found.deltas) == set(pairs)
    assert found.transposed == expected.transposed
    for key, pair in pairs.items():
        assert found.deltas[key].scaling == pair.scaling
        assert torch.equal(found.deltas[key].a.tensor(), pair.a.tensor())
        assert torch.equal(found.deltas[key].b.tensor(), pair.b.tensor())


@pytest.mark.parametrize("name", RIGHT)
def test_our_file_is_llama_cpp_s(name, bases, adapters, converted, tmp_path):
    """Same tensors, same bytes, same alpha; only the order and the names of people may differ."""
    out = ours(adapters[name], bases[ADAPTERS[name][0]], tmp_path / "ours.gguf")
    mine, theirs = (package.GGUFReader(p) for p in (out, converted(adapters[name])))
    found = {t.name: t for t in mine.tensors}
    assert set(found) == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        assert found[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(found[tensor.name].data, tensor.data)
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert mine.fields[key].contents() == theirs.fields[key].contents()
        assert mine.fields[key].types == theirs.fields[key].types


# ------------------------------------------------------------------------------- running


def next_tokens(runs: list[list], out: Path) -> list[torch.Tensor]:
    """Log-probabilities of the next token, by llama.cpp."""
    run("probabilities", json.dumps(runs), str(out))
    found = json.loads(out.read_text())
    return [torch.tensor([p[str(i)] for i in range(len(p))]).double() for p in found]


def test_llama_cpp_runs_our_files_as_peft_runs_the_adapters(bases, adapters, converted, tmp_path):
    tokens = [3, 17, 5, 30, 8]
    runs, expected = [], []
    for name, (base, _) in ADAPTERS.items():
        file = ours(adapters[name], bases[base], tmp_path / f"{name}.gguf")
        runs.append([tokens, str(converted(bases[base])), str(file)])
        served = models.served(base, bases[base], adapters[name])
        with torch.no_grad():
            expected.append(served(torch.tensor([tokens])).logits[0, -1].log_softmax(-1))
    plain = next_tokens([[r[0], r[1]] for r in runs], tmp_path / "plain.json")
    found = next_tokens(runs, tmp_path / "found.json")
    for name, without, one, other in zip(ADAPTERS, plain, found, expected, strict=True):
        # GPT-2's GELU comes out of a table of 16 bits in llama.cpp.
        assert (one - other.double()).abs().max() < (2e-3 if name == "gpt2" else 1e-4), name
        assert (without - other.double()).abs().max() > 1e-2, name


@pytest.mark.parametrize("name", ["rslora", "patterns"])
def test_one_alpha_for_a_file_says_other_scalings_than_the_adapter_has(
    name, bases, adapters, converted, tmp_path
):
    """convert_lora_to_gguf.py writes lora_alpha and looks at nothing else; our file is right."""
    base = bases[ADAPTERS[name][0]]
    true = peft_format.read(local(adapters[name]), assume={})
    theirs = renamed(gguf.read(local(converted(adapters[name])), assume={}), base, "hf")
    mine = gguf.read(local(ours(adapters[name], base, tmp_path / "ours.gguf")), assume={})
    mine = renamed(mine, base, "hf")
    wrong = 0
    for key, pair in pairs_of(true).items():
        exact = product(pair)
        assert (product(mine.deltas[key]) - exact).norm() < 1e-6 * exact.norm()
        wrong += bool((product(theirs.deltas[key]) - exact).norm() > 0.1 * exact.norm())
    assert wrong == {"rslora": 14, "patterns": 3}[name]


def product(pair: LowRank) -> torch.Tensor:
    return pair.scaling * (pair.b.tensor().double() @ pair.a.tensor().double())


def test_the_converter_turns_the_pairs_of_conv1d_round(bases, adapters, converted):
    """It transposes them with the weights, whose pairs they are not: llama.cpp refuses the file."""
    theirs = gguf.read(local(converted(adapters["gpt2"])), assume={})
    true = peft_format.read(local(adapters["gpt2"]), assume={})
    pair = true.deltas["transformer.h.0.attn.c_attn.weight"]
    turned = theirs.deltas["blk.0.attn_qkv.weight"]
    assert torch.equal(turned.a.tensor(), pair.b.tensor().T)
    assert torch.equal(turned.b.tensor(), pair.a.tensor().T)


# ------------------------------------------------------------------------------- folding


FOLDS = [(n, ADAPTERS[n][0]) for n in ADAPTERS if n != "gpt2"] + [("patterns", "llama-half")]


@pytest.mark.parametrize(("name", "on"), FOLDS)
def test_both_folds_agree(name, on, bases, adapters, converted, tmp_path):
    """Ours into the folder of Hugging Face, llama-export-lora's into the GGUF of the same base.

    Theirs is computed in float32, and what was touched is stored in F16 unless it was F32.
    """
    base = bases[on]
    merge([adapters[name]], base, out=tmp_path / "folded", hash="none")
    file = ours(adapters[name], base, tmp_path / "ours.gguf")
    program = environments.folder() / "llamacpp" / "bin" / "llama-export-lora"
    asked = ["-m", converted(base), "--lora", file, "-o", tmp_path / "theirs.gguf"]
    done = subprocess.run(
        [str(x) for x in (program, *asked)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    header = read_header(LocalFile(tmp_path / "theirs.gguf"))
    names = Names(rules_for(config_of(base)["model_type"]))
    before = load_file(base / "model.safetensors")
    changed, unlike, count = 0, 0, 0
    for key, weight in load_file(tmp_path / "folded" / "model.safetensors").items():
        module, _, parameter = key.rpartition(".")
        found = names.of_part(module)
        mine = weight[order(found.rule, len(weight), base)]
        theirs = header.leaf(f"{found.whole}.{parameter}").tensor()
        if on in HALF and weight.ndim == 2:
            assert theirs.dtype == mine.dtype == torch.float16
            unlike += int((theirs != mine).sum())
            count += mine.numel()
            mine, theirs = mine.float(), theirs.float()
        rounding = 2**-10 if on in HALF else 1e-5
        assert torch.allclose(theirs, mine.float(), rtol=rounding, atol=1e-6)
        changed += not torch.equal(weight, before[key])
    assert changed == len([n for n in header.tensors if f"{n}.lora_a" in tensors_of(file)])
    assert unlike <= count / 100  # at a rounding middle of F16


def tensors_of(file: Path) -> set[str]:
    return set(read_header(LocalFile(file)).tensors)


def test_bf16_and_f16_factors_are_run(bases, adapters, converted, tmp_path):
    base = bases["llama"]
    adapter = renamed(peft_format.read(local(adapters["plain"]), assume={}), base, "gguf")
    tokens, files = [3, 17, 5], []
    for dtype in (torch.bfloat16, torch.float16):
        deltas = {
            k: replace(d, a=cast(d.a, dtype), b=cast(d.b, dtype)) for k, d in adapter.deltas.items()
        }
        files.append(tmp_path / f"{dtype}.gguf")
        gguf.write(replace(adapter, deltas=deltas), files[-1])
    gguf.write(adapter, tmp_path / "wide.gguf")
    runs = [[tokens, str(converted(base)), str(f)] for f in (*files, tmp_path / "wide.gguf")]
    *narrow, wide = next_tokens(runs, tmp_path / "found.json")
    for one in narrow:
        assert 0 < (one - wide).abs().max() < 0.05


def cast(leaf: Leaf, dtype: torch.dtype) -> Leaf:
    return Leaf.of(leaf.name, leaf.tensor().to(dtype))
