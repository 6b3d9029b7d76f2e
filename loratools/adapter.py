"""The records that everything shares: leaves, kinds of delta, adapters, places; no maths."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loratools.errors import Problem, error

if TYPE_CHECKING:
    import torch

# Names as in safetensors; bits, so that 4-bit types have a size too.
DTYPE_BITS: dict[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

TORCH_NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_STORED_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}

_SMALL = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"}


class Source(Protocol):
    """Bytes that can be read at a place: a local file, a remote one, a zip member."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; StorageError where they cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor not yet read: its key, dtype and shape, and how to read it.

    Either `source` holds its bytes at `offset` (row-major, or with `strides` counted in
    elements), or `held` is the torch tensor itself, or `made` makes it when it is asked for
    (`loratools.views`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source | None = None
    offset: int = 0
    strides: tuple[int, ...] | None = None
    held: Any = field(default=None, repr=False, compare=False)
    made: Callable[[], Any] | None = field(default=None, repr=False, compare=False)
    scale: Leaf | None = field(default=None, repr=False, compare=False)  # of a base's fp8 weight

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.numel * DTYPE_BITS[self.dtype] + 7) // 8

    def read(self) -> bytes:
        """The tensor's bytes, row-major, little-endian."""
        if self.source is None:
            import torch

            flat = self.tensor().detach().cpu().contiguous().reshape(-1)
            flat = flat.as_strided(flat.shape, (1,))  # one element may have any stride
            return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
        if self.strides is None:
            return self.source.read(self.offset, self.nbytes) if self.nbytes else b""
        return Leaf.of(self.name, self.tensor()).read()

    def tensor(self) -> torch.Tensor:
        """The tensor in its own dtype and shape, on the CPU, owning its memory."""
        import torch

        if self.source is None:
            held: torch.Tensor = self.held if self.made is None else self.made()
            return held
        if self.dtype not in TORCH_NAMES:
            raise error("dtype_unusable", f"{self.name} is {self.dtype}, which torch cannot hold")
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        if self.numel == 0:
            return torch.empty(self.shape, dtype=dtype)
        if self.strides is None:
            raw = bytearray(self.source.read(self.offset, self.nbytes))
            return torch.frombuffer(raw, dtype=dtype).reshape(self.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        raw = bytearray(self.source.read(self.offset, span * DTYPE_BITS[self.dtype] // 8))
        flat = torch.frombuffer(raw, dtype=dtype)
        return flat.as_strided(self.shape, self.strides).contiguous()

    def numbers(self) -> tuple[float, ...]:
        """The values of a small real tensor (an alpha, say) without torch."""
        raw = self.read()
        if self.dtype == "BF16":
            return tuple(
                struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)
            )
        if self.dtype not in _SMALL:
            raise error("dtype_unusable", f"{self.name} is {self.dtype}, not a number")
        return tuple(v for (v,) in struct.iter_unpack(_SMALL[self.dtype], raw))

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Leaf:
        """A leaf that holds a tensor already in memory."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Leaf(name, _STORED_NAMES[dtype], tuple(tensor.shape), held=tensor)


# ---------------------------------------------------------------------------------------------
# Kinds: what a delta is. Shapes in (out, in) of the *module*; a convolution's kernel follows `in`.


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = scaling · B·A, with A (rank, in, *kernel), B (out, rank[, 1, ...]) (arXiv 2106.09685).

    `alpha` is the stored numerator, kept so that it can be written back unchanged.
    """

    a: Leaf
    b: Leaf
    scaling: float
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Dense:
    """ΔW = scaling · diff, for full diffs and for biases."""

    diff: Leaf
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class Hadamard:
    """ΔW = scaling · (W1a·W1b) ∘ (W2a·W2b) (LoHa, arXiv 2108.06098), in the weight's `shape`.

    W_a (out, rank) and W_b (rank, in * kernel); with cores t (rank, rank, *kernel) they are
    (rank, out) and (rank, in).
    """

    w1_a: Leaf
    w1_b: Leaf
    w2_a: Leaf
    w2_b: Leaf
    shape: tuple[int, ...]
    scaling: float
    alpha: float | None = None
    t1: Leaf | None = None
    t2: Leaf | None = None


@dataclass(frozen=True, slots=True)
class Kronecker:
    """ΔW = scaling · W1 ⊗ W2 (LoKr, arXiv 2309.14859), in the weight's `shape`.

    Either is whole, or a product of its factors a (rows, rank) and b (rank, columns); W2's with a
    core t2 (rank, rank, *kernel) as in `Hadamard`.
    """

    shape: tuple[int, ...]
    scaling: float
    alpha: float | None = None
    w1: Leaf | None = None
    w1_a: Leaf | None = None
    w1_b: Leaf | None = None
    w2: Leaf | None = None
    w2_a: Leaf | None = None
    w2_b: Leaf | None = None
    t2: Leaf | None = None


@dataclass(frozen=True, slots=True)
class Sparse:
    """ΔW = scaling · values at `indices` (2, n: rows and columns), zero elsewhere (SHiRA)."""

    values: Leaf
    indices: Leaf
    shape: tuple[int, ...]
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class Spectral:
    """ΔW made of a few coefficients by a fixed transform, which needs the whole weight at once.

    `method` names it (fourier, wavelet, circulant, ...), `parts` are what was trained.
    """

    method: str
    parts: Mapping[str, Leaf]
    shape: tuple[int, ...]
    scaling: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experts:
    """ΔW[e] = scaling · B[e]·A[e] of a weight (experts, out, in), one row of it to each expert.

    A (experts, rank, in), B (experts, out, rank). `over` says which side A is on, where a file
    leaves it to the base: the module's input or output, the stored weight's `first` axis, or
    nothing known ("").
    """

    a: Leaf
    b: Leaf
    scaling: float
    alpha: float | None = None
    over: Literal["in", "out", "first", ""] = "in"

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in)."""
        return (self.a.shape[0], self.b.shape[1], self.a.shape[2])


@dataclass(frozen=True, slots=True)
class Renormed:
    """W = m ∘ (W0 + ΔW) / ‖W0 + ΔW‖ (DoRA, arXiv 2402.09353).

    `axis` "out": one magnitude per output row, the norm over everything else (PEFT);
    "in": one per input column. `norm` is set by `algebra.prepare` where a first pass is needed.
    """

    delta: Additive
    magnitude: Leaf
    axis: Literal["out", "in"] = "out"
    norm: Leaf | None = None


@dataclass(frozen=True, slots=True)
class Scaled:
    """W = W0 ∘ (offset + factor), by rows, columns or elements ((IA)³, arXiv 2205.05638; HiRA).

    The factor is a vector, or (by elements) an additive delta.
    """

    by: Literal["rows", "columns", "elements"]
    factor: Leaf | Additive
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Rotated:
    """W = R·W0 ("out") or W0·Rᵀ ("in"), R orthogonal or nearly, made from `parts` by `method`.

    OFT (arXiv 2306.07280), BOFT (2311.06243), HRA (2405.17484), RoAd (2409.00119).
    """

    method: str
    side: Literal["out", "in"]
    parts: Mapping[str, Leaf]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chained:
    """W = W0 + a sum whose terms contain W0, by `method` (GLoRA, arXiv 2306.07967)."""

    method: str
    parts: Mapping[str, Leaf]
    scaling: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replace:
    """W = value, whole or only in `rows` (indices into the stored tensor's first axis).

    `then` is applied to the replaced weight (a LoRA, or trained rows, upon a resized embedding).
    """

    value: Leaf
    rows: tuple[int, ...] | None = None
    then: Kind | None = None


Made = Hadamard | Kronecker | Sparse | Spectral | Experts  # additive, each with a file in kinds/
Additive = LowRank | Dense | Made
Relative = Scaled | Rotated | Chained  # functions of W0, each with a file in kinds/
Kind = Additive | Renormed | Relative | Replace


def leaves(kind: Any) -> Iterator[Leaf]:
    """Every leaf of a delta, its inner delta's included."""
    for f in fields(kind):
        value = getattr(kind, f.name)
        if isinstance(value, Leaf):
            yield value
        elif isinstance(value, Kind):
            yield from leaves(value)
        elif f.name == "parts":
            yield from value.values()


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Needs:
    """What a base must have for a runtime adapter to run on it; None or empty: nothing asked."""

    hidden: int | None = None  # the width of its hidden states
    embedding: int | None = None  # the width of its input embeddings
    prefix: int | None = None  # 2 · layers · width of a layer's keys: one row of a prefix
    layers: int | None = None  # how many it has
    modules: tuple[str, ...] = ()  # layers by their paths
    tokens: int | None = None  # the greatest token id that it must know


@dataclass(frozen=True, slots=True)
class Runtime:
    """What acts where the model runs, and is no function of a weight; described, not computed.

    `tensors` are the method's own, by the keys of the file; `virtual` is what a prompt or a prefix
    comes to (tokens, width), `plain` the tensors of the plain bottleneck that a Compacter is.
    """

    method: str
    tensors: Mapping[str, Leaf]
    numbers: Mapping[str, Any]
    needs: Needs = field(default_factory=Needs)
    virtual: Leaf | None = None
    plain: Mapping[str, Leaf] = field(default_factory=dict)


class Original(dict[str, Leaf]):
    """A file's tensors by key, with the deltas that they are: another delta is seen to be one."""

    def __init__(self, tensors: Mapping[str, Leaf], deltas: Mapping[str, Kind]) -> None:
        super().__init__(tensors)
        self.deltas = dict(deltas)

    def are(self, deltas: Mapping[str, Kind]) -> bool:
        """Whether these are the very deltas that were read."""
        same = self.deltas.keys() == deltas.keys()
        return same and all(deltas[key] is delta for key, delta in self.deltas.items())


@dataclass(frozen=True, slots=True)
class Origin:
    """Where on the Hub something was read: one commit of a repository, and what was named in it."""

    repo: str
    commit: str
    inside: str = ""  # a folder or a file; "" is the whole repository

    def __str__(self) -> str:
        """As it is typed to get the same bytes again."""
        return f"{self.repo}@{self.commit}{':' if self.inside else ''}{self.inside}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as published: deltas by address, and everything its files said.

    A key of `deltas` is a module's name in the adapter's own `vocabulary`, a dot, and the
    parameter: `model.layers.0.self_attn.q_proj.weight`.
    """

    deltas: Mapping[str, Kind]
    format: str = "peft"
    vocabulary: str = "hf"
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str = "adapter"  # how messages call it: the path as typed
    folder: Path | None = None  # where its files lie, if on this machine
    files: tuple[str, ...] = ()  # the files that it was read from, weights first
    transposed: frozenset[str] = frozenset()  # keys whose stored weight is (in, out)
    problems: tuple[Problem, ...] = ()  # what its own files contradict, decided on by `check`
    assumed: Mapping[str, str] = field(default_factory=dict)
    # The file's tensors, where deltas are not simply these: written back while deltas are as read.
    original: Mapping[str, Leaf] = field(default_factory=dict)
    runtime: Runtime | None = None
    origin: Origin | None = None

    @property
    def kinds(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for kind in self.deltas.values():
            name = type(kind).__name__
            counts[name] = counts.get(name, 0) + 1
        return counts


@dataclass(frozen=True, slots=True)
class Place:
    """Where a delta goes in the base: a weight's name, and how that weight is stored."""

    target: str
    transposed: bool = False  # stored (in, out): Conv1D, Embedding
