"""`export --measure`: one call of the graph, beside those of the base and of a switchable graph."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import LoratoolsError

if TYPE_CHECKING:
    from loratools.commands.exported import Work
    from loratools.proving.latency import Timed

# One token on a past for a causal model; what an encoder reads at once.
SIZES = {"batch": 1, "past_sequence": 16, "encoder_sequence": 16}
READ = 16


def latencies(work: Work) -> dict[str, Any]:
    """Seconds of one call by name, all in turn in one run; ratios are to the first."""
    from loratools.proving.latency import Timed, measure

    found: dict[str, Any] = {}
    graphs = {graph.file: graph for graph in work.graphs}
    for path in work.files():
        if path.name not in graphs:
            continue
        graph = graphs[path.name]
        steps = "past_sequence" in graph.sample
        sizes = {**SIZES, "sequence": 1 if steps else READ}
        feeds = {n: t.numpy() for n, t in graph.feeds(sizes).items()}
        some: dict[str, Path | Timed] = {}
        with tempfile.TemporaryDirectory(dir=work.folder, prefix=".timed-") as place:
            room = Path(place)
            if len(graphs) == 1 and work.subject.adapters:
                some |= _beside(work, room)
            name = "switchable" if work.wish.switchable else "merged" if some else path.name
            name = ", ".join([name, *(m for m in work.made if not m.startswith("switchable"))])
            some[name] = Timed(path)
            for pack in sorted(work.folder.glob("*.onnx_adapter")):
                some[f"{name}, {pack.stem} active"] = Timed(path, adapter=pack)
            rows = measure(some, feeds)
        found |= {row.name: row.as_json() for row in rows}
    return found


def _beside(work: Work, room: Path) -> dict[str, Path | Timed]:
    """The base's graph; where adapters were folded, also a switchable one, idle and active."""
    from loratools.exporting import loading, tasks, tracing
    from loratools.exporting.switchable import pack, switchable
    from loratools.proving.latency import Timed

    subject, traced = work.subject, work.traced
    assert subject.plain is not None
    assert traced is not None
    config = loading.config_of(subject.plain)
    loaded = loading.load(
        subject.plain, work.task, config, trust_remote_code=work.wish.trust_remote_code
    )
    base = room / "base.onnx"
    tracing.trace(
        loaded.module, work.task, base, exporter=traced.exporter, opset=traced.opset,
        ir=traced.ir, shape=work.wish.shape, kv_cache=work.task.endswith(tasks.PAST),
    )  # fmt: skip
    some: dict[str, Path | Timed] = {"base": base}
    weights = [w for w in subject.weights if isinstance(w, float | int)]
    if work.wish.switchable or len(weights) < len(subject.adapters):
        return some
    graph, adapter = room / "switchable.onnx", room / "active.onnx_adapter"
    try:
        switchable(base, graph, subject.adapters)
        pack(subject.adapters, graph, adapter, weights=weights)
    except LoratoolsError as cause:  # kinds that are no product of two factors
        work.notes.append(f"not timed as switchable: {cause.message}")
        return some
    return {**some, "switchable, idle": graph, "switchable, active": Timed(graph, adapter=adapter)}
