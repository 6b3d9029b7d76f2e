"""Base models as files, their bytes spelled out here, and folds into them without any command."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loratools.adapter import TORCH_NAMES, Adapter, Dense, Kind, Leaf, Place, Renormed, Replace
from loratools.bind import bind
from loratools.folding import Cut
from loratools.plan import Plan, Target, Term
from loratools.streaming import Streamed, stream
from loratools.weights.base import Base, headers
from loratools.weights.layout import OutputShard, plan_shards
from loratools.weights.publishing import publish
from tests.examples_of_deltas import leaf, lengths, pair

NAMES = {getattr(torch, torch_name): name for name, torch_name in TORCH_NAMES.items()}
INDEX = "model.safetensors.index.json"
Tensors = Mapping[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def container(rows: Sequence[tuple[str, str, Sequence[int], bytes]], **metadata: str) -> bytes:
    """A safetensors file: (name, dtype, shape, bytes) in the order of the data."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape, data in rows:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in rows)


def file_of(tensors: Tensors, **metadata: str) -> bytes:
    rows = [(n, NAMES[t.dtype], t.shape, raw(t)) for n, t in tensors.items()]
    return container(rows, **metadata)


def index_of(shards: Mapping[str, Sequence[str]]) -> bytes:
    where = {name: shard for shard, names in shards.items() for name in names}
    return json.dumps({"metadata": {}, "weight_map": where}).encode()


def model(folder: Path, *shards: Tensors, config: Mapping[str, Any] | None = None) -> Path:
    """A folder as transformers saves it: one file, or numbered shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        (folder / "model.safetensors").write_bytes(file_of(shards[0], format="pt"))
        return folder
    names = {}
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        (folder / name).write_bytes(file_of(tensors, format="pt"))
        names[name] = list(tensors)
    (folder / INDEX).write_bytes(index_of(names))
    return folder


def target(name: str, base: Leaf | None, shape: Sequence[int], *terms: Any) -> Target:
    """A target from (weight, delta) or (weight, delta, "transposed") terms."""
    made = [
        Term(i, name, delta, Place(name, transposed=bool(turned)), weight)
        for i, (weight, delta, *turned) in enumerate(terms)
    ]
    return Target(name, tuple(shape), base, tuple(made))


def planned(base: Path | Base, *deltas: Mapping[str, Kind], **options: Any) -> Plan:
    """A plan without any problem."""
    found = base if isinstance(base, Base) else headers(base)
    adapters = [Adapter(d, name=f"adapter {i}") for i, d in enumerate(deltas)]
    plan = bind(adapters, found, **options)
    assert [p for p in plan.problems if p.severity == "error"] == []
    return plan


def shards_of(plan: Plan, dtype: str | None = None) -> tuple[OutputShard, ...]:
    return plan_shards(
        plan.base,
        {n: t.shape for n, t in plan.targets.items()},
        new={n: plan.targets[n].base for n in plan.new},
        dtype=dtype,
    )


def stream_into(
    out: Path,
    plan: Plan,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    cut: Cut | None = None,
    named: str | None = None,
) -> Streamed:
    """Fold a plan into a folder; `named` makes it a run that an interrupted one goes on with."""
    with publish(out, plan=named) as output:
        return stream(shards_of(plan, dtype), plan.targets, output, threads=threads, cut=cut)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def tensors_in(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder by name: dtype, shape and bytes, read by these few lines."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                a, b = entry["data_offsets"]
                assert name not in found
                shape = tuple(entry["shape"])
                found[name] = entry["dtype"], shape, data[start + a : start + b]
    return found


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array(seed, *shape))).to(dtype)


# ------------------------------------------------------------------------------- all in one


BF16 = torch.bfloat16
UNTIED = {"tie_word_embeddings": False}


def everything() -> dict[str, torch.Tensor]:
    """Weights of every sort, touched or not."""
    return {
        "embed_tokens.weight": tensor(1, 11, 4, dtype=BF16),
        "layers.0.q.weight": tensor(2, 6, 4, dtype=BF16),
        "layers.0.q.bias": tensor(3, 6),
        "layers.0.mask": torch.tensor([True, False, True]),
        "layers.0.count": torch.tensor(2**53 + 1),
        "layers.0.k.weight": tensor(4, 6, 4, dtype=torch.float16),
        "layers.1.q.weight": tensor(5, 700, 300, dtype=BF16),
        "layers.1.empty": torch.empty(0, 4),
        "layers.1.narrow": torch.empty(4, 0),
        "layers.1.k.weight": tensor(6, 6, 4, dtype=torch.float8_e4m3fn),
        "layers.1.scale": tensor(7),
        "layers.1.bytes": torch.arange(5, dtype=torch.uint8),
        "norm.weight": tensor(8, 4, dtype=torch.float64),
        "head.weight": tensor(9, 3, 4),
    }


DELTAS = {
    "embed_tokens.weight": Replace(leaf(11, 13, 4)),
    "layers.0.q.weight": pair(12, (6, 4)),
    "layers.0.q.bias": Dense(leaf(13, 6), 0.5),
    "layers.1.q.weight": Renormed(pair(14, (700, 300), rank=8), lengths(15, 700)),
    "layers.1.k.weight": pair(16, (6, 4), scaling=0.5),
}


def split(tensors: Mapping[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    names = list(tensors)
    return [{n: tensors[n] for n in names[i::count]} for i in range(count)]


def base_in(folder: Path, shards: int = 3) -> Path:
    return model(folder, *split(everything(), shards), config=UNTIED)
