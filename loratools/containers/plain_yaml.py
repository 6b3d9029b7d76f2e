"""YAML as configs use it: text to plain values, bounded in size, depth and repetition."""

from __future__ import annotations

import math
import re
from typing import Any

from loratools.errors import error, shown

LIMIT = 1 << 18  # bytes; the largest configs of trainers have some ten thousand
DEPTH = 64
VALUES = 100_000  # after anchors were followed

_INT = re.compile(r"[-+]?(0x[0-9a-fA-F]{1,16}|0b[01]{1,64}|0[0-7]{0,22}|[1-9][0-9]{0,19})")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def parse(raw: bytes, what: str) -> Any:
    """The one document of a YAML text, as dicts with text keys, lists, text, numbers, None.

    A value with a tag of some language's own, a date or binary stays the text that it is.
    Raises malformed (not UTF-8, not YAML, several documents), duplicate, hostile (too deep, or
    anchors that unfold to far more than was written).
    """
    import yaml

    if len(raw) > LIMIT:
        raise error("malformed", f"{shown(what)} has {len(raw)} bytes of YAML, {LIMIT} at most")
    try:
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise error("malformed", f"{shown(what)} is not UTF-8") from None
    except RecursionError:
        raise error("hostile", f"{shown(what)} nests deeper than {DEPTH} levels") from None
    except yaml.YAMLError as problem:
        said = str(problem).split("\n")[0]
        raise error("malformed", f"{shown(what)} is no YAML: {shown(said)}") from None
    left = VALUES

    def plain(node: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEPTH:
            reason = "its anchors unfold to more than it says" if left < 0 else "it nests too deep"
            raise error("hostile", f"{shown(what)}: {reason}")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value))
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, depth + 1) for item in node.value]
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise error("malformed", f"{shown(what)}: a key is a list or a mapping")
            if key.value in found:
                raise error("duplicate", f'{shown(what)}: "{shown(key.value)}" stands twice')
            found[key.value] = plain(value, depth + 1)
        return found

    return None if root is None else plain(root, 0)


def _scalar(tag: str, text: str) -> Any:
    """A scalar's value by YAML 1.1, for the sorts that configs need."""
    match tag:
        case "null":
            return None
        case "bool" if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        case "int" if _INT.fullmatch(digits := text.replace("_", "")):
            octal = digits.lstrip("+-").startswith("0") and digits.lstrip("+-0").isdigit()
            return int(digits, 8 if octal else 0)
        case "float":
            lowered = text.lower().replace("_", "")
            if lowered.lstrip("+-") == ".inf":
                return -math.inf if lowered[0] == "-" else math.inf
            if lowered == ".nan":
                return math.nan
            try:
                return float(lowered)
            except ValueError:
                return text
        case _:
            return text


def dump(values: dict[str, Any]) -> str:
    """A flat mapping of plain values as YAML."""
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False))
