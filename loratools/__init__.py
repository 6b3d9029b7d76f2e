"""Check, merge, fold, convert and prove adapters: the public names, resolved at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PLACES = {
    "Adapter": "loratools.adapter",
    "LoratoolsError": "loratools.errors",
    "Problem": "loratools.errors",
    "check": "loratools.commands.check",
    "convert": "loratools.commands.convert",
    "explain": "loratools.commands.explain",
    "export": "loratools.commands.export",
    "inspect": "loratools.commands.inspect",
    "merge": "loratools.commands.merge",
    "push": "loratools.commands.push",
    "verify": "loratools.commands.verify",
    "fold_into": "loratools.memory",
    "fold_tensors": "loratools.memory",
    "from_model": "loratools.memory",
    "from_state_dict": "loratools.memory",
    "load": "loratools.memory",
    "merge_adapters": "loratools.memory",
    "save": "loratools.memory",
    "to_state_dict": "loratools.memory",
}

__all__ = sorted(_PLACES)

if TYPE_CHECKING:
    from loratools.adapter import Adapter as Adapter
    from loratools.commands.check import check as check
    from loratools.commands.convert import convert as convert
    from loratools.commands.explain import explain as explain
    from loratools.commands.export import export as export
    from loratools.commands.inspect import inspect as inspect
    from loratools.commands.merge import merge as merge
    from loratools.commands.push import push as push
    from loratools.commands.verify import verify as verify
    from loratools.errors import LoratoolsError as LoratoolsError
    from loratools.errors import Problem as Problem
    from loratools.memory import fold_into as fold_into
    from loratools.memory import fold_tensors as fold_tensors
    from loratools.memory import from_model as from_model
    from loratools.memory import from_state_dict as from_state_dict
    from loratools.memory import load as load
    from loratools.memory import merge_adapters as merge_adapters
    from loratools.memory import save as save
    from loratools.memory import to_state_dict as to_state_dict


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name == "__version__":
        from loratools._version import VERSION

        return VERSION
    raise AttributeError(f"module 'loratools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
