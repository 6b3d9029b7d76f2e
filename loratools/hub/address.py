"""Where something lies on the Hub, as users write it: org/name, hf://, a link; no network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit, urlunsplit

from loratools.errors import LoratoolsError, error, shown

if TYPE_CHECKING:
    from huggingface_hub import HfUri

LONGEST = 2000  # characters of an address
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_PLAIN = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<at>[^:]+))?(?::(?P<inside>.+))?", re.ASCII)
# First parts of a path on the Hub that are no organisation.
_SECTIONS = frozenset("api bucket buckets datasets kernels models spaces".split())
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/.]|[/.]$|\.lock(/|$)")
_NO_PATH = re.compile(r"[\x00-\x1f\x7f\\]|(^|/)\.{0,2}(/|$)")
_HOST = re.compile(r"[\w-]+(\.[\w-]+)+/[^/]+/[^/]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """A place on the Hub: the repository, the revision if one was named, the path inside it."""

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return self.repo + at + (f":{self.inside}" if self.inside else "")


def address(source: str) -> Address | None:
    """What a source says of the Hub; None where it is no address and can only be a path.

    `org/name[@revision][:path/inside]`, `hf://org/name[@revision][/path]`, links of the website.
    Grammar of the last two: huggingface_hub:utils/_hf_uris.py.
    """
    if len(source) > LONGEST:
        return None
    if source.startswith("hf://"):
        return _parsed(source, shown(source))
    scheme = re.match(r"https?://", source, re.IGNORECASE)
    if scheme or _HOST.match(source):
        return _link(source, "must" if scheme else "may")
    found = _PLAIN.fullmatch(source)
    if found is None or found["repo"].partition("/")[0] in _SECTIONS:
        return None
    return _checked(found["repo"], found["at"], found["inside"] or "")


def _link(source: str, how: Literal["must", "may"]) -> Address | None:
    """The address behind a link; one without a scheme may also be a path that looks like one."""
    try:
        split = urlsplit(source if how == "must" else f"https://{source}")
        host = split.hostname or ""
    except ValueError:
        raise error("usage", f"{shown(source)} is not a link") from None
    if "@" in split.netloc:
        raise error("usage", f"the link to {shown(host)} holds a user name or a password: cut it")
    bare = urlunsplit((split.scheme.lower(), split.netloc, split.path, "", ""))
    try:
        return _parsed(bare, shown(bare))
    except LoratoolsError:
        if how == "may":
            return None
        raise


def _parsed(text: str, said: str) -> Address:
    """What the library's own parser makes of an hf:// address or a link."""
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        found: HfUri = parse_hf_uri(text, endpoint=constants.ENDPOINT)
    except HfUriError as cause:
        why = shown(cause.msg.replace(text, "it").strip())
        raise error("usage", f"{said} is no address of the Hub: {why}") from None
    if found.type != "model":
        raise error("usage", f"{said} is a {found.type}; loratools reads repositories of models")
    made = _checked(found.id, found.revision, found.path_in_repo)
    if made is None:
        raise error("usage", f"{said}: the revision or the path inside cannot be one")
    return made


def is_revision(name: str) -> bool:
    """Whether git can have a branch or a tag of this name."""
    return bool(name) and len(name) <= LONGEST and not _NO_REVISION.search(name)


def _checked(repo: str, revision: str | None, inside: str) -> Address | None:
    """The address, if the Hub and git could have such names."""
    inside = inside.removesuffix("/")
    if "--" in repo or ".." in repo or repo.endswith(".git"):
        return None
    if revision is not None and not is_revision(revision):
        return None
    if inside and _NO_PATH.search(inside):
        return None
    return Address(repo, revision, inside)
