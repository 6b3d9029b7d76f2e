"""What is odd and right all the same must come through, with the very numbers it stands for."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.cli import main
from loratools.formats.peft_config import KNOWN
from tests import breaking as b
from tests.breaking import Make, Tensors, config, stored
from tests.containers.torch_bytes import built, saved
from tests.tiny import MODULES, SIZE, numbers, write_adapter, write_base

BASE = "base/model.safetensors"
TOMORROW = {"use_newlora": False, "new_config": None, "new_list": [], "new_pattern": {}}
JINJA = "{{ cycler.__init__.__globals__.os.popen('touch canary') }}\r\n\x1b[2J"
NULLS = KNOWN - {"peft_type", "lora_alpha"}


def linked(*paths: str) -> Make:
    """The files moved out of their folders, with links where they were."""

    def make(here: Path) -> None:
        for number, path in enumerate(paths):
            (here / path).rename(here / f"blob{number}")
            (here / path).symlink_to(here / f"blob{number}")

    return make


def respelt(change) -> Make:
    """The header of the adapter's file, spelt in another way."""

    def rewrite(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        return b.header(change(json.loads(raw[8:start])), raw[start:])

    return b.damaged(rewrite)


def into_torch_file(here: Path, *, legacy: bool = False) -> None:
    tensors = {
        n: torch.frombuffer(bytearray(raw), dtype=torch.float32).view(shape)
        for n, (shape, raw) in stored(here / b.WEIGHTS).items()
    }
    (here / b.WEIGHTS).unlink()
    (here / "a/adapter_model.bin").write_bytes(saved(tensors, legacy=legacy))


def extra_files(here: Path) -> None:
    hostile = built(b.calls("os", "system", "touch canary"))
    (here / "a/training_args.bin").write_bytes(hostile)
    (here / "a/optimizer.pt").write_bytes(b"not read")
    (here / "a/README.md").write_text("---\nbase_model: [broken\n---\n\x1b[2J")
    (here / "a/runs").mkdir()


def in_shards(here: Path) -> None:
    b.sharded(lambda table: table["metadata"].update(total_size=1))(here)
    linked(*(f"base/model-0000{i}.safetensors" for i in (1, 2)))(here)


def convolutions(t: Tensors) -> Tensors:
    return {n: ([*s, 1, 1] if "proj" in n else s, raw) for n, (s, raw) in t.items()}


# What changes no number: the fold must be that of the sound adapter, bit for bit.
SAME: dict[str, tuple[Make, str]] = {
    "unknown field": (config(unsloth_fixed=True), "note[unknown_config]"),
    "fields of tomorrow": (config(**TOMORROW), "note[unknown_config]"),
    "nulls everywhere": (config(**dict.fromkeys(NULLS)), ""),
    "version and revision": (config(peft_version="9.0.0.dev0@x", revision="main"), ""),
    "alpha as a float": (config(lora_alpha=4.0), ""),
    "no targets in config": (config(target_modules=...), ""),
    "all-linear": (config(target_modules="all-linear"), ""),
    "targets by lookahead": (config(target_modules=r".*(?=q_proj|v_proj)\w+"), ""),
    "targets that name others too": (config(target_modules=["q_proj", "v_proj", "x"]), ""),
    "ranks by lookahead": (config(r=9, rank_pattern={r"(?=.*q_proj).*": 4, "v_proj": 4}),
                           "ranks are taken from the tensors"),
    "no modules to save": (config(modules_to_save=[]), ""),
    "config in other words": (b.config_text(
        lambda t: "\r\n\t" + t.replace('"r"', '"\\u0072"').replace(",", ",\r\n ") + "\n"), ""),
    "no card, other files": (extra_files, ""),
    "both containers": (lambda here: torch.save(load_file(here / b.WEIGHTS),
                                                here / "a/adapter_model.bin"),
                        "note[unexplained]"),
    "a broken one beside": (lambda here: (here / "a/adapter_model.bin").write_bytes(b"not read"),
                            "warning[unexplained]"),
    "torch file": (into_torch_file, ""),
    "old torch file": (lambda here: into_torch_file(here, legacy=True), ""),
    "empty metadata": (respelt(lambda t: {"__metadata__": {}, **t}), ""),
    "metadata of null": (respelt(lambda t: {"__metadata__": None, **t}), ""),
    "padded header": (respelt(lambda t: json.dumps(t).encode() + b" " * 999), ""),
    "indented header": (respelt(lambda t: json.dumps(t, indent=2).encode()), ""),
    "links out of the folder": (linked(b.WEIGHTS, b.CONFIG, BASE, "base/config.json"), ""),
    "linked shards, total_size wrong": (in_shards, ""),
    "linked folders": (linked("a", "base"), ""),
    "adapter's name in keys": (b.renamed(".weight", ".default.weight"), ""),
    "no prefix of PEFT's": (b.renamed("base_model.model.", ""), ""),
    "wrapped by DDP": (b.renamed("base_model", "module.base_model"), ""),
    "no prefix of the base's": (b.renamed("model.model.", "model."), 'add prefix "model."'),
    "1x1 convolutions in the adapter": (b.tensors(convolutions), ""),
    "1x1 convolutions in the base": (b.tensors(convolutions, BASE), ""),
    "unknown model_type": (b.base_config(model_type="newmodel", auto_map={"a": "b"}), ""),
    "no config.json": (lambda here: (here / "base/config.json").unlink(), ""),
    "empty config.json": (b.bytes_at("base/config.json", b"{}"), ""),
    "nulls in config.json": (b.base_config(quantization_config=None, text_config=None,
                                           architectures=None), ""),
    "tied and not touched": (b.base_config(tie_word_embeddings=True), ""),
}  # fmt: skip


def as_dtypes(t: Tensors) -> bytes:
    """A in BF16 (cut), B in F32."""
    table, data = {}, b""
    for name, (shape, raw) in t.items():
        dtype = "BF16" if "lora_A" in name else "F32"
        cut = b"".join(raw[i + 2 : i + 4] for i in range(0, len(raw), 4))
        piece = cut if dtype == "BF16" else raw
        table[name] = b.entry(dtype, shape, len(data), len(data) + len(piece))
        data += piece
    return b.header(table, data)


def mixed_dtypes(here: Path) -> None:
    (here / b.WEIGHTS).write_bytes(as_dtypes(stored(here / b.WEIGHTS)))


def unicode_names(here: Path) -> None:
    for path in (b.WEIGHTS, BASE):
        b.tensors(lambda t: {n.replace("q_proj", "注意力-é"): v for n, v in t.items()}, path)(here)


def appended(path: Path, name: str, entry: dict[str, Any], data: bytes) -> None:
    """One more tensor at the end of a file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entry["data_offsets"] = [n + len(raw) - start for n in entry["data_offsets"]]
    path.write_bytes(b.header({**json.loads(raw[8:start]), name: entry}, raw[start:] + data))


def buffers(here: Path) -> None:
    """Tensors of a base that are no floats, or nothing at all."""
    for name, dtype, shape, raw in (
        ("position_ids", "I64", [1, 2], struct.pack("<2q", 1, 2)),
        ("mask", "BOOL", [3], b"\1\0\1"),
        ("none", "F32", [0, 4], b""),
    ):
        appended(here / BASE, f"model.{name}", b.entry(dtype, shape, 0, len(raw)), raw)


def dora(here: Path) -> None:
    magnitudes = {f"base_model.model.{m}.lora_magnitude_vector": m for m in MODULES}
    for name in magnitudes:
        b.tensors(b.plus(name, [SIZE], struct.pack("<8f", *[3.0] * SIZE)))(here)
    config(use_dora=True)(here)


def normed(here: Path) -> None:
    """A normalisation with a scalar and a counter, trained in full."""
    for path, stem in ((b.WEIGHTS, "base_model.model.model.norm"), (BASE, "model.norm")):
        b.tensors(b.plus(f"{stem}.weight", [SIZE], numbers(SIZE, len(path), 1.0)), path)(here)
        b.tensors(b.plus(f"{stem}.scale", []), path)(here)
        appended(here / path, f"{stem}.count", b.entry("I64", [], 0, 8), struct.pack("<q", 7))
    config(modules_to_save=["norm"])(here)


# What changes numbers, and has to be read for what it is.
OTHER: dict[str, tuple[Make, str]] = {
    "rank 1": (b.adapter(rank=1), ""),
    "rank above the size": (b.adapter(rank=3 * SIZE), ""),
    "negative alpha": (config(lora_alpha=-4), ""),
    "one module": (b.adapter(modules=MODULES[:1]), ""),
    "mixed dtypes": (mixed_dtypes, ""),
    "names in other scripts": (unicode_names, ""),
    "buffers in the base": (buffers, ""),
    "DoRA": (dora, ""),
    "a module in full": (normed, ""),
}


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Tensors:
    """The fold of the sound adapter into its base."""
    here = tmp_path_factory.mktemp("sound")
    write_adapter(here / "a")
    write_base(here / "base")
    assert main(["merge", str(here / "a"), "-b", str(here / "base"), "-o", str(here / "out")]) == 0
    return stored(here / "out/model.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_adapter(tmp_path / "a")
    write_base(tmp_path / "base")
    return tmp_path


def must_pass(capsys, says: str, *arguments: str) -> None:
    capsys.readouterr()
    status = main(list(arguments))
    out, err = capsys.readouterr()
    assert status == 0, (arguments, err)
    assert err == ""
    assert says in out
    assert out.replace("\n", "").isprintable()


def commands(capsys, says: str) -> None:
    """All that one does with one adapter and its base."""
    must_pass(capsys, "", "inspect", "a")
    must_pass(capsys, says, "check", "a", "-b", "base", "--data")
    must_pass(capsys, says, "merge", "a", "-b", "base", "-o", "out")


def outputs(folder: Path) -> dict[str, bytes]:
    files = folder.glob("*.safetensors")
    return {n: raw for path in files for n, (_, raw) in stored(path).items()}


@pytest.mark.parametrize("what", SAME)
def test_the_fold_is_that_of_the_sound_adapter(what, here, folded, capsys):
    make, says = SAME[what]
    make(here)
    commands(capsys, says)
    assert outputs(here / "out") == {n: raw for n, (_, raw) in folded.items()}
    assert not (here / "canary").exists()


@pytest.mark.parametrize("what", [*SAME, *OTHER])
def test_written_again_it_folds_alike(what, here, capsys):
    make, _ = (SAME | OTHER)[what]
    make(here)
    if what != "DoRA":  # two of them have a sum over their base only
        must_pass(capsys, "", "merge", "a", "-w", "1", "-o", "again")
        must_pass(capsys, "", "merge", "a", "-b", "base", "-o", "out")
        must_pass(capsys, "", "merge", "again", "-b", "base", "-o", "out2")
        assert outputs(here / "out") == outputs(here / "out2")


@pytest.mark.parametrize("what", OTHER)
def test_other_numbers_come_through(what, here, folded, capsys):
    make, says = OTHER[what]
    make(here)
    commands(capsys, says)
    assert outputs(here / "out") != {n: raw for n, (_, raw) in folded.items()}
    before, after = outputs(here / "base"), outputs(here / "out")
    assert before.keys() == after.keys()
    untouched = {n for n in before if before[n] == after[n]}
    assert "model.embed_tokens.weight" in untouched


def test_a_chat_template_is_copied_and_never_rendered(here, capsys):
    (here / "base/chat_template.jinja").write_bytes(JINJA.encode())
    commands(capsys, "")
    assert (here / "out/chat_template.jinja").read_bytes() == JINJA.encode()
    assert not (here / "canary").exists()


def test_a_base_may_be_one_file(here, folded, capsys):
    shutil.move(here / BASE, here / "weights.safetensors")
    must_pass(capsys, "", "merge", "a", "-b", "weights.safetensors", "-o", "out.safetensors")
    assert main(["merge", "a", "-b", "out.safetensors", "-o", "out.safetensors", "-f"]) == 2
    assert stored(here / "out.safetensors").items() >= folded.items()


def test_every_field_of_peft_is_known():
    from dataclasses import fields

    from peft import LoraConfig, TrainableTokensConfig

    assert {f.name for c in (LoraConfig, TrainableTokensConfig) for f in fields(c)} <= KNOWN
