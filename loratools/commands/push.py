"""`push`: publish an adapter, a model or an ONNX folder on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from loratools.commands.inspect import as_json, human
from loratools.commands.push_plan import (
    Wanted,
    card_text,
    complete,
    known,
    looked,
    ordered,
    require_sense,
    signed,
    unfit,
)
from loratools.errors import CODES, LoratoolsError, Problem, error, refusal, shown

if TYPE_CHECKING:
    from loratools.hub.artefact import Artefact
    from loratools.hub.comparing import Difference
    from loratools.hub.pushing import Pushed

Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PushResult:
    """What was published, or (`dry_run`) would be."""

    repo: str
    kind: str
    visibility: str | None  # None: the Hub was not asked
    revision: str
    files: list[dict[str, Any]]
    commit: str | None = None
    url: str | None = None
    pr: int | None = None
    created: bool = False
    uploaded: int = 0
    unchanged: int = 0
    verified: int = 0
    nbytes: int = 0  # of what was, or would be, sent
    tag: str | None = None
    signed: bool = False
    compared: bool = True  # with what is on the Hub
    kept: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    card: str | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        return {
            "repo": self.repo,
            "kind": self.kind,
            "visibility": self.visibility,
            "revision": self.revision,
            "commit": self.commit,
            "url": self.url,
            "pr": self.pr,
            "created": self.created,
            "uploaded": self.uploaded,
            "unchanged": self.unchanged,
            "verified": self.verified,
            "bytes": self.nbytes,
            "files": self.files,
            "card": self.card,
            "remote_only": list(self.kept),
            "skipped": [{"path": name, "why": why} for name, why in self.skipped],
            "tag": self.tag,
            "signed": self.signed,
            "compared": self.compared,
            "dry_run": self.dry_run,
            "problems": [as_json(p) for p in self.problems],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def push(
    path: str | Path,
    repo: str | Path,
    *,
    dry_run: bool = False,
    public: bool = False,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    create_branch: bool = False,
    base_model: Sequence[str] = (),
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    card: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    path_in_repo: str = "",
    commit_message: str | None = None,
    tag: str | None = None,
    eval_results: str | Path | None = None,
    sign_key: str | Path | None = None,
    bars: bool = False,
    progress: Progress | None = None,
) -> PushResult:
    """Publish a folder or a file on the Hub as one commit, with a model card; nothing is deleted.

    The two may stand in either order where only one of them exists on disk. A new repository is
    private unless `public`. Everything that can be known is checked before the first byte is sent,
    and what was sent is verified afterwards. Done again, only what differs is sent: nothing, where
    nothing does. `bars` shows the Hub library's own progress on stderr; `progress` is told of the
    bytes that are hashed beforehand. Raises the errors of `loratools.errors`; those after the
    repository exists say what is on the Hub, and the command that goes on.
    """
    began = perf_counter()
    options = {
        "public": public, "private": private, "create_pr": create_pr, "revision": revision,
        "create_branch": create_branch, "base_model": base_model, "license": license,
        "license_name": license_name, "license_link": license_link,
        "card": None if card == "auto" else card, "include": include, "exclude": exclude,
        "path_in_repo": path_in_repo or None, "commit_message": commit_message, "tag": tag,
        "eval_results": eval_results, "sign_key": sign_key,
    }  # fmt: skip
    wanted = ordered(path, repo, revision=revision, inside=path_in_repo, options=options)
    require_sense(wanted)
    from loratools.commands.published import planned
    from loratools.hub import access, pushing, signing

    if sign_key is not None:
        signing.require_installed()
        signing.require_key(sign_key)
    if not dry_run:
        pushing.require_who()
    found = planned(
        wanted.path, include=include, exclude=exclude, inside=wanted.inside,
        base_models=base_model, progress=progress,
    )  # fmt: skip
    api = access.api()
    with pushing.quiet(bars=bars):
        remote, offline = looked(api, wanted, dry_run=dry_run)
        files, problems, notes = complete(found, wanted, remote, api, ask=not offline)
        plan = pushing.difference(files, remote)
        files, more, said = signed(plan, wanted, api)
        plan = pushing.difference(files, remote, hashed=known(plan))
        problems += [*more, *plan.problems, *unfit(remote, wanted, offline=bool(offline))]
        notes += said
        if refused := refusal(problems):
            raise refused
        if (
            tag is not None
            and remote.exists
            and not pushing.require_tag(api, remote, tag, changes=bool(plan.sent))
        ):
            tag = None
            notes.append(f"the tag {shown(wanted.options['tag'])} is there already")
        state = pushing.Pushed(remote.repo, wanted.revision, remote.visibility)
        if not dry_run:
            _carried_out(api, plan, state, wanted, found, tag)
    if offline:
        notes.append(f"not compared with the Hub: {offline}")
    if state.pull is not None:
        notes.append("a pull request begins as a draft: its page has the button that publishes it")
    visibility = state.visibility or ("public" if public else "private")
    return PushResult(
        repo=state.repo,
        kind=found.kind or "files",
        visibility=None if offline else visibility,
        revision=state.revision,
        files=[_row(one) for one in (state.files or plan.files)],
        commit=state.commit,
        url=None if dry_run else state.url,
        pr=state.pull,
        created=state.created if not dry_run else not remote.exists and not offline,
        uploaded=len(plan.sent) if dry_run else state.sent,
        unchanged=len(plan.files) - len(plan.sent),
        verified=state.verified,
        nbytes=plan.nbytes,
        tag=state.tag,
        signed=sign_key is not None,
        compared=not offline,
        kept=tuple(name for name in plan.kept if name != ".gitattributes"),
        skipped=tuple(found.skipped),
        card=card_text(files),
        problems=tuple(problems),
        notes=tuple(dict.fromkeys(notes)),
        dry_run=dry_run,
        seconds=perf_counter() - began,
    )


# ------------------------------------------------------------------------------- carrying it out


def _carried_out(
    api: Any, plan: Difference, state: Pushed, wanted: Wanted, found: Artefact, tag: str | None
) -> None:
    """Push; where that ends early, say what is on the Hub and which command goes on."""
    from loratools.hub import pushing

    try:
        pushing.push(
            api,
            plan,
            state,
            public=wanted.options["public"],
            create_pr=wanted.options["create_pr"],
            create_branch=wanted.options["create_branch"],
            message=wanted.options["commit_message"] or message(found),
            tag=tag,
            size=human(plan.nbytes),
        )
    except LoratoolsError as cause:
        raise _with_resume(cause, state, wanted) from cause
    except (KeyboardInterrupt, SystemExit):
        _log.warning("%s", _how_far(state, wanted))
        raise


def message(found: Artefact) -> str:
    """The commit's message, where none is given."""
    return f"Publish the {found.kind} with loratools"


def _again(state: Pushed, wanted: Wanted) -> str:
    return wanted.again("N" if state.pull_lost else state.pull)


def _how_far(state: Pushed, wanted: Wanted) -> str:
    done = "; ".join(state.done()) or "nothing new"
    return f"on the Hub already: {done}; to go on: {_again(state, wanted)}"


def _with_resume(cause: LoratoolsError, state: Pushed, wanted: Wanted) -> LoratoolsError:
    """The same error; its problems say how far it came and how to go on."""
    done, again = state.done(), _again(state, wanted)
    words = f"; on the Hub already: {'; '.join(done)}" if done else ""
    problems = [
        Problem(
            p.code, p.message + ("" if n else words), p.severity, p.adapter, p.target,
            advice(p, again),
        )
        for n, p in enumerate(cause.problems)
    ]  # fmt: skip
    return error(cause.code, cause.message + words, problems)


def advice(problem: Problem, again: str) -> str:
    """The next step, and the command; not both the words for it and the command itself."""
    own = problem.advice
    if problem.code in ("network", "remote_changed") and own == CODES[problem.code].remedy:
        return f"to go on: {again}"
    return f"{own}; to go on: {again}"


def _row(one: Any) -> dict[str, Any]:
    """One file in the plan's table."""
    return {
        "path": one.name,
        "size": one.file.size,
        "storage": None if one.large is None else "lfs" if one.large else "regular",
        "action": one.action,
        "sha256": one.sha256,
    }
