"""What counts as an address of the Hub, against the library's own parser and hostile text."""

import subprocess
import sys
from contextlib import suppress

import pytest
from huggingface_hub import constants, parse_hf_uri
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import UsageError
from loratools.hub.address import Address, address

PLAIN = {
    "org/name": Address("org/name"),
    "org/name@main": Address("org/name", "main"),
    "org/name@refs/pr/12": Address("org/name", "refs/pr/12"),
    "org/name@feature/x:sub": Address("org/name", "feature/x", "sub"),
    "org/name:a/b c/model.safetensors": Address("org/name", None, "a/b c/model.safetensors"),
    "org/name@v1:x:y": Address("org/name", "v1", "x:y"),
    "Org-1/na.me_2@" + "a" * 40: Address("Org-1/na.me_2", "a" * 40),
    "org/name:folder/": Address("org/name", None, "folder"),
}
LINKS = {
    "hf://org/name": Address("org/name"),
    "hf://models/org/name@v1/sub/x.gguf": Address("org/name", "v1", "sub/x.gguf"),
    "hf://org/name@refs/pr/3/x.gguf": Address("org/name", "refs/pr/3", "x.gguf"),
    "https://huggingface.co/org/name": Address("org/name"),
    "HTTPS://HuggingFace.co/org/name/": Address("org/name"),
    "huggingface.co/org/name": Address("org/name"),
    "https://hf.co/org/name/tree/main": Address("org/name", "main"),
    "https://huggingface.co/org/name/tree/v1/sub": Address("org/name", "v1", "sub"),
    "https://huggingface.co/org/name/blob/main/a%20b.safetensors": Address(
        "org/name", "main", "a b.safetensors"
    ),
    "https://huggingface.co/org/name/resolve/refs%2Fpr%2F1/x.bin?download=true#top": Address(
        "org/name", "refs/pr/1", "x.bin"
    ),
    "https://huggingface.co/org/name?token=secret": Address("org/name"),
}
PATHS = (
    "", "name", "./name", "../name", "/org/name", "org/", "/name", "org//name", "a/b/c", "C:\\x\\y",
    "~/x", "org/na me", "org/name@", "org/name:", "org/name@a b", "org/name@..", "org/name@-x",
    "org/name@x.lock", "org/name@a..b", "org/name@a//b", "org/name@/a", "org/name@a\\b",
    "org/name@a\nb", "org/name:../x", "org/name:a/../../x", "org/name:/etc/passwd", "org/name:a//b",
    "org/name:a\\b", "org/name:a\0b", "org/name:./a", "org/a--b", "org/a..b", "org/name.git",
    "-org/name", "org/name-", "org/.name", "datasets/name", "models/name", "buckets/x", "café/name",
    "org/" + "n" * 97, "org/name:" + "x" * 3000, "example.org/a/b", "huggingface.co/org/name/wiki",
)  # fmt: skip
REFUSED = {
    "hf://": "no address",
    "hf://name": "no address",
    "hf://datasets/org/name": "dataset",
    "hf://buckets/org/name": "bucket",
    "hf://org/name/../../x": "cannot be one",
    "hf://org/name@a%00b/x": "cannot be one",
    "https://huggingface.co/spaces/org/name": "space",
    "https://huggingface.co/org": "no address",
    "https://huggingface.co/org/name/discussions/3": "no address",
    "https://huggingface.co/org/name/blob/main/%2e%2e/x": "cannot be one",
    "https://example.org/org/name": "no address",
    "https://huggingface.co.example.org/org/name": "no address",
    "https://[::1/org/name": "not a link",
    "https://huggingface.co/org/name/resolve/main/a%5Cb": "cannot be one",
}


@pytest.mark.parametrize(("source", "meant"), (PLAIN | LINKS).items())
def test_what_users_write(source, meant):
    assert address(source) == meant
    assert address(str(meant)) == meant


@pytest.mark.parametrize("source", PATHS)
def test_what_can_only_be_a_path(source):
    assert address(source) is None


@pytest.mark.parametrize(("source", "why"), REFUSED.items())
def test_what_can_be_no_path_and_is_no_address(source, why):
    with pytest.raises(UsageError, match=why):
        address(source)


@pytest.mark.parametrize("source", LINKS)
def test_links_mean_what_they_mean_to_the_library(source):
    theirs, ours = parse_hf_uri(source), address(source)
    assert (ours.repo, ours.revision, ours.inside) == (
        theirs.id,
        theirs.revision,
        theirs.path_in_repo.rstrip("/"),
    )


def test_a_refusal_is_safe_to_print():
    with pytest.raises(UsageError) as caught:
        address("hf://org/name@\x1b[31m\u202e" + "x" * 500)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_password_in_a_link_is_not_repeated():
    with pytest.raises(UsageError, match="user name or a password") as caught:
        address("https://me:hf_verysecretverysecretvery@huggingface.co/org/name")
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        address("https://example.org/org/name?token=secret")
    assert "secret" not in str(caught.value)


def test_the_host_that_the_environment_names(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.org:8080/hf")
    assert address("http://hub.example.org:8080/hf/org/name/blob/v1/x") == Address(
        "org/name", "v1", "x"
    )
    assert address("https://huggingface.co/org/name") == Address("org/name")


NAMES = st.from_regex(r"[\w.-]{1,12}/[\w.-]{1,12}", fullmatch=True)


@given(NAMES)
def test_a_plain_name_is_one_exactly_when_the_library_takes_it(name):
    try:
        validate_repo_id(name)
    except ValueError:
        assert address(name) is None
    else:
        assert address(name) in (None, Address(name))
        assert address(f"org-{name}") == Address(f"org-{name}") or "--" in f"org-{name}"


@given(st.text(max_size=60) | st.text("a/@:.-\\ hf%", max_size=30))
def test_no_text_does_harm(text):
    for source in (text, f"hf://{text}", f"https://huggingface.co/{text}", f"org/name@{text}"):
        found = None
        with suppress(UsageError):
            found = address(source)
        if found is not None:
            validate_repo_id(found.repo)
            assert not found.inside.startswith("/")
            assert ".." not in found.inside.split("/")
            assert address(str(found)) == found


def test_a_plain_name_needs_no_library():
    program = (
        "from loratools.hub.address import address; import sys; address('org/name@v1:x');"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
