"""Every format to every format and back, through files: what is kept, and what is refused."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import formats
from loratools.adapter import Adapter, LowRank
from loratools.algebra import materialise
from loratools.commands.convert import convert
from loratools.errors import LoratoolsError
from loratools.names.heads import facts_from
from loratools.translating import translate
from tests.commands import adapter_files, image_files
from tests.commands.adapter_files import BASE, LAYERS, LINEAR, Llama, Pair, Pairs
from tests.commands.image_files import CLIP, FLUX, OWN, SD1, XLABS

# What is expected of each pair, as formats.md §17 has it: L factors, scalings and alphas are the
# same when they are back; L* every ΔW is, to the rounding of float32; ~ the same, alpha is the rank
# (an .onnx_adapter has none); X refused: no base has both names.
LANGUAGE = """
             peft kohya diffusers gguf mlx torchtune litgpt adapterhub onnx_adapter
peft         -    X     X         L*   L*  L*        L*     L*         L*
gguf         L*   X     X         -    L*  L*        L*     L*         L*
mlx          L*   X     X         L*   -   L*        L*     L*         L*
torchtune    L*   X     X         L    L*  -         L*     L*         L*
litgpt       L*   X     X         L*   L*  L*        -      L*         L*
adapterhub   L*   X     X         L*   L*  L*        L*     -          L*
onnx_adapter ~    X     X         ~    ~   ~         ~      ~          -
loralib      L*   X     X         L*   L*  L*        L*     L*         L*
nemo         L*   X     X         L*   L*  L*        L*     X          L*
olive        ~    X     X         ~    ~   ~         ~      ~          ~
raw          L*   X     X         L*   L*  L*        L*     L*         L*
"""
IMAGE = """
             peft kohya diffusers gguf mlx torchtune litgpt adapterhub onnx_adapter
peft         -    L     L         X    X   X         X      X          L*
kohya        L    -     L         X    X   X         X      X          L*
diffusers    L    L     -         X    X   X         X      X          L*
xlabs        L    L     L         X    X   X         X      X          L*
bfl          L    L     L         X    X   X         X      X          L*
comfy        L    L     L         X    X   X         X      X          L*
cloneofsimo  L    L     L         X    X   X         X      X          L*
"""
ALPHAS = (1.0, 16.0, 0.75, -3.0, 5.5, 13.3, 0.1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Formats whose files hold strings, so that a source's metadata comes back out of them.
STRINGS = ("peft", "kohya", "diffusers", "gguf", "mlx")
FILLING = ("torchtune", "litgpt")  # in which layers that are left alone have pairs of zeros
# What of an adapter a format can hold: one rank and alpha, one alpha, or each its own.
EVEN = ("mlx", "torchtune", "litgpt", "adapterhub", "nemo", "loralib")
ONE_ALPHA = (*EVEN, "gguf")
# AdapterHub puts LoRA at these alone.
HUB = (*LINEAR[:3], "mlp.up_proj", "mlp.down_proj")

few = settings(max_examples=3, derandomize=True, deadline=None)


def verdicts(table: str) -> dict[tuple[str, str], str]:
    head, *rows = [line.split() for line in table.strip().splitlines()]
    return {(row[0], to): said for row in rows for to, said in zip(head, row[1:], strict=True)}


LANGUAGES, IMAGES = verdicts(LANGUAGE), verdicts(IMAGE)
PAIRS = [pytest.param(*p, v, id="-".join(p)) for p, v in LANGUAGES.items() if v != "-"]
KINDS = {"xlabs": ["flux"], "bfl": ["flux"], "comfy": ["flux"], "cloneofsimo": ["sd1"]}
PICTURES = [
    pytest.param(*pair, verdict, kind, id="-".join((*pair, kind)))
    for pair, verdict in IMAGES.items()
    if verdict != "-"
    for kind in KINDS.get(pair[0], ["sd1", "flux"])
]


def test_every_format_has_its_row_and_column():
    image = {"xlabs", "bfl", "comfy", "cloneofsimo", "kohya", "diffusers"}
    assert {x for x, _ in LANGUAGES} == set(formats.NAMES) - image
    assert {x for x, _ in IMAGES} == image | {"peft"}
    for table in (LANGUAGES, IMAGES):
        assert {y for _, y in table} == set(formats.WRITERS)
        assert set(table.values()) <= {"-", "L", "L*", "~", "X"}


# ------------------------------------------------------------------------------- drawn adapters


@st.composite
def pairs_of(draw, shapes: Mapping[str, tuple[int, ...]], *, even=False, one_alpha=False,
             wholes=(), dtypes=DTYPES):  # fmt: skip
    """A pair for every module; those of one of `wholes` share A, rank and alpha."""
    rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from(ALPHAS))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 1 << 20))
    made: dict[str, Pair] = {}
    random = torch.Generator().manual_seed(seed)
    leader = {part: whole[0] for whole in wholes for part in whole}
    for module, shape in shapes.items():
        out, into, *kernel = shape
        first = made.get(leader.get(module, ""))
        own = rank if even else draw(st.integers(1, 4))
        said = alpha if even or one_alpha else draw(st.sampled_from(ALPHAS))
        own, said = (own, said) if first is None else (first.rank, first.alpha)
        a = torch.randn(own, into, *kernel, generator=random).to(dtype)
        b = torch.randn(out, own, *[1] * len(kernel), generator=random).to(dtype)
        made[module] = Pair(a if first is None else first.a, b, said)
    return made


@st.composite
def llamas(draw, x: str, y: str):
    """A base, and an adapter of it that `x` can say and `y` has names for."""
    base = Llama(draw(st.sampled_from([2, 4])))
    names: tuple[str, ...] = HUB if "adapterhub" in (x, y) else LINEAR
    if x not in ("litgpt", "nemo"):
        names = tuple(n for n in names if draw(st.booleans())) or names[:1]
    modules = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in names]
    if x not in ("litgpt", "nemo") and draw(st.booleans()):
        modules = modules[: len(names)]  # the first layer alone
    if x not in ("nemo", "adapterhub") and y != "adapterhub" and draw(st.booleans()):
        modules.append("lm_head")
    wholes = []
    if x == "nemo":
        for i in range(LAYERS):
            own = [f"model.layers.{i}.{name}" for name in LINEAR]
            wholes += [own[:3], own[4:6]]
    made = draw(pairs_of(
        {m: base.shape(m) for m in modules}, even=x in EVEN, one_alpha=x in ONE_ALPHA,
        wholes=wholes, dtypes=DTYPES if x in ("peft", "mlx", "torchtune") else DTYPES[:1],
    ))  # fmt: skip
    return base, made


@cache
def base_of(kv: int) -> tuple[TemporaryDirectory, Path]:
    held = TemporaryDirectory()
    return held, Llama(kv).write(Path(held.name) / BASE)


# ------------------------------------------------------------------------------- comparing


def updates(adapter: Adapter, to: str, config: Mapping[str, object]) -> dict[str, np.ndarray]:
    """ΔW by module, in the names that all formats of a family can be brought to."""
    found = translate(adapter, to, facts=facts_from(config))
    assert found.unknown == ()
    assert not [p for p in found.adapter.problems if p.severity == "error"]
    deltas = found.adapter.deltas.items()
    return {key.removesuffix(".weight"): materialise(delta).numpy() for key, delta in deltas}


def same_updates(adapter: Adapter, pairs: Pairs, to: str, config=None, *, filled=False) -> None:
    """Every ΔW is there, to the rounding of float32; and no other, but for zeros where `filled`."""
    found = updates(adapter, to, config or {})
    assert found.keys() >= pairs.keys()
    for module, delta in found.items():
        if module in pairs:
            wanted, bound = pairs[module].update, pairs[module].bound
            assert (abs(delta.reshape(wanted.shape) - wanted) <= bound).all(), module
        else:
            assert filled, f"{module} is new"
            assert not delta.any(), f"{module} was left alone"


def same_factors(old: Adapter, new: Adapter, *, filled: bool = False) -> None:
    """Factors by their bytes, scalings and alphas."""
    assert new.deltas.keys() >= old.deltas.keys()
    assert filled or new.deltas.keys() == old.deltas.keys()
    for key, delta in old.deltas.items():
        now = new.deltas[key]
        assert isinstance(delta, LowRank)
        assert isinstance(now, LowRank)
        assert (now.a.dtype, now.a.shape, now.a.read()) == (
            delta.a.dtype, delta.a.shape, delta.a.read()
        ), key  # fmt: skip
        assert (now.b.dtype, now.b.shape, now.b.read()) == (
            delta.b.dtype, delta.b.shape, delta.b.read()
        ), key  # fmt: skip
        said = delta.scaling * delta.rank if delta.alpha is None else delta.alpha
        kept = now.scaling * now.rank if now.alpha is None else now.alpha
        assert (now.scaling, kept) == (delta.scaling, said), key


def suffixed(path: Path, to: str) -> Path:
    return path.with_suffix(formats.WRITERS[to].SUFFIX or "")


def refused(source: Path, to: str, out: Path, **options) -> LoratoolsError:
    with pytest.raises(LoratoolsError) as caught:
        convert(source, to=to, out=suffixed(out, to), **options)
    assert not list(out.parent.glob(f"{out.name}*"))
    assert caught.value.message.isprintable()
    return caught.value


# Of one's own metadata, what is made anew with each file.
def metadata(adapter: Adapter) -> dict[str, str]:
    return {k: v for k, v in adapter.metadata.items() if k != "lora_adapter_metadata"}


# ------------------------------------------------------------------------------- language


@pytest.mark.parametrize(("x", "y", "verdict"), PAIRS)
def test_language_models_there_and_back(x, y, verdict, tmp_path):
    @few
    @given(llamas(x, "" if verdict == "X" else y))
    def there_and_back(drawn):
        base, pairs = drawn
        with TemporaryDirectory(dir=tmp_path) as folder:
            one_way(x, y, verdict, base, pairs, Path(folder))

    there_and_back()


def one_way(x: str, y: str, verdict: str, base: Llama, pairs: Pairs, folder: Path) -> None:
    source = adapter_files.WRITERS[x](folder / "x", pairs, base)
    assume = [f"alpha={next(iter(pairs.values())).alpha}"] if x == "loralib" else []
    where = base_of(base.kv)[1]
    if verdict == "X":
        error = refused(source, y, folder / "y", base=where, assume=assume)
        assert error.code == "loss"
        assert source.name in error.message or "weight" in error.message
        return
    (result,) = convert(source, to=y, out=suffixed(folder / "y", y), base=where, assume=assume)
    assert result.lost == ()
    read = formats.read(suffixed(folder / "y", y))
    assert (read.format, [p for p in read.problems if p.severity == "error"]) == (y, [])
    same_updates(read, pairs, "hf", base.config, filled=y in FILLING)
    if y == "onnx_adapter" or verdict == "~":
        assert y != "peft" or {d.alpha for d in read.deltas.values()} == {
            float(d.rank) for d in read.deltas.values()
        }
    if x not in formats.WRITERS:
        return
    convert(suffixed(folder / "y", y), to=x, out=suffixed(folder / "z", x), base=where)
    old, new = formats.read(source), formats.read(suffixed(folder / "z", x))
    same_updates(new, pairs, "hf", base.config, filled=x in FILLING)
    even = len({(p.rank, p.alpha) for p in pairs.values()}) == 1
    if verdict == "L" or (even and "onnx_adapter" not in (x, y)):
        single = all(float(np.float32(p.alpha)) == p.alpha for p in pairs.values())
        if single or y != "gguf":  # whose alpha is a float32
            same_factors(old, new, filled=x in FILLING)
    if y in STRINGS:
        assert metadata(old).items() <= metadata(new).items()
    if y != "onnx_adapter" and x != "onnx_adapter":
        assert new.config["base_model_name_or_path"] == BASE


def test_pairs_of_zeros_in_layers_that_were_left_alone_do_not_come_back(tmp_path):
    base = Llama(2)
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]
    torch.manual_seed(0)
    pairs = {m: Pair(torch.randn(2, base.shape(m)[1]), torch.randn(base.shape(m)[0], 2), 4.0)
             for m in names}  # fmt: skip
    source, where = adapter_files.peft(tmp_path / "x", pairs, base), base_of(2)[1]
    for to in FILLING:
        convert(source, to=to, out=tmp_path / to, base=where)
        filled = formats.read(tmp_path / to)
        assert len(filled.deltas) > len(pairs)
        (result,) = convert(tmp_path / to, to="peft", out=tmp_path / f"{to}-back", base=where)
        assert "zeros left out" in " ".join(result.notes)
        back = formats.read(tmp_path / f"{to}-back")
        same_factors(formats.read(source), back)
        same_updates(back, pairs, "hf", base.config)
    # A pair that was begun and not trained (A random, B zero) is one of the adapter's targets.
    begun = {**pairs, names[0]: replace(pairs[names[0]], b=torch.zeros(8, 2))}
    source = adapter_files.peft(tmp_path / "begun", begun, base)
    convert(source, to="mlx", out=tmp_path / "mlx", base=where)
    assert len(formats.read(tmp_path / "mlx").deltas) == 2


# ------------------------------------------------------------------------------- images


def shapes_for(x: str, y: str, kind: str) -> tuple[dict[str, tuple[int, ...]], list[list[str]]]:
    """Modules that both formats hold, and which of them share A."""
    if x == "cloneofsimo":
        return image_files.numbered(), []
    if kind == "flux":
        table = XLABS if x == "xlabs" else OWN
        parts = [p for each in table.values() for p in each]
        return {m: FLUX[m] for m in parts}, list(table.values())
    found = dict(SD1)
    if "peft" in (x, y) or y == "onnx_adapter":
        found = {m: s for m, s in found.items() if not m.startswith(CLIP)}
    if y == "onnx_adapter":
        found = {m: s for m, s in found.items() if len(s) == 2}
    return found, []


@pytest.mark.parametrize(("x", "y", "verdict", "kind"), PICTURES)
def test_image_models_there_and_back(x, y, verdict, kind, tmp_path):
    shapes, wholes = shapes_for(x, y, kind)
    plain = x in ("xlabs", "bfl", "cloneofsimo")  # scaling 1, which alpha = rank says

    @few
    @given(pairs_of(shapes, wholes=wholes))
    def there_and_back(pairs):
        if plain:
            pairs = {m: replace(p, alpha=float(p.rank)) for m, p in pairs.items()}
        with TemporaryDirectory(dir=tmp_path) as folder:
            one_picture(x, y, verdict, pairs, Path(folder))

    there_and_back()


def one_picture(x: str, y: str, verdict: str, pairs: Pairs, folder: Path) -> None:
    source = image_files.WRITERS[x](folder / "x", pairs)
    if x == "kohya":  # so that it has what kohya's trainer writes of each file
        (made,) = convert(source, out=folder / "fresh.safetensors")
        source = made.output
    if verdict == "X":
        error = refused(source, y, folder / "y")
        assert error.code == "loss"
        assert "language models" in error.message or "other models" in error.message
        return
    (result,) = convert(source, to=y, out=suffixed(folder / "y", y))
    assert result.lost == ()
    there = formats.read(suffixed(folder / "y", y))
    assert (there.format, [p for p in there.problems if p.severity == "error"]) == (y, [])
    same_updates(there, pairs, "diffusers", filled=x == "xlabs" and y == "kohya")
    if x not in formats.WRITERS:
        return
    convert(suffixed(folder / "y", y), to=x, out=suffixed(folder / "z", x))
    old, new = formats.read(source), formats.read(suffixed(folder / "z", x))
    same_updates(new, pairs, "diffusers")
    if verdict == "L":
        same_factors(old, new)
    if y in STRINGS:
        assert metadata(old).items() <= metadata(new).items()
        if x == "kohya":
            assert metadata(old) == metadata(new)


@few
@given(pairs_of(FLUX))
def test_parts_of_a_fused_weight_with_factors_of_their_own(tmp_path_factory, pairs):
    """Flux' qkv of three pairs has their ranks together, and gives them back."""
    folder = tmp_path_factory.mktemp("fused")
    for x in ("peft", "diffusers"):
        source = image_files.WRITERS[x](folder / f"x-{x}", pairs)
        (result,) = convert(source, to="kohya", out=folder / f"y-{x}.safetensors")
        assert any("fused weights, exact" in note for note in result.notes)
        same_updates(formats.read(result.output), pairs, "diffusers")
        (back,) = convert(result.output, to=x, out=suffixed(folder / f"z-{x}", x))
        same_updates(formats.read(back.output), pairs, "diffusers")


@pytest.mark.parametrize("y", ["peft", "onnx_adapter"])
def test_an_adapter_of_two_components_has_to_be_chosen_from(y, tmp_path):
    pairs = {m: Pair(torch.ones(2, *s[1:]), torch.ones(s[0], 2, *[1] * len(s[2:])), 2.0)
             for m, s in SD1.items() if len(s) == 2}  # fmt: skip
    source = image_files.kohya(tmp_path / "x", pairs)
    error = refused(source, y, tmp_path / "y")
    assert error.code == "loss"
    assert "text_encoder, unet" in error.message
    (result,) = convert(source, to=y, out=suffixed(tmp_path / "y", y), only=["unet"])
    unet = {m: p for m, p in pairs.items() if m.startswith("unet.")}
    same_updates(formats.read(result.output), unet, "diffusers")
