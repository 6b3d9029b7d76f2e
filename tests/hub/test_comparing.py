"""What a push would change, told from names, sizes and hashes alone; and how long it waits."""

import subprocess
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from loratools.hub.artefact import File
from loratools.hub.comparing import Remote, There, difference, git_blob
from loratools.hub.patience import LONGEST, TRIES, asked_for, pause


def compared(ours: dict[str, int], theirs: list[str]):
    files = [File(name, Path(name), size) for name, size in ours.items()]
    remote = Remote("org/x", "main", True, True, "0" * 40, {n: There(1, "") for n in theirs})
    return difference(files, remote, hashed=lambda _: "0" * 64)


@pytest.mark.parametrize(
    ("ours", "theirs", "stale"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
         ["model-00003-of-00003.safetensors"], True),
        (["model.safetensors"], ["model.safetensors.index.json"], True),
        (["model.safetensors"], ["model-00001-of-00002.safetensors"], True),
        (["unet/diffusion_pytorch_model.safetensors"],
         ["unet/diffusion_pytorch_model-00001-of-00002.safetensors"], True),
        (["a-00001-of-00002.gguf"], ["a-00003-of-00003.gguf"], True),
        (["adapter_model.safetensors"], ["model-00001-of-00002.safetensors"], False),
        (["v2/model.safetensors"], ["model-00001-of-00002.safetensors"], False),
        (["model-Q4_K_M.gguf"], ["model-Q8_0.gguf"], False),
        (["model.safetensors"], ["model.onnx", "README.md"], False),
        (["README.md"], ["model-00001-of-00002.safetensors"], False),
    ],
)  # fmt: skip
def test_parts_of_another_model_are_told_from_other_files(ours, theirs, stale):
    found = compared(dict.fromkeys(ours, 1), theirs)
    assert [p.code for p in found.problems] == ["stale_shards"] * stale


def test_small_files_in_number_and_in_sum():
    assert compared({f"{n}.txt": 1 for n in range(250)}, []).problems == ()
    (many,) = compared({f"{n}.txt": 1 for n in range(251)}, []).problems
    assert "251 files" in many.message
    (heavy,) = compared({f"{n}.json": 9_900_000 for n in range(11)}, []).problems
    assert "109 MB" in heavy.message
    assert heavy.code == "unpublishable"
    assert compared({f"{n}.safetensors": 9_900_000 for n in range(11)}, []).problems == ()
    assert compared({"tokenizer.json": 200_000_000}, []).problems == ()  # a large file by itself


@pytest.mark.parametrize("content", [b"", b"a", bytes(5_000_000)])
def test_the_name_that_git_gives_a_content(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    said = subprocess.run(
        ["git", "hash-object", tmp_path / "x"], capture_output=True, text=True, check=True
    )
    assert git_blob(File("x", tmp_path / "x", len(content))) == said.stdout.strip()
    assert git_blob(File("x", tmp_path / "x", len(content), content)) == said.stdout.strip()


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://127.0.0.1/")
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return HfHubHTTPError("x", response=httpx2.Response(status, headers=headers, request=request))


@pytest.mark.parametrize(
    ("cause", "seconds"),
    [
        (answer(429, Retry_After="7"), 7.0),
        (answer(429, RateLimit='"api";r=0;t=55'), 55.0),
        (answer(503), 1.0),
        (answer(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), 1.0),
        (answer(429, Retry_After=str(int(LONGEST) + 1)), None),
        (answer(429, Retry_After="9" * 40), 1.0),
        (answer(401), None),
        (answer(412), None),
        (httpx2.RemoteProtocolError("gone"), 1.0),
        (httpx2.ReadTimeout("late"), 1.0),
        (httpx2.ConnectError("refused"), None),
        (ValueError("x"), None),
    ],
)
def test_how_long_it_waits(cause, seconds):
    assert pause(cause, 0) == seconds
    assert pause(cause, TRIES) is None


def test_what_may_not_be_done_twice_is_tried_again_only_where_it_was_refused():
    assert pause(httpx2.RemoteProtocolError("gone"), 0, twice=False) is None
    assert pause(answer(503), 0, twice=False) == 1.0
    assert pause(answer(502), 0, twice=False) is None
    assert pause(answer(502), 0) == 1.0
    assert asked_for(ValueError()) is None
