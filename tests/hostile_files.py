"""Hostile and damaged files of the containers that are one file each, as bytes made without torch.

Rows 35 to 41 of the list of tests.hostile_rows at the commands; each container's own tests have
more of them (containers/test_npy, test_flatbuffer, test_tar, test_plain_yaml, gguf_corpus).
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from loratools.adapter import Leaf
from loratools.containers import flatbuffer
from tests.breaking import calls, header
from tests.containers import gguf_corpus as gguf
from tests.containers import torch_bytes
from tests.containers.gguf_corpus import F32, STRING, Memory, array, info, pair, text
from tests.tiny import MODULES, numbers

Q = MODULES[0]


@dataclass(frozen=True)
class File:
    """One file (with what lies beside it): its number, its name, how inspect ends, what is said.

    `check` and `merge` end as `inspect` does, but where they have a status of their own.
    """

    number: int
    what: str
    name: str
    raw: bytes
    says: str
    inspect: int = 3
    check: int | None = None
    beside: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.number} {self.what}"

    def make(self, here: Path) -> Path:
        path = here / self.name
        path.write_bytes(self.raw)
        for name, content in (self.beside or {}).items():
            (here / name).write_text(content)
        return path


# ------------------------------------------------------------------------------- npz, npy

NPY = "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 2), }"


def npy(old: str = "", new: str = "", data: bytes = bytes(64)) -> bytes:
    raw = NPY.replace(old, new).encode() if old else NPY.encode()
    raw += b" " * (-(10 + len(raw) + 1) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(raw)) + raw + data


def npz(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, raw in members:
            made.writestr(name, raw)
    return file.getvalue()


def mlx(a: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """An old adapter of MLX with this lora_a."""
    b = npy("(8, 2)", "(2, 8)")
    return npz((f"{Q}.lora_a.npy", a), (f"{Q}.lora_b.npy", b), method=method)


def twice(raw: bytes, name: bytes) -> bytes:
    """An archive whose second member has the name of its first."""
    other = name.replace(b"lora_a", b"lora_b")
    assert len(other) == len(name)
    return raw.replace(other, name)


OBJECTS = npy("'<f4'", "'|O'", pickle.dumps([print], protocol=2))
ARRAYS = [
    File(35, "npz of 4 TB", "a.npz", mlx(npy("(8, 2)", "(1024, 1048576, 1024)")), "missing"),
    File(35, "npz that unpacks to much", "a.npz",
         mlx(npy("(8, 2)", "(2097152, 2)", bytes(1 << 24)), zipfile.ZIP_DEFLATED), "compressed"),
    File(35, "npz of objects", "a.npz", mlx(OBJECTS), "lora_a"),
    File(35, "npz of a negative shape", "a.npz", mlx(npy("(8, 2)", "(-8, 2)")), "lora_a"),
    File(35, "npz of fields", "a.npz", mlx(npy("'<f4'", "[('x', '<f4')]")), "lora_a"),
    File(35, "npz of big-endian numbers", "a.npz", mlx(npy("<f4", ">f4")), "lora_a"),
    File(35, "npz of nested brackets", "a.npz",
         mlx(npy("(8, 2)", "(" * 1500 + "8, 2" + ")" * 1500)), "lora_a"),
    File(35, "npz with a name twice", "a.npz", twice(mlx(npy()), f"{Q}.lora_a.npy".encode()),
         "lora_a"),
    File(35, "npz cut short", "a.npz", mlx(npy())[:-30], "a.npz"),
]  # fmt: skip

# ------------------------------------------------------------------------------- NeMo: tar, YAML


def nemo(members: Mapping[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for entry in extra:
            made.addfile(entry)
        for name, raw in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            made.addfile(entry, io.BytesIO(raw))
    return file.getvalue()


def entry(sort: bytes, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo("model_config.yaml")
    made.type, made.linkname = sort, link
    return made


CONFIG = b"peft:\n  peft_scheme: lora\n  lora_tuning: {adapter_dim: 2, alpha: 2}\n"
NONE = torch_bytes.built(torch_bytes.pickled({}))
SOUND = {"model_config.yaml": CONFIG, "model_weights.ckpt": NONE}
LAUGHS = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%b]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)
)
CALLS = torch_bytes.built(calls("os", "system", "touch canary"))
TARS = [
    File(36, "nemo out of the folder", "a.nemo", nemo({"../../x": b"1", **SOUND}), "../../x"),
    File(36, "nemo with a link", "a.nemo", nemo(SOUND, entry(tarfile.SYMTYPE, "/etc/passwd")),
         "model_config.yaml"),
    File(36, "nemo with a hard link", "a.nemo", nemo(SOUND, entry(tarfile.LNKTYPE, "x")),
         "model_config.yaml"),
    File(36, "nemo with a device", "a.nemo", nemo(SOUND, entry(tarfile.CHRTYPE)),
         "model_config.yaml"),
    File(36, "nemo with a FIFO", "a.nemo", nemo(SOUND, entry(tarfile.FIFOTYPE)),
         "model_config.yaml"),
    File(37, "nemo with weights twice", "a.nemo",
         nemo({**SOUND, "./model_weights.ckpt": NONE}), "model_weights.ckpt"),
    File(38, "nemo with an absolute path", "a.nemo", nemo({"/root/y": b"2", **SOUND}), "/root/y"),
    File(39, "nemo whose YAML is a bomb", "a.nemo", nemo({**SOUND, "model_config.yaml": LAUGHS}),
         "model_config.yaml"),
    File(39, "nemo whose YAML is no YAML", "a.nemo",
         nemo({**SOUND, "model_config.yaml": b"a: ["}), "model_config.yaml"),
    File(39, "nemo whose pickle calls", "a.nemo", nemo({**SOUND, "model_weights.ckpt": CALLS}),
         "os.system"),
    File(36, "nemo cut short", "a.nemo", nemo(SOUND)[:1400], "a.nemo"),
]  # fmt: skip

LITGPT = torch_bytes.archive(*torch_bytes.HONEST)  # read only as far as what lies beside it
YAML = [
    File(39, "litgpt whose YAML is a bomb", "lit_model.pth.lora", LITGPT, "hyperparameters.yaml",
         beside={"hyperparameters.yaml": LAUGHS.decode()}),
    File(39, "litgpt whose YAML repeats a key", "lit_model.pth.lora", LITGPT, "lora_alpha",
         beside={"hyperparameters.yaml": "lora_alpha: 1\nlora_alpha: 2\n"}),
]  # fmt: skip

# ------------------------------------------------------------------------------- GGUF

ADAPTER = [
    pair("general.type", STRING, text("adapter")),
    pair("general.architecture", STRING, text("llama")),
    pair("adapter.type", STRING, text("lora")),
]
ALPHA = pair("adapter.lora.alpha", F32, struct.pack("<f", 2.0))
PAIR = [
    info("blk.0.attn_q.weight.lora_a", [8, 2]),
    info("blk.0.attn_q.weight.lora_b", [2, 8], 0, 64),
]
DATA = numbers(32, 1, 0.01)
GGUFS = [
    *(File(40, f"gguf, {what}", "a.gguf", raw, says)
      for what, (raw, _, says) in gguf.HOSTILE.items()
      if what not in ("another magic", "a web page", "empty")),
    File(40, "gguf adapter with a promise of 2^60", "a.gguf",
         gguf.built([*ADAPTER, array("k", STRING, 1 << 60)]), "are promised"),
    File(40, "gguf adapter without its data", "a.gguf", gguf.built([*ADAPTER, ALPHA], PAIR),
         "missing at the end"),
    File(41, "gguf adapter with a key twice", "a.gguf",
         gguf.built([*ADAPTER, ALPHA, ALPHA], PAIR, DATA), "adapter.lora.alpha"),
    File(41, "gguf adapter with a tensor twice", "a.gguf",
         gguf.built([*ADAPTER, ALPHA], [PAIR[0], PAIR[0]], DATA), "lora_a"),
    File(41, "gguf adapter without alpha", "a.gguf", gguf.built(ADAPTER, PAIR, DATA),
         "adapter.lora.alpha", inspect=0, check=5),
    File(41, "gguf adapter for another architecture", "a.gguf",
         gguf.built([ADAPTER[0], pair("general.architecture", STRING, text("mamba")), ADAPTER[2],
                     ALPHA], PAIR, DATA), "mamba", inspect=0, check=4),
    File(15, "gguf that is a web page", "a.gguf", b"<!DOCTYPE html><html>" + b" " * 50,
         "a web page"),
    File(15, "gguf that is a pointer", "a.gguf", b"version https://git-lfs.github.com/spec/v1\n",
         "git lfs pull"),
    File(15, "gguf that is empty", "a.gguf", b"", "is empty"),
]  # fmt: skip

# ------------------------------------------------------------------------------- flatbuffer


def honest() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        leaves = {
            f"{Q}.lora_A.weight": Leaf("a", "F32", (8, 2), Memory(DATA[:64])),
            f"{Q}.lora_B.weight": Leaf("b", "F32", (2, 8), Memory(DATA[64:])),
        }
        flatbuffer.write(path, leaves)
        return path.read_bytes()


def put(raw: bytes, at: int, value: int) -> bytes:
    return raw[:at] + struct.pack("<I", value) + raw[at + 4 :]


FLAT = honest()
# Where things stand is explained in containers/test_flatbuffer.
FLATBUFFERS = [
    File(40, "onnx_adapter cut short", "a.onnx_adapter", FLAT[:-1], "a.onnx_adapter"),
    File(40, "onnx_adapter with a root far away", "a.onnx_adapter", put(FLAT, 0, 1 << 31),
         "byte 0"),
    File(40, "onnx_adapter with 2^32 parameters", "a.onnx_adapter", put(FLAT, 40, 0xFFFFFFFF),
         "4294967295 items"),
    File(40, "onnx_adapter of another version", "a.onnx_adapter", put(FLAT, 24, 2), "version 2"),
    File(40, "onnx_adapter of another sort", "a.onnx_adapter", FLAT[:4] + b"TFL3" + FLAT[8:],
         "a.onnx_adapter", inspect=0, check=4),
]  # fmt: skip

# ------------------------------------------------------------------------------- names of images

FLUX = "lora_unet_double_blocks_0_img_attn_qkv"


def safe(shapes: Mapping[str, list[int]], dtype: str = "F32", size: int = 4) -> bytes:
    table, at = {}, 0
    for name, shape in shapes.items():
        length = size
        for n in shape:
            length *= n
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    return header(table, numbers(at // 4 + 1, 5, 0.01)[:at])


def kohya(**changed: list[int] | None) -> bytes:
    shapes = {"alpha": [], "lora_down.weight": [2, 8], "lora_up.weight": [24, 2]}
    given = {k.replace("__", "."): v for k, v in changed.items()}
    found = {f"{FLUX}.{k}": v for k, v in (shapes | given).items() if v is not None}
    return safe(found)


def diffusers(raw: bytes, metadata: str) -> bytes:
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    return header({"__metadata__": {"lora_adapter_metadata": metadata}, **table}, raw[start:])


TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = safe({f"{TO_Q}.lora_A.weight": [2, 8], f"{TO_Q}.lora_B.weight": [8, 2]})
IMAGES = [
    File(6, "kohya cut short", "a.safetensors", kohya()[:-10], "10 bytes are missing"),
    File(54, "kohya, down without up", "a.safetensors", kohya(lora_up__weight=None),
         "lora_down without lora_up", inspect=0, check=4),
    File(54, "kohya, factors that do not multiply", "a.safetensors",
         kohya(lora_up__weight=[24, 3]), "(24, 3)", inspect=0, check=4),
    File(54, "kohya, alpha of two numbers", "a.safetensors", kohya(alpha=[2]), f"{FLUX}.alpha"),
    File(62, "kohya, a tensor of an unknown part", "a.safetensors", kohya(lora_x__weight=[2, 2]),
         "lora_x", inspect=0, check=4),
    File(11, "kohya of whole numbers", "a.safetensors",
         safe({f"{FLUX}.lora_down.weight": [2, 8], f"{FLUX}.lora_up.weight": [24, 2]}, "I32"),
         "I32, not floats"),
    File(12, "kohya, a name with an escape", "a.safetensors",
         safe({"lora_unet_x\x1b[2J.lora_down.weight": [2, 8],
               "lora_unet_x\x1b[2J.lora_up.weight": [8, 2]}), r"\x1b[2J", inspect=0, check=3),
    File(25, "kohya whose pickle calls", "a.pt", CALLS, "os.system"),
    File(24, "diffusers' metadata that is no JSON", "a.safetensors", diffusers(UNET, "{"),
         "lora_adapter_metadata"),
    File(23, "diffusers' metadata with a key twice", "a.safetensors",
         diffusers(UNET, '{"unet.r": 2, "unet.r": 4}'), "unet.r"),
    File(54, "diffusers' metadata with another rank", "a.safetensors",
         diffusers(UNET, '{"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}'),
         "r=4", inspect=0, check=4),
]  # fmt: skip

# ------------------------------------------------------------------------------- numbers and names


def alpha_of(value: float) -> bytes:
    raw = kohya()
    start = 8 + int.from_bytes(raw[:8], "little")
    return raw[:start] + struct.pack("<f", value) + raw[start + 4 :]


def gguf_alpha(value: float) -> bytes:
    said = pair("adapter.lora.alpha", F32, struct.pack("<f", value))
    return gguf.built([*ADAPTER, said], PAIR, DATA)


def gguf_named(name: str) -> bytes:
    infos = [info(f"{name}.lora_a", [8, 2]), info(f"{name}.lora_b", [2, 8], 0, 64)]
    return gguf.built([*ADAPTER, ALPHA], infos, DATA)


def mlx_folder(config: str) -> dict[str, str]:
    return {"adapter_config.json": config}


MLX = safe({f"{Q}.lora_a": [8, 2], f"{Q}.lora_b": [2, 8]})
NUMBERS = [
    *(File(49, f"kohya, alpha {value}", "a.safetensors", alpha_of(float(value)), "its scaling is")
      for value in ("nan", "inf", "-inf")),
    *(File(49, f"gguf, alpha {value}", "a.gguf", gguf_alpha(float(value)), "its scaling is")
      for value in ("nan", "inf")),
    *(File(49, f"mlx, scale {value[:9]}", "adapters.safetensors", MLX, "adapter_config.json",
           beside=mlx_folder(f'{{"lora_parameters": {{"rank": 2, "scale": {value}}}}}'))
      for value in ("NaN", "1e999", "1" + "0" * 400)),
    File(23, "mlx, scale twice", "adapters.safetensors", MLX, "scale",
         beside=mlx_folder('{"lora_parameters": {"scale": 1, "scale": 2}}')),
    *(File(13, f"gguf, a tensor named {name!r}", "a.gguf", gguf_named(name), says, inspect=0,
           check=status)
      for name, says, status in (("../../etc/x", "../../etc/x", 4), ("x\x1b[2J\x07", r"x\x1b", 4))),
    File(13, "npz with a path as a name", "a.npz", npz(("../../x.lora_a.npy", npy())),
         "../../x.lora_a"),
]  # fmt: skip

FILES = [*ARRAYS, *TARS, *YAML, *GGUFS, *FLATBUFFERS, *IMAGES, *NUMBERS]
