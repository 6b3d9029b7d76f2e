"""Makes the files of this folder: PEFT saves an adapter, Olive 0.13.0 converts it.

Run with peft 0.21.2, onnxruntime 1.31.1, onnx_ir and an unpacked wheel of olive-ai on the path:
`python make.py WHEEL OUT`. Of Olive only olive/cli/convert_adapters.py and olive/common/utils.py
are imported; its command line and its telemetry are left out, as they need more packages.
"""

import sys
import types
from argparse import Namespace
from pathlib import Path

import peft
import torch

wheel, out = Path(sys.argv[1]), Path(sys.argv[2])
for name in ("olive", "olive.cli", "olive.common"):
    package = types.ModuleType(name)
    package.__path__ = [str(wheel / name.replace(".", "/"))]
    sys.modules[name] = package
base, telemetry = types.ModuleType("olive.cli.base"), types.ModuleType("olive.telemetry")
base.BaseOliveCLICommand = object
base.add_logging_options = base.add_telemetry_options = lambda parser: parser
telemetry.action = lambda function: function
sys.modules |= {base.__name__: base, telemetry.__name__: telemetry}

from olive.cli.convert_adapters import ConvertAdaptersCommand  # noqa: E402


class Net(torch.nn.Module):
    """A square and a wide layer, called as those of a language model."""

    def __init__(self):
        super().__init__()
        layers = {"square": torch.nn.Linear(6, 6), "wide": torch.nn.Linear(6, 4)}
        self.model = torch.nn.ModuleDict(layers)


torch.manual_seed(0)
config = peft.LoraConfig(
    target_modules=["square", "wide"], r=3, lora_alpha=7, init_lora_weights=False
)
peft.get_peft_model(Net(), config).save_pretrained(out / "peft")
(out / "peft" / "README.md").unlink()

KINDS = {
    "made.npz": ("numpy", "float32", False),
    "made.safetensors": ("safetensors", "float32", False),
    "made.pt": ("pt", "float32", False),
    "made.onnx_adapter": ("onnx_adapter", "float32", False),
    "half.onnx_adapter": ("onnx_adapter", "float16", False),
    "int4.npz": ("numpy", "float32", True),
}
for file, (form, dtype, small) in KINDS.items():
    command = ConvertAdaptersCommand()
    command.args = Namespace(
        adapter_path=str(out / "peft"), output_path=str(out / file), adapter_format=form,
        dtype=dtype, quantize_int4=small, int4_block_size=16, int4_quantization_mode="asymmetric",
    )  # fmt: skip
    command.run()
