"""A folder loaded as the torch module that is traced: float32, on the CPU, nothing made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratools.errors import error, shown
from loratools.exporting import installed, tasks
from loratools.exporting.tracing import quiet


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module in eval mode; `fresh` names parameters that its files did not hold."""

    module: nn.Module
    fresh: tuple[str, ...] = ()


def load(
    folder: Path,
    task: str,
    config: Mapping[str, Any],
    *,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Loaded:
    """The module of a folder for a task, by transformers' Auto classes or diffusers.

    RefusedError `not_exportable` where the library cannot load it, with what it says.
    """
    name = name or folder.name
    if task == tasks.UNET:
        if "_class_name" not in config:
            raise error(
                "not_exportable",
                f"{shown(name)} is no model of diffusers, which unet asks for",
            )
        return _diffusers(folder, str(config["_class_name"]), name)
    if isinstance(config.get("quantization_config"), Mapping):
        method = shown(config["quantization_config"].get("quant_method", "an unnamed method"))
        raise error(
            "not_exportable",
            f"the weights of {shown(name)} are quantised ({method}); export the model they "
            "were made from, with --quantize",
        )
    installed.require("transformers")
    import transformers

    by = getattr(transformers, tasks.auto_class(task, config))
    if "auto_map" in config and not trust_remote_code and not _is_known(config):
        raise error(
            "not_exportable",
            "its code lies in its folder and would be run; read it, then say --trust-remote-code",
        )
    with quiet():
        try:
            module, report = by.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except (ValueError, OSError, KeyError, ImportError, RuntimeError, TypeError) as cause:
            if "Unrecognized configuration class" in str(cause):
                kind = shown(config.get("model_type", "this"))
                raise error(
                    "not_exportable", f"transformers has no {by.__name__} of {kind} for {task}"
                ) from cause
            lines = [line for line in str(cause).splitlines() if line.strip()]
            why = shown(lines[0].replace(str(folder), name)) if lines else type(cause).__name__
            raise error("not_exportable", f"transformers cannot load it: {why}") from cause
    unlike = [str(entry[0]) for entry in report.get("mismatched_keys", ())]
    fresh = tuple(sorted({*map(str, report.get("missing_keys", ())), *unlike}))
    return Loaded(module.float().eval(), fresh)


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the class itself, so that no code of the folder is run."""
    from transformers import CONFIG_MAPPING

    return str(config.get("model_type", "")) in CONFIG_MAPPING


def _diffusers(folder: Path, by_name: str, name: str) -> Loaded:
    installed.require("diffusers")
    import diffusers

    by = getattr(diffusers, by_name)
    with quiet():
        try:
            module = by.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        except (ValueError, OSError, KeyError, RuntimeError, TypeError) as cause:
            why = shown(str(cause).replace(str(folder), name))
            raise error("not_exportable", f"diffusers cannot load it: {why}") from cause
    return Loaded(module.float().eval())


def config_of(folder: Path, name: str | None = None) -> dict[str, Any]:
    """config.json of a folder; NotFoundError without one, with what may have been meant."""
    name = shown(name or folder.name)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise error(
            "usage",
            f"{name} is an adapter: loratools export BASE --adapter {name} -o OUT",
        )
    if (folder / "model_index.json").exists():
        raise error(
            "usage",
            f"{name} is a diffusers pipeline: name a component, such as {name}/unet",
        )
    path = folder / "config.json"
    if not path.is_file():
        raise error("not_found", f"{name} has no config.json; name a model's folder")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as cause:
        raise error("malformed", f"{shown(path.name)}: {shown(cause)}") from cause
    if not isinstance(found, dict):
        raise error("malformed", f"{shown(path.name)} holds no object")
    return found
