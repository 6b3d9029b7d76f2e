"""Blocks of image models under the names that lists of block weights give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_INS = tuple(f"IN{i:02}" for i in range(12))
_OUTS = tuple(f"OUT{i:02}" for i in range(12))
UNET = ("BASE", *_INS, "M00", *_OUTS)
_DOUBLE = tuple(f"D{i:02}" for i in range(19))
_SINGLE = tuple(f"S{i:02}" for i in range(38))
FLUX = ("CLIP", "T5", "IN", *_DOUBLE, *_SINGLE, "OUT")

_SD = (*_INS[1:3], *_INS[4:6], *_INS[7:9])  # the blocks of SD1 and SD2 that have attention
# What stands where in a list, by its length: 12, 17, 20, 26 as in kohya
# (sd-scripts:networks/svd_merge_lora.py) and A1111 (sd-webui-lora-block-weight:scripts/
# lora_block_weight.py), which has the 61, too; 19 and 57 are Flux' double blocks and all blocks.
LISTS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", *_INS[4:6], *_INS[7:9], "M00", *_OUTS[:6]),
    17: ("BASE", *_SD, "M00", *_OUTS[3:]),
    19: _DOUBLE,
    20: ("BASE", *_INS[:9], "M00", *_OUTS[:9]),
    26: UNET,
    57: (*_DOUBLE, *_SINGLE),
    61: FLUX,
}
_SAMPLED = re.compile(r"(?:^|[._])(down|up)_blocks[._](\d{1,2})[._]([a-z]+)[._](\d{1,2})(?:[._]|$)")
_NUMBERED = re.compile(r"(?:^|[._])(input|output)_blocks[._](\d{1,2})(?:[._]|$)")
_MIDDLE = re.compile(r"(?:^|[._])(?:middle_block|mid_block)[._]")
_FIRST = re.compile(r"(?:^unet\.|^lora_unet_)conv_in(?:[._]|$)")
_TEXT = re.compile(r"(?:^|_)(?:text_encoder|te)(?:_?([123]))?[._]")
_TWICE = re.compile(r"(?:^|[._])(single_)?(?:double_)?(?:transformer_)?blocks[._](\d{1,3})[._]")
_ENDS = {
    "IN": re.compile(
        r"(?:^|[._])(?:img_in|txt_in|time_in|vector_in|guidance_in"
        r"|x_embedder|context_embedder|time_text_embed)(?:[._]|$)"
    ),
    "OUT": re.compile(
        r"(?:^|[._])final_layer[._]|(?:^transformer\.|^lora_transformer_)(?:proj|norm)_out[._]"
    ),
}


def weighted(numbers: Iterable[float]) -> dict[str, float]:
    """A list's numbers by the names of its blocks; KeyError for a length that no list has."""
    given = tuple(numbers)
    return dict(zip(LISTS[len(given)], given, strict=True))


def block(names: Iterable[str], known: Mapping[str, float]) -> str | None:
    """The block of a weight that has these names; None for one outside all blocks.

    `known` are the blocks of the list, of a U-Net or of Flux; the answer need not be one of them.
    """
    find = _in_flux if "D00" in known else _in_unet
    return next((found for name in names if (found := find(name))), None)


def _in_unet(name: str) -> str | None:
    if _TEXT.match(name) or name.startswith("lora_te"):
        return "BASE"
    if found := _NUMBERED.search(name):
        return f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02}"
    if _MIDDLE.search(name):
        return "M00"
    if found := _SAMPLED.search(name):
        level, i, sampler = int(found[2]), int(found[4]), found[3].endswith("samplers")
        if found[1] == "down":
            return f"IN{3 * level + (3 if sampler else i + 1):02}"
        return f"OUT{3 * level + (2 if sampler else i):02}"
    return "IN00" if _FIRST.search(name) else _twice(name)


def _in_flux(name: str) -> str | None:
    text = _TEXT.match(name) or re.match(r"lora_te([123])?_", name)
    if text:
        return "T5" if text[1] in ("2", "3") else "CLIP"
    if _NUMBERED.search(name) or _SAMPLED.search(name) or _MIDDLE.search(name):
        return _in_unet(name)
    return _twice(name) or next(
        (end for end, pattern in _ENDS.items() if pattern.search(name)), None
    )


def _twice(name: str) -> str | None:
    found = _TWICE.search(name)
    return f"{'S' if found[1] else 'D'}{int(found[2]):02}" if found else None
