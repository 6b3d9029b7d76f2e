"""Where every byte of an output goes: planned from headers, read back by another library."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loratools.adapter import DTYPE_BITS
from loratools.containers.safetensors import read_header
from loratools.errors import LoratoolsError
from loratools.weights.base import Base, headers
from loratools.weights.layout import (
    OutputShard,
    Piece,
    common_dtype,
    index_json,
    output_name,
    plan_shards,
    runs,
)
from tests.bases import Tensors, base, bundle, described, shard, unread, whole
from tests.small_models import INDEX


def sharded(*shards: Tensors, **names: str) -> Base:
    files = [shard(names.get(f"s{i}", f"model-{i}.safetensors"), t) for i, t in enumerate(shards)]
    where = {n: f.name for f, t in zip(files, shards, strict=True) for n in t}
    return headers(bundle(*files, whole(INDEX, {"weight_map": where})))


def rows(one: OutputShard) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(p.name, p.dtype, p.shape) for p in one.pieces]


def require_whole(one: OutputShard, folder: Path) -> None:
    """That header and pieces agree, leave no hole, and are what others read."""
    path = folder / one.name
    with path.open("wb") as file:
        file.write(one.header)
        file.truncate(one.size)
    at = len(one.header)
    for piece in one.pieces:
        assert piece.offset == at
        assert piece.offset % (DTYPE_BITS[piece.dtype] // 8) == 0 or piece.nbytes == 0
        at += piece.nbytes
    assert at == one.size
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {p.name for p in one.pieces}
        for piece in one.pieces:
            assert tuple(file.get_slice(piece.name).get_shape()) == piece.shape


FIRST = {"a": ("BF16", [3, 5]), "b": [2], "c": ("I64", [])}
SECOND = {"d": ("F16", [7]), "e": ("BOOL", [3]), "f.weight": [4, 2]}


def test_the_base_s_own_layout_is_kept():
    found = plan_shards(sharded(FIRST, SECOND), {})
    assert [s.name for s in found] == ["model-0.safetensors", "model-1.safetensors"]
    assert [rows(s) for s in found] == [described(FIRST), described(SECOND)]
    for one, tensors in zip(found, (FIRST, SECOND), strict=True):
        before = shard(one.name, tensors)
        assert one.size - len(one.header) == before.size - len(before.head)
        assert [p.base.name for p in one.pieces if p.base] == list(tensors)


def test_metadata_is_kept_and_the_format_said():
    head = shard("model.safetensors", {"x": [1]}, author="me")
    [one] = plan_shards(headers(bundle(head)), {})
    table = json.loads(one.header[8:])
    assert table["__metadata__"] == {"author": "me", "format": "pt"}
    head = shard("model.safetensors", {"x": [1]}, format="mlx")
    [one] = plan_shards(headers(bundle(head)), {})
    assert json.loads(one.header[8:])["__metadata__"] == {"format": "mlx"}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_another_dtype_is_given_to_every_float_and_to_nothing_else(tmp_path, dtype):
    for one in plan_shards(sharded(FIRST, SECOND), {}, dtype=dtype):
        require_whole(one, tmp_path)
        for name, kind, _ in rows(one):
            before = {**FIRST, **SECOND}[name]
            known = before[0] if isinstance(before[0], str) else "F32"
            assert kind == (known if known in ("I64", "BOOL") else dtype)


def test_shapes_that_change_move_what_follows(tmp_path):
    first, second = plan_shards(sharded(FIRST, SECOND), {"f.weight": (9, 2), "d": (8,)})
    assert rows(first) == described(FIRST)
    assert set(rows(second)) == {
        ("f.weight", "F32", (9, 2)),
        ("d", "F16", (8,)),
        ("e", "BOOL", (3,)),
    }
    require_whole(second, tmp_path)


def test_new_weights_stand_in_the_last_shard(tmp_path):
    found = sharded(FIRST, SECOND)
    start = found.tensors["a"]
    shapes = {"score.weight": (2, 5), "lm_head.weight": (3, 5), "count": ()}
    first, last = plan_shards(
        found, shapes, new={"score.weight": None, "lm_head.weight": start, "count": None},
        dtypes={"count": "I64"},
    )  # fmt: skip
    assert rows(first) == described(FIRST)
    new = {p.name: p for p in last.pieces if p.name not in SECOND}
    # A head of its own takes the dtype that most bytes have; a copy keeps its original's.
    assert {n: (p.dtype, p.shape) for n, p in new.items()} == {
        "score.weight": ("F32", (2, 5)),
        "lm_head.weight": ("BF16", (3, 5)),
        "count": ("I64", ()),
    }
    assert new["score.weight"].base is None
    assert new["lm_head.weight"].base is start
    require_whole(last, tmp_path)
    *_, last = plan_shards(
        found, shapes, new=dict.fromkeys(shapes), dtype="F16", dtypes={"count": "I64"}
    )
    assert {k for n, k, _ in rows(last) if n in shapes} == {"F16", "I64"}


def test_names_of_the_output_may_differ():
    [one] = plan_shards(base({"x.weight": [2], "y": [3]}), {"x.weight": (4,)},
                        rename=lambda n: f"bert.{n}")  # fmt: skip
    assert {n: s for n, _, s in rows(one)} == {"bert.x.weight": (4,), "bert.y": (3,)}
    assert {p.name: p.base.name for p in one.pieces if p.base} == {
        "bert.x.weight": "x.weight",
        "bert.y": "y",
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.safetensors", "model.safetensors"),
        ("anything at all.safetensors", "anything at all.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00001-of-00003.bin", "model-00001-of-00003.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("weights.pt", "weights.safetensors"),
    ],
)
def test_output_files_are_safetensors_of_the_same_number(name, wanted):
    assert output_name(name) == wanted


def test_two_shards_never_become_one_file():
    found = sharded({"a": [1]}, {"b": [1]}, s0="x.safetensors")
    clash = replace(found, shards=(replace(found.shards[0], name="x.bin"), found.shards[1]))
    with pytest.raises(LoratoolsError) as caught:
        plan_shards(clash, {})
    assert caught.value.code == "duplicate"
    assert "x.safetensors" in caught.value.message


def test_the_index_lists_every_tensor_and_the_sum_of_their_bytes():
    table = json.loads(index_json(plan_shards(sharded(FIRST, SECOND), {})))
    assert table == {
        "metadata": {"total_size": 30 + 8 + 8 + 14 + 3 + 32},
        "weight_map": dict.fromkeys(FIRST, "model-0.safetensors")
        | dict.fromkeys(SECOND, "model-1.safetensors"),
    }


def test_the_common_dtype_counts_bytes_of_floats():
    assert common_dtype(base({"a": ("BF16", [9]), "b": [4], "i": ("I64", [99])})) == "BF16"
    assert common_dtype(base({"i": ("I64", [99])})) == "F32"


# ------------------------------------------------------------------------------- runs of bytes


def test_neighbours_are_copied_in_one_run():
    found = base({"a": [3], "b": [2], "c": [4], "d": [1], "e": [0], "f": [2]})
    [one] = plan_shards(found, {})
    joined = runs(one.pieces, lambda p: p.name != "c")
    assert [(leaf.name, length) for leaf, _, length in joined] == [("a", 20), ("d", 12)]
    assert [at for _, at, _ in joined] == [one.pieces[0].offset, one.pieces[3].offset]
    assert runs(one.pieces, lambda p: False) == []


def test_neighbours_of_two_files_are_no_neighbours():
    first, second = (unread(n, 4) for n in ("a", "b"))
    follows = replace(second, offset=first.nbytes)
    pieces = [Piece("a", "F32", (4,), 80, first), Piece("b", "F32", (4,), 96, follows)]
    assert runs(pieces, lambda p: True) == [(first, 80, 16), (follows, 96, 16)]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=3),
    touched=st.sets(st.integers(0, 14)),
    grown=st.sets(st.integers(0, 14)),
    dtype=st.sampled_from([None, "F16"]),
)
def test_runs_cover_all_untouched_bytes_once(sizes, touched, grown, dtype):
    kinds: Sequence[str] = ("F32", "BF16", "U8")
    tensors: list[Mapping[str, tuple[str, list[int]]]] = []
    for i, shard_sizes in enumerate(sizes):
        tensors.append({f"t{i}.{j}": (kinds[(i + j) % 3], [n]) for j, n in enumerate(shard_sizes)})
    names = [n for t in tensors for n in t]
    found = sharded(*tensors)
    shapes = {n: (found.tensors[n].shape[0] + 1,) for i, n in enumerate(names) if i in grown}
    changed = {n for i, n in enumerate(names) if i in touched} | set(shapes)
    for one, start in zip(plan_shards(found, shapes, dtype=dtype), tensors, strict=True):

        def untouched(piece: Piece) -> bool:
            return piece.name not in changed and piece.base.dtype == piece.dtype

        covered: dict[int, int] = {}  # output byte -> base byte
        for leaf, at, length in runs(one.pieces, untouched):
            for i in range(length):
                assert at + i not in covered
                covered[at + i] = leaf.offset + i
        wanted = {
            p.offset + i: p.base.offset + i
            for p in one.pieces
            if p.base and untouched(p)
            for i in range(p.nbytes)
        }
        assert covered == wanted
        assert {p.name for p in one.pieces} == set(start)


@settings(max_examples=30)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=6))
def test_every_header_is_one_that_we_would_read(shapes):
    kinds = ["F64", "BF16", "U8", "I32"]
    tensors = {f"t{i}": (kinds[i % 4], s) for i, s in enumerate(shapes)}
    [one] = plan_shards(base(tensors), {}, dtype="F32")

    class Source:
        name, size = "x", one.size

        def read(self, offset: int, length: int) -> bytes:
            return one.header[offset : offset + length]

    again = read_header(Source())
    assert [(x.name, x.dtype, x.shape, x.offset) for x in again.leaves.values() if x.nbytes] == [
        (p.name, p.dtype, p.shape, p.offset) for p in one.pieces if p.nbytes
    ]
