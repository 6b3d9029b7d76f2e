"""Pickles, secrets and local paths are told from content, in files that other programs write."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import re
import string
import tarfile
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratools.containers.local import LocalFile
from loratools.hub import access, contents
from loratools.hub.contents import (
    is_local_path,
    keeps_secrets,
    last_part,
    scrubbed,
    secrets,
    secrets_in,
)
from loratools.hub.pickles import pickled

CALLS = OrderedDict(a=1)  # which is rebuilt by a call in every protocol


def written(folder: Path, name: str, raw: bytes) -> LocalFile:
    (folder / name).write_bytes(raw)
    return LocalFile(folder / name)


def drawn(letters: str, count: int, seed: int = 7) -> str:
    return "".join(random.Random(seed).choices(letters, k=count))


TOKEN = "hf_" + drawn(string.ascii_letters + string.digits, 34)

# ------------------------------------------------------------------------------- pickles


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def array(value: np.ndarray, *, zipped: bool = False) -> bytes:
    file = io.BytesIO()
    if zipped:
        np.savez_compressed(file, a=value)
    else:
        np.save(file, value, allow_pickle=True)
    return file.getvalue()


def tarred(name: str, raw: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(raw)
        archive.addfile(member, io.BytesIO(raw))
    return file.getvalue()


OBJECTS = np.array([{"a": 1}, None], dtype=object)
RECORDS = np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")])
PICKLES = {
    **{f"protocol {n}": pickle.dumps(CALLS, protocol=n) for n in range(6)},
    "torch": saved({"w": torch.zeros(2)}),
    "torch, before zip": saved({"w": torch.zeros(2)}, _use_new_zipfile_serialization=False),
    "gzip": gzip.compress(pickle.dumps(CALLS)),
    "zlib, as joblib": zlib.compress(pickle.dumps(CALLS)),
    "bz2": bz2.compress(pickle.dumps(CALLS)),
    "xz": lzma.compress(pickle.dumps(CALLS)),
    "npy of objects": array(OBJECTS),
    "npy with a field of objects": array(RECORDS),
    "npz of objects": array(OBJECTS, zipped=True),
    "tar, as NeMo": tarred("model_weights.ckpt", saved({"w": torch.zeros(2)})),
    "without its magic number": b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "tar with a bare one": tarred("x", pickle.dumps(CALLS, protocol=0)),
}


@pytest.mark.parametrize("sort", PICKLES)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_args.bin", "notes.txt"])
def test_a_pickle_is_known_by_its_content_whatever_its_name(tmp_path, sort, name):
    assert "pickle" in (pickled(written(tmp_path, name, PICKLES[sort])) or "") or (
        "torch file" in (pickled(LocalFile(tmp_path / name)) or "")
    )


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return file.getvalue()


HARMLESS = {
    "empty": b"",
    "json": b'{"a": [1, 2], "c": "cos\\nsystem\\n(tR."}',
    "front matter": b"---\nlicense: mit\n---\n# c\n",
    "text": b"copyright\n(c) somebody\nR.\n(all rights) reserved.\n",
    "vocabulary": b"c\nos\nsystem\n(\nt\nR\n.\n",
    "numbers": array(np.zeros(3)),
    "zip": zipped(a=b"text", b=b"{}"),
    "gzip": gzip.compress(b"text " * 100),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "gguf": b"GGUF\x03\0\0\0" + bytes(40),
    "sentencepiece": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\n",
}


@pytest.mark.parametrize("sort", HARMLESS)
def test_other_files_are_no_pickles(tmp_path, sort):
    assert pickled(written(tmp_path, "file", HARMLESS[sort])) is None


@given(st.text(max_size=200))
def test_no_text_of_a_person_is_a_pickle(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("text")
    assert pickled(written(folder, "README.md", f"# {text}".encode())) is None


def test_safetensors_are_no_pickle(tmp_path):
    save_file({"w": torch.randn(64, 64)}, tmp_path / "x.safetensors")
    assert pickled(LocalFile(tmp_path / "x.safetensors")) is None


# ------------------------------------------------------------------------------- secrets

LETTERS = string.ascii_letters + string.digits
SECRETS = {
    "Hub": TOKEN,
    "Hub, letters alone": "hf_" + drawn(string.ascii_letters, 34),
    "AWS, letters alone": "AKIA" + drawn(string.ascii_uppercase, 16),
    "GitHub": "ghp_" + drawn(LETTERS, 36),
    "GitHub, fine": "github_pat_" + drawn(LETTERS + "_", 70),
    "GitLab": "glpat-" + drawn(LETTERS, 20),
    "AWS": "AKIA" + drawn(string.ascii_uppercase + string.digits, 16),
    "Google": "AIza" + drawn(LETTERS, 35),
    "Slack": "xoxb-" + drawn(LETTERS, 30),
    "OpenAI": "sk-proj-" + drawn(LETTERS, 40),
    "PyPI": "pypi-" + drawn(LETTERS, 80),
    "npm": "npm_" + drawn(LETTERS, 36),
    "key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "web token": "eyJ" + drawn(LETTERS, 30) + ".eyJ" + drawn(LETTERS, 30) + ".x",
    "address": "postgres://me:h4rd2guess@db.example.com/x",
    "wandb": 'WANDB_API_KEY = "' + drawn("0123456789abcdef", 40) + '"',
    "json": '"api_key": "' + drawn(LETTERS, 24) + '"',
}


@pytest.mark.parametrize("sort", SECRETS)
def test_a_secret_is_found_with_its_line_and_never_repeated(tmp_path, sort):
    text = f'{{\n "a": 1,\n "b": "{SECRETS[sort]}"\n}}\n'
    (found,) = secrets(written(tmp_path, "train.json", text.encode()))
    assert found.line == 3
    assert str(found).startswith("line 3: ")
    assert not any(word in str(found) for word in re.findall(r"\w{9,}", SECRETS[sort]))


STAND_INS = [
    "hf_transformersmodelforcausallmwithvaluehead",
    "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "HF_TOKEN=hf_YOUR_TOKEN_HERE",
    "api_key = os.environ['API_KEY']",
    "api_key: your-api-key-goes-here-12345",
    '"pad_token": "<|reserved_special_token_250|>", "eos_token_id": 128009',
    "https://user:password@proxy.example.com:8080",
    "https://${USER}:${PASSWORD}@proxy",
    "risk-averse-and-very-long-words-in-a-row",
    "task-sk-learn-something-1-something-else",
    "-----BEGIN PUBLIC KEY-----",
    "password: see the page above for what it is",
]


@pytest.mark.parametrize("text", STAND_INS)
def test_what_only_looks_like_a_secret_is_none(text):
    assert secrets_in(text) == []


def test_a_secret_at_any_place_of_a_long_file_is_found_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_PIECE", 5000)
    for lines in range(60, 140):
        text = "x" * 79 + "\n"
        file = written(tmp_path, "t.txt", (text * lines + TOKEN + "\n" + text * 80).encode())
        assert [s.line for s in secrets(file)] == [lines + 1]


def test_the_metadata_of_weights_is_looked_at_and_the_weights_are_not(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(4)}, path, metadata={"ss_training_comment": f"key {TOKEN}"})
    (found,) = secrets(LocalFile(path))
    assert found.line is None
    assert TOKEN not in str(found)
    assert "metadata" in str(found)
    raw = torch.frombuffer(bytearray(TOKEN.encode().ljust(64)), dtype=torch.uint8)
    save_file({"w": raw}, path)
    assert secrets(LocalFile(path)) == []


def test_the_users_own_token_is_found_however_it_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "mycompany!token")
    own = contents.own_tokens()
    (found,) = secrets(written(tmp_path, "x.py", b"login(\n'mycompany!token')"), own)
    assert str(found) == "line 2: your own token"


def test_every_token_of_hf_auth_switch_is_the_users_own(tmp_path, monkeypatch):
    kept = written(
        tmp_path, "stored", b"[work]\nhf_token = other!token\n\n[home]\nhf_token = t2!own__\n"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", kept.name)
    assert {b"other!token", b"t2!own__"} <= contents.own_tokens()
    assert access.scrubbed("401 for other!token") == "401 for <token>"


@pytest.mark.parametrize("name", [".env", ".env.local", ".netrc", "id_ed25519", "token", "x.p12"])
def test_files_that_keep_passwords_are_known_by_their_names(name):
    assert keeps_secrets(name)


@pytest.mark.parametrize("name", [".env.example", "tokenizer.json", "public.pem", "env.yaml"])
def test_other_files_are_judged_by_what_they_hold(name):
    assert not keeps_secrets(name)


@pytest.mark.parametrize(
    "raw",
    [
        TOKEN.encode() + b"\n",
        b"a" * 8,
        b"https://a:",
        b"password:",
        b"sk-",
        b"eyJ",
        b"-----BEGIN A ",
        b"github_pat_a",
    ],
)
def test_the_time_grows_with_the_size_and_no_faster(tmp_path, raw):
    file = written(tmp_path, "x.txt", raw * (2_000_000 // len(raw)))
    began = time.process_time()
    secrets(file)
    pickled(file)
    assert time.process_time() - began < 3  # about 0.2 s on one quiet core


# ------------------------------------------------------------------------------- local paths


@pytest.mark.parametrize(
    "path",
    ["/home/me/llama", "~/llama", "./llama", "../x/llama", ".", "C:\\Users\\me\\llama",
     "D:/llama", "\\\\server\\llama", "file:///srv/llama"],
)  # fmt: skip
def test_paths_of_a_machine_are_known(path):
    assert is_local_path(path)
    assert last_part(path) in ("llama", "")


@pytest.mark.parametrize("id", ["org/name", "gpt2", "org/name.v1", "hf-internal/x", "a.b/c-d_e"])
def test_ids_of_the_hub_are_no_paths(id):
    assert not is_local_path(id)


def test_a_config_loses_its_paths_and_nothing_else():
    table = {
        "_name_or_path": "/home/me/secret-project/llama",
        "nested": {"vocab_file": "/home/me/tok/vocab.json", "rope": 1e-06, "big": 1e30},
        "cache_dir": None,
        "data": ["/Users/me/data", "plain"],
        "chat_template": "{% for m in messages %}/home/me/x{% endfor %}",
        "added_tokens_decoder": {"1": {"content": "/home/me"}, "2": {"content": "/"}},
        "tokenizer_file": "tokenizer.json",
        "auto_map": {"AutoConfig": "configuration_x.XConfig"},
        "sub": {"path": "./part/vocab.json"},
        "ü": "ü",
    }
    raw = json.dumps(table, indent=2, ensure_ascii=False).encode()
    clean = scrubbed(raw, "org/llama")
    assert clean is not None
    assert clean.keys == ("_name_or_path", "vocab_file", "data")
    after = json.loads(clean.text)
    assert after.pop("_name_or_path") == "org/llama"
    assert after["nested"].pop("vocab_file") == "vocab.json"
    assert after.pop("data") == ["data", "plain"]
    for key in ("_name_or_path", "data"):
        table.pop(key)
    table["nested"].pop("vocab_file")
    assert after == table
    assert b"secret-project" not in clean.text
    assert clean.text.startswith(b'{\n  "')


def test_a_config_without_paths_is_sent_as_it_is():
    assert scrubbed(b'{"a": "org/name", "b": 1e-05, "model_path": "part/x"}') is None
    assert scrubbed(b"no json {") is None
    assert scrubbed(b"[" * 100_000) is None
