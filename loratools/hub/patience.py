"""Waiting for the Hub: which answers are tried again, how long for, and what is said meanwhile."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from loratools.hub.access import scrubbed

TRIES = 4  # again, after the first
BUSY = {429, 500, 502, 503, 504}
REFUSED = {429, 503}  # of these, the answers that say that nothing was done
LONGEST = 330.0  # seconds: the Hub counts requests in windows of five minutes
_log = logging.getLogger(__name__)

T = TypeVar("T")


def patiently(call: Callable[[], T], *, twice: bool = True) -> T:
    """What `call` gives; called again, four times at most, while the Hub is too busy to answer.

    twice: the call may also be made again where nobody knows whether it was carried out, as after
    a connection that ended. The library itself repeats some requests, and none of these
    (huggingface_hub:hf_api.py, of 2.4: create_repo, repo_info, auth_check, create_commit).
    """
    tried = 0
    while True:
        try:
            return call()
        except Exception as cause:
            wait = pause(cause, tried, twice=twice)
            if wait is None:
                raise
            tried += 1
            time.sleep(wait)


def pause(cause: Exception, tried: int, *, twice: bool = True) -> float | None:
    """The seconds to wait before the next try, and says so; None where there is to be none."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    if tried >= TRIES:
        return None
    if isinstance(cause, RevisionResolutionError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__  # why the Hub did not say it
    wait = float(2**tried)
    if isinstance(cause, HfHubHTTPError):
        if cause.response.status_code not in (BUSY if twice else REFUSED):
            return None
        asked = asked_for(cause)
        if asked is not None and asked > LONGEST:
            return None
        wait = wait if asked is None else asked
        words = f"the Hub answers {cause.response.status_code}"
    elif isinstance(cause, httpx2.TransportError) and not isinstance(cause, httpx2.ConnectError):
        if not twice:
            return None
        words = f"the connection ended ({scrubbed(cause) or type(cause).__name__})"
    else:
        return None
    _log.warning("%s; trying again in %g s (%d of %d)", words, wait, tried + 1, TRIES)
    return wait


def asked_for(cause: Exception) -> float | None:
    """The seconds that an answer asks to wait: `Retry-After: 55`, `RateLimit: "api";r=0;t=55`."""
    headers = getattr(getattr(cause, "response", None), "headers", {})
    for name, shape in (("Retry-After", r"\s*(\d{1,9})\s*"), ("RateLimit", r".*\bt=(\d{1,9}).*")):
        found = re.fullmatch(shape, headers.get(name, ""))
        if found:
            return float(found[1])
    return None
