"""The table of runtimes, against the runtimes themselves."""

import json

import pytest
from onnx import TensorProto, helper

from loratools.errors import UsageError
from loratools.exporting.runtimes_table import DEFAULT, NEWEST, TABLE, chosen, for_ort
from tests.environments import run
from tests.environments.ort_old import RELEASES

OPENED = """
import json, sys
sys.path.insert(0, f"{sys.prefix}/runtimes/{sys.argv[1]}")
import onnxruntime
assert onnxruntime.__version__.startswith(sys.argv[1] + "."), onnxruntime.__version__
onnxruntime.set_default_logger_severity(4)
said = {}
for path in sys.argv[3:]:
    try:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        said[path] = True
    except Exception as refused:
        said[path] = False
open(sys.argv[2], "w").write(json.dumps(said))
"""


def graph(path, opset, ir):
    """y = x + x."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.oracle("ort_old")
@pytest.mark.parametrize("release", RELEASES)
def test_an_old_runtime_reads_what_its_row_says_and_no_more(release, tmp_path):
    opset, ir = for_ort(release)
    expected = {}
    for opened, name in ((True, (opset, ir)), (False, (opset + 1, ir)), (False, (opset, ir + 1))):
        expected[str(graph(tmp_path / f"{name[0]}_{name[1]}.onnx", *name))] = opened
    run("ort_old", OPENED, release, tmp_path / "said.json", *expected)
    assert json.loads((tmp_path / "said.json").read_text()) == expected


@pytest.mark.parametrize(("opset", "ir", "opened"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_the_installed_runtime_too(opset, ir, opened, tmp_path):
    import onnxruntime

    row = for_ort(onnxruntime.__version__)
    path = graph(tmp_path / "g.onnx", row[0] + opset, row[1] + ir)
    if opened:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    else:
        with pytest.raises(Exception, match=r"opset|IR version"):
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_versions_are_read_as_people_write_them():
    assert for_ort("1.17") == for_ort("v1.17.3") == for_ort("1.17.0+cpu") == (20, 9)
    assert for_ort("9.0") == for_ort("1.31.1.dev20260101") == TABLE[NEWEST]
    for word in ("", "1", "latest", "1.2", "1.20; rm", "1.x"):
        with pytest.raises(UsageError):
            for_ort(word)


def test_rows_only_grow():
    rows = list(TABLE.values())
    assert rows == sorted(rows)
    assert list(TABLE) == sorted(TABLE)


def test_what_is_written_when_something_is_asked_for():
    assert chosen(None) == DEFAULT
    assert chosen("1.17") == (20, 9)
    assert chosen("1.31") == (23, 10)
    assert chosen("1.31", ir=12) == (23, 12)
    assert chosen("1.20", opset=18) == (18, 10)
    assert chosen(None, opset=18) == (18, 10)
    for asked in ({"opset": 21}, {"ir": 10}):
        with pytest.raises(UsageError, match="reads"):
            chosen("1.17", **asked)
