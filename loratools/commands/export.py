"""`export`: a model, with adapters folded in or switchable, as ONNX graphs that are proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from loratools.commands import sources
from loratools.commands.exportable import from_folder, from_module
from loratools.commands.inspect import as_json
from loratools.commands.merge import Progress
from loratools.commands.weighing import Given
from loratools.commands.wishes import wished
from loratools.errors import Problem, error, shown
from loratools.weights.placing import resolved

if TYPE_CHECKING:
    import torch

    from loratools.commands.merge import MergeResult


@dataclass(slots=True)
class ExportResult:
    """What an export made, and how it was proven."""

    makes: str
    output: Path
    task: str
    exporter: str
    opset: int
    ir_version: int
    dtype: str
    quantize: str
    to: str
    files: list[str]
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    parity: dict[str, Any] | None
    seconds: float
    nbytes: int
    latency: dict[str, Any] | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        return {
            "makes": self.makes,
            "output": str(self.output),
            "task": self.task,
            "exporter": self.exporter,
            "opset": self.opset,
            "ir_version": self.ir_version,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "to": self.to,
            "files": self.files,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "parity": self.parity,
            "latency": self.latency,
            "seconds": round(self.seconds, 3),
            "bytes": self.nbytes,
            "problems": [as_json(p) for p in self.problems],
            "notes": list(self.notes),
        }


def export(
    model: str | Path | torch.nn.Module,
    *,
    out: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    weights: Sequence[Given] | Mapping[str, Any] | str | None = None,
    inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    task: str = "auto",
    exporter: str = "auto",
    kv_cache: bool = True,
    opset: int | None = None,
    ir_version: int | None = None,
    for_ort: str | None = None,
    shape: str | Mapping[str, int] | None = None,
    dtype: str = "fp32",
    quantize: str = "none",
    quantize_method: str | None = None,
    to: str = "onnx",
    ort: bool = False,
    fuse: bool = False,
    atol: float | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    measure: bool = False,
    switchable: bool = False,
    into: str | Path | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    tied: bool = False,
    untie: bool = False,
    allow: Sequence[str] = (),
    fail_on: Sequence[str] = (),
    assume: Sequence[str] = (),
    force: bool = False,
    hash: str = "auto",
    progress: Progress | None = None,
) -> ExportResult | MergeResult:
    """Write a model as ONNX into the folder `out`, with adapters folded into it first.

    `model` is a folder that transformers' Auto classes or diffusers load, an id of the Hub, or a
    live module; any other module needs sample `inputs`, and `dynamic` names their dimensions that
    move ({input: {dimension: name}}; by default the first one of each). Adapters are folded into a
    copy of a live module. Graphs are compared with
    torch in onnxruntime at sizes that were never traced; where they differ the files stay in
    `OUT.failed`, and ProofError is raised. With `into` it is `merge(adapters, base=into,
    reference=model)`.
    """
    began = perf_counter()
    if out is None:
        raise error("usage", "export needs an output (-o OUT)")
    fold: dict[str, Any] = {
        "only": only, "skip": skip, "tied": tied, "untie": untie, "allow": allow,
        "fail_on": fail_on, "assume": assume, "progress": progress,
    }  # fmt: skip
    if into is not None:
        if not isinstance(model, str | Path):
            raise error("usage", "--into folds into the graph of a model in a folder")
        if not adapters:
            raise error("usage", "--into folds adapters into a graph; name them: --adapter A")
        from loratools.commands.merge import merge

        return merge(
            adapters,
            into,
            reference=model,
            out=out,
            weights=weights,
            force=force,
            hash=hash,
            **fold,
        )  # fmt: skip
    wish = wished(
        task=task, exporter=exporter, kv_cache=kv_cache, opset=opset, ir=ir_version,
        for_ort=for_ort, shape=shape, dtype=dtype, quantize=quantize, method=quantize_method,
        to=to, ort=ort, fuse=fuse, atol=atol, verify=verify, trust_remote_code=trust_remote_code,
        measure=measure, switchable=switchable,
    )  # fmt: skip
    if Path(out).suffix == ".onnx":
        raise error("usage", f"-o {shown(out)}: the output is a folder; leave the suffix out")
    if switchable and not adapters:
        raise error("usage", "--switchable needs the adapters to switch: --adapter A --adapter B")
    if weights is not None and not adapters:
        raise error("usage", "--weights speaks of adapters; name them: --adapter A")
    from loratools.commands.exported import publish_export
    from loratools.exporting import installed

    modules = ("onnx", "onnxscript", "onnxruntime")
    installed.require(*(modules if wish.to != "genai" else ("onnxruntime",)))
    with ExitStack() as stack:
        if isinstance(model, str | Path):
            if inputs is not None:
                raise error("usage", "inputs belong to a module; a folder's task has its own")
            named = [Path(p) for p in (model, *adapters) if sources.address_of(p) is None]
            resolved(Path(out), as_file=False, inputs=named)
            refuse_early(Path(out), named, force=force)
            subject = from_folder(model, adapters, weights, wish, Path(out), fold, stack)
        else:
            named = [Path(p) for p in adapters if sources.address_of(p) is None]
            subject = from_module(model, adapters, weights, wish, inputs, fold)
        result = publish_export(
            subject, wish, Path(out), inputs=inputs, dynamic=dynamic, named=named, force=force,
            hash=hash,
        )  # fmt: skip
    result.seconds = perf_counter() - began
    return result


def refuse_early(out: Path, named: Sequence[Path], *, force: bool) -> None:
    """What `publish` would say of the output, before minutes of tracing."""
    from loratools.weights.placing import Places, refuse_existing

    refuse_existing(Places(resolved(out, as_file=False, inputs=named), False, False), force=force)
