"""Decision heads fitted in other ways than `dmc calibrate --decisions` does, for docs/results/fitted.md.

    python scripts/fitted_variants.py collect checkpoints/base --text stdlib --out runs/fitted/stdlib.pt
    python scripts/fitted_variants.py make runs/fitted/stdlib.pt --out runs/fitted/variants
    python scripts/fitted_eval.py checkpoints/base --decisions runs/fitted/variants/*.safetensors --out results.jsonl

`collect` runs the model over a text once and keeps the sums of the regression for all targets at once, and inputs of the
heads on some sequences. `make` solves the regressions, in seconds, and writes one decisions file per variant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dmc.evaluation.blocks import attend_in_blocks, mask_near  # noqa: E402
from dmc.evaluation.fit_decisions import FitSettings, features_of, quantiles  # noqa: E402
from dmc.evaluation.moments import Moments  # noqa: E402
from dmc.evaluation.sequences import read_sequences  # noqa: E402
from dmc.fitted import FittedDecisions  # noqa: E402
from dmc.functional import rotate  # noqa: E402
from dmc.model import Decoder  # noqa: E402
from dmc.model.fingerprint import model_hash  # noqa: E402

FLOORS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
TARGETS = (*(f"max-floor-{floor:g}" for floor in FLOORS), "sum", "mean", "value", "output", "output-relative")
_STEPS = (6, 12, 25, 50, 100)  # sequences whose sums are kept, for the number of tokens
_SAMPLED = 16  # sequences whose features are kept, for quantiles


class Targets:
    """All targets at once; see `dmc.evaluation.fit_decisions.Target`.

    Args:
        query: ``[H, G, T, D]``; value: ``[H, T, D]``.
        output: ``[H, G, D, hidden]``, the part of the output projection that reads each query head.
        residual: ``[T, hidden]``, the block's input.
        window: w.
        asking: attention of queries before this one does not count.
    """

    def __init__(self, query: Tensor, value: Tensor, output: Tensor, residual: Tensor, window: int, asking: int = 0) -> None:
        self._window, self._value, self._asking = window, value, asking
        heads, tokens = value.shape[:2]
        self._gram = output @ output.mT  # [H, G, D, D]
        self._length = residual.norm(dim=-1)
        self._norm = (torch.einsum("htd,hgde,hte->hgt", value, self._gram, value)).clamp(min=0).sqrt()  # of each value
        names = ("largest", "sum", "value", "output", "relative")
        self._seen = {name: torch.zeros(heads, tokens) for name in names}

    def add(self, attention: Tensor, first: int) -> None:
        """Takes attention ``[H, G, b, K]`` of queries from ``first`` on."""
        far = mask_near(attention, first, self._window)
        tokens = far.shape[-1]
        if not tokens or first < self._asking:
            return
        seen = {name: part[:, :tokens] for name, part in self._seen.items()}
        _raise(seen["largest"], far.amax((1, 2)))
        seen["sum"] += far.sum((1, 2))
        _raise(seen["value"], (far.amax(2) * self._norm[..., :tokens]).amax(1))
        # Without token t the output changes by p / (1 - p) (o - v_t); its length after the output projection.
        out = attention @ self._value[:, None, : attention.shape[-1]]  # [H, G, b, D]
        projected = out @ self._gram
        square = (out * projected).sum(-1, keepdim=True) - 2 * projected @ self._value[:, None, :tokens].mT
        change = (square + self._norm[..., None, :tokens].square()).clamp(min=0).sqrt()
        change *= far / (1 - far).clamp(min=1e-4)
        _raise(seen["output"], change.amax((1, 2)))
        change /= self._length[first : first + attention.shape[2], None]
        _raise(seen["relative"], change.amax((1, 2)))

    def result(self) -> Tensor:
        """``[targets · H, T]`` in the order of `TARGETS`."""
        seen = self._seen
        tokens = seen["sum"].shape[-1]
        later = (tokens - 1 - self._window - torch.arange(tokens)).clamp(min=1)
        parts = [torch.log(seen["largest"] + floor) for floor in FLOORS]
        parts += [torch.log(seen["sum"] + 1e-5), torch.log(seen["sum"] / later + 1e-7), torch.log(seen["value"] + 1e-5)]
        return torch.cat([*parts, torch.log(seen["output"] + 1e-5), torch.log(seen["relative"] + 1e-6)])


def _raise(seen: Tensor, new: Tensor) -> None:
    torch.maximum(seen, new, out=seen)


@torch.no_grad()
def collect(
    directory: str,
    text: str,
    settings: FitSettings,
    length: int,
    count: int,
    *,
    under: FittedDecisions | None = None,
    cr: float = 4.0,
    repeat: bool = False,
) -> dict:
    """Sums after 6, 12, 25, ... sequences, per layer, and features ``[S, n, F]`` of the last sequences.

    Args:
        under: the model evicts by these decisions at ``cr``; the targets are those of the attention to all tokens.
        repeat: a sequence is half as much text, twice; targets are the attention that the first copy gets from the second.
    """
    found = read_sequences(text, directory, length=length // 2 if repeat else length, count=count)
    if repeat:
        found = replace(found, tokens=found.tokens.repeat(1, 2))
    model, tokens = Decoder.load(directory, dtype=torch.float32), settings.fitted(length)
    asking = length // 2 if repeat else 0
    if repeat:
        tokens = slice(tokens.start, asking - settings.window)
        settings = replace(settings, block=asking)
    rope = model.rope(torch.arange(length))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # so that fewer are of the whole text as well
    states, steps = list(model.embedding[found.tokens[order]]), sorted({min(step, count) for step in _STEPS})
    moments, sampled = [], []
    bar = tqdm(total=len(model.layers) * count, desc=f"collect {found.name}", disable=not sys.stderr.isatty())
    for index, layer in enumerate(model.layers):
        total, kept, features = None, [], []
        for number, x in enumerate(states):
            result = []
            gone = None if under is None else under.scores(index, model.normed(x, index)).T < under.threshold(cr, length)

            def attend(
                _: int, query: Tensor, key: Tensor, value: Tensor, *__: Tensor, x=x, layer=layer, result=result, gone=gone
            ) -> Tensor:
                query, key, value = (part.transpose(0, 1) for part in (query, key, value))
                query = rotate(query, rope).unflatten(0, (len(key), -1))
                output = layer.output.dense().T.unflatten(0, (*query.shape[:2], -1))
                target = Targets(query, value, output, x, settings.window, asking)
                out = attend_in_blocks(
                    query, rotate(key, rope), value, block=settings.block, see=target.add, gone=gone, window=settings.window
                )
                result.append(target.result())
                return out.flatten(0, 1).transpose(0, 1)

            inputs = features_of(model, x, index, settings)
            states[number] = model.block(x, index, attend)
            new = Moments.of(inputs[tokens], result[0][:, tokens].T)
            total = new if total is None else total + new
            if number + 1 in steps:
                kept.append(total)
            if number >= count - _SAMPLED:
                features.append(inputs[settings.sinks : length - settings.window - 1, : model.config.hidden_size * 2].half())
            bar.update()
        moments.append(kept)
        sampled.append(torch.stack(features))
    config = model.config
    return {
        "steps": steps,
        "moments": moments,
        "sampled": sampled,
        "heads": config.num_key_value_heads,
        "length": length,
        "hidden": config.hidden_size,
        "settings": settings,
        "model": model_hash(directory),
        "text": found.name,
        "text_hash": found.text_hash,
        "targets": TARGETS,
    }


# ------------------------------------------------------------------------------------------- variants


def solved(
    data: dict, *, target: str = "max-floor-1e-05", step: int = -1, ridge: float = 1e-3, use: str = "both", scaled: bool = False
) -> list[Tensor]:
    """Weights ``[F, H]`` of each layer, ``[h_t, h_{t+w}, 1]``; 0 for features that are not used.

    Args:
        use: "both", "arrival" or "late".
        scaled: the penalty of each feature is relative to its own second moment, not to their mean.
    """
    first, hidden, heads = data["targets"].index(target) * data["heads"], data["hidden"], data["heads"]
    places = torch.arange(2 * hidden + 1)
    rows, found = {"both": places, "arrival": torch.cat([places[:hidden], places[-1:]]), "late": places[hidden:]}[use], []
    for layer in data["moments"]:
        moments = layer[step]
        part = Moments(moments.xx[rows][:, rows], moments.xy[rows, first : first + heads], moments.yy[first : first + heads])
        if scaled:
            size = part.xx.diagonal().sqrt().clamp(min=1e-12)
            same = Moments(part.xx / size / size[:, None], part.xy / size[:, None], part.yy)
            weights = same.ridge(ridge) / size[:, None]
        else:
            weights = part.ridge(ridge)
        whole = torch.zeros(2 * hidden + 1, heads, dtype=torch.float64)
        whole[rows] = weights
        found.append(whole.float())
    return found


def decisions(
    data: dict, weights: list[Tensor], *, budgets: str = "global", cr: float = 4.0, sinks: int | None = None, **meta: object
) -> FittedDecisions:
    """A decisions file; per-head and per-layer budgets are those of one CR and folded into the bias."""
    settings: FitSettings = data["settings"]
    hidden = data["hidden"]
    stacked = torch.stack(weights).mT.clone()  # [L, H, F]
    scores = torch.stack(
        [(x.flatten(0, 1).float() @ w[:-1] + w[-1]).T for x, w in zip(data["sampled"], weights, strict=True)]
    )  # [L, H, n]
    if budgets != "global":
        always = settings.window + 1 + settings.sinks
        share = (data["length"] / cr - always) / (data["length"] - always)
        if budgets == "head":
            shift = scores.quantile(1 - share, dim=-1)
        else:
            shift = scores.flatten(1).quantile(1 - share, dim=-1)[:, None].expand(scores.shape[:2])
        stacked[..., -1] -= shift
        scores = scores - shift[..., None]
    return FittedDecisions(
        stacked[..., :hidden].contiguous(),
        stacked[..., hidden:-1].contiguous(),
        stacked[..., -1].contiguous(),
        settings.window,
        settings.sinks if sinks is None else sinks,
        quantiles(scores.flatten()),
        data["model"],
        {"text": data["text"], "text_hash": data["text_hash"], **meta},
    )


def variants(data: dict) -> Iterator[tuple[str, FittedDecisions]]:
    """(name, decisions) of everything that is tried; "default" is what the command does."""

    def made(tokens: int = data["steps"][-1], **how: object) -> FittedDecisions:
        return decisions(data, solved(data, **how), tokens=tokens * data["length"], variant={k: str(v) for k, v in how.items()})

    if TARGETS[1] in data["targets"]:
        yield "default", made()
    for target in data["targets"]:
        if target != "max-floor-1e-05":
            yield f"target-{target}", made(target=target)
    if TARGETS[1] not in data["targets"]:
        return
    for ridge in (1e-5, 1e-4, 1e-2, 1e-1):
        yield f"ridge-{ridge:g}", made(ridge=ridge)
    for ridge in (1e-3, 1e-2, 1e-1):
        yield f"ridge-scaled-{ridge:g}", made(ridge=ridge, scaled=True)
    for number, step in enumerate(data["steps"][:-1]):
        yield f"sequences-{step}", made(tokens=step, step=number)
    for use in ("arrival", "late"):
        yield f"features-{use}", made(use=use)
    for budgets in ("head", "layer"):
        yield f"budgets-{budgets}", decisions(data, solved(data), budgets=budgets)
    for sinks in (0, 1, 16):
        yield f"sinks-{sinks}", replace(made(), sinks=sinks)


def main() -> None:
    """Runs `collect` or `make`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("collect")
    first.add_argument("directory")
    first.add_argument("--text", required=True)
    first.add_argument("--length", type=int, default=1024)
    first.add_argument("--sequences", type=int, default=100)
    first.add_argument("--window", type=int, default=64)
    first.add_argument("--under", type=Path, help="decisions by which the model evicts meanwhile")
    first.add_argument("--cr", type=float, default=4.0, help="CR of --under (4)")
    first.add_argument("--repeat", action="store_true", help="targets from a second copy of the text")
    second = commands.add_parser("make")
    second.add_argument("file", type=Path)
    for one in (first, second):
        one.add_argument("--out", type=Path, required=True)
    second.add_argument("--only", nargs="+", help="names of variants, or their beginnings")
    second.add_argument("--prefix", default="", help="before the names of the files")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.command == "collect":
        settings = FitSettings(window=options.window)
        under = None if options.under is None else FittedDecisions.load(options.under)
        data = collect(
            options.directory,
            options.text,
            settings,
            options.length,
            options.sequences,
            under=under,
            cr=options.cr,
            repeat=options.repeat,
        )
        torch.save(data, options.out)
        return
    options.out.mkdir(exist_ok=True)
    for name, fitted in variants(torch.load(options.file, weights_only=False)):
        if options.only is None or name.startswith(tuple(options.only)):
            fitted.save(options.out / f"{options.prefix}{name}.safetensors")
            print(options.prefix + name)


if __name__ == "__main__":
    main()
