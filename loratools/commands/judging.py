"""What the user lets through, leaves out and adds: `--allow`, `--fail-on`, `--only`, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from loratools.errors import CODES, Problem, error, refusal, shown

# What readers of formats may be told because their files cannot say it.
ASSUMABLE = (
    "alpha", "conv", "embedding", "enable_lora", "experts", "fan_in_fan_out", "glora",
    "kohya_split_qkv", "lycoris_rs_lora",
    "merged", "oft", "orientation", "residual", "scale", "task", "task_type",
    "weights_sharpness",
)  # fmt: skip

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
    "text_encoder_2": ("text_encoder_2.*", "*te2_text_model*"),
    "text_encoder_3": ("text_encoder_3.*",),
    "transformer": (
        "transformer.*",
        "lora_transformer_*",
        "lora_unet__blocks_*",
        "lora_unet_double_blocks_*",
        "lora_unet_single_blocks_*",
        "lora_unet_joint_blocks_*",
        "lora_unet_transformer_blocks_*",
    ),
    "prior": ("prior.*",),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which targets take part: those that `only` names (all without it), less `skip`'s."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __call__(self, *names: str) -> bool:
        """Whether a target takes part, which may have several names."""
        if self.only and not any(matches(g, n) for g in self.only for n in names):
            return False
        return not any(matches(g, n) for g in self.skip for n in names)

    def require_used(self, names: Iterable[str]) -> None:
        """UsageError for a glob that names no target at all: a typing mistake, most likely."""
        names = list(names)
        for option, globs in (("--only", self.only), ("--skip", self.skip)):
            for glob in globs:
                if not any(matches(glob, n) for n in names):
                    listed = ", ".join(shown(n) for n in names[:3])
                    raise error(
                        "usage", f"{option} {shown(glob)} names no target; targets are {listed} ..."
                    )


def matches(glob: str, target: str) -> bool:
    """Whether a glob or group word names a target."""
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
        if key not in ASSUMABLE:
            known = ", ".join(ASSUMABLE)
            raise error("usage", f"--assume {shown(key)}: known keys are {known}")
        if number is not None and not 1 <= int(number) <= count:
            raise error("usage", f"--assume {shown(text)}: there are {count} adapters")
        for i in range(count) if number is None else [int(number) - 1]:
            found[i][key] = value
    return found


def known(allow: Sequence[str], problems: Sequence[Problem]) -> list[str]:
    """The waivers that speak of problems found so far; later checks may bring the others'."""
    codes = {p.code for p in problems if p.severity == "error"}
    return [a for a in allow if a.partition(":")[0] in codes]
