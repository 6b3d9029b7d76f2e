"""What a file is that is not what its name says: pointers, web pages, archives."""

from __future__ import annotations


def what_it_is(head: bytes) -> str | None:
    """What a file is, in words, from its first bytes; None where they do not tell."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page; download the file itself (on the Hub: /resolve/, not /blob/)"
    for magic, sort in _MAGIC:
        if head.startswith(magic):
            return sort
    return None


_MAGIC = (
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"PK\x03\x04", "a zip archive (a torch .pt or .bin by another name?)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"GGUF", "GGUF; name it .gguf"),
    (b"\x28\xb5\x2f\xfd", "zstd; unpack it first"),
    (b"BZh", "bzip2; unpack it first"),
    (b"\xfd7zXZ", "xz; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "HDF5"),
    (b"{", "JSON text"),
)
