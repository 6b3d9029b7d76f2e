"""Raw state dicts: the keys of the specification, both orientations against a layer's forward."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, linear

from loratools.algebra import materialise
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import raw

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "raw.md"
X = "model.layers.0.q"


def keyed(path, shapes, **extras):
    torch.manual_seed(0)
    state = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in shapes.items()}
    torch.save(state | extras, path)
    return local(path)


def errors(adapter):
    return [p.code for p in adapter.problems if p.severity == "error"]


def key_table():
    """(key, module, side) of every row under "Keys"."""
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


def filled(text):
    return re.sub(r"\bP\b", "weight", re.sub(r"\bN\b", "default", re.sub(r"\bX\b", X, text)))


@pytest.mark.parametrize(("key", "module", "side"), key_table())
def test_the_reader_has_the_keys_of_the_specification(key, module, side):
    part = raw.part_of(filled(key))
    if side == "full":
        assert part is None
    else:
        assert (part.module, part.side) == (filled(module), side)
        assert part.adapter == ("default" if re.search(r"\bN\b", key) else "")


def test_the_specification_has_every_word():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    words = {key.split(".")[1] for key, _, side in key_table() if side != "full"}
    assert words <= {*raw.SIDES, *raw.ALPHA, *raw.MAGNITUDE}
    # Both spellings of a pair go together: one of each stands in the table.
    assert {re.sub(r"[AaBb]$|down$|up$", "", word) for word in raw.SIDES} == {
        re.sub(r"[AaBb]$|down$|up$", "", word) for word in words if word in raw.SIDES
    }
    assert all(f".{word}" in text for word in (*raw.ALPHA, *raw.MAGNITUDE))


FRONTS = ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."]
NAMES = [
    ("lora_A", "lora_B"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_a.weight", "lora_b.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("parametrizations.weight.0.lora_A", "parametrizations.weight.0.lora_B"),
]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize(("down", "up"), NAMES)
@pytest.mark.parametrize("way", ["out_in", "in_out"])
@pytest.mark.parametrize("container", ["pt", "safetensors"])
def test_an_update_is_what_the_layer_computes(front, down, up, way, container, tmp_path):
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(4, 3)
    expected = 2 * linear(linear(x, a), b)
    if way == "in_out":
        expected = 2 * (x @ a.T.contiguous() @ b.T.contiguous())
        a, b = a.T.contiguous(), b.T.contiguous()
    state = {f"{front}{X}.{down}": a, f"{front}{X}.{up}": b}
    path = tmp_path / f"x.{container}"
    save_file(state, path) if container == "safetensors" else torch.save(state, path)
    assert raw.detect(local(path))
    adapter = raw.read(local(path), assume={"alpha": "6"})
    assert adapter.problems == ()
    [(key, delta)] = adapter.deltas.items()
    assert key == f"{X}.weight"
    assert delta.scaling == 2
    found = linear(x, materialise(delta).float())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_convolution_is_what_its_two_layers_compute(tmp_path):
    shapes = {f"{X}.lora_down.weight": (2, 3, 3, 3), f"{X}.lora_up.weight": (5, 2, 1, 1)}
    bundle = keyed(tmp_path / "x.pt", shapes | {f"{X}.alpha": torch.tensor(4.0)})
    state = torch.load(tmp_path / "x.pt")
    x = torch.randn(1, 3, 6, 6)
    a, b = (state[key] for key in shapes)
    delta = raw.read(bundle, assume={}).deltas[f"{X}.weight"]
    found = conv2d(x, materialise(delta).float().reshape(5, 3, 3, 3))
    torch.testing.assert_close(found, 2 * conv2d(conv2d(x, a), b), atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------- orientation

A, B = f"{X}.lora_A", f"{X}.lora_B"
OTHER = "model.layers.1.k"
ONE = {f"{OTHER}.lora_A": (2, 6), f"{OTHER}.lora_B": (5, 2)}  # proves out_in
BACK = {f"{OTHER}.lora_A": (6, 2), f"{OTHER}.lora_B": (2, 5)}  # proves in_out


@pytest.mark.parametrize(
    ("shapes", "assume", "rank", "unsaid"),
    [
        ({A: (2, 8), B: (8, 2)}, {}, 2, True),
        ({A: (8, 2), B: (2, 8)}, {}, 2, True),
        ({A: (8, 2), B: (2, 8)}, {"orientation": "out_in"}, 8, False),
        ({A: (2, 8), B: (8, 2)}, {"orientation": "in_out"}, 8, False),
        ({A: (8, 2), B: (2, 8)} | ONE, {}, 8, False),
        ({A: (2, 8), B: (8, 2)} | BACK, {}, 8, False),
        ({A: (4, 4), B: (4, 4)} | ONE, {}, 4, False),
        ({A: (4, 4), B: (4, 4)} | BACK, {}, 4, False),
        ({A: (4, 4), B: (4, 4)}, {"orientation": "in_out"}, 4, False),
    ],
)
def test_the_orientation_is_proven_or_said(shapes, assume, rank, unsaid, tmp_path):
    bundle = keyed(tmp_path / "x.pt", shapes)
    adapter = raw.read(bundle, assume={"alpha": "1"} | assume)
    assert errors(adapter) == []
    assert adapter.deltas[f"{X}.weight"].rank == rank
    assert adapter.config.get("orientation_unsaid", ()) == ((f"{X}.weight",) if unsaid else ())
    assert [p.code for p in adapter.problems] == (["orientation"] if unsaid else [])


def test_square_factors_alone_are_asked_about(tmp_path):
    adapter = raw.read(keyed(tmp_path / "x.pt", {A: (4, 4), B: (4, 4)}), assume={"alpha": "1"})
    assert errors(adapter) == ["orientation"]
    assert "--assume orientation=out_in" in adapter.problems[0].advice
    assert adapter.config["orientation_unsaid"] == (f"{X}.weight",)


def test_square_factors_are_turned_as_said(tmp_path):
    bundle = keyed(tmp_path / "x.pt", {A: (4, 4), B: (4, 4)})
    state = torch.load(tmp_path / "x.pt")
    x = torch.randn(3, 4)
    expected = {
        "out_in": linear(linear(x, state[A]), state[B]),
        "in_out": x @ state[A] @ state[B],
    }
    for way, numbers in expected.items():
        said = raw.read(bundle, assume={"alpha": "4", "orientation": way})
        found = linear(x, materialise(said.deltas[f"{X}.weight"]).float())
        torch.testing.assert_close(found, numbers, atol=1e-5, rtol=1e-5)


def test_modules_that_prove_different_orientations_are_refused(tmp_path):
    shapes = {A: (6, 2), B: (2, 5)} | ONE
    assert "orientation" in errors(
        raw.read(keyed(tmp_path / "x.pt", shapes), assume={"alpha": "1"})
    )


# ------------------------------------------------------------------------------- refusals

ROWS = {
    "no alpha": (ONE, {}, "alpha_missing", "--assume alpha=16"),
    "no B": ({**ONE, A: (2, 6)}, {"alpha": "1"}, "missing", "factor A without the factor B"),
    "no common rank": ({**ONE, A: (2, 6), B: (5, 3)}, {"alpha": "1"}, "shape_factors", "sharded"),
    "two adapters": (
        {k.replace("lora_A", "lora_A.one").replace("lora_B", "lora_B.two"): s
         for k, s in ONE.items()}, {"alpha": "1"}, "unexplained", "one, two",
    ),
    "a weight merged or not": (
        {**ONE, f"{OTHER}.weight": (5, 6)}, {"alpha": "1"}, "already_merged", "merged=true"
    ),
    "magnitudes": (
        {**ONE, f"{OTHER}.dora_scale": (4, 1)}, {"alpha": "1"}, "shape_factors", "4 magnitudes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_is_wrong_or_unsaid_is_found(row, tmp_path):
    shapes, assume, code, text = ROWS[row]
    adapter = raw.read(keyed(tmp_path / "x.bin", shapes), assume=assume)
    found = [p for p in adapter.problems if p.severity == "error"]
    assert [p.code for p in found] == [code]
    assert re.search(text, found[0].message + found[0].advice)


@pytest.mark.parametrize(
    ("shapes", "assume", "code"),
    [
        (ONE, {"orientation": "sideways"}, "usage"),
        (ONE, {"orientation": "in_out"}, "usage"),
        ({**ONE, f"{OTHER}.alpha": torch.tensor(2.0)}, {"alpha": "3"}, "usage"),
        ({**ONE, f"{OTHER}.alpha": (2, 2)}, {}, "malformed"),
        ({**ONE, f"module.{OTHER}.lora_A": (2, 6)}, {}, "duplicate"),
        ({**ONE, f"{OTHER}.lora_A.weight": (2, 6)}, {}, "duplicate"),
        ({**ONE, A: torch.ones(2, 6, dtype=torch.int8), B: (5, 2)}, {}, "dtype_unusable"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_an_error(shapes, assume, code, tmp_path):
    with pytest.raises(LoratoolsError) as caught:
        raw.read(keyed(tmp_path / "x.bin", shapes), assume=assume)
    assert caught.value.code == code


def test_full_parameters_magnitudes_and_other_alphas_are_kept(tmp_path):
    shapes = {
        **ONE, f"{OTHER}.alpha": torch.tensor(4), f"{OTHER}.dora_scale": (5, 1),
        "head.weight": (3, 6), "snake.alpha": (1, 6, 1),
    }  # fmt: skip
    adapter = raw.read(keyed(tmp_path / "x.bin", shapes), assume={})
    assert adapter.problems == ()
    assert adapter.kinds == {"Renormed": 1, "Replace": 2}
    assert adapter.deltas[f"{OTHER}.weight"].delta.scaling == 2


def test_an_embedding_is_stored_the_other_way_round(tmp_path):
    shapes = {"m.lookup.lora_embedding_A": (2, 9), "m.lookup.lora_embedding_B": (4, 2)}
    adapter = raw.read(keyed(tmp_path / "x.bin", shapes), assume={"alpha": "1"})
    assert adapter.transposed == {"m.lookup.weight"}


@pytest.mark.parametrize(
    "keys",
    [
        ["w_a_000", "w_b_000"], ["emb_params"], ["string_to_param.*"], ["clip_l", "clip_g"],
        ["unet:0:up", "unet:0:down"], ["x.lora.A", "x.lora.B"], ["lora_A", "lora_B"],
        ["x.lora_A"], ["model.embed_tokens.weight", "lm_head.weight"],
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        ["lora_controlnet", "x.lora_down.weight", "x.lora_up.weight"],
        ["x.hada_w1_a", "x.hada_w1_b"], ["x.lora_A.bias", "x.lora_B.bias"],
    ],
    ids=lambda keys: keys[0],
)  # fmt: skip
def test_what_has_no_factors_by_known_names_is_not_taken(keys, tmp_path):
    assert not raw.detect(keyed(tmp_path / "x.bin", dict.fromkeys(keys, (2, 2))))
