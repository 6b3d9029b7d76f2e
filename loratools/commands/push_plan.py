"""What a push would do: its arguments put in order, the card, the signature, what is in the way."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import LoratoolsError, Problem, error, shown

if TYPE_CHECKING:
    from loratools.hub.artefact import Artefact, File
    from loratools.hub.comparing import Difference, Remote

README = "README.md"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The arguments of one push, in order."""

    path: Path
    repo: str
    revision: str
    inside: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def again(self, pull: int | str | None) -> str:
        """The command that goes on, or does it again; `pull` is the pull request that is open."""
        words = ["loratools", "push", str(self.path), self.repo]
        options = dict(self.options)
        if pull is not None:
            options |= {"create_pr": False, "revision": f"refs/pr/{pull}"}
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                words.append(flag)
            elif isinstance(value, list | tuple):
                words += [word for one in value for word in (flag, str(one))]
            elif value not in (None, False):
                words += [flag, str(value)]
        return shlex.join(words)


# ------------------------------------------------------------------------------- arguments


def ordered(
    one: str | Path,
    other: str | Path,
    *,
    revision: str | None = None,
    inside: str = "",
    options: Mapping[str, Any] | None = None,
) -> Wanted:
    """Which is the path and which the repository: the one that exists on disk is the path."""
    from loratools.hub.address import address

    path, name = one, other
    if not Path(one).exists():
        if not Path(other).exists():
            raise error(
                "not_found",
                f"neither {shown(one)} nor {shown(other)} is on disk: loratools push PATH ORG/NAME",
            )
        path, name = other, one
    elif Path(other).exists() and address(str(one)) and not address(str(other)):
        path, name = other, one
    text = str(name).removesuffix("/")
    found = address(text)
    if found is None:
        if "/" in text or not text.isprintable() or not text:
            raise error("usage", f"{shown(text)} is no name of a repository: ORG/NAME was expected")
        return Wanted(Path(path), text, revision or "main", inside, options or {})
    if found.revision and revision and found.revision != revision:
        raise error(
            "usage", f"{shown(text)} names {shown(found.revision)}, --revision {shown(revision)}"
        )
    if found.inside and inside and found.inside != inside:
        raise error("usage", f"{shown(text)} names a folder, and so does --path-in-repo")
    said = dict(options or {})
    if found.revision:
        said["revision"] = found.revision
    if found.inside:
        said["path_in_repo"] = found.inside
    return Wanted(
        Path(path), found.repo, found.revision or revision or "main", found.inside or inside, said
    )


def require_sense(wanted: Wanted) -> None:
    """Raise usage for options that contradict each other."""
    from loratools.hub.address import is_revision

    said = wanted.options
    for flag, name in (("--revision", wanted.revision), ("--tag", said["tag"])):
        if name is not None and not is_revision(name):
            raise error("usage", f"{flag} {shown(name)}: git has no such name of a branch or a tag")
    if wanted.revision.startswith("refs/") and not re.fullmatch(
        r"refs/pr/\d{1,9}", wanted.revision
    ):
        what = "expected a branch, or refs/pr/N of an open pull request"
        raise error("usage", f"--revision {shown(wanted.revision)}: {what}")
    if said["public"] and said["private"]:
        raise error("usage", "--public and --private exclude each other")
    if said["create_pr"] and said["revision"]:
        raise error(
            "usage",
            "--create-pr makes its own revision; an open pull request is gone on with by "
            "--revision refs/pr/N alone",
        )
    if said["create_branch"] and (said["create_pr"] or not said["revision"]):
        raise error("usage", "--create-branch needs --revision BRANCH")
    if said["create_branch"] and wanted.revision.startswith("refs/"):
        raise error("usage", f"{shown(wanted.revision)} is no name of a branch")
    if said["tag"] and (said["create_pr"] or wanted.revision.startswith("refs/pr/")):
        raise error("usage", "--tag names a commit of the repository, not of a pull request")
    message = said["commit_message"]
    if message is not None and len(message.strip()) < 3:
        raise error("usage", "--commit-message: three characters at least")


# ------------------------------------------------------------------------------- the plan


def looked(api: Any, wanted: Wanted, *, dry_run: bool) -> tuple[Remote, str]:
    """The repository as it is now; in a dry run without a way to it, why it was not looked at."""
    from loratools.hub import access, pushing
    from loratools.hub.comparing import Remote, look

    nothing = Remote(wanted.repo, wanted.revision)
    if dry_run:
        try:
            pushing.require_who()
        except LoratoolsError as cause:
            return nothing, cause.message
    try:
        repo = pushing.full_name(api, wanted.repo)
        with access.translated(f"look at {shown(repo)}", repo=repo, revision=wanted.revision):
            return look(api, repo, wanted.revision), ""
    except LoratoolsError as cause:
        if dry_run and cause.code in ("network", "offline"):
            return nothing, cause.message
        raise


def unfit(remote: Remote, wanted: Wanted, *, offline: bool) -> list[Problem]:
    """What of the repository is not as the command wants it."""
    said, repo = wanted.options, shown(remote.repo)
    found = []
    if offline:
        return []
    if not remote.exists and (said["create_pr"] or wanted.revision.startswith("refs/pr/")):
        words = f"{repo} does not exist, or may not be seen: there is nothing to change in it"
        found.append(Problem("not_found", words, remedy="check the name, and the account"))
    if remote.exists and said["private"] and not remote.private:
        found.append(Problem("visibility", f"--private was asked for, and {repo} is public"))
    if remote.exists and said["public"] and remote.private:
        found.append(Problem("visibility", f"--public was asked for, and {repo} is private"))
    lacks = remote.head is None and wanted.revision != "main"
    if lacks and not said["create_branch"] and (remote.exists or "/" not in wanted.revision):
        words = f"{repo} has no revision {shown(wanted.revision)}"
        remedy = "--create-branch makes it, from main"
        found.append(Problem("not_found", words, remedy=remedy))
    return found


def complete(
    found: Artefact, wanted: Wanted, remote: Remote, api: Any, *, ask: bool
) -> tuple[list[File], list[Problem], list[str]]:
    """The files with the card among them, all problems, all notes; `ask`: the Hub may be asked."""
    from loratools.commands.published import card_of

    made = card_of(
        found,
        wanted.options,
        existing=_existing(wanted, remote, api),
        repo=remote.repo,
        ask=ask,
    )
    files, name = [*found.files], _inside(wanted, README)
    if made.text:
        files.insert(0, _written(found, name, made.text.encode()))
    # A secret in a card that is kept was found in the file already.
    problems = list({(p.code, p.message): p for p in (*found.problems, *made.problems)}.values())
    return files, problems, [*found.notes, *made.notes]


def _inside(wanted: Wanted, name: str) -> str:
    return f"{wanted.inside}/{name}" if wanted.inside else name


def _existing(wanted: Wanted, remote: Remote, api: Any) -> str | None:
    """The card that the repository has."""
    from loratools.hub import access
    from loratools.hub.artefact import README_LIMIT
    from loratools.hub.pushing import fetched

    name = _inside(wanted, README)
    kept = wanted.options["card"] in (None, "auto", "keep")
    if name not in remote.files:
        return None
    what = f"{shown(name)} of {shown(remote.repo)}"
    remedy = "mend it on the Hub; --card FILE replaces it, --card none leaves it alone"
    size = remote.files[name].size
    if size > README_LIMIT:
        if not kept:
            return None
        words = f"{what} has {size} bytes; a card has {README_LIMIT} at most"
        raise error("card", words, [Problem("card", words, remedy=remedy)])
    with access.translated(f"read {name}", repo=remote.repo):
        raw = fetched(api, remote, name)
    try:
        return raw.decode(errors="strict" if kept else "replace")
    except UnicodeDecodeError:
        words = f"{what} is not UTF-8: it cannot be kept to the letter"
        raise error("card", words, [Problem("card", words, remedy=remedy)]) from None


def _written(found: Artefact, name: str, content: bytes) -> File:
    """A file of the push that is not on disk."""
    from loratools.hub.artefact import File

    return File(name, found.path / Path(name).name, len(content), content)


def card_text(files: Sequence[File]) -> str | None:
    held = next((f.replaced for f in files if Path(f.name).name == README), None)
    return None if held is None else held.decode(errors="replace")


def known(plan: Difference) -> Callable[[File], str]:
    """Hashes that are known from a plan already."""
    known = {one.name: (one.file, one.sha256) for one in plan.files}

    def hashed(file: File) -> str:
        held = known.get(file.name)
        return held[1] if held is not None and held[0] is file else file.sha256()

    return hashed


# ------------------------------------------------------------------------------- signing


def signed(
    plan: Difference, wanted: Wanted, api: Any
) -> tuple[list[File], list[Problem], list[str]]:
    """The files with their signature; what is odd about the one that is there, or was."""
    from loratools.hub import access, signing
    from loratools.hub.pushing import fetched

    name, key = _inside(wanted, signing.NAME), wanted.options["sign_key"]
    start = f"{wanted.inside}/" if wanted.inside else ""
    own = next((one for one in plan.files if one.name == name), None)
    rest = [one.file for one in plan.files if one.name != name]
    hashes = {one.name.removeprefix(start): one.sha256 for one in plan.files if one.name != name}
    problems: list[Problem] = []
    notes: list[str] = []
    if key is None:
        if own is not None:
            held = own.file.replaced or Path(own.file.path).read_bytes()
            if not signing.covers(held, hashes):
                words = f"{name} is not the signature of what would be published with it"
                remedy = "--sign-key PRIVATE.pem signs anew; --exclude model.sig leaves it out"
                problems.append(Problem("signature", words, remedy=remedy))
        elif name in plan.remote.files and plan.sent:
            words = f"{name} on the Hub signs what is there now, and not what this would change"
            remedy = "--sign-key PRIVATE.pem signs anew"
            problems.append(Problem("signature", words, "warning", remedy=remedy))
        return [one.file for one in plan.files], problems, notes
    outside = [n for n in plan.kept if n.startswith(start) and n not in (name, ".gitattributes")]
    if outside:
        listed = ", ".join(shown(n) for n in outside[:3]) + (", ..." if len(outside) > 3 else "")
        words = (
            f"{len(outside)} files on the Hub are not signed, and `verify` will say so: {listed}"
        )
        remedy = f"hf repos delete-files {plan.remote.repo} FILE..., or sign in a new repository"
        problems.append(Problem("signature", words, "warning", remedy=remedy))
    made = b""
    if name in plan.remote.files:  # a signature is never the same twice: keep the one that holds
        with suppress(LoratoolsError), access.translated(f"read {name}", repo=plan.remote.repo):
            made = fetched(api, plan.remote, name)
        if not signing.is_ours(made, hashes, key):
            made = b""
    made = made or signing.sign(hashes, key, name=plan.remote.repo.rpartition("/")[2])
    template = plan.files[0].file
    from loratools.hub.artefact import File

    rest.append(
        File(
            name=name, path=Path(template.path).parent / signing.NAME, size=len(made), replaced=made
        )
    )
    return rest, problems, notes
