"""Made peft_experts_*.safetensors: `python peft_experts.py FOLDER` with peft 0.18.1 and 0.19.0.

Each file holds, by case, an adapter of stacked experts, the base and PEFT's own merge.
"""

import sys
import tempfile
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {  # hidden size, intermediate size, whether stored (experts, in, out), what is targeted
    "plain": (4, 3, False, BOTH),
    "square-down": (4, 4, False, BOTH),
    "square-up": (6, 3, False, BOTH),
    "turned": (4, 3, True, BOTH),
    "turned-square": (4, 4, True, BOTH),
    "up": (4, 3, False, BOTH[:1]),
    "square": (4, 4, False, BOTH[1:]),
}


class Experts(nn.Module):
    def __init__(self, hidden, inner, is_transposed):
        super().__init__()
        up, down = (2, 2 * inner, hidden), (2, hidden, inner)
        if is_transposed:
            self.is_transposed = True
            up, down = (2, hidden, 2 * inner), (2, inner, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))


class Net(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(*sizes)})])


made = {}
configs = {}
for name, (hidden, inner, is_transposed, targets) in CASES.items():
    torch.manual_seed(0)
    net = Net(hidden, inner, is_transposed)
    made |= {f"{name}|base|{k}": v.clone() for k, v in net.state_dict().items()}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    wrapped = peft.get_peft_model(net, config)
    for key, parameter in wrapped.named_parameters():
        if "lora" in key:
            parameter.data = torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        adapter = load_file(Path(folder) / "adapter_model.safetensors")
        configs[name] = (Path(folder) / "adapter_config.json").read_text()
    made |= {f"{name}|adapter|{k}": v for k, v in adapter.items()}
    merged = wrapped.merge_and_unload().state_dict()
    made |= {f"{name}|merged|{k}": v.contiguous() for k, v in merged.items()}
version = peft.__version__.replace(".", "_")
save_file(made, Path(sys.argv[1]) / f"peft_experts_{version}.safetensors", configs)
