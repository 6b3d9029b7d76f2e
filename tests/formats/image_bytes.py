"""Files of image adapters as bytes: names and values, or names and shapes with ramps in them."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.containers.bundle import local

SPECS = Path(__file__).parents[2] / "specs" / "formats"


def write(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file: each value is a shape (a ramp of numbers), or (shape, number)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    raw = b""
    for seed, (key, given) in enumerate(tensors.items()):
        shape, number = given if given and isinstance(given[0], tuple) else (given, None)
        count = 1
        for extent in shape:
            count *= extent
        values = [(i + seed) % 7 - 2.5 if number is None else number for i in range(count)]
        data = struct.pack(f"<{count}f", *values)
        header[key] = {
            "dtype": "F32", "shape": list(shape), "data_offsets": [len(raw), len(raw) + len(data)]
        }  # fmt: skip
        raw += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw)
    return path


def read(form: Any, path: Path, **assume: str) -> Adapter:
    """What a format makes of a file that it recognises."""
    bundle = local(path)
    assert form.detect(bundle)
    adapter: Adapter = form.read(bundle, assume=assume)
    return adapter


def found(adapter: Adapter, severity: str = "error") -> list[tuple[str, str]]:
    """(code, message) of an adapter's problems of one severity."""
    return [(p.code, p.message) for p in adapter.problems if p.severity == severity]


def key_table(name: str) -> list[tuple[str, ...]]:
    """The cells in code of every row under "Keys" of a specification."""
    text = (SPECS / f"{name}.md").read_text().partition("## Keys")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    wanted = [i for i, cell in enumerate(lines[0]) if cell.strip() not in ("what", "rows of B")]
    rows = [[found for i in wanted for found in re.findall(r"`(.+?)`", row[i])] for row in lines]
    return [tuple(row) for row in rows if row]
