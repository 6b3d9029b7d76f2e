"""The exceptions that loratools raises, and the problems they carry; no terminal here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loratools.codes import CODES as CODES
from loratools.codes import Code as Code

Severity = Literal["error", "warning", "note"]

SHOWN = 120  # characters of untrusted text that a message repeats at most


def shown(text: object) -> str:
    """Untrusted text, made safe to print: control and direction characters escaped, cut short."""
    raw = str(text)
    cut = raw if len(raw) <= SHOWN else raw[: SHOWN - 3] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: its code, how bad it is, which adapter and target it is about, the next step."""

    code: str
    message: str
    severity: Severity = "error"
    adapter: str | None = None
    target: str | None = None
    remedy: str | None = None

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"problem code {self.code!r} is not in loratools.errors.CODES")

    @property
    def exit(self) -> int:
        return CODES[self.code].exit

    @property
    def waivable(self) -> bool:
        return CODES[self.code].waivable

    @property
    def advice(self) -> str:
        return self.remedy or CODES[self.code].remedy


class LoratoolsError(Exception):
    """Base of all errors; `code` names the problem, `exit` is the command's exit status.

    `problems` lists everything that was found together; `str(error)` is the message alone.
    """

    def __init__(self, code: str, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.problems = tuple(problems) or (Problem(code, message),)
        self.exit = CODES[code].exit


class UsageError(LoratoolsError):
    """Exit 2: the call itself is wrong; also an output that equals or lies inside an input."""


class MalformedError(LoratoolsError):
    """Exit 3: an input is malformed or hostile."""


class FitError(LoratoolsError):
    """Exit 4: adapter and base do not fit."""


class RefusedError(LoratoolsError):
    """Exit 5: the result would lose something or would very likely be wrong."""


class StorageError(LoratoolsError):
    """Exit 6: reading or writing failed, or an input changed meanwhile."""


class OutputError(LoratoolsError):
    """Exit 7: the output exists, is locked, or belongs to another plan."""


class ProofError(LoratoolsError):
    """Exit 8: the proof failed."""


class AccessError(LoratoolsError):
    """Exit 9: who you are, or what you may do on the Hub."""


class NotFoundError(LoratoolsError):
    """Exit 10: a source does not exist, or is gated."""


class NetworkError(LoratoolsError):
    """Exit 11: the network, or offline mode."""


_CLASSES: dict[int, type[LoratoolsError]] = {
    2: UsageError,
    3: MalformedError,
    4: FitError,
    5: RefusedError,
    6: StorageError,
    7: OutputError,
    8: ProofError,
    9: AccessError,
    10: NotFoundError,
    11: NetworkError,
}


def error(code: str, message: str, problems: Iterable[Problem] = ()) -> LoratoolsError:
    """The exception that belongs to a code, ready to raise."""
    return _CLASSES.get(CODES[code].exit, LoratoolsError)(code, message, problems)


def refusal(problems: Iterable[Problem]) -> LoratoolsError | None:
    """One exception for all problems of severity "error" (None without any).

    With several problems the lowest exit class of 3, 4, 5 decides, then the first found.
    """
    errors = [p for p in problems if p.severity == "error"]
    if not errors:
        return None
    first = min(errors, key=lambda p: p.exit)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return error(first.code, first.message + more, errors)
