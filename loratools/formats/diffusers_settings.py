"""diffusers' `lora_adapter_metadata`: PEFT's LoraConfig for each component, read and written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools import views
from loratools.adapter import LowRank
from loratools.containers.strict_json import loads
from loratools.errors import RefusedError, Severity, error, shown
from loratools.formats.reading import Reading
from loratools.names.patterns import peft_value

METADATA = "lora_adapter_metadata"
DEFAULT = 8  # r and lora_alpha of a LoraConfig that does not say them (peft 0.21)
PATTERNS = ("rank_pattern", "alpha_pattern")
RUNTIME = ("alora_invocation_tokens", "arrow_config", "layer_replication")
VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "target_parameters")
# Fields that say how to make an adapter, which a reader of a finished one must not do again.
FOR_TRAINING = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")
PLAIN = re.compile(r"[A-Za-z0-9_.]{1,500}")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the metadata says of one component ("" for a file of one without its name)."""

    component: str
    fields: Mapping[str, Any]
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def value(self, pattern: str, plain: str, module: str) -> Any:
        """A module's value by PEFT's own rule: the first pattern that matches the path's end."""
        default = self.fields.get(plain, DEFAULT)
        return peft_value(self.patterns.get(pattern, {}), module, default)[0]

    def settler(
        self, reading: Reading, module: str, inner: str
    ) -> Callable[[float | None, int], tuple[float | None, float | None]]:
        """Scaling and alpha of a module from its stored alpha and the rank of its tensors."""

        def settle(stored: float | None, rank: int) -> tuple[float | None, float | None]:
            r = self.value("rank_pattern", "r", inner)
            if r != rank:
                message = f"{shown(module)}: metadata says r={shown(r)}, A has {rank} rows"
                reading.problem("config_conflict", message, module)
            alpha = self.value("alpha_pattern", "lora_alpha", inner)
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                said = shown(repr(alpha))
                raise error("malformed", f"{METADATA}: the alpha of {shown(module)} is {said}")
            if stored is not None and stored != alpha:
                message = f"{shown(module)}: metadata says alpha {alpha:g}, the file {stored:g}"
                reading.problem("config_conflict", message, module)
                return None, stored
            root = self.fields.get("use_rslora") is True
            return alpha / (math.sqrt(rank) if root else rank), float(alpha)

        return settle

    def judge(self, reading: Reading, modules: Iterable[str]) -> None:
        """What the fields say beyond ranks: other methods, patterns for nothing."""
        where = f"{METADATA} of {self.component or 'the file'}"
        for name in RUNTIME:
            if self.fields.get(name):
                reading.problem("not_foldable", f"{where}: {name} is no function of a weight")
        for name in VARIANTS:
            if self.fields.get(name):
                reading.problem("unknown_type", f"{where}: {name} gives the tensors other meanings")
        names = list(modules)
        for pattern, entries in self.patterns.items():
            for key in entries:
                if not any(peft_value({key: 1}, module, 0)[1] for module in names):
                    severity: Severity = "error" if pattern == "alpha_pattern" else "warning"
                    message = f'{where}: {pattern} "{shown(key)}" matches no module'
                    reading.problem("config_conflict", message, None, severity)


def settings_of(metadata: Mapping[str, str], reading: Reading) -> dict[str, Settings]:
    """The settings by component; MalformedError where the metadata is no such table."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    found = loads(text.encode("utf-8", "surrogatepass"), METADATA)
    if not isinstance(found, dict):
        raise error("malformed", f"{METADATA} is no object")
    parted: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        component, dot, name = key.partition(".")
        parted.setdefault(component if dot else "", {})[name if dot else key] = value
    return {c: _settings(c, fields, reading) for c, fields in parted.items()}


def _settings(component: str, fields: dict[str, Any], reading: Reading) -> Settings:
    patterns: dict[str, dict[str, Any]] = {}
    for name in PATTERNS:
        entries = fields.get(name) or {}
        if not isinstance(entries, dict):
            raise error("malformed", f"{METADATA}: {name} is no object")
        patterns[name] = {}
        for key, value in entries.items():
            try:
                peft_value({key: 1}, "", 0)
            except RefusedError as cause:
                reading.problem(cause.code, f"{METADATA}: {name}: {cause.message}")
                continue
            patterns[name][key] = value
    return Settings(component, fields, patterns)


# ------------------------------------------------------------------------------- writing


def expressed(
    component: str, pairs: Mapping[str, LowRank], source: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, LowRank]]:
    """LoraConfig's fields for these modules, and the pairs to go with them.

    A scaling that alpha over rank cannot say exactly is multiplied into B. No fields where a
    name could be taken for a pattern: then all scalings are.
    """
    front = f"{component}."
    fields = {k.removeprefix(front): v for k, v in source.items() if k.startswith(front)}
    if not pairs:
        return {}, {}
    root = bool(fields.get("use_rslora")) and all(
        _alpha(p, True) is not None for p in pairs.values()
    )
    alphas: dict[str, float] = {}
    made: dict[str, LowRank] = {}
    for module, pair in pairs.items():
        alpha = _alpha(pair, root)
        if alpha is None:
            pair = replace(pair, b=views.scaled(pair.b, pair.scaling), scaling=1.0)
            alpha = float(pair.rank)
        alphas[module], made[module] = alpha, pair
    r, ranks = _common({m: p.rank for m, p in made.items()})
    usual, others = _common(alphas)
    # transformers 5.6 took `text_model.` out of CLIP's names; ends of paths fit both.
    ends = {m: m.removeprefix("text_model.") if "text" in component else f"^{m}" for m in made}
    said = {
        **{k: v for k, v in fields.items() if k not in FOR_TRAINING},
        "r": r,
        "lora_alpha": _plain(usual),
        "rank_pattern": {ends[m]: v for m, v in ranks.items()},
        "alpha_pattern": {ends[m]: _plain(v) for m, v in others.items()},
        "use_rslora": root,
        "target_modules": sorted(end.removeprefix("^") for end in ends.values()),
        "peft_type": "LORA",
    }
    if all(_finds(said, m, alphas[m], p.rank) for m, p in made.items()):
        return said, made
    for module, pair in pairs.items():
        made[module] = replace(pair, b=views.scaled(pair.b, pair.scaling), scaling=1.0)
    return {}, made


def _finds(said: Mapping[str, Any], module: str, alpha: float, rank: int) -> bool:
    """Whether PEFT's rule finds a module's rank and alpha in these fields."""
    if not PLAIN.fullmatch(module):
        return False
    for name in (module, module.removeprefix("text_model.")):
        found = (
            peft_value(said["rank_pattern"], name, said["r"])[0],
            peft_value(said["alpha_pattern"], name, said["lora_alpha"])[0],
        )
        if found != (rank, alpha):
            return False
    return True


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _alpha(pair: LowRank, root: bool) -> float | None:
    """The alpha that over the rank (or its root) is the scaling, to the last bit; None without."""
    under = math.sqrt(pair.rank) if root else pair.rank
    for alpha in (pair.alpha, pair.scaling * under, float(round(pair.scaling * under))):
        if alpha is not None and alpha / under == pair.scaling:
            return float(alpha)
    return None


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most have, and those of the others."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {k: v for k, v in values.items() if v != usual}
