"""Whether a graph computes what the torch module does: onnxruntime beside torch, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loratools.errors import error, shown
from loratools.exporting.models import DECODER, DECODER_WITH_PAST, ENCODER, MERGED

if TYPE_CHECKING:
    from loratools.exporting.graphs import Graph

ATOL = {"fp32": 1e-4, "fp16": 2e-2}  # observed: at most 3e-6 and 3e-3
COSINE = 0.98  # below it a quantised graph is warned of
STEPS = 5  # greedy tokens, one by one, after the prefill
WINDOW = 48  # prefills go past a sliding window up to this size
Feeds = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Figure:
    """One output of one case: how far it is from torch's, against what is allowed.

    `difference` is the largest absolute one, in units of the output's largest number where that
    is above 1.
    """

    graph: str
    case: str
    output: str
    difference: float
    cosine: float
    allowed: float | None

    @property
    def ok(self) -> bool:
        return self.difference <= (float("inf") if self.allowed is None else self.allowed)

    def __str__(self) -> str:
        limit = "" if self.allowed is None else f" > {self.allowed:.2g}"
        return f"{self.graph}: {self.output} at {self.case} differs by {self.difference:.2g}{limit}"


@dataclass(slots=True)
class Parity:
    """All figures of a proof, and the greedy tokens that both chose."""

    figures: list[Figure] = field(default_factory=list)
    tokens: int = 0
    unlike: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.figures) and not self.unlike

    @property
    def worst(self) -> float:
        return max((f.difference for f in self.figures), default=0.0)

    @property
    def cosine(self) -> float:
        return min((f.cosine for f in self.figures), default=1.0)

    def failures(self) -> list[str]:
        """What is not as it should be, the worst first."""
        wrong = sorted((f for f in self.figures if not f.ok), key=lambda f: -f.difference)
        return [str(f) for f in wrong] + self.unlike

    def as_json(self) -> dict[str, Any]:
        """The figures as the receipt keeps them: the worst of each graph and case."""
        cases: dict[tuple[str, str], Figure] = {}
        for figure in self.figures:
            key = figure.graph, figure.case
            if key not in cases or figure.difference > cases[key].difference:
                cases[key] = figure
        return {
            "ok": self.ok,
            "worst": float(f"{self.worst:.3g}"),
            "cosine": float(f"{self.cosine:.6g}"),
            "tokens": self.tokens,
            "cases": [
                {"graph": f.graph, "case": f.case, "output": f.output,
                 "difference": float(f"{f.difference:.3g}"), "allowed": f.allowed}
                for f in cases.values()
            ],
        }  # fmt: skip


class Session:
    """An onnxruntime session that takes and gives torch's tensors by name."""

    def __init__(self, path: Path) -> None:
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self.inner = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as cause:  # onnxruntime's exceptions share no base but this one
            raise error("proof_failed", f"{path.name}: {shown(cause)}") from cause
        self.types = {i.name: i.type for i in self.inner.get_inputs()}
        self.names = [o.name for o in self.inner.get_outputs()]
        self.file = path.name

    def __call__(self, feeds: Feeds) -> dict[str, Tensor]:
        given = {n: feeds[n].numpy() for n in self.types if n in feeds}
        try:
            found = self.inner.run(None, given)
        except Exception as cause:  # as above
            raise error("proof_failed", f"{self.file}: {shown(cause)}") from cause
        made = zip(self.names, found, strict=True)
        return {name: torch.from_numpy(array.copy()) for name, array in made}


def parity(
    folder: Path,
    module: nn.Module,
    task: str,
    graphs: Sequence[Graph],
    *,
    atol: float | None = ATOL["fp32"],
    chunks: bool = True,
) -> Parity:
    """Compare the graphs in a folder with the module, at sizes that were never traced.

    A causal LM is also compared with the module without any cache: a padded prefill, several
    tokens at once on a past, and single steps, whose greedy tokens must be equal. `atol` None
    judges nothing but that all numbers are finite. Without `chunks` no batch reads several tokens
    on a past: fused attention cannot. ProofError where onnxruntime cannot run one.
    """
    found = Parity()
    sessions = _sessions(folder, graphs)
    for graph in graphs:
        for sizes in _sizes(graph):
            if not chunks and "past_sequence" in graph.sample:
                sizes = {**sizes, "sequence": 1}
            for seed in range(graph.rounds):
                feeds = graph.feeds(sizes, 10 * len(found.figures) + seed + 1)
                case = ", ".join(f"{d}={n}" for d, n in sizes.items()) or "fixed shapes"
                case += f", sample {seed + 1}" if graph.rounds > 1 else ""
                got = sessions[graph.file](feeds)
                compare(found, graph, case, feeds, graph.run(feeds), got, atol)
    by_file = {graph.file: graph for graph in graphs}
    main = graphs[0]
    with torch.no_grad():
        if any(i.name.startswith("past_key_values") for i in main.inputs):
            if "past_sequence" not in main.fixed:
                for sizes in main.others:
                    _generate(found, main, module, sessions[main.file], sizes, atol, chunks)
        elif DECODER_WITH_PAST in by_file and "past_sequence" not in by_file[DECODER].fixed:
            _answer(found, by_file, sessions, module, atol)
    return found


def _sizes(graph: Graph) -> list[dict[str, int]]:
    """The sizes to compare at, once each: what the user fixed stays."""
    named = {d for i in graph.inputs for d in i.shape if isinstance(d, str)} - graph.fixed.keys()
    found: list[dict[str, int]] = []
    for sizes in graph.others:
        kept = {d: n for d, n in sizes.items() if d in named}
        if kept not in found:
            found.append(kept)
    return found


Runs = Callable[[Feeds], dict[str, Tensor]]


def _sessions(folder: Path, graphs: Sequence[Graph]) -> dict[str, Runs]:
    """How each graph is run; two decoders that became one file are its two branches."""
    if not (folder / MERGED).exists():
        return {g.file: Session(folder / g.file) for g in graphs}
    inside = Session(folder / MERGED)
    every = {i.name: i for g in graphs if g.file != ENCODER for i in g.inputs}

    def branch(*, past: bool) -> Runs:
        def run(feeds: Feeds) -> dict[str, Tensor]:
            batch = {"batch": len(feeds["input_ids"]), "past_sequence": 0, "encoder_sequence": 1}
            blank = {
                n: torch.zeros([batch[d] if isinstance(d, str) else d for d in i.shape])
                for n, i in every.items()
                if n not in feeds
            }
            return inside({**blank, **feeds, "use_cache_branch": torch.tensor([past])})

        return run

    return {
        ENCODER: Session(folder / ENCODER),
        DECODER: branch(past=False),
        DECODER_WITH_PAST: branch(past=True),
    }


def compare(
    into: Parity, graph: Graph, case: str, feeds: Feeds, expected: Feeds, got: Feeds,
    atol: float | None,
) -> None:  # fmt: skip
    for name, due in expected.items():
        is_, was = got[name], due
        if is_.shape != was.shape:
            into.unlike.append(
                f"{graph.file}: {name} at {case} is {tuple(is_.shape)}, not {tuple(was.shape)}"
            )
            continue
        if graph.compared is not None:
            is_, was = graph.compared(feeds, name, is_), graph.compared(feeds, name, was)
        into.figures.append(figure(graph.file, case, name, is_, was, atol))


def figure(
    file: str, case: str, output: str, got: Tensor, due: Tensor, atol: float | None
) -> Figure:
    """How far two tensors of one shape are apart."""
    a, b = got.double().reshape(-1), due.double().reshape(-1)
    if not a.numel():
        return Figure(file, case, output, 0.0, 1.0, atol)
    scale = max(1.0, float(b.abs().max()))
    difference = float((a - b).abs().max()) / scale
    difference = difference if difference == difference else float("inf")  # nan compares as equal
    norm = float(a.norm() * b.norm())
    cosine = float(a @ b) / norm if norm else float(not difference)
    allowed = 1e30 if atol is None else atol  # but for infinities and what is no number
    return Figure(file, case, output, difference, cosine, allowed if atol is not None else 1e30)


# ------------------------------------------------------------------------------- generation


def _generate(
    into: Parity, graph: Graph, module: Any, run: Runs, sizes: Mapping[str, int],
    atol: float | None, chunks: bool,
) -> None:  # fmt: skip
    """A padded prefill, two tokens at once, then single steps; against torch without a cache."""
    window = getattr(module.config.get_text_config(), "sliding_window", None) or 0
    prompt = sizes["sequence"] + (window if window <= WINDOW else 0)
    chunk = graph.fixed.get("sequence")
    batch = graph.fixed.get("batch", sizes["batch"])
    draw = torch.Generator().manual_seed(prompt)
    ids = next(i for i in graph.inputs if i.name == "input_ids")
    tokens = ids.make({"batch": batch, "sequence": prompt}, draw)
    mask = torch.ones_like(tokens)
    if batch > 1:
        mask[0, : min(3, prompt - 1)] = 0
    past = {
        i.name: torch.zeros([batch if d == "batch" else 0 if isinstance(d, str) else d
                             for d in i.shape])
        for i in graph.inputs if i.name.startswith("past_key_values")
    }  # fmt: skip
    steps = [chunk] * (prompt // chunk) if chunk else [prompt - 2, 2] if chunks else [prompt]
    said = f"batch={batch}, sequence={prompt}"
    done = 0
    for step in (*steps, *([1] * STEPS if chunk in (None, 1) else [])):
        while tokens.shape[1] < done + step:  # a greedy token of torch's
            tokens = torch.cat([tokens, torch.argmax(_whole(module, tokens, mask)[:, -1:], -1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        upto = done + step
        places = (mask[:, :upto].cumsum(-1) - 1).clip(0)
        got = run({
            "input_ids": tokens[:, done:upto], "attention_mask": mask[:, :upto],
            "position_ids": places[:, done:], **past,
        })  # fmt: skip
        due = _whole(module, tokens[:, :upto], mask[:, :upto])[:, done:]
        real = mask[:, done:upto].bool()
        case = f"prefill {said}" if not done else f"{said}, {step} on a past"
        into.figures.append(
            figure(graph.file, case, "logits", got["logits"][real], due[real], atol)
        )
        if atol is not None:
            _same_token(into, f"{graph.file}: {case}", got["logits"][:, -1], due[:, -1], atol)
        past = {n: got[n.replace("past_key_values", "present")] for n in past}
        done = upto


def _whole(module: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The logits of a sequence read at once, without a cache."""
    from loratools.exporting.graphs import takes

    more = (
        {"position_ids": (mask.cumsum(-1) - 1).clip(0)} if "position_ids" in takes(module) else {}
    )
    found: Tensor = module(input_ids=tokens, attention_mask=mask, use_cache=False, **more).logits
    return found


def _same_token(into: Parity, case: str, got: Tensor, due: Tensor, atol: float) -> None:
    """Greedy tokens are equal in every row; two that torch rates alike are."""
    for row, (mine, theirs) in enumerate(zip(got, due, strict=True)):
        a, b = int(mine.argmax()), int(theirs.argmax())
        into.tokens += 1
        apart = float(theirs[b] - theirs[a])
        if a != b and apart > 2 * atol * max(1.0, float(theirs.abs().max())):
            into.unlike.append(f"{case}: the greedy token of row {row} is {a}, torch's is {b}")


def _answer(
    into: Parity, graphs: Mapping[str, Graph], sessions: Mapping[str, Runs], module: Any,
    atol: float | None,
) -> None:  # fmt: skip
    """Encoder, first decoder and steps with the cache; against torch without a cache."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder = graphs[ENCODER]
    for seed, sizes in enumerate(_sizes(encoder)):
        feeds = encoder.feeds(sizes, seed + 7)
        state = sessions[ENCODER](feeds)["last_hidden_state"]
        true = encoder.run(feeds)["last_hidden_state"]
        seen = {"attention_mask": feeds["attention_mask"]} if "attention_mask" in feeds else {}
        start = getattr(module.config, "decoder_start_token_id", None) or 0
        tokens = torch.full((len(state), 1), start)
        held: dict[str, Tensor] = {}
        for step in range(STEPS):
            due = module(
                encoder_outputs=BaseModelOutput(last_hidden_state=true), **seen,
                decoder_input_ids=tokens, use_cache=False,
            ).logits[:, -1:]  # fmt: skip
            mask = {f"encoder_{n}": t for n, t in seen.items()}
            if not step:
                got = sessions[DECODER](
                    {"input_ids": tokens, "encoder_hidden_states": state, **mask}
                )
            else:
                got = sessions[DECODER_WITH_PAST]({"input_ids": tokens[:, -1:], **held, **mask})
            fresh = {
                k.replace("present", "past_key_values"): t for k, t in got.items() if "present" in k
            }
            held |= {k: t for k, t in fresh.items() if not step or ".decoder." in k}
            case = f"batch={len(state)}, token {step + 1}"
            into.figures.append(figure(DECODER, case, "logits", got["logits"], due, atol))
            if atol is not None:
                _same_token(into, f"{DECODER}: {case}", got["logits"][:, -1], due[:, -1], atol)
            tokens = torch.cat([tokens, due.argmax(-1)], 1)


def cases(found: Parity) -> Iterator[str]:
    """The cases of a proof, in order, once each."""
    yield from dict.fromkeys(f.case for f in found.figures)
