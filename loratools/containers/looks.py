"""What a file is that is not what its name says, by its first bytes and by its tensors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice

from loratools.errors import shown

POINTER = b"version https://git-lfs"


def what_it_is(head: bytes) -> str | None:
    """What a file is, in words, from its first bytes; None where they do not tell."""
    if head.startswith(POINTER):
        return "a git-lfs pointer; run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page; download the file itself (on the Hub: /resolve/, not /blob/)"
    for magic, sort in _MAGIC:
        if head.startswith(magic):
            return sort
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[4:8] == b"TORT":
        return "an onnxruntime adapter; name it .onnx_adapter"
    return None


def not_the_file(head: bytes) -> str | None:
    """What stands in place of a file that was not really downloaded: a pointer, a web page."""
    if head.startswith(POINTER):
        size = re.search(rb"\nsize (\d{1,18})\n", head[:1000])
        how = f"the file itself has {int(size[1])} bytes" if size else "the file is elsewhere"
        return f"is a git-lfs pointer, {how}; run `git lfs pull`"
    said = what_it_is(head) or ""
    return f"is {said}" if said.startswith("a web page") else None


_MAGIC = (
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"PK\x03\x04", "a zip archive (a torch .pt or .bin by another name?)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"GGUF", "GGUF; name it .gguf"),
    (b"\x28\xb5\x2f\xfd", "zstd; unpack it first"),
    (b"BZh", "bzip2; unpack it first"),
    (b"\xfd7zXZ", "xz; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "HDF5"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
    (b"{", "JSON text"),
)

# ------------------------------------------------------------------------------- by tensor names

_ROOT = r"^(?:model\.diffusion_model\.|diffusion_model\.|transformer\.|model\.|net\.)?"

# What a set of tensors is, first hit first: words, and patterns each of which some name must match.
# Names: diffusers src/diffusers/models, Stability-AI/generative-models, black-forest-labs/flux,
# lllyasviel/ControlNet, tencent-ailab/IP-Adapter, TencentARC/T2I-Adapter, xinntao/Real-ESRGAN.
LOOKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a textual-inversion embedding", (r"^(?:emb_params|string_to_param.*|<.+>)$",)),
    ("textual-inversion embeddings in a bundle", (r"^bundle_emb\.",)),
    ("a ControlNet-LLLite", (r"^lllite_",)),
    (
        "a ControlNet",
        (
            r"^(?:control_model\.|controlnet_(?:cond_embedding|down_blocks|mid_block|blocks|"
            r"x_embedder)\b|pos_embed_input\.|(?:model\.)?(?:input_hint_block|zero_convs)\.|"
            r"lora_controlnet$)",
        ),
    ),
    (
        "an IP-Adapter",
        (r"^(?:ip_adapter\b|ip_adapter_proj_model\.|image_proj(?:_model)?\.)|\.ip_adapter_\w",),
    ),
    ("a T2I-Adapter", (r"^(?:adapter\.)?body\.\d+\.(?:block1|in_conv|resnets)\b",)),
    ("optimizer state, left over from training", (r"^(?:param_groups|state\.\d+\.)|\bexp_avg\b",)),
    (
        "tensors of an adapter in a layout that loratools does not know",
        (r"(?i)\blora[_.]|_lora\d?(?:\.|$)|[_.]lora[_.]|lokr_|hada_w|\boft_|dora_scale|\.adapters?\.",),
    ),
    (
        "a base model (a single-file image checkpoint), not an adapter",
        (r"^model\.diffusion_model\.", r"^(?:first_stage_model|cond_stage_model|conditioner)\."),
    ),
    ("a VAE", (_ROOT + r"encoder\.conv_?(?:in|1)\.", _ROOT + r"decoder\.conv_?(?:in|1)\.")),
    ("a VAE", (r"^first_stage_model\.",)),
    (
        "a diffusion U-Net (one component of an image model)",
        (r"^(?:unet\.)?down_blocks\.0\.", r"^(?:unet\.)?(?:time_embedding|conv_in)\."),
    ),
    ("a diffusion U-Net (one component of an image model)", (_ROOT + r"input_blocks\.0\.0\.",)),
    (
        "a diffusion transformer (one component of an image or video model)",
        (
            _ROOT + r"(?:double_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|"
            r"single_blocks|noise_refiner|txtfusion|double_layers)\.(?!.*self_attn\.q_proj)",
        ),
    ),
    (
        "a diffusion transformer (one component of an image or video model)",
        (
            _ROOT + r"blocks\.\d+\.(?:self_attn|cross_attn|attn\d?|adaln_modulation\w*|mod)\b",
            _ROOT + r"(?:patch_embedding|x_embedder|time_embedding|t_embedder|condition_embedder|"
            r"adaln_\w+|first|txtfusion|tmlp|proj_out|final_layer|blocks\.\d+\.(?:cross_attn|attn2|"
            r"scale_shift_table|modulation))\b",
        ),
    ),
    (
        "a text encoder (CLIP; one component of an image model)",
        (r"(?:^|\.)(?:text_model\.encoder\.layers|model\.transformer\.resblocks)\.0\.",),
    ),
    (
        "a text encoder (T5)",
        (r"(?:^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.",),
    ),
    (
        "an upscaler",
        (
            r"^(?:params(?:_ema)?\.)?(?:model\.0\.weight|conv_first\.)",
            r"(?i)rdb1?|residual_group|\.sub\.",
        ),
    ),
    (
        "a base model (weights of a language model or an encoder), not an adapter",
        (
            r"(?:^|\.)(?:layers?|h|blk|blocks?)\.\d+\.(?:self_attn|self_attention|attn|attention|"
            r"linear_attn|mlp|mixer|attn_q|ffn_up|crossattention|layer)\b",
        ),
    ),
    (
        "a convolutional network, not an adapter",
        (r"(?:^|[._])(?:conv\d*(?:_\d)?|features|layer\d)\.",),
    ),
)  # fmt: skip

_LISTED = 3


def what_weights(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tensors with these names and shapes are, in words; where nothing tells, their names."""
    if not shapes:
        return "an empty set of tensors"
    if _embeddings(shapes):
        return "a textual-inversion embedding"
    text = "\n".join(shapes)
    for words, patterns in LOOKS:
        if all(re.search(p, text, re.MULTILINE) for p in patterns):
            return f"{words} ({named(shapes)})" if "does not know" in words else words
    return f"weights of an unknown sort ({named(shapes)})"


def named(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The first names with their shapes, and how many more there are."""
    first = [f"{shown(n)[:60]} {list(s)}" for n, s in islice(shapes.items(), _LISTED)]
    more = len(shapes) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _embeddings(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    # SDXL's clip_l and clip_g, or a lone matrix of a few rows named after its token.
    if set(shapes) in ({"clip_l", "clip_g"}, {"clip_l"}, {"clip_g"}, {"t5xxl"}):
        return True
    (shape, *rest) = shapes.values()
    (name, *_) = shapes
    flat = len(shape) == 1 or (len(shape) == 2 and shape[0] <= 128)
    return not rest and flat and shape[-1] in (768, 1024, 1280, 4096) and "." not in name


# ------------------------------------------------------------------------------- GGUF and ONNX


def what_gguf(sort: object, arch: object) -> str:
    """What a GGUF file holds, from its general.type and general.architecture."""
    of = f", {shown(arch)}" if isinstance(arch, str) and arch else ""
    match sort:
        case "adapter":
            return f"a GGUF adapter{of}, of a type that loratools does not know"
        case "imatrix":
            return "an importance matrix of llama.cpp"
        case "mmproj":
            return f"a multimodal projector (GGUF{of})"
        case _:
            return f"a base model (GGUF{of}), not an adapter"


def is_onnx(head: bytes) -> bool:
    """Whether bytes begin like an ONNX ModelProto: ir_version (field 1), then another field.

    onnx/onnx: onnx/onnx.proto.
    """
    if len(head) < 4 or head[0] != 0x08 or not 1 <= head[1] <= 20:
        return False
    return head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72)
