"""Problem codes of the disk, the output, the proof and the network: exit status 6 and above."""

from __future__ import annotations

from loratools.codes.code import Code

OUTSIDE: dict[str, Code] = {
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
    "remote_changed": Code(
        7,
        "The repository on the Hub changed while this was published.",
        "main moved from 3f1a to 9bc2",
        "run the same command again; it compares anew",
    ),
    # 8: the proof
    "proof_failed": Code(
        8,
        "An output is not what its receipt, or the maths, says.",
        "layers.3.q_proj.weight: 17 elements differ",
        "make it again; `loratools merge --recipe OUT/loratools.json`",
    ),
    "signature": Code(
        8,
        "The signature is not that of this key over these files.",
        "model.sig: README.md was changed after signing",
        "get the files again from who signed them, or check the key",
    ),
    # 9: who you are
    "not_logged_in": Code(
        9,
        "The Hub does not know who you are, or the token is no good.",
        "HF_TOKEN is set and the Hub refuses it",
        "hf auth login, or set HF_TOKEN",
    ),
    "no_access": Code(
        9,
        "The token may not do this.",
        "the token may read org/name and not write it",
        "use a token with write access, or --create-pr",
    ),
    # 10: sources
    "not_found": Code(
        10,
        "A source does not exist.",
        "no file or folder named adapters/x",
        "check the path",
    ),
    "gated": Code(
        10,
        "The repository is there, and its owner asks for terms to be accepted first.",
        "meta-llama/Llama-3.1-8B is gated",
        "accept the terms on its page with the account of your token",
    ),
    # 11: the network
    "network": Code(
        11,
        "The Hub cannot be reached, or answers with an error of its own.",
        "https://huggingface.co: Connection refused",
        "run the same command again; what arrived already is not moved twice",
    ),
    "offline": Code(
        11,
        "Offline mode is on, and what is asked for is not in the cache.",
        "HF_HUB_OFFLINE=1 is set",
        "unset HF_HUB_OFFLINE, or fetch it first where there is a network",
    ),
}
