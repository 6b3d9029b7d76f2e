"""Files that others published: none of them is a torchtune, litgpt or NeMo adapter."""

from pathlib import Path

import pytest

from loratools.containers.bundle import local
from loratools.formats import litgpt, nemo, torchtune


@pytest.mark.parametrize("form", [torchtune, litgpt, nemo])
def test_no_real_file_is_mistaken_for_ours(form, field_data: Path):
    places = [p for p in (field_data / "adapters_and_models").rglob("*") if p.name[0] != "."]
    assert len(places) > 40
    assert [str(p) for p in places if form.detect(local(p))] == []
