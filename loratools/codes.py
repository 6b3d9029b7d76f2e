"""The one table of problem codes: exit status, meaning, example, remedy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """What a problem code means: the exit status it leads to, an example, the remedy."""

    exit: int
    meaning: str
    example: str
    remedy: str
    fixed: bool = False  # nothing can be let through: there is no sum of unlike shapes

    @property
    def waivable(self) -> bool:
        """Whether `--allow` may turn it into a warning: exit classes 4 and 5, shapes excepted."""
        return self.exit in (4, 5) and not self.fixed


CODES: dict[str, Code] = {
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
    # 5: the result
    "no_effect": Code(
        5,
        "An adapter, or the whole command, would change nothing.",
        "all 64 B factors are zero: never trained",
        "train it first, or leave it out of the merge",
    ),
    "already_merged": Code(
        5,
        "The adapter is already folded into this base.",
        "the base's receipt lists the adapter's fingerprint",
        "start from the original base; --allow already_merged folds it twice",
    ),
    "residual_base": Code(
        5,
        "The adapter was trained on a changed base that this one does not give again.",
        "init_lora_weights=corda: folding onto the plain base is wrong",
        "convert it with PEFT (path_initial_model_for_weight_conversion) or use its residual",
    ),
    "large_update": Code(
        5,
        "The update is larger than the base on most targets.",
        "the update's norm is larger than the base weight's on 60 of 64 targets",
        "check the scaling (`loratools inspect`); --allow large_update goes on",
    ),
    "zero_base": Code(
        5,
        "Weights of the base that the adapter changes hold only zeros.",
        "all rows looked at of 2 of 64 base weights hold only zeros",
        "compare the base's files with where they were published; --allow zero_base goes on",
    ),
    "tied": Code(
        5,
        "The base stores embedding and head as one tensor and the adapter changes one of them.",
        "lm_head.weight is tied to model.embed_tokens.weight",
        "--tied changes both (PEFT's way), --untie writes both and changes the targeted one",
    ),
    "quantised_base": Code(
        5,
        "The base is quantised and cannot be folded into yet.",
        "quantization_config names bitsandbytes",
        "fold into the 16-bit base of the same model",
    ),
    "alpha_missing": Code(
        5,
        "The file does not say its alpha, and its format has no rule for that.",
        "adapter_config.json has no lora_alpha",
        "--assume alpha=16 (from the training script)",
    ),
    "scaling_unusual": Code(
        5,
        "The scaling is far from what trainings use (above 64 or below 1/1024).",
        "scaling 2000 (alpha 16000 / rank 8)",
        "check lora_alpha in the config",
    ),
    "unknown_config": Code(
        5,
        "A config field that loratools does not know is active and tensors stay unexplained.",
        '"use_newlora": true',
        "a newer loratools may know it; --allow unknown_config goes on without",
    ),
    "not_foldable": Code(
        5,
        "The adapter is no function of a weight and cannot be folded into one.",
        "aLoRA applies only after its invocation tokens",
        "serve it with a runtime that applies it",
    ),
    "loss": Code(
        5,
        "The output cannot hold something that the input has.",
        "folded in BF16 the update keeps 31 % of its size",
        "choose another --dtype or format; --allow loss accepts it",
    ),
    "overflow": Code(
        5,
        "Finite numbers become infinite in the output's dtype.",
        "q_proj.weight: 70000 does not fit F16",
        "--dtype bf16 or fp32",
    ),
    "vocabulary": Code(
        5,
        "The vocabulary would not be the same everywhere.",
        "embed_tokens would have 32010 rows and lm_head 32000",
        "save embedding and head together (PEFT: save_embedding_layers=True)",
    ),
    "reader_refuses": Code(
        5,
        "The reader asked about with `check --for` will not load this adapter.",
        "vllm refuses it: it has no DoRA (model.layers.0.self_attn.q_proj.weight)",
        "run the last line that `loratools check --for` prints",
    ),
    "reader_ignores": Code(
        5,
        "The reader asked about with `check --for` leaves out a part of this adapter.",
        "comfyui ignores part of it: the bias of B",
        "run the last line that `loratools check --for` prints",
    ),
    "reader_misreads": Code(
        5,
        "The reader asked about with `check --for` loads this adapter as something else.",
        "sglang misreads it: lora_alpha / r counts, without rsLoRA",
        "run the last line that `loratools check --for` prints",
    ),
    # 6: the disk
    "storage": Code(
        6,
        "Reading or writing failed.",
        "out/model-00001.safetensors: Input/output error",
        "see the system's message; nothing was published",
    ),
    "disk_full": Code(
        6,
        "There is not enough free space for the output.",
        "16.1 GB needed, 3.2 GB free in /data",
        "free space or choose another output folder",
    ),
    "input_changed": Code(
        6,
        "An input changed while it was read, or since the receipt was written.",
        "base/model.safetensors was modified during the run",
        "run again when nothing writes to the inputs",
    ),
    # 7: the output
    "output_exists": Code(
        7,
        "The output exists already.",
        "out/ is not empty",
        "choose another -o, or --force to replace an adapter or a model",
    ),
    "locked": Code(
        7,
        "Another run is writing this output.",
        "out is locked by process 4242 on host h",
        "wait for it, or stop it",
    ),
    "other_plan": Code(
        7,
        "An interrupted run with another plan left its work for this output.",
        "out.partial belongs to weights 0.7,0.3",
        "--restart discards it",
    ),
    # 8: the proof
    "proof_failed": Code(
        8,
        "An output is not what its receipt, or the maths, says.",
        "layers.3.q_proj.weight: 17 elements differ",
        "make it again; `loratools merge --recipe OUT/loratools.json`",
    ),
    # 10: sources
    "not_found": Code(
        10,
        "A source does not exist.",
        "no file or folder named adapters/x",
        "check the path",
    ),
}
