"""The license of what is published: that of all its parents, or what the user decides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.errors import Problem, shown
from loratools.hub.facts import Facts, Parent

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,60}")
# Families whose texts ask for more than naming the author.
CONDITIONS: tuple[tuple[str, str], ...] = (
    (r"llama\d.*|llama", "asks that names begin with Llama and that its text goes with every copy"),
    (r"gemma", "hands on a policy of use to whoever receives a copy"),
    (r"cc-by-nc.*", "does not allow commercial use"),
    (r".*openrail.*", "restricts uses, and hands these restrictions on"),
    (r"cc-by-(?:nc-)?nd.*", "does not allow changed versions to be shared"),
)

Terms = dict[str, str]


def licensed(
    facts: Facts,
    said: Mapping[str, Any],
    license: str | None,
    name: str | None,
    link: str | None,
) -> tuple[Terms, list[Problem], list[str]]:
    """The license as metadata, what is wrong with it, and notes.

    What the user says decides, then what the card that stands there says, then the parents where
    all say the same. Never the strictest of several: which one that is, no program can tell.
    """
    if license is not None or name or link:
        return _given(license, name, link)
    stands = said.get("license")
    if isinstance(stands, str) and stands.strip():
        kept = {
            k: said[k] for k in ("license_name", "license_link") if isinstance(said.get(k), str)
        }
        return {"license": stands, **kept}, [], _conditions(stands)
    terms = {p.terms for p in facts.parents}
    if len(terms) == 1 and (only := next(iter(terms)))[0] is not None:
        keys = ("license", "license_name", "license_link")
        found = {k: v for k, v in zip(keys, only, strict=True) if v}
        faults = _other(found)
        return found, faults, [f"license: {shown(only[0])}, as of all it was made from",
                               *_conditions(str(only[0]))]  # fmt: skip
    if not facts.parents:
        message = "nothing says under which license this is published"
        return {}, [Problem("license", message)], []
    rows = "\n".join(f"  {_row(p)}" for p in facts.parents)
    differ = len({p.license for p in facts.parents}) > 1 and all(p.license for p in facts.parents)
    what = "differ" if differ else "are not all known"
    message = f"the licenses of what it was made from {what}:\n{rows}"
    return {}, [Problem("license", message)], []


def _row(parent: Parent) -> str:
    name = shown(parent.id or parent.name)
    if parent.license:
        also = f" ({shown(parent.terms[1])})" if parent.terms[1] else ""
        return f"{parent.role} {name}: {shown(parent.license)}{also}"
    why = "its card names none" if parent.card is not None else "unknown"
    return f"{parent.role} {name}: {why}"


def _given(
    license: str | None, name: str | None, link: str | None
) -> tuple[Terms, list[Problem], list[str]]:
    if license is None:
        message = "--license-name and --license-link belong to --license other"
        return {}, [Problem("usage", message)], []
    if not _ID.fullmatch(license):
        message = (
            f"--license {shown(license)}: expected an id of the Hub, such as apache-2.0, mit or "
            "other (with --license-name and --license-link)"
        )
        return {}, [Problem("license", message)], []
    found = {"license": license}
    found |= {k: v for k, v in (("license_name", name), ("license_link", link)) if v}
    return found, _other(found), _conditions(license)


def _other(terms: Terms) -> list[Problem]:
    """Both parts that "other" needs, and neither without it."""
    missing = [k for k in ("license_name", "license_link") if k not in terms]
    link = terms.get("license_link", "")
    if link and not re.fullmatch(r"https?://[^\s<>\"']{3,500}|[A-Za-z0-9._-]{1,100}", link):
        message = f"--license-link {shown(link)}: expected an address, or a file such as LICENSE"
        return [Problem("license", message)]
    if terms["license"] == "other" and missing:
        options = " and ".join(f"--{k.replace('_', '-')}" for k in missing)
        return [Problem("license", f"the license other needs {options}")]
    if terms["license"] != "other" and len(missing) < 2:
        message = f"--license-name and --license-link belong to other, not to {terms['license']}"
        return [Problem("license", message)]
    return []


def _conditions(license: str) -> list[str]:
    return [
        f"the license {shown(license)} {what}: read it before publishing"
        for form, what in CONDITIONS
        if re.fullmatch(form, license)
    ][:1]
