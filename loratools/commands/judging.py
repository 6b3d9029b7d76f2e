"""What the user lets through, leaves out and adds: `--allow`, `--fail-on`, `--only`, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from loratools.errors import CODES, Problem, error, refusal, shown

# Group words for --only and --skip: what the layers of most architectures are called.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("*attn*", "*attention*"),
    "mlp": (
        "*mlp*",
        "*ffn*",
        "*feed_forward*",
        "*.intermediate.*",
        "*.fc[12].*",
        "*.wi*",
        "*.wo.*",
    ),
    "embeddings": ("*embed*", "*.wte.*", "wte.*", "*.wpe.*", "*shared.weight"),
    "experts": ("*expert*",),
    "unet": ("unet.*", "*unet_*"),
    "text_encoder": ("text_encoder*", "*te_text_model*", "*te[12]_text_model*"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which targets take part: those that `only` names (all without it), less `skip`'s."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __call__(self, target: str) -> bool:
        if self.only and not any(_matches(g, target) for g in self.only):
            return False
        return not any(_matches(g, target) for g in self.skip)

    def require_used(self, names: Iterable[str]) -> None:
        """UsageError for a glob that names no target at all: a typing mistake, most likely."""
        names = list(names)
        for option, globs in (("--only", self.only), ("--skip", self.skip)):
            for glob in globs:
                if not any(_matches(glob, n) for n in names):
                    listed = ", ".join(shown(n) for n in names[:3])
                    raise error(
                        "usage", f"{option} {shown(glob)} names no target; targets are {listed} ..."
                    )


def _matches(glob: str, target: str) -> bool:
    patterns = GROUPS.get(glob, (glob,))
    return any(fnmatchcase(target, p) or fnmatchcase(target, f"{p}.weight") for p in patterns)


@dataclass(frozen=True, slots=True)
class Judged:
    """Problems after the user's word on them; `waived` are errors turned into warnings."""

    problems: tuple[Problem, ...]
    waived: tuple[Problem, ...]

    def require(self) -> None:
        """Raise what is still an error."""
        refused = refusal(self.problems)
        if refused:
            raise refused


def judge(
    problems: Sequence[Problem], allow: Sequence[str] = (), fail_on: Sequence[str] = ()
) -> Judged:
    """Apply `--allow CODE[:GLOB]` and `--fail-on CODE|warning`; an unused `--allow` is an error."""
    rules = [_rule(a, "--allow") for a in allow]
    for code, _ in rules:
        if not CODES[code].waivable:
            raise error("usage", f"--allow {code}: this cannot be waived")
    harder = [_rule(f, "--fail-on", extra="warning") for f in fail_on]
    used: set[int] = set()
    judged: list[Problem] = []
    waived: list[Problem] = []
    for problem in problems:
        hits = [i for i, r in enumerate(rules) if problem.severity == "error" and _hits(r, problem)]
        if hits:
            used.update(hits)
            problem = replace(problem, severity="warning")
            waived.append(problem)
        elif problem.severity == "warning" and any(
            code == "warning" or _hits((code, glob), problem) for code, glob in harder
        ):
            problem = replace(problem, severity="error")
        judged.append(problem)
    for i, (code, glob) in enumerate(rules):
        if i not in used:
            what = code + (f":{glob}" if glob != "*" else "")
            raise error(
                "usage", f"--allow {shown(what)} lets nothing through: no such problem here"
            )
    return Judged(tuple(judged), tuple(waived))


def _rule(text: str, option: str, *, extra: str = "") -> tuple[str, str]:
    code, _, glob = text.partition(":")
    if code not in CODES and code != extra:
        raise error("usage", f"{option} {shown(text)}: no such code; see `loratools explain`")
    return code, glob or "*"


def _hits(rule: tuple[str, str], problem: Problem) -> bool:
    code, glob = rule
    return problem.code == code and fnmatchcase(problem.target or "", glob)


# ------------------------------------------------------------------------------- per adapter


def assumptions(given: Sequence[str], count: int) -> list[dict[str, str]]:
    """`[N:]KEY=VALUE` for each adapter, counted from 1; without N for all of them."""
    found: list[dict[str, str]] = [{} for _ in range(count)]
    for text in given:
        match = re.fullmatch(r"(?:(\d{1,6}):)?([a-z_]+)=(.*)", text)
        if not match:
            raise error("usage", f"--assume {shown(text)}: expected KEY=VALUE or N:KEY=VALUE")
        number, key, value = match.groups()
        if key not in ("alpha",):
            raise error("usage", f"--assume {shown(key)}: known keys are alpha")
        if number is not None and not 1 <= int(number) <= count:
            raise error("usage", f"--assume {shown(text)}: there are {count} adapters")
        for i in range(count) if number is None else [int(number) - 1]:
            found[i][key] = value
    return found


def weights_for(
    adapters: Sequence[str], weights: Sequence[float] | str | None, *, required: bool
) -> tuple[list[str], list[float]]:
    """Paths and weights: from `PATH:0.7`, a list, or "mean"; one adapter alone counts once.

    UsageError where several adapters come without, where counts differ, or for 0, NaN, infinity.
    """
    paths, inline = [], []
    for text in adapters:
        path, weight = _inline(text)
        paths.append(path)
        inline.append(weight)
    if any(w is not None for w in inline):
        if weights is not None:
            raise error("usage", "weights stand behind a path and in --weights: give them once")
        if any(w is None for w in inline):
            lacking = paths[[w is None for w in inline].index(True)]
            raise error("usage", f"{shown(lacking)} has no weight, others have one")
        found = [w for w in inline if w is not None]
    elif weights == "mean":
        found = [1 / len(paths)] * len(paths)
    elif weights is None or isinstance(weights, str):
        if len(paths) > 1 and required:
            n = len(paths)
            ones, mean = ",".join(["1"] * n), ",".join([f"{1 / n:.3g}"] * n)
            raise error(
                "usage",
                f"{n} adapters need weights: -w {ones} adds them up, -w mean ({mean}) averages",
            )
        found = [1.0] * len(paths)
    else:
        found = [float(w) for w in weights]
    if len(found) != len(paths):
        raise error("usage", f"{len(found)} weights for {len(paths)} adapters")
    for weight in found:
        if weight == 0 or weight - weight != 0:
            raise error("usage", f"weight {weight:g}: expected any finite number but 0")
    return paths, found


def _inline(text: str) -> tuple[str, float | None]:
    if Path(text).exists():  # an existing path wins
        return text, None
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text, re.DOTALL)
    return (match[1], float(match[2])) if match else (text, None)
