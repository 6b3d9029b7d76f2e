"""`convert`: bytes kept, ranks and dtypes changed by a measured amount, many outputs, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.commands.convert import convert
from loratools.errors import FitError, LoratoolsError, MalformedError, UsageError
from tests.tiny import MODULES, numbers, safetensors, write_adapter

WEIGHTS = "adapter_model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def updates(folder: Path, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """ΔW of every module as a dense matrix, in float64."""
    found = {k: t.double() for k, t in tensors(folder).items()}
    stem = "base_model.model.{}.lora_{}.weight"
    return {m: scaling * found[stem.format(m, "B")] @ found[stem.format(m, "A")] for m in MODULES}


def differ(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> float:
    """sqrt(Σ‖ΔW − ΔW'‖² / Σ‖ΔW‖²), the plain way."""
    off = sum(float((old[m] - new[m]).square().sum()) for m in old)
    return (off / sum(float(w.square().sum()) for w in old.values())) ** 0.5


def test_without_rank_and_dtype_every_number_keeps_its_bytes(tmp_path):
    source = write_adapter(tmp_path / "a", lora_alpha=16, base_model_name_or_path="org/model")
    (result,) = convert(source, out=tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {k: t.numpy().tobytes() for k, t in before.items()} == {
        k: t.numpy().tobytes() for k, t in after.items()
    }
    assert result.lossless
    assert result.lost == ()
    assert result.difference is None
    assert (result.targets, result.nbytes) == (4, 1024)
    assert result.makes == "convert: 1 adapter -> adapter, rank 4, 1.02 kB"


def test_a_pickle_becomes_safetensors(tmp_path):
    source = write_adapter(tmp_path / "a")
    held = tensors(source)
    (source / WEIGHTS).unlink()
    torch.save(held, source / "adapter_model.bin")
    (result,) = convert([source / "adapter_model.bin"], out=tmp_path / "out")
    assert result.lossless
    after = tensors(tmp_path / "out")
    assert all(torch.equal(after[k], t) for k, t in held.items())


def test_the_rank_is_cut_optimally_and_the_difference_is_what_it_is(tmp_path):
    source = write_adapter(tmp_path / "a", lora_alpha=8)
    (result,) = convert(source, out=tmp_path / "out", rank=2)
    old, new = updates(source, 2.0), updates(tmp_path / "out")
    for module, whole in old.items():
        u, s, vt = torch.linalg.svd(whole)
        best = u[:, :2] * s[:2] @ vt[:2]
        assert torch.allclose(new[module], best, rtol=1e-5, atol=1e-7)
    assert result.difference == pytest.approx(differ(old, new), rel=1e-6)
    assert result.truncation_error == pytest.approx(differ(old, new), rel=1e-4)
    assert result.lost == (f"the update differs by {100 * result.difference:.3g} % of its norm",)


def test_all_the_energy_is_nearly_all_of_the_update(tmp_path):
    source = write_adapter(tmp_path / "a")
    (result,) = convert(source, out=tmp_path / "out", energy=1.0)
    assert result.difference is not None
    assert result.difference < 1e-6
    assert result.difference == pytest.approx(differ(updates(source), updates(tmp_path / "out")))


def test_a_narrower_dtype_is_rounded_once_and_says_what_that_costs(tmp_path):
    source = write_adapter(tmp_path / "a")
    (result,) = convert(source, out=tmp_path / "out", dtype="bf16")
    after = tensors(tmp_path / "out")
    assert all(torch.equal(after[k], t.bfloat16()) for k, t in tensors(source).items())
    off = differ(updates(source), updates(tmp_path / "out"))
    assert result.difference == pytest.approx(off, rel=1e-9)
    assert not result.lossless
    (again,) = convert(source, out=tmp_path / "same", dtype="fp32")
    assert again.lossless
    assert again.difference == 0


def test_several_adapters_go_into_a_folder_under_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "v1.5"):
        write_adapter(tmp_path / "in" / name)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "in" / "a" / WEIGHTS).read_bytes())
    results = convert(
        ["in/a", "in/v1.5/" + WEIGHTS, "b.safetensors"], out="out", assume=["3:alpha=4"]
    )
    names = [r.output.as_posix() for r in results]
    assert names == ["out/a", "out/v1.5", "out/b"]
    assert all((tmp_path / n / "loratools.json").is_file() for n in names)


def test_two_sources_of_one_name_are_refused(tmp_path):
    paths = [write_adapter(tmp_path / x / "last") for x in ("a", "b")]
    with pytest.raises(UsageError, match="would both become"):
        convert(paths, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="needs an adapter"):
        convert([], out=tmp_path / "out")


def test_what_is_left_out_is_named(tmp_path):
    source = write_adapter(tmp_path / "a")
    (source / "README.md").write_text("a card")
    (result,) = convert(source, out=tmp_path / "out", skip=["*.v_proj"])
    assert result.lost == ("2 of 4 targets were left out",)
    assert result.notes == ("not copied: README.md",)
    assert len(tensors(tmp_path / "out")) == 4


def test_what_is_let_through_is_named(tmp_path):
    source = write_adapter(tmp_path / "a", r=8)
    with pytest.raises(FitError) as refused:
        convert(source, out=tmp_path / "out")
    assert [p.code for p in refused.value.problems] == ["config_conflict"] * 4
    (result,) = convert(source, out=tmp_path / "out", allow=["config_conflict"])
    assert len(result.lost) == 4
    assert all(text.startswith("config_conflict: ") for text in result.lost)


def dora(folder: Path) -> Path:
    """An adapter whose pairs have magnitudes."""
    write_adapter(folder, use_dora=True)
    held = {k: (list(t.shape), t.numpy().tobytes()) for k, t in tensors(folder).items()}
    for i, module in enumerate(MODULES):
        held[f"base_model.model.{module}.lora_magnitude_vector"] = ([8], numbers(8, i, 1.0))
    (folder / WEIGHTS).write_bytes(safetensors(held))
    return folder


def test_the_rank_of_dora_needs_the_base_and_all_adapters_are_looked_at_first(tmp_path):
    paths = [write_adapter(tmp_path / "a"), dora(tmp_path / "d"), dora(tmp_path / "e")]
    with pytest.raises(FitError, match="magnitudes belong to W0") as refused:
        convert(paths, out=tmp_path / "out", rank=2)
    assert [p.code for p in refused.value.problems] == ["needs_base"] * 2
    assert not (tmp_path / "out").exists()
    assert convert(paths[1], out=tmp_path / "same")[0].lossless


@pytest.mark.parametrize("to", ["loralib", "xlabs", "raw", "nothing\x1b"])
def test_formats_that_are_not_written(tmp_path, to):
    with pytest.raises(UsageError, match="this version writes peft"):
        convert(write_adapter(tmp_path / "a"), to=to, out=tmp_path / "out")


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"energy": 1.5}, {"energy": 0.0}, {"dtype": "int8"}, {"skip": ["x"]}]
)
def test_impossible_options(tmp_path, options):
    with pytest.raises(UsageError):
        convert(write_adapter(tmp_path / "a"), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_broken_inputs_and_bad_outputs(tmp_path):
    source = write_adapter(tmp_path / "a")
    whole = (source / WEIGHTS).read_bytes()
    with pytest.raises(LoratoolsError) as inside:
        convert(source, out=source / "out")
    assert inside.value.code == "same_path"
    (source / WEIGHTS).write_bytes(whole[:-8] + b"\x00\x00\xc0\x7f" * 2)
    with pytest.raises(MalformedError) as nan:
        convert(source, out=tmp_path / "out")
    assert nan.value.code == "nonfinite"
    (source / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(MalformedError):
        convert(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
