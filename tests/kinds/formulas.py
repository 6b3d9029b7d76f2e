"""Rotations, transforms and sums over W0 as their papers write them, in numpy's longest floats."""

import numpy as np
import torch

from loratools.adapter import Chained, Kind, Leaf, Rotated, Sparse, Spectral
from tests.floats import exact as decoded

Matrix = np.ndarray


def exact(found: Leaf) -> Matrix:
    """A leaf's numbers, decoded from its bits."""
    return decoded(found.tensor()).astype(np.longdouble)


def folded(delta: Kind, w0: Matrix) -> Matrix:
    """W of a matrix or a convolution's weight, in the shape that it has."""
    wide = w0.reshape(len(w0), int(np.prod(w0.shape[1:])))
    if isinstance(delta, Spectral | Chained) and delta.settings.get("turned"):
        settings = {k: v for k, v in delta.settings.items() if k != "turned"}
        more = {"shape": delta.shape[::-1]} if isinstance(delta, Spectral) else {}
        kind = type(delta)
        return folded(kind(delta.method, delta.parts, **more, scaling=delta.scaling,
                           settings=settings), w0.T).T  # fmt: skip
    match delta:
        case Rotated(side="in"):
            w = wide @ rotation(delta, wide.shape[1]).T
            w = w * exact(delta.parts["scale"])[:, None] if "scale" in delta.parts else w
        case Rotated():
            w = rotation(delta, len(wide)) @ wide
            w = w * exact(delta.parts["scale"]) if "scale" in delta.parts else w
        case Sparse(values=values, indices=indices, scaling=scaling):
            w = wide + np.longdouble(scaling) * scattered(values, indices.tensor(), wide.shape)
        case Spectral():
            w = wide + update(delta, wide.shape)
        case Chained():
            w = wide + change(delta, wide)
        case _:
            raise AssertionError(delta)
    return w.reshape(w0.shape)


# ------------------------------------------------------------------------------- rotations


def inverse(matrix: Matrix) -> Matrix:
    """By elimination; numpy's own does not take long floats."""
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


def skew(vector: Matrix, size: int) -> Matrix:
    q = np.zeros((size, size), dtype=np.longdouble)
    q[np.triu_indices(size, 1)] = vector
    return q - q.T


def cayley(q: Matrix) -> Matrix:
    eye = np.eye(len(q), dtype=np.longdouble)
    return (eye - q) @ inverse(eye + q)


def diagonal(blocks: list[Matrix]) -> Matrix:
    size = sum(len(b) for b in blocks)
    whole, at = np.zeros((size, size), dtype=np.longdouble), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


def rotation(delta: Rotated, extent: int) -> Matrix:
    """R (extent, extent)."""
    parts, settings = delta.parts, delta.settings
    match delta.method:
        case "oft":
            blocks = [cayley(skew(v, settings["size"])) for v in exact(parts["vectors"])]
            if settings["share"]:
                blocks *= extent // settings["size"]
            return diagonal([b.T if settings.get("turned") else b for b in blocks])
        case "boft":
            return boft(exact(parts["blocks"]), extent)
        case "householder":
            return reflections(exact(parts["u"]), bool(settings.get("orthogonal"))).T
        case "road":
            return pairs(exact(parts["theta"]), exact(parts["alpha"]), extent, **settings)
    raise AssertionError(delta)


def boft(blocks: Matrix, extent: int) -> Matrix:
    """The product of the stages as PEFT builds it, by its own permutation."""
    from peft.tuners.boft.layer import BOFTLayer

    stages, count, size, _ = blocks.shape
    layer = object.__new__(BOFTLayer)
    whole = np.eye(extent, dtype=np.longdouble)
    for stage in range(stages):
        order = np.arange(extent)
        if stages > 1:
            runs = layer.block_butterfly_perm(extent, count // 2**stage, size // 2, stages - 1)
            order = runs.numpy()
        p = np.eye(extent, dtype=np.longdouble)[order]
        turns = [cayley((b - b.T) / 2) for b in blocks[stage]]
        whole = p @ diagonal(turns) @ p.T @ whole
    return whole


def reflections(u: Matrix, orthogonal: bool) -> Matrix:
    """Π(I - 2·v·vᵀ) over the columns, each normed, and with `orthogonal` made so before."""
    whole = np.eye(len(u), dtype=np.longdouble)
    done: list[Matrix] = []
    for v in u.T:
        for w in done if orthogonal else ():
            v = v - (w @ v) * w
        v = v / np.sqrt(v @ v)
        done.append(v)
        whole = whole @ (np.eye(len(u), dtype=np.longdouble) - 2 * np.outer(v, v))
    return whole


def pairs(theta: Matrix, alpha: Matrix, rows: int, variant: str, group: int) -> Matrix:
    """RoAd's R: a row of each half of a group with the one of the other half."""
    r, half = np.zeros((rows, rows), dtype=np.longdouble), group // 2
    for row in range(rows):
        g, i = divmod(row, group)
        other, sign = (row + half, -1) if i < half else (row - half, 1)
        match variant:
            case "road_1":
                near = far = g * half + i % half
            case "road_2":
                near = far = row
            case _:
                near, far = 2 * g * group + i, (2 * g + 1) * group + i
        r[row, row] = alpha[near] * np.cos(theta[near])
        r[row, other] = sign * alpha[far] * np.sin(theta[far])
    return r


# ------------------------------------------------------------------------------- transforms


def scattered(values: Leaf, indices: torch.Tensor, shape: tuple[int, ...]) -> Matrix:
    """Values at (row, column) places, or at flat ones; at one place they add up."""
    found = np.zeros(shape, dtype=np.longdouble)
    at = indices.long().numpy()
    rows, columns = at if at.ndim == 2 else divmod(at, shape[1])
    for value, row, column in zip(exact(values), rows, columns, strict=True):
        found[row, column] += value
    return found


def permutation(seed: int, extent: int, count: int) -> Matrix:
    return torch.randperm(extent, generator=torch.Generator().manual_seed(seed))[:count].numpy()


def update(delta: Spectral | Chained, shape: tuple[int, ...]) -> Matrix:
    """ΔW of a transform, its scaling included."""
    parts, settings = delta.parts, delta.settings
    scaling = np.longdouble(delta.scaling)
    match delta.method:
        case "fourier":
            return scaling * fourier(exact(parts["spectrum"]), settings["seed"], shape)
        case "circulant":
            kernel = exact(parts["kernel"])
            size = kernel.shape[2]
            found = np.zeros(shape, dtype=np.longdouble)
            for m, n, k, t in np.ndindex(*kernel.shape[:2], size, size):
                found[m * size + k, n * size + t] = kernel[m, n, (t - k) % size]
            return scaling * found
        case "supra":
            low = np.longdouble(settings["pair"]) * exact(parts["b"]) @ exact(parts["a"])
            return scaling * (low + scattered(parts["values"], parts["indices"].tensor(), shape))
    raise AssertionError(delta)


def fourier(spectrum: Matrix, seed: int, shape: tuple[int, ...]) -> Matrix:
    """Re Σ s·exp(2πi·(…)) / n, number by number."""
    height, width = shape
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    whole = np.zeros(shape, dtype=np.longdouble)
    turn = 2 * np.arctan2(np.longdouble(0), np.longdouble(-1))
    at = permutation(seed, height * width, len(spectrum))
    for value, place in zip(spectrum, at, strict=True):
        k, m = divmod(int(place), width)
        phase = rows * np.longdouble(k) / height + columns * np.longdouble(m) / width
        whole += value * np.cos(turn * phase)
    return whole / (height * width)


# ------------------------------------------------------------------------------- sums over W0


def path(parts: dict[str, Leaf], name: str) -> Matrix:
    """A path of PEFT's GLoRA: a product, a column, a number, or nothing."""
    if f"{name}.Xd" in parts:
        return exact(parts[f"{name}.Xd"]) @ exact(parts[f"{name}.Xu"])
    if f"{name}.X" not in parts:
        return np.longdouble(0)
    found = exact(parts[f"{name}.X"])
    return found[0] if found.size == 1 else found.reshape(-1, 1)


def change(delta: Chained, w0: Matrix) -> Matrix:
    """W - W0."""
    parts, scaling = delta.parts, np.longdouble(delta.scaling)
    match delta.method:
        case "glora of peft":
            return w0 * path(parts, "A") + path(parts, "B")
        case "deft":
            q = exact(parts["P"])
            r = scaling * exact(parts["R"]) if "R" in parts else 0
            return q @ (r - np.maximum(q, 0).T @ w0)
        case "peanut":
            hidden = np.maximum(exact(parts["A"]) @ w0, 0)
            return scaling * exact(parts["B"]) @ hidden
        case "places":
            return scaling * scattered(parts["values"], parts["indices"].tensor(), w0.shape)
        case "fourier":
            return update(delta, w0.shape)
    raise AssertionError(delta)
