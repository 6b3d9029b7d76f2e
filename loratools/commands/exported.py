"""The half of `export` that writes: graphs traced, changed, proven and laid out; the receipt."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.commands.beside_graph import companions, lineage, set_aside, write_receipt
from loratools.commands.export import ExportResult
from loratools.commands.exportable import Subject, task_of
from loratools.commands.inspect import human
from loratools.commands.sources import called
from loratools.commands.timing import latencies
from loratools.commands.wishes import QUANTISED, Wish
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.weights.publishing import publish

if TYPE_CHECKING:
    import torch

    from loratools.adapter import Adapter
    from loratools.exporting.graphs import Graph
    from loratools.exporting.tracing import Traced
    from loratools.proving.parity import Parity


@dataclass(slots=True)
class Work:
    """One export while it is made, in the folder that becomes the output."""

    subject: Subject
    wish: Wish
    folder: Path
    task: str
    traced: Traced | None = None
    proofs: dict[str, Parity] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    made: list[str] = field(default_factory=list)  # what became of the graphs, in order

    @property
    def graphs(self) -> tuple[Graph, ...]:
        return () if self.traced is None else self.traced.graphs

    def files(self) -> list[Path]:
        """The graphs in the folder."""
        return sorted(self.folder.glob("*.onnx"))


def publish_export(
    subject: Subject,
    wish: Wish,
    out: Path,
    *,
    inputs: Any,
    dynamic: Any,
    named: Sequence[Path],
    force: bool,
    hash: str,
) -> ExportResult:
    """Trace, change and prove the graphs, and let them appear at `out` with their receipt."""
    task = task_of(subject, wish, inputs)
    size = _size(subject)
    with publish(out, inputs=named, force=force, needed=3 * size + 1_000_000) as output:
        work = Work(subject, wish, output.folder, task)
        work.notes += subject.notes
        if subject.before is not None:
            work.problems += subject.before.problems
            work.notes += subject.before.notes
        try:
            if wish.to == "genai":
                _genai(work)
            else:
                _trace(work, inputs, dynamic)
                _change(work)
            latency = latencies(work) if wish.measure and work.graphs else None
            if wish.to != "genai":
                companions(work)
                _lay_out(work)
        except LoratoolsError as cause:
            if cause.code != "proof_failed":
                raise
            aside = set_aside(work, output, out, cause)
            message = f"{cause.message}; the files are kept in {shown(aside)}"
            remedy = (
                f"{aside.name}/failed.json has all figures; another --exporter may do better, "
                "--atol allows more"
            )
            raise error(
                "proof_failed", message, [Problem("proof_failed", message, remedy=remedy)]
            ) from cause
        result = _result(work, out, latency)
        write_receipt(work, result, hash)
    return result


def _size(subject: Subject) -> int:
    if subject.module is not None and (some := list(subject.module.parameters())):
        return sum(p.numel() * 4 for p in some)
    folder = subject.folder
    return 0 if folder is None else sum(p.stat().st_size for p in folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------- graphs


def _trace(work: Work, inputs: Any, dynamic: Any) -> None:
    from loratools.exporting import models, one_decoder, tasks, tracing
    from loratools.exporting.runtimes_table import OPSET_OF_INT4, chosen

    wish, subject = work.wish, work.subject
    asked = wish.opset
    if asked is None and wish.for_ort is None and (wish.bits, wish.method) == (4, "qdq"):
        asked = OPSET_OF_INT4
    opset, ir = chosen(wish.for_ort, opset=asked, ir=wish.ir)
    assert subject.module is not None
    module = _with_running(work, subject.module)
    work.traced = tracing.trace(
        module,
        work.task,
        work.folder,
        exporter=wish.exporter,
        opset=opset if asked or wish.for_ort else None,
        ir=ir,
        shape=wish.shape,
        kv_cache=work.task.endswith(tasks.PAST),
        inputs=inputs,
        dynamic=dynamic,
        props=lineage(work),
    )
    work.notes += work.traced.notes
    names = [g.file for g in work.graphs]
    if models.DECODER_WITH_PAST in names:
        first, second = (work.folder / n for n in (models.DECODER, models.DECODER_WITH_PAST))
        one_decoder.merge(first, second, work.folder / models.MERGED)
        for path in (first, second):
            path.unlink()
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    _refuse_fresh(work)
    _check(work)
    _prove(work, "fp32")


def _with_running(work: Work, module: torch.nn.Module) -> torch.nn.Module:
    """The module as a runtime adapter changes it; virtual tokens stand before a cache as a past."""
    adapter = work.subject.running
    if adapter is None:
        return module
    from loratools.exporting import tasks, with_runtime

    if work.task.endswith(tasks.PAST) and adapter.runtime is not None:
        method = adapter.runtime.method
        made = None
        if method in with_runtime.PREFIXES:
            made = with_runtime.prefix_past(adapter, work.subject.config)
        elif method in with_runtime.PROMPTS:
            made = with_runtime.prompt_past(module, adapter)
        if made is not None:
            name = f"{called(adapter.name)}.past.safetensors"
            with_runtime.write_past(made, work.folder / name)
            work.notes.append(
                f"{name} is the past to begin with ({made.tokens} virtual tokens), the graph is "
                "the model's own; --no-kv-cache puts them into the graph"
            )
            return module
    around = with_runtime.with_runtime(module, adapter)
    # A bottleneck stands in the model itself, which keeps its own inputs.
    inside = isinstance(around, with_runtime.Plain)
    work.subject.module = around.m if inside else around  # type: ignore[assignment]
    work.made.append(f"with {called(adapter.name)}")
    assert work.subject.module is not None
    return work.subject.module


def _refuse_fresh(work: Work) -> None:
    """A weight that the files lack is made up at random; a graph may not hold one."""
    from loratools.exporting.graph_files import sidecar
    from loratools.exporting.outline import opened

    held = {w[0] for path in work.files() for w in sidecar(opened(path)).values()}
    lost = [name for name in work.subject.fresh if name in held]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        message = (
            f"{shown(work.subject.name)} has no {shown(lost[0])}{more}, which {work.task} needs"
        )
        remedy = "name the task that it was trained for (--task), or fold in what brings them"
        raise error("missing", message, [Problem("missing", message, remedy=remedy)])


def _check(work: Work) -> None:
    import onnx

    for path in work.files():
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as cause:
            raise error("proof_failed", f"{path.name}: {shown(cause)}") from cause


def _prove(work: Work, kind: str) -> None:
    """Compare with torch; of what is quantised the cosine is told, not judged."""
    if not work.wish.verify or not work.graphs:
        return
    from loratools.proving.parity import ATOL, COSINE, parity

    atol = work.wish.atol
    if atol is None:
        atol = None if kind.startswith("int") else ATOL.get(kind, ATOL["fp32"])
    assert work.subject.module is not None
    found = parity(
        work.folder, work.subject.module, work.task, work.graphs, atol=atol,
        chunks="fused" not in work.made,
    )  # fmt: skip
    work.proofs[kind] = found
    if not found.ok:
        more = found.failures()
        said = f" (and {len(more) - 1} more)" if len(more) > 1 else ""
        raise error("proof_failed", f"the graph differs from torch: {shown(more[0])}{said}")
    if kind.startswith("int") and found.cosine < COSINE:
        words = f"quantised outputs have a cosine of {found.cosine:.3f} with the exact ones"
        other = "--quantize int8" if work.wish.bits == 4 else "--dtype fp16"
        work.problems.append(Problem("loss", words, "warning", remedy=f"{other} keeps more"))


def _change(work: Work) -> None:
    """What becomes of a proven graph: fused, in halves, quantised, switchable; proven again."""
    wish = work.wish
    if wish.switchable:
        _switches(work)
    if wish.fuse:
        from loratools.exporting.fusing import fuse

        _each(work, lambda source, out: fuse(source, out, work.subject.config, notes=work.notes))
        work.made.append("fused")
        _prove(work, "fused")
    if wish.dtype == "fp16":
        from loratools.exporting.precision import to_fp16

        _each(work, to_fp16)
        work.made.append("fp16")
        _prove(work, "fp16")
    if wish.bits is not None:
        from loratools.exporting.quantising import quantise

        bits, method = wish.bits, wish.method
        assert method is not None
        _each(work, lambda source, out: quantise(source, out, bits=bits, method=method))  # type: ignore[arg-type]
        work.made.append(f"{QUANTISED[bits]} {method}")
        _prove(work, QUANTISED[bits])
    if work.made:
        _check_changed(work)


def _each(work: Work, change: Callable[[Path, Path], object]) -> None:
    """Replace every graph by what it becomes."""
    from loratools.exporting.tracing import quiet

    for path in work.files():
        room = work.folder / ".changed"
        room.mkdir()
        with quiet():
            change(path, room / path.name)
        path.unlink()
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        for made in sorted(room.iterdir()):
            os.replace(made, work.folder / made.name)
        room.rmdir()


def _check_changed(work: Work) -> None:
    """The lineage and the runtime's opset outlive what was done to a graph."""
    from loratools.exporting.outline import opened

    for path in work.files():
        keys = {p.key for p in opened(path).metadata_props}
        if "loratools.version" not in keys:
            _mark(path, lineage(work))


def _mark(path: Path, props: Mapping[str, str]) -> None:
    from loratools.exporting.outline import opened

    model = opened(path)
    kept = {p.key: p.value for p in model.metadata_props} | dict(props)
    del model.metadata_props[:]
    for key in sorted(kept):
        model.metadata_props.add(key=key, value=kept[key])
    path.write_bytes(model.SerializeToString(deterministic=True))


def _switches(work: Work) -> None:
    from loratools.exporting.switchable import pack, switchable

    some = work.subject.adapters
    _each(work, lambda source, out: switchable(source, out, some))
    graph = work.files()[0]
    packs = {}
    for adapter, weight in zip(some, work.subject.weights, strict=True):
        path = work.folder / f"{called(adapter.name)}.onnx_adapter"
        if path in packs:
            raise error("usage", f"two adapters are called {shown(path.stem)}; rename one")
        if not isinstance(weight, float | int):
            raise error("usage", "--switchable takes one number for each adapter as its weight")
        pack(adapter, graph, path, weights=[float(weight)])
        packs[path] = adapter
    work.made.append(f"switchable, {len(some)} pack{'s' if len(some) > 1 else ''}")
    _prove(work, "switchable")
    if work.wish.verify and not work.wish.shape:
        _prove_packs(work, graph, packs)


def _prove_packs(work: Work, graph: Path, packs: Mapping[Path, Adapter]) -> None:
    """Each pack, active, gives what its adapter folded into the torch module does."""
    from loratools.proving.parity import ATOL
    from loratools.proving.switched import packs_equal

    assert work.subject.module is not None
    plain = {p: a for (p, a), w in zip(packs.items(), work.subject.weights, strict=True) if w == 1}
    found = packs_equal(
        work.graphs[0], graph, work.subject.module, plain, atol=work.wish.atol or ATOL["fp32"]
    )
    work.proofs["switchable"].figures += found.figures
    if not found.ok:
        raise error("proof_failed", f"a pack differs from the fold: {found.failures()[0]}")


def _genai(work: Work) -> None:
    from loratools.exporting.layouts import PROVED_LENGTH, genai, prove_genai, unread_tokenizer
    from loratools.proving.parity import Figure, Parity

    folder = work.subject.folder
    assert folder is not None
    precision = "int4" if work.wish.bits == 4 else work.wish.dtype
    genai(folder, work.folder, precision=precision)
    if precision != "fp32":
        work.made.append(precision)
    if why := unread_tokenizer(work.folder):
        work.notes.append(f"onnxruntime-genai cannot read this tokenizer, feed it tokens: {why}")
    if work.wish.verify:
        figures = prove_genai(folder, work.folder, precision)
        case = f"a prompt of {PROVED_LENGTH}"
        work.proofs[precision] = Parity([Figure("model.onnx", case, "logits", *figures, None)])


def _lay_out(work: Work) -> None:
    if work.wish.to == "transformers.js":
        from loratools.exporting.layouts import transformers_js

        kind = {8: "q8", 4: "q4", None: work.wish.dtype}[work.wish.bits]
        transformers_js(work.folder, dtype=kind)
    if work.wish.ort:
        from loratools.exporting.layouts import to_ort

        for path in work.files():
            to_ort(path)


def _result(work: Work, out: Path, latency: dict[str, Any] | None) -> ExportResult:
    wish, traced = work.wish, work.traced
    count = len(work.subject.origin.get("adapters") or ())
    what = f"{count} adapter{'s' if count > 1 else ''} in " if count else ""
    files = sorted(
        p.relative_to(work.folder).as_posix() for p in work.folder.rglob("*") if p.is_file()
    )
    graphs = [f for f in files if f.endswith((".onnx", ".data", ".onnx_data", ".ort"))]
    nbytes = sum((work.folder / f).stat().st_size for f in files)
    tail = "".join(f", {m}" for m in work.made)
    layout = {"onnx": "ONNX", "genai": "onnxruntime-genai", "transformers.js": "transformers.js"}
    makes = f"export: {what}{shown(work.subject.name)} -> {layout[wish.to]} ({work.task}{tail}), "
    proof = work.proofs and list(work.proofs.values())[-1]
    parity = {**proof.as_json(), "proofs": sorted(work.proofs)} if proof else None
    return ExportResult(
        makes=makes + human(sum((work.folder / f).stat().st_size for f in graphs)),
        output=out,
        task=work.task,
        exporter="genai" if traced is None else traced.exporter,
        opset=0 if traced is None else traced.opset,
        ir_version=0 if traced is None else traced.ir,
        dtype=wish.dtype,
        quantize=QUANTISED[wish.bits],
        to=wish.to,
        files=files,
        inputs={} if traced is None else {k: list(v) for k, v in traced.inputs.items()},
        outputs={} if traced is None else {k: list(v) for k, v in traced.outputs.items()},
        parity=parity,
        seconds=0.0,
        nbytes=nbytes,
        latency=latency,
        problems=tuple(work.problems),
        notes=tuple(dict.fromkeys(work.notes)),
    )
