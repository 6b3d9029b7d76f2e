"""Reads graphs as the `onnx` package does, every tensor and node; refuses what lies."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from loratools.adapter import DTYPE_BITS
from loratools.containers.bundle import local
from loratools.containers.onnx_graph import Graph, read
from loratools.containers.protobuf import Edit, as_bytes, moved, varint, with_lengths
from loratools.errors import LoratoolsError


def opened(path: Path) -> Graph:
    return read(local(path), path.name)


def all_graphs(graph: onnx.GraphProto):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from all_graphs(inner)


def agree(path: Path) -> int:
    """Compares everything with onnx's own reading; the number of tensors."""
    mine, theirs = opened(path), onnx.load(path)
    assert mine.ir_version == theirs.ir_version
    assert mine.opsets == {o.domain: o.version for o in theirs.opset_import}
    assert mine.metadata == {p.key: p.value for p in theirs.metadata_props}
    assert mine.inputs == tuple(i.name for i in theirs.graph.input)
    assert mine.outputs == tuple(o.name for o in theirs.graph.output)
    graphs = list(all_graphs(theirs.graph))
    nodes = [n for g in graphs for n in g.node]
    mine_are = sorted((n.op_type, n.name, n.domain, n.inputs) for n in mine.nodes)
    assert mine_are == sorted((n.op_type, n.name, n.domain, tuple(n.input)) for n in nodes)
    by_name = {n.name: n for n in nodes if n.name}
    for node in mine.nodes:
        for name, value in node.attributes.items():
            (given,) = [
                a for a in by_name.get(node.name, onnx.NodeProto()).attribute if a.name == name
            ] or [None]
            if given is not None:
                there = helper.get_attribute_value(given)
                assert value == (tuple(there) if isinstance(there, list) else there)
    stored = [t for g in graphs for t in g.initializer]
    stored += [
        _named(n.attribute[0].t, n.output[0])
        for n in nodes
        if n.op_type == "Constant" and n.attribute[0].HasField("t")
    ]
    assert mine.tensors.keys() == {t.name for t in stored} - set(mine.twice)
    for tensor in stored:
        if tensor.name not in mine.tensors:
            continue
        leaf = mine.tensors[tensor.name].leaf
        assert leaf is not None
        assert leaf.shape == tuple(tensor.dims)
        assert leaf.read() == numpy_helper.to_array(tensor).tobytes(), tensor.name
    return len(stored)


def _named(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=1)
        self.fc = torch.nn.Linear(8, 600)
        self.norm = torch.nn.LayerNorm(600)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.norm(self.fc(x))


@pytest.fixture(scope="module", params=["legacy", "dynamo"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    dynamo = request.param == "dynamo"
    ids = torch.tensor([[1, 2, 3]])
    torch.onnx.export(
        Small().eval(),
        (ids,),
        path,
        dynamo=dynamo,
        **({"verbose": False} if dynamo else {"opset_version": 18}),
    )
    return path


@pytest.mark.filterwarnings("ignore")
def test_graphs_of_both_exporters_of_torch(exported: Path) -> None:
    assert agree(exported) > 5


@pytest.mark.parametrize(
    "name",
    [
        "optimum-tiny-onnx/model.onnx",
        "ort-genai-tiny-gpt2-onnx/past.onnx",
        "pkg-silero-vad/silero_vad_16k_op15.onnx",
    ],
)
def test_real_graphs(field_data: Path, name: str) -> None:
    assert agree(field_data / "adapters_and_models" / name) >= 15


# ------------------------------------------------------------------------------- every encoding


def saved(path: Path, *tensors: TensorProto, nodes=(), **more) -> Path:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    nodes = [*nodes, helper.make_node("Constant", [], ["y"], value_float=1.0)]
    graph = helper.make_graph(list(nodes), "g", [], [out], list(tensors))
    model = helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)], **more
    )
    path.write_bytes(model.SerializeToString())
    return path


NUMBERS = [
    TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16,
    TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.DOUBLE,
    TensorProto.UINT32, TensorProto.UINT64, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN,
]  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("data_type", NUMBERS)
def test_every_type_inline_and_typed(tmp_path: Path, data_type: int, raw: bool) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    values = np.array([0, 1, 3, 1, 0, 7]).reshape(2, 3).astype(dtype)
    if raw:
        tensor = numpy_helper.from_array(values, "w")
    else:
        tensor = helper.make_tensor("w", data_type, [2, 3], values.flatten())
    path = saved(tmp_path / "m.onnx", tensor)
    assert agree(path) == 1
    found = opened(path).tensors["w"]
    own_field = data_type in (TensorProto.FLOAT, TensorProto.DOUBLE)
    assert found.patchable == (raw or own_field)


def test_numbers_one_by_one(tmp_path: Path) -> None:
    """A writer may leave numbers unpacked (protobuf allows both)."""
    minus = b"\x38" + varint((1 << 64) - 1)
    body = as_bytes(8, b"w") + b"\x08\x02" + b"\x10\x07" + b"\x38\x05" + minus
    path = saved(tmp_path / "m.onnx")
    model = onnx.load(path)
    graph = model.graph.SerializeToString() + as_bytes(5, body)
    model.ClearField("graph")
    path.write_bytes(model.SerializeToString() + as_bytes(7, graph))
    agree(path)
    assert opened(path).tensors["w"].leaf.numbers() == (5, -1)


def test_texts_and_four_bits_have_no_leaf(tmp_path: Path) -> None:
    words = helper.make_tensor("s", TensorProto.STRING, [1], [b"word"])
    fours = helper.make_tensor("q", TensorProto.INT4, [2], [1, -2])
    found = opened(saved(tmp_path / "m.onnx", words, fours)).tensors
    assert found["s"].leaf is None
    assert found["q"].leaf is None
    assert found["q"].shape == (2,)


def test_subgraphs_see_what_is_around_them(tmp_path: Path) -> None:
    inner = helper.make_tensor("inner", TensorProto.FLOAT, [1], [2.0])
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([helper.make_node("Add", ["w", "inner"], ["z"])], "a", [], [out], [inner])
        for _ in range(2)
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    test = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["c"], ["x"], then_branch=branches[0], else_branch=branches[1])
    path = saved(tmp_path / "m.onnx", weight, test, nodes=[node])
    agree(path)
    graph = opened(path)
    assert graph.twice == ("inner",)
    assert [(n.op_type, n.graph) for n in graph.nodes[:3]] == [("If", None), ("Add", 0), ("Add", 0)]


# ------------------------------------------------------------------------------- hostile


def external(path: Path, location: str, dims=(4,), **more: str) -> Path:
    tensor = TensorProto(name="w", data_type=1, dims=dims, data_location=1)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return saved(path, tensor)


def refused(path: Path, *codes: str) -> str:
    with pytest.raises(LoratoolsError) as caught:
        opened(path)
    assert caught.value.code in codes, caught.value
    return caught.value.message


@pytest.mark.parametrize(
    "location",
    [
        "../w.bin",
        "a/../../w.bin",
        "/etc/passwd",
        "C:\\w",
        "a\\..\\..\\w",
        "",
        ".",
        "..",
        "a//b",
        "./w",
    ],
)
def test_locations_outside_the_folder(tmp_path: Path, location: str) -> None:
    """reliability.md row 42."""
    (tmp_path / "in").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(16))
    refused(external(tmp_path / "in" / "m.onnx", location), "hostile")


def test_links_to_other_places(tmp_path: Path) -> None:
    """reliability.md row 42: a link, a linked folder, a second name (which onnxruntime reads)."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "w.bin").write_bytes(bytes(16))
    home = tmp_path / "in"
    home.mkdir()
    (home / "link.bin").symlink_to(secret / "w.bin")
    (home / "folder").symlink_to(secret)
    os.link(secret / "w.bin", home / "hard.bin")
    for location in ("link.bin", "folder/w.bin", "hard.bin"):
        refused(external(home / "m.onnx", location), "hostile")
    refused(external(home / "m.onnx", "absent.bin"), "not_found")


def test_a_cache_of_blobs_is_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    external(blobs / "one", "m.onnx.data")
    (blobs / "two").write_bytes(np.arange(4, dtype="<f4").tobytes())
    (snapshot / "m.onnx").symlink_to("../../blobs/one")
    (snapshot / "m.onnx.data").symlink_to("../../blobs/two")
    assert opened(snapshot / "m.onnx").tensors["w"].leaf.numbers() == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("dims", "more"),
    [
        ((4,), {"offset": "-4"}),
        ((4,), {"offset": str(1 << 62)}),
        ((4,), {"length": str(10**12)}),
        ((4,), {"offset": "1e3"}),
        ((4,), {"offset": "٣"}),
        ((4,), {"offset": "4"}),
        ((1 << 40, 1 << 40), {}),
        ((0, 1 << 62), {}),
        ((-1,), {}),
        ((1,) * 65, {}),
    ],
)
def test_numbers_that_lie(tmp_path: Path, dims, more: dict[str, str]) -> None:
    """reliability.md row 43."""
    (tmp_path / "w.bin").write_bytes(bytes(16))
    path = external(tmp_path / "m.onnx", "w.bin", dims, **more)
    refused(path, "malformed", "truncated")
    if not more:
        inline = TensorProto(name="w", data_type=1, dims=dims, raw_data=bytes(16))
        refused(saved(path, inline), "malformed")


def test_cycles_and_strangers(tmp_path: Path) -> None:
    ring = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    assert "nothing before it makes" in refused(saved(tmp_path / "m.onnx", nodes=ring), "malformed")
    twice = [helper.make_node("Constant", [], ["a"], value_float=1.0)] * 2
    refused(saved(tmp_path / "m.onnx", nodes=twice), "malformed")
    one = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    refused(saved(tmp_path / "m.onnx", one, one), "duplicate")


def test_graphs_within_graphs_end(tmp_path: Path) -> None:
    test = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value_float=1.0)], "g", [], []
    )
    for _ in range(30):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    refused(
        saved(
            tmp_path / "m.onnx",
            test,
            nodes=[helper.make_node("If", ["c"], ["x"], then_branch=graph)],
        ),
        "malformed",
    )


def test_a_sparse_file_of_2_gb(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx")
    os.truncate(path, 1 << 31)
    refused(path, "malformed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    weight = numpy_helper.from_array(np.arange(6, dtype="<f4").reshape(2, 3), "w")
    typed = helper.make_tensor("t", TensorProto.FLOAT16, [2], np.ones(2, "<f2"))
    node = helper.make_node("MatMul", ["w", "t"], ["x"], name="/a/MatMul")
    path = saved(tmp_path_factory.mktemp("whole") / "m.onnx", weight, typed, nodes=[node])
    return path.read_bytes()


@given(data=st.data())
def test_any_damage_is_an_error_or_a_graph(
    data: st.DataObject, whole: bytes, tmp_path_factory
) -> None:
    """Cut anywhere, or with bytes changed: one of our errors, or a graph with all its tensors."""
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if broken else 0):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("broken") / "m.onnx"
    path.write_bytes(broken)
    try:
        graph = opened(path)
    except LoratoolsError:
        return
    for tensor in graph.tensors.values():
        if tensor.leaf is not None:
            assert len(tensor.leaf.read()) * 8 == tensor.leaf.numel * DTYPE_BITS[tensor.leaf.dtype]


# ------------------------------------------------------------------------------- edits


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_edits_keep_a_message_whole(longer: int, other: int, size: int) -> None:
    """A tensor's name made longer, so that lengths around it need more bytes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        weight = numpy_helper.from_array(np.zeros(size, "<f4"), "w")
        path = saved(Path(folder) / "m.onnx", weight)
        before, graph = path.read_bytes(), opened(path)
        tensor = graph.tensors["w"]
        extra = as_bytes(
            5, numpy_helper.from_array(np.ones(1, "<f4"), "n" * (other + 1)).SerializeToString()
        )
        grown = [
            Edit(tensor.at.end, tensor.at.end, as_bytes(12, b"x" * longer), tensor.within),
            Edit(graph.span.end, graph.span.end, extra, tensor.within[:1]),
        ]
        edits, new, at = with_lengths(grown), b"", 0
        for edit in edits:
            new += before[at : edit.start] + edit.content
            at = edit.end
        model = onnx.load_from_string(new + before[at:])
    onnx.checker.check_model(model)
    assert model.graph.initializer[0].doc_string == "x" * longer
    assert [t.name for t in model.graph.initializer] == ["w", "n" * (other + 1)]
    place = moved(tensor.leaf.offset, edits)
    assert (new + before[at:])[place : place + 4 * size] == bytes(4 * size)
