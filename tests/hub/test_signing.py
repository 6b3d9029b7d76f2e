"""Signatures: OpenSSF's own program and ours accept and refuse the same ones."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from loratools.errors import LoratoolsError
from loratools.hub import signing
from tests.hub.keys import pair, public_pem, write_private

FILES = {
    "adapter_model.safetensors": b"weights" * 1000,
    "adapter_config.json": b'{"r": 8}',
    "README.md": b"# a card\n",
    "onnx/model.onnx": b"graph",
    "empty": b"",
    "name with spaces é.json": b"{}",
}


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder).as_posix()): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def keys(tmp_path):
    return pair(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder with its signature."""
    found = tmp_path / "adapter"
    for name, content in FILES.items():
        file = found / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return found


@pytest.fixture
def signed(folder, keys):
    (folder / "model.sig").write_bytes(signing.sign(hashes(folder), keys[0], name="adapter"))
    return folder


def theirs(*arguments: object) -> subprocess.CompletedProcess[str]:
    """OpenSSF's own command line."""
    program = Path(sys.executable).with_name("model_signing")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def verified_by_them(folder: Path, public: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return theirs(
        "verify", "key", folder, "--signature", folder / "model.sig", "--public_key", public, *more
    )


def refused(code: str, *arguments: object) -> str:
    with pytest.raises(LoratoolsError) as caught:
        signing.check(*arguments)  # type: ignore[arg-type]
    assert caught.value.code == code
    return caught.value.message


# ------------------------------------------------------------------------------- both ways


def test_their_program_accepts_what_we_sign(signed, keys):
    found = verified_by_them(signed, keys[1])
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_we_accept_what_they_sign(folder, tmp_path, curve):
    private, public = pair(tmp_path, "other", ec.generate_private_key(curve))
    made = theirs(
        "sign", "key", folder, "--signature", folder / "model.sig", "--private_key", private
    )
    assert made.returncode == 0, made.stderr
    found = signing.check(folder, public)
    assert found.ok
    assert set(found.files) == FILES.keys()


def test_we_accept_what_we_sign_and_what_git_and_the_hub_add(signed, keys):
    (signed / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (signed / ".cache" / "huggingface").mkdir(parents=True)
    (signed / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert signing.check(signed, keys[1]) == signing.Checked(tuple(sorted(FILES)))


def test_a_snapshot_made_of_links_is_checked_through_them(signed, keys, tmp_path):
    snapshot = tmp_path / "snapshot"
    for name in [*FILES, "model.sig"]:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(signed / name)
    assert signing.check(snapshot, keys[1]).ok
    assert verified_by_them(snapshot, keys[1], "--allow_symlinks").returncode == 0


def test_signing_twice_gives_each_time_a_good_signature(signed, folder, keys):
    again = signing.sign(
        {name: digest for name, digest in hashes(folder).items() if name != "model.sig"},
        keys[0],
        name="adapter",
    )
    assert again != (folder / "model.sig").read_bytes()  # ECDSA has a random number in it
    (folder / "model.sig").write_bytes(again)
    assert signing.check(folder, keys[1]).ok


def test_every_change_is_found_as_they_find_it(signed, keys):
    (signed / "README.md").write_text("# another\n")
    (signed / "extra.json").write_text("{}")
    (signed / "empty").unlink()
    found = signing.check(signed, keys[1])
    assert not found.ok
    assert (found.changed, found.missing, found.unsigned) == (
        ("README.md",),
        ("empty",),
        ("extra.json",),
    )
    assert verified_by_them(signed, keys[1]).returncode != 0


def test_shards_and_other_hashes_are_read_too(folder, keys):
    """What the library can make and its command line cannot: each file in pieces."""
    from model_signing import hashing
    from model_signing import signing as library

    how = hashing.Config().use_shard_serialization(shard_size=1000)
    library.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(how).sign(
        folder, folder / "model.sig"
    )
    how.set_ignored_paths(paths=["model.sig"])
    assert signing.check(folder, keys[1]).ok
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 999 + b"another")
    assert len(signing.check(folder, keys[1]).changed) == 1


# ------------------------------------------------------------------------------- wrong ones


def test_another_key_is_said(signed, tmp_path):
    _, other = pair(tmp_path, "other")
    assert "another key" in refused("signature", signed, other)


def test_a_statement_changed_after_signing_is_refused(signed, keys):
    file = signed / "model.sig"
    bundle = json.loads(file.read_text())
    import base64

    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    changed = payload.replace(b"README.md", b"README.MD")
    assert changed != payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
    file.write_text(json.dumps(bundle))
    assert "changed after signing" in refused("signature", signed, keys[1])


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"null", b"\x80\x04", b"[" * 100_000,
        b'{"dsseEnvelope": {"payload": "!"}}',
        b'{"dsseEnvelope": {"payload": "e30="}}',
        b'{"dsseEnvelope": {"payload": "eyJwcmVkaWNhdGUiOiB7InJlc291cmNlcyI6IFtdfX0="}}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": '
        b'{"payload": "eyJwcmVkaWNhdGUiOiB7InJlc291cmNlcyI6IFtdfX0="}, '
        b'"verificationMaterial": {}}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_signature_is_malformed(signed, keys, content):
    (signed / "model.sig").write_bytes(content)
    refused("malformed", signed, keys[1])


def test_no_signature_is_not_found(folder, keys):
    assert "nobody signed it" in refused("not_found", folder, keys[1])


# ------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("make", "sort"),
    [
        (ed25519.Ed25519PrivateKey.generate, "Ed25519"),
        (lambda: rsa.generate_private_key(65537, 2048), "RSA"),
        (lambda: ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
    ],
)
def test_keys_of_other_sorts_are_named_before_anything_is_signed(signed, tmp_path, make, sort):
    private, public = pair(tmp_path, "other", make())
    with pytest.raises(LoratoolsError, match=sort) as caught:
        signing.sign(hashes(signed), private, name="a")
    assert caught.value.code == "usage"
    assert "openssl ecparam -name prime256v1" in caught.value.message
    assert sort in refused("usage", signed, public)


def test_the_command_that_the_message_names_makes_a_key_that_signs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(signing.MAKE, shell=True, check=True)
    subprocess.run("openssl ec -in key.pem -pubout -out pub.pem", shell=True, check=True)
    (folder / "model.sig").write_bytes(signing.sign(hashes(folder), "key.pem", name="adapter"))
    assert signing.check(folder, "pub.pem").ok


def test_the_two_keys_taken_for_each_other_are_told_apart(signed, keys):
    with pytest.raises(LoratoolsError, match="is a public key"):
        signing.require_key(keys[1])
    assert "is a private key" in refused("usage", signed, keys[0])
    assert "no file named" in refused("not_found", signed, "nowhere.pem")
    assert "no public key" in refused("usage", signed, signed / "README.md")


def test_an_encrypted_key_takes_its_password_from_the_environment(folder, tmp_path, monkeypatch):
    key = ec.generate_private_key(ec.SECP256R1())
    private = write_private(tmp_path / "locked.pem", key, b"secret word")
    with pytest.raises(LoratoolsError, match=signing.PASSWORD):
        signing.require_key(private)
    monkeypatch.setenv(signing.PASSWORD, "another")
    with pytest.raises(LoratoolsError, match="is not its password"):
        signing.require_key(private)
    monkeypatch.setenv(signing.PASSWORD, "secret word")
    (folder / "model.sig").write_bytes(signing.sign(hashes(folder), private, name="adapter"))
    assert signing.check(folder, public_pem(tmp_path / "its.pem", key)).ok


def test_a_certificate_is_told_how_to_give_its_key(signed, tmp_path):
    file = tmp_path / "cert.pem"
    file.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert "openssl x509" in refused("usage", signed, file)


# ------------------------------------------------------------------------------- pushing again


def test_a_signature_of_the_same_files_is_recognised(signed, keys, tmp_path):
    made = (signed / "model.sig").read_bytes()
    now = hashes(signed)
    del now["model.sig"]
    assert signing.is_ours(made, now, keys[0])
    assert signing.covers(made, now)
    assert not signing.is_ours(made, now, pair(tmp_path, "other")[0])
    now["README.md"] = "0" * 64
    assert not signing.is_ours(made, now, keys[0])
    assert not signing.covers(made, now)
    assert not signing.is_ours(b"{}", now, keys[0])


def test_a_missing_package_is_named(folder, keys, tmp_path):
    """As after a plain install: pyOpenSSL is not there."""
    code = (
        "import sys; sys.modules['OpenSSL'] = None\n"
        "from loratools.cli import main\n"
        f"sys.exit(main(['verify', {str(folder)!r}, '--key', {str(keys[1])!r}]))"
    )
    (folder / "model.sig").write_bytes(b"{}")
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert ended.returncode == 2
    assert 'pip install "loratools[sign]"' in ended.stderr
