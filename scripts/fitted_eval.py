"""Quality of fitted decisions by dense masks: eviction and late merging, H2O in the same protocol.

    dmc calibrate checkpoints/base --decisions --text stdlib --out base.safetensors
    python scripts/fitted_eval.py checkpoints/base --decisions base.safetensors --cr 2 3 4 --out results.jsonl
    python scripts/fitted_eval.py checkpoints/base --how h2o --cr 2 3 4 --out results.jsonl

Each sequence runs through the model once, all queries at once: attention sees what a cache would hold at each query. CR is
tokens / entries at the end of a sequence, the window counted, over all layers and heads. KL is from the full model's
prediction to this one's, in nats per token: over all positions of a sequence, and over its last quarter. One row of JSON
per method and CR is appended to the output file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_TOP))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dmc.evaluation.blocks import attend_in_blocks  # noqa: E402
from dmc.evaluation.provenance import commit, hardware, model_hash, versions  # noqa: E402
from dmc.evaluation.sequences import STDLIB, Sequences, read_sequences  # noqa: E402
from dmc.fitted import FittedDecisions  # noqa: E402
from dmc.functional import attention, rotate  # noqa: E402
from dmc.model import Decoder  # noqa: E402

METHODS = ("evict", "merge", "h2o", "streaming", "random")
_FITTED = ("evict", "merge")


@dataclass
class Heads:
    """Inputs of one layer's attention on one sequence, fp32, before RoPE.

    Attributes:
        hidden: ``[T, hidden]``, inputs of the projections.
        query: ``[Hq, T, D]``.
        key, value: ``[H, T, D]``.
        rope: (cos, sin) ``[T, D]``.
        layer: index.
    """

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    rope: tuple[Tensor, Tensor]
    layer: int


@dataclass
class Counted:
    """Tokens and entries over all layers, heads and sequences."""

    tokens: int = 0
    entries: int = 0

    def add(self, kept: Tensor) -> None:
        """Takes a bool mask of entries ``[H, T]``."""
        self.tokens += kept.numel()
        self.entries += int(kept.sum())


Method = Callable[[Heads, Counted], Tensor]
"""One layer's attention on one sequence, ``[Hq, T, D]``; counts its entries."""


# ------------------------------------------------------------------------------------------- methods


def full(x: Heads, counted: Counted) -> Tensor:
    """Causal attention."""
    counted.add(torch.ones(x.value.shape[:2], dtype=torch.bool))
    return _masked(x, None, 0)


def evict(fitted: FittedDecisions, threshold: float) -> Method:
    """Tokens behind the window whose score is below the threshold are gone."""

    def attend(x: Heads, counted: Counted) -> Tensor:
        kept = fitted.scores(x.layer, x.hidden).T >= threshold
        counted.add(kept)
        return _masked(x, kept, fitted.window)

    return attend


def merge(fitted: FittedDecisions, threshold: float, power: float, *, protect: bool) -> Method:
    """Late merging: such tokens merge into the entry before them, weighted with exp(power · score).

    Args:
        protect: the first token after the sinks opens an entry, so that nothing merges into a sink.
    """

    def attend(x: Heads, counted: Counted) -> Tensor:
        scores = fitted.scores(x.layer, x.hidden).T
        kept = scores >= threshold
        if protect:
            kept[:, : fitted.sinks + 1] = True
        counted.add(kept)
        finite = scores.masked_fill(scores.isinf(), -math.inf)
        omega = torch.exp(power * (finite - finite.amax(-1, keepdim=True)).clamp(min=-25.0))  # at most 1
        omega = omega.masked_fill(scores.isinf(), 1.0)
        parts = (part[None] for part in (x.query, x.key, x.value, (~kept).float(), omega))
        return attention(*parts, window=fitted.window, rope=x.rope)[0]

    return attend


def random_eviction(fitted: FittedDecisions, cr: float) -> Method:
    """Eviction of random tokens outside the window and the sinks; the same in every run of the script."""
    generator = torch.Generator().manual_seed(0)

    def attend(x: Heads, counted: Counted) -> Tensor:
        heads, tokens = x.key.shape[:2]
        always = fitted.scores(x.layer, x.hidden).T.isinf()
        free = tokens - int(always[0].sum())
        share = (tokens / cr - (tokens - free)) / free
        draw = torch.rand(heads, tokens, generator=generator)
        kept = always | (draw < share)
        counted.add(kept)
        return _masked(x, kept, fitted.window)

    return attend


def streaming(cr: float, sinks: int = 4) -> Method:
    """StreamingLLM: the first tokens and a recent window, T / CR tokens in all."""

    def attend(x: Heads, counted: Counted) -> Tensor:
        tokens = x.key.shape[1]
        budget = max(sinks + 1, round(tokens / cr))
        place = torch.arange(tokens)
        counted.add(((place < sinks) | (place >= tokens - (budget - sinks))).expand(len(x.key), -1))
        return _masked(x, (place < sinks).expand(len(x.key), -1), budget - sinks - 1)

    return attend


def h2o(cr: float) -> Method:
    """H2O: T / CR tokens from the start, half of them recent, the others by the attention that they received so far."""

    def attend(x: Heads, counted: Counted) -> Tensor:
        heads, tokens = x.key.shape[:2]
        budget = max(2, round(tokens / cr))
        recent = budget // 2
        scores = _causal(x)
        alive, received = torch.zeros(heads, tokens, dtype=torch.bool), torch.zeros(heads, tokens)
        out = x.query.new_empty(*scores.shape[:3], x.query.shape[-1])
        every = torch.arange(heads)
        for i in range(tokens):
            alive[:, i] = True
            seen = scores[:, :, i, : i + 1].masked_fill(~alive[:, None, : i + 1], -math.inf).softmax(-1)
            out[:, :, i] = (seen[:, :, None] @ x.value[:, None, : i + 1]).squeeze(2)
            received[:, : i + 1] += seen.sum(1)
            if i >= budget:
                old = i + 1 - recent
                lowest = received[:, :old].masked_fill(~alive[:, :old], math.inf).argmin(-1)
                alive[every, lowest] = False
        counted.add(alive)
        return out.flatten(0, 1)

    return attend


def _causal(x: Heads) -> Tensor:
    """Scores ``[H, G, T, T]``."""
    query = rotate(x.query, x.rope).unflatten(0, (len(x.key), -1)) * x.query.shape[-1] ** -0.5
    later = torch.ones(x.key.shape[1], x.key.shape[1], dtype=torch.bool).triu(1)
    return (query @ rotate(x.key, x.rope)[:, None].mT).masked_fill_(later, -math.inf)


def _masked(x: Heads, kept: Tensor | None, window: int) -> Tensor:
    query, key = rotate(x.query, x.rope).unflatten(0, (len(x.key), -1)), rotate(x.key, x.rope)
    gone = None if kept is None else ~kept
    return attend_in_blocks(query, key, x.value, block=128, gone=gone, window=window).flatten(0, 1)


# ------------------------------------------------------------------------------------------- the measure


@torch.no_grad()
def forward(model: Decoder, tokens: Tensor, method: Method, counted: Counted) -> Tensor:
    """Last hidden states ``[T, hidden]`` of one sequence ``[T]``."""
    x, rope = model.embedding[tokens], model.rope(torch.arange(len(tokens)))
    for index in range(len(model.layers)):
        hidden = model.normed(x, index)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, *_: Tensor, hidden: Tensor = hidden) -> Tensor:
            parts = (part.float().transpose(0, 1) for part in (query, key, value))
            return method(Heads(hidden, *parts, rope, layer), counted).transpose(0, 1)

        x = model.block(x, index, attend)
    return model.finish(x, len(model.layers), attend)


def measure(model: Decoder, tokens: Tensor, method: Method, reference: list[Tensor] | None) -> tuple[dict, list[Tensor]]:
    """Figures of a method on sequences ``[N, T]``, and its last hidden states; ``reference`` are those of the full model."""
    counted, kept, losses, kls, tails = Counted(), [], [], [], []
    started = time.perf_counter()
    for number, row in enumerate(tokens):
        hidden = forward(model, row, method, counted)
        kept.append(hidden)
        logs = model.logits(hidden).log_softmax(-1)
        losses.append(F.nll_loss(logs[:-1], row[1:]).item())
        if reference is not None:
            base = model.logits(reference[number]).log_softmax(-1)
            kl = (base.exp() * (base - logs)).sum(-1)
            kls.append(kl.mean().item())
            tails.append(kl[-len(row) // 4 :].mean().item())
    figures = {"cr": round(counted.tokens / counted.entries, 3), "perplexity": round(math.exp(sum(losses) / len(losses)), 4)}
    if reference is not None:
        figures |= {
            "kl": round(sum(kls) / len(kls), 6),
            "kl_last_quarter": round(sum(tails) / len(tails), 6),
            "kl_last_quarter_of_each": [round(value, 5) for value in tails],
        }
    return figures | {"seconds": round(time.perf_counter() - started, 1)}, kept


def held_out(text: str, directory: str, length: int, count: int) -> Sequences:
    """Sequences of a text file; of "stdlib": those that training is evaluated on, each within one held-out document."""
    if text != STDLIB:
        return read_sequences(text, directory, length=length, count=count)
    parts = [path.read_bytes() for path in (Path(directory) / "tokenizer.json", *sorted((_TOP / "data").glob("*.py")))]
    key = hashlib.sha256(b"\0".join([sys.version.encode(), str((length, count)).encode(), *parts])).hexdigest()[:16]
    kept = Path("runs/data") / f"held-out-{key}.safetensors"
    if not kept.is_file():  # a minute of work
        from data import batches, tokens
        from data.stdlib import corpus_hash, documents, split

        _, mixture = tokens.corpora(STDLIB, "", tokens.load_tokenizer(directory), kept.parent)
        found = batches.Sequences(mixture, length).within_documents(count).tokens
        digest = corpus_hash(split(documents(tokens.STDLIB[STDLIB]))[1])
        save_file({"tokens": found}, str(kept), metadata={"text_hash": digest})
    with safe_open(kept, framework="pt") as file:
        return Sequences(file.get_tensor("tokens"), "stdlib, held out", file.metadata()["text_hash"])


def main(arguments: list[str] | None = None) -> int:
    """Measures and returns the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="Hugging Face directory of the model")
    parser.add_argument("--decisions", nargs="+", default=[], help="files of dmc calibrate --decisions (evict, merge, random)")
    parser.add_argument("--how", nargs="+", choices=METHODS, default=["evict"], help="methods (evict)")
    parser.add_argument("--cr", nargs="+", type=float, default=[2.0, 3.0, 4.0], help="target CRs (2 3 4)")
    parser.add_argument("--power", nargs="+", type=float, default=[1.0], help="omega = exp(power · score) of merge (1)")
    parser.add_argument("--share-sinks", action="store_true", help="merge: the token after the sinks may merge into the last one")
    parser.add_argument("--text", default=STDLIB, help="a UTF-8 file, .jsonl or .xz; stdlib: its held-out part (stdlib)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (1024)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences (16)")
    parser.add_argument("--note", default="", help="written into the rows, such as the question")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(f"fitted_eval: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if not options.decisions and any(how in (*_FITTED, "random") for how in options.how):
        raise ValueError(f"{' and '.join(options.how)} need --decisions FILE")
    plan = list(_plan(options))
    model = Decoder.load(options.directory, dtype=torch.float32)
    config = model.config
    for _, fitted, _ in plan:
        if fitted is not None:
            fitted.check(
                model_hash(options.directory),
                config.num_hidden_layers,
                config.num_key_value_heads,
                config.hidden_size,
                fitted.window,
            )
    text = held_out(options.text, options.directory, options.length, options.sequences)
    base, reference = measure(model, text.tokens, full, None)
    about = {
        "model": Path(options.directory).resolve().name,
        "model_hash": model_hash(options.directory),
        "text": text.name,
        "text_hash": text.text_hash,
        "sequences": len(text.tokens),
        "length": options.length,
        "base_perplexity": base["perplexity"],
    }
    made_with = {
        "command": shlex.join(["python", "scripts/fitted_eval.py", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware("cpu"),
        **versions(),
    }
    for row, _, method in tqdm(plan, desc="methods", disable=not sys.stderr.isatty()):
        figures, _ = measure(model, text.tokens, method, reference)
        with options.out.open("a") as file:
            file.write(json.dumps({"note": options.note} | about | row | figures | made_with) + "\n")
        print(json.dumps(row), figures["cr"], figures["perplexity"], figures["kl"], figures["kl_last_quarter"], flush=True)


def _plan(options: argparse.Namespace):  # noqa: ANN202
    """(settings of the row, decisions, method) of everything that is measured."""
    for how in options.how:
        if how in ("h2o", "streaming"):
            for cr in options.cr:
                yield {"how": how, "target_cr": cr}, None, {"h2o": h2o, "streaming": streaming}[how](cr)
            continue
        for path in map(Path, options.decisions):
            fitted = FittedDecisions.load(path)
            of_file = {
                "decisions": path.stem,
                "window": fitted.window,
                "sinks": fitted.sinks,
                "fitted_on": fitted.meta.get("text"),
                "fitted_tokens": fitted.meta.get("tokens"),
            }
            for cr in options.cr:
                threshold = fitted.threshold(cr, options.length)
                row = {"how": how, "target_cr": cr, **of_file}
                if how == "evict":
                    yield row, fitted, evict(fitted, threshold)
                elif how == "random":
                    yield row, fitted, random_eviction(fitted, cr)
                else:
                    for power in options.power:
                        yield (
                            row | {"power": power, "protect_sinks": not options.share_sinks},
                            fitted,
                            merge(fitted, threshold, power, protect=not options.share_sinks),
                        )


if __name__ == "__main__":
    sys.exit(main())
