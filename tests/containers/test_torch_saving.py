"""Files that we write as torch.save does: torch reads them, and so do we."""

import hashlib

import pytest
import torch

from loratools.adapter import Leaf
from loratools.containers import torch_saving, torch_zip
from loratools.containers.local import LocalFile
from loratools.views import part, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("within", [None, "model"])
def test_torch_and_we_read_what_is_written(dtype, within, tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(3, 5).to(dtype), torch.randn(4, 6).to(dtype)
    given = {"a": Leaf.of("a", a), "b.x": part(turned(Leaf.of("b", b)), 1, 3)}
    path = tmp_path / "x.pt"
    digest = torch_saving.write(path, given, within=within)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = torch.load(path, weights_only=True)
    found = found if within is None else found[within]
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b.x"], b.T[1:3])
    ours = torch_zip.state_dict(LocalFile(path)).tensors
    assert {k: leaf.shape for k, leaf in ours.items()} == {"a": (3, 5), "b.x": (2, 4)}
    assert torch.equal(ours["b.x"].tensor(), found["b.x"])


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    leaf = {"a": Leaf.of("a", torch.ones(2, 2))}
    one, two = (torch_saving.write(tmp_path / name, leaf) for name in ("one.pt", "two.bin"))
    assert one == two
