"""Methods that are a LoRA in other clothes: AdaLoRA, DeLoRA, VB-LoRA, each lowered when read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import FLOATS, Leaf, LowRank
from loratools.errors import error, shown
from loratools.formats.peft_methods.found import Found, Method, real, whole
from loratools.formats.reading import Reading, number

if TYPE_CHECKING:
    from torch import Tensor


def _misfit(reading: Reading, module: str, parts: Mapping[str, Leaf]) -> None:
    shapes = ", ".join(f"{part} is {leaf.shape}" for part, leaf in sorted(parts.items()))
    reading.problem("shape_factors", f"{shown(module)}: {shapes}, which do not multiply", module)


def wide(leaf: Leaf) -> Tensor:
    """A leaf's numbers in float64."""
    import torch

    return leaf.tensor().to(torch.float64)


def read_adalora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """ΔW = alpha/(ranknum + 1e-5) · B·diag(E)·A (arXiv 2303.10512); ranknum is the first rank.

    Pruned ranks are no longer in the file, and count nevertheless (peft:tuners/adalora/layer.py).
    """
    for module, parts in found.each(reading, "lora_A", "lora_B", "lora_E"):
        a, b, e = parts["lora_A"], parts["lora_B"], parts["lora_E"]
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == e.numel:
            _misfit(reading, module, parts)
            continue
        if not e.numel:
            reading.problem("no_effect", f"{shown(module)}: all ranks were pruned", module, "note")
            continue
        ranknum = number(parts["ranknum"]) if "ranknum" in parts else whole(config, "init_r")
        alpha = config.get("lora_alpha")
        if alpha is None:
            continue  # alpha_missing is among the problems
        alpha = real(config, "lora_alpha")
        scaling = (alpha if alpha > 0 else float(ranknum)) / (ranknum + 1e-5)
        reading.deltas[f"{module}.weight"] = LowRank(_rows_times(a, e), b, scaling)


def _rows_times(a: Leaf, e: Leaf) -> Leaf:
    return views.later(a.name, "F64", a.shape, lambda: wide(a) * wide(e).reshape(-1, 1))


def read_delora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """ΔW = B·diag(λ / r / (‖A_i‖ ‖B_i‖))·A with columns times w_norm (arXiv 2503.18225)."""
    needed = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    for module, parts in found.each(reading, *needed):
        a, b, most, norm = (parts[part] for part in needed)
        good = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
        if not good or norm.numel != a.shape[1] or most.numel != 1 or not a.numel:
            _misfit(reading, module, parts)
            continue
        pair = LowRank(_columns_times(a, norm), _bounded(a, b, most), 1.0)
        reading.deltas[f"{module}.weight"] = pair


def _columns_times(a: Leaf, norm: Leaf) -> Leaf:
    return views.later(a.name, "F64", a.shape, lambda: wide(a) * wide(norm).reshape(1, -1))


def _bounded(a: Leaf, b: Leaf, most: Leaf) -> Leaf:
    """B with every column of length λ / r / ‖A_i‖; lengths below 1e-4 count as that."""

    def make() -> Tensor:
        import torch

        down, up = wide(a), wide(b)
        lengths = [
            torch.linalg.vector_norm(t, dim=n).clamp(min=1e-4) for t, n in ((down, 1), (up, 0))
        ]
        bounded: Tensor = up * (wide(most).reshape(1) / len(down) / (lengths[0] * lengths[1]))
        return bounded

    return views.later(b.name, "F64", b.shape, make)


def read_vblora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """A and B of sub-vectors, each a mixture of the best few of one bank (arXiv 2405.15179).

    Stored are the logits of all vectors, or the chosen indices and all weights but the last.
    """
    bank = found.shared.get("vblora_vector_bank")
    if bank is None or len(bank.shape) != 2:
        reading.problem("missing", "the file has no vector bank (vblora_vector_bank)")
        return
    top = whole(config, "topk", 2)
    for module, parts in found.each(reading):
        sides = [_mixture(parts, f"vblora_logits_{side}", bank, top) for side in "AB"]
        if sides[0] is None or sides[1] is None:
            _misfit(reading, module, {**parts, "vblora_vector_bank": bank})
            continue
        (rows, tiles), make_a = sides[0]
        (above, rank), make_b = sides[1]
        if rank != rows:
            _misfit(reading, module, parts)
            continue
        length = bank.shape[1]
        a = views.later(module, "F64", (rows, tiles * length), _flat(make_a))
        b = views.later(module, "F64", (above * length, rows), _tall(make_b))
        reading.deltas[f"{module}.weight"] = LowRank(a, b, 1.0)


def _flat(make: Any) -> Any:
    return lambda: make().flatten(1).contiguous()


def _tall(make: Any) -> Any:
    return lambda: make().transpose(1, 2).flatten(0, 1).contiguous()


def _mixture(parts: Mapping[str, Leaf], name: str, bank: Leaf, top: int) -> Any:
    """The extents of a grid of sub-vectors, and how the grid (m, n, length) is made."""
    logits = parts.get(name)
    at, weights = parts.get(f"{name}_topk_indices"), parts.get(f"{name}_topk_weights")
    if logits is not None:
        if (
            len(logits.shape) != 3
            or logits.shape[2] != bank.shape[0]
            or not 0 < top <= bank.shape[0]
        ):
            return None
        return logits.shape[:2], lambda: _mixed(*_chosen(logits, top), bank)
    if at is None or weights is None or len(at.shape) != 3 or at.dtype in FLOATS:
        return None
    if weights.shape != (*at.shape[:2], at.shape[2] - 1):
        return None
    return at.shape[:2], lambda: _mixed(*_given(at, weights, bank), bank)


def _chosen(logits: Leaf, top: int) -> tuple[Tensor, Tensor]:
    best, at = wide(logits).topk(top, dim=-1)
    return best.softmax(-1), at


def _given(at: Leaf, weights: Leaf, bank: Leaf) -> tuple[Tensor, Tensor]:
    import torch

    some, where = wide(weights), at.tensor().to(torch.int64)
    if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < bank.shape[0]:
        message = f"{shown(at.name)} names vectors that the bank of {bank.shape[0]} has not"
        raise error("malformed", message)
    return torch.cat([some, 1 - some.sum(-1, keepdim=True)], -1), where


def _mixed(weights: Tensor, at: Tensor, bank: Leaf) -> Tensor:
    return (weights.unsqueeze(-1) * wide(bank)[at]).sum(-2)


_LORA = """alpha_pattern alora_invocation_tokens arrow_config corda_config ensure_weight_tying
    eva_config init_lora_weights kasa_config layer_replication loftq_config lora_alpha lora_bias
    lora_dropout lora_ga_config megatron_config megatron_core monteclora_config qalora_group_size r
    rank_pattern target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora
    velora_config"""

METHODS = {
    "ADALORA": Method.of(
        read_adalora,
        "lora_A lora_B lora_E ranknum",
        fields=f"{_LORA} target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight "
        "total_step",
    ),
    "DELORA": Method.of(
        read_delora,
        "delora_A delora_B delora_lambda delora_w_norm",
        fields="r delora_lambda module_dropout rank_pattern lambda_pattern",
    ),
    "VBLORA": Method.of(
        read_vblora,
        "vblora_logits_A vblora_logits_B vblora_logits_A_topk_indices vblora_logits_A_topk_weights "
        "vblora_logits_B_topk_indices vblora_logits_B_topk_weights",
        shared="vblora_vector_bank",
        fields="r num_vectors vector_length topk save_only_topk_weights vblora_dropout "
        "init_vector_bank_bound init_logits_std",
    ),
}
