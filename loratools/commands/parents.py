"""What a merged adapter has from its parents: the fields on which they agree, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter

BASE = "base_model_name_or_path"


def common_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The config fields on which all agree, targets and saved modules united."""
    configs = [a.config for a in adapters]
    first = configs[0]
    config = {k: v for k, v in first.items() if all(k in c and c[k] == v for c in configs)}
    for field_name in ("target_modules", "modules_to_save"):
        lists = [c.get(field_name) for c in configs]
        if field_name not in config and all(isinstance(v, list) or v is None for v in lists):
            config[field_name] = sorted({m for v in lists for m in v or []})
    for field_name in ("gguf", "base_config"):  # of which a part may agree
        tables = [t for c in configs if isinstance(t := c.get(field_name), dict)]
        if len(tables) == len(configs):
            config[field_name] = {
                k: v for k, v in tables[0].items() if all(t.get(k) == v for t in tables)
            }
    config.setdefault(BASE, next((base for c in configs if (base := c.get(BASE))), None))
    config.pop("peft_version", None)
    return config


def child_of(
    merged: Adapter, parents: Sequence[Adapter], to: str, out: str | Path | None
) -> Adapter:
    """The merged adapter under its output's name; kohya's metadata will name its parents."""
    made = replace(merged, name=Path(out).name if out is not None else merged.name)
    if to != "kohya":
        return made
    config = {**made.config, "merged_from": [parent.name for parent in parents]}
    if len({base for parent in parents if (base := parent.config.get(BASE))}) > 1:
        del config[BASE]
    return replace(made, config=config)
