"""Running graphs: on the provider that was asked for, with adapters chosen call by call.

onnxruntime falls back to the CPU without a word, ignores adapters where inputs are bound, and of
two adapters takes the first: all three are errors here (facts: microsoft/onnxruntime 1.31,
python/onnxruntime_inference_collection.py and core/session/lora_adapters.cc).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.containers import flatbuffer
from loratools.containers.local import LocalFile
from loratools.errors import error, shown
from loratools.exporting import installed
from loratools.exporting.switchable import PROPERTY, Switches

if TYPE_CHECKING:
    import numpy as np

    from loratools.exporting.with_runtime import Past

SHORT = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
_PAST = re.compile(r"past_key_values\.(\d{1,6})\.(key|value)")
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
}

Arrays = Mapping[str, Any]


@dataclass(slots=True)
class Session:
    """A graph ready to run, on `device`; packs that were used stay loaded."""

    inner: Any  # onnxruntime.InferenceSession
    path: Path
    switches: Switches | None
    device: str  # as onnxruntime names it: cpu, cuda, ...
    packs: dict[Path, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        return {i.name: i for i in self.inner.get_inputs()}

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.inner.get_outputs()]

    def run(
        self, feeds: Arrays, *, adapter: Path | Sequence[Path] | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name, with one pack or none; the next call may have another."""
        options = self._options(adapter)
        found = self.inner.run(None, dict(feeds), options)
        return dict(zip(self.outputs, found, strict=True))

    def bound(self, feeds: Arrays, *, adapter: object = None) -> dict[str, Any]:
        """Outputs as values that stay on the device, inputs arrays or such values.

        UsageError with an adapter: onnxruntime computes the base then, and says nothing.
        """
        if adapter is not None:
            message = "onnxruntime ignores adapters where inputs are bound: use run(), or merge"
            raise error("usage", message)
        binding = self.inner.io_binding()
        # Kept by name till the run is over: what is bound may be the array's own memory.
        given = {n: v if hasattr(v, "data_ptr") else _contiguous(v) for n, v in feeds.items()}
        for name, value in given.items():
            if hasattr(value, "data_ptr"):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device)
        binding.synchronize_inputs()  # copies to the device are in the queue till then
        self.inner.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def _options(self, adapter: Path | Sequence[Path] | None) -> Any:
        if adapter is None:
            return None
        some = [adapter] if isinstance(adapter, str | Path) else list(adapter)
        if len(some) != 1:
            message = (
                f"{len(some)} adapters at once: onnxruntime takes the first and drops the rest "
                "without a word; stack them into one pack, which is exact"
            )
            raise error("usage", message)
        import onnxruntime as ort  # type: ignore[import-untyped]

        path = Path(some[0])
        if path not in self.packs:
            self.packs[path] = self._loaded(path)
        options = ort.RunOptions()
        options.add_active_adapter(self.packs[path])
        return options

    def _loaded(self, path: Path) -> Any:
        """A pack, after its names, shapes and base were compared with the graph's."""
        import onnxruntime as ort

        if not path.is_file():
            raise error("not_found", f"no file {shown(path)}")
        file = flatbuffer.read(LocalFile(path))
        known = {v.name: v for v in self.inner.get_overridable_initializers()}
        unknown = sorted(file.leaves.keys() - known.keys())
        if unknown:
            message = f"{shown(path.name)}: {shown(self.path.name)} has no parameter"
            raise error("unmatched", f"{message} {shown(unknown[0])}, and {len(unknown)} in all")
        for name, leaf in file.leaves.items():
            wanted = known[name].shape
            fits = len(wanted) == len(leaf.shape) and all(
                not isinstance(w, int) or w == n for w, n in zip(wanted, leaf.shape, strict=True)
            )
            if not fits:
                message = f"{shown(name)} is {leaf.shape}, the graph's is {tuple(wanted)}"
                raise error("shape_mismatch", f"{shown(path.name)}: {message}")
        if self.switches is not None:
            missing = {n for s in self.switches.parameters for n in (s.a, s.b)} - set(file.leaves)
            if missing:
                message = f"{shown(path.name)} lacks {shown(min(missing))}: pack it for this graph"
                raise error("missing", message)
            if file.model_version not in (0, self.switches.version):
                message = (
                    f"{shown(path.name)} was packed for a graph of other weights (number "
                    f"{file.model_version}, this one's is {self.switches.version})"
                )
                raise error("other_base", message)
        loaded = ort.LoraAdapter()
        loaded.Load(str(path))
        return loaded


def session(
    path: str | Path, *, providers: Sequence[str] | None = None, threads: int | None = None
) -> Session:
    """Open a graph on the providers that are named, first choice first; the CPU by default.

    `cuda` and the like stand for onnxruntime's long names. Raises `not_installed` where one of
    them did not come: onnxruntime itself goes on with the CPU.
    """
    installed.require("onnxruntime")
    import onnxruntime as ort

    path = Path(path)
    if not path.is_file():
        raise error("not_found", f"no file {shown(path)}")
    wanted = [SHORT.get(p.lower(), p) for p in (providers or ["cpu"])]
    there = ort.get_available_providers()
    for name in wanted:
        if name not in there:
            raise _fallen_back(name, f"this onnxruntime has {', '.join(there)}")
    if SHORT["cuda"] in wanted and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries out of NVIDIA's own packages, where these are there
    options = ort.SessionOptions()
    # One warning for each switch, that it is no constant: which is what a switch is.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        # Its fallback would print, and take the CPU.
        inner = ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except Exception as cause:  # onnxruntime's own have no class in common
        # With the CPU alone it is the graph that is at fault, not where it should run.
        if wanted == [SHORT["cpu"]]:
            message = f"{shown(path.name)} does not load: {shown(str(cause))}"
            raise error("not_exportable", message) from cause
        raise _fallen_back(wanted[0], shown(str(cause))) from cause
    inner.disable_fallback()
    came = inner.get_providers()
    for name in wanted:
        if name not in came:
            raise _fallen_back(name, f"running on {', '.join(came)}")
    said = inner.get_modelmeta().custom_metadata_map.get(PROPERTY)
    switches = None if said is None else Switches.read(said, path.name)
    device = "cuda" if came[0] in (SHORT["cuda"], SHORT["tensorrt"]) else "cpu"
    device = "dml" if came[0] == SHORT["directml"] else device
    return Session(inner, path, switches, device)


def _fallen_back(name: str, why: str) -> Exception:
    how = "install onnxruntime-gpu[cuda,cudnn]" if "CUDA" in name or "Tensorrt" in name else ""
    how = how or "install the onnxruntime that has it"
    message = f"{shown(name)} was requested but could not be loaded ({why}): {how}"
    return error("not_installed", message)


def _contiguous(value: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(value)


# ------------------------------------------------------------------------------- generating


def generate(
    graph: Session,
    input_ids: Any,
    *,
    steps: int,
    attention_mask: Any = None,
    adapter: Path | None = None,
    past: Past | None = None,
    bind: bool = False,
) -> np.ndarray:
    """The next `steps` tokens of each row, greedily; rows are padded on the left.

    `past` are keys and values of virtual tokens, which all rows see. `bind` keeps the cache on
    the device, without adapters.
    """
    import numpy as np

    ids = np.asarray(input_ids, np.int64)
    rows = len(ids)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
    if bind and adapter is not None:
        graph.bound({}, adapter=adapter)
    cache: dict[str, Any] = _start(graph, rows, past.arrays if past is not None else None)
    before = 0 if past is None else past.tokens
    uncounted = 0 if past is None or past.counted else before
    mask = np.concatenate([np.ones((rows, before), np.int64), mask], 1)
    made = []
    for _ in range(steps):
        width = ids.shape[1]
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **cache}
        if "position_ids" in graph.inputs:
            places = mask[:, uncounted:].cumsum(-1) - 1
            feeds["position_ids"] = places.clip(0)[:, -width:]
        feeds = {name: value for name, value in feeds.items() if name in graph.inputs}
        found: dict[str, Any] = graph.bound(feeds) if bind else graph.run(feeds, adapter=adapter)
        logits = found["logits"].numpy() if bind else found["logits"]
        ids = logits[:, -1].argmax(-1)[:, None].astype(np.int64)
        made.append(ids)
        mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    return np.concatenate(made, 1) if made else np.zeros((rows, 0), np.int64)


def _start(graph: Session, rows: int, past: Arrays | None) -> dict[str, Any]:
    """The cache before the first token: empty, or a prefix for every row."""
    import numpy as np

    cache: dict[str, Any] = {}
    for name, value in graph.inputs.items():
        if not _PAST.fullmatch(name):
            continue
        dtype = _NUMPY[value.type]
        heads, size = value.shape[1], value.shape[3]
        if past is not None:
            if name not in past:
                raise error("missing", f"the prefix has no {shown(name)}, which the graph takes")
            one = np.asarray(past[name]).astype(dtype)
            cache[name] = np.ascontiguousarray(np.broadcast_to(one, (rows, *one.shape[1:])))
        elif isinstance(heads, int) and isinstance(size, int):
            cache[name] = np.zeros((rows, heads, 0, size), dtype)
        else:
            message = f"{shown(name)} of {shown(graph.path.name)} has no fixed heads and sizes"
            raise error("missing", f"{message}: give an empty past")
    if past is not None and not cache:
        message = f"{shown(graph.path.name)} takes no past: a prefix has no place"
        raise error("not_exportable", message)
    return cache
