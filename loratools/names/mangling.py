"""Names whose dots became underscores (kohya, LyCORIS), found again among real or known ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from loratools.errors import Problem, error, shown
from loratools.names import clip
from loratools.names.architectures import (
    ARCHITECTURES,
    BY_NAME,
    ORIGINAL,
    TEXT,
    Architecture,
    owners,
)
from loratools.names.rules import filled, pattern

Meant = tuple[str, str]  # vocabulary, address

# Prefixes of what makes the image, by its component in diffusers; the first is written.
DENOISERS: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet", "lora_unet_", "lora_transformer"),  # lora_unet__: Wan Fun
    "prior": ("lora_prior_unet",),
}
WRAPPER = "lycoris"  # LyCORIS around any module of diffusers, SimpleTuner
_BLOCK = re.compile(
    r"(?:lora_unet_|lora_transformer_|lycoris_|transformer\.|diffusion_model\.)"
    r"(?:(single_)|double_|joint_)?(?:transformer_)?blocks[._]([0-9]{1,5})[._]"
)
_PARAMETERS = (".weight", ".bias", ".scale")


@dataclass(frozen=True, slots=True)
class Unmangled:
    """What mangled names mean: (vocabulary, address) by name, for which architecture.

    Names that nothing explains, or several things, are in `problems` and not in `found`.
    """

    found: Mapping[str, Meant]
    architecture: str | None
    problems: tuple[Problem, ...] = ()


@cache
def _templates(name: str) -> dict[str, tuple[tuple[str, Meant], ...]]:
    """An architecture's mangled templates and their meaning, by the name without its numbers."""
    entries: dict[str, dict[tuple[str, Meant], None]] = {}
    for text, meant in _spelt(BY_NAME[name]):
        entries.setdefault(_blurred(text, "{"), {})[text, meant] = None
    return {key: tuple(each) for key, each in entries.items()}


def _spelt(known: Architecture) -> Iterator[tuple[str, Meant]]:
    for rule in known.rules():
        whole = _module(rule.whole)
        for part in map(_module, rule.parts):
            component, _, module = part.partition(".")
            for prefix in (*DENOISERS.get(component, ()), WRAPPER):
                yield _mangle(prefix, module), ("diffusers", part)
        for prefix in DENOISERS[known.denoiser]:
            yield _mangle(prefix, whole.removeprefix(f"{ORIGINAL}.")), ("original", whole)
    for encoder in known.encoders:
        for module in encoder.names:
            meant = "diffusers", f"{encoder.component}.{module}"
            for each in dict.fromkeys((module, module.removeprefix(clip.MODEL))):
                yield _mangle(encoder.prefix, each), meant
                yield _mangle(WRAPPER, each), meant


def _mangle(prefix: str, module: str) -> str:
    return f"{prefix}_{module.replace('.', '_')}"


def _module(name: str) -> str:
    stem, dot, parameter = name.rpartition(".")
    return stem if dot + parameter in _PARAMETERS else name


def _blurred(name: str, also: str = "#") -> str:
    pieces = name.split("_")
    return "_".join("#" if each.isdigit() or each.startswith(also) else each for each in pieces)


def _meanings(known: Architecture, names: Iterable[tuple[str, str]]) -> dict[str, list[Meant]]:
    """What mangled names (with their blurred forms) mean in an architecture."""
    templates = _templates(known.name)
    meanings: dict[str, list[Meant]] = {}
    for name, blurred in names:
        for text, (vocabulary, template) in templates.get(blurred, ()):
            hit = pattern(text).fullmatch(name)
            if hit:
                numbers = {key[1:]: value for key, value in hit.groupdict().items()}
                meant = vocabulary, filled(template, numbers)
                meanings.setdefault(name, []).append(meant)
    vocabularies = Counter(
        each[0][0] for each in meanings.values() if len({v for v, _ in each}) == 1
    )
    # Where both vocabularies have a name it is the same weight; the one used elsewhere counts.
    usual = max(("diffusers", "original"), key=lambda v: (vocabularies[v], v == known.kohya))
    for name, options in meanings.items():
        if len({vocabulary for vocabulary, _ in options}) > 1:
            meanings[name] = [each for each in options if each[0] == usual]
    return meanings


def unmangled(
    names: Iterable[str], there: Collection[str] | None = None, *, architecture: str | None = None
) -> Unmangled:
    """What mangled module names mean, by the base's own names and those that are known.

    `there`: addresses of a base's modules, with their components (`unet.`, `text_encoder.`,
    `diffusion_model.`, ...). `architecture` decides only between some that explain equally many.
    """
    listed = [(name, _blurred(name)) for name in dict.fromkeys(names)]
    real = _real(there or ())
    meanings = {each.name: _meanings(each, listed) for each in ARCHITECTURES}
    counts = {name: len(hits) for name, hits in meanings.items()}
    best, meant = _best(counts, [name for name, _ in listed], architecture)
    found: dict[str, Meant] = {}
    problems: list[Problem] = []
    for name, _ in listed:
        options = real.get(name) or {
            option: None for each in best for option in meanings[each].get(name, ())
        }
        if len(options) == 1:
            found[name] = next(iter(options))
        else:
            elsewhere = [each for each in meanings if name in meanings[each]]
            problems.append(_problem(name, list(options), best, elsewhere))
    return Unmangled(found, meant, tuple(problems))


def _problem(name: str, options: list[Meant], best: list[str], elsewhere: list[str]) -> Problem:
    if options:
        said = " or ".join(sorted(shown(address) for _, address in options))
        message = f"{shown(name)} may be {said}; give the base that it was trained on (--base)"
    elif elsewhere:
        message = (
            f"{shown(name)} is a module of {', '.join(elsewhere)}, "
            f"the other names are those of {', '.join(best)}; two adapters in one file?"
        )
    else:
        message = (
            f"{shown(name)}: no module of a known architecture is written so; "
            "give the base that it was trained on (--base)"
        )
    return Problem("unexplained", message, target=name)


def _real(there: Collection[str]) -> dict[str, dict[Meant, None]]:
    """A base's addresses by every mangled form that they may have."""
    prefixes: dict[str, set[str]] = {ORIGINAL: set()}
    for component, denoisers in DENOISERS.items():
        prefixes[component] = {*denoisers, WRAPPER}
        prefixes[ORIGINAL].update(denoisers)
    clips: set[str] = set()
    for known in ARCHITECTURES:
        for encoder in known.encoders:
            prefixes.setdefault(encoder.component, {WRAPPER}).add(encoder.prefix)
            if encoder.names is clip.CLIP:
                clips.add(encoder.component)
    forms: dict[str, dict[Meant, None]] = {}
    for address in there:
        component, _, module = address.partition(".")
        vocabulary = "original" if component == ORIGINAL else "diffusers"
        spelt = {module}
        if component in clips:
            spelt |= {module.removeprefix(clip.MODEL), clip.MODEL + module}
        for prefix in prefixes.get(component, ()):
            for each in spelt:
                forms.setdefault(_mangle(prefix, each), {})[vocabulary, address] = None
    return forms


def mangled(address: str, architecture: str) -> str:
    """How kohya's trainers write the address of a module of this architecture.

    They write the vocabulary that `Architecture.kohya` names; CLIP with `text_model.`.
    """
    known = BY_NAME[architecture]
    component, _, module = address.partition(".")
    if component in (ORIGINAL, known.denoiser):
        return _mangle(DENOISERS[known.denoiser][0], module)
    for encoder in known.encoders:
        if encoder.component == component:
            full = clip.MODEL + module
            bare = encoder.names is clip.CLIP and module.partition(".")[0] in (
                "encoder",
                "embeddings",
            )
            return _mangle(encoder.prefix, full if bare else module)
    raise error(
        "loss",
        f"{shown(address)}: kohya's files have no place for {shown(component)} of {known.name}",
    )


def architecture(
    names: Iterable[str], widths: Mapping[str, int] | None = None, *, said: str | None = None
) -> str | None:
    """The architecture that explains most of these names of modules, of any vocabulary.

    `widths`: how many columns the weights of some have, which tells U-Nets of one layout apart;
    `said` decides only between some that explain equally many. None where none explains any, or
    several do and nothing decides.
    """
    return _explained(names, widths, said)[1]


def explaining(
    names: Iterable[str], widths: Mapping[str, int] | None = None, *, said: str | None = None
) -> list[str]:
    """Every architecture that explains most of these names, the one that is meant alone if any."""
    best, meant = _explained(names, widths, said)
    return best if meant is None else [meant]


def _explained(
    names: Iterable[str], widths: Mapping[str, int] | None, said: str | None
) -> tuple[list[str], str | None]:
    listed = dict.fromkeys(names)
    dotted = [each for each in listed if "." in each]
    plain = [(each, _blurred(each)) for each in listed if "." not in each]
    wide = {n for each, n in (widths or {}).items() if each.endswith(TEXT)}
    wide &= {known.width for known in ARCHITECTURES}  # a U-Net of another width is no stranger
    having = Counter(name for each in dotted for name in owners(each))
    counts = {
        known.name: len(_meanings(known, plain)) + having[known.name]
        for known in ARCHITECTURES
        if not wide or known.width is None or known.width in wide
    }
    return _best(counts, listed, said)


def _best(
    counts: Mapping[str, int], names: Iterable[str], said: str | None
) -> tuple[list[str], str | None]:
    """The architectures with the highest count, and the one that is meant, if one is."""
    most = max(counts.values(), default=0)
    best = [name for name, count in counts.items() if count and count == most]
    if said in best:
        return [said], said
    if len(best) > 1:
        depth = _depth(names)
        best = [name for name in best if _is_deep(BY_NAME[name], depth)] or best
    parents = [name for name in best if BY_NAME[name].of not in best]
    return best, parents[0] if len(parents) == 1 else None


def _depth(names: Iterable[str]) -> tuple[int, int]:
    """How many blocks, and single blocks, names speak of."""
    depth = [0, 0]
    for found in filter(None, map(_BLOCK.match, names)):
        single = found[1] is not None
        depth[single] = max(depth[single], int(found[2]) + 1)
    return depth[0], depth[1]


def _is_deep(known: Architecture, depth: tuple[int, int]) -> bool:
    """Whether a published model has exactly as many blocks, of the sorts that there are."""
    return any(depth) and any(
        all(n in (0, m) for n, m in zip(depth, each, strict=True)) for each in known.depths
    )
