"""Updates made of a few trained coefficients by a fixed transform of the whole weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import Leaf, Spectral
from loratools.errors import error, shown
from loratools.kinds import wavelets

if TYPE_CHECKING:
    from torch import Tensor


def whole(delta: Spectral) -> Tensor:
    """ΔW (out, in * kernel) in float64, its scaling included."""
    make = METHODS.get(delta.method)
    if make is None:
        raise error("unknown_type", f"no transform is called {shown(delta.method)}")
    if delta.settings.get("turned"):
        return (make(replace(delta, shape=delta.shape[::-1])) * delta.scaling).T.contiguous()
    return make(delta) * delta.scaling


def ready(delta: Spectral) -> Spectral:
    """ΔW computed once, for all tiles."""
    dense = Leaf.of("", whole(delta))
    return Spectral("made", {"whole": dense}, delta.shape)


def rows(delta: Spectral, start: int, stop: int) -> Tensor:
    """Rows of ΔW."""
    return whole(delta)[start:stop]


def transposed(delta: Spectral) -> Spectral:
    """Marked: the update is made in the shape that it was trained in."""
    if len(delta.shape) != 2:
        raise error("usage", f"a {delta.method} update of {delta.shape} is no matrix")
    return replace(delta, shape=delta.shape[::-1], settings=turned(delta.settings))


def turned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a transposed delta, which of the transposed are again these."""
    kept = {key: value for key, value in settings.items() if key != "turned"}
    return kept if settings.get("turned") else {**kept, "turned": True}


def columns(delta: Spectral) -> int:
    """The columns of the weight as a matrix."""
    return math.prod(delta.shape[1:])


# ------------------------------------------------------------------------------- transforms


def _wide(delta: Spectral, part: str) -> Tensor:
    import torch

    return delta.parts[part].tensor().to(torch.float64)


def _seeded(delta: Spectral, count: int) -> Tensor:
    """The first places of torch's own permutation of all, drawn on the CPU from a seed."""
    import torch

    generator = torch.Generator().manual_seed(int(delta.settings["seed"]))
    return torch.randperm(math.prod(delta.shape), generator=generator)[:count]


def _scattered(delta: Spectral, height: int, width: int, down: int, right: int) -> Tensor:
    """The coefficients at their seeded places in a matrix that has a border."""
    spectrum = _wide(delta, "spectrum").reshape(-1)
    at = _seeded(delta, len(spectrum)).to(spectrum.device)
    dense = spectrum.new_zeros(height, width)
    dense[at // columns(delta) + down, at % columns(delta) + right] = spectrum
    return dense


def _fourier(delta: Spectral) -> Tensor:
    """The real part of the inverse transform (FourierFT, peft:tuners/fourierft/layer.py)."""
    import torch

    height, width = delta.shape[0], columns(delta)
    found: Tensor = torch.fft.ifft2(_scattered(delta, height, width, 0, 0)).real
    return found


def _wavelet(delta: Spectral) -> Tensor:
    """One level of the inverse wavelet transform (WaveFT, peft:tuners/waveft/layer.py)."""
    height, width = delta.shape[0], columns(delta)
    family = str(delta.settings["family"])
    if not delta.settings["idwt"]:
        return _scattered(delta, height, width, 0, 0)
    border = wavelets.taps(family) - 2
    tall, broad = (n + border + (n + border) % 2 for n in (height, width))
    dense = _scattered(delta, tall, broad, (tall - height) // 2, (broad - width) // 2)
    return wavelets.inverse(dense, family, height, width)


def _circulant(delta: Spectral) -> Tensor:
    """Blocks whose rows are one kernel, shifted: block[k, t] = w[t - k] (C3A)."""
    import torch

    kernel = _wide(delta, "kernel")
    m, n, size = kernel.shape
    shift = torch.arange(size, device=kernel.device)
    blocks = kernel[:, :, (shift[None] - shift[:, None]) % size]  # (m, n, k, t)
    return blocks.permute(0, 2, 1, 3).reshape(m * size, n * size)


def pairs(flat: Leaf, width: int) -> Leaf:
    """Places in a flattened matrix as (row, column) pairs (2, n)."""

    def make() -> Tensor:
        import torch

        at = flat.tensor().to(torch.int64)
        return torch.stack([at // width, at % width])

    return views.later(flat.name, "I64", (2, flat.numel), make)


def _supra(delta: Spectral) -> Tensor:
    """Values at flat places, and a low-rank pair (Super-Tuning, peft:tuners/supertuning)."""
    import torch

    found = _wide(delta, "b") @ _wide(delta, "a") * float(delta.settings["pair"])
    at = delta.parts["indices"].tensor().to(torch.int64)
    if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < found.numel():
        name = shown(delta.parts["indices"].name)
        raise error("malformed", f"{name} names places outside the weight, which is {delta.shape}")
    return found.reshape(-1).index_add(0, at, _wide(delta, "values")).reshape(found.shape)


# By `Spectral.method`: the whole ΔW (out, in * kernel) in float64, before the scaling.
METHODS: dict[str, Callable[[Spectral], Tensor]] = {
    "made": lambda delta: delta.parts["whole"].tensor(),
    "fourier": _fourier,
    "wavelet": _wavelet,
    "circulant": _circulant,
    "supra": _supra,
}
