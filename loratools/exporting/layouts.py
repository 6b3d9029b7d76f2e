"""Other layouts of an exported folder: .ort files, transformers.js, onnxruntime-genai."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import onnx
from onnx import external_data_helper

from loratools.errors import error, shown
from loratools.exporting import graph_files
from loratools.exporting.ort_files import in_fixed_order

ORT_LIMIT: Final = 2_000_000_000  # a flatbuffer ends at 2 GB

PROVED_LENGTH: Final = 7
COSINES: Final = {"fp32": 0.99999, "fp16": 0.999, "int4": 0.9}

# transformers.js: src/utils/dtypes.js, DEFAULT_DTYPE_SUFFIX_MAPPING
SUFFIXES: Final = {
    "fp32": "", "fp16": "_fp16", "int8": "_int8", "uint8": "_uint8", "q8": "_quantized",
    "q4": "_q4", "q4f16": "_q4f16", "bnb4": "_bnb4",
}  # fmt: skip


def to_ort(source: Path) -> Path:
    """Write `<name>.ort` beside a graph: onnxruntime's own format, which opens without protobuf.

    The optimisations that hold on every machine are done already (onnxruntime's "extended" ones;
    those for one processor's instructions are left to the session).
    """
    import onnxruntime  # type: ignore[import-untyped]

    out = source.with_suffix(".ort")
    model, _ = graph_files.read(source)
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    if size > ORT_LIMIT:
        raise error("not_exportable", f"{shown(source.name)}: an .ort file ends at 2 GB")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    out.write_bytes(in_fixed_order(out.read_bytes()))
    return out


def transformers_js(folder: Path, *, dtype: str = "fp32") -> list[str]:
    """Lay an exported folder out for transformers.js; the names of its files.

    `model*.onnx` move into `onnx/` with the suffix of their precision, external data are renamed
    to `<file>_data` and pointed to anew; config.json says which have external data.
    """
    inside = folder / "onnx"
    inside.mkdir(exist_ok=True)
    external: dict[str, int] = {}
    for path in sorted(folder.glob("*.onnx")):
        suffix = SUFFIXES[dtype]
        target = inside / (path.name if path.stem.endswith(suffix) else f"{path.stem}{suffix}.onnx")
        if _move(path, target):
            external[target.name] = 1
    config = folder / "config.json"
    if external and config.exists():
        said = json.loads(config.read_bytes())
        ours = dict(said.get("transformers.js_config") or {})
        known = ours.get("use_external_data_format")
        table = known if isinstance(known, dict) else {}
        ours["use_external_data_format"] = {**table, **external}
        said["transformers.js_config"] = ours
        config.write_text(json.dumps(said, indent=2) + "\n")
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _move(path: Path, target: Path) -> bool:
    """Move one graph and its data; whether it has data."""
    model = onnx.load(path, load_external_data=False)
    named = {
        entry.value
        for tensor in model.graph.initializer
        if external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if not named:
        os.replace(path, target)
        return False
    if len(named) > 1:
        raise error(
            "not_exportable", f"{shown(path.name)}: its weights lie in {len(named)} files, not one"
        )
    (name,) = named
    data = path.parent / name
    if Path(name).name != name or data.is_symlink() or not data.is_file():
        raise error(
            "malformed", f"{shown(path.name)}: its weights are not beside it: {shown(name)}"
        )
    fresh = f"{target.name}_data"
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = fresh
    target.write_bytes(model.SerializeToString(deterministic=True))
    os.replace(data, target.with_name(fresh))
    path.unlink()
    return True


# ------------------------------------------------------------------------------ onnxruntime-genai


def genai(model: Path, out: Path, *, precision: str = "fp32") -> list[str]:
    """Write a folder for onnxruntime-genai by its own builder, offline; the names of its files.

    What the builder does not know is `not_exportable`, with the reason that it gives.
    """
    from importlib.util import find_spec

    if find_spec("onnxruntime_genai") is None:
        raise error("not_installed", "onnxruntime-genai is not here: pip install onnxruntime-genai")
    if precision not in ("fp32", "fp16", "int4"):
        raise error("usage", f"precision {shown(precision)}: fp32, fp16 and int4 are possible")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".genai-", dir=out.parent) as cache:
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder",
            "-m", "none", "-i", str(model.absolute()), "-o", str(out.absolute()),
            "-p", precision, "-e", "cpu", "-c", cache,
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            command, env={**os.environ, **offline}, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if done.returncode or not (out / "genai_config.json").exists():
        config = json.loads((model / "config.json").read_bytes())
        raise error(
            "not_exportable",
            f"onnxruntime-genai does not build {shown(config.get('model_type'))}: "
            f"{shown(_reason(done.stderr, model))}",
        )
    _without_paths(out, model)
    return sorted(p.name for p in out.iterdir())


def _reason(said: str, model: Path) -> str:
    """The last line of a traceback, without the class of the exception where a text follows it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((n for n in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", n)), None)
    text = last or (lines[-1] if lines else "it ended without a word")
    return text.replace(str(model.absolute()), model.name)


def _without_paths(out: Path, model: Path) -> None:
    """Take the names of our folders out of the text files that the builder wrote."""
    for path in out.glob("*.json"):
        text = path.read_text()
        if str(model.absolute()) in text:
            path.write_text(text.replace(str(model.absolute()), model.name))
    shutil.rmtree(out / ".cache", ignore_errors=True)


def unread_tokenizer(out: Path) -> str | None:
    """Why onnxruntime-genai cannot open the tokenizer of a folder; None where it can."""
    import onnxruntime_genai  # type: ignore[import-untyped]

    try:
        onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(out)))
    except RuntimeError as cause:
        return shown(str(cause).strip().replace(str(out), out.name))
    return None


def prove_genai(model: Path, out: Path, precision: str) -> tuple[float, float]:
    """How far the logits of a short prompt are from transformers', and their cosine.

    A builder of 0.18 takes any layer with as many outputs as the vocabulary has words for the
    head, and says nothing (`proof_failed`).
    """
    import numpy as np
    import onnxruntime
    import torch
    from transformers import AutoModelForCausalLM

    from loratools.exporting.tracing import quiet

    path = next(iter(sorted(out.glob("*.onnx"))))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with quiet():
        net = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, local_files_only=True
        )
    net.train(False)
    ids = np.random.default_rng(0).integers(3, net.config.vocab_size, (1, PROVED_LENGTH))
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    said = json.loads((out / "genai_config.json").read_bytes())["model"]["decoder"]
    feeds: dict[str, object] = {}
    for value in session.get_inputs():
        match value.name:
            case "input_ids":
                feeds[value.name] = ids
            case "attention_mask":
                feeds[value.name] = np.ones_like(ids)
            case "position_ids":
                feeds[value.name] = np.arange(PROVED_LENGTH)[None]
            case _:
                # (batch, heads, past, size of a head), some of them names
                heads, size = (said["num_key_value_heads"], said["head_size"])
                feeds[value.name] = np.zeros((1, heads, 0, size), kinds[value.type])
    found = session.run(["logits"], feeds)[0].astype(np.float64)
    with torch.no_grad():
        expected = net(torch.from_numpy(ids)).logits.double().numpy()
    at = found.shape[1]  # a graph may give the last position alone
    a, b = found.ravel(), expected[:, -at:].ravel()
    cosine = float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    if not cosine >= COSINES[precision]:
        raise error(
            "proof_failed",
            f"onnxruntime-genai's {precision} graph differs from the model: cosine {cosine:.4f} of "
            f"the logits, at least {COSINES[precision]} expected",
        )
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max())), cosine
