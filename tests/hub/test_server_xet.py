"""The client's default way for large files, Xet, through its own simulation in a local folder."""

import json
import subprocess
import sys

import pytest

ROUND = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
api, file = HfApi(), Path(sys.argv[1])
for name in ("w.safetensors", "again.safetensors"):
    made = api.create_commit("me/x", [CommitOperationAdd(name, file)], commit_message="m")
down = hf_hub_download("me/x", "again.safetensors", revision=made.oid)
print(json.dumps({"same": Path(down).read_bytes() == file.read_bytes(), "oid": made.oid}))
"""


@pytest.mark.slow
def test_there_and_back(hub, tmp_path):
    """If hf_xet gives up its simulation this fails: then the test goes, nothing else needs it."""
    hub.put("me/x", {})
    hub.xet = tmp_path / "cas"
    hub.xet.mkdir()
    file = tmp_path / "w.safetensors"
    file.write_bytes(bytes(range(256)) * 2000)
    ended = subprocess.run(
        [sys.executable, "-c", ROUND, file],
        env=hub.env(HF_HUB_DISABLE_XET="0"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["same"]
    assert said["oid"] == hub.repos["me/x"].head.oid
    assert hub.repos["me/x"].files["w.safetensors"].size == 512_000
    assert hub.asked("PUT") == hub.asked("POST", "/info/lfs/") == []
