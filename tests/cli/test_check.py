"""`loratools check`: problems, verdict, exit status."""

import pytest

from tests.tiny import write_adapter


def test_all_is_well(here, run):
    ended = run("check", "a", "b", "--base", "base")
    assert ended.status == 0
    assert ended.out == "ok: 8 of 8 targets match the base\n"
    assert run("check", "a").out == "ok: 4 targets read; --base BASE checks their fit\n"


def test_json(here, run):
    table = run("check", "a", "-b", "base", "--json").json
    assert table["ok"] is True
    assert (table["matched"], table["total"]) == (4, 4)
    assert table["problems"] == []
    write_adapter(here / "odd", lora_alpha=4000)
    problem = run("check", "odd", "--json").json["problems"][0]
    assert set(problem) == set("code severity adapter target message remedy waivable".split())


@pytest.mark.parametrize(
    ("config", "code", "status"),
    [
        ({"r": 8}, "config_conflict", 4),
        ({"use_dora": True}, "missing", 4),
        ({"init_lora_weights": "loftq"}, "residual_base", 5),
    ],
)
def test_problems_decide_on_the_exit_status(here, run, config, code, status):
    write_adapter(here / "odd", **config)
    ended = run("check", "odd", "--base", "base")
    assert ended.status == status
    assert f"error[{code}]: " in ended.out
    assert ended.out.splitlines()[-1].startswith("does not fit: ")
    with_json = run("check", "odd", "--base", "base", "--json")
    assert with_json.status == status
    assert with_json.json["ok"] is False


def test_the_lowest_class_counts(here, run):
    write_adapter(here / "odd", r=8, init_lora_weights="loftq")
    ended = run("check", "odd", "--base", "base")
    assert ended.status == 4
    assert "error[residual_base]" in ended.out


def test_waivers_and_their_reverse(here, run):
    write_adapter(here / "odd", init_lora_weights="loftq", lora_alpha=4000)
    waived = run("check", "odd", "-b", "base", "--allow", "residual_base")
    assert waived.status == 0
    assert "warning[residual_base]" in waived.out
    assert waived.out.splitlines()[-1].startswith("ok: 5 warnings; 4 of 4")
    harder = run("check", "odd", "--fail-on", "warning")
    assert harder.status == 5
    assert "error[scaling_unusual]" in harder.out


def test_quiet_prints_errors_only(here, run):
    assert run("check", "a", "-b", "base", "-q").out == ""
    write_adapter(here / "odd", init_lora_weights="loftq", lora_alpha=4000)
    said = run("check", "odd", "-b", "base", "-q").out
    assert said.startswith("error[residual_base]")
    assert "warning" not in said


def test_typical_mistakes(here, run):
    unused = run("check", "a", "--allow", "unmatched")
    assert unused.status == 2
    assert "lets nothing through" in unused.err
    unknown = run("check", "a", "--allow", "everything")
    assert unknown.status == 2
    assert "no such code; see `loratools explain`" in unknown.err
    glob = run("check", "a", "-b", "base", "--only", "attn")
    assert glob.status == 2
    assert "names no target; targets are model.layers.0" in glob.err


# ------------------------------------------------------------------------------- for a reader


def test_a_reader_that_takes_it_ends_in_the_line_to_paste(here, run):
    ended = run("check", "a", "--base", "base", "--for", "vllm@0.11.0")
    assert ended.status == 0
    assert ended.out.splitlines() == [
        "ok: 4 of 4 targets match the base",
        "vllm serve base --enable-lora --max-lora-rank 8 --lora-modules a=a",
    ]
    table = run("check", "a", "--for", "vllm", "--json").json
    assert table["reader"] == "vllm"
    assert table["line"].startswith("vllm serve BASE --enable-lora")
    assert run("check", "a", "--json").json["line"] is None


def test_a_reader_that_does_not_ends_in_what_makes_it_acceptable(here, run):
    ended = run("check", "a", "--for", "llama.cpp")
    assert ended.status == 5
    assert "error[reader_refuses]: a: llama.cpp refuses it: " in ended.out
    assert ended.out.splitlines()[-2].startswith("not for llama.cpp: 1 error; ")
    assert ended.out.splitlines()[-1] == (
        "loratools convert a --to gguf --base BASE -o a-llama.cpp.gguf"
    )
    write_adapter(here / "odd", r=8)
    both = run("check", "odd", "--base", "base", "--for", "llama.cpp")
    assert both.status == 4
    assert both.out.splitlines()[-1].startswith("does not fit: ")


def test_a_reader_is_waived_by_its_rule(here, run):
    waived = run("check", "a", "--for", "llama.cpp", "--allow", "reader_refuses:llama.cpp.format")
    assert waived.status == 0
    assert waived.out.splitlines()[-1] == "llama-server -m BASE.gguf --lora a"


@pytest.mark.parametrize(
    ("reader", "said"),
    [("whatever", "no such reader; known are vllm"), ("vllm@new", "expected numbers and dots")],
)
def test_no_reader_and_no_version(here, run, reader, said):
    ended = run("check", "a", "--for", reader)
    assert ended.status == 2
    assert said in ended.err
