"""An ONNX graph as a base: its stored tensors under the names and shapes of torch's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapter import Leaf
from loratools.containers import onnx_graph
from loratools.containers.bundle import Bundle
from loratools.containers.local import LocalFile
from loratools.containers.onnx_graph import Graph
from loratools.containers.strict_json import loads, require
from loratools.errors import error, shown
from loratools.weights.base import CONV1D_LAYERS, CONV1D_TYPES, FIELDS, Base, Shard
from loratools.weights.graph_names import Found, Stored, parameters
from loratools.weights.quantised import Quantised

FOLDER = "onnx"  # where transformers.js and the Hub keep graphs, beside whose folder config.json is
INNER = f"{FOLDER}/model.onnx"
HASHED = 1 << 26  # bytes of a graph whose whole hash is part of its fingerprint


@dataclass(frozen=True, slots=True)
class GraphBase:
    """What a base is besides, where it is a graph: its file, and where its parameters lie."""

    graph: Graph
    file: str  # within the base's bundle
    found: Found

    def __getitem__(self, parameter: str) -> Stored:
        return self.found.stored[parameter]

    @property
    def in_out(self) -> Mapping[str, bool]:
        """Of weights of products: whether they are (in, out), as Conv1D's are."""
        stored = self.found.stored
        return {name: s.in_out for name, s in stored.items() if s.in_out is not None}


def file_of(bundle: Bundle) -> str | None:
    """The graph that a source names or holds; None where it holds none, or other weights too.

    Raises usage where a folder holds several.
    """
    if bundle.chosen is not None:
        return bundle.chosen if bundle.chosen.lower().endswith(".onnx") else None
    if any(_is_weights(n) for n in bundle.names):
        return None
    graphs = [n for n in bundle.names if n.endswith(".onnx") and "/" not in n]
    if len(graphs) == 1:
        return graphs[0]
    if graphs:
        listing = ", ".join(shown(str(Path(bundle.name) / n)) for n in graphs[:6])
        raise error(
            "usage", f"{shown(bundle.name)} holds {len(graphs)} graphs; name one: {listing}"
        )
    folder, _, name = INNER.partition("/")
    return INNER if folder in bundle.folders and name in bundle.inner(folder) else None


def _is_weights(name: str) -> bool:
    """Whether a file is weights that a folder is read for; a .bin may be a graph's own data."""
    torch_file = name.startswith(("pytorch_model", "diffusion_pytorch_model"))
    return name.endswith((".safetensors", ".index.json")) or (torch_file and name.endswith(".bin"))


def graph_base(bundle: Bundle, file: str) -> Base:
    """The base that a graph is; no weight is read."""
    graph = onnx_graph.read(bundle, file)
    config = _config(bundle)
    kind = str(config.get("model_type", ""))
    conv1d = frozenset(CONV1D_LAYERS) if not kind or kind in CONV1D_TYPES else frozenset[str]()
    return _base(bundle, config, GraphBase(graph, file, parameters(graph, conv1d=conv1d)))


def _base(bundle: Bundle, config: Mapping[str, Any], graph: GraphBase) -> Base:
    tensors: dict[str, Leaf] = {}
    shards: dict[str, dict[str, Leaf]] = {graph.file: {}}
    folder = graph.file.rpartition("/")[0]
    for location in graph.graph.files:
        shards[f"{folder}/{location}" if folder else location] = {}
    for name, stored in graph.found.stored.items():
        leaf = stored.tensor.leaf
        if leaf is None:
            continue
        tensors[name] = seen = as_parameter(replace(leaf, name=name), stored.turned)
        file = stored.tensor.file
        where = graph.file if file is None else f"{folder}/{file}" if folder else file
        shards[where][name] = seen
    source = graph.graph.source
    whole = isinstance(source, LocalFile) and source.size <= HASHED
    digest = source.fingerprint() if whole and isinstance(source, LocalFile) else ""
    files = tuple(
        Shard(name, leaves, {}, digest if name == graph.file else "")
        for name, leaves in shards.items()
    )
    return Base(bundle, files, tensors, config, graph=graph)


def rebuilt(base: Base, found: Found) -> Base:
    """A graph's base with its parameters found in another way."""
    assert base.graph is not None
    made = _base(base.bundle, base.config, replace(base.graph, found=found))
    return replace(made, problems=base.problems)


def as_parameter(leaf: Leaf, turned: bool) -> Leaf:
    """A stored tensor seen as the parameter that it is; codes in blocks are left as they lie."""
    if not turned or len(leaf.shape) != 2:
        return leaf
    if isinstance(leaf.source, Quantised):
        return replace(leaf.source, turned=True).leaf(leaf.name)
    rows, columns = leaf.shape
    return replace(leaf, shape=(columns, rows), strides=(1, columns))


def _folder(bundle: Bundle) -> str:
    """The name of the folder that a bundle on the Hub has the files of."""
    inside = bundle.origin.inside if bundle.origin is not None else ""
    folder = inside.rpartition("/")[0] if bundle.chosen is not None else inside
    return folder.rpartition("/")[2]


def _config(bundle: Bundle) -> Mapping[str, Any]:
    """config.json beside the graph, or beside its folder."""
    if "config.json" in bundle:
        raw, what = bundle.read("config.json", 1_000_000), f"{bundle.name}/config.json"
    elif bundle.path is not None and (bundle.path.parent / "config.json").is_file():
        if bundle.path.name != FOLDER:
            return {}
        file = LocalFile(bundle.path.parent / "config.json")
        raw, what = file.read(0, min(file.size, 1_000_001)), file.name
    elif bundle.outer is not None and _folder(bundle) == FOLDER:
        outer = bundle.outer()
        if "config.json" not in outer:
            return {}
        raw, what = outer.read("config.json", 1_000_000), f"{outer.name}/config.json"
    else:
        return {}
    return require(loads(raw, what), FIELDS, what)
