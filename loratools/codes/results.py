"""Problem codes of what would come of it: exit status 5, most of which --allow lets through."""

from __future__ import annotations

from loratools.codes.code import Code

RESULTS: dict[str, Code] = {
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
        "serve it with a runtime that applies it; prompts, prefixes and bottlenecks: "
        "loratools export BASE --adapter ADAPTER -o OUT carries them in the graph",
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
    "secret": Code(
        5,
        "A file that would be published holds a token, a key or a password.",
        "train.json, line 12: an access token of the Hub",
        "remove it from the file and revoke it, or leave the file out with --exclude",
        fixed=True,
    ),
    "pickled": Code(
        5,
        "A file that would be published is a pickle, which runs code where it is loaded.",
        "training_args.bin is a pickle",
        "leave it out, or make safetensors of it: loratools convert",
        fixed=True,
    ),
    "links": Code(
        5,
        "A link leads out of the folder that would be published.",
        "notes.txt -> /etc/hostname",
        "copy the file into the folder, or leave it out with --exclude",
    ),
    "unpublishable": Code(
        5,
        "What would be published is incomplete, mixed up or too large to be loaded from the Hub.",
        "model-00002-of-00003.safetensors: the index names it, the folder lacks it",
        "make the folder whole first; the message says what is missing",
    ),
    "base_unnamed": Code(
        5,
        "Nothing names the base model on the Hub, or what names it is a path.",
        "adapter_config.json: base_model_name_or_path is /home/me/llama",
        "--base-model ORG/NAME",
    ),
    "license": Code(
        5,
        "The licenses of what it was made from are unknown or differ.",
        "base apache-2.0, adapter unknown",
        "decide, and say it: --license ID",
    ),
    "visibility": Code(
        5,
        "The repository on the Hub is public and should be private, or the reverse.",
        "--private was asked for, and org/name is public",
        "change it on its settings page, or publish to another repository",
        fixed=True,
    ),
    "stale_shards": Code(
        5,
        "The repository has shards of another model, which would stay beside the new ones.",
        "model-00003-of-00003.safetensors is on the Hub and not in the folder",
        "remove them there (hf repos delete-files), or publish to another repository",
    ),
    "card": Code(
        5,
        "The model card cannot be published as it is.",
        "README.md: the Hub refuses its metadata",
        "mend the card, or let loratools write it: --card auto",
        fixed=True,
    ),
    "graph_changed": Code(
        5,
        "The graph is fused, quantised or pruned, so that a weight is not in it as it was.",
        "18 of 37 target weights are not in base.onnx",
        "fold into the graph as it was before fusing, or export the folded model",
        fixed=True,
    ),
    "not_exportable": Code(
        5,
        "No exporter makes a graph of this.",
        "transformers' exporter: ...; torch's: ...",
        "the message says why; another --exporter or --task may do",
        fixed=True,
    ),
}
