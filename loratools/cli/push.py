"""`loratools push`: publish on the Hub; the table of what was sent, and what the Hub holds now."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from loratools.cli import options
from loratools.cli.progress import plain
from loratools.cli.screen import (
    LISTED,
    columns,
    problem_lines,
    safe,
    say,
    say_json,
    strong,
    tell,
    typed,
)
from loratools.errors import error, shown

if TYPE_CHECKING:
    from loratools.commands.push import PushResult

EXAMPLES = """\
loratools push my-lora me/style-lora --dry-run       # the plan, and the card
loratools push my-lora me/style-lora --license mit
loratools push folded team/model --create-pr"""

WHERE = "Repository"
CARD = "Model card"

Path = Annotated[
    str, typer.Argument(metavar="PATH", help="What to publish: a folder, or one file of weights.")
]
Repo = Annotated[
    str,
    typer.Argument(
        metavar="ORG/NAME",
        help="The repository on the Hub; it is made where it does not exist.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", "-n", help="Check everything, show the plan and the card, send nothing.",
        rich_help_panel=options.RUNNING,
    ),
]  # fmt: skip
Public = Annotated[
    bool,
    typer.Option(
        "--public", help="Make a new repository public; without it, private.",
        rich_help_panel=WHERE,
    ),
]  # fmt: skip
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="Stop where the repository is public.", rich_help_panel=WHERE
    ),
]  # fmt: skip
CreatePr = Annotated[
    bool,
    typer.Option(
        "--create-pr", help="Open a pull request instead of changing main.", rich_help_panel=WHERE
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="BRANCH", help="The branch, or refs/pr/N of a pull request.",
        rich_help_panel=WHERE,
    ),
]  # fmt: skip
CreateBranch = Annotated[
    bool,
    typer.Option(
        "--create-branch", help="Make that branch, from main, if it is not there.",
        rich_help_panel=WHERE,
    ),
]  # fmt: skip
PathInRepo = Annotated[
    str | None,
    typer.Option(
        "--path-in-repo", metavar="DIR", help="A folder of the repository to publish into.",
        rich_help_panel=WHERE,
    ),
]  # fmt: skip
CommitMessage = Annotated[
    str | None,
    typer.Option(
        "--commit-message", metavar="TEXT", help="What the commit says.", rich_help_panel=WHERE
    ),
]
Tag = Annotated[
    str | None,
    typer.Option(
        "--tag", metavar="NAME", help="A tag for the commit, once it is verified.",
        rich_help_panel=WHERE,
    ),
]  # fmt: skip
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", metavar="GLOB", help="Publish these files too. Repeatable.",
        rich_help_panel=options.FILES,
    ),
]  # fmt: skip
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="GLOB", help="Leave these files here. Repeatable.",
        rich_help_panel=options.FILES,
    ),
]  # fmt: skip
SignKey = Annotated[
    str | None,
    typer.Option(
        "--sign-key",
        metavar="PRIVATE.pem",
        help="Sign all files with this key (elliptic curve P-256) and publish model.sig; "
        "`verify --key` checks it.",
        rich_help_panel=options.FILES,
    ),
]
BaseModel = Annotated[
    list[str] | None,
    typer.Option(
        "--base-model",
        metavar="ORG/NAME",
        help="The base on the Hub, where the files do not name it. Repeatable.",
        rich_help_panel=CARD,
    ),
]
License = Annotated[
    str | None,
    typer.Option(
        "--license", metavar="ID", help="The license: apache-2.0, mit, llama3.1, other, ...",
        rich_help_panel=CARD,
    ),
]  # fmt: skip
LicenseName = Annotated[
    str | None,
    typer.Option(
        "--license-name", metavar="NAME", help="The name of --license other.", rich_help_panel=CARD
    ),
]
LicenseLink = Annotated[
    str | None,
    typer.Option(
        "--license-link", metavar="URL", help="The text of --license other: a link, or LICENSE.",
        rich_help_panel=CARD,
    ),
]  # fmt: skip
Card = Annotated[
    str,
    typer.Option(
        "--card",
        metavar="auto|keep|none|FILE",
        help="auto: ours, and a card of yours stays as it is but for what it lacks; keep: the one "
        "that is there, untouched; none: no card; or a file.",
        rich_help_panel=CARD,
    ),
]
EvalResults = Annotated[
    str | None,
    typer.Option(
        "--eval-results", metavar="FILE", help="Scores that you measured, in YAML or JSON.",
        rich_help_panel=CARD,
    ),
]  # fmt: skip
# Shell histories and process lists keep it: it is answered, never taken.
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="...",
        help="Not taken here, where shell histories keep it: `hf auth login`, or HF_TOKEN.",
        rich_help_panel=WHERE,
    ),
]


def command(
    path: Path,
    repo: Repo,
    public: Public = False,
    private: Private = False,
    create_pr: CreatePr = False,
    revision: Revision = None,
    create_branch: CreateBranch = False,
    path_in_repo: PathInRepo = None,
    commit_message: CommitMessage = None,
    tag: Tag = None,
    token: Token = None,
    include: Include = None,
    exclude: Exclude = None,
    sign_key: SignKey = None,
    base_model: BaseModel = None,
    license: License = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    card: Card = "auto",
    eval_results: EvalResults = None,
    dry_run: DryRun = False,
    quiet: options.Quiet = False,
    how: options.Progress = options.Bars.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Publish an adapter, a folded model or an ONNX folder on the Hub, with a model card.

    A new repository is private. Only files that belong to a model are sent, in one commit; no
    file on the Hub is deleted. Everything is checked before the first byte is sent, and what the
    Hub holds is compared with it afterwards. Run again, only what differs is sent.
    """
    if token is not None:
        raise error(
            "usage",
            "push takes no --token, which shell histories keep: run `hf auth login` once, "
            "or set HF_TOKEN",
        )
    from loratools.commands.push import push

    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    bars = how is options.Bars.bar or (how is options.Bars.auto and terminal)
    silent = quiet or how is options.Bars.none
    with _said(quiet=quiet):
        result = push(
            path,
            repo,
            dry_run=dry_run,
            public=public,
            private=private,
            create_pr=create_pr,
            revision=revision,
            create_branch=create_branch,
            base_model=base_model or (),
            license=license,
            license_name=license_name,
            license_link=license_link,
            card=card,
            include=include or (),
            exclude=exclude or (),
            path_in_repo=path_in_repo or "",
            commit_message=commit_message,
            tag=tag,
            eval_results=eval_results,
            sign_key=sign_key,
            bars=bars and not silent,
            progress=None if silent else plain(),
        )
    if as_json:
        say_json(result.as_json())
    elif not quiet:
        summary(result)


@contextmanager
def _said(*, quiet: bool) -> Iterator[None]:
    """What the library logs meanwhile, a line each on stderr."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(safe(record.getMessage()))

    log, told = logging.getLogger("loratools"), Told(logging.INFO)
    if quiet:
        told.setLevel(logging.ERROR)
    level, onward = log.level, log.propagate
    log.addHandler(told)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(told)
        log.setLevel(level)
        log.propagate = onward


def summary(result: PushResult) -> None:
    """Print what was sent, file by file, what stayed, what is odd, and where it is now."""
    say(strong(safe(_makes(result))) + (" (dry run)" if result.dry_run else ""))
    say()
    say(_files(result))
    say()
    for line in _left(result):
        say(f"  {line}")
    say(f"  {_sum(result)}")
    if result.commit and result.uploaded:
        tag = f", tag {shown(result.tag)}" if result.tag else ""
        say(f"  commit {result.commit[:12]} on {shown(_revision(result))}{tag}")
    elif result.tag:
        say(f"  tag {shown(result.tag)} on commit {(result.commit or '')[:12]}")
    for note in result.notes:
        say(f"  {safe(note)}")
    for line in problem_lines(result.problems):
        say(line)
    say()
    if result.dry_run:
        if result.card:
            say(strong("README.md"))
            say("\n".join(f"  {safe(line)}".rstrip() for line in result.card.splitlines()))
            say()
        say("Nothing was sent.")
        return
    if not result.uploaded:
        say(f"Nothing changed: {result.url} is as it is here.")
        return
    say(f"Published in {result.seconds:.1f} s: {result.url}")
    at = "" if result.revision == "main" and result.pr is None else f"@{_revision(result)}"
    say(f"Next: loratools inspect {typed(result.repo + at)}")


def _makes(result: PushResult) -> str:
    """`push: adapter -> me/style, new and private`."""
    where = result.repo
    if result.revision != "main":
        where += f" ({result.revision})"
    elif result.pr is not None:
        where += f" (pull request {result.pr})"
    if result.visibility is None:
        return f"push: {result.kind} -> {where}"
    new = "new and " if result.created else ""
    return f"push: {result.kind} -> {where}, {new}{result.visibility}"


def _revision(result: PushResult) -> str:
    return result.revision if result.pr is None else f"refs/pr/{result.pr}"


def _files(result: PushResult) -> str:
    from loratools.commands.inspect import human

    rows = [("file", "size", "stored", "sha256", "change")]
    for one in result.files:
        action = one["action"] if result.compared else "-"
        stored = {"lfs": "LFS", "regular": "git", None: "-"}[one["storage"]]
        rows.append((shown(one["path"]), human(one["size"]), stored, one["sha256"][:12], action))
    return columns(rows, right=(1,), cut=0, titled=True)


def _left(result: PushResult) -> list[str]:
    """What stays here and why, one line for each reason; what only the Hub has."""
    reasons: dict[str, list[str]] = {}
    for name, why in result.skipped:
        reasons.setdefault(why.partition(";")[0], []).append(name)
    lines = [f"stays here: {_listed(names)} ({safe(why)})" for why, names in reasons.items()]
    if result.kept:
        lines.append(f"only on the Hub, and kept: {_listed(result.kept)}")
    return lines


def _listed(names: list[str] | tuple[str, ...]) -> str:
    few = ", ".join(shown(name) for name in names[: LISTED // 4])
    return few + (f" and {len(names) - LISTED // 4} more" if len(names) > LISTED // 4 else "")


def _sum(result: PushResult) -> str:
    from loratools.commands.inspect import human

    verb = "to send" if result.dry_run else "sent"
    files = f"{result.uploaded} file{'' if result.uploaded == 1 else 's'}"
    words = f"{files} {verb} ({human(result.nbytes)})" if result.uploaded else f"nothing {verb}"
    if result.compared and result.unchanged:
        words += f", {result.unchanged} unchanged"
    if not result.dry_run:
        words += f"; {result.verified} of {len(result.files)} verified on the Hub"
    return words
