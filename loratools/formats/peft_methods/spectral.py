"""Updates of few numbers, or of random ones with few weights: FourierFT, SHiRA, RandLoRA, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter import Chained, Spectral
from loratools.errors import shown
from loratools.formats.peft_methods.found import Found, Method, flag, real, seed, whole
from loratools.formats.reading import Reading


def read_fourier(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Coefficients at seeded places of a spectrum; where these are the base's shape says."""
    settings = {"seed": seed(config, "random_loc_seed", 777)}
    scaling = real(config, "scaling", 150.0)
    _spectra("fourier", "fourierft_spectrum", scaling, settings, found, reading)


def read_wavelet(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Coefficients of one level of a wavelet transform, or with use_idwt=false values as such."""
    family = config.get("wavelet_family", "db1")
    idwt = flag(config, "use_idwt", True)
    if not isinstance(family, str) or (idwt and not _computed(family)):
        message = f"wavelet_family={shown(repr(family))}: only haar, db1-38 and sym2-10 are known"
        reading.problem("unknown_type", message)
        return
    settings = {"seed": seed(config, "random_loc_seed", 777), "family": family, "idwt": idwt}
    scaling = real(config, "scaling", 25.0)
    _spectra("wavelet", "waveft_spectrum", scaling, settings, found, reading)


def _computed(family: str) -> bool:
    """Whether it is one of those in kinds/wavelets.py."""
    names = {f"db{n}" for n in range(1, 39)} | {f"sym{n}" for n in range(2, 11)} | {"haar"}
    return family in names


def _spectra(
    method: str,
    part: str,
    scaling: float,
    settings: Mapping[str, Any],
    found: Found,
    reading: Reading,
) -> None:
    for module, parts in found.each(reading, part):
        spectrum = parts[part]
        if len(spectrum.shape) != 1 or not spectrum.numel:
            message = f"{shown(module)}: {part} is {spectrum.shape}; expected a vector"
            reading.problem("shape_factors", message, module)
            continue
        made = Chained(method, {"spectrum": spectrum}, scaling, settings)
        reading.deltas[f"{module}.weight"] = made


def read_shira(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Values at (row, column) places of the weight."""
    for module, parts in found.each(reading, "shira_weight", "shira_indices"):
        values, indices = parts["shira_weight"], parts["shira_indices"]
        if len(values.shape) != 1 or indices.shape != (2, values.numel) or not values.numel:
            message = f"{shown(module)}: {values.shape} values at {indices.shape} places"
            reading.problem("shape_factors", message, module)
            continue
        made = Chained("places", {"values": values, "indices": indices})
        reading.deltas[f"{module}.weight"] = made


def read_supertuning(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Values at places of the flattened weight, and with r a LoRA beside them."""
    needed = ("supertuning_values", "supertuning_indices")
    for module, parts in found.each(reading, "supertuning_values"):
        if needed[1] not in parts:
            message = (
                f"{shown(module)}: which of W0's numbers its values are for is not in the file; "
                "PEFT finds them again by size, save with save_precomputed_indices=True"
            )
            reading.problem("missing", message, module)
            continue
        values, indices = (parts[part] for part in needed)
        a, b = (parts.get(f"supertuning_lora_{side}.weight") for side in "AB")
        pair = a is not None and b is not None and len(a.shape) == len(b.shape) == 2
        if values.shape != indices.shape or len(values.shape) != 1 or not values.numel:
            message = f"{shown(module)}: {values.shape} values at {indices.shape} places"
            reading.problem("shape_factors", message, module)
            continue
        held = {"values": values, "indices": indices}
        key = f"{module}.weight"
        if a is None and b is None:
            reading.deltas[key] = Chained("places", held)
        elif a is not None and b is not None and pair and a.shape[0] == b.shape[1] > 0:
            settings = {"pair": real(config, "lora_alpha") / a.shape[0]}
            shape = (b.shape[0], a.shape[1])
            made = Spectral("supra", {**held, "a": a, "b": b}, shape, 1.0, settings)
            reading.deltas[key] = made
        else:
            message = f"{shown(module)}: its LoRA has no two factors that multiply"
            reading.problem("shape_factors", message, module)


def read_c3a(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Circulant blocks (out/b, in/b, b), over the number of inputs."""
    for module, parts in found.each(reading, "c3a_kernel"):
        kernel = parts["c3a_kernel"]
        if len(kernel.shape) != 3 or not kernel.numel:
            message = f"{shown(module)}: c3a_kernel is {kernel.shape}; expected (out/b, in/b, b)"
            reading.problem("shape_factors", message, module)
            continue
        m, n, size = kernel.shape
        made = Spectral("circulant", {"kernel": kernel}, (m * size, n * size), 1 / (n * size))
        reading.deltas[f"{module}.weight"] = made


def read_randlora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """Many random pairs with trained weights; the pairs are in the file, or made from a seed."""
    rank = whole(config, "r", 32)
    density = (
        "very sparse" if flag(config, "very_sparse") else
        "sparse" if flag(config, "sparse") else "dense"
    )  # fmt: skip
    if rank < 1:
        reading.problem("config_conflict", f"the config says r={rank}")
        return
    scaling = real(config, "randlora_alpha", 640) / rank
    drawn = seed(config, "projection_prng_key", 0)
    stored = False
    for module, parts in found.each(reading, "randlora_lambda", "randlora_gamma"):
        lam, gamma = parts["randlora_lambda"], parts["randlora_gamma"]
        a, b = (
            parts.get(f"randlora_{side}") or found.shared.get(f"randlora_{side}") for side in "AB"
        )
        good = len(lam.shape) == len(gamma.shape) == 2 and lam.shape == (rank, gamma.shape[0])
        for each, at in ((a, 0), (b, 2)):
            good = good and (each is None or (len(each.shape) == 3 and each.shape[at] == rank))
        bases = a.shape[1] if a is not None and good else 1
        if not good or bases not in (1, gamma.shape[0]) or (a is None) != (b is None):
            known = {**parts, **found.shared}
            said = ", ".join(f"{part} is {leaf.shape}" for part, leaf in sorted(known.items()))
            reading.problem("shape_factors", f"{shown(module)}: {said}, at r={rank}", module)
            continue
        held = {"lambda": lam, "gamma": gamma}
        if a is not None and b is not None:
            held |= {"A": a, "B": b}
            stored = True
        settings = {"seed": drawn, "density": density}
        reading.deltas[f"{module}.weight"] = Chained("randlora", held, scaling, settings)
    if reading.deltas and not stored:
        reading.problem(
            "missing",
            f"the projections of {reading.name} are not in the file: they are made from its "
            f"seed {drawn} as torch's generator makes them",
            severity="note",
        )


METHODS = {
    "FOURIERFT": Method.of(
        read_fourier,
        "fourierft_spectrum",
        fields="n_frequency n_frequency_pattern scaling random_loc_seed",
    ),
    "WAVEFT": Method.of(
        read_wavelet,
        "waveft_spectrum",
        fields="n_frequency n_frequency_pattern scaling random_loc_seed wavelet_family use_idwt "
        "proportional_parameters",
    ),
    "SHIRA": Method.of(read_shira, "shira_weight shira_indices", fields="r mask_type random_seed"),
    "SUPERTUNING": Method.of(
        read_supertuning,
        "supertuning_values supertuning_indices supertuning_lora_A.weight "
        "supertuning_lora_B.weight",
        fields="sparsity select_top save_precomputed_indices r lora_alpha lora_dropout",
    ),
    "C3A": Method.of(read_c3a, "c3a_kernel", fields="block_size block_size_pattern"),
    "RANDLORA": Method.of(
        read_randlora,
        "randlora_lambda randlora_gamma randlora_A randlora_B",
        shared="randlora_A randlora_B",
        fields="r projection_prng_key save_projection sparse very_sparse randlora_alpha "
        "randlora_dropout",
    ),
}
