"""A model exported as it is, exported folded and folded in its graph: one adapter, three graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import torch
import transformers

import loratools
from loratools.exporting.cleaning import array_of
from tests.exporting import exportable_models
from tests.exporting.parity_table import SAVED, Row
from tests.oracle.models import train

SIDES = {"encoder_model.onnx": "*decoder*", "decoder_model_merged.onnx": "*encoder.*"}


def loaded(name: str, folder: Path) -> Any:
    """The saved model, by its own class."""
    if name == "unet":
        import diffusers

        return diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
    saved = exportable_models.MODELS[name][0] if name not in SAVED else SAVED[name]
    return getattr(transformers, saved).from_pretrained(folder).eval()


def merged_by_peft(name: str, folder: Path, row: Row, adapter: Path) -> dict[str, torch.Tensor]:
    """Save an adapter that PEFT made; the parameters of PEFT's own merge of it."""
    torch.manual_seed(31)
    wrapped = peft.get_peft_model(loaded(name, folder), peft.LoraConfig(**row.config))
    train(wrapped)
    wrapped.save_pretrained(adapter)
    fresh = peft.PeftModel.from_pretrained(loaded(name, folder), adapter)
    merged = fresh.merge_and_unload()
    return dict(merged.named_parameters(remove_duplicate=False))


def content(path: Path) -> tuple[bytes, dict[str, Any], bytes]:
    """A graph's bytes without its texts, where its weights come from, and its external data."""
    model = onnx.load(path, load_external_data=False)
    props = {p.key: p.value for p in model.metadata_props}
    del model.metadata_props[:]
    data = path.with_name(f"{path.name}.data")
    beside = data.read_bytes() if data.exists() else b""
    listing = json.loads(props["loratools.weights"])
    return model.SerializeToString(deterministic=True), listing, beside


def three_ways(
    name: str, folder: Path, row: Row, exporter: str, room: Path, *, task: str = "auto"
) -> None:
    """Assert what a row of the table says of an exporter."""
    due = merged_by_peft(name, folder, row, room / "lora")
    how: dict[str, Any] = {"exporter": exporter, "task": task}
    tied = {"tied": True} if row.tied else {}
    loratools.export(folder, out=room / "plain", verify=False, **how)
    result = loratools.export(folder, out=room / "folded", adapters=[room / "lora"], **how, **tied)
    assert result.exporter == exporter
    assert result.parity["ok"]
    assert {f for f in result.files if f.endswith(".onnx")} == set(row.graphs)
    for file in row.graphs:
        weights_are(due, room / "folded" / file)
        allow = [f"unmatched:{g}" for g in (SIDES.get(file), row.pruned) if g]
        out = room / f"within-{Path(file).stem}"
        loratools.merge([room / "lora"], base=room / "plain" / file, out=out, allow=allow, **tied)
        assert content(room / "plain" / file)[0] != content(room / "folded" / file)[0]
        assert content(out / file) == content(room / "folded" / file)


def weights_are(due: dict[str, torch.Tensor], graph: Path) -> None:
    """Every initialiser with a parameter's name is that parameter."""
    model = onnx.load(graph, load_external_data=False)
    _, listing, _ = content(graph)
    found = {t.name: t for t in model.graph.initializer}
    assert listing
    for initialiser, (parameter, transposed) in listing.items():
        expected = due[parameter].detach().float().numpy()
        held = array_of(found[initialiser], graph.parent)
        expected = expected.T if transposed else expected
        assert np.abs(held - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max()), parameter
