"""Inputs that must not come through: the list of reasons, one row each, as the commands see them.

The numbers count all reasons that we know of for 1-69. Elsewhere: 5 and further header bombs
(containers/test_safetensors), 26 and 29-34 in full (containers/test_pickle_walk, test_torch_zip,
test_zip_directory), 28 (test_house), 35-41 (hostile_files: npz, tar, YAML, GGUF; with flatbuffers
and the names of image programs). 18 and 46 are valid (test_valid_inputs). Of formats and commands
that do not exist yet: 42-43 (ONNX as a base), 47 (cards), 50-51 (the Hub). Crashes, full disks and
races: weights/test_disk, test_publishing*.
"""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from tests import breaking as b
from tests.breaking import EMBEDDING, HEAD, STEM, entry, weights
from tests.containers import torch_bytes
from tests.tiny import MODULES, SIZE, numbers

F = 4 * SIZE  # bytes of one row
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"
TARGET = f"{MODULES[0]}.weight"
BASE = "base/model.safetensors"
CACHED = "models--y--Mistral-7B"
EXPLODING = r"(\w+\.?)+!"
OUTSIDE = "names a shard outside the folder"
FEW = entry("F32", [2], 0, 8)


@dataclass(frozen=True)
class Row:
    """One input: its number, what it is, how it is made, how merge ends and what it says.

    `inspect` is that command's status; `check` ends as `merge` does, but where it has its own.
    """

    number: int
    what: str
    make: b.Make
    status: int
    says: str
    inspect: int = 3
    check: int | None = None
    more: tuple[str, ...] = ()
    base: str = "base"

    def __str__(self) -> str:
        return f"{self.number} {self.what}"


def bad(number: int, says: str, **makes: b.Make) -> list[Row]:
    """Rows of adapters that are malformed."""
    return [Row(number, what.replace("_", " "), make, 3, says) for what, make in makes.items()]


def odd_shape(shape: object, nbytes: int = 8) -> b.Make:
    return weights({"x": entry("F32", shape, 0, nbytes)}, bytes(nbytes))


def with_zip(raw: bytes) -> bytes:
    return raw + torch_bytes.archive(torch_bytes.File(b"x"))


def key(name: str) -> b.Make:
    return b.renamed(MODULES[0], name)


FILES = [
    *bad(1, '"x" stands twice', tensor_twice=weights(
        b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))),
    *bad(2, "stands twice", metadata_twice=weights(b'{"__metadata__":{},"__metadata__":{}}'),
         dtype_twice=weights(b'{"x":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
                             bytes(1))),
    *bad(3, "unknown fields (scale)",
         unknown_field=weights({"x": entry("F32", [2], 0, 8, scale=2)}, bytes(8))),
    *bad(4, "promise a header of", header_2_to_63=weights(b"{}", length=1 << 63),
         header_200_MB=weights(b"{}", length=200_000_000)),
    *bad(6, "overlaps", overlap=weights({"x": FEW, "y": entry("F32", [2], 4, 12)}, bytes(12))),
    *bad(6, "leaves a hole", hole=weights({"x": FEW, "y": entry("F32", [2], 12, 20)}, bytes(20))),
    *bad(6, "bytes follow the last tensor", a_zip_behind=b.damaged(with_zip)),
    *bad(6, "bytes are missing at the end", truncated=b.damaged(lambda raw: raw[:-100])),
    *bad(6, "hold -8", reversed=weights({"x": entry("F32", [2], 8, 0)}, bytes(8))),
    *bad(7, "larger than any tensor", two_to_66=odd_shape([1 << 33, 1 << 33]),
         zero_times_much=odd_shape([0, 1 << 62, 1 << 62], 0)),
    *bad(7, "dimensions", nine_dimensions=odd_shape([1] * 9, 4)),
    *bad(7, "of at most 4000 bytes", ten_thousand_dimensions=odd_shape([1] * 10_000, 4)),
    *bad(8, "is no list of whole numbers", negative=odd_shape([-2]), fraction=odd_shape([2.0]),
         text=odd_shape("2"), truth=odd_shape([True, 2])),
    *bad(8, "NaN is no JSON number", nan_offset=weights(
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', bytes(8))),
    Row(9, "an empty factor", b.tensors(b.plus(A, [0, SIZE], b"")), 4, "A is (0, 8)", inspect=0),
    *bad(10, "unknown dtype F33", F33=weights({"x": entry("F33", [2], 0, 8)}, bytes(8))),
    *bad(10, "expected floats", **{d: b.retyped(d) for d in ("F4", "F8_E8M0", "C64", "BOOL")}),
    *bad(11, "expected floats", I8=b.retyped("I8"), I32_in_one=b.retyped("I32", B),
         I32_magnitude=b.then(b.tensors(b.plus(f"{STEM}.lora_magnitude_vector", [SIZE])),
                              b.retyped("I32", "_vector"), b.config(use_dora=True))),
    Row(11, "I32 for a saved weight", b.then(
        b.tensors(b.plus(f"base_model.model.{EMBEDDING}.weight", [5, SIZE])),
        b.retyped("I32", f"{EMBEDDING}.weight"), b.config(modules_to_save=["embed_tokens"])), 3,
        "I32 would replace F32", inspect=0),
    *(Row(12, what, key(name), 3, says, inspect=0) for what, name, says in [
        ("escape", "x\x1b[2J\x07y", r"x\x1b[2J\x07y"), ("right to left", "x\u202ey", r"x\u202ey"),
        ("newline", "x\nerror: y", r"x\nerror: y"), ("NUL", "x\0y", r"x\x00y"),
        ("empty", "", "is no name of a module")]),
    Row(12, "a key of 1 MB", key("x" * 1_000_000), 4, "xxx...", inspect=0),
    Row(13, "a key that is a path", key("../../etc/x"), 3, "is no name of a module", inspect=0),
    *bad(14, "not with", BOM=weights(b"\xef\xbb\xbf{}"), spaces=weights(b"  {}")),
    *bad(14, r"}\x00\x00", NUL_padding=weights(b"{}\0\0")),
    *bad(14, "half of a surrogate", half_a_character=weights(
        rb'{"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))),
    *bad(15, "is empty", empty=b.bytes_at(b.WEIGHTS, b"")),
    *bad(15, "git lfs pull", pointer=b.bytes_at(b.WEIGHTS, b"version https://git-lfs.com/spec/v1")),
    *bad(15, "a web page", page=b.bytes_at(b.WEIGHTS, b"<!DOCTYPE html><html></html>")),
    *bad(15, "gzip", gz=b.bytes_at(b.WEIGHTS, b"\x1f\x8b\x08" + bytes(60))),
    Row(15, "a folder", b.instead(b.WEIGHTS, Path.mkdir), 4, "without the weights file", inspect=0),
    *bad(16, "a FIFO", FIFO=b.instead(b.WEIGHTS, os.mkfifo),
         FIFO_as_config=b.instead(b.CONFIG, os.mkfifo)),
    *bad(16, "a socket", socket=b.instead(b.WEIGHTS, b.bind_socket)),
    *bad(16, "a device", endless=b.instead(b.WEIGHTS, lambda p: p.symlink_to("/dev/zero"))),
    *bad(16, "is empty", proc=b.instead(b.WEIGHTS, lambda p: p.symlink_to("/proc/self/maps"))),
    *(Row(17, f"shard {path!r}", b.shard_at(path), 3, OUTSIDE, inspect=0) for path in (
        "../x.safetensors", "/etc/x.safetensors", "a/../../x", "C:\\x", "x\0y", "..", "")),
    Row(17, "shard that is no text", b.sharded(lambda t: t["weight_map"].update(x=[1])), 3,
        "must map names to file names", inspect=0),
    Row(17, "shard that is not there", b.shard_at("x.safetensors"), 4, "not there", inspect=0),
    Row(17, "shard that is a FIFO", b.then(b.shard_at("x.safetensors"), lambda here:
        os.mkfifo(here / "base/x.safetensors")), 3, "a FIFO", inspect=0),
    Row(19, "index lists more", b.sharded(lambda t: t["weight_map"].update(
        x="model-00001.safetensors")), 4, "which lacks it", inspect=0),
    Row(20, "shard has more", b.sharded(lambda t: t["weight_map"].pop(TARGET)), 3,
        "shards of two runs are mixed", inspect=0),
    Row(20, "in two shards", b.then(b.sharded(), lambda here: shutil.copy(
        here / "base/model-00001.safetensors", here / "base/model-00002.safetensors")), 3,
        "stands in two shards", inspect=0),
    Row(21, "truncated shard", b.then(b.sharded(), b.damaged(
        lambda raw: raw[:-100], "base/model-00002.safetensors")), 3, "100 bytes are missing",
        inspect=0),
    Row(22, "a base of zeros", b.zeroed(*MODULES), 5, "hold only zeros", inspect=0),
    Row(22, "a weight of zeros", b.zeroed(MODULES[0]), 0, "warning[zero_base]", inspect=0),
    *bad(23, "stands twice (4 and 800)", key_twice=b.config_text(
        lambda t: t[:-1] + ', "lora_alpha": 800}')),
    *bad(24, "is no JSON number", **{word: b.config_text(
        lambda t, w=word: t.replace('"lora_alpha": 4', f'"lora_alpha": {w}'))
        for word in ("NaN", "Infinity")}),
    *bad(24, "is too large", ten_to_400=b.config_text(
        lambda t: t.replace('"lora_alpha": 4', '"lora_alpha": 1e400'))),
    *bad(24, "nested deeper", nested=b.config_text(lambda t: '{"x":' * 100_000)),
    *bad(24, "at most", fifty_MB=b.config_text(lambda t: t + " " * 50_000_000)),
    *bad(24, "UTF-16", UTF_16=b.config_text(lambda t: t.encode("utf-16"))),
    *bad(24, "byte order mark", BOM_in_config=b.config_text(lambda t: "\ufeff" + t)),
    *bad(24, "holds a list", a_list=b.config_text(lambda t: f"[{t}]")),
]  # fmt: skip

CODE = [
    *bad(25, "os.system", a_call=b.torch_file(torch_bytes.built(b.calls("os", "system", "x")))),
    *bad(26, "pydoc.locate", another=b.torch_file(torch_bytes.built(b.calls("pydoc", "locate")))),
    *bad(27, "os.system", then_broken=b.torch_file(
        torch_bytes.built(b.calls("os", "system", "x")[:-2]))),
    *bad(27, "adapter_model.bin", truncated_zip=b.torch_file(
        torch_bytes.built({"w": torch_bytes.tensor()})[:-40])),
    *bad(29, "tar archive", tar=b.torch_file(bytes(257) + b"ustar" + bytes(300))),
    *bad(30, "is compressed", deflated=b.torch_file(torch_bytes.archive(*[
        torch_bytes.File(f.name, f.data, method=8) for f in torch_bytes.HONEST]))),
    *bad(31, "adapter_model.bin", stride_0=b.torch_file(torch_bytes.built(
        {"w": torch_bytes.tensor(None, 0, (1 << 34,), (0,))}))),
    *bad(32, "should have", storage_without_data=b.torch_file(torch_bytes.built(
        {"w": torch_bytes.tensor(torch_bytes.stored("0", (1 << 31) - 1))}))),
    *bad(33, "adapter_model.bin", lists_doubled=b.torch_file(
        torch_bytes.built(torch_bytes.DOUBLED["lists doubled"]))),
    *bad(34, "adapter_model.bin", two_pickles=b.torch_file(torch_bytes.archive(
        *torch_bytes.HONEST, torch_bytes.HONEST[0]))),
    Row(25, "a base that calls", b.then(lambda here: (here / BASE).unlink(), b.bytes_at(
        "base/pytorch_model.bin", torch_bytes.built(b.calls("os", "system", "x")))), 3,
        "os.system", inspect=0),
    Row(44, "remote code", b.then(
        b.base_config(auto_map={"AutoModel": "evil.X"}, trust_remote_code=True),
        b.bytes_at("base/evil.py", b"open('canary', 'w')")), 0, "code that loading may run",
        inspect=0, check=0),
    Row(45, "a class to import", b.config(auto_mapping={
        "base_model_class": "system", "parent_library": "os"}), 0, "4 of 4 targets", inspect=0),
    *(Row(48, field, b.config(**{field: {EXPLODING: 8}}), 4, "no module of the adapter matches",
          inspect=0) for field in ("rank_pattern", "alpha_pattern")),
    Row(48, "target_modules", b.config(target_modules=EXPLODING), 0, "4 of 4", inspect=0),
    Row(48, "modules_to_save", b.config(modules_to_save=[EXPLODING]), 4, "has none of it",
        inspect=0),
    *(Row(49, f"r={r!r}", b.config(r=r), 4, "config", inspect=0)
      for r in (10**9, 0, -4, "4", True, 1.5)),
    *(Row(49, f"alpha={str(alpha)[:9]!r}", b.config(lora_alpha=alpha), 3, "expected a number")
      for alpha in ("8", True, [8], {"x": "y" * 10_000})),
    Row(49, "alpha=0", b.config(lora_alpha=0), 5, "every alpha of a is 0", inspect=0),
    Row(49, "alpha=8000", b.config(lora_alpha=8000), 5, "larger than the base weight", inspect=0),
    *(Row(49, f"{field}={value!r}", b.config(**{field: value}), 3, f"{field} is")
      for field, value in [
          ("use_rslora", 1), ("use_dora", "yes"), ("rank_pattern", [4]), ("alpha_pattern", "q"),
          ("target_modules", [1, "q_proj"]), ("modules_to_save", {"a": 1}), ("task_type", ["x"]),
          ("fan_in_fan_out", "false")]),
    *(Row(49, f"base's {field}={value!r}", b.base_config(**{field: value}), 3, f"{field} is",
          inspect=0) for field, value in [
              ("model_type", ["gpt2"]), ("architectures", "X"), ("tie_word_embeddings", "false")]),
]  # fmt: skip

WRONG = [
    Row(52, "all keys renamed", b.renamed("self_attn", "attention"), 4, "0 of 4 deltas matched"),
    Row(53, "one key renamed", b.renamed("layers.1.self_attn.v", "layers.1.self_attn.w"), 4,
        "3 of 4 deltas matched"),
    Row(53, "a layer that the base lacks", b.without_base_tensor(TARGET), 4,
        "3 of 4 deltas matched"),
    Row(54, "A without B", b.without("0.self_attn.q_proj.lora_B.weight"), 4, "without lora_B"),
    Row(54, "B without A", b.without("0.self_attn.q_proj.lora_A.weight"), 4, "without lora_A"),
    Row(54, "factors that cannot multiply", b.tensors(b.plus(B, [SIZE, 3])), 4, "B is (8, 3)"),
    Row(54, "config's rank", b.config(r=8), 4, "config says r=8, A has 4 rows"),
    Row(55, "another size", b.base_tensor(TARGET, [16, 16]), 4,
        "adapter is (8, 8), base is (16, 16)"),
    Row(56, "another base by name", b.then(b.config(base_model_name_or_path="x/Llama-2-7b"),
        lambda here: (here / "base").rename(here / CACHED)), 0, "warning[other_base]", base=CACHED),
    Row(57, "merged already", b.merged_before, 5, "error[already_merged]"),
    Row(57, "merged already, no receipt", b.then(b.scaled(23.0), b.merged_before,
        lambda here: (here / "base/loratools.json").unlink()), 0, "warning[already_merged]"),
    Row(58, "no alpha", b.config(lora_alpha=...), 5, "has no lora_alpha"),
    Row(58, "no config", lambda here: (here / b.CONFIG).unlink(), 5, "no adapter_config.json"),
    Row(58, "alpha that is no number given", b.config(lora_alpha=...), 2, "expected a finite",
        inspect=0, check=5, more=("--assume", "alpha=nan")),
    Row(58, "alpha_pattern of nothing", b.config(alpha_pattern={"k_proj": 8}), 4, '"k_proj"'),
    Row(58, "rsLoRA", b.config(use_rslora=True, lora_alpha=2), 0, "q_proj      2        1  "),
    Row(59, "tied, by the head", b.then(b.on(HEAD, 5, SIZE),
        b.base_config(tie_word_embeddings=True)), 5, "are one tensor in the base"),
    Row(59, "tied, by the embedding", b.then(b.tensors(
        b.plus(f"base_model.model.{EMBEDDING}.weight", [5, SIZE])),
        b.base_config(tie_word_embeddings=True)), 5, "are one tensor in the base"),
    Row(60, "saved module not in config", b.tensors(b.plus("base_model.model.score.weight",
        [2, SIZE])), 4, "modules_to_save does not name"),
    Row(60, "bias not in config", b.tensors(b.plus(f"{STEM}.bias", [SIZE])), 4,
        "modules_to_save does not name"),
    Row(60, "saved module not in file", b.config(modules_to_save=["score"]), 4, "score"),
    Row(61, "LoRA of another vocabulary", b.then(b.on(HEAD, 9, SIZE),
        b.base_tensor(f"{HEAD}.weight", [5, SIZE])), 4, "adapter is (9, 8), base is (5, 8)"),
    Row(61, "a grown embedding without its head", b.then(
        b.tensors(b.plus(f"base_model.model.{EMBEDDING}.weight", [9, SIZE])),
        b.base_tensor(f"{HEAD}.weight", [5, SIZE])), 5, "would have 9 rows"),
    Row(62, "DoRA's magnitude, use_dora false", b.tensors(
        b.plus(f"{STEM}.lora_magnitude_vector", [SIZE])), 4, "DoRA magnitude"),
    Row(62, "use_dora, no magnitude", b.config(use_dora=True), 4, "has no magnitude"),
    Row(62, "a tensor of an unknown part", b.tensors(b.plus(f"{STEM}.lora_C.weight", [4, 4])), 4,
        "modules_to_save does not name"),
    Row(62, "magnitudes of another size", b.then(b.config(use_dora=True),
        b.tensors(b.plus(f"{STEM}.lora_magnitude_vector", [SIZE - 1]))), 4, "7 magnitudes for 8"),
    Row(63, "fan_in_fan_out", b.config(fan_in_fan_out=True), 0, "warning[orientation]"),
    Row(64, "quantised by config", b.base_config(quantization_config={"quant_method": "gptq"}), 5,
        "is quantised (gptq)"),
    Row(64, "quantised by its tensors", b.retyped("U8", ".weight", BASE), 5, "is stored as U8"),
    Row(65, "a small update in bf16", b.then(b.as_bf16(BASE), b.scaled(1e-4)), 0,
        "of the update survives rounding"),
    Row(65, "a small update and --min-kept", b.then(b.as_bf16(BASE), b.scaled(1e-4)), 5,
        "of the update survives rounding", check=0, more=("--min-kept", "0.9")),
    *(Row(66, f"{value} in {end}", b.factors(float(value), end), 3, "1 NaN or infinite values")
      for value in ("nan", "inf") for end in ("lora_A.weight", "lora_B.weight")),
    Row(66, "NaN in the base", b.base_tensor(TARGET, [SIZE, SIZE], numbers(63, 1, 1.0)
        + struct.pack("<f", float("nan"))), 3, "NaN or infinite"),
    Row(66, "overflow", b.then(b.as_half(TARGET, 65504.0), b.factors(40.0, count=4)), 5,
        "do not fit float16", more=("--allow", "large_update")),
    Row(66, "overflow by --dtype", b.base_tensor(TARGET, [SIZE, SIZE],
        struct.pack("<f", 70000.0) * SIZE**2), 5, "do not fit float16", check=0,
        more=("--dtype", "fp16")),
    Row(66, "overflow of a weight not touched", b.base_tensor(f"{EMBEDDING}.weight", [5, SIZE],
        struct.pack("<f", 70000.0) * 5 * SIZE), 5, "does not fit F16", check=0,
        more=("--dtype", "fp16")),
    Row(67, "B of zeros", b.factors(0.0, count=4 * SIZE), 5, "never trained"),
    Row(67, "nothing at all", b.tensors(lambda t: {}), 5, "holds no adapter tensors"),
    *(Row(68, init, b.config(init_lora_weights=init), 5, init)
      for init in ("pissa_niter_4", "loftq", "corda", "lora_ga")),
    *(Row(68, init, b.config(init_lora_weights=init), 0, "note[residual_base]")
      for init in ("pissa", "olora")),
    Row(69, "unknown peft_type", b.config(peft_type="NEWTUNER"), 4, "NEWTUNER"),
    Row(69, "unknown field", b.config(use_newlora=True), 0, "note[unknown_config]"),
    Row(69, "unknown field and tensor", b.then(b.config(use_newlora=True),
        b.tensors(b.plus(f"{STEM}.lora_C.weight", [4, 4]))), 4, "error[unknown_config]"),
]  # fmt: skip

ROWS = [*FILES, *CODE, *(replace(row, inspect=0) for row in WRONG)]
