"""`loratools merge`: summaries, weights on the command line, JSON, mistakes."""

import json

import pytest

from loratools.cli.merge import parsed
from loratools.errors import UsageError
from tests.tiny import MODULES, write_adapter

KEYS = "makes output targets method weights truncation_error update_kept seconds bytes".split()


def test_a_fold_says_what_it_made_and_what_comes_next(here, run):
    ended = run("merge", "a", "--base", "base", "-o", "out")
    assert ended.status == 0
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0].startswith("fold: 1 adapter into base -> model, ")
    assert lines[2].split() == ["targets", "count", "scaling", "relative", "size", "kept"]
    assert lines[3].split()[:3] == ["model.layers.*.self_attn.q_proj", "2", "1"]
    assert "  4 of 4 targets" in lines
    assert lines[-2].startswith("Written to out in ")
    assert lines[-1] == "Next: loratools verify out"
    assert all(len(line) <= 80 for line in lines)
    assert (here / "out" / "loratools.json").is_file()


def test_a_merge_says_its_truncation_error_and_what_comes_next(here, run):
    ended = run("merge", "a", "b", "-w", "0.7,-0.3", "--rank", "2", "-o", "out dir")
    lines = ended.out.splitlines()
    assert lines[0].startswith("merge: 2 adapters -> adapter, rank 2, ")
    assert "  linear, weights 0.7, -0.3" in lines
    assert any(line.endswith(" % truncation error, of the update's norm") for line in lines)
    assert lines[-1] == "Next: loratools merge 'out dir' --base BASE -o MODEL"


def test_a_prefix_is_applied_and_said(here, run):
    write_adapter(here / "c", modules=[m.removeprefix("model.") for m in MODULES])
    said = '  names: add prefix "model."'
    assert said in run("merge", "c", "-b", "base", "-o", "out").out.splitlines()
    assert said.strip() in run("check", "c", "-b", "base").out.splitlines()


def test_a_dry_run_writes_nothing(here, run):
    ended = run("merge", "a", "-b", "base", "-n")
    assert ended.status == 0
    assert ended.out.splitlines()[0].endswith(" (dry run)")
    assert ended.out.splitlines()[-1] == "Nothing was written."
    assert {p.name for p in here.iterdir()} == {"a", "b", "base"}


def test_json(here, run):
    table = run("merge", "a:0.5", "b:-2", "-o", "out", "--json").json
    assert set(KEYS) <= table.keys()
    assert table["weights"] == [0.5, -2]
    assert table["output"] == "out"
    assert run("merge", "a", "-b", "base", "-o", "m", "--json").json["update_kept"] > 0.99


def test_quiet_says_nothing_and_does_the_work(here, run):
    ended = run("merge", "a", "b", "-w", "mean", "-o", "out", "-q")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    receipt = json.loads((here / "out" / "loratools.json").read_text())
    assert [a["weight"] for a in receipt["recipe"]["adapters"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        (None, None),
        (["0.7,-0.3"], [0.7, -0.3]),
        (["-0.7", "0.3"], [-0.7, 0.3]),
        (["-1e-3, 2"], [-0.001, 2.0]),
        (["mean"], "mean"),
        (["a=0.8;b=0.4"], ["a=0.8;b=0.4"]),
        (["lbw=1,0,1", "2,3"], ["lbw=1,0,1", 2.0, 3.0]),
    ],
)
def test_weights_as_typed(given, weights):
    assert parsed(given) == weights


@pytest.mark.parametrize("given", [["mean,1"], ["half"], ["1,,2"], [""]])
def test_weights_that_are_none(given):
    with pytest.raises(UsageError, match=r"expected numbers such as 0\.7,0\.3, or mean"):
        parsed(given)


def test_weights_of_parts_reach_a_fold_its_summary_and_its_receipt(here, run):
    spec = "*q_proj*=0.5;*=-2"
    table = run("merge", "a", "-w", spec, "-b", "base", "-o", "out", "--json").json
    assert table["weights"] == [spec]
    receipt = json.loads((here / "out" / "loratools.json").read_text())
    assert receipt["recipe"]["adapters"][0]["weight"] == spec
    assert run("verify", "out", "--require", "replay").status == 0
    lines = run("merge", "a", "b", "-w", spec, "-w", "3", "-o", "both").out.splitlines()
    assert f"  linear, weights {spec}, 3" in lines


def test_a_part_that_names_nothing_is_a_mistake(here, run):
    ended = run("merge", "a", "-w", "unet=1;*=2", "-b", "base", "-o", "out")
    assert (ended.status, ended.out) == (2, "")
    assert "unet names no target" in ended.err
    ended = run("merge", "a", "-w", "*q_proj*=1", "-b", "base", "-o", "out")
    assert (ended.status, ended.out) == (2, "")
    assert "no part names" in ended.err


def test_weights_reach_the_merge(here, run):
    for words in (["-w", "-0.7,0.3"], ["-w", "-0.7", "-w", "0.3"], ["--weights=-0.7,0.3"]):
        table = run("merge", "a", "b", *words, "-o", "out", "--dry-run", "--json").json
        assert table["weights"] == [-0.7, 0.3]


def test_a_receipt_is_a_recipe(here, run):
    run("merge", "a", "b", "-w", "1,-0.5", "-b", "base", "-o", "first")
    ended = run("merge", "--recipe", "first/loratools.json", "-o", "second")
    assert ended.status == 0
    assert ended.out.splitlines()[-1] == "Next: loratools verify second"
    both = [(here / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert both[0] == both[1]


def test_all_problems_are_listed_and_nothing_is_written(here, run):
    config = json.loads((here / "a" / "adapter_config.json").read_text())
    config.update(r=9, init_lora_weights="loftq")
    (here / "a" / "adapter_config.json").write_text(json.dumps(config))
    ended = run("merge", "a", "-b", "base", "-o", "out", "--json")
    assert ended.status == 4
    assert ended.json["error"]["code"] == "config_conflict"
    assert ended.json["error"]["exit"] == 4
    codes = [p["code"] for p in ended.json["error"]["problems"]]
    assert codes.count("config_conflict") == 4
    assert codes.count("residual_base") == 1
    assert ended.err.splitlines()[-1] == "5 errors; nothing was written"
    assert not (here / "out").exists()


def test_typical_mistakes(here, run):
    alone = run("merge", "a", "-o", "out")
    assert alone.status == 2
    assert "loratools merge a --base BASE -o out " in alone.err
    assert "loratools convert a --rank N -o out " in alone.err
    unweighted = run("merge", "a", "b", "-o", "out")
    assert unweighted.status == 2
    assert "-w 1,1 adds them up, -w mean (0.5,0.5) averages" in unweighted.err
    into_input = run("merge", "a", "-b", "base", "-o", "base")
    assert into_input.status == 2
    assert "error[same_path]" in into_input.err
    run("merge", "a", "-b", "base", "-o", "out")
    again = run("merge", "a", "-b", "base", "-o", "out")
    assert again.status == 7
    assert "error[output_exists]" in again.err
    assert run("merge", "a", "-b", "base", "-o", "out", "-f").status == 0
    assert run("merge", "a", "b", "-w", "1", "-o", "x").status == 2
    assert run("merge", "a", "--base", "base").err.startswith("error[usage]: merge needs an output")
