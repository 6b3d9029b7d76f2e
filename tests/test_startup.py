"""What starts without torch and numpy: `--help`, `inspect`, and every module that does no maths."""

import json
import os
import struct
import subprocess
import sys

import pytest

from tests.test_house import FILES, PACKAGE, ROOT, is_mathematical

HEAVY = ("torch", "numpy", "transformers", "peft", "onnx", "huggingface_hub")
LIGHT = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in FILES
    if not is_mathematical(file)
]


def heavy_after(program: str, *arguments: str) -> list[str]:
    """Which heavy packages are loaded when a fresh Python has run this program."""
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{program}\nimport sys\nsys.exit(repr([*sys.modules]))",
            *arguments,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    *said, loaded = child.stderr.splitlines() or [""]
    assert loaded.startswith("['sys'"), child.stderr
    assert "Traceback (most recent call last):" not in said, child.stderr
    return [name for name in HEAVY if f"'{name}'" in loaded]


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_the_check_sees_what_is_imported(name):
    assert name in heavy_after(f"def late():\n    import {name}\nlate()")


def test_the_check_sees_a_program_that_fails():
    with pytest.raises(AssertionError, match="no_such_module"):
        heavy_after("import no_such_module")


def test_modules_without_maths_import_neither_torch_nor_numpy():
    assert heavy_after("import " + ", ".join(LIGHT)) == []


COMMAND = """
from loratools.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
"""


def adapter(folder):
    """A PEFT adapter of one module, rank 1, as bytes."""
    header = {
        "base_model.model.q.lora_A.weight": {
            "dtype": "F32",
            "shape": [1, 2],
            "data_offsets": [0, 8],
        },
        "base_model.model.q.lora_B.weight": {
            "dtype": "F32",
            "shape": [2, 1],
            "data_offsets": [8, 16],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = struct.pack("<Q", len(text)) + text + struct.pack("<4f", 1, 2, 3, 4)
    (folder / "adapter_model.safetensors").write_bytes(body)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("words", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_a_command_that_needs_no_maths_loads_neither_torch_nor_numpy(tmp_path, words):
    if not (PACKAGE / "cli" / "__init__.py").exists():
        return
    path = [adapter(tmp_path)] if "inspect" in words else []
    assert heavy_after(COMMAND, *words, *path) == []
