"""What the Hub's library logs meanwhile: said in our words where it matters, else not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

LIBRARY = "huggingface_hub"
WAIT = 5.0  # seconds that the library waits without a word of ours
_log = logging.getLogger(__name__)
_lock = Lock()


class _Ours(logging.Filter):
    """Drops what the library says of its retries, once for each thread and attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.users = 0
        self.told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        text = record.getMessage()
        # huggingface_hub:utils/_http.py http_backoff, :hf_api.py resolve_revision (of 2.4)
        if "cached commit" in text:
            if "offline mode" not in text:
                _log.warning("the Hub cannot be reached: the commit that is in the cache is read")
        elif wait := re.match(r"(?:Retrying in|Rate limited\. Waiting) ([\d.]{1,9})s", text):
            seconds = float(wait[1])
            if seconds > WAIT:
                _log.warning("the Hub does not answer, or is busy; trying again in %g s", seconds)
            elif not self.told:
                _log.warning("the Hub does not answer, or is busy; trying again")
            self.told = True
        return False


_ours = _Ours()


@contextmanager
def in_our_words() -> Iterator[None]:
    """While it lasts, the library's warnings are ours; who asked it for more words hears them."""
    library = logging.getLogger(LIBRARY)
    if library.getEffectiveLevel() < logging.WARNING:
        yield
        return
    with _lock:
        _ours.users += 1
        if _ours.users == 1:
            _ours.told = False
        for each in library.handlers:
            each.addFilter(_ours)  # which adds it once
    try:
        yield
    finally:
        with _lock:
            _ours.users -= 1
            if not _ours.users:
                for each in library.handlers:
                    each.removeFilter(_ours)
