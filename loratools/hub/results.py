"""Measured results for a card's model-index, from a file of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.containers import plain_yaml
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError, Problem, error, shown

LIMIT = 1 << 18
NEEDED = ("task_type", "dataset_type", "dataset_name", "metric_type", "metric_value")


def model_index(path: str | Path | None, name: str) -> tuple[dict[str, Any], list[Problem]]:
    """The `model-index` of a YAML or JSON file; empty without a file.

    The file holds a list of results, each with the fields of huggingface_hub's `EvalResult`, or a
    `model-index` as a card has it. Results are never taken from parents: theirs are not its own.
    """
    if path is None:
        return {}, []
    try:
        return {"model-index": _index(path, name)}, []
    except LoratoolsError as cause:
        code = cause.code if cause.code in ("not_found", "storage") else "card"
        return {}, [Problem(code, cause.message)]


def _index(path: str | Path, name: str) -> list[dict[str, Any]]:
    from huggingface_hub.repocard_data import (
        EvalResult,
        eval_results_to_model_index,
        model_index_to_eval_results,
    )

    what = f"--eval-results {shown(path)}"
    source = LocalFile(Path(path))
    found = plain_yaml.parse(source.read(0, min(source.size, LIMIT + 1)), what)
    try:
        if isinstance(found, Mapping) and isinstance(found.get("model-index"), list):
            _, results = model_index_to_eval_results(found["model-index"])
        elif isinstance(found, list) and found and all(isinstance(f, dict) for f in found):
            for number, one in enumerate(found, 1):
                lost = [key for key in NEEDED if key not in one]
                if lost:
                    raise error("card", f"{what}: result {number} has no {', '.join(lost)}")
            results = [EvalResult(**one) for one in found]
        else:
            raise error("card", f"{what}: expected a list of results or a model-index")
    except (TypeError, KeyError, ValueError, AttributeError) as cause:
        raise error("card", f"{what}: {shown(cause)}") from None
    for result in results:
        value = result.metric_value
        if not isinstance(value, int | float | str | Mapping | list):
            raise error("card", f"{what}: the value of {shown(result.metric_type)} is none")
    index: list[dict[str, Any]] = eval_results_to_model_index(name, results)
    return index
