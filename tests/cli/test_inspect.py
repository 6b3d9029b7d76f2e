"""`loratools inspect`: one adapter, a table of several, what is none, hostile names."""

import pytest

from tests.tiny import SIZE, numbers, safetensors, write_adapter

KEYS = [
    "format",
    "kinds",
    "ranks",
    "scalings",
    "targets",
    "parameters",
    "bytes",
    "base",
    "foldable",
]


def test_one_adapter_on_a_screen(here, run):
    ended = run("inspect", "a")
    assert ended.status == 0
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0] == "a: peft adapter, 1.02 kB"
    said = dict(line.split(None, 1) for line in lines[1:])
    assert said["kinds"] == "LowRank"
    assert said["ranks"] == "4"
    assert said["scaling"] == "1"
    assert said["targets"] == "4: q_proj (2), v_proj (2)"
    assert said["parameters"] == "256 in F32"
    assert said["foldable"] == "yes"


def test_a_loha_has_a_rank_on_the_screen_too(here, run):
    import peft
    import torch

    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(8, 8))
    config = peft.LoHaConfig(r=2, alpha=1, target_modules=["fc"], init_weights=False)
    peft.get_peft_model(model, config).save_pretrained(here / "loha")
    said = dict(line.split(None, 1) for line in run("inspect", "loha").out.splitlines()[1:])
    assert (said["kinds"], said["ranks"], said["scaling"]) == ("Hadamard", "2", "0.5")


def test_json_of_one_and_of_several(here, run):
    one = run("inspect", "a", "--json").json
    assert set(KEYS) <= one.keys()
    assert one["ranks"] == {"4": 4}
    assert one["base"] == {"id": None, "revision": None}
    several = run("inspect", "a", "b", "--json").json
    assert [i["source"] for i in several["items"]] == ["a", "b"]


def test_a_folder_of_adapters_is_a_table_cut_to_the_terminal(here, run):
    write_adapter(here / "runs" / ("long-name-" * 8), 3)
    write_adapter(here / "runs" / "short", 4, rank=2, base_model_name_or_path="org/model")
    lines = run("inspect", "runs").out.splitlines()
    assert lines[0].split() == "adapter format kinds rank scaling targets size base".split()
    assert lines[1].split() == [
        "runs/short",
        "peft",
        "LowRank",
        "2",
        "1",
        "4",
        "512",
        "B",
        "org/model",
    ]
    assert all(len(line) <= 80 for line in lines)
    assert lines[2].lstrip().startswith("...")


def test_what_is_no_adapter_is_named_and_is_no_failure(here, run):
    ended = run("inspect", "base")
    assert ended.status == 0
    assert ended.out.startswith("base: no adapter; it looks like a base model")
    assert run("inspect", "base", "--json").json["format"] is None
    assert "  base: no adapter" in run("inspect", "a", "base").out


def test_problems_are_told_in_full_for_one_and_counted_in_a_table(here, run):
    write_adapter(here / "odd", 5, lora_alpha=4000)
    assert "warning[scaling_unusual]: odd: model.layers.0" in run("inspect", "odd").out
    table = run("inspect", "a", "odd").out
    assert "odd: 4 warnings; see loratools inspect odd" in table
    assert "warning[" not in table


@pytest.mark.parametrize("paths", [["evil"], ["evil", "a"]])
def test_hostile_text_is_printed_escaped(here, run, paths):
    folder = write_adapter(
        here / "evil",
        base_model_name_or_path="me/\x1b[2J\u202e\nerror[x]: y",
        task_type="\x1b]0;title\x07",
        revision="\x9b31m",
    )
    key = "base_model.model.x\x1b[2J\u202e\nok: fine.lora_A.weight"
    raw = safetensors({key: ([1, SIZE], numbers(SIZE, 1, 1.0))})
    (folder / "adapter_model.safetensors").write_bytes(raw)
    for command in ["inspect", "check"]:
        ended = run(command, *paths)
        text = ended.out + ended.err
        assert not any(c in text for c in "\x1b\u202e\x07\x9b")
        assert not any(line.startswith(("ok: fine", "error[x]")) for line in text.splitlines())


def test_a_hostile_path_is_printed_escaped(here, run):
    name = "evil\x1b[2J\u202e\nerror[x]: y"
    write_adapter(here / name)
    for arguments in (
        ["inspect", name],
        ["convert", name, "-o", "out"],
        ["merge", name, "-o", "x"],
    ):
        ended = run(*arguments)
        assert "\x1b" not in ended.out + ended.err
        assert "\u202e" not in ended.out + ended.err


def test_typical_mistakes(here, run):
    missing = run("inspect", "nowhere")
    assert missing.status == 10
    assert missing.out == ""
    assert missing.err.startswith("error[not_found]: no file or folder named nowhere\n  -> ")
    nothing = run("inspect")
    assert nothing.status == 2
    assert "Missing argument 'PATH...'" in nothing.err
    assert "loratools inspect --help" in nothing.err
    (here / "cut").mkdir()
    whole = (here / "a" / "adapter_model.safetensors").read_bytes()
    (here / "cut" / "adapter_model.safetensors").write_bytes(whole[:-100])
    assert run("inspect", "cut").status == 3


# ------------------------------------------------------------------------------- folders, hashes


def test_the_order_of_the_table(here, run):
    for name, rank in (("x", 2), ("y", 8), ("z", 4)):
        write_adapter(here / "runs" / name, 3, rank=rank)
    by_name = run("inspect", "runs").out.splitlines()[1:]
    assert [line.split()[0] for line in by_name] == ["runs/x", "runs/y", "runs/z"]
    by_rank = run("inspect", "runs", "--sort", "rank").out.splitlines()[1:]
    assert [line.split()[0] for line in by_rank] == ["runs/y", "runs/z", "runs/x"]
    assert run("inspect", "runs", "--sort", "colour").status == 2


def test_a_bad_file_is_a_row_and_decides_on_the_status(here, run):
    write_adapter(here / "runs" / "good", 3)
    bad = write_adapter(here / "runs" / "cut", 4) / "adapter_model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-11])
    ended = run("inspect", "runs")
    assert ended.status == 3
    assert "runs/good" in ended.out
    [line] = [text for text in ended.out.splitlines() if "truncated" in text]
    assert line.startswith("  error[truncated]: ")
    assert "11 bytes are missing" in line
    with_json = run("inspect", "runs", "--json")
    assert with_json.status == 3
    errors = {i["source"]: i["error"] and i["error"]["code"] for i in with_json.json["items"]}
    assert errors == {"runs/good": None, "runs/cut": "truncated"}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\nsize 77\n", "git-lfs pointer"),
        (b"<!doctype html><html>", "web page"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.gguf", "x.onnx_adapter"])
def test_what_is_not_the_file_exits_with_3(here, run, name, raw, said):
    (here / name).write_bytes(raw)
    ended = run("inspect", name)
    assert ended.status == 3
    assert said in ended.err


def test_hashes_words_and_duplicates(here, run):
    write_adapter(here / "runs" / "one", 3)
    write_adapter(here / "runs" / "two", 3)
    table = run("inspect", "runs", "--hash").out
    assert table.splitlines()[0].split()[-2:] == ["AutoV2", "AutoV3"]
    assert "  runs/two: holds the same tensors as runs/one" in table
    alone = run("inspect", "runs/one", "--hash")
    said = dict(line.split(None, 1) for line in alone.out.splitlines()[1:])
    assert said["AutoV3"] in table
    assert run("inspect", "runs/one", "--json").json["hashes"] is None


def test_every_key_that_was_shipped_is_there(here, run):
    keys = (
        "source format looks_like kinds ranks scalings targets modules parameters bytes dtypes "
        "base task foldable problems error architecture title trigger_words tags hashes "
        "duplicate_of schema runtime"
    )
    assert set(run("inspect", "a", "--json").json) == set(keys.split())
    assert set(run("inspect", "base", "--json").json) == set(keys.split())
