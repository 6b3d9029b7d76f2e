"""What runs inside the environment of llama.cpp: its converters for tiny bases, its runtime."""

import json
import runpy
import sys
from pathlib import Path

TREE = Path(sys.prefix) / "llama.cpp"


def convert(jobs: str) -> None:
    """Runs [script, arguments] of a list, in one process: most of the time goes into imports."""
    sys.path[:0] = [str(TREE), str(TREE / "gguf-py")]
    import conversion

    original = conversion.get_model_class

    def with_words(*args, **options):
        made_by = original(*args, **options)
        if not hasattr(made_by, "had_words"):
            made_by.set_vocab, made_by.had_words = words, True
        return made_by

    conversion.get_model_class = with_words
    for script, *arguments in json.loads(jobs):
        sys.argv = [script, *arguments]
        runpy.run_path(str(TREE / script), run_name="__main__")


def words(model) -> None:
    """A vocabulary of invented words: llama.cpp generates nothing without one."""
    count, writer = model.hparams["vocab_size"], model.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, count))])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([2, 3, 3, *[1] * (count - 3)])


def probabilities(runs: str) -> None:
    """For each [tokens, base, adapter...]: llama.cpp's log-probability of every next token."""
    import xllamacpp

    found = []
    for tokens, base, *adapters in json.loads(runs):
        params = xllamacpp.CommonParams()
        params.model.path = base
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(a, 1.0) for a in adapters]
        params.n_ctx, params.warmup, params.verbosity = 32, False, -1
        wide = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_k = params.cache_type_v = wide
        params.flash_attn_type = 0  # which would round to 16 bits
        asked = {"prompt": tokens, "n_predict": 1, "n_probs": 1000, "temperature": 0}
        answer = xllamacpp.Server(params).handle_completions(asked)
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({entry["id"]: entry["logprob"] for entry in top})
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    {"convert": convert, "probabilities": probabilities}[sys.argv[1]](sys.argv[2])
