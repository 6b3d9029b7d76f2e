"""Made litgpt_0_4_13.safetensors: `python litgpt_0_4_13.py FILE` with litgpt 0.4.13, torch 2.13."""

import sys

import torch
from litgpt.lora import LoRAQKVLinear
from safetensors.torch import save_file

# Query groups of four heads of four, and which of query, key and value are adapted.
ROWS = {"all": (2, (1, 1, 1)), "qv": (2, (1, 0, 1)), "k": (1, (0, 1, 0)), "equal": (4, (1, 1, 0))}

made = {}
for name, (groups, slots) in ROWS.items():
    torch.manual_seed(1)
    layer = LoRAQKVLinear(
        16,
        (4 + 2 * groups) * 4,
        head_size=4,
        n_head=4,
        n_query_groups=groups,
        r=3,
        lora_alpha=5,
        enable_lora=tuple(map(bool, slots)),
        bias=False,
    )
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn_like(layer.lora_A))
        layer.lora_B.copy_(torch.randn_like(layer.lora_B))
        forward = layer(torch.eye(16)[None])[0].T - layer.linear.weight
    made[f"{name}.lora_A"], made[f"{name}.lora_B"] = layer.lora_A.detach(), layer.lora_B.detach()
    made[f"{name}.merged"] = layer.get_lora_AB().detach()
    made[f"{name}.forward"] = forward
save_file({key: tensor.contiguous() for key, tensor in made.items()}, sys.argv[1])
