"""The page specs/matrix.md, made from the writers themselves: `python -m tests.matrix`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from loratools import formats
from loratools.adapter import Adapter, Dense, Kind, Leaf, LowRank, Renormed, Replace, leaves
from loratools.commands.writing import LANGUAGE_ONLY
from loratools.containers.bundle import local
from tests.commands.test_conversions import IMAGES, LANGUAGES

HEAD = """# Formats and kinds

Made by `python -m tests.matrix > specs/matrix.md`; do not edit it by hand.

## What a format holds

`read, written`: written, read again and the same. A number: refused (`loss`), with the reason
below; `--allow loss` leaves it out and the receipt says so. `read`: loratools does not write this
format. Empty: the format has no such tensor.
"""
CONVERSIONS = """
## From format to format

L: factors, scalings and alphas are the same when they are back. L*: every update is, to the
rounding of float32. ~: the same, but the scaling is inside B and alpha is the rank. X: refused, no
base has the names of both. Rows are read, columns written; `tests/commands/test_conversions.py`
proves each cell."""
# A module of each vocabulary that its formats can adapt, and the table of its embedding.
MODULES = {
    "hf": ("model.layers.0.self_attn.q_proj", "model.embed_tokens"),
    "gguf": ("blk.0.attn_q", "token_embd"),
    "torchtune": ("layers.0.attn.q_proj", "tok_embeddings"),
    "litgpt": ("transformer.h.0.attn.proj", "transformer.wte"),
    "diffusers": (
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.text_model.embeddings.token",
    ),
    "kohya": ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_embeddings_token"),
}
COLUMNS = (
    "pair", "convolution", "embedding", "DoRA by rows", "DoRA by columns", "difference",
    "bias beside a pair", "bias alone", "whole weight", "rows of a table",
)  # fmt: skip
# Formats that are only read, and what of them: keys with the shapes of their tensors.
BLOCK = "double_blocks.0.img_attn.qkv"
READ: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "bfl": {
        "pair": {f"{BLOCK}.lora_A.weight": (2, 4), f"{BLOCK}.lora_B.weight": (12, 2)},
        "bias beside a pair": {
            f"{BLOCK}.lora_A.weight": (2, 4), f"{BLOCK}.lora_B.weight": (12, 2),
            f"{BLOCK}.lora_B.bias": (12,),
        },
        "whole weight": {
            f"{BLOCK}.lora_A.weight": (2, 4), f"{BLOCK}.lora_B.weight": (12, 2),
            "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
        },
    },
    "cloneofsimo": {
        "pair": {f"text_encoder:{i}:{h}": (2, 4) if h == "down" else (4, 2)
                 for i in range(4) for h in ("up", "down")},
    },
    "comfy": {
        "pair": {f"diffusion_model.{BLOCK}.lora_A.weight": (2, 4),
                 f"diffusion_model.{BLOCK}.lora_B.weight": (12, 2)},
        "convolution": {"diffusion_model.img_in.lora_A.weight": (2, 4, 3, 3),
                        "diffusion_model.img_in.lora_B.weight": (12, 2, 1, 1)},
        "DoRA by rows": {f"diffusion_model.{BLOCK}.lora_A.weight": (2, 4),
                         f"diffusion_model.{BLOCK}.lora_B.weight": (12, 2),
                         f"diffusion_model.{BLOCK}.dora_scale": (12, 1)},
        "DoRA by columns": {f"diffusion_model.{BLOCK}.lora_A.weight": (2, 4),
                            f"diffusion_model.{BLOCK}.lora_B.weight": (12, 2),
                            f"diffusion_model.{BLOCK}.dora_scale": (1, 4)},
        "difference": {f"diffusion_model.{BLOCK}.diff": (12, 4)},
        "bias beside a pair": {f"diffusion_model.{BLOCK}.lora_A.weight": (2, 4),
                               f"diffusion_model.{BLOCK}.lora_B.weight": (12, 2),
                               f"diffusion_model.{BLOCK}.diff_b": (12,)},
        "bias alone": {f"diffusion_model.{BLOCK}.diff_b": (12,)},
        "whole weight": {f"diffusion_model.{BLOCK}.set_weight": (12, 4)},
    },
    "loralib": {
        "pair": {"layers.0.q_proj.lora_A": (2, 4), "layers.0.q_proj.lora_B": (6, 2)},
        "embedding": {"wte.lora_A": (2, 9), "wte.lora_B": (4, 2)},
        "whole weight": {"layers.0.q_proj.lora_A": (2, 4), "layers.0.q_proj.lora_B": (6, 2),
                         "classifier.weight": (3, 4)},
    },
    "nemo": {
        "pair": {"decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight": (2, 4),
                 "decoder.layers.0.mlp.linear_fc2.adapter.linear_out.weight": (6, 2)},
    },
    "olive": {
        "pair": {"base_model.model.layers.0.q_proj.lora_A.weight": (4, 2),
                 "base_model.model.layers.0.q_proj.lora_B.weight": (2, 6)},
    },
    "raw": {
        "pair": {"layers.0.q_proj.lora_down": (2, 4), "layers.0.q_proj.lora_up": (6, 2)},
        "convolution": {"layers.0.conv.lora_down": (2, 4, 3, 3),
                        "layers.0.conv.lora_up": (6, 2, 1, 1)},
        "embedding": {"wte.lora_embedding_A": (2, 9), "wte.lora_embedding_B": (4, 2)},
        "DoRA by rows": {"layers.0.q_proj.lora_down": (2, 4), "layers.0.q_proj.lora_up": (6, 2),
                         "layers.0.q_proj.dora_scale": (6, 1)},
        "whole weight": {"layers.0.q_proj.lora_down": (2, 4), "layers.0.q_proj.lora_up": (6, 2),
                         "classifier.weight": (3, 4)},
    },
    "xlabs": {
        "pair": {"double_blocks.0.processor.qkv_lora1.down.weight": (2, 4),
                 "double_blocks.0.processor.qkv_lora1.up.weight": (12, 2)},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A delta of a column, with what stands beside it."""

    key: str
    deltas: dict[str, Kind]
    transposed: bool = False


def _tensor(*shape: int) -> Leaf:
    return Leaf.of("x", torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape))


def case(column: str, vocabulary: str) -> Case:
    """The delta that stands for a column."""
    module, table = MODULES[vocabulary]
    weight, bias = f"{module}.weight", f"{module}.bias"
    pair = LowRank(_tensor(2, 4), _tensor(6, 2), 1.0, 2.0)
    kinds: dict[str, tuple[str, Kind]] = {
        "pair": (weight, pair),
        "convolution": (weight, LowRank(_tensor(2, 4, 3, 3), _tensor(6, 2, 1, 1), 1.0, 2.0)),
        "embedding": (f"{table}.weight", LowRank(_tensor(2, 9), _tensor(4, 2), 1.0, 2.0)),
        "DoRA by rows": (weight, Renormed(pair, _tensor(6))),
        "DoRA by columns": (weight, Renormed(pair, _tensor(4), "in")),
        "difference": (weight, Dense(_tensor(6, 4))),
        "bias beside a pair": (bias, Dense(_tensor(6))),
        "bias alone": (bias, Dense(_tensor(6))),
        "whole weight": (weight, Replace(_tensor(6, 4))),
        "rows of a table": (f"{table}.weight", Replace(_tensor(2, 4), (1, 3))),
    }
    key, delta = kinds[column]
    beside: dict[str, Kind] = {weight: pair} if column == "bias beside a pair" else {}
    return Case(key, {**beside, key: delta}, column in ("embedding",))


def cell(name: str, column: str, reasons: dict[str, int]) -> str:
    """What a format does with a kind of delta."""
    form = formats.FORMATS[formats.NAMES.index(name)]
    if name not in formats.WRITERS:
        given = READ[name].get(column)
        return "" if given is None else _is_read(name, column, given)
    one = case(column, form.VOCABULARY)
    adapter = Adapter(
        one.deltas, format=name, vocabulary=form.VOCABULARY, name="a",
        config={"gguf_architecture": "llama"},
        transposed=frozenset({one.key}) if one.transposed else frozenset(),
    )  # fmt: skip
    errors = [p for p in form.lost(adapter) if p.severity == "error"]
    if errors:
        said = errors[0].message.replace(one.key, "it").removeprefix("it: ")
        return f"{reasons.setdefault(said, len(reasons) + 1)}"
    with TemporaryDirectory() as folder:
        place = Path(folder) / f"a{form.SUFFIX or ''}"
        if form.SUFFIX is None:
            place.mkdir()
        form.write(adapter, place)
        back = formats.read(place)
        assert formats.ALIASES.get(back.format, back.format) == name, (name, column, back.format)
        _same(adapter.deltas[one.key], back.deltas[one.key])
    return "read, written"


def _same(old: Kind, new: Kind) -> None:
    assert type(old) is type(new), (old, new)
    for one, other in zip(leaves(old), leaves(new), strict=True):
        assert torch.equal(one.tensor().flatten(), other.tensor().flatten())


def _is_read(name: str, column: str, given: dict[str, tuple[int, ...]]) -> str:
    """`read`, after it was."""
    tensors = {k: _tensor(*shape).tensor() for k, shape in given.items()}
    with TemporaryDirectory() as folder:
        if name in ("bfl", "cloneofsimo", "comfy", "xlabs", "nemo", "olive"):
            file = Path(folder) / "a.safetensors"
            save_file(tensors, file)
        else:
            file = Path(folder) / "a.pt"
            torch.save(tensors, file)
        form = formats.FORMATS[formats.NAMES.index(name)]
        assert form.detect(local(file)), (name, column)
        found = form.read(local(file), assume={"alpha": "2"} if name != "olive" else {}).deltas
    kinds = {type(delta) for delta in found.values()}
    wanted = type(case(column, "hf").deltas[case(column, "hf").key])
    assert wanted in kinds, (name, column, kinds)
    return "read"


def page() -> str:
    """The whole page in Markdown."""
    return HEAD + "\n".join([*_kinds(), CONVERSIONS, *_conversions()]) + "\n"


def _kinds() -> Iterator[str]:
    reasons: dict[str, int] = {}
    yield ""
    yield f"| format | {' | '.join(COLUMNS)} |"
    yield f"|---|{'---|' * len(COLUMNS)}"
    for name in [*formats.WRITERS, *sorted(set(formats.NAMES) - set(formats.WRITERS))]:
        cells = [cell(name, column, reasons) for column in COLUMNS]
        yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""
    yield "`mlx` holds whole weights in an adapter that has nothing else.\n"
    for said, number in reasons.items():
        yield f"{number}. {said}"


def _conversions() -> Iterator[str]:
    only = ", ".join(sorted(LANGUAGE_ONLY))
    for title, table in (("language", LANGUAGES), ("image", IMAGES)):
        columns = list(dict.fromkeys(y for _, y in table))
        yield f"\n### Adapters of {title} models\n"
        if title == "image":
            yield f"Of language models alone: {only}.\n"
        yield f"| from | {' | '.join(columns)} |"
        yield f"|---|{'---|' * len(columns)}"
        for x in dict.fromkeys(x for x, _ in table):
            yield f"| `{x}` | {' | '.join(table[x, y] for y in columns)} |"


if __name__ == "__main__":
    sys.stdout.write(page())
