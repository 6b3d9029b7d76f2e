"""Problem codes of the call and of what it was given: exit status 2, 3 and 4."""

from __future__ import annotations

from loratools.codes.code import Code

INPUTS: dict[str, Code] = {
    # 2: the call
    "usage": Code(
        2,
        "The call cannot be understood or contradicts itself.",
        "merge A B without --weights",
        "see `loratools COMMAND --help`",
    ),
    "same_path": Code(
        2,
        "The output equals an input or lies inside one.",
        "merge A --base model -o model",
        "choose another output; loratools never writes over its inputs",
    ),
    "not_installed": Code(
        2,
        "A package that this command needs is not installed, or two that exclude each other are.",
        "export needs the extra: pip install 'loratools[onnx]'",
        "install what the message names",
    ),
    # 3: the bytes
    "malformed": Code(
        3,
        "A file breaks the rules of its format.",
        "adapter_model.safetensors: header says 812 bytes, the file has 640",
        "fetch the file again from where it was published",
    ),
    "truncated": Code(
        3,
        "A file ends before its header says it should.",
        "model-00002.safetensors: 100 bytes missing",
        "fetch the file again; the message says how many bytes are missing",
    ),
    "duplicate": Code(
        3,
        "One name stands twice where it may stand once (tensor, config key, zip member).",
        'adapter_config.json: "lora_alpha" stands twice (8 and 800)',
        "readers disagree on which of the two counts: ask the author, or remove one by hand",
    ),
    "hostile": Code(
        3,
        "A file asks for what no adapter needs: code, a path outside, memory beyond its size.",
        "adapter_model.bin: pickle asks for os.system",
        "do not load this file with anything; take the safetensors version if there is one",
    ),
    "not_weights": Code(
        3,
        "The file is something else: a git-lfs pointer, a web page, an archive, not a file.",
        "adapter_model.safetensors is a git-lfs pointer",
        "run `git lfs pull`, or download the file itself",
    ),
    "dtype_unusable": Code(
        3,
        "A tensor has a dtype that cannot hold what it is used for.",
        "x.lora_A.weight is BOOL",
        "convert the file where it was made; factors are F64, F32, F16, BF16 or F8",
    ),
    "nonfinite": Code(
        3,
        "A tensor holds NaN or infinite values.",
        "layers.3.q_proj.lora_B.weight: 2 NaN",
        "the training diverged or the file is damaged: use an earlier checkpoint",
    ),
    # 4: the fit
    "unmatched": Code(
        4,
        "Parts of an adapter find no weight in the base.",
        "0 of 64 targets matched; the base's names start with model.",
        "check that this is the base it was trained on; --allow unmatched:GLOB leaves them out",
    ),
    "component_absent": Code(
        4,
        "A whole component of the adapter has no counterpart in the base.",
        "text_encoder: 72 targets, and the base has no text_encoder",
        "--skip text_encoder leaves it out on purpose",
    ),
    "shape_mismatch": Code(
        4,
        "Shapes of adapter and base differ.",
        "q_proj.weight: adapter is (4096, 4096), base is (5120, 5120)",
        "use the base that the adapter was trained on",
        fixed=True,
    ),
    "shape_factors": Code(
        4,
        "Shapes of one adapter's own factors cannot be multiplied.",
        "A is (8, 64), B is (32, 16)",
        "the file is damaged or was cut by a sharded save: export it again",
        fixed=True,
    ),
    "missing": Code(
        4,
        "One half of a pair, or a tensor that the config promises, is not in the file.",
        "q_proj has lora_A and no lora_B",
        "export the adapter again; --allow missing:GLOB leaves the module out",
    ),
    "config_conflict": Code(
        4,
        "The adapter's config and its tensors say different things.",
        "config says r=8, lora_A has 16 rows",
        "correct the config; --allow config_conflict goes by the tensors",
    ),
    "unexplained": Code(
        4,
        "Tensors in an adapter file that no rule explains; nothing is dropped silently.",
        "extra.thing.weight",
        "--allow unexplained:GLOB leaves them out, by name, into the receipt",
    ),
    "unknown_type": Code(
        4,
        "The adapter is of a kind or format that loratools does not read.",
        'peft_type "NEWTUNER"',
        "see `loratools inspect` for what was recognised",
    ),
    "needs_base": Code(
        4,
        "These adapters can only be merged over their base weights.",
        "DoRA renormalises W0 + BA: two of them have no sum without W0",
        "add --base BASE",
    ),
    "head_conflict": Code(
        4,
        "Two adapters bring different heads or replacements of one name.",
        "classifier.weight is (2, 384) in one and (5, 384) in the other",
        "merge adapters of one task, or --skip the head and train it again",
    ),
    "tokenizer_conflict": Code(
        4,
        "Adapters carry different tokenizers, or a vocabulary does not fit the tokenizer.",
        "a/tokenizer.json and b/tokenizer.json differ",
        "--tokenizer base|adapter|PATH",
    ),
    "orientation": Code(
        4,
        "The config's fan_in_fan_out and the base's architecture disagree on a square matrix.",
        "c_proj is stored (in, out) in gpt2; the config says fan_in_fan_out=false",
        "--allow orientation goes by the architecture",
    ),
    "base_incomplete": Code(
        4,
        "The base's index names tensors or shards that are not there.",
        "model.safetensors.index.json lists lm_head.weight, no shard has it",
        "download the base again",
    ),
    "no_match": Code(
        4,
        "Two things that must be the same are not.",
        "the receipt's base has another fingerprint",
        "give the inputs that the receipt names",
    ),
    "other_base": Code(
        4,
        "The adapter names another base than the one given.",
        'its config names "meta-llama/Llama-2-7b-hf", the base is "mistralai/Mistral-7B"',
        "use the named base; this is a hint, shapes decide",
    ),
}
