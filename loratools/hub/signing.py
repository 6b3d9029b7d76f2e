"""Signatures of a folder (OpenSSF model-signing, `model.sig`), made and checked with local keys."""

from __future__ import annotations

import base64
import io
import os
import pathlib
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from loratools.containers.local import LocalFile
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError, Problem, error, shown

if TYPE_CHECKING:
    from model_signing.hashing import Config

NAME = "model.sig"
PASSWORD = "LORATOOLS_SIGN_PASSWORD"  # of an encrypted private key
LIMIT = 50_000_000  # bytes of a signature: 200 for each file it names
KEY_LIMIT = 1_000_000  # bytes of a key
# What git, the Hub's library and signing itself put into a folder: no part of what is signed.
UNSIGNED = (NAME, ".git", ".gitattributes", ".gitignore", ".github", ".cache/huggingface")
MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a good signature says of a folder: the files it names, and those it is wrong about."""

    files: tuple[str, ...]
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unsigned: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.changed or self.missing or self.unsigned)


def is_installed() -> bool:
    """Whether signatures can be made and checked."""
    try:
        import model_signing.signing
        import model_signing.verifying  # noqa: F401
    except ImportError:
        return False
    return True


def require_installed() -> None:
    """Raise not_installed where model-signing, or the pyOpenSSL that it forgets to name, lacks."""
    if not is_installed():
        raise error("not_installed", 'signatures need the extra: pip install "loratools[sign]"')


def require_key(path: str | Path) -> None:
    """Raise where this is no private key that can sign: before anything is sent."""
    _private(Path(path))


def sign(hashes: Mapping[str, str], key: str | Path, *, name: str) -> bytes:
    """The signature over files, given as name and sha256 in hex; `name` is what they are called.

    The statement is the one that `model_signing sign key` makes of a folder with these files
    (sigstore/model-transparency:src/model_signing/signing.py), so that `model_signing verify key`
    accepts it. Raises not_installed, and usage for a key that cannot sign.
    """
    require_installed()
    _private(Path(key))
    from model_signing import signing

    config: Any = signing.Config  # its functions have no types
    signer = config().use_elliptic_key_signer(
        private_key=key,
        password=_password(),  # declared text, handed on to what takes bytes
    )
    signer.set_hashing_config(_known(hashes, name))
    with TemporaryDirectory(prefix="loratools-") as folder:
        file = Path(folder) / NAME
        signer.sign(name, file)
        return file.read_bytes()


def covers(signature: bytes, hashes: Mapping[str, str]) -> bool:
    """Whether a signature, by whomever, names exactly these files with these hashes."""
    try:
        return _named(_statement(signature, NAME)) == dict(hashes)
    except LoratoolsError:
        return False


def is_ours(signature: bytes, hashes: Mapping[str, str], key: str | Path) -> bool:
    """Whether this private key signed exactly these files: then nothing has to be signed anew."""
    require_installed()
    from cryptography.hazmat.primitives import serialization

    public = _private(Path(key)).public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    with TemporaryDirectory(prefix="loratools-") as folder:
        pem, file = Path(folder) / "public.pem", Path(folder) / NAME
        pem.write_bytes(public)
        file.write_bytes(signature)
        try:
            return _checked(file, pem, lambda _: _known(hashes, "")).ok
        except LoratoolsError:
            return False


def check(
    folder: str | Path, key: str | Path, *, signature: Path | None = None, name: str = ""
) -> Checked:
    """Check a folder's `model.sig` with a public key, and every file of the folder against it.

    `name` is what messages call the folder: its address, where it was pulled from the Hub.

    Links are followed: a snapshot in the Hub's cache consists of them. A file that differs is no
    exception (see `Checked`). Raises not_found without a signature, malformed for one that cannot
    be read, signature where another key made it, usage for a file that is no public key of the
    right sort, and not_installed.
    """
    require_installed()
    file = signature or Path(folder) / NAME
    if not file.is_file():
        words = f"{shown(name or folder)} has no {NAME}: nobody signed it"
        remedy = "leave --key out to check its receipt; `loratools push --sign-key` signs"
        raise error("not_found", words, [Problem("not_found", words, remedy=remedy)])
    called = f"{NAME} of {shown(name)}" if name and signature is None else shown(file)
    return _checked(file, Path(key), _hashing, Path(folder), called)


# ------------------------------------------------------------------------------- the library


def _known(hashes: Mapping[str, str], name: str) -> Config:
    """The library's hashing, which finds hashes that are known already: nothing is read twice."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    items = [
        manifest.FileManifestItem(
            path=pathlib.PurePosixPath(file), digest=Digest("sha256", bytes.fromhex(digest))
        )
        for file, digest in hashes.items()
    ]
    said = {
        "method": "files", "hash_type": "sha256", "allow_symlinks": False,
        "ignore_paths": list(UNSIGNED),
    }  # fmt: skip

    class Known(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            return manifest.Manifest(name, items, manifest.SerializationType.from_args(said))

    known: Any = Known
    return cast("Config", known())


def _hashing(statement: Mapping[str, Any]) -> Config:
    """The library's hashing, as the signature says it was done, and with links followed."""
    from model_signing import hashing

    how = statement["predicate"].get("serialization", {})
    made: Any = hashing.Config
    config: Config = made()
    if how.get("method") == "shards":
        config.use_shard_serialization(
            hashing_algorithm=how["hash_type"],
            shard_size=int(how["shard_size"]),
            allow_symlinks=True,
        )
    else:
        config.use_file_serialization(
            hashing_algorithm=how.get("hash_type", "sha256"), allow_symlinks=True
        )
    return config.set_allow_symlinks(True).set_ignored_paths(paths=UNSIGNED)


def _checked(
    file: Path,
    key: Path,
    hashing: Callable[[Mapping[str, Any]], Config],
    folder: Path = pathlib.Path(),
    called: str = NAME,
) -> Checked:
    """The library's verdict, in our words."""
    _public(key)
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    source = LocalFile(file)
    if source.size > LIMIT:
        raise error("malformed", f"{called}: {source.size} bytes, a signature has fewer")
    statement = _statement(source.read(0, source.size), called)
    signed = _named(statement)
    made: Any = verifying.Config
    config = made().use_elliptic_key_verifier(public_key=key)
    try:
        seen = _Seen(hashing(statement))
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise error("malformed", f"{called} says no way to hash that is known") from cause
    config.set_hashing_config(seen.config)
    try:
        with redirect_stdout(io.StringIO()):  # the library prints what it thinks of old signatures
            config.verify(folder, file)
    except InvalidSignature:
        raise error("signature", f"{called}: what it says was changed after signing") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as cause:
        if str(cause).startswith("Key mismatch"):
            raise error(
                "signature", f"{called} was made with another key than {shown(key)}'s"
            ) from None
        if seen.found is None and seen.began:
            raise error("storage", f"{shown(folder)}: {shown(cause)}") from cause
        if seen.found is None:
            raise error("malformed", f"{called} is no signature: {shown(cause)}") from cause
        found = seen.found
        return Checked(
            tuple(signed),
            changed=tuple(n for n in signed if n in found and found[n] != signed[n]),
            missing=tuple(n for n in signed if n not in found),
            unsigned=tuple(sorted(found.keys() - signed.keys())),
        )
    return Checked(tuple(signed))


class _Seen:
    """Remembers what hashing found: the library's own message about it is hard to read."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.began = False
        self.found: dict[str, str] | None = None
        hashing = config.hash

        def hash(model_path: Any, *, files_to_hash: Any = None) -> Any:
            self.began = True
            manifest = hashing(model_path, files_to_hash=files_to_hash)
            self.found = {
                one.identifier: one.digest.digest_hex for one in manifest.resource_descriptors()
            }
            return manifest

        config.hash = hash  # type: ignore[method-assign]


# ------------------------------------------------------------------------------- what was signed


def _statement(raw: bytes, what: str) -> dict[str, Any]:
    """The statement inside a signature, not yet believed; raises malformed.

    A Sigstore bundle holds a DSSE envelope, and that an in-toto statement
    (sigstore/model-transparency:src/model_signing/_signing/signing.py).
    """
    try:
        bundle = loads(raw, what, limit=LIMIT)
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        statement = loads(payload, f"{what}: payload", limit=LIMIT)
        _named(statement)
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise error("malformed", f"{shown(what)} is no signature of a folder") from cause
    assert isinstance(statement, dict)
    return statement


def _named(statement: Mapping[str, Any]) -> dict[str, str]:
    """Each file, or part of a file, that a statement names, with its digest in hex."""
    predicate = statement["predicate"]
    if "resources" in predicate:
        return {str(one["name"]): str(one["digest"]) for one in predicate["resources"]}
    return {str(one["name"]): str(one["digest"]["sha256"]) for one in statement["subject"]}


# ------------------------------------------------------------------------------- keys


def _password() -> bytes | None:
    found = os.environ.get(PASSWORD)
    return found.encode() if found else None


def _pem(path: Path) -> bytes:
    if not path.is_file():
        raise error("not_found", f"no file named {shown(path)}: a key in PEM form was expected")
    source = LocalFile(path)
    return source.read(0, min(source.size, KEY_LIMIT))


def _private(path: Path) -> Any:
    """The private key in a PEM file; raises usage where it cannot sign."""
    require_installed()
    from cryptography.hazmat.primitives import serialization

    pem = _pem(path)
    if b"PUBLIC KEY-----" in pem or b"CERTIFICATE-----" in pem:
        raise error("usage", f"{shown(path)} is a public key: signing needs the private one")
    try:
        key = serialization.load_pem_private_key(pem, _password())
    except TypeError:
        raise error(
            "usage", f"{shown(path)} is protected by a password: set {PASSWORD}, or unset it"
        ) from None
    except ValueError as cause:
        wrong = b"ENCRYPTED" in pem and _password() is not None
        why = f"{PASSWORD} is not its password" if wrong else "it holds no private key in PEM form"
        raise error("usage", f"{shown(path)}: {why}") from cause
    _require_curve(key, path)
    return key


def _public(path: Path) -> None:
    """Raise usage where a PEM file holds no public key that `model.sig` can be of."""
    from cryptography.hazmat.primitives import serialization

    pem = _pem(path)
    if b"PRIVATE KEY-----" in pem:
        raise error(
            "usage",
            f"{shown(path)} is a private key: checking needs the public one; "
            f"openssl ec -in {shown(path)} -pubout -out public.pem",
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as cause:
        why = "holds no public key in PEM form"
        if b"CERTIFICATE-----" in pem:
            why = f"is a certificate; openssl x509 -in {shown(path)} -noout -pubkey gives its key"
        raise error("usage", f"{shown(path)} {why}") from cause
    _require_curve(key, path)


def _require_curve(key: Any, path: Path) -> None:
    """Raise usage unless a key is on a curve that the signature's format has."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve in ("secp256r1", "secp384r1", "secp521r1"):
        return
    sort = type(key).__name__.strip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
    what = f"an elliptic curve key of {shown(curve)}" if curve else f"a key of the sort {sort}"
    raise error("usage", f"{shown(path)} is {what}; model.sig needs one of the curve P-256: {MAKE}")
