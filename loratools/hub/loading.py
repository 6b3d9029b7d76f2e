"""How each kind of artefact is loaded: the exact lines of its own library, for the card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from loratools.hub.artefact import Artefact
from loratools.hub.facts import Facts

# transformers: by how the name of a class ends, its Auto class and the Hub's name of the task.
TASKS: tuple[tuple[str, str, str], ...] = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
    ("ForImageClassification", "AutoModelForImageClassification", "image-classification"),
    ("ForMultipleChoice", "AutoModelForMultipleChoice", "multiple-choice"),
    ("ForCausalLM", "AutoModelForCausalLM", "text-generation"),
    ("LMHeadModel", "AutoModelForCausalLM", "text-generation"),
    ("ForSpeechSeq2Seq", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("Model", "AutoModel", "feature-extraction"),
)
# PEFT's task_type (huggingface/peft: src/peft/utils/peft_types.py), as such an ending.
PEFT_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "FEATURE_EXTRACTION": "Model",
}
IMAGES = ("diffusers", "kohya", "cloneofsimo", "bfl", "xlabs", "comfy")  # formats of adapters
# What diffusers reads (src/diffusers/loaders/lora_pipeline.py); LyCORIS kinds it does not.
DIFFUSERS_KINDS = {"LowRank", "Renormed", "Dense"}
ENCODER_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
# @huggingface/transformers: src/utils/dtypes.js, DEFAULT_DTYPE_SUFFIX_MAPPING.
DTYPES = {"": "fp32", "_fp16": "fp16", "_int8": "int8", "_uint8": "uint8", "_quantized": "q8",
          "_q4": "q4", "_q4f16": "q4f16", "_bnb4": "bnb4"}  # fmt: skip
PLACEHOLDER = "ORG/NAME"  # where the repository is not known yet


@dataclass(frozen=True, slots=True)
class Snippet:
    """Lines that load it, and a word before them where it takes one."""

    language: str
    lines: tuple[str, ...]
    before: str = ""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def snippet(artefact: Artefact, facts: Facts, base: str | None, repo: str) -> Snippet:
    """How the artefact is loaded from `repo`; `base` is the id of its base."""
    match artefact.kind:
        case "adapter":
            return _adapter(artefact, facts, base or "BASE", repo)
        case "onnx":
            return _onnx(artefact, facts, repo)
        case "pipeline":
            return _python(
                "from diffusers import DiffusionPipeline",
                "",
                f"pipeline = DiffusionPipeline.from_pretrained({_q(repo)})",
            )
        case _:
            return _whole(artefact, repo)


def library(artefact: Artefact, facts: Facts) -> str | None:
    """The library that loads it, by its name on the Hub.

    huggingface/huggingface.js: packages/tasks/src/model-libraries.ts
    """
    names = {
        "peft": "peft", "mlx": "mlx", "adapterhub": "adapter-transformers", "nemo": "nemo",
    }  # fmt: skip
    match artefact.kind:
        case "adapter":
            if facts.format in IMAGES:
                return "diffusers"
            return names.get(facts.format or "")
        case "pipeline":
            return "diffusers"
        case "onnx" if is_for_js(artefact):
            return "transformers.js"
        case "onnx" if not artefact.has("config.json"):
            return None
        case "model" if artefact.has("modules.json"):
            return "sentence-transformers"
        case "model" if not artefact.has("config.json"):
            return None if _gguf(artefact) else "diffusion-single-file"
        case "model" if "_class_name" in artefact.config:
            return "diffusers"
        case _:
            return "transformers"


def task(artefact: Artefact, facts: Facts) -> str | None:
    """The Hub's pipeline_tag, where the files say it."""
    if artefact.kind == "adapter":
        ending = PEFT_TASKS.get(facts.task or "")
        if ending:
            return next(tag for end, _, tag in TASKS if end == ending)
        return "text-to-image" if facts.is_unet else None
    found = _auto(artefact.config)
    return found[1] if found else None


def is_for_js(artefact: Artefact) -> bool:
    """Whether a graph lies where transformers.js looks for it."""
    near = any(artefact.local(f).startswith("onnx/") for f in artefact.files)
    return near and artefact.has("config.json") and "_class_name" not in artefact.config


def _q(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _python(*lines: str, before: str = "") -> Snippet:
    return Snippet("python", lines, before)


def _shell(*lines: str, before: str = "") -> Snippet:
    return Snippet("bash", lines, before)


def _auto(config: Any) -> tuple[str, str] | None:
    """The Auto class of a config's first architecture, and its task."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if name.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "AutoModelForImageTextToText", "image-text-to-text"
        if config.get("model_type") == "whisper":
            return "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"
        return "AutoModelForSeq2SeqLM", "text2text-generation"
    return next(((auto, tag) for end, auto, tag in TASKS if name.endswith(end)), None)


def _weights(artefact: Artefact, *ends: str) -> str:
    """The first file of weights, by its path in the repository."""
    return next((f.name for f in artefact.weights if f.name.endswith(ends)), "FILE")


def _gguf(artefact: Artefact) -> bool:
    return any(f.name.endswith(".gguf") for f in artefact.weights)


# ------------------------------------------------------------------------------- adapters


def _adapter(artefact: Artefact, facts: Facts, base: str, repo: str) -> Snippet:
    folder = f", subfolder={_q(artefact.inside)}" if artefact.inside else ""
    match facts.format:
        case "peft" if facts.vocabulary != "diffusers":
            return _peft(artefact, facts, base, repo, folder)
        case name if name in IMAGES and set(facts.kinds) <= DIFFUSERS_KINDS:
            return _diffusers(artefact, facts, base, repo)
        case name if name in IMAGES:
            file = PurePosixPath(_weights(artefact, ".safetensors")).name
            return _shell(
                f"hf download {repo} {_weights(artefact, '.safetensors')} "
                "--local-dir ComfyUI/models/loras",
                before=f"In ComfyUI, Forge or SD.Next, as `{file}`:" if file.isalnum() else
                "In ComfyUI, Forge or SD.Next:",
            )  # fmt: skip
        case "mlx":
            return _shell(
                f"hf download {repo} --local-dir adapter",
                f'mlx_lm.generate --model {base} --adapter-path adapter --prompt "Hello"',
            )
        case "gguf":
            file = _weights(artefact, ".gguf")
            return _shell(
                f"hf download {repo} {_word(file)} --local-dir .",
                f"llama-cli -m BASE.gguf --lora {_word(file)} -p Hello",
                before="With llama.cpp, over the same base as GGUF:",
            )
        case "adapterhub":
            return _python(
                "from adapters import AutoAdapterModel",
                "",
                f"model = AutoAdapterModel.from_pretrained({_q(base)})",
                f"name = model.load_adapter({_q(repo)}, set_active=True)",
            )
        case "onnx_adapter":
            return _python(
                "import onnxruntime",
                "from huggingface_hub import hf_hub_download",
                "",
                f"path = hf_hub_download({_q(repo)}, {_q(_weights(artefact, '.onnx_adapter'))})",
                "adapter = onnxruntime.LoraAdapter()",
                "adapter.Load(path)",
                "options = onnxruntime.RunOptions()",
                "options.add_active_adapter(adapter)  # then: session.run(None, feeds, options)",
            )
        case _:
            return _shell(
                f"loratools merge {repo} --base {base} -o model",
                before="Folded into its base, which any program then loads:",
            )


def _word(text: str) -> str:
    """A file name as a shell takes it."""
    import shlex

    return shlex.quote(text)


def _peft(artefact: Artefact, facts: Facts, base: str, repo: str, folder: str) -> Snippet:
    ending = PEFT_TASKS.get(facts.task or "", "ForCausalLM" if facts.task is None else "Model")
    auto = next((a for end, a, _ in TASKS if end == ending), "AutoModel")
    if facts.task == "SEQ_2_SEQ_LM":
        auto = "AutoModelForSeq2SeqLM"
    own = any(
        artefact.has(n) for n in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    tokenizer = f"{_q(repo)}{folder}" if own else _q(base)
    return _python(
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"base = {auto}.from_pretrained({_q(base)})",
        f"model = PeftModel.from_pretrained(base, {_q(repo)}{folder})",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
    )


def _diffusers(artefact: Artefact, facts: Facts, base: str, repo: str) -> Snippet:
    prompt = ", ".join(["a photo", *facts.trigger_words[:1]])
    return _python(
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({_q(base)})",
        f"pipeline.load_lora_weights({_q(repo)}, "
        f"weight_name={_q(_weights(artefact, '.safetensors'))})",
        *([f"image = pipeline({_q(prompt)}).images[0]"] if facts.is_unet else []),
    )


# ------------------------------------------------------------------------------- models, graphs


def _whole(artefact: Artefact, repo: str) -> Snippet:
    folder = f", subfolder={_q(artefact.inside)}" if artefact.inside else ""
    config = artefact.config
    if _gguf(artefact):
        file = _weights(artefact, ".gguf")
        return _shell(
            f"hf download {repo} {_word(file)} --local-dir .",
            f"llama-cli -m {_word(file)} -p Hello",
        )
    if not artefact.has("config.json"):
        url = f"https://huggingface.co/{repo}/blob/main/{_weights(artefact, '.safetensors')}"
        return _python(
            "from diffusers import StableDiffusionPipeline  # or the pipeline of its architecture",
            "",
            f"pipeline = StableDiffusionPipeline.from_single_file({_q(url)})",
        )
    named = config.get("_class_name")
    if isinstance(named, str) and named.isidentifier():
        return _python(
            f"from diffusers import {named}",
            "",
            f"part = {named}.from_pretrained({_q(repo)}{folder})",
        )
    if artefact.has("modules.json"):
        return _python(
            "from sentence_transformers import SentenceTransformer",
            "",
            f"model = SentenceTransformer({_q(repo)})",
        )
    found = _auto(config)
    auto = found[0] if found else "AutoModel"
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    has_tokenizer = any(
        artefact.has(n) for n in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    lines = [
        f"from transformers import {auto}" + (", AutoTokenizer" if has_tokenizer else ""),
        "",
        f"model = {auto}.from_pretrained({_q(repo)}{folder}{trust})",
    ]
    if has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({_q(repo)}{folder})")
    return _python(*lines)


def _onnx(artefact: Artefact, facts: Facts, repo: str) -> Snippet:
    graphs = [f.name for f in artefact.weights if f.name.endswith((".onnx", ".ort"))]
    if artefact.has("genai_config.json"):
        return _python(
            "import onnxruntime_genai",
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({_q(repo)})",
            "model = onnxruntime_genai.Model(folder)",
            "tokenizer = onnxruntime_genai.Tokenizer(model)",
        )
    tag = task(artefact, facts)
    if is_for_js(artefact) and tag and artefact.has("tokenizer.json"):
        suffixes = {PurePosixPath(g).stem.removeprefix("model") for g in graphs}
        dtype = next((d for s, d in reversed(DTYPES.items()) if s in suffixes), "fp32")
        return Snippet(
            "js",
            (
                'import { pipeline } from "@huggingface/transformers";',
                "",
                f'const run = await pipeline("{tag}", {_q(repo)}, {{ dtype: "{dtype}" }});',
            ),
        )
    graph = min(graphs, key=len, default="model.onnx")
    lines = [
        "import onnxruntime",
        "from huggingface_hub import snapshot_download",
        "",
        f"folder = snapshot_download({_q(repo)})",
        f"session = onnxruntime.InferenceSession(folder + {_q('/' + graph)})",
    ]
    if artefact.has("tokenizer.json") and facts.inputs and set(facts.inputs) <= ENCODER_INPUTS:
        lines.insert(2, "from transformers import AutoTokenizer")
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'feeds = dict(tokenizer("Hello", return_tensors="np"))',
            "outputs = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})",
        ]
    else:
        lines.append("print([(i.name, i.shape, i.type) for i in session.get_inputs()])")
    return _python(*lines)
