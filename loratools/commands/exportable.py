"""What is exported: a model, with adapters folded, switchable or running in it; or a module."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import receipt
from loratools.adapter import Adapter
from loratools.commands import runtimes, sources, weighing
from loratools.commands.check import FOLD_ONLY, load_all
from loratools.commands.judging import judge
from loratools.commands.weighing import weights_for
from loratools.commands.wishes import Wish
from loratools.errors import error, shown
from loratools.weights.base import Base

if TYPE_CHECKING:
    import torch

    from loratools.commands.merge import MergeResult


@dataclass(slots=True)
class Subject:
    """What is exported: a loaded module, where its small files lie, and where it came from."""

    module: torch.nn.Module | None
    name: str
    folder: Path | None
    config: Mapping[str, Any]
    origin: dict[str, Any]  # recipe: model, adapters
    fresh: tuple[str, ...] = ()
    before: MergeResult | None = None  # the fold on the way
    adapters: tuple[Adapter, ...] = ()  # folded, or of a switchable graph
    weights: tuple[weighing.Weight, ...] = ()
    plain: Path | None = None  # the base's folder, before any fold
    running: Adapter | None = None  # one that acts where the model runs
    notes: list[str] = field(default_factory=list)


def from_folder(
    model: str | Path,
    adapters: Sequence[str | Path],
    weights: Any,
    wish: Wish,
    out: Path,
    fold: Mapping[str, Any],
    stack: ExitStack,
) -> Subject:
    """Load a folder; adapters are folded in float32 into a temporary one first."""
    from loratools.exporting import loading

    _refuse_gguf(Path(model))
    found = sources.base(model)
    _refuse_bases(found)
    base = sources.here(found)
    folder = base.bundle.path
    assert folder is not None
    config = loading.config_of(folder, base.name)
    task = _task(wish, config)
    subject = Subject(
        None, Path(base.name).name, folder, config, {"model": receipt.base_entry(base)}
    )
    subject.plain = folder
    some = load_all(_paths(adapters, weights)[0], fold["assume"]) if adapters else []
    if wish.switchable:
        # Nothing is summed, so that no weights are asked for.
        _, factors = _paths(adapters, weights if weights is not None else [1.0] * len(some))
        subject.adapters, subject.weights = tuple(some), tuple(factors)
        subject.origin["adapters"] = _entries(some, factors)
    elif runtimes.is_runtime(some):
        _running(subject, some, base, weights, fold)
    elif adapters:
        _fold(subject, model, adapters, weights, out, fold, stack)
        subject.adapters = tuple(some)
        subject.weights = tuple(_paths(adapters, weights)[1])
    if wish.to != "genai":
        assert subject.folder is not None
        loaded = loading.load(
            subject.folder, task, subject.config, trust_remote_code=wish.trust_remote_code,
            name=base.name,
        )  # fmt: skip
        subject.module, subject.fresh = loaded.module, loaded.fresh
    elif subject.running is not None:
        raise error("usage", "--to genai builds its own graph: no runtime adapter goes into it")
    return subject


def _paths(adapters: Sequence[str | Path], weights: Any) -> tuple[list[str], list[weighing.Weight]]:
    return weights_for([str(a) for a in adapters], weights, required=False)


def _entries(some: Sequence[Adapter], factors: Sequence[weighing.Weight]) -> list[dict[str, Any]]:
    return [
        receipt.adapter_entry(a, weighing.said([w])[0][0])
        for a, w in zip(some, factors, strict=True)
    ]


def _fold(
    subject: Subject, model: str | Path, adapters: Sequence[str | Path], weights: Any, out: Path,
    fold: Mapping[str, Any], stack: ExitStack,
) -> None:  # fmt: skip
    """Fold adapters into a temporary folder, in float32: one rounding, in the graph's dtype."""
    from loratools.commands.merge import merge
    from loratools.exporting import loading

    assert subject.folder is not None
    parent = out.absolute().parent
    parent = next(p for p in (parent, *parent.parents) if p.is_dir())
    room = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".fold-")))
    folder = room / subject.folder.name
    subject.before = merge(
        adapters, model, out=folder, weights=weights, dtype="fp32", hash="none", **fold
    )
    made = receipt.read(folder)
    assert made is not None
    subject.folder = folder
    subject.origin["adapters"] = made.get("recipe", "adapters")
    subject.config = loading.config_of(folder)


def _running(
    subject: Subject, some: Sequence[Adapter], base: Base, weights: Any, fold: Mapping[str, Any]
) -> None:
    """One adapter that acts where the model runs, fitted to it."""
    if len(some) > 1 or weights is not None:
        raise error(
            "usage",
            f"{shown(next(a for a in some if a.runtime is not None).name)} acts where the model "
            "runs: one such adapter goes into a graph, without weights; merge several first "
            "(loratools merge A B -w W,W -o BOTH), fold others first (merge A --base BASE)",
        )
    problems = [p for p in some[0].problems if p.code not in FOLD_ONLY]
    problems += runtimes.against(some[0], base).problems
    judge(problems, fold["allow"], fold["fail_on"]).require()
    subject.running = some[0]
    subject.origin["adapters"] = _entries(some, [1.0])


def _refuse_gguf(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb") as opened:
        found = opened.read(4) == b"GGUF"
    if found:
        raise error(
            "not_exportable",
            f"{shown(path.name)} is a GGUF file; export the model that it was made from",
        )


def _refuse_bases(base: Base) -> None:
    if base.bundle.chosen is not None:
        if base.bundle.chosen.endswith(".onnx"):
            raise error(
                "usage",
                f"{shown(base.name)} is a graph already; folding into it is: loratools merge "
                f"ADAPTER --base {shown(base.name)} -o OUT",
            )
        raise error(
            "not_exportable",
            f"{shown(base.name)} is one file of weights; export needs the folder with its "
            "config.json",
        )


def _task(wish: Wish, config: Mapping[str, Any]) -> str:
    from loratools.exporting import tasks

    if wish.task == "auto":
        return tasks.task_of(config, kv_cache=wish.kv_cache)
    if wish.task in tasks.WITH_PAST and wish.kv_cache:
        asked = tasks.auto_class(wish.task, config)
        return wish.task if asked == tasks.CTC else wish.task + tasks.PAST
    return wish.task if wish.kv_cache else tasks.base_of(wish.task)


def from_module(
    module: Any,
    adapters: Sequence[str | Path],
    weights: Any,
    wish: Wish,
    inputs: Any,
    fold: Mapping[str, Any],
) -> Subject:
    """A copy of a live module, with adapters folded into it."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise error("usage", f"export takes a folder or a torch module, no {type(module).__name__}")
    config: Any = getattr(module, "config", None)
    facts = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    if hasattr(config, "get_text_config"):
        facts["architectures"] = [type(module).__name__]
    if inputs is None and not facts:
        raise error("usage", "a module of one's own needs sample inputs: inputs={name: tensor}")
    if wish.to == "genai" or wish.switchable:
        raise error("usage", "--to genai and --switchable start from a folder")
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    origin: dict[str, Any] = {
        "model": {"source": type(module).__name__, "fingerprint": found.hexdigest()}
    }
    # Tracing changes weights for a while, and other threads may be using them.
    module = copy.deepcopy(module).cpu().float().eval()
    subject = Subject(module, type(module).__name__, None, facts, origin)
    if adapters:
        _fold_live(subject, adapters, weights, fold)
    return subject


def _fold_live(
    subject: Subject, adapters: Sequence[str | Path], weights: Any, fold: Mapping[str, Any]
) -> None:
    """Fold adapters into the copy; tied tensors change together, as PEFT does it."""
    from loratools.commands.live import fold_into

    if asked := [name for name in ("only", "skip", "untie") if fold[name]]:
        raise error("usage", f"{asked[0]} belongs to a model in a folder, not to a live module")
    paths, factors = weights_for([str(a) for a in adapters], weights, required=True)
    plain = [w for w in factors if isinstance(w, float | int)]
    if len(plain) < len(factors):
        raise error("usage", "weights by name belong to a model in a folder, not to a live module")
    some = load_all(paths, fold["assume"])
    if runtimes.is_runtime(some):
        raise error(
            "usage",
            f"{shown(next(a for a in some if a.runtime is not None).name)} acts where the model "
            "runs: export it from the model's folder",
        )
    assert subject.module is not None
    fold_into(subject.module, some, weights=plain, allow=fold["allow"])
    subject.origin["adapters"] = _entries(some, factors)


def task_of(subject: Subject, wish: Wish, inputs: object) -> str:
    """The task of what is exported."""
    from loratools.exporting import tasks

    return tasks.PLAIN if inputs is not None else _task(wish, subject.config)
