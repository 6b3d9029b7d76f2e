"""Keys to sign with, in files as users have them."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def pair(folder: Path, name: str = "key", key: Any = None) -> tuple[Path, Path]:
    """A private key and its public one, in two files."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private = write_private(folder / f"{name}.pem", key)
    return private, public_pem(folder / f"{name}.public.pem", key)


def write_private(file: Path, key: Any, password: bytes | None = None) -> Path:
    locked: Any = serialization.NoEncryption()
    if password:
        locked = serialization.BestAvailableEncryption(password)
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked
    )
    file.write_bytes(encoded)
    return file


def public_pem(file: Path, key: Any) -> Path:
    encoded = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    file.write_bytes(encoded)
    return file
