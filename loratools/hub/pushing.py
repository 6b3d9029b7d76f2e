"""Publishing: one commit on a known parent, sent again where that is safe, and verified after."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import LoratoolsError, Problem, error, refusal, shown
from loratools.hub import access
from loratools.hub.comparing import (
    LARGE,
    REGULAR,
    WEIGHTS,
    Compared,
    Difference,
    Remote,
    listed,
    look,
    wrong,
)
from loratools.hub.comparing import difference as difference
from loratools.hub.messages import in_our_words
from loratools.hub.patience import patiently, pause

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pushed:
    """How far a push came: what is on the Hub already is known at every moment."""

    repo: str
    revision: str
    visibility: str | None = None
    created: bool = False
    branched: bool = False
    pull: int | None = None
    pull_lost: bool = False  # one was asked for, and nobody knows its number
    commit: str | None = None
    sent: int = 0
    verified: int = 0
    tag: str | None = None
    files: tuple[Compared, ...] = field(default=())

    def done(self) -> list[str]:
        """What is on the Hub because of this push, in words."""
        words = []
        if self.created:
            words.append(f"the {self.visibility} repository {self.repo}, made by this command")
        if self.branched:
            words.append(f"the branch {self.revision}")
        if self.pull is not None:
            words.append(f"pull request {self.pull} ({self.url})")
        if self.commit is not None and self.sent:
            words.append(f"commit {self.commit[:12]} with {count(self.sent, 'file')}")
        return words

    @property
    def url(self) -> str:
        """The page that shows what was pushed."""
        place = f"{access.endpoint()}/{self.repo}"
        number = self.pull
        if number is None and (found := re.fullmatch(r"refs/pr/(\d{1,9})", self.revision)):
            number = int(found[1])
        if number is not None:
            return f"{place}/discussions/{number}"
        return place if self.revision == "main" else f"{place}/tree/{self.revision}"


def count(n: int, what: str) -> str:
    """A number of things, in words."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def require_who() -> None:
    """Raise offline or not_logged_in before anything else is done."""
    from huggingface_hub import get_token

    if access.offline():
        words = f"{access.offline_words()}, and push needs the network"
        remedy = "unset it; --dry-run shows the plan without a network"
        raise error("offline", words, [Problem("offline", words, remedy=remedy)])
    with access.translated("who am I"):  # a token of CI is exchanged for one of the Hub
        token = get_token()
    if token is None:
        raise error("not_logged_in", "nobody is logged in to the Hub: run `hf auth login`")


def full_name(api: HfApi, repo: str) -> str:
    """The repository's name with its owner: without one, whoever is logged in."""
    if "/" in repo:
        return repo
    with access.translated("who am I"):
        return f"{patiently(lambda: api.whoami(cache=True))['name']}/{repo}"


def push(
    api: HfApi,
    plan: Difference,
    state: Pushed,
    *,
    public: bool,
    create_pr: bool,
    create_branch: bool,
    message: str,
    description: str = "",
    tag: str | None = None,
    size: str = "",
) -> None:
    """Carry out a difference that has no problems; `state` says at each moment what is done.

    `size`, the bytes to send in words, is for the line that is logged.

    Raises what `access.translated` makes of the Hub's faults, remote_changed, unpublishable where
    the Hub would keep weights in the commit itself, and proof_failed where it holds other bytes.
    """
    remote = plan.remote
    with access.translated(f"publish to {shown(state.repo)}", repo=state.repo):
        _validate_card(api, plan.sent)
        if not remote.exists:
            remote = _made(api, state, public=public)
        # Whoever may open a pull request may write to its ref, and to nothing else.
        if not create_pr and not state.revision.startswith("refs/pr/"):
            patiently(lambda: api.auth_check(state.repo, write=True))
        if remote.head is None and create_branch:
            remote = _branched(api, state)
        if not plan.sent:
            state.commit = remote.head
        else:
            _log.info("sending %s, %s", count(len(plan.sent), "file"), size)
            if create_pr:
                remote = _pull_request(api, state, remote, message, description)
            state.commit = _commit(api, plan.sent, remote, message, description)
            state.sent = len(plan.sent)
    _verify(api, plan.files, state)
    if tag is not None:
        with access.translated(f"tag {shown(tag)}", repo=state.repo):
            patiently(
                lambda: api.create_tag(state.repo, tag=tag, revision=state.commit, exist_ok=True)
            )
        # Made by us, though an answer may have been lost; or by somebody else meanwhile.
        require_tag(api, replace(remote, head=state.commit), tag, changes=False)
        state.tag = tag


def require_tag(api: HfApi, remote: Remote, tag: str, *, changes: bool) -> bool:
    """Whether a tag is yet to be made; raises output_exists where it names another commit."""
    with access.translated(f"the tags of {shown(remote.repo)}", repo=remote.repo):
        refs = patiently(lambda: api.list_repo_refs(remote.repo))
    held = next((one.target_commit for one in refs.tags if one.name == tag), None)
    if held is None:
        return True
    if held == remote.head and not changes:
        return False
    words = f"{shown(remote.repo)} has a tag {shown(tag)} already, at {held[:12]}"
    remedy = "choose another --tag; loratools moves none"
    raise error("output_exists", words, [Problem("output_exists", words, remedy=remedy)])


# ------------------------------------------------------------------------------- before the commit


def _made(api: HfApi, state: Pushed, *, public: bool) -> Remote:
    visibility = "public" if public else "private"
    made = patiently(
        lambda: api.create_repo(state.repo, visibility=visibility, exist_ok=True)  # type: ignore[arg-type]
    )
    state.repo = made.repo_id
    found = look(api, state.repo, state.revision)
    # Somebody may have made it meanwhile, and not as this command would have.
    if found.visibility != visibility:
        words = f"{shown(state.repo)} was made meanwhile and is {found.visibility}"
        raise error("visibility", words)
    state.created, state.visibility = True, visibility
    return found


def _branched(api: HfApi, state: Pushed) -> Remote:
    patiently(lambda: api.create_branch(state.repo, branch=state.revision, exist_ok=True))
    state.branched = True
    return look(api, state.repo, state.revision)


def _validate_card(api: HfApi, files: Sequence[Compared]) -> None:
    """Ask the Hub about the card before any weight is sent.

    The commit asks again by itself, but only after the weights that went before it.
    """
    asks = getattr(api, "_validate_yaml", None)  # without it, a bad card costs time and no more
    for one in files:
        if one.name == "README.md" and asks is not None:
            text = _text(one)
            patiently(partial(asks, text))


def _pull_request(
    api: HfApi, state: Pushed, remote: Remote, message: str, description: str
) -> Remote:
    """Open a pull request first: a commit to its ref may be tried again, opening it may not."""
    import httpx2

    try:
        made = patiently(
            lambda: api.create_pull_request(state.repo, title=message, description=description),
            twice=False,
        )
    except httpx2.TransportError as cause:
        state.pull_lost = True
        page = f"{access.endpoint()}/{state.repo}/discussions"
        words = f"{state.repo}: a pull request was asked for, and the answer was lost"
        remedy = f"look at {page} for its number N"
        raise error("network", words, [Problem("network", words, remedy=remedy)]) from cause
    state.pull = made.num
    _log.warning("pull request %d is open: %s", made.num, state.url)
    return replace(remote, revision=made.git_reference or f"refs/pr/{made.num}")


# ------------------------------------------------------------------------------- the commit


def _commit(
    api: HfApi, files: Sequence[Compared], remote: Remote, message: str, description: str
) -> str:
    """The id of the one commit with these files; an answer that was lost is looked for."""
    tried = 0
    while True:
        try:
            return _sent(api, files, remote, message, description)
        except LoratoolsError:
            raise
        except Exception as cause:
            _require_unchanged(files)  # else it is no fault of the Hub's
            moved = _is_stale(cause)
            wait = None if moved else pause(cause, tried)
            if wait is None and not moved:
                raise
            now = look(api, remote.repo, remote.revision)
            if now.head and now.head != remote.head:
                if not wrong(files, now.files):
                    _log.warning("the commit is there: only the answer to it was lost")
                    return now.head
                raise _changed(remote, now) from cause
            if wait is None:
                raise
            tried += 1
            time.sleep(wait)


def _sent(
    api: HfApi, files: Sequence[Compared], remote: Remote, message: str, description: str
) -> str:
    """One try: what belongs into the large file storage first, then the commit."""
    operations = [_operation(one) for one in files]  # anew each time: one commit uses them up
    api.preupload_lfs_files(remote.repo, additions=operations, revision=remote.revision)
    _require_storage(operations, files)
    _require_unchanged(files)
    made = api.create_commit(
        remote.repo,
        operations,
        commit_message=message,
        commit_description=description,
        revision=remote.revision,
        parent_commit=remote.head,
    )
    return str(made.oid)


def _operation(one: Compared) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    made = CommitOperationAdd(path_in_repo=one.name, path_or_fileobj=_content(one))
    made.upload_info.sha256 = bytes.fromhex(one.sha256)  # else the library hashes it once more
    return made


def _require_unchanged(files: Sequence[Compared]) -> None:
    """Raise where a file is no longer the one that was looked through and compared."""
    for one in files:
        if one.file.sha256() != one.sha256:  # known already, unless somebody wrote to it
            words = f"{shown(one.name)} was written to while it was published; nothing is committed"
            raise error("input_changed", words)


def _text(one: Compared) -> str:
    raw = one.file.replaced
    return (Path(one.file.path).read_bytes() if raw is None else raw).decode(errors="replace")


def _content(one: Compared) -> Any:
    return one.file.replaced if one.file.replaced is not None else str(one.file.path)


def _require_storage(operations: Sequence[Any], files: Sequence[Compared]) -> None:
    """Raise where the Hub would keep weights in the commit itself, or leave a file out."""
    found = []
    regular = 0
    for operation, one in zip(operations, files, strict=True):
        mode = getattr(operation, "_upload_mode", None)
        if getattr(operation, "_should_ignore", False):
            found.append(f"{shown(one.name)}: the repository's .gitignore leaves it out")
        if mode != "regular":
            continue
        regular += one.file.size
        if one.file.size > LARGE and one.name.endswith(WEIGHTS):
            found.append(
                f"{shown(one.name)}: the repository's .gitattributes keeps it out of the large "
                "file storage"
            )
    if regular > REGULAR:
        found.append(f"{regular / 1e6:.0f} MB would go into the commit itself, beside LFS")
    remedy = "mend .gitattributes or .gitignore on the Hub; nothing was committed"
    if refused := refusal(Problem("unpublishable", words, remedy=remedy) for words in found):
        raise refused


def _is_stale(cause: Exception) -> bool:
    return getattr(getattr(cause, "response", None), "status_code", None) == 412


def _changed(before: Remote, now: Remote) -> LoratoolsError:
    was, head = (before.head or "nothing")[:12], (now.head or "nothing")[:12]
    words = f"{shown(before.repo)}: {shown(before.revision)} moved from {was} to {head} meanwhile"
    return error("remote_changed", words)


# ------------------------------------------------------------------------------- afterwards


def _verify(api: HfApi, files: Sequence[Compared], state: Pushed) -> None:
    """Raise proof_failed unless the commit holds every file with the bytes that it has here."""
    with access.translated(f"verify {shown(state.repo)}", repo=state.repo):
        there = listed(api, state.repo, state.commit or state.revision)
    problems = wrong(files, there)
    state.files = tuple(
        replace(one, large=there[one.name].sha256 is not None) if one.name in there else one
        for one in files
    )
    state.verified = len(files) - len(problems)
    if refused := refusal(problems):
        raise refused


@contextmanager
def quiet(*, bars: bool) -> Iterator[None]:
    """The library's own bars, or none; what it says is said in our words."""
    from huggingface_hub import utils

    library: Any = utils  # which says neither types nor what it exports
    off = library.are_progress_bars_disabled()
    if not bars and not off:
        library.disable_progress_bars()
    try:
        with in_our_words():
            yield
    finally:
        if not bars and not off:
            library.enable_progress_bars()


def fetched(api: HfApi, remote: Remote, name: str) -> bytes:
    """A small file of a repository, at the commit that was looked at."""
    path = patiently(
        lambda: api.hf_hub_download(remote.repo, name, revision=remote.head or remote.revision)
    )
    return Path(path).read_bytes()
