"""Where an output goes: the paths that belong to it, and every reason why it may not go there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import error, shown
from loratools.weights import disk

RECEIPT = "loratools.json"
WEIGHTS = frozenset({".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".pth", ".ckpt", ".npz"})
PROGRESS = ".progress.json"

_OURS = frozenset({".partial", ".new-partial", ".old-partial", ".lock"})
_CONFIGS = frozenset({RECEIPT, "adapter_config.json", "model_index.json"})
_SPARE = 1 << 20  # folders, receipt and configs


@dataclass(frozen=True, slots=True)
class Places:
    """The paths of one output; `inside` an existing folder where nothing can stand beside it."""

    out: Path
    as_file: bool
    inside: bool

    def _beside(self, end: str) -> Path:
        return self.out / end if self.inside else self.out.with_name(self.out.name + end)

    @property
    def partial(self) -> Path:
        """The new output while it is written; the old one while it is removed."""
        return self._beside(".partial")

    @property
    def ready(self) -> Path:
        """The new output while its files are moved in one by one."""
        return self._beside(".new-partial")

    @property
    def aside(self) -> Path:
        """The old output, or what of it must not stand beside the new, until the new is there."""
        return self._beside(".old-partial")

    @property
    def into(self) -> Path:
        """The folder whose entries the output's files become."""
        return self.out.parent if self.as_file else self.out

    @property
    def receipt(self) -> str:
        return f"{self.out.name}.{RECEIPT}" if self.as_file else RECEIPT

    @property
    def lock(self) -> Path:
        if self.out.is_dir() and not os.access(self.out.parent, os.W_OK):
            return self.out / ".lock"
        return self.out.with_name(f".{self.out.name}.lock")

    def old(self) -> list[str]:
        """What stands in `into` already and belongs to the output, the receipt first."""
        if self.as_file:
            names = [n for n in (self.receipt, self.out.name) if os.path.lexists(self.into / n)]
        else:
            names = [n for n in entries(self.out) if n not in _OURS]
        return sorted(names, key=lambda name: (name != self.receipt, name))


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def entries(folder: Path) -> list[str]:
    """The names in a folder, none for what is no folder."""
    return sorted(os.listdir(folder)) if is_folder(folder) else []


def is_empty(path: Path) -> bool:
    """Whether there is nothing at the path, or an empty folder."""
    return not os.path.lexists(path) or (is_folder(path) and not entries(path))


def same(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file or folder, by a link or in another case too."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def resolved(out: Path, *, as_file: bool, inputs: Sequence[Path]) -> Path:
    """The output's path without links.

    A link to an empty or missing folder stands for that folder. UsageError `same_path` where the
    output is, or touches, an input; OutputError `output_exists` for any other link.
    """
    target = Path(os.path.realpath(out))
    _refuse_inputs(Places(target, as_file, inside=False), inputs)
    if out.is_symlink() and (as_file or not is_empty(target)):
        raise error(
            "output_exists",
            f"{shown(out)} is a link to {shown(target)}; name that path itself, or choose another"
            " output",
        )
    return target


def _refuse_inputs(places: Places, inputs: Sequence[Path]) -> None:
    out = places.out
    ours = (out, places.partial, places.ready, places.aside, places.into / places.receipt)
    for source in inputs:
        typed = Path(os.path.abspath(source))
        # A link in the output to an input elsewhere would be lost with the old output.
        above = (*_upwards(typed), *_upwards(Path(os.path.realpath(source))))
        linked = out.is_file() and out.stat().st_nlink > 1 and source.is_dir()
        if any(same(path, source) for path in _upwards(out)):
            said = f"the output {shown(out)} is the input {shown(source)} or lies inside it"
        elif any(same(path, place) for path in above for place in ours):
            said = f"the input {shown(source)} lies inside the output {shown(out)}"
        elif linked and any(same(out, path) for path in source.rglob("*")):
            said = f"the output {shown(out)} is a hard link to a file of {shown(source)}"
        else:
            continue
        raise error("same_path", f"{said}; choose another output")


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents


def refuse_existing(places: Places, *, force: bool) -> bool:
    """Whether something is to be replaced; OutputError `output_exists` where it may not be."""
    out, old = places.out, places.old()
    free = not os.path.lexists(out)
    fits = free or (stat.S_ISREG(os.lstat(out).st_mode) if places.as_file else is_folder(out))
    if fits and not old:
        return False
    known = out.suffix.lower() in WEIGHTS if places.as_file else _is_model(out, old)
    if not fits or (force and not known):
        raise error(
            "output_exists",
            f"{shown(out)} exists and is no adapter or model, and --force replaces nothing else;"
            " choose another output",
        )
    if not force:
        raise error(
            "output_exists",
            f"{shown(places.into / old[-1])} exists; choose another output, or --force to replace"
            " the old one",
        )
    return True


def _is_model(folder: Path, names: Sequence[str]) -> bool:
    if any(name in _CONFIGS or Path(name).suffix.lower() in WEIGHTS for name in names):
        return True
    try:  # many a program has a config.json, and its folder must not be lost
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and not config.keys().isdisjoint(
        {"model_type", "architectures", "_class_name"}
    )


def refuse_full(places: Places, needed: int) -> None:
    """StorageError `disk_full` where `needed` bytes and a little more are not free."""
    folder = places.partial.parent
    free = disk.free_bytes(folder)
    if needed + _SPARE > free:
        raise error(
            "disk_full",
            f"{shown(places.out)}: {needed + _SPARE:,} bytes needed, {free:,} free in"
            f" {shown(folder)}; free space or choose another output",
        )


def chosen(beside: Places) -> Places:
    """Where the partial folder goes: beside the output, or inside it.

    Inside a mount point, a folder beside which nothing may be written, the working folder (a
    shell would stay in the replaced one); an interrupted run's work stays where it is.
    """
    out = beside.out
    inside = Places(out, beside.as_file, inside=True)
    if beside.as_file or os.path.lexists(beside.partial) or not is_folder(out):
        return beside
    replaceable = (
        os.access(out.parent, os.W_OK) and not os.path.ismount(out) and not same(out, Path())
    )
    return beside if replaceable and not os.path.lexists(inside.partial) else inside
