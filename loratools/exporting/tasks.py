"""Tasks by optimum's names: which one a model is for, and how transformers loads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.errors import error, shown

PAST = "-with-past"
GENERATION = "text-generation"
SEQ2SEQ = "text2text-generation"
SPEECH = "automatic-speech-recognition"
UNET = "unet"  # of a diffusers folder; optimum has no task name for a component
PLAIN = "module"  # any nn.Module, by its own sample inputs

# Task -> the Auto class that loads it. Names: optimum/exporters/tasks.py.
LOADED_BY = {
    "feature-extraction": "AutoModel",
    GENERATION: "AutoModelForCausalLM",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    SPEECH: "AutoModelForSpeechSeq2Seq",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "object-detection": "AutoModelForObjectDetection",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "masked-im": "AutoModelForMaskedImageModeling",
    "depth-estimation": "AutoModelForDepthEstimation",
    "audio-classification": "AutoModelForAudioClassification",
}
WITH_PAST = (GENERATION, SEQ2SEQ, SPEECH)
TASKS = tuple(sorted([*LOADED_BY, *(t + PAST for t in WITH_PAST), UNET]))
CTC = "AutoModelForCTC"  # the other sort of speech recognition, without a decoder

# How class names end, and what such a model is for; the first that fits.
ENDINGS = (
    (r"ForSequenceClassification", "text-classification"),
    (r"ForTokenClassification", "token-classification"),
    (r"ForQuestionAnswering(Simple)?", "question-answering"),
    (r"ForMultipleChoice", "multiple-choice"),
    (r"ForMaskedLM|ForPreTraining", "fill-mask"),
    (r"For(Masked)?ImageClassification(WithTeacher)?", "image-classification"),
    (r"ForObjectDetection", "object-detection"),
    (r"ForSemanticSegmentation", "semantic-segmentation"),
    (r"ForMaskedImageModeling", "masked-im"),
    (r"ForDepthEstimation", "depth-estimation"),
    (r"ForAudioClassification|ForSequenceClassificationAudio", "audio-classification"),
    (r"ForCTC", SPEECH),
    (r"ForSpeechSeq2Seq", SPEECH),
    (r"ForCausalLM|LMHeadModel", GENERATION),
)  # fmt: skip
SPEAKERS = ("whisper", "speech_to_text", "moonshine", "speech-encoder-decoder")


def base_of(task: str) -> str:
    """A task without its `-with-past`."""
    return task.removesuffix(PAST)


def known(task: str) -> str:
    """The task as asked for; UsageError for names that optimum does not have."""
    if task not in TASKS:
        raise error("usage", f"--task {shown(task)}: known tasks are auto, {', '.join(TASKS)}")
    return task


def task_of(config: Mapping[str, Any], *, kv_cache: bool) -> str:
    """What a model is for, by the class that its config names.

    RefusedError `not_exportable` where no class is named, or one of a task that is not among ours.
    """
    if "_class_name" in config:
        name = str(config["_class_name"])
        if name != "UNet2DConditionModel":
            raise error(
                "not_exportable",
                f"{shown(name)} of diffusers: of a pipeline's components, UNet2DConditionModel is "
                "exported; others go as modules: loratools.export(module, inputs=...)",
            )
        return UNET
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if not name:
        raise error("not_exportable", "config.json names no architecture; say --task")
    if config.get("is_encoder_decoder") and re.search(r"(Generation|LMHeadModel|MTModel)$", name):
        found = SPEECH if config.get("model_type") in SPEAKERS else SEQ2SEQ
    else:
        fits = (task for end, task in ENDINGS if re.search(f"({end})$", name))
        found = next(fits, "")
        if not found and name.endswith("Model") and not config.get("is_encoder_decoder"):
            sees = "image_size" in config or "num_channels" in config
            both = isinstance(config.get("text_config"), dict)
            found = "" if both else "image-feature-extraction" if sees else "feature-extraction"
    if not found:
        raise error(
            "not_exportable",
            f"{shown(name)}: none of the tasks is its own; say --task (known are "
            f"{', '.join(TASKS)}), or export it as a module: loratools.export(module, inputs=...)",
        )
    past = kv_cache and found in WITH_PAST and not name.endswith("ForCTC")
    return found + PAST if past else found


def auto_class(task: str, config: Mapping[str, Any]) -> str:
    """The Auto class of transformers that loads a model for a task."""
    named = config.get("architectures")
    ctc = isinstance(named, list) and named and str(named[0]).endswith("ForCTC")
    return CTC if ctc and base_of(task) == SPEECH else LOADED_BY[base_of(task)]
