"""Names of an image base's weights beside their addresses: component, module, parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loratools.names import clip
from loratools.names.architectures import BY_NAME, ORIGINAL, modules
from loratools.names.mangling import architecture, explaining
from loratools.names.rules import Names, Rule, asked

COMPONENTS = (
    "transformer", "unet", "prior", "text_encoder", "text_encoder_2", "text_encoder_3", "vae",
)  # fmt: skip
DENOISERS = (ORIGINAL, "transformer", "unet", "prior")  # one of these makes the image

# Where single files keep what makes the image (ComfyUI:model_detection.py; Cosmos, Anima: "net.").
WHOLE = (f"model.{ORIGINAL}.", "net.")
# Where they keep text encoders, by the component that has them in diffusers. SD1 and SDXL; SD2,
# SDXL and its refiner in OpenCLIP's names; SD3, Flux and the rest as ComfyUI saves them.
ENCODERS = {
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
    "text_encoders.gemma2_2b.transformer.model.": "text_encoder",
    "text_encoders.qwen3_06b.transformer.model.": "text_encoder",
}
_T5, _CLIP_G = "text_encoders.t5xxl.transformer.", "text_encoders.clip_g.transformer."
_OPENCLIP = ("transformer.resblocks.", "positional_embedding")


@dataclass(slots=True)
class Addresses:
    """An image base's weights by address, and the rules of what is fused in them."""

    here: Mapping[str, str]  # address → name
    names: Mapping[str, str] = field(init=False)  # name → address
    roots: frozenset[str] = field(init=False)  # the components that the base has, by all names
    fused: Names | None = None  # parts in diffusers' names; their wholes are addresses here
    architecture: str | None = None

    def __post_init__(self) -> None:
        self.names = {name: address for address, name in self.here.items()}
        roots = frozenset(address.partition(".")[0] for address in self.here)
        self.roots = roots.union(DENOISERS) if roots.intersection(DENOISERS) else roots

    @property
    def is_original(self) -> bool:
        """Whether what makes the image has its repository's names, not diffusers'."""
        return any(address.startswith(f"{ORIGINAL}.") for address in self.here)

    def name(self, address: str) -> str | None:
        """The name of the weight at an address, a CLIP's with or without `text_model.`."""
        component, _, rest = address.partition(".")
        other = rest.removeprefix(clip.MODEL) if rest.startswith(clip.MODEL) else clip.MODEL + rest
        return self.here.get(address) or self.here.get(f"{component}.{other}")

    def component(self, name: str) -> str | None:
        """diffusers' name of the component that a weight (or an address) belongs to."""
        root = self.names.get(name, name).partition(".")[0]
        if root == ORIGINAL:
            return BY_NAME[self.architecture].denoiser if self.architecture else "transformer"
        return root if root in self.roots else None

    def known_as(self, name: str) -> Iterator[str]:
        """What a weight may be called beside its name: its address, diffusers' name of it."""
        address = self.names.get(name, name)
        yield address
        component = self.component(name)
        if component is not None:
            yield f"{component}.{address.partition('.')[2]}"
        if address.startswith(f"{ORIGINAL}.") and self.architecture:
            found = asked(modules(self.architecture).of_whole, address)
            if found is not None and len(found[0].parts) == 1:
                yield found[0].parts[0] + found[1]


@dataclass(slots=True)
class Checkpoint:
    """The names of a base's weights; what they mean is found when somebody asks.

    `is_pipeline`: all names begin with their component. `hint`: the component that a folder is
    called after, where nothing else tells (text encoders look alike).
    """

    weights: Iterable[str]
    is_pipeline: bool = False
    hint: str = ""
    _found: list[Addresses | None] = field(default_factory=list)

    @property
    def addresses(self) -> Addresses | None:
        """The base's addresses; None where no known image architecture explains the names."""
        if not self._found:
            self._found.append(addresses_of(self.weights, self.is_pipeline, self.hint))
        return self._found[0]


def addresses_of(
    weights: Iterable[str], is_pipeline: bool = False, hint: str = ""
) -> Addresses | None:
    """The addresses of an image base; None where no known architecture explains the names."""
    listed = list(weights)
    if is_pipeline:
        return _settled({name: name for name in listed}, ())
    found: dict[str, str] = {}
    rules: list[Rule] = []
    inside: dict[str, list[str]] = {}
    bare: list[str] = []
    for name in listed:
        front = next((each for each in (*WHOLE, *ENCODERS) if name.startswith(each)), None)
        if front in WHOLE:
            found[f"{ORIGINAL}.{name.removeprefix(front)}"] = name
        elif front is not None:
            inside.setdefault(front, []).append(name)
        elif name.partition(".")[0] in (*COMPONENTS, ORIGINAL):
            found[name] = name
        else:
            bare.append(name)
    for front, names in inside.items():
        component = ENCODERS[front]
        if front == _T5 and (_CLIP_G in inside or any(_is_sd3(name) for name in found)):
            component = "text_encoder_3"
        here = {f"{component}.{name.removeprefix(front)}": name for name in names}
        found.update(here)
        if any(name.removeprefix(front).startswith(_OPENCLIP) for name in names):
            rules += clip.openclip(component, f"{component}.")
    if inside:
        return _settled(found, rules)
    if found or not bare:
        return _settled(found, ()) if known(found, decided=False) else None
    counts = {
        front: known([f"{front}.{name}" for name in bare], decided=False)
        for front in (ORIGINAL, *COMPONENTS)
    }
    front = max(counts, key=lambda each: (counts[each], each == hint))
    if counts[front] * 2 < len(bare):  # a stray equal name is no architecture
        return None
    return _settled({f"{front}.{name}": name for name in bare}, ())


def _is_sd3(address: str) -> bool:
    return address.startswith(f"{ORIGINAL}.joint_blocks.")


def _settled(found: Mapping[str, str], rules: Iterable[Rule]) -> Addresses:
    """Addresses with the rules of what is fused in them; those of a model with q, k, v apart."""
    denoiser = [name for name in found if name.partition(".")[0] in DENOISERS]
    meant = architecture(dict.fromkeys(name.rpartition(".")[0] for name in denoiser))
    own: tuple[Rule, ...] = ()
    if meant is not None and any(name.startswith(f"{ORIGINAL}.") for name in denoiser):
        entry = BY_NAME[meant]
        own = entry.rules()
        if entry.apart is not None and _matches(entry.apart(), found) > _matches(own, found):
            own = (*entry.apart(), *own)
    every = (*own, *rules)
    return Addresses(dict(found), Names(every) if every else None, meant)


def _matches(rules: Iterable[Rule], found: Mapping[str, str]) -> int:
    names = Names(rules)
    return sum(asked(names.of_whole, name) is not None for name in found)


def known(names: Iterable[str], *, decided: bool = True) -> int:
    """How many of these the architecture has that explains most of them.

    None where several explain as many, unless `decided` is false: text encoders look alike.
    """
    listed = list(names)
    found = explaining(dict.fromkeys(name.rpartition(".")[0] for name in listed))
    if not found or (decided and len(found) > 1):
        return 0
    table = modules(found[0])
    return sum(
        asked(table.of_part, name) is not None or asked(table.of_whole, name) is not None
        for name in listed
    )
