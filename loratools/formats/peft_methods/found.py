"""What the reader of a PEFT method is given: a file's tensors by module, and its config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter import FLOATS, Leaf
from loratools.errors import error, shown
from loratools.formats.reading import Reading

# Fields that every PEFT config has (peft:config.py, PeftConfig and what tuners share).
COMMON = frozenset(
    """auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
    init_weights layers_pattern layers_to_transform modules_to_save peft_type peft_version revision
    target_modules task_type runtime_config""".split()
)


@dataclass(slots=True)
class Found:
    """The tensors of one file, as a method's reader finds them.

    `modules` has the leaves of each module by part ("hada_w1_a", "oft_R.weight"), `shared` those
    that all modules use ("vera_A"), `plain` parameters in full by `module.parameter`: these become
    Replace without the reader. A reader puts the key of a weight that the base stores (in, out)
    whatever its architecture (an embedding's) into `transposed`.
    """

    modules: dict[str, dict[str, Leaf]]
    shared: dict[str, Leaf]
    plain: dict[str, Leaf]
    transposed: set[str] = field(default_factory=set)

    def each(self, reading: Reading, *needed: str) -> Iterator[tuple[str, dict[str, Leaf]]]:
        """Modules with the parts that are needed; others become a problem, of the code `missing`.

        Raises StorageError `dtype_unusable` for a part that does not hold floats, unless it is
        called an index.
        """
        for module, parts in self.modules.items():
            lost = [part for part in needed if part not in parts]
            if lost:
                here = ", ".join(sorted(parts))
                what = " and ".join(lost)
                reading.problem("missing", f"{shown(module)} has {here} without {what}", module)
                continue
            for part, leaf in parts.items():
                if leaf.dtype not in FLOATS and "ind" not in part:
                    what = shown(leaf.name)
                    raise error("dtype_unusable", f"{what} is {leaf.dtype}, expected floats")
            yield module, parts


Reader = Callable[[Found, Mapping[str, Any], Reading], None]


@dataclass(frozen=True, slots=True)
class Method:
    """How one peft_type is read.

    `parts` are the ends of its keys after a module's name, without an adapter's name ("hada_w1_a",
    "oft_R.weight"); `shared` its tensors at `base_model.<name>`; `fields` what its config has
    beyond `COMMON`. `read(found, config, reading)` puts deltas, by `module.parameter`, into
    `reading.deltas`, and what is wrong into `reading.problem(...)`; it opens no large tensor.
    """

    parts: frozenset[str]
    read: Reader
    shared: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()

    @staticmethod
    def of(read: Reader, parts: str, *, shared: str = "", fields: str = "") -> Method:
        """A method whose names are given as words in a text."""
        words = (frozenset(text.split()) for text in (parts, shared, fields))
        has, common, known = words
        return Method(has, read, common, known)


def whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A field that must be a whole number; MalformedError where it is none."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise error("malformed", f"the config says {name}={shown(repr(value))}: no whole number")
    return value


def seed(config: Mapping[str, Any], name: str, default: int) -> int:
    """A field that seeds torch's generator; MalformedError for what it would not take."""
    value = whole(config, name, default)
    if not -(2**63) <= value < 2**64:
        raise error("malformed", f"the config says {name}={value:e}: no seed")
    return value


def few(config: Mapping[str, Any], name: str, default: int, most: int = 1000) -> int:
    """A field that says how often something is done; MalformedError for a number out of reason."""
    value = whole(config, name, default)
    if not 0 <= value <= most:
        raise error("malformed", f"the config says {name}={value:g}, expected 0 to {most}")
    return value


def real(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A field that must be a finite number; MalformedError where it is none."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise error("malformed", f"the config says {name}={shown(repr(value))}: no number")
    return float(value)


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that must be true or false; MalformedError where it is neither."""
    value = config.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        said = shown(repr(value))
        raise error("malformed", f"the config says {name}={said}: neither true nor false")
    return value
