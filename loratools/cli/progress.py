"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from loratools.cli.options import Bars
from loratools.cli.screen import tell

EVERY = 30.0  # seconds between two lines

Told = Callable[[int, int], None]  # bytes done, bytes in all; called from several threads


@contextmanager
def progress(how: Bars, *, quiet: bool) -> Iterator[Told | None]:
    """A callback that shows how many bytes are done, as long as the block runs."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if quiet or how is Bars.none:
        yield None
    elif how is Bars.bar or (how is Bars.auto and terminal):
        with _bar() as told:
            yield told
    else:
        yield plain()


@contextmanager
def _bar() -> Iterator[Told]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    shown = Progress(
        BarColumn(24),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True, force_terminal=True, no_color=True),
        transient=True,
    )
    with shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def plain(every: float = EVERY, clock: Callable[[], float] = monotonic) -> Told:
    """A callback that tells a line each `every` seconds; `clock` counts them."""
    from loratools.commands.inspect import human

    lock = threading.Lock()
    began = last = clock()

    def told(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        with lock:
            if now - last < every:
                return
            last = now
        speed = done / (now - began)
        left = f"{(total - done) / speed:.0f} s left" if speed else "no speed yet"
        part = done / total if total else 1.0
        tell(f"{human(done)} of {human(total)} ({part:.0%}), {human(speed)}/s, {left}")

    return told
