"""What readers of plain state dicts share: which file it is, its tensors, what was assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from loratools.adapter import Kind, Leaf, Replace
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats.reading import Reading, contents, unwrapped

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What a trainer leaves beside weights.
LEFTOVERS = frozenset(
    "optimizer.pt optimizer.bin scheduler.pt scheduler.bin scaler.pt rng_state.pth "
    "training_args.bin random_states_0.pkl".split()
)
# Modules whose weight is a table: stored (in, out), one row for each of `in`.
TABLES = frozenset(
    "embed_tokens tok_embeddings word_embeddings position_embeddings token_type_embeddings "
    "token_embedding position_embedding embed_in embed_positions wte wpe".split()
)
_SHARED = ("shared", "model.shared")  # T5's and BART's; elsewhere the word means other things


def weights_in(bundle: Bundle) -> str | None:
    """The file of weights: the one named, or the only one of a folder."""
    if bundle.chosen is not None:
        return bundle.chosen if bundle.chosen.endswith(SUFFIXES) else None
    found = [n for n in bundle.names if n.endswith(SUFFIXES) and n not in LEFTOVERS]
    safe = [n for n in found if n.endswith(".safetensors")]
    some = safe or found
    return some[0] if len(some) == 1 else None


def others_in(bundle: Bundle, file: str) -> list[str]:
    """The other files of weights in a folder, which one of safetensors came before."""
    found = [n for n in bundle.names if n.endswith(SUFFIXES) and n not in LEFTOVERS]
    return [n for n in found if n != file]


def keys_of(bundle: Bundle) -> tuple[str, ...]:
    """The keys of the bundle's weights; none where it has no file of weights that can be read."""
    name = weights_in(bundle)
    if name is None:
        return ()
    try:
        return tuple(contents(bundle, name)[0])
    except LoratoolsError:
        return ()


def unwrapped_all(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Tensors by their keys without wrappers; MalformedError where two keys become one."""
    found: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        name = unwrapped(key)
        if name in found:
            raise error(
                "duplicate", f"{shown(key)} and {shown(found[name].name)} are the same parameter"
            )
        found[name] = leaf
    return found


def flag(assume: Mapping[str, str], key: str) -> bool | None:
    """A yes or no given by `--assume key=`; a usage error where it is neither."""
    said = flags(assume, key)
    if said is not None and len(said) != 1:
        raise error("usage", f"--assume {key}={shown(assume[key])}: expected true or false")
    return None if said is None else said[0]


def flags(assume: Mapping[str, str], key: str) -> tuple[bool, ...] | None:
    """A list of them: `true,false,true`."""
    said = assume.get(key)
    if said is None:
        return None
    words = [word.strip().lower() for word in said.split(",")]
    if not set(words) <= {"true", "false"} or len(words) > 64:
        raise error("usage", f"--assume {key}={shown(said)}: expected true or false, or a list")
    return tuple(word == "true" for word in words)


def is_table(module: str, assume: Mapping[str, str]) -> bool:
    """Whether a module is an embedding: by its name, or as `--assume embedding=NAME,...` says."""
    named = assume.get("embedding", "").split(",")
    listed = any(fnmatchcase(module, name.strip()) for name in named if name.strip())
    return listed or module in _SHARED or module.rpartition(".")[2] in TABLES


def ask(reading: Reading, code: str, message: str, remedy: str, target: str | None = None) -> None:
    """A problem that `--assume` solves; the next step says how."""
    reading.problems.append(Problem(code, message, "error", reading.name, target, remedy))


def alpha_of(reading: Reading) -> float | None:
    """The alpha that was assumed; where none was, a problem that asks for it."""
    alpha = reading.number("alpha")
    if alpha is None:
        message = f"{shown(reading.name)} does not say its alpha"
        ask(reading, "alpha_missing", message, "--assume alpha=16 (from the training script)")
    return alpha


def take_full(reading: Reading, full: Mapping[str, Leaf], what_merges: str) -> None:
    """Parameters in full: new values; under a pair, the layer's own weight, merged or not.

    `what_merges` tells when the program that wrote the file would have merged the pair already.
    """
    merged = flag(reading.assume, "merged")
    both = [key for key in full if key in reading.deltas]
    for key, leaf in full.items():
        upon: Kind | None = None if merged else reading.deltas.get(key)
        reading.deltas[key] = Replace(leaf, None, upon)
    if both and merged is None:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        ask(
            reading,
            "already_merged",
            f"{shown(both[0])}{more} stands beside its update: {what_merges}",
            "--assume merged=true or merged=false",
            both[0],
        )


def note_rest(reading: Reading, extras: Iterable[str], file: str) -> None:
    """What in the file is no tensor, and names that no module can have."""
    reading.extras(extras, file)
    for key in reading.deltas:
        if not key.isprintable() or key.startswith(".") or "." not in key:
            message = f'"{shown(key)}" is no name of a module\'s parameter'
            reading.problem("malformed", message, shown(key))
