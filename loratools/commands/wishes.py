"""What was asked of an export, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.errors import error, shown

TO = ("onnx", "genai", "transformers.js")
DTYPES = {"fp32": "fp32", "float32": "fp32", "f32": "fp32", "fp16": "fp16", "float16": "fp16",
          "f16": "fp16", "half": "fp16"}  # fmt: skip
QUANTIZE = {"none": None, "int8": 8, "int4": 4}
QUANTISED = {None: "none", 8: "int8", 4: "int4"}
METHODS = {8: ("dynamic", "nbits", "qdq"), 4: ("nbits", "qdq")}


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for, checked: how to trace, and what becomes of the graph."""

    task: str = "auto"
    exporter: str = "auto"
    kv_cache: bool = True
    opset: int | None = None
    ir: int | None = None
    for_ort: str | None = None
    shape: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    bits: int | None = None
    method: str | None = None
    to: str = "onnx"
    ort: bool = False
    fuse: bool = False
    atol: float | None = None
    verify: bool = True
    trust_remote_code: bool = False
    measure: bool = False
    switchable: bool = False

    def as_json(self) -> dict[str, Any]:
        """The options as the receipt keeps them: those that differ from the defaults."""
        plain = Wish()
        names = self.__dataclass_fields__
        return {
            n: dict(v) if isinstance(v := getattr(self, n), Mapping) else v
            for n in names
            if getattr(self, n) != getattr(plain, n)
        }


def wished(
    *,
    shape: str | Mapping[str, int] | None,
    dtype: str,
    quantize: str,
    method: str | None,
    task: str,
    to: str,
    **more: Any,
) -> Wish:
    """The options as one wish; UsageError for what contradicts itself."""
    from loratools.exporting import tasks
    from loratools.exporting.runtimes_table import FUSES, OPSET_OF_INT4, chosen, release

    precision = DTYPES.get(dtype.removeprefix("torch.").lower())
    if precision is None:
        why = ": onnxruntime has no kernels for it on a CPU" if dtype.startswith("bf") else ""
        raise error("usage", f"--dtype {shown(dtype)}: expected fp32 or fp16{why}")
    if quantize not in QUANTIZE:
        raise error("usage", f"--quantize {shown(quantize)}: expected none, int8 or int4")
    bits = QUANTIZE[quantize]
    if method is not None and (bits is None or method not in METHODS[bits]):
        if bits is None:
            raise error("usage", f"--quantize-method {shown(method)} needs --quantize int8 or int4")
        known = ", ".join(METHODS[bits])
        raise error("usage", f"--quantize-method {shown(method)}: of {quantize} there is {known}")
    if to not in TO:
        raise error("usage", f"--to {shown(to)}: expected {', '.join(TO)}")
    if task != "auto":
        tasks.known(task)
    if more["for_ort"] is not None and release(more["for_ort"]) < FUSES and more["fuse"]:
        least = ".".join(map(str, FUSES))
        raise error(
            "usage",
            f"--fuse --for-ort {shown(more['for_ort'])}: fused graphs need onnxruntime {least}; "
            "leave one of the two out",
        )
    if (bits, method) == (4, "qdq") and (more["opset"] or more["for_ort"]):
        opset, _ = chosen(more["for_ort"], opset=more["opset"], ir=more["ir"])
        if opset < OPSET_OF_INT4:
            said = f"needs opset {OPSET_OF_INT4}, not {opset}; nbits does not"
            raise error("usage", f"--quantize int4 --quantize-method qdq {said}")
    wish = Wish(
        task=task, shape=_shape(shape), dtype=precision, bits=bits,
        method=method or ("nbits" if bits else None), to=to, **more,
    )  # fmt: skip
    together = [
        (bits and precision == "fp16", "--quantize and --dtype fp16"),
        (wish.switchable and wish.fuse, "--switchable and --fuse"),
        (wish.switchable and to == "genai", "--switchable and --to genai"),
        (wish.ort and to != "onnx", f"--ort and --to {to}"),
        (wish.shape and to == "genai", "--shape and --to genai"),
        (bits == 8 and to == "genai", "--quantize int8 and --to genai"),
        (to == "genai" and not more["kv_cache"], "--no-kv-cache and --to genai"),
        (to == "genai" and wish.fuse, "--fuse and --to genai, whose graph is fused"),
    ]
    for both, words in together:
        if both:
            raise error("usage", f"{words} do not go together")
    return wish


def _shape(text: str | Mapping[str, int] | None) -> dict[str, int]:
    """`batch=1,sequence=128` as a table."""
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip() or not size.strip().isdecimal() or not 0 < int(size) < 2**31:
            raise error("usage", f"--shape {shown(text)}: expected batch=1,sequence=128 or so")
        found[name.strip()] = int(size)
    return found
