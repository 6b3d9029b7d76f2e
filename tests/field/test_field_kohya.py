"""Key lists of real kohya files read as they are, and no other published file taken for one."""

import json

import pytest

from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import kohya
from loratools.formats.kohya_metadata import generation
from tests.sparse_files import sparse

LISTS = {
    # How many modules, the generation that their names show, the rank.
    "invoke__flux_lora_kohya_format": (304, "flux", 16),
    "invoke__anima_lora_kohya_format": (11, None, 8),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_with_shapes(name, field_data, tmp_path):
    shapes = json.loads((field_data / "keymaps" / f"{name}.json").read_text())
    count, shown, rank = LISTS[name]
    bundle = local(sparse(tmp_path / "x.safetensors", shapes, rank / 2))
    assert kohya.detect(bundle)
    adapter = kohya.read(bundle, assume={})
    assert not adapter.problems
    assert adapter.format == "kohya"
    assert len(adapter.deltas) == count
    assert {d.rank for d in adapter.deltas.values()} == {rank}
    assert {d.scaling for d in adapter.deltas.values()} == {0.5}
    assert generation(adapter.deltas) == shown


def test_a_list_without_shapes(field_data, tmp_path):
    """All modules of an SD1 LoRA; widths from the names alone cannot be had, so all are 4."""
    read = (field_data / "keymaps").joinpath
    alphas = json.loads(read("lorainspector__inspector__file__tests__alpha_keys.json").read_text())
    names = json.loads(read("lorainspector__inspector__file__tests__base_names.json").read_text())
    assert sorted(key.removesuffix(".alpha") for key in alphas) == sorted(names)
    shapes = {key: [] for key in alphas}
    for name in names:
        shapes |= {f"{name}.lora_down.weight": [2, 4], f"{name}.lora_up.weight": [4, 2]}
    adapter = kohya.read(local(sparse(tmp_path / "x.safetensors", shapes)), assume={})
    assert not adapter.problems
    assert sorted(adapter.deltas) == sorted(f"{name}.weight" for name in names)


def test_other_lists_are_not_kohya_s(field_data, tmp_path):
    looked = 0
    for file in sorted((field_data / "keymaps").glob("*.json")):
        listed = json.loads(file.read_text())
        if file.stem in LISTS or not isinstance(listed, dict):
            continue
        keys = [k for k in listed if isinstance(k, str) and k]
        bundle = local(sparse(tmp_path / "x.safetensors", {k: [1] for k in keys}))
        assert not kohya.detect(bundle), file.name
        looked += 1
    assert looked >= 15


def test_other_published_files_are_not_kohya_s(field_data):
    looked, refused = 0, set()
    for folder in sorted((field_data / "adapters_and_models").iterdir()):
        for path in (folder, *folder.iterdir()):
            try:
                assert not kohya.detect(local(path)), path
            except LoratoolsError as cause:  # what the file is, is for its own reader to say
                refused.add(cause.code)
            looked += 1
    assert looked >= 50
    assert refused <= {"hostile", "truncated"}
