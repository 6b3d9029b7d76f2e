"""What must not be published, told from a file's content: secrets, and local paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratools.adapter import Source
from loratools.containers import safetensors
from loratools.errors import LoratoolsError
from loratools.hub import access

# ------------------------------------------------------------------------------- secrets

# What it is, the letters that it begins with or has within (searched for first, which is fast),
# and the pattern from there on, which repeats one class at a time and so never goes back far.
_EDGE = rb"(?<![A-Za-z0-9_-])"
_KEPT = rb"[\"']{0,2}[ \t]{0,9}[:=][ \t]{0,9}[\"']?[A-Za-z0-9_+/=.-]{16,255}"
SECRETS: tuple[tuple[str, tuple[bytes, ...], re.Pattern[bytes]], ...] = tuple(
    (what, marks, re.compile(pattern))
    for what, marks, pattern in (
        (
            "an access token of the Hub",
            (b"hf_", b"api_org_"),
            _EDGE + rb"(?:hf|api_org)_[A-Za-z0-9]{30,100}",
        ),
        (
            "a token of GitHub",
            (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"),
            _EDGE + rb"gh._[A-Za-z0-9]{36,255}",
        ),
        ("a token of GitHub", (b"github_pat_",), _EDGE + rb"github_pat_[A-Za-z0-9_]{50,255}"),
        ("a token of GitLab", (b"glpat-",), _EDGE + rb"glpat-[A-Za-z0-9_-]{20,100}"),
        (
            "an access key of AWS",
            (b"AKIA", b"ASIA"),
            _EDGE + rb"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])",
        ),
        ("a key of Google", (b"AIza",), _EDGE + rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
        ("a token of Slack", (b"xox",), _EDGE + rb"xox[abeoprs]-[A-Za-z0-9-]{20,255}"),
        ("a key of OpenAI or Anthropic", (b"sk-",), _EDGE + rb"sk-[A-Za-z0-9_-]{20,255}"),
        ("a key of Stripe", (b"sk_live_", b"rk_live_"), _EDGE + rb".k_live_[A-Za-z0-9]{20,255}"),
        ("a token of PyPI", (b"pypi-",), _EDGE + rb"pypi-[A-Za-z0-9_-]{60,255}"),
        ("a token of npm", (b"npm_",), _EDGE + rb"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
        (
            "a token of a web service",
            (b"eyJ",),
            _EDGE + rb"eyJ[A-Za-z0-9_-]{20,2000}\.eyJ[A-Za-z0-9_-]{20,2000}",
        ),
        ("a private key", (b"-----BEGIN",), rb"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY"),
        (
            "a password in an address",
            (b"://",),
            rb"://[^\s/:@\"'<>]{1,64}:[^\s/:@\"'<>]{3,128}@",
        ),
        *(
            (
                "a password or a key",
                (mark, mark.upper(), mark.title()),
                rb"(?i:" + re.escape(mark) + rb")" + _KEPT,
            )
            for mark in (
                b"password", b"passwd", b"api_key", b"apikey", b"api-key", b"secret_key",
                b"client_secret", b"access_key", b"access_token", b"auth_token", b"hf_token",
                b"hub_token", b"wandb_token",
            )
        ),
    )
)  # fmt: skip
LONGEST = 4096  # bytes of a secret at most: what two pieces read one after another share
_PIECE = 4 << 20
_BINARY_HEAD, _BINARY_TAIL = 16 << 20, 1 << 20  # of a binary file: where its own words stand
_OWN = 8  # letters that a token of the user's has at least


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret stands: its line, or none in a binary file; its value is kept nowhere."""

    line: int | None
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}" if self.line else f"in its metadata: {self.what}"


def secrets(source: Source, own: frozenset[bytes] = frozenset()) -> list[Secret]:
    """The secrets in a file: text whole, of weights what stands around them.

    `own` has the user's own tokens (`own_tokens`), which are found however they look.
    """
    head = source.read(0, min(source.size, 8192))
    if b"\0" not in head and not head.startswith(b"\x80"):
        return _in_text(_pieces(source, 0, source.size), own)
    places = [(0, min(source.size, _BINARY_HEAD))]
    if source.name.endswith(".safetensors"):
        with suppress(LoratoolsError):  # what is wrong with it is told elsewhere
            places = [(8, safetensors.read_header(source).data_start - 8)]
    elif source.size > _BINARY_HEAD:
        places.append((source.size - _BINARY_TAIL, _BINARY_TAIL))
    found = [s for place in places for s in _in_text(_pieces(source, *place), own)]
    return list(dict.fromkeys(Secret(None, s.what) for s in found))


def secrets_in(text: str, own: frozenset[bytes] = frozenset()) -> list[Secret]:
    """The secrets in a text that is about to be written."""
    return _in_text(iter([(b"", text.encode("utf-8", "replace"))]), own)


def _pieces(source: Source, start: int, length: int) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of a file, each with the end of the one before it."""
    before = b""
    for at in range(start, start + length, _PIECE):
        piece = source.read(at, min(_PIECE, start + length - at))
        yield before, piece
        before = piece[-LONGEST:]


def _in_text(pieces: Iterator[tuple[bytes, bytes]], own: frozenset[bytes]) -> list[Secret]:
    found: dict[int, Secret] = {}
    line = 1  # of the first byte of the piece
    for before, piece in pieces:
        text = before + piece
        first = line - before.count(b"\n")
        at = [
            (hit.start(), what)
            for what, marks, pattern in SECRETS
            for hit in _hits(text, marks, pattern)
            if hit.end() > len(before) and _looks_drawn(hit[0])
        ]
        at += [
            (hit.start(), "your own token")
            for token in sorted(own)
            for hit in re.finditer(re.escape(token), text)
        ]
        lines = _lines(text, {place for place, _ in at})
        for place, what in at:  # the most telling first, and one is enough for a line
            number = first + lines[place]
            found.setdefault(number, Secret(number, what))
        line += piece.count(b"\n")
    return [found[number] for number in sorted(found)]


def _lines(text: bytes, places: set[int]) -> dict[int, int]:
    """How many lines end before each place."""
    found: dict[int, int] = {}
    count = before = 0
    for place in sorted(places):
        count += text.count(b"\n", before, place)
        found[place], before = count, place
    return found


def _hits(
    text: bytes, marks: tuple[bytes, ...], pattern: re.Pattern[bytes]
) -> Iterator[re.Match[bytes]]:
    for mark in marks:
        at = text.find(mark)
        while at >= 0:
            hit = pattern.match(text, at)
            if hit is not None:
                yield hit
            at = text.find(mark, hit.end() if hit else at + len(mark))


def _looks_drawn(secret: bytes) -> bool:
    """Whether it is no stand-in: "hf_xxxx", "YOUR_API_KEY_GOES_HERE", a chain of words."""
    if secret.startswith(b"-----BEGIN"):
        return True
    if secret.startswith(b"://"):
        password = secret.rpartition(b":")[2].strip(b"@").lower()
        return password[:1] not in (b"$", b"*") and password not in _SHOWN_AS
    drawn = re.split(rb"[ \t:=\"']", secret)[-1]
    if re.search(rb"(?i)your|example|xxxx|placeholder|insert|redacted|dummy", drawn):
        return False
    if len(set(drawn)) <= 8:
        return False
    # Tokens of the Hub are letters alone, and a key of AWS may be; words are of one case.
    mixed = drawn.upper() != drawn != drawn.lower()
    letters = drawn.startswith(b"AKIA") or (mixed and drawn.startswith((b"hf_", b"api_org_")))
    return letters or re.search(rb"\d", drawn) is not None


_SHOWN_AS = (b"pass", b"password", b"passwd", b"secret", b"token", b"pw", b"pwd")


def own_tokens() -> frozenset[bytes]:
    """The user's own tokens, which no file may hold; nothing is asked of the network."""
    held = [*access.tokens(), os.environ.get("WANDB_API_KEY", "").strip()]
    return frozenset(token.encode() for token in held if len(token) >= _OWN)


# Files that exist to keep passwords: their content may be as short as "hunter2".
_KEEPERS = re.compile(
    r"(?i)(?:\.env(?:\.(?!example|sample|template).*)?|[._]netrc|\.npmrc|\.pypirc|\.pgpass|"
    r"\.git-credentials|\.htpasswd|id_(?:rsa|dsa|ecdsa|ed25519)|credentials(?:\.json)?|token|"
    r"stored_tokens|.*\.(?:p12|pfx|kdbx|keystore|jks))"
)


def keeps_secrets(name: str) -> bool:
    """Whether a file, by its name, is one that keeps passwords or private keys."""
    return _KEEPERS.fullmatch(name) is not None


# ------------------------------------------------------------------------------- local paths

# The config files whose paths are scrubbed; vocabularies hold texts that only look like paths.
CONFIGS = re.compile(
    r"(?:adapter_|generation_|tokenizer_|(?:pre|video_)?processor_|preprocessor_|scheduler_|"
    r"feature_extractor_|genai_|quantize_|quantization_|quant_)?config\.json|model_index\.json|"
    r"special_tokens_map\.json|modules\.json|adapter_model_config\.json"
)
_KEYS = re.compile(r"(?i)(?:.{0,100}[_-])?(?:path|dir|file|folder|directory|paths|files)")
_BASES = ("model", "base_model", "base_model_name")  # mlx-lm, Axolotl
_TEXTS = ("content", "chat_template", "vocab", "added_tokens", "merges")
_ABSOLUTE = re.compile(r"(?:file://)?(?:/(?!/)|~/|\\\\|[A-Za-z]:[\\/])[^\n\r]+")
_RELATIVE = re.compile(r"\.{1,2}(?:[\\/][^\n\r]*)?")
_HOMES = re.compile(
    r"(?:/home|/Users|/root|/mnt|/data\d?|/scratch|/workspace|[A-Za-z]:\\Users)[/\\]"
)


def is_local_path(value: object) -> bool:
    """Whether a text can only be a path on somebody's machine (a Hub id never is one)."""
    if not isinstance(value, str):
        return False
    return any(form.fullmatch(value.strip()) for form in (_ABSOLUTE, _RELATIVE))


def is_home_path(value: str) -> bool:
    """Whether a text is an absolute path where people and clusters keep their own files."""
    return is_local_path(value) and _HOMES.match(value.strip()) is not None


def last_part(path: str) -> str:
    """The last component of a path of any system."""
    parts = [p for p in re.split(r"[\\/]", path.strip()) if p not in ("", ".", "..", "~")]
    return parts[-1] if parts else ""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """A config with its local paths replaced: the text to send, and which keys were changed."""

    text: bytes
    keys: tuple[str, ...]


def scrubbed(raw: bytes, base: str | None = None) -> Scrubbed | None:
    """A JSON config without paths of this machine; None where it names none, or is no JSON.

    A name or path of a base becomes `base` where it is known; any other path its last component.
    """
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        return None  # what reads configs says so
    keys: list[str] = []

    def clean(value: Any, key: str, names_path: bool) -> Any:
        if isinstance(value, dict):
            return {
                k: v if k in _TEXTS else clean(v, k, _KEYS.fullmatch(k[:LONGEST]) is not None)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [clean(item, key, names_path) for item in value]
        if not isinstance(value, str):
            return value
        names_base = key.endswith("name_or_path") or key in _BASES
        # A relative path elsewhere ("./vocab.json") leads to a file that is published with it.
        leads_out = names_path and _ABSOLUTE.fullmatch(value.strip())
        if (names_base and is_local_path(value)) or leads_out or _HOMES.match(value):
            keys.append(key)
            return base if base and names_base else last_part(value)
        return value

    try:
        cleaned = clean(table, "", False)
    except RecursionError:
        return None
    if not keys:
        return None
    indent = re.match(rb"[{\[]\s*?\n([ \t]+)", raw)
    text = json.dumps(
        cleaned,
        indent=indent[1].decode() if indent else None,
        ensure_ascii=raw.isascii(),
    )
    end = "\n" if raw.endswith(b"\n") else ""
    return Scrubbed((text + end).encode("utf-8", "replace"), tuple(dict.fromkeys(keys)))
