"""Graphs for the tests of precision, quantising, fusing and layouts, run by onnxruntime."""

import json

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from tests.exporting import flat_graphs


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path, feeds):
    return session(path).run(None, feeds)


def mlp(path, opset=18, width=64):
    """Gemm with biases, and a matrix product over three dimensions; the inputs of a run."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(width, 2 * width)
            self.mid = torch.nn.Linear(2 * width, width, bias=False)
            self.down = torch.nn.Linear(width, 8)

        def forward(self, x):
            y = self.mid(torch.relu(self.up(x)))
            return self.down(y.reshape(-1, y.shape[-1]))

    torch.manual_seed(3)
    net = Net().eval()
    torch.onnx.export(
        net, (torch.randn(2, 3, width),), str(path), input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "batch", 1: "sequence"}}, opset_version=opset, dynamo=False,
    )  # fmt: skip
    flat_graphs.mapped(path, Configured(net), "")
    return {"x": np.random.default_rng(1).normal(size=(2, 5, width)).astype(np.float32)}


class Configured:
    """A module with the config that `flat_graphs.mapped` writes beside a graph."""

    def __init__(self, net):
        self.named_parameters, self.state_dict = net.named_parameters, net.state_dict
        self.config = self

    def to_json_string(self, use_diff):
        return json.dumps({"model_type": "mlp"})


def llama(path):
    """A Llama with flat cache; inputs of a prefill with a padded row."""
    model = flat_graphs.fresh("llama")
    flat_graphs.causal(model, path)
    ids = np.random.default_rng(2).integers(1, 40, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[0, :3] = 0
    return flat_graphs.feeds(model, ids, mask=mask)


def bert(path):
    flat_graphs.encoder(flat_graphs.fresh("bert"), path, "last_hidden_state")
    ids = np.random.default_rng(2).integers(2, 40, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


MAKERS = {"mlp": mlp, "llama": llama, "bert": bert}


def with_external_data(path, out):
    """The same graph with its larger weights in `<name>.data`."""
    model = onnx.load(path)
    out.parent.mkdir(exist_ok=True)
    onnx.save(
        model, out, save_as_external_data=True, location=f"{out.name}.data", size_threshold=100
    )
    return out


def sidecar(path):
    model = onnx.load(path, load_external_data=False)
    return json.loads(next(p.value for p in model.metadata_props if p.key == "loratools.weights"))


def initialisers(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def close(first, second):
    """Cosine of two outputs as one vector each."""
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
