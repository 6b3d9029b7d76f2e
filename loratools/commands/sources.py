"""What is fetched of a source on the Hub, and what is known of it without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import formats, receipt
from loratools.adapter import Adapter, Origin, Source
from loratools.commands.companions import SMALL, TOKENIZER, is_companion
from loratools.commands.places import address_of as address_of
from loratools.commands.places import at as at
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, error, shown
from loratools.weights.base import Base, headers, is_hub_id
from loratools.weights.placing import WEIGHTS

if TYPE_CHECKING:
    pass

Progress = Callable[[int, int], None]  # bytes done, bytes in all

AUTO = "auto"  # the base that the adapters name
NAMED = "base_model_name_or_path"
# What a reader of an output would take up beside the weights.
READ_TOO = WEIGHTS | {".json", ".jinja", ".py", ".model"}
# A folder within a base goes with it where it is this small (as in `companions`).
FILES = 100
LITTLE = 1_000_000  # bytes of each file


@contextmanager
def _as_cached(bundle: Bundle) -> Iterator[None]:
    """Says of what is missing that it may be missing in the cache alone."""
    try:
        yield
    except LoratoolsError as cause:
        missing = cause.code in ("not_found", "base_incomplete", "unknown_type")
        if not bundle.addressed or not missing or not _offline():
            raise
        message = f"{cause.message}; offline mode is on, and only what is cached can be seen"
        raise error("offline", message) from cause


def _offline() -> bool:
    from loratools.hub.access import offline

    return offline()


# ------------------------------------------------------------------------------- adapters


def adapter(
    source: str | Path, assume: Mapping[str, str] | None = None, *, whole: bool = True
) -> Adapter:
    """The adapter at a source; one on the Hub is fetched, or without `whole` only its headers.

    Headers are read before anything is fetched, so that no other repository comes in its place.
    """
    bundle = at(source)
    with _as_cached(bundle):
        found = formats.read(bundle, assume=assume)
        if not whole or found.folder is not None or found.origin is None:
            return found
        place = found.origin
        if place.inside.rpartition("/")[2] in found.files:  # a file of that name was chosen
            side = f"{place.inside.rpartition('/')[2]}.{receipt.NAME}"
            wanted = [*found.files, side]
        else:
            wanted = [*found.files, receipt.NAME, *TOKENIZER]
        return formats.read(_fetched(place, wanted, found.name), assume=assume)


def _fetched(
    origin: Origin,
    names: Sequence[str],
    name: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    from loratools.hub.address import Address
    from loratools.hub.remote import fetched

    where = Address(origin.repo, origin.commit, origin.inside)
    return fetched(where, [escape(n) for n in names], name, progress=progress)


def whole_file(bundle: Bundle, name: str) -> Source:
    """One file of a bundle, fetched where it lies on the Hub."""
    if bundle.path is None and bundle.origin is not None:
        folder = replace(bundle.origin, inside=_folder(bundle))
        return _fetched(folder, [name]).open(name)
    return bundle.open(name)


def _folder(bundle: Bundle) -> str:
    """The folder within the repository of which a bundle has the names."""
    inside = bundle.origin.inside if bundle.origin is not None else ""
    return inside if bundle.chosen is None else inside.rpartition("/")[0]


# ------------------------------------------------------------------------------- bases


def base(source: str | Path, adapters: Sequence[Adapter] = ()) -> Base:
    """A base from its headers, wherever it stands; "auto" is the one that the adapters name.

    RefusedError `base_unnamed` where they name none, or a path; FitError `other_base` where they
    name several.
    """
    if str(source) == AUTO and not os.path.lexists(AUTO):
        source = named_base(adapters)
    bundle = at(source)
    with _as_cached(bundle):
        return headers(bundle)


def named_base(adapters: Sequence[Adapter]) -> str:
    """The address of the base that all adapters name in their configs."""
    named: dict[str, Adapter] = {}
    for one in adapters:
        said = one.config.get(NAMED)
        if not isinstance(said, str) or not said:
            raise error("base_unnamed", f"--base auto: {shown(one.name)} names no base")
        if not is_hub_id(said):
            what = f"--base auto: {shown(one.name)} names {shown(said)}, which is no id of the Hub"
            raise error("base_unnamed", f"{what}; name the base itself: --base BASE")
        revision = one.config.get("revision")
        at_ = f"@{revision}" if isinstance(revision, str) and revision else ""
        named.setdefault(said + at_, one)
    if len(named) > 1:
        listed = ", ".join(f"{shown(a.name)} names {shown(b)}" for b, a in named.items())
        raise error("other_base", f"--base auto: {listed}; name one of them: --base BASE")
    if not named:
        raise error("usage", "--base auto needs an adapter that names its base")
    return next(iter(named))


def here(base: Base, progress: Progress | None = None) -> Base:
    """The base with its weights and companions on this machine, fetched where they are not."""
    if not is_remote(base.bundle):
        return base
    assert base.bundle.origin is not None
    folder = replace(base.bundle.origin, inside=_folder(base.bundle))
    names = [shard.name for shard in base.shards]
    if base.bundle.chosen is None:
        names += [n for n in base.bundle.names if n == base.index or _goes_with(base.bundle, n)]
        names += [f"{component}/{index}" for component, index in base.indexes.items()]
        limit = SMALL if base.components else LITTLE
        for name in base.bundle.folders:
            files = list(_below(base.bundle.inner(name), limit))
            if base.components or (len(files) <= FILES and all(good for _, good in files)):
                names += [f"{name}/{file}" for file, good in files if good]
    else:
        names += [base.bundle.chosen, f"{base.bundle.chosen}.{receipt.NAME}", "config.json"]
    found = _fetched(folder, names, base.bundle.name, progress)
    return headers(replace(found, chosen=base.bundle.chosen, origin=base.bundle.origin))


def is_remote(bundle: Bundle) -> bool:
    """Whether nothing of a bundle has to be on this machine."""
    return bundle.path is None and bundle.origin is not None


def _goes_with(bundle: Bundle, name: str, limit: int = SMALL) -> bool:
    size = bundle.open(name).size
    return name == receipt.NAME or (is_companion(name, size) and size <= limit)


def _below(bundle: Bundle, limit: int = SMALL, front: str = "") -> Iterator[tuple[str, bool]]:
    """Every file below a folder, and whether it is a small one that goes with weights."""
    for name in bundle.names:
        yield front + name, _goes_with(bundle, name, limit)
    for name in bundle.folders:
        yield from _below(bundle.inner(name), limit, f"{front}{name}/")


# ------------------------------------------------------------------------------- outputs


def pulled(source: str | Path, *, every: bool = False, progress: Progress | None = None) -> Path:
    """An output on this machine; of the Hub, all that its receipt lists and a reader would read.

    `every` brings every file of the folder, as a signature asks for.
    """
    if address_of(source) is None:
        return Path(source)
    bundle = at(source)
    made = receipt.of(bundle)
    if every and bundle.origin is not None:
        names = [name for name, _ in _below(bundle)]
        folder = replace(bundle.origin, inside=_folder(bundle))
        found = _fetched(folder, names, progress=progress)
    elif made is None:
        with _as_cached(bundle):
            found = here(headers(bundle), progress).bundle
    else:
        assert bundle.origin is not None
        outputs = made.get("outputs")
        names = [*outputs] if isinstance(outputs, Mapping) else []
        names += [n for n, _ in _below(bundle) if Path(n).suffix.lower() in READ_TOO]
        names.append(f"{bundle.chosen}.{receipt.NAME}" if bundle.chosen else receipt.NAME)
        folder = replace(bundle.origin, inside=_folder(bundle))
        found = _fetched(folder, names, progress=progress)
    assert found.path is not None
    return found.path / bundle.chosen if bundle.chosen else found.path


def cached(entry: Mapping[str, Any]) -> Bundle | None:
    """An input of a receipt in the Hub's cache, by its id and commit; nothing is fetched."""
    repo, commit, inside = entry.get("id"), entry.get("revision"), entry.get("inside", "")
    plain = isinstance(inside, str) and ".." not in inside.split("/")
    known = isinstance(commit, str) and len(commit) == 40 and commit.isalnum()
    if not is_hub_id(repo) or not known or not plain:
        return None
    from loratools.hub.remote import cached as in_cache

    return in_cache(Origin(str(repo), str(commit), str(inside)))


def called(source: str | Path) -> str:
    """A source's own name, less folders and suffix: what its output may be called."""
    found = address_of(source)
    if found is not None:
        path = Path(found.inside or found.repo)
        inner = path.stem == "adapter_model" and len(path.parts) > 1
        return path.parent.name if inner else path.stem if path.suffix in READ_TOO else path.name
    full = Path(os.path.abspath(source))
    if full.is_file() and full.stem == "adapter_model":
        return full.parent.name
    return full.stem if full.is_file() else full.name


def places(sources: Sequence[str | Path]) -> list[Path]:
    """Those of the sources that lie on this machine."""
    return [Path(s) for s in sources if address_of(s) is None]
