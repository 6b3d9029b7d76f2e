"""Where a source stands: a path on this machine, else an address of the Hub."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.containers.bundle import Bundle, local
from loratools.errors import LoratoolsError, Problem, error, shown

if TYPE_CHECKING:
    from loratools.hub.address import Address


def at(source: str | Path) -> Bundle:
    """What stands at a source: an existing path, else an address of the Hub.

    Of the Hub nothing is fetched, headers are read as they are needed. Raises NotFoundError, which
    says how the source was read, AccessError, NetworkError.
    """
    found = address_of(source)
    if found is None:
        try:
            return local(source)
        except LoratoolsError as cause:
            raise _proposed(source, cause) from cause
    from loratools.hub.remote import bundle

    try:
        return bundle(found)
    except LoratoolsError as cause:
        if "://" in str(source) or cause.code not in ("not_found", "offline", "network"):
            raise
        message = f"no file or folder named {shown(source)} here; on the Hub: {cause.message}"
        told = [replace(p, message=message) for p in cause.problems[:1]]
        raise error(cause.code, message, told) from cause


def _proposed(source: str | Path, cause: LoratoolsError) -> LoratoolsError:
    """The same error; with the address that was meant, where org/name/file was typed."""
    parts = str(source).split("/")
    if cause.code != "not_found" or len(parts) < 3 or os.path.lexists(parts[0]):
        return cause
    meant = f"{parts[0]}/{parts[1]}:{'/'.join(parts[2:])}"
    if isinstance(source, Path) or address_of(meant) is None:
        return cause
    remedy = f"check the path; a file in a repository of the Hub is {shown(meant)}"
    return error(cause.code, cause.message, [Problem(cause.code, cause.message, remedy=remedy)])


def address_of(source: str | Path) -> Address | None:
    """The address of the Hub that a source is, if no path of that name exists."""
    if isinstance(source, Path) or os.path.lexists(source):
        return None
    from loratools.hub.address import address

    return address(source)
