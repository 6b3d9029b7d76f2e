"""A module traced to an ONNX graph, by the first exporter of three that can."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratools.errors import LoratoolsError, error, shown
from loratools.exporting import cleaning, installed, models, tasks
from loratools.exporting.graphs import Flat, Graph, of_module, plain
from loratools.exporting.parameters import Contents, told_apart, unused
from loratools.exporting.runtimes_table import DEFAULT

EXPORTERS = ("hf", "dynamo", "legacy")
CALLED = {
    "hf": "transformers' exporter",
    "dynamo": "torch's dynamo exporter",
    "legacy": "torch's legacy exporter",
}
LEGACY_OPSET = 20  # the newest it writes (torch/onnx/_constants.py)


@dataclass(frozen=True, slots=True)
class Traced:
    """What was traced: the main graph, how, its inputs and outputs with their dimensions."""

    path: Path
    exporter: str
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    notes: tuple[str, ...] = ()
    graphs: tuple[Graph, ...] = ()
    files: tuple[str, ...] = ()
    opset: int = 0
    ir: int = 0


@dataclass(slots=True)
class Settings:
    """How to trace."""

    exporter: str = "auto"
    opset: int | None = None
    ir: int | None = None
    props: Mapping[str, str] = field(default_factory=dict)
    external: bool = False


def trace(
    module: nn.Module,
    task: str,
    out: Path,
    *,
    exporter: str = "auto",
    opset: int | None = None,
    ir: int | None = None,
    shape: Mapping[str, int] | None = None,
    kv_cache: bool = True,
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    props: Mapping[str, str] | None = None,
    external: bool = False,
) -> Traced:
    """Write the graphs of a task into the folder `out` (or, of one graph, the file `out.onnx`).

    With `inputs` any module is traced as it is called with them. `props` go into the graph's
    metadata. Raises RefusedError `not_exportable` with what each exporter said.
    """
    module = module.eval()
    if task in tasks.WITH_PAST and kv_cache and inputs is None:
        task += tasks.PAST
    if inputs is not None:
        made = [of_module(module, inputs, dynamic=dynamic, fixed=shape)]
        _learned(made[0])
    else:
        made = models.graphs_of(module, task, shape=shape)
    settings = Settings(exporter, opset, ir, dict(props or {}), external)
    folder, named = (out.parent, out.name) if out.suffix == ".onnx" else (out, None)
    folder.mkdir(parents=True, exist_ok=True)
    if named is not None:
        if len(made) > 1:
            raise error("usage", f"{shown(task)} takes {len(made)} graphs: name a folder")
        made[0].file = named
    return traced(made, module, folder, settings)


def _learned(graph: Graph) -> None:
    """Call a module of the user's own at several sizes."""
    try:
        graph.learn_outputs()
    except LoratoolsError:
        raise
    except Exception as cause:  # whatever its code raises
        said = ", ".join(f"{d}={n} and {n + 1}" for d, n in graph.sample.items())
        raise error(
            "not_exportable", f"the module itself fails at sizes {said}: {_line(cause)}"
        ) from cause


def traced(graphs: Sequence[Graph], module: nn.Module, folder: Path, settings: Settings) -> Traced:
    """Trace graphs of one module, all by the same exporter."""
    said: dict[str, str] = {}
    for exporter in order(module, settings.exporter):
        reason = installed.serves_hf() if exporter == "hf" else None
        if reason is None:
            opset = settings.opset or (18 if exporter == "legacy" else DEFAULT[0])
            try:
                for graph in graphs:
                    _one(graph, module, folder, exporter, opset, settings)
            except LoratoolsError as cause:
                if cause.code != "not_exportable":
                    raise
                reason = f"{shown(graph.file)}: {cause.message}"
        if reason is None:
            break
        said[exporter] = reason
    else:
        each = [f"{CALLED[e]}: {why}" for e, why in said.items()]
        raise error("not_exportable", "no exporter makes a graph of this\n  " + "\n  ".join(each))
    files = [n for g in graphs for n in (g.file, f"{g.file}.data") if (folder / n).exists()]
    main = graphs[-1] if len(graphs) == 2 else graphs[min(1, len(graphs) - 1)]
    return Traced(
        path=folder / main.file,
        exporter=exporter,
        inputs={i.name: main.dims(i.name) for i in main.inputs},
        outputs={name: main.dims(name) for name in main.outputs},
        notes=tuple(f"{CALLED[e]} cannot: {why}" for e, why in said.items()),
        graphs=tuple(graphs),
        files=tuple(files),
        opset=opset,
        ir=settings.ir or DEFAULT[1],
    )


def order(module: nn.Module, asked: str) -> tuple[str, ...]:
    """The exporters to try, in order."""
    if asked != "auto":
        if asked not in EXPORTERS:
            raise error(
                "usage", f"--exporter {shown(asked)}: expected auto, {', '.join(EXPORTERS)}"
            )
        return (asked,)
    served = type(module).__module__.startswith("transformers.")
    return EXPORTERS if served else EXPORTERS[1:]


def _line(cause: BaseException) -> str:
    """An exporter's exception in one line: the last cause says most."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return shown(f"{type(cause).__name__}: {lines[0] if lines else 'no words'}")


def _one(
    graph: Graph, module: nn.Module, folder: Path, exporter: str, opset: int, settings: Settings
) -> None:
    """Trace one graph and clean it into the folder.

    Where a marked parameter is not found in the graph although the outputs depend on it, an
    exporter has computed with it (1 + w, say), and it is traced again with its true values.
    """
    leave: frozenset[str] = frozenset()
    while True:
        with (
            told_apart(module, leave) as marked,
            tempfile.TemporaryDirectory(dir=folder, prefix=".trace-") as place,
        ):
            path = Path(place) / "graph.onnx"
            try:
                with quiet():
                    _export(graph, exporter, opset, path)
            except (LoratoolsError, OSError, MemoryError):
                raise
            except Exception as cause:  # exporters raise whatever a model's code runs into
                raise error("not_exportable", _line(cause)) from cause
            found = cleaning.found_in(path, Contents(module))
            there = {f.parameter for f in found.values()}
            lost = {n: t for n, t in marked.true.items() if n not in there}
            if not lost or unused(module, lost, partial(graph.run, graph.feeds({}))):
                cleaning.clean(
                    path,
                    folder / graph.file,
                    inputs={i.name: graph.dims(i.name) for i in graph.inputs},
                    optional={i.name for i in graph.inputs if i.optional},
                    outputs={name: graph.dims(name) for name in graph.outputs},
                    found=found,
                    aliases=Contents.aliases_of(module),
                    true={n: t for n, t in marked.true.items() if n in there},
                    props=settings.props,
                    ir=settings.ir or DEFAULT[1],
                    external=settings.external,
                )
                return
        leave |= lost.keys()


def _export(graph: Graph, exporter: str, opset: int, path: Path) -> None:
    feeds = graph.feeds({})
    moving = {
        i.name: {at: d for at, d in enumerate(graph.dims(i.name)) if isinstance(d, str)}
        for i in graph.inputs
    }
    match exporter:
        case "legacy":
            _legacy(graph.module, feeds, moving, graph, opset, path)
        case "dynamo":
            auto = torch.export.Dim.AUTO
            program = torch.onnx.export(
                graph.module,
                tuple(feeds.values()),
                dynamo=True,
                opset_version=opset,
                input_names=[plain(n) for n in feeds],
                output_names=[f"out_{n}" for n in range(len(graph.outputs))],
                dynamic_shapes=(tuple(dict.fromkeys(moving[n], auto) for n in feeds),),
                verbose=False,
            )
            assert program is not None
            _saved(program.model, path)
        case _:
            _hf(graph.module, feeds, moving, opset, path)


def _hf(
    module: Flat, feeds: Mapping[str, Tensor], moving: Mapping[str, Mapping[int, str]],
    opset: int, path: Path,
) -> None:  # fmt: skip
    """transformers' exporter, with all its patches, on the flat module."""
    from transformers import exporters

    auto = torch.export.Dim.AUTO
    config = exporters.OnnxConfig(  # type: ignore[attr-defined]
        dynamic_shapes={plain(n): dict.fromkeys(moving[n], auto) for n in feeds},
        opset_version=opset,
    )
    exporter: Any = exporters.OnnxExporter()  # type: ignore[attr-defined, no-untyped-call]
    made = exporter.export(module, {plain(n): t for n, t in feeds.items()}, config)
    _saved(made.program, path)


def _saved(made: Any, path: Path) -> None:
    import onnx_ir

    onnx_ir.save(made, path, external_data=f"{path.name}.data")


def _legacy(
    module: Flat, feeds: Mapping[str, Tensor], moving: Mapping[str, Mapping[int, str]],
    graph: Graph, opset: int, path: Path,
) -> None:  # fmt: skip
    if opset > LEGACY_OPSET:
        raise error(
            "not_exportable", f"it writes opset {LEGACY_OPSET} at most, and {opset} is asked for"
        )
    axes = {name: dict(dims) for name, dims in moving.items()}
    for name in graph.outputs:
        axes[name] = {at: d for at, d in enumerate(graph.dims(name)) if isinstance(d, str)}
    torch.onnx.export(
        module,
        tuple(feeds.values()),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=list(feeds),
        output_names=list(graph.outputs),
        dynamic_axes=axes,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell the terminal much that no user of loratools has asked about."""
    before = logging.root.manager.disable
    nowhere = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
