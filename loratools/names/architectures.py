"""The image models that adapters are made for: how trainers call them, and their modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from loratools.errors import LoratoolsError, error, shown
from loratools.names import clip, dit, flux, hunyuan, unet
from loratools.names.rules import Found, Names, Rule, pattern

ORIGINAL = "diffusion_model"  # the component of what makes the image, in the original vocabulary


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder: kohya's prefix for it, diffusers' component, its modules' names."""

    prefix: str
    component: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of image model.

    `modelspec` stands before "/lora" in modelspec.architecture, `version` in
    ss_base_model_version (empty where no trainer of kohya's knows the model); `kohya` is the
    vocabulary whose names these trainers mangle; `width` is that of the text in a U-Net. `of`:
    another that is meant where nothing tells the two apart. `depths`: how many blocks, and single
    blocks, those have that are published; only where other models have the same names. `apart`: the
    rules of original names in use that are not those of `rules`.
    """

    name: str
    modelspec: str
    version: str
    rules: Callable[[], tuple[Rule, ...]]
    encoders: tuple[Encoder, ...] = ()
    denoiser: str = "transformer"
    kohya: Literal["diffusers", "original"] = "original"
    width: int | None = None
    of: str = ""
    depths: tuple[tuple[int, int], ...] = ()
    apart: Callable[[], tuple[Rule, ...]] | None = None


_TE = Encoder("lora_te", "text_encoder", clip.CLIP)
_TE1 = Encoder("lora_te1", "text_encoder", clip.CLIP)
_TE2 = Encoder("lora_te2", "text_encoder_2", clip.CLIP)
_DECODER = Encoder("lora_te", "text_encoder", clip.DECODER)
# OneTrainer writes Flux's T5 as lora_te2, kohya as lora_te3; the first of a component is written.
_T5 = (
    Encoder("lora_te3", "text_encoder_2", clip.T5),
    Encoder("lora_te2", "text_encoder_2", clip.T5),
)
_SD3 = (_TE1, _TE2, Encoder("lora_te3", "text_encoder_3", clip.T5))

# Ids and versions are what kohya's trainers write
# (sd-scripts:library/sai_model_spec.py, musubi-tuner:utils/sai_model_spec.py).
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("sd1", "stable-diffusion-v1", "sd_v1", unet.sd1, (_TE,), "unet", "diffusers", 768),
    Architecture(
        "sd2",
        "stable-diffusion-v2-512",
        "sd_v2",
        unet.sd2,
        (_TE,),
        "unet",
        "diffusers",
        1024,
        "sd1",
    ),
    Architecture(
        "sdxl",
        "stable-diffusion-xl-v1-base",
        "sdxl_base_v1-0",
        unet.sdxl,
        (_TE1, _TE2),
        "unet",
        width=2048,
    ),
    Architecture(
        "sdxl-refiner",
        "stable-diffusion-xl-v1-refiner",
        "",
        unet.refiner,
        (_TE2,),
        "unet",
        width=1280,
        of="sdxl",
    ),
    Architecture("flux", "flux-1-dev", "flux1", flux.flux, (_TE1, *_T5), depths=((19, 38),)),
    Architecture("chroma", "chroma", "chroma", flux.chroma, _T5, of="flux", depths=((19, 38),)),
    Architecture(
        "sd3", "stable-diffusion-3-medium", "medium", dit.sd3, _SD3, depths=((24, 0), (38, 0))
    ),
    Architecture(
        "flux2", "Flux.2-dev", "flux_2_dev", flux.flux2, depths=((8, 48), (8, 24), (5, 20))
    ),
    Architecture("wan", "wan2.1", "wan", dit.wan),
    Architecture(
        "qwen-image",
        "Qwen-Image",
        "qwen_image",
        dit.qwen_image,
        kohya="diffusers",
        depths=((60, 0),),
    ),
    Architecture(
        "z-image", "Z-Image", "z_image", dit.z_image, kohya="diffusers", apart=dit.z_image_apart
    ),
    Architecture("lumina2", "lumina-2", "lumina2", dit.lumina2, (_DECODER,)),
    Architecture(
        "hunyuan-video", "hunyuan-video", "hunyuan_video", hunyuan.video, depths=((20, 40),)
    ),
    Architecture(
        "hunyuan-image",
        "hunyuan-image-2.1",
        "hunyuan-image-2.1",
        hunyuan.image,
        depths=((20, 40),),
        apart=hunyuan.image_apart,
    ),
    Architecture("anima", "anima-preview", "anima", dit.anima, (_DECODER,)),
    Architecture("cosmos", "", "", dit.cosmos, of="anima"),
    Architecture("krea2", "Krea-2", "krea2", dit.krea2),
    Architecture(
        "stable-cascade",
        "",
        "",
        unet.cascade,
        (Encoder("lora_prior_te", "text_encoder", clip.CLIP),),
        "prior",
        "diffusers",
    ),
)
BY_NAME = {each.name: each for each in ARCHITECTURES}
TEXT = ("attn2.to_k", "attn2_to_k", "attn2.to_v", "attn2_to_v")  # modules of a U-Net as wide

# How the metadata of variants begins: sd_v1_v, stable-diffusion-3-5-large, flux-1-schnell.
_FAMILIES = {
    "sd1": ("stable-diffusion-v1", "sd_v1", "sd_1."),
    "sd2": ("stable-diffusion-v2", "sd_v2", "sd_2."),
    "sdxl": ("stable-diffusion-xl", "sdxl"),
    "sd3": ("stable-diffusion-3", "sd3"),
    "flux": ("flux-1", "flux1"),
    "flux2": ("Flux.2", "flux_2"),
    "wan": ("wan",),
    "qwen-image": ("Qwen-Image", "qwen_image"),
}


@cache
def modules(name: str) -> Names:
    """An architecture's modules in both vocabularies, text encoders included.

    Of two original names for a module, a part's whole is that of `Architecture.rules`.
    """
    known = BY_NAME[name]
    rules = [*known.rules(), *(known.apart() if known.apart else ())]
    for encoder in known.encoders:
        rules += (Rule((each,), each) for each in spelt(encoder))
    return Names(rules)


@cache
def spelt(encoder: Encoder) -> tuple[str, ...]:
    """A text encoder's addresses; those of a CLIP with and without `text_model.`."""
    flat = (each.removeprefix(clip.MODEL) for each in encoder.names)
    names = dict.fromkeys((*encoder.names, *flat))
    return tuple(f"{encoder.component}.{each}" for each in names)


def owners(address: str) -> set[str]:
    """The names of the architectures that have a module, or a parameter, of this address."""
    found = set()
    for name in (address, address.rpartition(".")[0]):
        for template, architecture in _index().get(_blurred(name), ()):
            if template == name or ("{" in template and pattern(template).fullmatch(name)):
                found.add(architecture)
    return found


@cache
def _index() -> dict[str, list[tuple[str, str]]]:
    """Every template and whose it is, by its form without numbers; a norm is a module too."""
    index: dict[str, list[tuple[str, str]]] = {}
    for known in ARCHITECTURES:
        templates = {
            form: None
            for rule in modules(known.name).rules
            for name in (*rule.parts, rule.whole)
            for form in (name, re.sub(r"\.(weight|bias|scale)$", "", name))
        }
        for name in templates:
            index.setdefault(_blurred(name), []).append((name, known.name))
    return index


def _blurred(name: str) -> str:
    return ".".join(
        "#" if each.isdigit() or each.startswith("{") else each for each in name.split(".")
    )


def stated(metadata: Mapping[str, str]) -> str | None:
    """The architecture that a trainer's metadata names; it may be wrong."""
    spec = metadata.get("modelspec.architecture", "").partition("/")[0]
    version = metadata.get("ss_base_model_version", "")
    for known in ARCHITECTURES:
        if (spec and spec == known.modelspec) or (version and version == known.version):
            return known.name
    for known in ARCHITECTURES:
        family = _FAMILIES.get(known.name)
        if family and (spec.startswith(family) or version.startswith(family)):
            return known.name
    return None


class Alike:
    """The rules of several architectures, asked as one: where they differ nobody may guess."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known
        self.tables = [modules(name) for name in known]

    def of_part(self, name: str) -> Found | None:
        """As `Names.of_part`; `needs_base` where the architectures differ."""
        return self._one(name, [table.of_part(name) for table in self.tables])

    def of_whole(self, name: str) -> Found | None:
        """As `Names.of_whole`; `needs_base` where the architectures differ."""
        return self._one(name, [table.of_whole(name) for table in self.tables])

    def _one(self, name: str, found: Sequence[Found | None]) -> Found | None:
        said = {
            None if f is None else (f.parts, f.whole, f.part, f.rule.order, f.rule.sizes)
            for f in found
        }
        if len(said) > 1:
            raise several(name, self.known)
        return found[0]


def several(name: str, known: Sequence[str]) -> LoratoolsError:
    """The error of a name that several architectures have, each with another meaning."""
    return error(
        "needs_base",
        f"{shown(name)} may be a module of {', '.join(known)}, which call it differently; give "
        "the base (--base)",
    )
