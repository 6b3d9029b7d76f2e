"""The command line: `main` runs one command and turns every ending into an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType

from loratools.errors import LoratoolsError, error

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; specs/cli.md has the table of them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    with _stoppable():
        try:
            return _run(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            status = INTERRUPTED
    if status in (INTERRUPTED, TERMINATED):
        _say_stopped(arguments, status)
    return status


def _run(arguments: list[str]) -> int:
    import typer

    from loratools.cli.app import COMMANDS, build
    from loratools.cli.screen import refused

    as_json, debug = "--json" in arguments, "--debug" in arguments
    command = " ".join(["loratools", *(a for a in arguments[:1] if a in COMMANDS)])
    try:
        ended = build()(arguments, prog_name="loratools", standalone_mode=False)
        status = ended if isinstance(ended, int) else 0
    except LoratoolsError as cause:
        refused(cause, as_json=as_json, command=command)
        return cause.exit
    except typer.Abort:
        status = INTERRUPTED
    except Exception as cause:
        if debug:
            import traceback

            traceback.print_exc()
        return _unforeseen(cause, command, as_json=as_json)
    if status == INTERRUPTED:  # typer's word for Ctrl-C
        raise KeyboardInterrupt
    return status


def _unforeseen(cause: Exception, command: str, *, as_json: bool) -> int:
    """An exception that is none of ours: typer's usage errors, the system's, a bug."""
    from loratools.cli.screen import failed, refused, safe, tell

    told: LoratoolsError | None = None
    if hasattr(cause, "format_message"):  # what all of typer's own errors have
        told = error("usage", cause.format_message().rstrip("."))
    elif isinstance(cause, OSError):
        where = f"{cause.filename}: " if cause.filename else ""
        told = error("storage", f"{where}{cause.strerror or cause}")
    if told is not None:
        refused(told, as_json=as_json, command=command)
        return told.exit
    message = f"{type(cause).__name__}: {cause}".splitlines()[0]
    tell(
        f"error: a bug in loratools, please report it with what --debug adds to this command: "
        f"{safe(message)}"
    )
    if as_json:
        failed("bug", 1, message)
    return 1


def _say_stopped(arguments: Sequence[str], status: int) -> None:
    from loratools.cli.screen import failed, tell

    word = "interrupted" if status == INTERRUPTED else "terminated"
    if arguments[:1] == ["merge"]:
        word += "; run the same command again: a fold goes on after its finished shards"
    if arguments[:1] == ["push"]:
        word += "; run the same command again: what arrived is not sent twice"
    tell(word)
    if "--json" in arguments:
        failed("interrupted", status, word)


# ------------------------------------------------------------------------------- surroundings


def _open_streams() -> None:
    """Make the streams fit to be used: open, and able to take any character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file opened would get this number
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream for what was closed when it began.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM unwind the program once; a second one ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, at_once)
        raise SystemExit(128 + number)

    def at_once(number: int, frame: FrameType | None) -> None:
        with suppress(Exception):
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # the progress bar hides the cursor
                sys.stderr.flush()
        os._exit(128 + number)

    try:
        before = [(n, signal.signal(n, stop)) for n in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:  # not the main thread: whoever started it decides on signals
        yield
        return
    try:
        yield
    finally:
        for number, action in before:
            signal.signal(number, action)
