"""The hashes by which Civitai, A1111 and kohya's trainer know a file, made in one pass over it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loratools.adapter import DTYPE_BITS, Leaf, Source
from loratools.containers import safetensors

CHUNK = 1 << 22  # bytes read at once
WINDOW = (0x100000, 0x110000)  # the old hash of A1111 looks at these bytes alone
EMPTY = hashlib.sha256().hexdigest()  # what a hash of nothing says: stored by trainers by mistake
HEADER = 100_000_000  # bytes; what the safetensors library takes at most

# The order in which the safetensors library writes tensors: widest first, by its own table of
# dtypes; only the order among equal sizes differs from ours (safetensors/src/tensor.rs, Dtype).
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hashes:
    """A file's hashes as Civitai shows them, upper-case and cut; `tensors` and `sha256` are whole.

    `autov1`: 8 digits of the sha256 of the 64 KiB at 1 MiB (A1111's first hash; of nothing, for a
    smaller file); `autov2`: 10 of the whole file's; `autov3`: 12 of the sha256 of all after a
    safetensors header, None for other files (kohya-ss/sd-scripts:library/train_util.py model_hash,
    calculate_sha256, addnet_hash_safetensors; lengths as in Civitai's REST answers).
    """

    sha256: str
    autov1: str
    autov2: str
    autov3: str | None
    tensors: str | None


def civitai(source: Source) -> Hashes:
    """All hashes of a file, read once, a chunk at a time."""
    start = _data_start(source)
    whole, data, window = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for at in range(0, source.size, CHUNK):
        raw = source.read(at, min(CHUNK, source.size - at))
        whole.update(raw)
        _span(window, raw, at, *WINDOW)
        if start is not None:
            _span(data, raw, at, start, source.size)
    tensors = None if start is None else data.hexdigest()
    return Hashes(
        whole.hexdigest(),
        window.hexdigest()[:8].upper(),
        whole.hexdigest()[:10].upper(),
        None if tensors is None else tensors[:12].upper(),
        tensors,
    )


def same(stored: str, tensors: str) -> bool:
    """Whether a stored `sshs_model_hash` names these tensors; it may be cut, or begin with 0x."""
    digits = stored.strip().lower().removeprefix("0x")
    return len(digits) >= 8 and tensors.startswith(digits)


def as_the_library(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The tensors in the order in which the safetensors library would write them."""
    rank = {dtype: i for i, dtype in enumerate(_ORDER)}
    names = sorted(tensors, key=lambda n: (rank.get(tensors[n].dtype, len(_ORDER)), n))
    return {name: tensors[name] for name in names}


def kohya(tensors: Mapping[str, Leaf], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a file with these tensors, in this order.

    The first is of the tensors' bytes alone. The second is of the 64 KiB at 1 MiB of the file
    that would hold only the `ss_` part of the metadata (kohya-ss/sd-scripts:library/train_util.py
    precalculate_safetensors_hashes).
    """
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    order = safetensors.aligned((name, leaf.dtype, leaf.shape) for name, leaf in tensors.items())
    head, _ = safetensors.plan_layout(order, trained)
    data, window = hashlib.sha256(), hashlib.sha256()
    at = len(head)
    _span(window, head, 0, *WINDOW)
    for raw in _raw(tensors[name] for name, _, _ in order):
        data.update(raw)
        _span(window, raw, at, *WINDOW)
        at += len(raw)
    return data.hexdigest(), window.hexdigest()[:8]


def _raw(leaves: Iterable[Leaf]) -> Iterable[bytes]:
    for leaf in leaves:
        raw = leaf.read()
        assert len(raw) == (leaf.numel * DTYPE_BITS[leaf.dtype] + 7) // 8, leaf.name
        yield raw


def _span(digest: hashlib._Hash, raw: bytes, at: int, start: int, stop: int) -> None:
    """Feed what of `raw`, which lies at `at`, falls between start and stop."""
    if at < stop and at + len(raw) > start:
        digest.update(memoryview(raw)[max(start - at, 0) : stop - at])


def _data_start(source: Source) -> int | None:
    """Where the tensors of a safetensors file begin; None for another sort of file."""
    if source.size < 9:
        return None
    length = int.from_bytes(source.read(0, 8), "little")
    if not 2 <= length <= min(HEADER, source.size - 8) or source.read(8, 1) != b"{":
        return None
    return 8 + length
