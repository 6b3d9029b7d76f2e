"""Cards of parents, for their licenses: from the library's cache, else from the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError
from loratools.hub import access
from loratools.hub.choosing import README
from loratools.hub.markdown import front_matter

LIMIT = 4_000_000  # bytes of a card


def cards(
    parents: Iterable[tuple[str, str | None]], *, ask: bool = True
) -> dict[str, Mapping[str, Any]]:
    """The metadata of the cards of repositories (id, revision), by id; without what is unknown.

    With `ask`, what is not cached is asked of the Hub, until it turns out not to be reached. A
    repository without a card has empty metadata.
    """
    from huggingface_hub import try_to_load_from_cache

    found: dict[str, Mapping[str, Any]] = {}
    reachable = ask and not access.offline()
    for id, revision in parents:
        if id in found:
            continue
        try:
            with access.translated(f"read the card of {id}", repo=id):
                kept = try_to_load_from_cache(id, README, revision=revision)
        except LoratoolsError:
            continue  # no name of a repository, which is said elsewhere
        path = kept if isinstance(kept, str) else None
        if path is None and reachable:
            try:
                with access.translated(f"read the card of {id}", repo=id):
                    path = access.api().hf_hub_download(id, README, revision=revision)
            except LoratoolsError as cause:
                reachable = cause.code not in ("network", "offline")
                if cause.code in ("gated", "no_access"):
                    found |= _told(id, revision)
        if path is not None:
            said = metadata(Path(path))
            if said is not None:
                found[id] = said
    return found


def _told(id: str, revision: str | None) -> dict[str, Mapping[str, Any]]:
    """What the Hub itself tells of a card whose files are gated: its metadata are public."""
    try:
        with access.translated(f"look at {id}", repo=id):
            told: Any = access.api().model_info(id, revision=revision).card_data
    except LoratoolsError:
        return {}
    return {id: told.to_dict()} if told is not None else {}


def metadata(path: Path) -> Mapping[str, Any] | None:
    """The metadata of a card on disk; None where it is none."""
    try:
        source = LocalFile(path)
        if source.size > LIMIT:
            return None
        return front_matter(source.read(0, source.size).decode("utf-8", "replace"))[0]
    except LoratoolsError:
        return None
