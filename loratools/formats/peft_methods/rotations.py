"""Rotations of a weight as PEFT saves them: OFT, BOFT, HRA, RoAd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratools import views
from loratools.adapter import Leaf, Rotated
from loratools.errors import error, shown
from loratools.formats.peft_methods.found import Found, Method, few, flag, real, whole
from loratools.formats.reading import Reading

NEUMANN = "use_cayley_neumann"
OLD = "oft_r"


def read_oft(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0·Rᵀ, R of blocks made of upper triangles; which map makes them the config says alone."""
    settings = _how(config, reading)
    for module, parts in found.each(reading):
        if OLD in parts:
            message = (
                f"{shown(module)} has {OLD}, the OFT of PEFT before 0.16, which later ones do not "
                "read either; merge it with the PEFT that saved it"
            )
            reading.problem("unknown_type", message, module)
            continue
        vectors = parts.get("oft_R.weight") or parts.get("oft_embedding_R.weight")
        assert vectors is not None
        size = _side(vectors)
        if size is None or len(parts) != 1:
            said = ", ".join(f"{part} is {leaf.shape}" for part, leaf in sorted(parts.items()))
            message = f"{shown(module)}: {said}; expected (blocks, b·(b - 1)/2)"
            reading.problem("shape_factors", message, module)
            continue
        if settings is None:
            continue
        if settings["share"] and vectors.shape[0] != 1:
            message = f"{shown(module)} has {vectors.shape[0]} blocks, the config says block_share"
            reading.problem("config_conflict", message, module)
            continue
        # What looks tokens up is rotated after that: W0·R.
        embedding = "oft_embedding_R.weight" in parts
        own = {"size": size, **({"turned": True} if embedding else {"flat": True})}
        made = Rotated("oft", "in", {"vectors": vectors}, {**settings, **own})
        reading.deltas[f"{module}.weight"] = made


def _how(config: Mapping[str, Any], reading: Reading) -> dict[str, Any] | None:
    """What the config says of the map from vectors to blocks; None, and a problem, where nothing.

    The two maps are each other's transpose nearly, so that no default is safe.
    """
    said = reading.assume.get("oft")
    if said not in (None, "neumann", "exact"):
        raise error("usage", f"--assume oft={shown(said)}: expected neumann or exact")
    if config.get(NEUMANN) is None:
        if said is None:
            reading.problem(
                "missing",
                f"the config does not say {NEUMANN}; the two ways turn in opposite directions: "
                "--assume oft=neumann or oft=exact says which",
            )
            return None
        neumann = said == "neumann"
    else:
        neumann = flag(config, NEUMANN)
    settings: dict[str, Any] = {"share": flag(config, "block_share")}
    if neumann:
        settings["terms"] = few(config, "num_cayley_neumann_terms", 5)
        if _before(config, (0, 18)):
            settings["old"] = True
            reading.problem(
                "config_conflict",
                "trained by a PEFT before 0.18, whose last power counted twice: so it does here",
                severity="note",
            )
    if flag(config, "coft"):
        settings["eps"] = real(config, "eps", 6e-5)
    return settings


def _before(config: Mapping[str, Any], version: tuple[int, int]) -> bool:
    """Whether the adapter was saved by an older PEFT; those before 0.18 do not say which."""
    said = config.get("peft_version")
    if not isinstance(said, str):
        return True
    numbers = said.split("@")[0].split(".")[:2]
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 6 for n in numbers):
        return True
    return tuple(int(n) for n in numbers) < version


def _side(vectors: Leaf) -> int | None:
    """b of rows of b·(b - 1)/2 numbers; None where no whole b has so many."""
    if len(vectors.shape) != 2 or not vectors.shape[0]:
        return None
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    return size if size * (size - 1) // 2 == vectors.shape[1] else None


def read_boft(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0·Rᵀ with rows times `boft_s`, R a product of blocks between permutations."""
    for module, parts in found.each(reading, "boft_R", "boft_s"):
        blocks, scale = parts["boft_R"], parts["boft_s"]
        shape = blocks.shape
        if len(shape) != 4 or not blocks.numel or shape[2] != shape[3] or not _staged(*shape[:3]):
            message = f"{shown(module)}: boft_R is {shape}; expected (stages, blocks, b, b)"
            reading.problem("shape_factors", message, module)
            continue
        flat = views.reshaped(scale, scale.numel)
        made = Rotated("boft", "in", {"blocks": blocks, "scale": flat})
        reading.deltas[f"{module}.weight"] = made


def _staged(stages: int, count: int, size: int) -> bool:
    """Whether blocks can be halved and put together as often as there are stages."""
    return stages == 1 or (size % 2 == 0 and count % (1 << min(stages - 1, 63)) == 0)


def read_hra(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0·Π(I - 2·u·uᵀ) over the columns u, orthogonalised one after another with apply_GS."""
    settings = {"orthogonal": flag(config, "apply_GS")}
    for module, parts in found.each(reading, "hra_u"):
        u = parts["hra_u"]
        if len(u.shape) != 2 or not u.numel:
            message = f"{shown(module)}: hra_u is {u.shape}; expected (in, rank)"
            reading.problem("shape_factors", message, module)
            continue
        reading.deltas[f"{module}.weight"] = Rotated("householder", "in", {"u": u}, settings)


def read_road(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """R·W0 and R·b, R turning and scaling rows in pairs, one of each half of a group."""
    variant, group = config.get("variant", "road_1"), whole(config, "group_size", 64)
    per_row = {"road_1": 2, "road_2": 4, "road_4": 8}.get(variant) if variant else None
    if per_row is None or group < 2 or group % 2:
        message = f"variant={shown(repr(variant))}, group_size={group}: no RoAd that is known"
        reading.problem("unknown_type", message)
        return
    for module, parts in found.each(reading, "road_theta", "road_alpha"):
        theta, alpha = parts["road_theta"], parts["road_alpha"]
        rows, rest = divmod(4 * theta.numel, per_row)
        good = theta.shape == alpha.shape == (theta.numel,) and rows > 0 and not rest
        if not good or rows // 2 % (group // 2):
            message = (
                f"{shown(module)}: road_theta is {theta.shape}, road_alpha {alpha.shape}, with "
                f"{variant} and groups of {group}"
            )
            reading.problem("shape_factors", message, module)
            continue
        settings = {"variant": variant, "group": group}
        made = Rotated("road", "out", {"theta": theta, "alpha": alpha}, settings)
        reading.deltas[f"{module}.weight"] = reading.deltas[f"{module}.bias"] = made


METHODS = {
    "OFT": Method.of(
        read_oft,
        f"oft_R.weight oft_embedding_R.weight {OLD} oft_s",
        fields=f"r oft_block_size module_dropout coft eps block_share num_cayley_neumann_terms "
        f"{NEUMANN}",
    ),
    "BOFT": Method.of(
        read_boft,
        "boft_R boft_s",
        fields="boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout",
    ),
    "HRA": Method.of(read_hra, "hra_u", fields="r apply_GS"),
    "ROAD": Method.of(read_road, "road_theta road_alpha", fields="variant group_size"),
}
