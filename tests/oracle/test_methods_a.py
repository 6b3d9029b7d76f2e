"""PEFT's low-rank, Hadamard, Kronecker and scaling methods, folded, give PEFT's own outputs."""

import pytest

from loratools import formats
from tests.oracle import methods
from tests.oracle.methods import CASES_A


@pytest.mark.parametrize(("name", "layer"), methods.cells(CASES_A))
def test_a_method_on_a_layer_is_as_the_specification_says(name, layer, tmp_path):
    cell, why = methods.outcome(CASES_A[name], layer, tmp_path)
    assert (cell, why) == (methods.said(name)[layer], why)


SAVES = [name for name in CASES_A if methods.said(name)["Linear"] == "yes"]


@pytest.mark.parametrize("name", SAVES)
def test_saved_modules_come_with_every_method(name, tmp_path):
    chosen = methods.with_options(CASES_A[name], modules_to_save=["head"])
    assert methods.outcome(chosen, "Linear", tmp_path) == ("yes", "")
    adapter = formats.read(tmp_path / "adapter")
    assert {"head.weight", "head.bias"} <= set(adapter.deltas)


@pytest.mark.parametrize("name", [n for n in SAVES if "bias" in CASES_A[n].fields])
def test_trained_biases_come_with_every_method_that_has_them(name, tmp_path):
    chosen = methods.with_options(CASES_A[name], bias="all")
    assert methods.outcome(chosen, "Linear", tmp_path) == ("yes", "")
