"""Names of modules in transformers 5 beside those in checkpoints, which kept the older ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# (in memory, on disk), whole pieces of a name, in the order in which they are replaced; "^" is the
# front (transformers:conversion_mapping.py, 5.23). An adapter has the names of the library that it
# was trained with, a base those of the library that saved it.
_QKV = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)
_VISION = (*_QKV, ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"))
_STAGE = (
    ("patch_embeddings", "patch_embeddings"),
    ("blocks", "block"),
    ("layer_norm", "layer_norm"),
)
_LANGUAGE = (
    ("^.model.language_model", "^.language_model.model"),
    ("^.lm_head", "^.language_model.lm_head"),
    ("^.model.vision_tower", "^.vision_tower"),
    ("^.model.vision_model", "^.vision_model"),
    ("^.model.audio_tower", "^.audio_tower"),
    ("^.model.image_tower", "^.image_tower"),
    ("^.model.video_tower", "^.video_tower"),
    ("^.model.multi_modal_projector", "^.multi_modal_projector"),
)
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": (("layers", "encoder.layer"), *_VISION),
    "dinov2": _QKV,
    "swin": (
        ("attention.q_proj", "attention.self.query"),
        ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"),
        (
            "attention.relative_position_bias.relative_position_bias_table",
            "attention.self.relative_position_bias_table",
        ),
        *_VISION[3:],
    ),
    "segformer": (
        *((f"stages.{i}.{new}", f"encoder.{old}.{i}") for i in range(4) for new, old in _STAGE),
        ("attention.q_proj", "attention.self.query"),
        ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"),
        ("attention.sequence_reduction.sequence_reduction", "attention.self.sr"),
        ("attention.sequence_reduction.layer_norm", "attention.self.layer_norm"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "mlp.dense1"),
        ("mlp.fc2", "mlp.dense2"),
        ("layernorm_before", "layer_norm_1"),
        ("layernorm_after", "layer_norm_2"),
        ("decode_head.linear_projections", "decode_head.linear_c"),
    ),
    "detr": (
        ("^.model.backbone", "^.model.backbone.conv_encoder"),
        ("o_proj", "out_proj"),
        ("mlp.fc1", "fc1"),
        ("mlp.fc2", "fc2"),
    ),
    "gpt_neox": (("^.lm_head", "^.embed_out"),),
    "llava": _LANGUAGE,
    "qwen2_vl": (("^.model.language_model", "^.model"), ("^.model.visual", "^.visual")),
    "bert": (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
}


@dataclass(frozen=True, slots=True)
class Spelling:
    """A rewriting of names from memory to disk, or back."""

    family: str
    back: bool = False

    def __call__(self, name: str) -> str:
        text = f".^.{name}."
        for memory, disk in FAMILIES[self.family]:
            old, new = (disk, memory) if self.back else (memory, disk)
            text = text.replace(f".{old}.", f".{new}.")
        return text[3:-1]

    def __str__(self) -> str:
        return f"{self.family}'s names {'as in transformers 5' if self.back else 'as on disk'}"


def spellings() -> Iterator[Spelling]:
    """Every family's names, both ways."""
    for family in FAMILIES:
        yield Spelling(family)
        yield Spelling(family, back=True)
