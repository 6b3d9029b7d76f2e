"""What stands beside an exported graph, and in it: lineage, configs, tokenizer, the receipt."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import receipt
from loratools._version import VERSION
from loratools.commands.companions import TOKENIZER
from loratools.commands.inspect import as_json
from loratools.commands.wishes import QUANTISED

if TYPE_CHECKING:
    from loratools.commands.export import ExportResult
    from loratools.commands.exported import Work
    from loratools.errors import LoratoolsError
    from loratools.weights.publishing import Output

COMPANIONS = (
    *TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "feature_extractor_config.json", "normalizer.json",
    "video_preprocessor_config.json",
)  # fmt: skip
PATHS = ("_name_or_path", "name_or_path")  # of configs; they may hold a path of this machine


def lineage(work: Work) -> dict[str, str]:
    """What a graph says of where it came from: no dates, no paths."""
    subject, wish = work.subject, work.wish
    model = subject.origin["model"]
    props = {
        "version": VERSION,
        "model": str(model.get("id") or subject.name),
        "model_revision": str(model.get("revision") or ""),
        "model_fingerprint": str(model.get("fingerprint") or ""),
        "task": work.task,
        "dtype": wish.dtype,
        "quantisation": "" if wish.bits is None else f"{QUANTISED[wish.bits]} {wish.method}",
    }
    some = [
        {k: e[k] if k != "source" else Path(str(e[k])).name for k in
         ("id", "revision", "source", "weight", "fingerprint") if e.get(k) is not None}
        for e in subject.origin.get("adapters") or ()
    ]  # fmt: skip
    if some:
        props["adapters"] = json.dumps(some, separators=(",", ":"))
    return {f"loratools.{key}": value for key, value in props.items() if value}


def companions(work: Work) -> None:
    """Config, generation config, tokenizer and preprocessor beside the graph."""
    subject = work.subject
    if subject.folder is None:
        config: Any = getattr(subject.module, "config", None)
        if subject.config and hasattr(config, "to_json_string"):
            said = json.loads(config.to_json_string(use_diff=True))
            said["architectures"] = [type(subject.module).__name__]
            _json(work.folder / "config.json", said)
            _generation(work)
        return
    for path in sorted(subject.folder.iterdir()):
        if path.name in COMPANIONS and path.is_file():
            shutil.copyfile(path, work.folder / path.name)
    _json(work.folder / "config.json", dict(subject.config))


def _generation(work: Work) -> None:
    config: Any = getattr(work.subject.module, "generation_config", None)
    if hasattr(config, "to_json_string"):
        _json(work.folder / "generation_config.json", json.loads(config.to_json_string()))


def _json(path: Path, table: dict[str, Any]) -> None:
    """A config of a float32 graph, without paths of this machine."""
    for key in PATHS:
        if isinstance(table.get(key), str) and (not table[key] or Path(table[key]).is_absolute()):
            del table[key]
    for key in ("dtype", "torch_dtype"):
        if key in table:
            table[key] = "float32"
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_receipt(work: Work, result: ExportResult, hash: str) -> None:
    exporter = {"name": result.exporter, **_versions()}
    receipt.write(
        work.folder,
        makes=result.makes,
        recipe={**work.subject.origin, "export": {"task": work.task, **work.wish.as_json()}},
        device="cpu",
        files=result.files,
        hash=hash,
        exporter=exporter,
        graph={"opset": result.opset, "ir": result.ir_version, "inputs": result.inputs,
               "outputs": result.outputs},
        parity=result.parity,
        notes=list(result.notes),
        waived=[as_json(p) for p in result.problems],
    )  # fmt: skip


def _versions() -> dict[str, str]:
    from loratools.exporting.installed import installed

    names = ("transformers", "onnx", "onnxscript", "onnxruntime")
    return {name: found for name in names if (found := installed(name))}


def set_aside(work: Work, output: Output, out: Path, cause: LoratoolsError) -> Path:
    """Keep what failed its proof beside the output, marked as such."""
    aside = out.with_name(f"{out.name}.failed")
    number = 1
    while os.path.lexists(aside) and not (aside / "failed.json").is_file():
        number += 1
        aside = out.with_name(f"{out.name}.failed.{number}")
    if aside.is_dir():
        shutil.rmtree(aside)
    shutil.copytree(output.folder, aside)
    table = {
        "schema": 1, "failed": cause.message, "task": work.task,
        "parity": {kind: proof.as_json() for kind, proof in work.proofs.items()},
    }  # fmt: skip
    (aside / "failed.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return aside
