"""cloneofsimo/lora, the first for images: unet:N:up and unet:N:down, learned tokens beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from loratools.adapter import FLOATS, Adapter, Leaf
from loratools.containers.bundle import Bundle
from loratools.errors import error, shown
from loratools.formats.image_keys import keys_of, say_rest, weights_of
from loratools.formats.reading import Reading

_KEY = re.compile(r"(unet|text_encoder):([0-9]{1,5}):(up|down)")
WORDS = ("down", "up")
_TOKEN = "<embed>"  # what the metadata says of a learned embedding

# A number counts the linear layers within modules of the classes that the metadata names, in the
# order in which torch walks a model; so the layout of Stable Diffusion 1 and 2 gives the names.
# U-Net: (width counted in that of the first block, front), mid block last.
DOWN = ((1, "down_blocks.0"), (2, "down_blocks.1"), (4, "down_blocks.2"))
UP = ((4, "up_blocks.1"), (2, "up_blocks.2"), (1, "up_blocks.3"))
MID = ((4, "mid_block"),)
CROSS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")


def detect(bundle: Bundle) -> bool:
    """Whether a file has numbered pairs."""
    if weights_of(bundle) is None:
        return False
    return any(_KEY.fullmatch(key) for key in keys_of(bundle)[0])


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter from its headers; numbers become names where shapes prove the layout."""
    file = weights_of(bundle)
    leaves, metadata = keys_of(bundle)
    if file is None:
        raise error("unknown_type", f"{shown(bundle.name)} holds no numbered pairs")
    reading = Reading(bundle.name, assume)
    say_rest(reading, bundle, file)
    numbered: dict[str, dict[int, dict[str, Leaf]]] = {}
    tokens: list[str] = []
    for key, leaf in leaves.items():
        found = _KEY.fullmatch(key)
        if found is not None:
            pairs = numbered.setdefault(found[1], {})
            pairs.setdefault(int(found[2]), {})[found[3]] = leaf
        elif metadata.get(key) == _TOKEN and leaf.dtype in FLOATS and len(leaf.shape) <= 2:
            tokens.append(key)
        else:
            reading.unexplained([key])
    alpha = reading.number("alpha")
    for component, pairs in numbered.items():
        names = _names(component, pairs)
        if names is None:
            message = (
                f"{component}: its {len(pairs)} numbered pairs are not those of the attention of "
                "Stable Diffusion 1 or 2, and the file names no modules"
            )
            reading.problem("unknown_type", message, component)
        for n, halves in sorted(pairs.items()):
            _rank(reading, metadata, f"{component}:{n}", halves.get("down"))
            module = f"{component}.{names[n]}" if names else f"{component}:{n}"
            reading.pair(module, halves.get("down"), halves.get("up"), alpha=alpha, words=WORDS)
    if tokens:
        listed = ", ".join(shown(t) for t in tokens)
        message = f"learned embeddings of the tokens {listed} are no weights and are left there"
        reading.problem("unexplained", message, severity="note")
    problems = reading.settle()
    return Adapter(
        deltas=reading.deltas,
        format="cloneofsimo",
        vocabulary="diffusers",
        config={"tokens": tokens} if tokens else {},
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(file,),
        problems=problems,
        assumed=dict(assume),
    )


def _rank(reading: Reading, metadata: Mapping[str, str], pair: str, down: Leaf | None) -> None:
    """The metadata's rank against the tensor's, which counts."""
    said = metadata.get(f"{pair}:rank")
    if said is not None and down is not None and down.shape and said != str(down.shape[0]):
        message = f"{pair}: metadata says rank {shown(said)}, down has {down.shape[0]} rows"
        reading.problem("config_conflict", message, pair, "warning")


def _names(component: str, pairs: Mapping[int, Mapping[str, Leaf]]) -> Sequence[str] | None:
    """The modules behind the numbers, where the shapes of all fit a layout; None where not."""
    shapes = [_shape(pairs.get(i, {})) for i in range(len(pairs))]
    if component == "text_encoder":
        layers = range(len(pairs) // len(CLIP))
        names = [f"text_model.encoder.layers.{i}.self_attn.{p}" for i in layers for p in CLIP]
        width = shapes[0][0] if shapes and shapes[0] else 0
        fits = len(names) == len(shapes) and all(s == (width, width) for s in shapes)
        return names if fits and width else None
    for blocks in ((*DOWN, *UP, *MID), (*DOWN, *MID, *UP)):
        for order in ("attn1 ff attn2", "attn1 attn2 ff", "attn1 attn2"):
            layout = list(_layout(blocks, order.split()))
            if len(layout) == len(shapes) and _fits(layout, shapes):
                return [name for name, _, _ in layout]
    return None


def _shape(halves: Mapping[str, Leaf]) -> tuple[int, int] | None:
    """(out, in) of a pair of matrices."""
    up, down = halves.get("up"), halves.get("down")
    if up is None or down is None or len(up.shape) != 2 or len(down.shape) != 2:
        return None
    return up.shape[0], down.shape[1]


def _layout(
    blocks: Sequence[tuple[int, str]], order: Sequence[str]
) -> Iterator[tuple[str, int, str]]:
    """Each layer's name, the width of its block, and which part of a block it is."""
    for width, front in blocks:
        count = {"d": 2, "u": 3, "m": 1}[front[0]]
        for i in range(count):
            stem = f"{front}.attentions.{i}.transformer_blocks.0"
            for part in order:
                if part == "ff":
                    yield f"{stem}.ff.net.0.proj", width, part
                else:
                    yield from ((f"{stem}.{part}.{p}", width, f"{part}.{p}") for p in CROSS)


def _fits(layout: Sequence[tuple[str, int, str]], shapes: Sequence[tuple[int, int] | None]) -> bool:
    """Whether shapes are those of a layout: widths in 1, 2, 4 times the first, one text width."""
    first = shapes[0][0] if shapes[0] else 0
    texts = set()
    for (_, times, part), shape in zip(layout, shapes, strict=True):
        if shape is None:
            return False
        width = first * times
        if part in ("attn2.to_k", "attn2.to_v"):
            texts.add(shape[1])
            shape = (shape[0], width)
        if shape != (8 * width if part == "ff" else width, width):
            return False
    return len(texts) == 1
