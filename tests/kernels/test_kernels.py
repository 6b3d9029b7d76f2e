"""The compiled fold writes what torch's operators write, or leaves the tile to them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loratools import kernels
from loratools.adapter import LowRank
from loratools.algebra import held
from loratools.errors import LoratoolsError
from loratools.exact import LowRankSum, TileSum
from loratools.folding import fold_tensor
from loratools.kernels import building
from loratools.narrowing import narrow, settle_open
from tests.small_models import target

FOLDER = Path(kernels.__file__).parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pairs = pytest.mark.parametrize("dtype", DTYPES, ids=str)

pytestmark = pytest.mark.skipif(
    not kernels.available() and not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no C compiler here",
)


def test_they_are_built_where_there_is_a_compiler():
    assert kernels.available()


@pytest.mark.parametrize("value", ["", "1"])
def test_the_portable_way_is_without_them(value):
    code = "from loratools import kernels; print(kernels.available())"
    environment = {**os.environ, "LORATOOLS_PORTABLE": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(not value)


def any_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Finite numbers of all sizes, subnormals and both zeros among them."""
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    limits = torch.iinfo(whole)
    bits = torch.randint(limits.min, limits.max, shape, dtype=torch.int64).to(whole)
    values = bits.view(dtype)
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


def both_ways(w0: torch.Tensor, deltas: list, dtype: torch.dtype, monkeypatch) -> list:
    found = []
    for there in (True, False):
        with monkeypatch.context() as patch:
            if not there:
                patch.setattr(kernels, "available", lambda: False)
            one = target("w", held(w0, "w"), w0.shape, *((1.0, d) for d in deltas))
            try:
                tensor, tally = fold_tensor(one, w0, dtype=dtype)
                found.append((tensor.view(torch.uint8), tally.elements))
            except LoratoolsError as cause:
                found.append(str(cause))
    return found


def low_rank(height: int, rank: int, width: int, size: float, dtype=torch.float32) -> LowRank:
    a = (torch.randn(rank, width) * size).to(dtype)
    b = (torch.randn(height, rank) * size).to(dtype)
    return LowRank(held(a), held(b), 0.7)


@pairs
@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("height", "rank", "width"), [(1, 1, 1), (3, 5, 511), (8, 8, 513), (7, 16, 1100), (2, 33, 40)]
)
def test_its_bytes_are_torchs(base, dtype, height, rank, width, monkeypatch):
    torch.manual_seed(height * width)
    for w0 in (torch.randn(height, width).to(base) * 0.02, any_bits(base, height, width)):
        for size in (1.0, 1e-3, 1e-6, 0.0):
            deltas = [low_rank(height, rank, width, size) for _ in range(2)]
            ours, theirs = both_ways(w0, deltas, dtype, monkeypatch)
            if isinstance(theirs, str):
                assert ours == theirs
            else:
                assert torch.equal(ours[0], theirs[0])
                assert ours[1] == theirs[1]


@pairs
def test_dyadic_sums_lie_halfway_and_go_to_even(dtype, monkeypatch):
    steps = torch.arange(-4096, 4096, dtype=torch.float32).reshape(8, 1024)
    eps = torch.finfo(dtype).eps
    for unit in (eps / 4, eps / 2, torch.finfo(dtype).smallest_normal * eps / 4):
        delta = LowRank(held(torch.ones(1, 1024)), held(torch.ones(8, 1)), unit)
        w0 = (
            (1 + steps * eps / 2).to(dtype)
            if unit > 1e-30 and unit > eps / 8
            else (steps * torch.finfo(dtype).smallest_normal * eps).to(dtype)
        )
        ours, theirs = both_ways(w0, [delta], dtype, monkeypatch)
        assert torch.equal(ours[0], theirs[0])


@pairs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_to_torch(dtype, bad, monkeypatch):
    w0 = torch.ones(4, 600, dtype=dtype)
    w0[3, 599] = bad
    ours, theirs = both_ways(w0, [low_rank(4, 2, 600, 1e-2)], dtype, monkeypatch)
    assert ours == theirs
    assert "the base has 1 NaN or infinite" in ours


def test_what_does_not_fit_is_told(monkeypatch):
    w0 = torch.full((2, 8), 65000.0, dtype=torch.float16)
    ours, theirs = both_ways(w0, [low_rank(2, 2, 8, 1e3)], torch.float16, monkeypatch)
    assert ours == theirs
    assert "do not fit float16" in ours


def test_a_tile_full_of_doubts_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "MANY", 10)
    w0, delta = torch.zeros(4, 64, dtype=torch.bfloat16), low_rank(4, 2, 64, 1.0)
    sums = TileSum(LowRankSum.of([(1.0, delta)], (4, 64)), 0, lambda: w0.double())
    b, a = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 64, dtype=torch.float64)
    product = kernels.Product(b, a, w0.dtype)
    assert kernels.fold(w0, product, 0, torch.empty_like(w0), sums) is None
    monkeypatch.setattr(kernels, "MANY", 256)
    at, near = kernels.fold(w0, product, 0, torch.empty_like(w0), sums)
    assert sorted(at.tolist()) == list(range(256))
    assert near.tolist() == [0.0] * 256


@pairs
def test_the_noted_elements_alone_need_a_second_look(dtype):
    torch.manual_seed(3)
    w0, delta = torch.randn(64, 2000).to(dtype), low_rank(64, 8, 2000, 0.1)
    b, a = delta.b.tensor().double() * delta.scaling, delta.a.tensor().double()
    sums = TileSum(LowRankSum.of([(1.0, delta)], (64, 2000)), 0, lambda: w0.double())
    out = torch.empty_like(w0)
    at, near = kernels.fold(w0, kernels.Product(b, a, dtype), 0, out, sums)
    plain = narrow(w0.double() + b @ a, dtype, sums=sums)
    different = (out != plain).view(-1).nonzero().view(-1).tolist()
    assert set(different) <= set(at.tolist())
    assert len(at) < 20
    settle_open(sums, out, at, near)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(4, 0.03), (16, 1e-3), (37, 0.1), (64, 0.02)])
def test_products_in_float32_give_the_bytes_of_those_in_float64(base, rank, size):
    torch.manual_seed(rank)
    w0, delta = (torch.randn(300, 3000) * 0.02).to(base), low_rank(300, rank, 3000, size)
    b, a = delta.b.tensor().double() * delta.scaling, delta.a.tensor().double()
    sums = TileSum(LowRankSum.of([(1.0, delta)], (300, 3000)), 0, lambda: w0.double())
    found = []
    for short in (True, False):
        product = kernels.Product(b, a, torch.bfloat16)
        assert product.short is not None
        product.short = product.short if short else None
        out = torch.empty(300, 3000, dtype=torch.bfloat16)
        settle_open(sums, out, *kernels.fold(w0, product, 0, out, sums))
        assert (product.short is not None) is short
        found.append(out)
    assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))


def test_where_float32_leaves_much_open_the_rest_is_float64s(monkeypatch):
    """An update whose terms cancel: the bound is far above what is left."""
    torch.manual_seed(5)
    a = torch.randn(1, 3000).repeat(2, 1)
    b = torch.randn(300, 1) * torch.tensor([[1.0, -1.0]])
    delta, w0 = LowRank(held(a), held(b), 1.0), (torch.randn(300, 3000) * 1e-4).bfloat16()
    product = kernels.Product(b.double(), a.double(), torch.bfloat16)
    sums = TileSum(LowRankSum.of([(1.0, delta)], (300, 3000)), 0, lambda: w0.double())
    out = torch.empty_like(w0)
    settle_open(sums, out, *kernels.fold(w0, product, 0, out, sums))
    assert product.short is None
    assert torch.equal(out, w0)
    ours, theirs = both_ways(w0, [delta], torch.bfloat16, monkeypatch)
    assert torch.equal(ours[0], theirs[0])


def test_products_are_in_float32_only_where_it_holds_them():
    b, a = torch.rand(8, 4, dtype=torch.float64), torch.rand(4, 40).double()
    assert kernels.Product(b, a, torch.bfloat16).short is not None
    assert kernels.Product(b, a, torch.float16).short is None
    assert kernels.Product(b, a, torch.float32).short is None
    assert kernels.Product(b, a / 3, torch.bfloat16).short is None
    assert kernels.Product(b * 1e20, a, torch.bfloat16).short is None
    assert kernels.Product(b, a * 2.0**100, torch.bfloat16).short is None
    assert kernels.Product(b * torch.nan, a, torch.bfloat16).short is None


def test_it_is_built_beside_its_source(tmp_path, monkeypatch):
    shutil.copy(FOLDER / "fold.c", tmp_path)
    old = tmp_path / "fold-0123456789abcdef.so"
    old.write_bytes(b"of another text")
    made = building.build(tmp_path)
    assert made.is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"fold.c", made.name}
    assert [p.name for p in FOLDER.glob("fold-*.so")] == [made.name]

    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError):
        building.build(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(building.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="no C compiler"):
        building.build(tmp_path)


def test_an_installation_without_a_compiler_goes_on(tmp_path, monkeypatch):
    said, before = [], {"artifacts": [], "pure_python": True}
    hook = SimpleNamespace(root=str(tmp_path), app=SimpleNamespace(display_warning=said.append))
    (tmp_path / "loratools" / "kernels").mkdir(parents=True)
    shutil.copy(FOLDER / "fold.c", tmp_path / "loratools" / "kernels")
    for name, value in (("CC", "false"), ("LORATOOLS_PURE", "1")):
        monkeypatch.setenv(name, value)
        found = dict(before)
        building.Hook.initialize(hook, "standard", found)
        assert found == before
    assert len(said) == 1
    monkeypatch.delenv("CC")
    monkeypatch.delenv("LORATOOLS_PURE")
    building.Hook.initialize(hook, "standard", found)
    assert found["pure_python"] is False
    assert found["tag"].startswith("py3-none-")
