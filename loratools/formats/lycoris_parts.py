"""LyCORIS's methods put together from a module's parts, whatever names the file gives modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter import (
    FLOATS,
    Chained,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    Renormed,
    Rotated,
    Scaled,
)
from loratools.containers import strict_json
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.lycoris_shapes import (
    axis_of,
    glora_age,
    is_matrix,
    kernel,
    kronecker_shape,
)
from loratools.formats.reading import USUAL, Reading

AGE = "glora"  # --assume glora=new or old
RANK_STABLE = "lycoris_rs_lora"  # --assume lycoris_rs_lora=fix
STARTS = ("principal", "last", "middle")

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = (
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")
_OFT = ("oft_blocks", *(f"oft_blocks.{i}" for i in range(4)), "rescale")

# The leaves of each method, behind a module's name.
PARTS: dict[str, tuple[str, ...]] = {
    "LoHa": _LOHA,
    "LoKr": _LOKR,
    "GLoRA": _GLORA,
    "(IA)3": ("weight", "on_input"),
    "OFT": _OFT,
    "T-LoRA": ("q_layer.weight", "p_layer.weight", "lambda_layer"),
}
# Leaves that are known, and why there is no delta of them.
REFUSED: dict[str, str] = {
    "lokr_t1": "no version of LyCORIS makes use of a core of the small factor",
    "oft_diag": "LyCORIS 2's first OFT, whose versions differ in what its numbers mean",
    **dict.fromkeys(
        ("bias_indices", "bias_values", "bias_size"),
        "a sparse remainder beside a pair, as LyCORIS 1 extracted it",
    ),
}


@dataclass(frozen=True, slots=True)
class Said:
    """What a file says of its training that its tensors do not."""

    kohya: bool = False  # kohya's own OFT, whose alpha of 0 means no rotation
    rank_stable: bool = False
    start: str | None = None  # of T-LoRA's singular values; None: not said
    from_weights: bool = True  # and that it was started from the base's weights
    age: str = ""  # of all GLoRA modules, where one of them shows it


def said_by(metadata: Mapping[str, str], *, kohya: bool, age: str = "") -> Said:
    """What kohya's metadata says of the network."""
    raw = metadata.get("ss_network_args", "")
    try:
        found = strict_json.loads(raw.encode(), "ss_network_args") if raw else None
    except (LoratoolsError, UnicodeEncodeError):
        found = None
    args: dict[str, Any] = found if isinstance(found, dict) else {}
    start = args.get("sig_type")
    return Said(
        kohya=kohya or metadata.get("ss_network_module", "").startswith("networks.oft"),
        rank_stable=str(args.get("rs_lora")).lower() == "true",
        start=start if start in STARTS else None,
        from_weights=str(args.get("use_data_init", True)).lower() != "false",
        age=age,
    )


def method_of(part: str) -> str:
    """The method that a leaf belongs to; empty where it is none of these."""
    return next((name for name, leaves in PARTS.items() if part in leaves), "")


def take_method(
    reading: Reading,
    module: str,
    method: str,
    parts: dict[str, Leaf],
    *,
    alpha: float | None,
    magnitude: Leaf | None,
    said: Said,
) -> None:
    """The delta of a module's weight by its method, whose leaves are taken out of `parts`."""
    mine = {name: parts.pop(name) for name in PARTS[method] if name in parts}
    for name, leaf in mine.items():
        if leaf.dtype not in FLOATS and name != "on_input":
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")
    job = _Job(reading, module, mine, alpha, said)
    delta = job.made(method)
    if delta is None:
        return
    if magnitude is not None:
        if isinstance(delta, Hadamard | Kronecker):
            delta = job.renormed(delta, magnitude)
        else:
            reading.problem(
                "not_foldable", f"{shown(magnitude.name)}: no DoRA is known of {method}", module
            )
            return
    if delta is not None:
        reading.deltas[f"{module}.weight"] = delta


@dataclass(slots=True)
class _Job:
    """One module being put together."""

    reading: Reading
    module: str
    parts: dict[str, Leaf]
    alpha: float | None
    said: Said

    def made(self, method: str) -> Kind | None:
        match method:
            case "LoHa":
                return self.loha()
            case "LoKr":
                return self.lokr()
            case "GLoRA":
                return self.glora()
            case "(IA)3":
                return self.ia3()
            case "OFT":
                return self.oft()
            case _:
                return self.tlora()

    # ------------------------------------------------------------------------- what is wrong

    def lacks(self, *names: str) -> bool:
        """Whether parts are missing, which is then a problem."""
        lost = [name for name in names if name not in self.parts]
        if lost:
            message = f"{shown(self.module)} has {', '.join(self.parts)} without {', '.join(lost)}"
            self.reading.problem("missing", message, self.module)
        return bool(lost)

    def misshapen(self, expected: str) -> None:
        """A problem that names all shapes."""
        shapes = ", ".join(f"{name} {leaf.shape}" for name, leaf in self.parts.items())
        message = f"{shown(self.module)}: {shapes}; expected {expected}"
        self.reading.problem("shape_factors", message, self.module)

    def scaling(self, rank: int) -> float:
        """alpha / rank, or 1 without an alpha; judged as a pair's."""
        scaling = 1.0 if self.alpha is None else self.alpha / rank
        if not math.isfinite(scaling):
            raise error("nonfinite", f"{shown(self.module)}: its scaling is {scaling}")
        if scaling == 0:
            message = f"{shown(self.module)}: alpha is 0, so its update is"
            self.reading.problem("no_effect", message, self.module, "warning")
        elif not USUAL[0] <= abs(scaling) <= USUAL[1]:
            message = f"{shown(self.module)}: scaling {scaling:g} at rank {rank}"
            self.reading.problem("scaling_unusual", message, self.module, "warning")
        return scaling

    def fixed(self) -> bool:
        """Whether what rs_lora left unsaid shall be read as it was trained."""
        fix = self.reading.assume.get(RANK_STABLE)
        if fix not in (None, "fix"):
            raise error("usage", f"--assume {RANK_STABLE}={shown(fix)}: only fix is known")
        return fix is not None

    # ------------------------------------------------------------------------------- methods

    def loha(self) -> Hadamard | None:
        """(W1a·W1b) ∘ (W2a·W2b); a convolution without cores does not say its kernel."""
        if self.lacks(*_LOHA[:4]) or (cores := self.cores()) is None:
            return None
        w1_a, w1_b, w2_a, w2_b = (self.parts[name] for name in _LOHA[:4])
        flat = all(is_matrix(leaf) for leaf in (w1_a, w1_b, w2_a, w2_b))
        if not flat or w1_a.shape != w2_a.shape or w1_b.shape != w2_b.shape:
            self.misshapen("(out, r), (r, in) twice")
            return None
        shape: tuple[int, ...] = (w1_a.shape[0], w1_b.shape[1])
        inner = w1_a.shape[1]
        if cores:
            window = kernel(cores[0], w1_a.shape[0], w1_b.shape[0])
            if window is None or cores[0].shape != cores[1].shape:
                self.misshapen("(r, out), (r, in), (r, r, k...) twice")
                return None
            shape, inner = (w1_a.shape[1], w1_b.shape[1], *window), w1_a.shape[0]
        if inner != w1_b.shape[0]:
            self.misshapen("(out, r), (r, in) twice")
            return None
        t1, t2 = cores or (None, None)
        scaling = self.scaling(inner)
        return Hadamard(w1_a, w1_b, w2_a, w2_b, shape, scaling, self.alpha, t1, t2)

    def cores(self) -> tuple[Leaf, ...] | None:
        """Both cores, or none; one alone is a problem."""
        there = tuple(self.parts[name] for name in _LOHA[4:] if name in self.parts)
        if len(there) == 1:
            self.lacks(*_LOHA[4:])
            return None
        return there

    def lokr(self) -> Kronecker | None:
        """W1 ⊗ W2; where both are whole, the stored alpha says nothing (modules/lokr.py)."""
        for name in ("lokr_w1", "lokr_w2"):
            factors = (f"{name}_a", f"{name}_b")
            whole = name in self.parts
            if whole and any(each in self.parts for each in factors):
                message = f"{shown(self.module)} has {name} whole and in factors"
                self.reading.problem("unexplained", message, self.module)
                return None
            if not whole and self.lacks(*((name,) if not set(factors) & set(self.parts) else
                                          factors)):  # fmt: skip
                return None
        w = {name.removeprefix("lokr_"): leaf for name, leaf in self.parts.items()}
        shape = kronecker_shape(w)
        if shape is None:
            self.misshapen("W1 (o1, i1), W2 (o2, i2, ...), or factors (o, r), (r, i)")
            return None
        ranks = [w[name].shape[0] for name in ("w1_b", "w2_b") if name in w]
        if not ranks:
            # With rs_lora it is trained at √r all the same, and r·√r is stored.
            trained = self.fixed() and self.alpha is not None and 0 < self.alpha < math.inf
            return Kronecker(shape, (self.alpha or 1) ** (1 / 3) if trained else 1.0, self.alpha,
                             **w)  # fmt: skip
        if len(set(ranks)) > 1 and self.alpha is not None:
            message = f"{shown(self.module)}: alpha is divided by a rank, and there are {ranks}"
            self.reading.problem("shape_factors", message, self.module)
            return None
        return Kronecker(shape, self.scaling(ranks[0]), self.alpha, **w)

    def glora(self) -> Chained | None:
        """W0·A1·A2 + B1·B2, in the order of the file's age."""
        if self.lacks(*_GLORA[:4]):
            return None
        parts = {name.removesuffix(".weight"): leaf for name, leaf in self.parts.items()}
        age = glora_age({name: leaf.shape for name, leaf in parts.items()})
        said = self.reading.assume.get(AGE)
        if said not in (None, "old", "new"):
            raise error("usage", f"--assume {AGE}={shown(said)}: expected old or new")
        if not age:
            self.misshapen("a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, ...)")
            return None
        if age == "both":
            age = said or self.said.age
        if not age:
            message = (
                f"{shown(self.module)}: its factors are square, so whether they are in GLoRA's old "
                f"order or its new one cannot be seen (--assume {AGE}=new or old)"
            )
            self.reading.problem("unknown_type", message, self.module)
            return None
        rank = parts["a1"].shape[0 if age == "old" else 1]
        scaling = self.scaling(rank)
        if self.fixed() and self.alpha is not None:
            scaling *= math.sqrt(rank)
        return Chained(
            "glora of lycoris", parts, scaling, {"age": age, "alpha": self.alpha, "rank": rank}
        )

    def ia3(self) -> Scaled | None:
        """W0 ∘ (1 + w), by columns where it was trained on the input."""
        if self.lacks("weight", "on_input"):
            return None
        weight, flag = self.parts["weight"], self.parts["on_input"]
        values = flag.numbers() if flag.numel == 1 else ()
        if values not in ((0,), (1,)):
            raise error("malformed", f"{shown(flag.name)} is {flag.shape}, expected one 0 or 1")
        if not weight.shape or sum(n != 1 for n in weight.shape) > 1 or 0 in weight.shape:
            self.misshapen("a vector (n) or (1, n, 1...)")
            return None
        return Scaled("columns" if values[0] else "rows", weight, 1.0)

    def oft(self) -> Rotated | None:
        """Rotations of rows by blocks: diagonal, in stages (BOFT), or kohya's in parts of rows."""
        names = sorted(name for name in self.parts if name != "rescale")
        blocks = [self.parts[name] for name in names]
        numbered = "oft_blocks" not in names
        expected = [f"oft_blocks.{i}" for i in range(max(len(names), 1))]
        if self.lacks(*(expected if numbered and names else ["oft_blocks"])):
            return None
        square = all(
            len(leaf.shape) in (3, 4) and leaf.shape[-1] == leaf.shape[-2] and 0 not in leaf.shape
            for leaf in blocks
        )
        rows = sum(leaf.shape[-3] * leaf.shape[-1] for leaf in blocks) if square else 0
        scale = self.parts.get("rescale")
        if not square or (len(names) > 1 and not numbered) or (
            scale is not None and scale.numel != rows
        ):  # fmt: skip
            self.misshapen("oft_blocks (n, b, b) or (m, n, b, b), rescale (n·b, 1...)")
            return None
        method = "oft of kohya" if numbered or self.said.kohya else "oft of lycoris"
        if any(len(leaf.shape) == 4 for leaf in blocks):
            stages, _, size, _ = blocks[0].shape
            if len(blocks) > 1 or size % 2 or stages > 64 or rows % (size << (stages - 1)):
                self.misshapen("stages whose groups of 2^(m-1)·b rows divide all rows")
                return None
            method = "boft of lycoris"
        alpha = self.alpha
        if method == "oft of kohya" and alpha is None:
            alpha = self.reading.number("alpha")
            if alpha is None:
                message = f"{shown(self.module)}: kohya's OFT bounds its rotation by alpha"
                self.reading.problem("alpha_missing", message, self.module)
                return None
        if alpha is not None and not math.isfinite(alpha):
            raise error("nonfinite", f"{shown(self.module)}: its constraint is {alpha}")
        if method == "oft of kohya" and not alpha:
            message = f"{shown(self.module)}: alpha is 0, which leaves no rotation"
            self.reading.problem("no_effect", message, self.module, "warning")
        return Rotated(method, "out", dict(self.parts), {"alpha": alpha})

    def tlora(self) -> Chained | None:
        """scaling · (P·λ·Q - the part of W0 it was started from), all of its directions active."""
        if self.lacks(*PARTS["T-LoRA"]):
            return None
        q, p, lam = (self.parts[name] for name in PARTS["T-LoRA"])
        if len(q.shape) < 2 or len(p.shape) < 2 or not (
            q.shape[0] == p.shape[1] == lam.numel and 0 not in (*q.shape, *p.shape)
        ):  # fmt: skip
            self.misshapen("q_layer (r, in), p_layer (out, r), lambda_layer (1, r)")
            return None
        if not self.said.from_weights:
            message = (
                f"{shown(self.module)}: T-LoRA from random matrices (use_data_init=False), which "
                "its file does not hold, and which its update is the difference to"
            )
            self.reading.problem("residual_base", message, self.module)
            return None
        start = self.said.start or STARTS[0]  # what LyCORIS's own loader takes for granted
        parts, settings = {"q": q, "p": p, "lambda": lam}, {"start": start, "alpha": self.alpha}
        return Chained("tlora of lycoris", parts, self.scaling(q.shape[0]), settings)

    def renormed(self, delta: Hadamard | Kronecker, magnitude: Leaf) -> Kind | None:
        """DoRA over the whole update; its axis is the magnitudes' shape."""
        if magnitude.dtype not in FLOATS:
            what = f"{shown(magnitude.name)} is {magnitude.dtype}"
            raise error("dtype_unusable", f"{what}, not floats")
        out, width = delta.shape[0], delta.shape[1]
        some = magnitude.shape[1:2]
        if len(delta.shape) == 2 < len(magnitude.shape) and some and some[0]:
            width = some[0] if width % some[0] == 0 else width  # of a kernel that is not said
        axis = axis_of(magnitude, out, width)
        if magnitude.numel != (out if axis == "out" else width):
            message = f"{shown(self.module)}: {magnitude.numel} magnitudes for {delta.shape}"
            self.reading.problem("shape_factors", message, self.module)
            return None
        return Renormed(delta, magnitude, axis)
