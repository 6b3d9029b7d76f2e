"""What every delta beyond low rank obeys, whatever it is made of."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from loratools import algebra, kinds
from loratools.adapter import Additive, Kind, Leaf, leaves

Matrix = np.ndarray


def numbers(seed: int, *shape: int) -> Matrix:
    return np.random.default_rng(seed).normal(size=shape)


def leaf(seed: int, *shape: int, size: float = 1.0) -> Leaf:
    return Leaf.of(f"leaf {seed}", torch.from_numpy(size * numbers(seed, *shape)).float())


def held(values: Matrix, name: str = "held") -> Leaf:
    return Leaf.of(name, torch.from_numpy(np.ascontiguousarray(values)))


def exact(found: Leaf) -> Matrix:
    """A leaf's numbers in numpy's longest floats."""
    return found.tensor().double().numpy().astype(np.longdouble)


def inverse(matrix: Matrix) -> Matrix:
    """By elimination, in the longest floats, which numpy's own does not take."""
    n = len(matrix)
    work = np.concatenate([matrix, np.eye(n, dtype=np.longdouble)], 1)
    for i in range(n):
        best = i + int(np.argmax(np.abs(work[i:, i])))
        work[[i, best]] = work[[best, i]]
        work[i] /= work[i, i]
        for k in range(n):
            if k != i:
                work[k] -= work[k, i] * work[i]
    return work[:, n:]


def close(found: torch.Tensor, wanted: Matrix, many: float = 1e-12) -> None:
    size = float(max(1.0, np.abs(wanted).max(initial=0)))
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    assert float(np.abs(found.numpy() - wanted.astype(np.float64)).max(initial=0)) <= many * size


def laws(
    delta: Kind, w0: Matrix, formula: Callable[[Matrix], Matrix], *, turns: bool = True
) -> None:
    """The formula, in tiles of whole blocks too; nothing given is changed; the transposed law."""
    base = torch.from_numpy(w0).reshape(len(w0), -1)
    wanted = np.asarray(formula(w0.astype(np.longdouble)), dtype=np.longdouble)
    wanted = wanted.reshape(base.shape)
    before = base.clone(), [one.read() for one in leaves(delta)]
    ready = algebra.prepare(delta, lambda: [(0, base)])
    kept = [one.read() for one in leaves(ready)]
    for one in (delta, ready):
        close(algebra.apply(one, base), wanted)
        block = algebra.block(one)
        assert block in (0, algebra.block(delta)), "a delta made ready has the same blocks"
        edges = range(0, len(base) + 1, block) if block else (0, len(base))
        tiles = [algebra.apply(one, base[a:b], a) for a, b in pairwise(edges)]
        close(torch.cat(tiles), wanted)
    assert torch.equal(base, before[0])
    assert [one.read() for one in leaves(delta)] == before[1]
    assert [one.read() for one in leaves(ready)] == kept
    close(
        algebra.materialise(delta, torch.from_numpy(w0)).reshape(base.shape),
        wanted - w0.reshape(base.shape),
        1e-11,
    )
    if turns and w0.ndim == 2:
        turned = kinds.transposed(delta)  # type: ignore[arg-type]
        close(algebra.apply(turned, base.T.contiguous()), wanted.T)
        close(algebra.apply(kinds.transposed(turned), base), wanted)  # type: ignore[arg-type]
    if isinstance(delta, Additive):
        assert torch.equal(algebra.materialise(delta), algebra.materialise(delta, base))
