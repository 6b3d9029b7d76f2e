"""The options that several commands share, each with its names, its help and its group."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from loratools.cli.pages import print_page

FILES = "Sources and output"
MATHS = "Arithmetic"
PARTS = "Parts"
JUDGING = "Refusals"
RUNNING = "Running"
PRINTING = "Printing"


class Bars(StrEnum):
    """How progress is told."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    none = "none"


class Hashes(StrEnum):
    """Which whole-file hashes a receipt has."""

    auto = "auto"
    full = "full"
    none = "none"


# ------------------------------------------------------------------------------- sources, output

# An existing path wins over an id of the same name.
ON_THE_HUB = "org/name[@revision][:path/inside] on the Hub"
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help=f"Adapters: folders, files, or {ON_THE_HUB}."),
]
WeightedAdapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ADAPTER...",
        help=f"Adapters: folders, files, or {ON_THE_HUB}; PATH:0.7 gives one its weight.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        "-b",
        metavar="BASE",
        help="The base model: a folder or a file of weights, an id on the Hub, or auto: the one "
        "that the adapters name.",
        rich_help_panel=FILES,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="MODEL",
        help="The model that an ONNX graph was exported from: its weights are found in the graph, "
        "and confirmed, by their content.",
        rich_help_panel=FILES,
    ),
]
Out = Annotated[
    str,
    typer.Option(
        "--out", "-o", metavar="OUT", help="Where the output goes.", rich_help_panel=FILES
    ),
]
Assume = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        metavar="[N:]KEY=VALUE",
        help="What the files cannot say: alpha=16 for all adapters, 2:alpha=16 for the second. "
        "Refused when a file says otherwise.",
        rich_help_panel=FILES,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", "-f", help="Replace an adapter or a model at OUT; never an input.",
        rich_help_panel=RUNNING,
    ),
]  # fmt: skip
Hash = Annotated[
    Hashes,
    typer.Option(
        "--hash",
        metavar="auto|full|none",
        help="Whole-file sha256 in the receipt; auto: where the output is under 1 GB.",
        rich_help_panel=RUNNING,
    ),
]

# ------------------------------------------------------------------------------- arithmetic

Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="W,...|mean",
        help="One weight for each adapter, used as given: 0.7,-0.3 or repeated; mean is 1/n each; "
        'one for each part: "unet=0.8;text_encoder=0.4", lbw=1,0,... for blocks.',
        rich_help_panel=MATHS,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", "-r", metavar="N", help="Truncate the update optimally to rank N or less.",
        rich_help_panel=MATHS,
    ),
]  # fmt: skip
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="E",
        help="Truncate to the smallest rank that keeps the share E of the squared singular values.",
        rich_help_panel=MATHS,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="fp32|fp16|bf16", help="The output's number format.",
        rich_help_panel=MATHS,
    ),
]  # fmt: skip

# ------------------------------------------------------------------------------- parts, refusals

Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="GLOB",
        help="Take these targets only; also attention, mlp, embeddings, experts, unet, "
        "text_encoder. Repeatable.",
        rich_help_panel=PARTS,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip", metavar="GLOB", help="Leave these targets out. Repeatable.",
        rich_help_panel=PARTS,
    ),
]  # fmt: skip
Tied = Annotated[
    bool,
    typer.Option(
        "--tied",
        help="Where embedding and head are one stored tensor, change both (PEFT's way).",
        rich_help_panel=PARTS,
    ),
]
Untie = Annotated[
    bool,
    typer.Option(
        "--untie", help="There, write both and change the targeted one alone.",
        rich_help_panel=PARTS,
    ),
]  # fmt: skip
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="CODE[:GLOB]",
        help="Turn refusals of this code into warnings; the receipt says so. Repeatable.",
        rich_help_panel=JUDGING,
    ),
]
FailOn = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-on",
        metavar="CODE|warning",
        help="Turn warnings of this code, or all of them, into refusals. Repeatable.",
        rich_help_panel=JUDGING,
    ),
]

# ------------------------------------------------------------------------------- printing

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=PRINTING),
]
Progress = Annotated[
    Bars,
    typer.Option(
        "--progress",
        metavar="auto|bar|plain|none",
        help="How progress is told on stderr; auto: a bar on a terminal, else a line each 30 s.",
        rich_help_panel=PRINTING,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=PRINTING),
]
# `main` looks for this one itself: an error may come before any option is understood.
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback of an unexpected error.", rich_help_panel=PRINTING
    ),
]
Help = Annotated[
    bool,
    typer.Option(
        "--help", "-h", is_eager=True, callback=print_page, help="Show this page.",
        rich_help_panel=PRINTING,
    ),
]  # fmt: skip

To = Annotated[
    str | None,
    typer.Option(
        "--to",
        "-t",
        metavar="FORMAT",
        help="The output's format: peft, kohya, diffusers, gguf, mlx, ...; else what the inputs "
        "share, or peft.",
        rich_help_panel=FILES,
    ),
]
