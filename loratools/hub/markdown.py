"""Text of files as harmless Markdown, and the front matter of a card, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.errors import error, shown

LIMIT = 1 << 18  # bytes of front matter

# As huggingface_hub finds it (repocard.py, REGEX_YAML_BLOCK), and for the same texts.
_FRONT = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_ADDRESS = re.compile(r"(?i)://|www\.|@|mailto:|xmpp:")


def plain(text: object) -> str:
    """Text of unknown origin as nothing but text: no link, heading, emphasis, table or HTML.

    What a reader of Markdown might make a link of by itself becomes code: some look for addresses
    after they have taken backslashes away (syntax-tree/mdast-util-gfm-autolink-literal).
    """
    if _ADDRESS.search(str(text)):
        return code(text, cell=True)
    said = shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~:$^!])", r"\\\1", said)


def code(text: object, *, cell: bool = False) -> str:
    """Text of unknown origin as a span of code; `cell`: within a table."""
    said = shown(text).strip() or " "
    runs = [len(run) for run in re.findall(r"`+", said)]
    fence = "`" * next(n for n in range(1, 200) if n not in runs)
    if cell:
        said = said.replace("|", "\\|")
    edge = " " if said.startswith("`") or said.endswith("`") else ""
    return f"{fence}{edge}{said}{edge}{fence}"


def block(text: str, language: str) -> str:
    """A fenced block that no text within can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns that are empty in every row are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [
        [header[i] for i in kept],
        ["---"] * len(kept),
        *([row[i] for i in kept] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hub_link(id: str, revision: str | None = None) -> str:
    """A link to a repository of the Hub; the id must have been checked to be one."""
    at = f"/tree/{revision}" if revision and re.fullmatch(r"[0-9a-f]{7,40}", revision) else ""
    return f"[{id.replace('_', chr(92) + '_')}](https://huggingface.co/{id}{at})"


# ------------------------------------------------------------------------------- front matter


def front_matter(text: str) -> tuple[dict[str, Any], str | None, str]:
    """The metadata of a card, the YAML text that says it (None without any), and the body.

    Raises malformed for YAML that is broken, hostile, or no mapping.
    """
    import yaml

    hit = _FRONT.search(text)
    if hit is None:
        return {}, None, text
    if len(hit[2]) > LIMIT:
        raise error("malformed", f"README.md has {len(hit[2])} letters of metadata")
    try:
        _require_flat(yaml.compose(hit[2], Loader=yaml.SafeLoader))
        found = yaml.safe_load(hit[2])
    except (yaml.YAMLError, RecursionError, ValueError) as cause:
        said = shown(str(cause).split("\n")[0])
        raise error("malformed", f"the metadata of README.md is no YAML: {said}") from None
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise error("malformed", "the metadata of README.md is no mapping")
    return {str(k): v for k, v in found.items()}, hit[2], text[hit.end() :]


def _require_flat(node: Any) -> None:
    """No anchor used twice: a few lines of them unfold to more than any memory holds."""
    waiting, seen = [node], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or not isinstance(one.value, list):
            continue
        if id(one) in seen:
            raise ValueError("anchors are used in it")
        seen.add(id(one))
        for item in one.value:
            waiting += item if isinstance(item, tuple) else [item]


def dumped(values: Mapping[str, Any]) -> str:
    """Values as YAML, in their order, each text on one line whatever it holds."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts that are no plain line are quoted with escapes, so that none breaks its line."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> Any:
        odd = not value.isprintable() or value.strip() != value or "---" in value
        style = '"' if odd else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(
        yaml.dump(
            dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
        )
    )


def with_keys(text: str, missing: Mapping[str, Any]) -> str:
    """A card with more metadata; its own, and its body, stay as they are to the letter."""
    if not missing:
        return text
    hit = _FRONT.search(text)
    added = dumped(missing)
    if hit is None:
        return f"---\n{added}---\n\n{text}"
    end = "\r\n" if "\r\n" in hit[1] else "\n"
    lines = added.rstrip("\n").replace("\n", end)
    inner = hit[2].rstrip()
    return text[: hit.start(2)] + (inner + end if inner else "") + lines + text[hit.start(3) :]
