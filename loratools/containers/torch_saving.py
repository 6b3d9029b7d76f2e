"""Writing a state dict as `torch.save` does: a zip with a pickle of plain tensors."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Leaf


def write(path: Path, tensors: Mapping[str, Leaf], *, within: str | None = None) -> str:
    """Write tensors by name, in a dict of their own under `within` if given; returns the sha256.

    The whole file stands in memory first, and its bytes depend on the tensors alone.
    """
    import torch

    state = {
        key: leaf.tensor().detach().cpu().contiguous().clone() for key, leaf in tensors.items()
    }
    buffer = io.BytesIO()
    torch.save(state if within is None else {within: state}, buffer)
    raw = buffer.getbuffer()
    with path.open("wb") as file:
        file.write(raw)
    return hashlib.sha256(raw).hexdigest()
