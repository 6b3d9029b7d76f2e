"""What readers of adapters refuse, ignore or misread: the table that specs/readers.md shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loratools.commands import reader_triggers as on

Effect = Literal["refuses", "ignores", "misreads"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that one reader does: from version `since` on and before `until` (empty: always).

    `way` is the command that makes the adapter acceptable; ADAPTER, ALL, BASE and OUT stand for
    paths, RANK for the largest rank, ONES for a weight of 1 each.
    """

    reader: str
    name: str
    effect: Effect
    what: str
    finds: on.Trigger
    remedy: str
    source: str
    since: str = ""
    until: str = ""
    way: str = ""

    @property
    def id(self) -> str:
        return f"{self.reader}.{self.name}"


# ------------------------------------------------------------------------------- ways and sources

PEFT = "loratools convert ADAPTER --to peft -o OUT"
EVEN = "loratools convert ADAPTER --to peft --rank RANK -o OUT"
GGUF = "loratools convert ADAPTER --to gguf --base BASE -o OUT.gguf"
KOHYA = "loratools convert ADAPTER --to kohya -o OUT.safetensors"
DIFFUSERS = "loratools convert ADAPTER --to diffusers -o OUT.safetensors"
MLX = "loratools convert ADAPTER --to mlx -o OUT"
ONNX = "loratools convert ADAPTER --to onnx_adapter -o OUT.onnx_adapter"
FOLD = "loratools merge ADAPTER --base BASE -o OUT"
JOIN = "loratools merge ALL --weights ONES -o OUT"

_VLLM = "vllm-project/vllm:vllm/lora/"
_SGLANG = "sgl-project/sglang:python/sglang/srt/lora/"
_LLAMA = "ggml-org/llama.cpp:"
_OLLAMA = "ollama/ollama:"
_COMFY = "comfyanonymous/ComfyUI:comfy/"
_A1111 = "AUTOMATIC1111/stable-diffusion-webui:extensions-builtin/Lora/"
_DIFFUSERS = "huggingface/diffusers:src/diffusers/"
_MLX = "ml-explore/mlx-lm:mlx_lm/tuner/utils.py"
_ORT = "microsoft/onnxruntime:include/onnxruntime/core/session/onnxruntime_c_api.h"
_TRT = "NVIDIA/TensorRT-LLM:tensorrt_llm/lora_manager.py"
_PEFT = "huggingface/peft:src/peft/"

_REFOLD = "fold it into the base and serve the folded model"
_RESCALE = "factor it anew at its own rank: the scaling becomes 1 everywhere, the update stays"

VLLM = (
    Rule("vllm", "format", "refuses", "it reads PEFT adapters alone",
         on.not_in("peft"), "convert it", _VLLM + "peft_helper.py", way=PEFT),
    Rule("vllm", "config", "refuses", "adapter_config.json must say r, lora_alpha, target_modules",
         on.peft_lacks("r", "lora_alpha", "target_modules"), "write the config anew",
         _VLLM + "peft_helper.py", way=PEFT),
    Rule("vllm", "kind", "refuses", "it knows LoRA alone", on.other_type, _REFOLD,
         _VLLM + "peft_helper.py", way=FOLD),
    Rule("vllm", "dora", "refuses", "it has no DoRA", on.dora, _REFOLD,
         _VLLM + "peft_helper.py", way=FOLD),
    Rule("vllm", "rslora", "refuses", "it has no rsLoRA", on.said("use_rslora"), _RESCALE,
         _VLLM + "peft_helper.py", until="0.7.0", way=EVEN),
    Rule("vllm", "modules_to_save", "refuses", "modules_to_save must be empty", on.saved(),
         _REFOLD, _VLLM + "peft_helper.py", until="0.31.0", way=FOLD),
    Rule("vllm", "modules_to_save", "refuses",
         "modules_to_save may name classifier and score alone",
         on.saved("classifier", "score"), _REFOLD, _VLLM + "peft_helper.py", since="0.31.0",
         way=FOLD),
    Rule("vllm", "bias", "refuses", "biases are not served", on.said("bias"), _REFOLD,
         _VLLM + "peft_helper.py", since="0.11.1", way=FOLD),
    Rule("vllm", "lora_bias", "refuses", "the bias of B is not served", on.said("lora_bias"),
         _REFOLD, _VLLM + "utils.py", since="0.11.1", way=FOLD),
    Rule("vllm", "scaling", "misreads", "lora_alpha / r counts for all modules, patterns do not",
         on.scaled_otherwise(on.overall, "peft"), _RESCALE, _VLLM + "peft_helper.py",
         until="0.32.0", way=EVEN),
    Rule("vllm", "rank", "refuses", "--max-lora-rank is 256 at most", on.rank_above(256),
         "truncate it (the error is printed)", "vllm-project/vllm:vllm/config.py", until="0.8.5",
         way="loratools convert ADAPTER --to peft --rank 256 -o OUT"),
    Rule("vllm", "rank", "refuses", "--max-lora-rank is 512 at most", on.rank_above(512),
         "truncate it (the error is printed)", "vllm-project/vllm:vllm/config/lora.py",
         since="0.8.5", way="loratools convert ADAPTER --to peft --rank 512 -o OUT"),
    Rule("vllm", "residual", "refuses", "this init changes the base", on.init,
         "convert it with PEFT's path_initial_model_for_weight_conversion",
         _VLLM + "peft_helper.py", since="0.32.0"),
    Rule("vllm", "residual", "misreads", "this init changed the base; it is put on the plain one",
         on.init, "convert it with PEFT's path_initial_model_for_weight_conversion",
         _VLLM + "peft_helper.py", until="0.32.0"),
    Rule("vllm", "alora", "refuses", "it has no aLoRA", on.said("alora_invocation_tokens"),
         "serve it with PEFT or llama.cpp", _VLLM + "peft_helper.py", since="0.32.0"),
    Rule("vllm", "alora", "misreads", "an aLoRA is applied to all tokens",
         on.said("alora_invocation_tokens"), "serve it with PEFT or llama.cpp",
         _VLLM + "peft_helper.py", until="0.32.0"),
    Rule("vllm", "layout", "refuses", "it has neither layer_replication, BD-LoRA nor QALoRA",
         on.said("layer_replication", "use_bdlora", "use_qalora"), _REFOLD,
         _VLLM + "peft_helper.py", since="0.32.0", way=FOLD),
    Rule("vllm", "saved_embeddings", "refuses", "base_layer.weight is no LoRA tensor",
         on.keys_like(r"\.base_layer\.weight$", "peft"),
         "save it again with PEFT's save_embedding_layers=False", _VLLM + "utils.py",
         until="0.20.0"),
    Rule("vllm", "saved_embeddings", "ignores", "the base's own embeddings in it are left out",
         on.keys_like(r"\.(?:embed_tokens|lm_head)\.base_layer\.weight$", "peft"),
         "none is needed: they are the base's", _VLLM + "utils.py", since="0.20.0"),
    Rule("vllm", "tensors", "refuses", "each tensor must be lora_A, lora_B or lora_embedding_*",
         on.keys_like(
             r"^(?!.*(?:\.lora_[AB]\.weight|\.lora_embedding_[AB]|\.base_layer\.weight"
             r"|\.lora_magnitude_vector(?:\.weight)?|(?:score|classifier)\.\w+|\.bias)$)", "peft"),
         _REFOLD, _VLLM + "utils.py", way=FOLD),
)  # fmt: skip

SGLANG = (
    Rule("sglang", "format", "refuses", "it reads PEFT adapters alone", on.not_in("peft"),
         "convert it", _SGLANG + "lora_config.py", way=PEFT),
    Rule("sglang", "config", "refuses",
         "adapter_config.json must say r, lora_alpha, target_modules",
         on.peft_lacks("r", "lora_alpha", "target_modules"), "write the config anew",
         _SGLANG + "lora_config.py", way=PEFT),
    Rule("sglang", "kind", "refuses", "it knows LoRA alone", on.other_type, _REFOLD,
         _SGLANG + "lora.py", way=FOLD),
    Rule("sglang", "targets", "refuses", "target_modules must be a list, or all-linear",
         on.pattern_string, "write the config anew", _SGLANG + "lora_manager.py", way=PEFT),
    Rule("sglang", "dora", "refuses", "it has no DoRA", on.dora, _REFOLD,
         _SGLANG + "lora_manager.py", since="0.5.23", way=FOLD),
    Rule("sglang", "dora", "misreads", "the magnitudes of DoRA are left out", on.dora, _REFOLD,
         _SGLANG + "lora.py", until="0.5.23", way=FOLD),
    Rule("sglang", "scaling", "misreads", "lora_alpha / r counts, without rsLoRA and patterns",
         on.scaled_otherwise(on.overall_plain, "peft"), _RESCALE, _SGLANG + "lora.py", way=EVEN),
    Rule("sglang", "rank", "refuses", "every module must have the rank r of the config",
         on.rank_not_said, _REFOLD, _SGLANG + "mem_pool.py", way=FOLD),
    Rule("sglang", "q_without_v", "refuses", "q_proj must come with v_proj", on.without_v, _REFOLD,
         _SGLANG + "lora.py", way=FOLD),
    Rule("sglang", "kv_without_q", "ignores", "k_proj and v_proj count only beside q_proj",
         on.without_q, _REFOLD, _SGLANG + "lora.py", way=FOLD),
    Rule("sglang", "full_weights", "ignores", "full weights (modules_to_save, tokens) are left out",
         on.replaced, _REFOLD, _SGLANG + "lora.py", way=FOLD),
    Rule("sglang", "residual", "misreads", "this init changed the base; it is put on the plain one",
         on.init, "convert it with PEFT's path_initial_model_for_weight_conversion",
         _SGLANG + "lora_config.py"),
    Rule("sglang", "bias", "ignores", "biases are left out", on.said("bias", "lora_bias"), _REFOLD,
         _SGLANG + "mem_pool.py", way=FOLD),
)  # fmt: skip

LLAMA_CPP = (
    Rule("llama.cpp", "format", "refuses", "it reads GGUF adapters alone", on.not_in("gguf"),
         "convert it", _LLAMA + "src/llama-adapter.cpp", way=GGUF),
    Rule("llama.cpp", "own_converter", "misreads",
         "its convert_lora_to_gguf.py stores lora_alpha alone: rsLoRA and patterns are lost",
         on.scaled_otherwise(on.alpha_by_rank, "peft"),
         "convert it with loratools, which folds them",
         _LLAMA + "convert_lora_to_gguf.py", way=GGUF),
    Rule("llama.cpp", "dora", "refuses", "GGUF adapters have no magnitudes", on.dora, _REFOLD,
         _LLAMA + "convert_lora_to_gguf.py", way=FOLD),
    Rule("llama.cpp", "full_weights", "refuses", "GGUF adapters have no full weights", on.replaced,
         _REFOLD, _LLAMA + "src/llama-adapter.cpp", way=FOLD),
    Rule("llama.cpp", "norms", "ignores", "updates of norms are skipped at load", on.norms, _REFOLD,
         _LLAMA + "src/llama-adapter.cpp", way=FOLD),
)  # fmt: skip

OLLAMA = (
    Rule("ollama", "format", "refuses",
         "it reads GGUF adapters, and PEFT and MLX ones of few bases",
         on.not_in("gguf", "peft", "mlx"), "convert it", _OLLAMA + "server/create.go", way=GGUF),
    Rule("ollama", "several", "refuses", "a Modelfile may name one adapter", on.several,
         "merge them first", _OLLAMA + "server/create.go", way=JOIN),
    Rule("ollama", "architecture", "refuses", "it converts adapters of llama and gemma2 alone",
         on.architecture("llama", "gemma2", "mistral"), "convert it to GGUF",
         _OLLAMA + "convert/convert.go", way=GGUF),
    Rule("ollama", "alpha", "refuses", "lora_alpha must be written as a whole number",
         on.fractional_alpha, "convert it to GGUF", _OLLAMA + "convert/convert.go", way=GGUF),
    Rule("ollama", "scaling", "misreads", "lora_alpha is all it takes from the config",
         on.scaled_otherwise(on.alpha_by_rank, "peft"),
         "convert it to GGUF, with the scale folded in",
         _OLLAMA + "convert/convert.go", way=GGUF),
    Rule("ollama", "mlx_scale", "misreads", "the scale of MLX adapters is not taken over",
         on.scaled_otherwise(on.unscaled, "mlx"), "convert it to GGUF",
         _OLLAMA + "convert/convert.go", way=GGUF),
    Rule("ollama", "dora", "refuses", "the magnitudes of DoRA are no part of a GGUF adapter",
         on.dora, _REFOLD, _OLLAMA + "convert/convert_llama_adapter.go", way=FOLD),
    Rule("ollama", "full_weights", "refuses", "full weights are no part of a GGUF adapter",
         on.replaced, _REFOLD, _OLLAMA + "convert/convert_llama_adapter.go", way=FOLD),
)  # fmt: skip

COMFYUI = (
    Rule("comfyui", "format", "refuses", "it knows other names than these",
         on.other_image_names, "convert it", _COMFY + "lora.py", way=KOHYA),
    Rule("comfyui", "sort", "refuses", "it takes adapters of image and video models alone",
         on.no_image, "this one changes another sort of model", _COMFY + "lora.py"),
    Rule("comfyui", "scaling", "misreads", "without .alpha tensors the scaling is 1, whatever a "
         "config or lora_adapter_metadata says", on.without_alpha_keys,
         "convert it: kohya files carry alpha", _COMFY + "weight_adapter/lora.py", way=KOHYA),
    Rule("comfyui", "dora", "misreads",
         "DoRA over the output axis is not divided by the norm of the "
         "updated weight", on.dora_out, "fold it into the base and load that checkpoint",
         _COMFY + "weight_adapter/base.py", way=FOLD),
    Rule("comfyui", "magnitude", "ignores", "only dora_scale is read as DoRA's magnitude",
         on.keys_like(r"\.lora_magnitude_vector(?:\.weight)?$"), "convert it: kohya files have "
         "dora_scale", _COMFY + "lora.py", way=KOHYA),
    Rule("comfyui", "bias", "ignores", "the bias of B is read in BFL's control LoRAs alone",
         on.bias_outside_bfl,
         "fold it into the base", _COMFY + "lora_convert.py", way=FOLD),
    Rule("comfyui", "embeddings", "ignores", "embeddings in the same file are left out",
         on.keys_like(r"^(?:bundle_emb\.|<.+>$)"), "save them as files of their own",
         _COMFY + "lora.py"),
)  # fmt: skip

A1111 = (
    Rule("a1111", "format", "refuses", "it knows other names than these",
         on.other_image_names, "convert it", _A1111 + "networks.py", way=KOHYA),
    Rule("a1111", "sort", "refuses", "it takes adapters of Stable Diffusion alone",
         on.no_image, "this one changes another sort of model", _A1111 + "networks.py"),
    Rule("a1111", "names", "refuses", "a key is cut at its first dot: only kohya's names match",
         on.not_mangled,
         "convert it", _A1111 + "networks.py", way=KOHYA),
    Rule("a1111", "transformers", "ignores", "it has no Flux, no Wan and no Qwen-Image (Forge has)",
         on.keys_like(r"lora_unet_(?:double_blocks|single_blocks|blocks|transformer_blocks)_\d+"),
         "use Forge or ComfyUI", _A1111 + "networks.py"),
)  # fmt: skip

DIFFUSERS_RULES = (
    Rule("diffusers", "format", "refuses", "it knows other names than these",
         on.other_image_names, "convert it", _DIFFUSERS + "loaders/lora_pipeline.py",
         way=DIFFUSERS),
    Rule("diffusers", "sort", "refuses", "it takes adapters of image and video models alone",
         on.no_image, "this one changes another sort of model",
         _DIFFUSERS + "loaders/lora_pipeline.py"),
    Rule("diffusers", "lycoris", "refuses", "every tensor's name must have lora in it",
         on.lycoris_keys, "convert it: what has a low rank becomes plain LoRA",
         _DIFFUSERS + "loaders/lora_pipeline.py", way=DIFFUSERS),
    Rule("diffusers", "dora", "ignores", "dora_scale is filtered out",
         on.keys_like(r"\.dora_scale$"),
         "convert it: its own files have lora_magnitude_vector",
         _DIFFUSERS + "loaders/lora_pipeline.py", way=DIFFUSERS),
    Rule("diffusers", "mixed_ranks", "misreads",
         "without alphas, ranks that differ share one alpha",
         on.ranks_without_alpha,
         "update diffusers, or convert it: kohya files carry alpha",
         _DIFFUSERS + "utils/peft_utils.py", until="0.40.0", way=KOHYA),
)  # fmt: skip

MLX_RULES = (
    Rule("mlx", "format", "refuses", "it reads its own adapters alone", on.not_in("mlx"),
         "convert it", _MLX, way=MLX),
    Rule("mlx", "file", "refuses", "the tensors must lie in adapters.safetensors",
         on.misnamed_mlx,
         "copy it to adapters.safetensors", _MLX),
    Rule("mlx", "rank", "refuses", "all modules must have the rank of lora_parameters",
         on.mlx_ranks,
         "convert it: ranks are evened", _MLX, since="0.32.2", way=MLX),
    Rule("mlx", "rank", "misreads", "tensors of another rank replace the layer's unasked",
         on.mlx_ranks,
         "convert it: ranks are evened", _MLX, until="0.32.2", way=MLX),
)  # fmt: skip

ONNXRUNTIME = (
    Rule("onnxruntime", "format", "refuses", "it reads .onnx_adapter files alone",
         on.not_in("onnx_adapter"), "convert it", _ORT, way=ONNX),
    Rule("onnxruntime", "overlap", "refuses", "active adapters may not set the same input twice",
         on.overlapping, "merge them first", _ORT, way=JOIN),
    Rule("onnxruntime", "dora", "refuses", "the graph adds A and B alone", on.dora,
         "fold it into the base and export that", "microsoft/Olive:olive/cli/convert_adapters.py",
         way=FOLD),
    Rule("onnxruntime", "own_converter", "misreads",
         "Olive's convert-adapters takes lora_alpha and r for all modules, patterns do not count",
         on.scaled_otherwise(on.overall, "peft"), "convert it with loratools",
         "microsoft/Olive:olive/cli/convert_adapters.py", way=ONNX),
)  # fmt: skip

TENSORRT_LLM = (
    Rule("tensorrt-llm", "format", "refuses", "it reads PEFT and NeMo adapters alone",
         on.not_in("peft", "nemo"), "convert it", _TRT, way=PEFT),
    Rule("tensorrt-llm", "config", "refuses", "adapter_config.json must say r and lora_alpha",
         on.peft_lacks("r", "lora_alpha"), "write the config anew", _TRT, way=PEFT),
    Rule("tensorrt-llm", "scaling", "misreads", "lora_alpha over each module's rank counts, "
         "alpha_pattern does not", on.scaled_otherwise(on.by_rank, "peft"), _RESCALE, _TRT,
         way=EVEN),
    Rule("tensorrt-llm", "modules", "refuses", "these modules have no place in its table",
         on.modules_outside(
             r"(?:^|\.)(?:[qkvo]_proj|(?:gate|up|down|gate_up)_proj|w[123]|gate|lm_head"
             r"|embed_tokens)$"),
         _REFOLD, _TRT, way=FOLD),
    Rule("tensorrt-llm", "tensors", "refuses",
         "each tensor must be lora_A, lora_B or a magnitude of "
         "a numbered layer",
         on.keys_like(
             r"^(?!.*(?:lm_head|embed_tokens))(?!.*\.\d+\.(?:\w+\.)+(?:lora_[AB]\.weight|"
             r"lora_magnitude_vector))", "peft"),
         _REFOLD, _TRT, way=FOLD),
    Rule("tensorrt-llm", "embeddings", "ignores", "LoRA of lm_head and embed_tokens is left out",
         on.keys_like(r"(?:lm_head|embed_tokens)\.lora_", "peft"), _REFOLD, _TRT, way=FOLD),
    Rule("tensorrt-llm", "dora", "misreads", "magnitudes must be divided by the norm beforehand",
         on.dora, "run its normalize_dora_scales script, or fold it", _TRT, way=FOLD),
    Rule("tensorrt-llm", "residual", "misreads", "this init changed the base; it is put on the "
         "plain one", on.init, "convert it with PEFT's path_initial_model_for_weight_conversion",
         _TRT),
)  # fmt: skip

# The first minor version of PEFT whose LoraConfig has the field (huggingface/peft:
# src/peft/tuners/lora/config.py of 17 releases from 0.5.0 to 0.21.2), and whether it changes what
# the tensors mean.
PEFT_FIELDS: tuple[tuple[str, str, bool], ...] = (
    ("rank_pattern", "0.6.0", True), ("alpha_pattern", "0.6.0", True),
    ("loftq_config", "0.7.0", False), ("megatron_config", "0.7.0", False),
    ("megatron_core", "0.7.0", False), ("use_rslora", "0.8.0", True), ("use_dora", "0.9.0", True),
    ("layer_replication", "0.10.0", True), ("runtime_config", "0.12.0", False),
    ("eva_config", "0.14.0", False), ("exclude_modules", "0.14.0", False),
    ("lora_bias", "0.14.0", True), ("corda_config", "0.15.0", False),
    ("trainable_token_indices", "0.15.0", True), ("use_qalora", "0.16.0", True),
    ("qalora_group_size", "0.16.0", False), ("target_parameters", "0.17.0", True),
    ("alora_invocation_tokens", "0.18.0", True), ("arrow_config", "0.18.0", True),
    ("ensure_weight_tying", "0.18.0", False), ("use_bdlora", "0.19.0", True),
    ("lora_ga_config", "0.19.0", False), ("monteclora_config", "0.20.0", True),
    ("velora_config", "0.20.0", False), ("kasa_config", "0.21.0", True),
)  # fmt: skip
_TOLERANT = "0.14.0"  # from here on an unknown field is warned of and dropped (src/peft/config.py)


def _peft() -> Iterator[Rule]:
    yield Rule("peft", "format", "refuses", "it reads its own adapters alone", on.not_in("peft"),
               "convert it", _PEFT + "config.py", way=PEFT)  # fmt: skip
    for field, first, meant in PEFT_FIELDS:
        older = _earlier(first, _TOLERANT)
        yield Rule("peft", field, "refuses", f"its LoraConfig has no {field}", on.has(field),
                   f"update PEFT to {first}", _PEFT + "tuners/lora/config.py",
                   until=older)  # fmt: skip
        if meant and older != first:
            yield Rule("peft", field, "misreads", f"{field} is dropped with a warning",
                       on.said(field), f"update PEFT to {first}", _PEFT + "config.py",
                       since=_TOLERANT, until=first)  # fmt: skip


def _earlier(a: str, b: str) -> str:
    return min(a, b, key=lambda v: tuple(map(int, v.split("."))))


RULES: tuple[Rule, ...] = (
    *VLLM, *SGLANG, *LLAMA_CPP, *OLLAMA, *COMFYUI, *A1111, *DIFFUSERS_RULES, *MLX_RULES,
    *ONNXRUNTIME, *TENSORRT_LLM, *_peft(),
)  # fmt: skip
READERS = tuple(dict.fromkeys(rule.reader for rule in RULES))
