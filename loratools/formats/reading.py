"""What all readers share: pairs put together and judged, problems by the name of the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter import FLOATS, Adapter, Dense, Experts, Kind, Leaf, LowRank, Renormed
from loratools.containers import npy, safetensors, torch_zip
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, Problem, Severity, error, shown
from loratools.views import reshaped

# What other programs leave in names: torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
USUAL = (1 / 1024, 64.0)  # scalings outside are warned of (design §5)
STATE_DICTS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(slots=True)
class Reading:
    """One adapter being read: its deltas so far, and the problems that its files have."""

    name: str
    assume: Mapping[str, str] = field(default_factory=dict)
    deltas: dict[str, Kind] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(
        self, code: str, message: str, target: str | None = None, severity: Severity = "error"
    ) -> None:
        """One more problem; the adapter's name is put to it."""
        self.problems.append(Problem(code, message, severity, self.name, target))

    def pair(
        self,
        module: str,
        a: Leaf | None,
        b: Leaf | None,
        *,
        alpha: float | None = None,
        scaling: float | None = None,
        magnitude: Leaf | None = None,
        axis: str = "out",
        bias: Leaf | None = None,
        words: tuple[str, str] = ("lora_A", "lora_B"),
    ) -> LowRank | None:
        """Take in a module's pair: A (rank, in, *kernel), B (out, rank[, 1, ...]).

        The scaling is `scaling`, or alpha/rank, or 1 where both are None. What does not fit
        becomes a problem of the module, which is then left out. `bias` is added to the module's
        bias, multiplied by the scaling.
        """
        down, up = words
        if a is None or b is None:
            if a is b:
                self.problem("missing", f"{shown(module)} has neither {down} nor {up}", module)
            else:
                here, lost = (up, down) if a is None else (down, up)
                self.problem("missing", f"{shown(module)} has {here} without {lost}", module)
            return None
        for leaf in (a, b, magnitude, bias):
            if leaf is not None and leaf.dtype not in FLOATS:
                raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")
        if not multiplies(a, b):
            self.problem(
                "shape_factors",
                f"{shown(module)}: {down} is {a.shape}, {up} is {b.shape}; expected "
                "(rank, in, ...) and (out, rank, ...) (an empty or flat factor is one part of a "
                "sharded save)",
                module,
            )
            return None
        if scaling is None:
            scaling = 1.0 if alpha is None else alpha / a.shape[0]
        self._judge_scaling(module, scaling, a.shape[0])
        found = LowRank(a, b, scaling, alpha)
        key = f"{module}.weight"
        self.deltas[key] = found
        if magnitude is not None:
            if magnitude.numel != (b.shape[0] if axis == "out" else math.prod(a.shape[1:2])):
                self.problem(
                    "shape_factors",
                    f"{shown(module)}: {magnitude.numel} magnitudes for an update of "
                    f"({b.shape[0]}, {a.shape[1]})",
                    module,
                )
            else:
                side = "out" if axis == "out" else "in"
                self.deltas[key] = Renormed(found, magnitude, side)  # type: ignore[arg-type]
        if bias is not None:
            self.deltas[f"{module}.bias"] = Dense(bias, scaling)
        return found

    def stack(
        self,
        module: str,
        a: Leaf,
        b: Leaf,
        *,
        scaling: float | None = None,
        alpha: float | None = None,
        words: tuple[str, str] = ("lora_A", "lora_B"),
    ) -> Experts | None:
        """Take in the factors of all experts of a weight: A (experts, rank, in), or flat
        (experts * rank, in), and B (experts, out, rank). The scaling is as in `pair`.
        """
        down, up = words
        for leaf in (a, b):
            if leaf.dtype not in FLOATS:
                raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")
        count, rank = (b.shape[0], b.shape[2]) if len(b.shape) == 3 else (0, 0)
        flat = len(a.shape) == 2 and a.shape[0] == count * rank
        if not (flat or a.shape[:-1] == (count, rank)) or 0 in (*a.shape, *b.shape):
            self.problem(
                "shape_factors",
                f"{shown(module)}: {down} is {a.shape}, {up} is {b.shape}; expected "
                "(experts, rank, in) and (experts, out, rank)",
                module,
            )
            return None
        if scaling is None:
            scaling = 1.0 if alpha is None else alpha / rank
        self._judge_scaling(module, scaling, rank)
        if flat:
            a = reshaped(a, count, rank, a.shape[1])
        found = Experts(a, b, scaling, alpha)
        self.deltas[f"{module}.weight"] = found
        return found

    def _judge_scaling(self, module: str, scaling: float, rank: int) -> None:
        if not math.isfinite(scaling):
            raise error("nonfinite", f"{shown(module)}: its scaling is {scaling}")
        if scaling == 0:
            message = f"{shown(module)}: alpha is 0, so its update is"
            self.problem("no_effect", message, module, "warning")
        elif not USUAL[0] <= abs(scaling) <= USUAL[1]:
            message = f"{shown(module)}: scaling {scaling:g} at rank {rank}"
            self.problem("scaling_unusual", message, module, "warning")

    def number(self, key: str) -> float | None:
        """A number given by `--assume key=`; a usage error where it is none."""
        said = self.assume.get(key)
        if said is None:
            return None
        try:
            value = float(said)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise error("usage", f"--assume {key}={shown(said)}: expected a number")
        return value

    def unexplained(self, keys: Sequence[str]) -> None:
        """Tensors that no rule of the format explains, each by name."""
        for key in keys:
            self.problem("unexplained", f"{shown(key)} is no tensor of this format", shown(key))

    def extras(self, keys: Iterable[str], file: str) -> None:
        """What a torch file holds beside its tensors: a note for each, by name."""
        for key in keys:
            message = f"{shown(key)} in {shown(file)} is no tensor and was not read"
            self.problem("unexplained", message, shown(key), "note")

    def mention(self, bundle: Bundle, file: str, others: Iterable[str]) -> None:
        """Files of the same weights beside the one read; nothing where the user named one."""
        if bundle.chosen is None:
            for other in others:
                if other != file:
                    message, severity = beside(bundle, file, other)
                    self.problem("unexplained", message, severity=severity)

    def adapter(
        self,
        bundle: Bundle,
        file: str,
        *,
        format: str,
        vocabulary: str,
        metadata: Mapping[str, str],
    ) -> Adapter:
        """The adapter that one file holds and no config explains."""
        problems = self.settle()
        return Adapter(
            deltas=self.deltas,
            format=format,
            vocabulary=vocabulary,
            metadata=metadata,
            name=bundle.name,
            folder=bundle.path,
            files=(file,),
            problems=problems,
            assumed=dict(self.assume),
        )

    def settle(self) -> tuple[Problem, ...]:
        """All problems at the end; an adapter without a delta has no effect."""
        zero = [d for d in self.deltas.values() if isinstance(d, LowRank) and d.scaling == 0]
        if self.deltas and len(zero) == len(self.deltas):
            self.problem("no_effect", f"every alpha of {shown(self.name)} is 0")
        if not self.deltas and not any(p.severity == "error" for p in self.problems):
            self.problem("no_effect", f"{shown(self.name)} holds no adapter tensors")
        return tuple(self.problems)


def multiplies(a: Leaf, b: Leaf) -> bool:
    """Whether (rank, in, *kernel) and (out, rank, 1, ...) are two factors of one update."""
    if len(a.shape) < 2 or len(b.shape) < 2 or 0 in a.shape or 0 in b.shape:
        return False
    flat = all(n == 1 for n in b.shape[2:])
    return a.shape[0] == b.shape[1] and flat and len(a.shape) in (len(b.shape), 2)


def number(leaf: Leaf) -> float:
    """The one number of a leaf such as an alpha; MalformedError where it holds several."""
    values = leaf.numbers() if leaf.numel == 1 else ()
    if len(values) != 1:
        raise error("malformed", f"{shown(leaf.name)} is {leaf.shape}, expected one number")
    return values[0]


def unwrapped(key: str) -> str:
    """A key without what DDP, FSDP and torch.compile put into names."""
    key = key.removeprefix("module.")
    if "_orig_mod" not in key and "_wrapped_module" not in key:  # nearly all keys: asked often
        return key
    return ".".join(p for p in key.split(".") if p not in WRAPPERS)


def contents(bundle: Bundle, name: str) -> tuple[dict[str, Leaf], dict[str, str], dict[str, Any]]:
    """The leaves of a safetensors, npz or torch file, its metadata, and what in it is no tensor."""
    source = bundle.open(name)
    match name.lower().rpartition(".")[2]:
        case "safetensors" | "sft":
            header = safetensors.read_header(source)
            return header.leaves, header.metadata, {}
        case "npz":
            return npy.arrays(source), {}, {}
        case _:
            file = torch_zip.state_dict(source)
            return dict(file.tensors), {}, dict(file.extras)


def twins(bundle: Bundle, file: str) -> list[str]:
    """The files of the same name in other containers: what a trainer or a converter saved twice."""
    stem = file.rpartition(".")[0]
    return [
        name
        for name in bundle.names
        if name.rpartition(".")[0] == stem and name != file and name.lower().endswith(STATE_DICTS)
    ]


def beside(bundle: Bundle, file: str, other: str) -> tuple[str, Severity]:
    """The words about a file of the same weights beside the one read, and how bad it is.

    A note; a warning where the keys of the two differ, or where the other cannot be read.
    """
    said = f"{shown(other)} lies beside {shown(file)} and was not read"
    try:
        there = contents(bundle, other)[0].keys()
    except LoratoolsError as cause:
        return f"{said}, nor could it be: {cause.message}", "warning"
    here = contents(bundle, file)[0].keys()
    if here == there:
        return said, "note"
    differing = ((there - here, other), (here - there, file))
    parts = [f"{len(k)} only in {shown(n)}, such as {shown(min(k))}" for k, n in differing if k]
    return f"{said}: their keys differ ({'; '.join(parts)})", "warning"
