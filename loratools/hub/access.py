"""The way to the Hub: its client, offline mode, and every fault of it in words of our own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from loratools._version import VERSION
from loratools.errors import CODES, LoratoolsError, Problem, error, shown
from loratools.hub.messages import in_our_words

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

LIBRARY = ("huggingface_hub", "httpx2", "httpcore2", "hf_xet")
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
LOGIN = "hf auth login, or set HF_TOKEN"
LINES = 4  # of what a server says


def api() -> HfApi:
    """The client of the Hub that HF_ENDPOINT names."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, library_name="loratools", library_version=VERSION)


def endpoint() -> str:
    """The Hub that HF_ENDPOINT names."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def offline() -> bool:
    """Whether offline mode is on: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def token_source() -> str | None:
    """Where the token comes from, in the library's order; None without one."""
    from huggingface_hub import constants, get_token

    if os.environ.get("HF_OIDC_RESOURCE"):
        return "HF_OIDC_RESOURCE"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return name
    if os.path.exists(constants.HF_TOKEN_PATH):
        return f"the token in {shown(constants.HF_TOKEN_PATH)}"
    return "the token" if get_token() else None


def scrubbed(text: object) -> str:
    """Words of others without any token, and links without their signatures."""
    plain = str(text)
    for held in tokens():
        plain = plain.replace(held, "<token>")
    plain = re.sub(r"hf_\w{16,}|(?<=Bearer )[^\s'\"]+", "<token>", plain)
    plain = re.sub(r"(https?://)[^\s/@]+@", r"\1", plain)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\">]*", r"\1", plain)


def tokens() -> Iterator[str]:
    """The tokens that are set or stored, whatever they look like; nothing is refreshed."""
    from huggingface_hub import constants

    found = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError, UnicodeDecodeError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text())
    with suppress(OSError, UnicodeDecodeError):  # of `hf auth switch`: [name], hf_token = ...
        kept = Path(constants.HF_STORED_TOKENS_PATH).read_text()
        found += re.findall(r"(?m)^\s*hf_token\s*=\s*(\S{8,})\s*$", kept)
    yield from (held.strip() for held in found if held.strip())


@contextmanager
def translated(
    what: str, *, repo: str = "", revision: str = "", resume: str = ""
) -> Iterator[None]:
    """Turns every fault of the Hub, its client and the network into ours.

    what: what was being done, "read org/name". resume: the command that goes on afterwards.
    Only what the library raised is translated; all else passes as it is.
    """
    try:
        with in_our_words():
            yield
    except LoratoolsError:
        raise
    except Exception as cause:
        ours = _fault(cause, _Told(what, repo, revision, resume))
        if ours is None:
            raise
        raise ours from cause


class _Told:
    """What a message can be made of."""

    def __init__(self, what: str, repo: str, revision: str, resume: str) -> None:
        self.what, self.resume = what, resume
        self.repo = shown(repo) if repo else "the repository"
        self.revision = f"revision {shown(revision)}" if revision else "the revision"

    def error(self, code: str, words: str, remedy: str = "") -> LoratoolsError:
        message = f"{self.what}: {words}"
        remedy = remedy or CODES[code].remedy
        if self.resume:
            remedy = f"{remedy}; then: {self.resume}"
        return error(code, message, [Problem(code, message, remedy=remedy)])


def _fault(cause: BaseException, told: _Told) -> LoratoolsError | None:
    """Ours for one of theirs; the order matters, for some are subclasses of others."""
    import httpx2
    from huggingface_hub import errors as theirs

    match cause:
        case theirs.LocalTokenNotFoundError():
            return told.error("not_logged_in", "nobody is logged in", LOGIN)
        case theirs.OIDCError() | theirs.DeviceCodeError():
            return told.error("not_logged_in", _said(cause))
        case theirs.OfflineModeIsEnabled():
            return told.error("offline", offline_words())
        case theirs.LocalEntryNotFoundError():
            return _not_cached(cause, told)
        case theirs.GatedRepoError():
            page = f"{endpoint()}/{told.repo}"
            words = f"{told.repo} is gated: its owner asks for terms to be accepted first"
            remedy = f"accept them on {page} with the account of your token"
            return told.error("gated", words, remedy if token_source() else f"{remedy}; {LOGIN}")
        case theirs.RepositoryNotFoundError():
            return _no_repository(told)
        case theirs.RevisionNotFoundError():
            words = f"{told.repo} has no branch, tag or commit of that name ({told.revision})"
            remedy = "check the name; `loratools push` makes a branch with --create-branch"
            return told.error("not_found", words, remedy)
        case theirs.EntryNotFoundError():
            return told.error("not_found", f"{told.repo} has no file {_file(cause)}")
        case theirs.HFValidationError() | theirs.HfUriError():
            remedy = "repositories are named org/name: letters, digits, and - _ . between them"
            return told.error("usage", _said(cause), remedy)
        case theirs.HfHubHTTPError():
            return _by_status(cause, told)
        case theirs.SafetensorsParsingError():
            return told.error("malformed", _said(cause))
        case theirs.FileMetadataError():
            words = f"what answers at {endpoint()} is not the Hub"
            return told.error("network", words, _network_advice("check HF_ENDPOINT and proxies"))
        case httpx2.LocalProtocolError() | UnicodeEncodeError() if _is_theirs(cause):
            words = f"{token_source() or 'a header'} cannot be sent: it holds odd characters"
            return told.error("not_logged_in", words)
        case httpx2.HTTPError():
            words = f"{endpoint()}: {_said(cause) or type(cause).__name__}"
            return told.error("network", words, _network_advice(CODES["network"].remedy))
        case ConnectionError() if _is_theirs(cause):
            remedy = "run it again, with HF_HUB_DISABLE_XET=1 if it goes on like this"
            return told.error("network", _said(cause), remedy)
        case theirs.RevisionResolutionError():
            return _not_cached(cause, told)
        case RuntimeError() | ValueError():
            return _wrapped(cause, told)
    return None


def _wrapped(cause: BaseException, told: _Told) -> LoratoolsError | None:
    """What the library hides behind a plain error: the real one is its cause, if it has one."""
    from huggingface_hub.errors import BadRequestError

    inner = cause.__cause__
    if isinstance(inner, BadRequestError) and isinstance(cause, ValueError):
        return told.error("card", f"the Hub refuses it: {_said(inner.server_message or cause)}")
    if inner is not None and (ours := _fault(inner, told)):
        return ours
    return told.error("network", _said(cause)) if _is_theirs(cause) else None


def _by_status(cause: HfHubHTTPError, told: _Told) -> LoratoolsError:
    """Ours for an answer that is an error, by its number."""
    status = cause.response.status_code
    says = _said(cause.server_message or "")
    words = f"the Hub answers {status}" + (f": {says}" if says else "")
    match status:
        case 400 if "metadata" in says.lower():
            return told.error("card", f"the Hub refuses it: {says}")
        case 401:
            source = token_source()
            if source is None:
                return told.error("not_logged_in", "nobody is logged in", LOGIN)
            more = "; it goes before what `hf auth login` stored" if source == "HF_TOKEN" else ""
            return told.error("not_logged_in", f"the Hub refuses {source}{more}")
        case 402:
            remedy = f"make room, or see the quota on {endpoint()}/settings/billing"
            return told.error("no_access", words, remedy)
        case 403:
            source = token_source() or "nobody is logged in, and anyone"
            may = f"{source} may not do this with {told.repo}"
            return told.error("no_access", f"{may}: {says}" if says else may)
        case 404:
            return told.error("not_found", words)
        case 409 | 412:
            return told.error("remote_changed", f"{told.repo} changed meanwhile ({words})")
        case 413:
            return told.error("network", words, "publish fewer or smaller files at once")
        case 429:
            wait = cause.response.headers.get("Retry-After") or _reset(cause)
            remedy = f"wait {wait} seconds" if wait else "wait some minutes"
            return told.error("network", f"too many requests: {words}", remedy)
    return told.error("network", words)


def _no_repository(told: _Told) -> LoratoolsError:
    source = token_source()
    seen = f"the account of {source} may not see it" if source else "nobody is logged in"
    words = f"{told.repo} is not on {endpoint()}, or it is private and {seen}"
    return told.error(
        "not_found", words, "check the name" + ("" if source else f"; if it is private: {LOGIN}")
    )


def _not_cached(cause: BaseException, told: _Told) -> LoratoolsError:
    """What the cache lacks and the Hub did not give: for being offline, or as its cause says."""
    if offline():
        return told.error("offline", f"{offline_words()}, and the cache lacks what is asked for")
    inner = cause.__cause__
    if inner is not None and (ours := _fault(inner, told)):
        return ours
    return told.error("network", _said(cause), _network_advice(CODES["network"].remedy))


def offline_words() -> str:
    """What switched offline mode on, in words."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name):
            return f"{name}={shown(os.environ[name])} is set"
    return "offline mode is on"


def _network_advice(first: str) -> str:
    """The remedy, and the proxies that the way to the Hub may lead through."""
    named = []
    for name in PROXIES:
        for spelt in (name, name.lower()):
            if held := os.environ.get(spelt):
                named.append(f"{spelt} names {shown(_host(held))}")
    return f"{first} ({', '.join(named)})" if named else first


def _host(link: str) -> str:
    try:
        return urlsplit(link if "://" in link else f"//{link}").hostname or "a proxy"
    except ValueError:
        return "something that is no link"


def _reset(cause: HfHubHTTPError) -> str:
    """The seconds after which a limit ends: `RateLimit: "api";r=0;t=55`."""
    found = re.search(r"\bt=(\d{1,6})", cause.response.headers.get("RateLimit", ""))
    return found[1] if found else ""


def _file(cause: BaseException) -> str:
    """The file that an answer is about, from its address."""
    response = getattr(cause, "response", None)
    path = urlsplit(str(response.url)).path if response is not None else ""
    found = re.search(r"/(?:resolve|raw|tree)/[^/]+/(.+)", path)
    return shown(unquote(found[1])) if found else "of that name"


def _said(text: object) -> str:
    """What the library or the server says, safe to print, in one line."""
    lines = [line.strip() for line in scrubbed(text).splitlines() if line.strip()]
    return "; ".join(shown(line) for line in lines[:LINES])


def _is_theirs(cause: BaseException) -> bool:
    """Whether the library raised it, or the native code that the library called."""
    trace = cause.__traceback__
    name = ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return name.partition(".")[0] in LIBRARY
