"""Which initialiser of a traced graph is which parameter, told by content alone.

Exporters rename, transpose and merge: two layers' equal biases become one initialiser, and a fold
into one of them would change both. So while a module is traced, each parameter that equals another
one, is constant or symmetric carries numbers of its own; afterwards its true values are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = tuple[tuple[int, ...], bytes]


@dataclass(slots=True)
class Marked:
    """The true values of parameters that carry other numbers now, by name."""

    true: dict[str, Tensor] = field(default_factory=dict)


def names_of(module: nn.Module) -> dict[str, list[str]]:
    """Each stored parameter's first name, and all names that share it (tied weights)."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in groups.values()}


def digest(array: NDArray[np.generic]) -> Key:
    """What tells a tensor's content from another's: its shape and the hash of its bytes."""
    whole = np.ascontiguousarray(array)
    return whole.shape, hashlib.blake2b(
        whole.reshape(-1).view(np.uint8).data, digest_size=16
    ).digest()


def seen(tensor: Tensor) -> NDArray[np.generic]:
    """A tensor as numpy sees it; of bfloat16, its bytes."""
    flat = tensor.detach().cpu().contiguous()
    return flat.view(torch.int16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def _is_symmetric(tensor: Tensor) -> bool:
    square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
    return square and bool(torch.equal(tensor, tensor.T))


@contextmanager
def told_apart(module: nn.Module, leave: frozenset[str] = frozenset()) -> Iterator[Marked]:
    """Within the block every parameter but those to `leave` has content of its own."""
    marked = Marked()
    draw = torch.Generator().manual_seed(7)
    known: set[Key] = set()
    parameters = dict(module.named_parameters())
    try:
        for name, parameter in parameters.items():
            held = parameter.data
            if not held.numel() or not held.is_floating_point():
                continue
            key = digest(seen(held))
            flat = held.reshape(-1)
            same = key in known or bool((flat == flat[0]).all()) or _is_symmetric(held)
            known.add(key)
            if same and name not in leave:
                marked.true[name] = held
                size = max(float(held.abs().max()), 1.0)
                noise = torch.randn(held.shape, generator=draw) * 1e-2 * size
                parameter.data = held + noise.to(held)
        yield marked
    finally:
        for name, tensor in marked.true.items():
            parameters[name].data = tensor


@dataclass(frozen=True, slots=True)
class Found:
    """The parameter that an initialiser is, and whether it is stored transposed."""

    parameter: str
    transposed: bool


class Contents:
    """The parameters of a module by their content, either way round."""

    def __init__(self, module: nn.Module) -> None:
        self.aliases = names_of(module)
        self.found: dict[Key, Found] = {}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name in self.aliases:
            array = seen(parameters[name])
            if not array.size:
                continue
            if array.ndim == 2:
                self.found.setdefault(digest(array.T), Found(name, True))
        for name in self.aliases:  # as it is comes before turned round
            array = seen(parameters[name])
            if array.size:
                self.found[digest(array)] = Found(name, False)

    @staticmethod
    def aliases_of(module: nn.Module) -> dict[str, list[str]]:
        """Every name of each stored parameter, by its first."""
        return names_of(module)

    def look(self, array: NDArray[np.generic]) -> Found | None:
        """The parameter whose content an initialiser holds."""
        return self.found.get(digest(array))


def unused(
    module: nn.Module, names: Mapping[str, Tensor], run: Callable[[], Mapping[str, Tensor]]
) -> bool:
    """Whether the outputs do not depend on these parameters: a call with their true values.

    `run()` gives the outputs by name.
    """
    parameters = dict(module.named_parameters())
    before = run()
    other = {name: parameters[name].data for name in names}
    try:
        for name, tensor in names.items():
            parameters[name].data = tensor
        after = run()
    finally:
        for name, tensor in other.items():
            parameters[name].data = tensor
    return all(torch.equal(before[k], after[k]) for k in before)
