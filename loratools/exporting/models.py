"""The graphs of transformers' and diffusers' models, task by task, named as optimum names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loratools.errors import error, shown
from loratools.exporting import tasks
from loratools.exporting.graphs import (
    OTHERS,
    SAMPLE,
    Flat,
    Graph,
    Input,
    floats,
    ids,
    mask,
    positions,
    takes,
    tensors_of,
    zeros,
)

MODEL = "model.onnx"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
DECODER_WITH_PAST = "decoder_with_past_model.onnx"
MERGED = "decoder_model_merged.onnx"
KEPT = {
    "feature-extraction": ("last_hidden_state",),
    "question-answering": ("start_logits", "end_logits"),
}
RUNNING = {"input_ids", "attention_mask"}  # what a module with virtual tokens takes
LOGITS = ("logits", "pred_boxes", "predicted_depth", "reconstruction")


def graphs_of(
    module: nn.Module, task: str, *, shape: Mapping[str, int] | None = None
) -> list[Graph]:
    """The graphs that a task takes of a loaded model: one, or encoder and decoders.

    RefusedError `not_exportable` where the model is not what the task needs.
    """
    fixed = dict(shape or {})
    match tasks.base_of(task):
        case tasks.UNET:
            made = [_unet(module)]
        case tasks.GENERATION if takes(module) != RUNNING:
            made = [_decoder(module, past=task.endswith(tasks.PAST))]
        case tasks.SEQ2SEQ | tasks.SPEECH if _config(module).get("is_encoder_decoder"):
            made = _seq2seq(module, past=task.endswith(tasks.PAST))
        case name if "pixel_values" in takes(module) and "input_ids" not in takes(module):
            made = [_vision(module, KEPT.get(name, ()))]
        case name if takes(module) & {"input_values", "input_features"}:
            made = [_audio(module)]
        case name:
            made = [_text(module, KEPT.get(name, ()), choices=name == "multiple-choice")]
    for graph in made:
        named = {d for i in graph.inputs for d in i.shape if isinstance(d, str)}
        graph.fixed = {d: n for d, n in fixed.items() if d in named - {"total_sequence"}}
        if {"past_sequence", "sequence"} <= graph.fixed.keys():
            graph.fixed["total_sequence"] = graph.fixed["past_sequence"] + graph.fixed["sequence"]
        graph.learn_outputs()
    used = {d for graph in made for d in graph.fixed} - {"total_sequence"}
    if fixed.keys() - used:
        every = {d for g in made for i in g.inputs for d in i.shape if isinstance(d, str)}
        free = sorted(every - {"total_sequence"})
        raise error(
            "usage",
            f"--shape {shown(min(fixed.keys() - used))}: this model's dimensions are "
            f"{', '.join(free)}",
        )
    return made


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", None)
    return dict(config.to_dict()) if hasattr(config, "to_dict") else {}


def _text_part(module: nn.Module, name: str, default: Any) -> Any:
    config: Any = module.config
    part = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(part, name, default)


# ------------------------------------------------------------------------------- one pass


def _text(module: nn.Module, kept: tuple[str, ...], *, choices: bool) -> Graph:
    """An encoder, or a decoder read once: ids and mask, token types where there are several."""
    front: tuple[int | str, ...] = ("batch", "choices") if choices else ("batch",)
    size = int(_text_part(module, "vocab_size", 100))
    left = not _config(module).get("is_encoder_decoder") and "past_key_values" in takes(module)
    inputs = [
        Input("input_ids", (*front, "sequence"), ids(size)),
        Input("attention_mask", (*front, "sequence"), mask(left=left)),
    ]
    if "token_type_ids" in takes(module) and int(_text_part(module, "type_vocab_size", 0)) > 1:
        inputs.append(Input("token_type_ids", (*front, "sequence"), zeros("batch", "sequence")))
    if choices:
        inputs = [Input(i.name, i.shape, _chosen(i)) for i in inputs]
    once: dict[str, Any] = {"use_cache": False} if "use_cache" in takes(module) else {}

    def call(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return _outputs(inner(**feeds, **once), kept)

    sample = {**SAMPLE, "choices": 3} if choices else dict(SAMPLE)
    # Of a padded place nothing is promised.
    return Graph(
        MODEL, Flat(module, [i.name for i in inputs], call), tuple(inputs), sample,
        compared=None if choices else _unpadded,
    )  # fmt: skip


def _chosen(one: Input) -> Callable[[Mapping[str, int], torch.Generator], Tensor]:
    def make(sizes: Mapping[str, int], draw: torch.Generator) -> Tensor:
        rows = {**sizes, "batch": sizes["batch"] * sizes["choices"]}
        return one.make(rows, draw).reshape(sizes["batch"], sizes["choices"], -1)

    return make


def _unpadded(feeds: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The rows of an output that stand at real tokens; all of one without a sequence."""
    seen = feeds["attention_mask"]
    return tensor[seen.bool()] if tensor.shape[:2] == seen.shape else tensor


def _outputs(found: Any, kept: tuple[str, ...]) -> dict[str, Tensor]:
    some = tensors_of(found, kept or LOGITS)
    return {k: v for k, v in some.items() if k in kept} or some


def _vision(module: nn.Module, kept: tuple[str, ...]) -> Graph:
    config: Any = module.config
    side: Any = getattr(config, "image_size", 224)
    high, wide = side if isinstance(side, list | tuple) else (side, side)
    channels = int(getattr(config, "num_channels", 3))
    shape = ("batch", channels, int(high), int(wide))

    def call(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return _outputs(inner(**feeds), kept)

    inputs = (Input("pixel_values", shape, floats(*shape)),)
    return Graph(MODEL, Flat(module, ["pixel_values"], call), inputs, {"batch": 2},
                 others=({"batch": 3}, {"batch": 1}))  # fmt: skip


def _audio(module: nn.Module) -> Graph:
    """Wave forms of any length, or spectra of the one size that the model takes."""
    config: Any = module.config
    name = "input_features" if "input_features" in takes(module) else "input_values"
    shape: tuple[int | str, ...] = ("batch", "sequence")
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):  # AST
        shape = ("batch", int(config.max_length), int(config.num_mel_bins))
    elif hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        shape = ("batch", int(config.num_mel_bins), 2 * int(config.max_source_positions))
    elif name == "input_features":
        shape = ("batch", "sequence", int(getattr(config, "feature_projection_input_dim", 80)))

    def call(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return _outputs(inner(**feeds), ())

    inputs = (Input(name, shape, floats(*shape)),)
    step = 400 if len(shape) == 2 else 16  # wave forms shrink a few hundred times on the way
    sample = {"batch": 2, "sequence": 16 * step} if "sequence" in shape else {"batch": 2}
    others = tuple(
        {"batch": n, **({"sequence": (16 + 3 * n) * step} if "sequence" in shape else {})}
        for n in (3, 1)
    )
    return Graph(MODEL, Flat(module, [name], call), inputs, sample, others=others)


def _unet(module: nn.Module) -> Graph:
    """diffusers' U-Net: latents, timestep, text; SDXL's pooled text and sizes beside them."""
    config: Any = module.config
    side = int(config.sample_size or 64)
    wide = config.cross_attention_dim
    wide = int(wide[0] if isinstance(wide, list | tuple) else wide)
    step = 2 ** (len(config.block_out_channels) - 1)
    inputs = [
        Input("sample", ("batch", int(config.in_channels), "height", "width"),
              floats("batch", int(config.in_channels), "height", "width")),
        Input("timestep", ("batch",), lambda s, d: torch.randint(999, (s["batch"],), generator=d)),
        Input("encoder_hidden_states", ("batch", "sequence", wide),
              floats("batch", "sequence", wide)),
    ]  # fmt: skip
    more: list[str] = []
    if config.addition_embed_type == "text_time":
        held = int(config.projection_class_embeddings_input_dim)
        pooled = held - 6 * int(config.addition_time_embed_dim)
        inputs += [
            Input("text_embeds", ("batch", pooled), floats("batch", pooled)),
            Input("time_ids", ("batch", 6), floats("batch", 6, scale=64.0)),
        ]
        more = ["text_embeds", "time_ids"]
    elif config.addition_embed_type is not None or config.time_cond_proj_dim is not None:
        raise error("not_exportable", "a U-Net with inputs that are neither SD's nor SDXL's")

    def call(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        extra = {"added_cond_kwargs": {n: feeds[n] for n in more}} if more else {}
        given = {k: v for k, v in feeds.items() if k not in more}
        return {"out_sample": inner(**given, **extra, return_dict=False)[0]}

    sample = {"batch": 2, "sequence": 7, "height": side, "width": side}
    others = (
        {"batch": 1, "sequence": 11, "height": side + 2 * step, "width": side + step},
        {"batch": 3, "sequence": 5, "height": side, "width": side + 2 * step},
    )
    return Graph(
        MODEL, Flat(module, [i.name for i in inputs], call), tuple(inputs), sample, others=others
    )


# ------------------------------------------------------------------------------- with a cache


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer of a cache; refused where layers hold something else."""
    from transformers.cache_utils import DynamicLayer

    odd = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, DynamicLayer)]
    if odd:
        raise error(
            "not_exportable",
            f"its cache holds {shown(odd[0])}, no keys and values; --no-kv-cache exports it "
            "without a cache",
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cached(inner: nn.Module, feeds: dict[str, Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return inner(**feeds, **more, use_cache=True)


def _decoder(module: nn.Module, *, past: bool) -> Graph:
    """A causal LM; with a cache as one graph, which does the prefill on an empty past."""
    from transformers import DynamicCache

    size = int(_text_part(module, "vocab_size", 100))
    places = "position_ids" in takes(module)
    whole = "total_sequence" if past else "sequence"
    inputs = [
        Input("input_ids", ("batch", "sequence"), ids(size)),
        Input("attention_mask", ("batch", whole), mask(left=True, along=whole)),
    ]
    if places:
        make = positions if past else lambda s, d: positions({**s, "total_sequence": s[whole]}, d)
        inputs.append(Input("position_ids", ("batch", "sequence"), make, optional=True))
    names: list[str] = []
    if past:
        probe = torch.arange(2)[None] + 3
        one = _cached(module, {"input_ids": probe % size}, past_key_values=DynamicCache())
        for n, (keys, values) in enumerate(_layers(one.past_key_values)):
            for what, held in (("key", keys), ("value", values)):
                shape = ("batch", int(held.shape[1]), "past_sequence", int(held.shape[3]))
                names.append(f"{n}.{what}")
                inputs.append(Input(f"past_key_values.{names[-1]}", shape, floats(*shape)))

    def call(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {k: v for k, v in feeds.items() if not k.startswith("past_key_values")}
        if not past:
            return {"logits": inner(**given, use_cache=False).logits}
        held = [feeds[f"past_key_values.{name}"] for name in names]
        cache = DynamicCache(list(zip(held[::2], held[1::2], strict=True)))
        found = inner(**given, past_key_values=cache, use_cache=True)
        flat = [t for pair in _layers(found.past_key_values) for t in pair]
        present = {f"present.{n}": t for n, t in zip(names, flat, strict=True)}
        return {"logits": found.logits, **present}

    sample = {"batch": 2, "sequence": 3, "past_sequence": 4} if past else dict(SAMPLE)
    return Graph(
        MODEL, Flat(module, [i.name for i in inputs], call), tuple(inputs), sample,
        compared=_behind,
    )  # fmt: skip


def _behind(feeds: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The rows of a decoder's output at real tokens: logits of the new, keys of all."""
    seen = feeds["attention_mask"].bool()
    if name == "logits":
        return tensor[seen[:, -tensor.shape[1] :]]
    return tensor.transpose(1, 2)[seen]


def _seq2seq(module: nn.Module, *, past: bool) -> list[Graph]:
    """An encoder, a decoder on it, and with a cache a decoder that goes on."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    config: Any = module.config
    size = int(_text_part(module, "vocab_size", 100))
    width = int(getattr(config, "d_model", None) or config.hidden_size)
    speech = "input_features" in takes(module) or "input_values" in takes(module)
    if speech:
        first = _audio(module).inputs[0]
        enters: tuple[Input, ...] = (first,)
    else:
        enters = (
            Input("input_ids", ("batch", "sequence"), ids(size)),
            Input("attention_mask", ("batch", "sequence"), mask(left=False)),
        )

    def encode(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        encoder: Any = inner.get_encoder()  # type: ignore[operator]
        return {"last_hidden_state": encoder(**feeds)[0]}

    encoder = Graph(
        ENCODER, Flat(module, [i.name for i in enters], encode), enters,
        {"batch": 2} if speech else dict(SAMPLE),
        compared=None if speech else _unpadded,
        others=({"batch": 3}, {"batch": 1}) if speech else OTHERS,
    )  # fmt: skip
    state = encoder.run(encoder.feeds({}))["last_hidden_state"]
    read: int | str = int(state.shape[1]) if speech else "encoder_sequence"
    seen = () if speech else (
        Input("encoder_attention_mask", ("batch", read), mask(left=False, along=str(read))),
    )  # fmt: skip
    tokens = Input("input_ids", ("batch", "sequence"), ids(size))
    hidden = ("batch", read, width)
    states = Input("encoder_hidden_states", hidden, floats(*hidden))
    one = _cached(
        module, {"decoder_input_ids": torch.full((1, 2), 3 % size)},
        encoder_outputs=BaseModelOutput(last_hidden_state=state[:1]),
    )  # fmt: skip
    kept = one.past_key_values
    own = [(f"{n}.decoder", k) for n, (k, _) in enumerate(_layers(kept.self_attention_cache))]
    cross = [(f"{n}.encoder", k) for n, (k, _) in enumerate(_layers(kept.cross_attention_cache))]
    held = []
    for (name, keys), length in [(o, "past_sequence") for o in own] + [(c, read) for c in cross]:
        shape = ("batch", int(keys.shape[1]), length, int(keys.shape[3]))
        held += [
            Input(f"past_key_values.{name}.{w}", shape, floats(*shape)) for w in ("key", "value")
        ]
    held.sort(key=lambda i: (int(i.name.split(".")[1]), i.name.split(".")[2], i.name))

    def decode(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        layers: list[list[tuple[Tensor, Tensor]]] = [[], []]
        for at, part in enumerate(("decoder", "encoder")):
            while f"past_key_values.{len(layers[at])}.{part}.key" in feeds:
                stem = f"past_key_values.{len(layers[at])}.{part}"
                layers[at].append((feeds[f"{stem}.key"], feeds[f"{stem}.value"]))
        source = feeds.get("encoder_hidden_states")
        if source is None:  # only its length is looked at
            keys = layers[1][0][0]
            source = keys.new_zeros(keys.shape[0], keys.shape[2], width)
        cache = EncoderDecoderCache(*(DynamicCache(x) if x else DynamicCache() for x in layers))
        extra = {} if speech else {"attention_mask": feeds["encoder_attention_mask"]}
        found = inner(
            decoder_input_ids=feeds["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=source),
            past_key_values=cache if past else None,
            use_cache=past,
            **extra,
        )
        out: dict[str, Tensor] = {"logits": found.logits}
        if not past:
            return out
        after = found.past_key_values
        parts = [("decoder", after.self_attention_cache)]
        parts += [] if layers[1] else [("encoder", after.cross_attention_cache)]
        for n in range(len(own)):
            for part, held_now in parts:
                layer = held_now.layers[n]
                out |= {f"present.{n}.{part}.key": layer.keys}
                out |= {f"present.{n}.{part}.value": layer.values}
        return out

    def decoder(file: str, inputs: tuple[Input, ...]) -> Graph:
        sample = {"batch": 2, "sequence": 3, "past_sequence": 4}
        sample |= {} if speech else {"encoder_sequence": 6}
        others = tuple({**o, "sequence": n} for o, n in zip(OTHERS_DECODED, (4, 2), strict=True))
        others = tuple({d: n for d, n in o.items() if d in sample} for o in others)
        return Graph(file, Flat(module, [i.name for i in inputs], decode), inputs, sample,
                     others=others)  # fmt: skip

    made = [encoder, decoder(DECODER, (*seen, tokens, states))]
    return made + ([decoder(DECODER_WITH_PAST, (*seen, tokens, *held))] if past else [])


OTHERS_DECODED = (
    {"batch": 3, "encoder_sequence": 11, "past_sequence": 5},
    {"batch": 1, "encoder_sequence": 5, "past_sequence": 2},
)
