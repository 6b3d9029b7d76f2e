"""Files of torch.save as others published them, old and new, read like torch reads them."""

from pathlib import Path

import pytest
import torch

from loratools.containers.local import LocalFile
from loratools.containers.torch_zip import read
from tests.containers.torch_bytes import differs

FILES = [
    "candle-pickle-oddities/fortran_tensor_3d.pth",
    "candle-pickle-oddities/test_with_key.pt",
    "loralib-roberta-base-mnli/roberta_base_lora_mnli.bin",
    "pkg-facenet-mtcnn/pnet.pt",  # the format before torch 1.6
    "pkg-facenet-mtcnn/rnet.pt",
    "pkg-lpips-lin/alex.pth",  # written by Python 2
    "torchtune-tiny-fair/tiny_fair_checkpoint.pt",
]


@pytest.mark.parametrize("file", FILES)
def test_a_published_file_reads_as_torch_reads_it(field_data: Path, file: str):
    path = field_data / "adapters_and_models" / file
    found = read(LocalFile(path))
    assert found
    assert differs(found, torch.load(path, weights_only=True, map_location="cpu")) is None
