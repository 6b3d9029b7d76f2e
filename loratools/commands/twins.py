"""Runtime adapters in another container: prefixes and prompts between AdapterHub and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools import formats
from loratools.adapter import Adapter, Leaf, Runtime
from loratools.commands.runtimes import whole
from loratools.commands.writing import Ready
from loratools.errors import Problem, error, shown
from loratools.names.heads import facts_from
from loratools.runtime import PREFIX, PROMPT, layer_of, turned
from loratools.views import reshaped

if TYPE_CHECKING:
    from loratools.weights.base import Base

# Whose virtual tokens are embeddings alone: P-tuning's encoder is not in PEFT's file any more.
PROMPTS = (PROMPT, "P-tuning")
# Which PEFT class a class of transformers is run by.
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM", "Model": "FEATURE_EXTRACTION",
}  # fmt: skip
# Where transformers has the base model in classes with a head, by model_type.
ROOTS = {
    "gpt2": "transformer", "gptj": "transformer", "gpt_neo": "transformer", "t5": "transformer",
    "mt5": "transformer", "xlm-roberta": "roberta", "xmod": "roberta", "bart": "model",
    "mbart": "model", "plbart": "model", "deberta-v2": "deberta", "llama": "model",
    "mistral": "model", "qwen2": "model", "qwen3": "model", "gemma": "model", "phi3": "model",
}  # fmt: skip
# adapters 1.3.0 puts the prompts of these behind position embeddings and LayerNorm.
BEHIND = frozenset(
    "albert beit bert bert-generation deberta deberta-v2 distilbert electra mt5 roberta vit "
    "xlm-roberta xmod".split()
)
# Whose heads are turned whole, halves together, from the config's numbers alone.
ROTARY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_FLAT = {
    "architecture": "prefix_tuning", "bottleneck_size": 512, "cross_prefix": True, "dropout": 0.0,
    "encoder_prefix": True, "flat": True, "init_weights_seed": None, "leave_out": [],
    "non_linearity": "tanh", "shared_gating": True, "use_gating": False,
}  # fmt: skip
_PROMPT = {
    "architecture": "prompt_tuning", "combine": "prefix", "init_weights_seed": None,
    "prompt_init": "random_uniform", "prompt_init_text": None,
}  # fmt: skip


def ready(adapter: Adapter, to: str, base: Base | None = None) -> Ready:
    """A runtime adapter as a format can hold it: unchanged in its own, else as its twin.

    RefusedError `loss` where there is none.
    """
    runtime = adapter.runtime
    assert runtime is not None
    whole(adapter)
    here = formats.ALIASES.get(adapter.format, adapter.format)
    if here == to:
        return Ready(adapter)
    both = {here, to} == {"peft", "adapterhub"}
    if not both or runtime.virtual is None or runtime.method not in (PREFIX, *PROMPTS):
        why = f"{shown(runtime.method)} has no twin in {to}"
        if both and runtime.method == PREFIX:
            why = f"{to} has no place for several prefixes, or for their gates"
        raise error("loss", f"{shown(adapter.name)}: {why}; --to {here} keeps it as it is")
    virtual, forth, problems, said = runtime.virtual, to == "peft", list[Problem](), list[str]()
    if runtime.method == PREFIX:
        virtual, problems, said = _counted(adapter, virtual, base, forth=forth)
    made, more = (_to_peft if forth else _to_adapterhub)(adapter, virtual, base)
    problems += more
    for key in adapter.deltas:
        message = f"{shown(key)}: a head beside virtual tokens is not carried to {to}"
        problems.append(Problem("loss", message, "error", adapter.name, key))
    return Ready(made, tuple(problems), (*said, f"{here} -> {to}: virtual tokens"))


def _kinds(adapter: Adapter, base: Base | None) -> tuple[str | None, list[str]]:
    """model_type, and the names of classes that config and base give."""
    said = adapter.config.get("model_type")
    kind = facts_from(base.config).model_type if base is not None else None
    listed = base.config.get("architectures") if base is not None else None
    classes = [c for c in listed if isinstance(c, str)] if isinstance(listed, list) else []
    named = adapter.config.get("model_class")
    classes += [named] if isinstance(named, str) and "AdapterModel" not in named else []
    return kind or (said if isinstance(said, str) else None), classes


def _place(adapter: Adapter, base: Base | None) -> list[Problem]:
    """Where prompts are put differs between the two for models that add positions to embeddings."""
    kind, _ = _kinds(adapter, base)
    if kind in BEHIND:
        message = (
            f"{shown(adapter.name)}: adapters puts the prompts of {shown(kind)} behind its "
            "embeddings of positions and LayerNorm, PEFT before them: the same numbers compute "
            "otherwise"
        )
        return [Problem("loss", message, "error", adapter.name)]
    return []


def _counted(
    adapter: Adapter, virtual: Leaf, base: Base | None, *, forth: bool
) -> tuple[Leaf, list[Problem], list[str]]:
    """A prefix for the other program's positions: adapters counts the input's from 0, PEFT behind
    the prefix. Where positions turn queries and keys, turning the prefix's keys makes up for it.
    """
    count = virtual.shape[0]
    if base is None:
        message = f"{shown(adapter.name)}: how its model counts positions is not known here"
        raise error("needs_base", f"{message}; --base says it")
    facts = facts_from(base.config)
    theta = _theta(base.config)
    if facts.model_type in ROTARY and theta is not None and facts.kv_heads and facts.head_dim:
        width = facts.kv_heads * facts.head_dim
        if virtual.shape[1] % (2 * width):
            message = f"a token's {virtual.shape[1]} numbers are no layers of {width}"
            raise error("shape_mismatch", f"{shown(adapter.name)}: {message}")
        step = count if forth else -count
        moved = turned(virtual, facts.kv_heads, facts.head_dim, theta, step)
        note = f"keys turned by {step} positions: PEFT counts the input's behind the prefix"
        return moved, [], [note]
    message = (
        f"{shown(adapter.name)}: adapters counts the input's positions from 0, PEFT from {count} "
        f"on, and {shown(facts.model_type or 'this model')} has no way to make up for it: the same "
        "numbers compute otherwise"
    )
    return virtual, [Problem("loss", message, "error", adapter.name)], []


def _theta(config: Mapping[str, Any]) -> float | None:
    """The base of plain rotary embeddings; None where a config scales them or turns a part."""
    said = config.get("rope_parameters")
    inner: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
    scaling = config.get("rope_scaling")
    kinds = [
        s.get("rope_type", s.get("type")) for s in (inner, scaling) if isinstance(s, Mapping) and s
    ]
    if any(kind not in (None, "default") for kind in kinds):
        return None
    if any(m.get("partial_rotary_factor") not in (None, 1, 1.0) for m in (config, inner)):
        return None
    theta = inner.get("rope_theta", config.get("rope_theta", 10000.0))
    number = isinstance(theta, int | float) and not isinstance(theta, bool) and theta > 0
    return float(theta) if number else None


# ------------------------------------------------------------------------------- to PEFT


def _to_peft(adapter: Adapter, virtual: Leaf, base: Base | None) -> tuple[Adapter, list[Problem]]:
    runtime = adapter.runtime
    assert runtime is not None
    problems: list[Problem] = []
    inner = adapter.config.get("config")
    said: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
    is_prefix = runtime.method == PREFIX
    if said.get("leave_out"):
        message = f"{shown(adapter.name)}: it leaves out layers, PEFT's prefixes have all"
        raise error("loss", message)
    if said.get("combine") == "prefix_after_bos":
        message = f"{shown(adapter.name)}: its prompt stands behind the first token, PEFT's before"
        problems.append(Problem("loss", message, "error", adapter.name))
    if not is_prefix:
        problems += _place(adapter, base)
    task = _task(adapter, base)
    if task is None:
        message = f"{shown(adapter.name)}: nothing says by which class of PEFT it is to be run"
        step = "--assume task_type=CAUSAL_LM (or SEQ_CLS, ...), or --base"
        problems.append(Problem("missing", message, "error", adapter.name, None, step))
    facts = facts_from(base.config) if base is not None else None
    config: dict[str, Any] = {
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path")
        or (base.id if base is not None else None),
        "inference_mode": True,
        "num_virtual_tokens": virtual.shape[0],
        "num_transformer_submodules": 1,
        "peft_type": "PREFIX_TUNING" if is_prefix else "PROMPT_TUNING",
        "task_type": task,
        "token_dim": None if is_prefix else virtual.shape[1],
        "num_layers": runtime.needs.layers if is_prefix else None,
        "num_attention_heads": None,
    }
    if is_prefix:
        config |= {"prefix_projection": False, "encoder_hidden_size": None}
        if facts is not None and facts.kv_heads and facts.head_dim:
            config["token_dim"] = facts.kv_heads * facts.head_dim
            config["num_attention_heads"] = facts.kv_heads
    else:
        config["prompt_tuning_init"] = "RANDOM"
    return _made(adapter, "peft", {"prompt_embeddings": virtual}, config), problems


def _task(adapter: Adapter, base: Base | None) -> str | None:
    given = adapter.assumed.get("task_type")
    if given is not None:
        if given not in TASKS.values():
            listed = ", ".join(dict.fromkeys(TASKS.values()))
            raise error("usage", f"--assume task_type={shown(given)}: PEFT has {listed}")
        return given
    classes = _kinds(adapter, base)[1]
    for name in classes:
        for end, task in TASKS.items():
            if name.endswith(end):
                return task
    return None


# ------------------------------------------------------------------------------- to AdapterHub


def _to_adapterhub(
    adapter: Adapter, virtual: Leaf, base: Base | None
) -> tuple[Adapter, list[Problem]]:
    runtime, source = adapter.runtime, adapter.config
    assert runtime is not None
    if source.get("num_transformer_submodules") not in (None, 1):
        message = f"{shown(adapter.name)}: its virtual tokens are for encoder and decoder"
        raise error("loss", f"{message}; adapters has them apart, each with its own")
    if base is None:
        message = f"{shown(adapter.name)}: adapters' keys begin with the model's own name"
        raise error("needs_base", f"{message}; --base says which it is")
    kind, _ = _kinds(adapter, base)
    root = _root(kind, base)
    is_prefix = runtime.method == PREFIX
    config: dict[str, Any] = {
        "config": {**(_FLAT if is_prefix else _PROMPT)},
        "hidden_size": facts_from(base.config).hidden,
        "model_class": None,
        "model_name": source.get("base_model_name_or_path") or base.id,
        "model_type": kind,
        "name": "default",
    }
    if is_prefix:
        key = f"{root}.prefix_tuning.prefix_tunings.default.self_prefix.control_trans"
        tensors = {key: reshaped(virtual, virtual.numel)}
        config["config"] |= {"prefix_length": virtual.shape[0]}
    else:
        key = f"{root}.prompt_tuning.prompt_tunings.default.prompt_embedding.weight"
        tensors = {key: virtual}
        config["config"] |= {"prompt_length": virtual.shape[0]}
    problems = [] if is_prefix else _place(adapter, base)
    return _made(adapter, "adapterhub", tensors, config), problems


def _root(kind: str | None, base: Base) -> str:
    """The name of the base model within classes that have a head."""
    if kind is not None and kind in ROOTS:
        return ROOTS[kind]
    fronts = {layer for name in base.tensors if (layer := layer_of(name)) is not None}
    heads = {front.split(".")[0] for front in fronts if front.count(".") > 1}
    if kind is not None and (not heads or heads <= {"encoder", "decoder"} or kind in heads):
        return kind
    if len(heads) == 1:
        return heads.pop()
    raise error("needs_base", f"{shown(base.name)}: nothing tells what its classes call the model")


def _made(
    adapter: Adapter, to: str, tensors: Mapping[str, Leaf], config: Mapping[str, Any]
) -> Adapter:
    runtime = adapter.runtime
    assert runtime is not None
    method = PREFIX if runtime.method == PREFIX else PROMPT
    virtual = next(iter(tensors.values()))
    twin = Runtime(method, tensors, runtime.numbers, replace(runtime.needs, modules=()), virtual)
    return replace(
        adapter, format=to, config=dict(config), runtime=twin, deltas={}, original={}, metadata={}
    )
