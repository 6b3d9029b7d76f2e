"""Adapters of MLX and onnxruntime that others published, read against mlx and onnxruntime."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import onnxruntime as ort

from loratools.containers.bundle import local
from loratools.formats import mlx, olive, onnx_adapter, peft


def test_an_adapter_of_mlx(field_data: Path, tmp_path: Path):
    folder = field_data / "adapters_and_models" / "mlx-qwen25-05b"
    bundle = local(folder)
    assert mlx.detect(bundle)
    assert not any(f.detect(bundle) for f in (peft, olive, onnx_adapter))
    adapter = mlx.read(bundle, assume={})
    assert {p.severity for p in adapter.problems} == {"note"}
    assert [p.code for p in adapter.problems] == ["config_conflict", "unexplained"]
    tensors = mx.load(str(folder / "adapters.safetensors"))
    assert len(adapter.deltas) * 2 == len(tensors) == 16
    for key, delta in adapter.deltas.items():
        stem = key.removesuffix(".weight")
        assert (delta.scaling, delta.rank) == (10, 8)
        expected = np.array(10 * tensors[f"{stem}.lora_b"].T @ tensors[f"{stem}.lora_a"].T)
        found = delta.scaling * (delta.b.tensor() @ delta.a.tensor()).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert mlx.lost(adapter) == []
    mlx.write(adapter, tmp_path)
    again = mx.load(str(tmp_path / "adapters.safetensors"))
    assert all(mx.array_equal(again[key], tensor) for key, tensor in tensors.items())
    assert mlx.read(local(tmp_path), assume={}).config["num_layers"] == 4
    snapshot = local(folder / "0000100_adapters.safetensors")
    assert mlx.detect(snapshot)
    assert set(mlx.read(snapshot, assume={}).deltas) == set(adapter.deltas)


def test_an_adapter_of_onnxruntime(field_data: Path, tmp_path: Path):
    folder = field_data / "adapters_and_models" / "ort-two-params-onnx-adapter"
    [file] = folder.glob("*.onnx_adapter")
    for bundle in (local(file), local(folder)):
        assert onnx_adapter.detect(bundle)
        assert not any(f.detect(bundle) for f in (peft, olive, mlx))
    adapter = onnx_adapter.read(local(file), assume={})
    assert [p.severity for p in adapter.problems] == ["note"]
    [delta] = adapter.deltas.values()
    onnx_adapter.write(adapter, tmp_path / "again.onnx_adapter")
    before, after = (
        ort.AdapterFormat.read_adapter(str(p)) for p in (file, tmp_path / "again.onnx_adapter")
    )
    assert before.get_model_version() == after.get_model_version() == 1
    theirs, ours = before.get_parameters(), after.get_parameters()
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[k].numpy(), ours[k].numpy()) for k in theirs)
    a, b = theirs["lora_param_a"].numpy(), theirs["lora_param_b"].numpy()
    assert np.array_equal((delta.b.tensor() @ delta.a.tensor()).numpy(), (a @ b).T)
