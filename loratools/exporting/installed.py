"""Which packages a graph takes to make, and what to say where one is missing or two collide."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from loratools.errors import error

EXTRA = "pip install 'loratools[onnx]'"
CPU, GPU = "onnxruntime", "onnxruntime-gpu"
HF_FROM = (5, 16)  # the first of the releases looked at whose wheel has transformers.exporters


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def require(*modules: str) -> None:
    """UsageError `not_installed` where a module is missing, or both onnxruntimes are there."""
    if installed(CPU) and installed(GPU):
        raise error(
            "not_installed",
            f"{CPU} and {GPU} are both installed, and each overwrites the other's files; run: "
            f"pip uninstall -y {CPU} {GPU}, then install one of them",
        )
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise error("not_installed", f"export needs {' and '.join(missing)}: {_how(missing)}")


def _how(missing: Sequence[str]) -> str:
    return f"pip install {' '.join(missing)}" if "diffusers" in missing else EXTRA


def serves_hf() -> str | None:
    """Why transformers' own exporter cannot be asked; None where it can."""
    found = installed("transformers")
    if found is None:
        return "transformers is not installed"
    if find_spec("transformers.exporters") is None:
        return f"needs transformers>={HF_FROM[0]}.{HF_FROM[1]}, found {found}"
    return None
