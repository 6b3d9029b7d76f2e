"""`loratools export`: a model as ONNX graphs, with adapters folded in, proven in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratools.cli import options
from loratools.cli.merge import parsed, summary
from loratools.cli.progress import progress
from loratools.cli.screen import columns, problem_lines, safe, say, say_json, strong, typed

if TYPE_CHECKING:
    from loratools.commands.export import ExportResult

EXAMPLES = """\
loratools export Llama-3.2-1B -o llama-onnx
loratools export Llama-3.2-1B --adapter A --adapter B --weights .7,.3 -o out
loratools export roberta-sst2 --quantize int8 --for-ort 1.20 -o small"""
USAGE = "-o OUT [OPTIONS]"
GRAPH = "Graph"


class Exporters(StrEnum):
    """What traces a model."""

    auto = "auto"
    hf = "hf"
    dynamo = "dynamo"
    legacy = "legacy"


class Layouts(StrEnum):
    """For which program the folder is laid out."""

    onnx = "onnx"
    genai = "genai"
    transformers_js = "transformers.js"


class Quantities(StrEnum):
    """To what weights are quantised."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


class Methods(StrEnum):
    """How weights are quantised."""

    dynamic = "dynamic"
    nbits = "nbits"
    qdq = "qdq"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder that transformers loads, or a U-Net's of diffusers."
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="Fold this adapter in first; PATH:0.7 gives one its weight. Repeatable.",
        rich_help_panel=options.FILES,
    ),
]
Into = Annotated[
    str | None,
    typer.Option(
        "--into",
        metavar="GRAPH",
        help="Fold the adapters into this graph of the model instead: merge --base GRAPH "
        "--reference MODEL.",
        rich_help_panel=options.FILES,
    ),
]
Layout = Annotated[
    Layouts,
    typer.Option(
        "--to", "-t", metavar="onnx|genai|transformers.js",
        help="Which program's layout the folder has.", rich_help_panel=options.FILES,
    ),
]  # fmt: skip
Task = Annotated[
    str,
    typer.Option(
        "--task", metavar="auto|TASK",
        help="What the model is for, by optimum's names; auto: by its architecture.",
        rich_help_panel=GRAPH,
    ),
]  # fmt: skip
Cache = Annotated[
    bool,
    typer.Option(
        "--kv-cache/--no-kv-cache", help="Whether generation goes on from keys and values.",
        rich_help_panel=GRAPH,
    ),
]  # fmt: skip
Exporter = Annotated[
    Exporters,
    typer.Option(
        "--exporter", metavar="auto|hf|dynamo|legacy",
        help="Who traces: transformers' exporter, torch's, its legacy one; auto: the first "
        "that can, and why others could not is said.",
        rich_help_panel=GRAPH,
    ),
]  # fmt: skip
Opset = Annotated[
    int | None,
    typer.Option("--opset", metavar="N", min=11, max=26, help="The graph's opset.",
                 rich_help_panel=GRAPH),
]  # fmt: skip
IrVersion = Annotated[
    int | None,
    typer.Option("--ir-version", metavar="N", min=7, max=13, help="Its IR version; 10 by default.",
                 rich_help_panel=GRAPH),
]  # fmt: skip
ForOrt = Annotated[
    str | None,
    typer.Option(
        "--for-ort", metavar="VERSION",
        help="The newest opset that this onnxruntime reads, and nothing that it does not.",
        rich_help_panel=GRAPH,
    ),
]  # fmt: skip
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape", metavar="NAME=N,...",
        help="Fix dimensions, batch=1,sequence=128 say; the graph is proven at them.",
        rich_help_panel=GRAPH,
    ),
]  # fmt: skip
Ort = Annotated[
    bool,
    typer.Option("--ort", help="Also write .ort files, which small runtimes open.",
                 rich_help_panel=GRAPH),
]  # fmt: skip
Fuse = Annotated[
    bool,
    typer.Option("--fuse", help="Fuse attention for onnxruntime; nothing folds into it later.",
                 rich_help_panel=GRAPH),
]  # fmt: skip
Switchable = Annotated[
    bool,
    typer.Option(
        "--switchable",
        help="Leave the adapters out: a graph that takes any of them, call by call, and a "
        ".onnx_adapter of each.",
        rich_help_panel=GRAPH,
    ),
]  # fmt: skip
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="fp32|fp16", help="The graph's numbers.",
                 rich_help_panel=options.MATHS),
]  # fmt: skip
Quantize = Annotated[
    Quantities,
    typer.Option("--quantize", metavar="none|int8|int4", help="Quantise the proven graph.",
                 rich_help_panel=options.MATHS),
]  # fmt: skip
QuantizeMethod = Annotated[
    Methods | None,
    typer.Option(
        "--quantize-method", metavar="dynamic|nbits|qdq",
        help="nbits (default): weights in blocks; qdq: the same in standard operators; dynamic: "
        "activations too, the one that is faster on a CPU (int8).",
        rich_help_panel=options.MATHS,
    ),
]  # fmt: skip
Atol = Annotated[
    float | None,
    typer.Option(
        "--atol", metavar="A", min=0.0,
        help="What may differ from torch, in units of the largest output; 1e-4, fp16 2e-2.",
        rich_help_panel=options.JUDGING,
    ),
]  # fmt: skip
Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Compare with torch in onnxruntime.",
                 rich_help_panel=options.JUDGING),
]  # fmt: skip
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that lies in the model's folder.",
                 rich_help_panel=options.RUNNING),
]  # fmt: skip
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Time the graphs and print milliseconds a call.",
                 rich_help_panel=options.RUNNING),
]  # fmt: skip
Out = options.Out


def command(
    model: Model,
    out: Out,
    adapter: Adapter = None,
    into: Into = None,
    to: Layout = Layouts.onnx,
    assume: options.Assume = None,
    task: Task = "auto",
    kv_cache: Cache = True,
    exporter: Exporter = Exporters.auto,
    opset: Opset = None,
    ir_version: IrVersion = None,
    for_ort: ForOrt = None,
    shape: Shape = None,
    ort: Ort = False,
    fuse: Fuse = False,
    switchable: Switchable = False,
    weights: options.Weights = None,
    dtype: Dtype = "fp32",
    quantize: Quantize = Quantities.none,
    quantize_method: QuantizeMethod = None,
    only: options.Only = None,
    skip: options.Skip = None,
    tied: options.Tied = False,
    untie: options.Untie = False,
    allow: options.Allow = None,
    fail_on: options.FailOn = None,
    atol: Atol = None,
    verify: Verify = True,
    trust_remote_code: Trust = False,
    measure: Measure = False,
    force: options.Force = False,
    hash: options.Hash = options.Hashes.auto,
    quiet: options.Quiet = False,
    how: options.Progress = options.Bars.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Write a model as ONNX, with adapters folded in first.

    Every graph is run in onnxruntime and compared with torch, at shapes that were never traced,
    with padding, and for language models token by token. One that differs is kept in OUT.failed
    and not published. A causal model becomes one graph, which reads a prompt and goes on from it.
    """
    from loratools.commands.export import ExportResult, export

    with progress(how, quiet=quiet) as told:
        result = export(
            model,
            out=out,
            adapters=adapter or (),
            weights=parsed(weights),
            task=task,
            exporter=exporter.value,
            kv_cache=kv_cache,
            opset=opset,
            ir_version=ir_version,
            for_ort=for_ort,
            shape=shape,
            dtype=dtype,
            quantize=quantize.value,
            quantize_method=quantize_method and quantize_method.value,
            to=to.value,
            ort=ort,
            fuse=fuse,
            atol=atol,
            verify=verify,
            trust_remote_code=trust_remote_code,
            measure=measure,
            switchable=switchable,
            into=into,
            only=only or (),
            skip=skip or (),
            tied=tied,
            untie=untie,
            allow=allow or (),
            fail_on=fail_on or (),
            assume=assume or (),
            force=force,
            hash=hash.value,
            progress=told,
        )
    if as_json:
        say_json(result.as_json())
    elif not quiet:
        _summary(result) if isinstance(result, ExportResult) else summary(result)


def _summary(result: ExportResult) -> None:
    say(strong(safe(result.makes)))
    say()
    if result.inputs:
        say(columns(_ends(result), titled=True))
        say()
    by = {
        "hf": "transformers' exporter",
        "dynamo": "torch's dynamo exporter",
        "legacy": "torch's legacy exporter",
    }.get(result.exporter, "onnxruntime-genai's builder")
    graph = f", opset {result.opset}, IR {result.ir_version}" if result.opset else ""
    say(f"  made by {by}{graph}")
    if result.parity is None:
        say("  not compared with torch")
    else:
        say(f"  {_proof(result.parity)}")
    if result.latency:
        say()
        say(columns(_times(result.latency), right=(1, 2, 3), titled=True))
        if result.notes or result.problems:
            say()
    for note in result.notes:
        say(f"  {safe(note)}")
    for line in problem_lines(result.problems):
        say(line)
    say()
    place = typed(result.output)
    say(f"Written to {place} in {result.seconds:.1f} s.")
    say(f"Next: loratools verify {place}")


def _proof(parity: Mapping[str, Any]) -> str:
    count = len(parity["cases"])
    cases = f"{count} case{'s' if count > 1 else ''}"
    text = f"equals torch to {parity['worst']:.1g} in {cases}"
    if all(case["allowed"] is None or case["allowed"] > 1 for case in parity["cases"]):
        text = f"cosine with torch at least {parity['cosine']:.4f} in {cases}"
    return text + (f", {parity['tokens']} greedy tokens the same" if parity["tokens"] else "")


def _times(latency: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Milliseconds a call, the ratio to the first, and how far the rounds are apart."""
    title = ("graph", "ms a call", "to the first", "spread")
    return [title] + [
        (safe(name), f"{row['seconds'] * 1e3:.3f}", f"x{row['ratio']:.2f}", f"{row['spread']:.0%}")
        for name, row in latency.items()
    ]


def _ends(result: ExportResult) -> list[tuple[str, ...]]:
    """Inputs and outputs with their dimensions; the layers of a cache in one line."""
    rows: list[tuple[str, ...]] = [("", "name", "dimensions")]
    for title, values in (("input", result.inputs), ("output", result.outputs)):
        for name, dims in values.items():
            front = name.partition(".")[0]
            if front in ("past_key_values", "present"):
                parts = name.split(".")
                if parts[1] != "0":
                    continue
                name = ".".join([parts[0], "N", *parts[2:]])
            rows.append((title, safe(name), ", ".join(str(d) for d in dims)))
            title = ""
    return rows
