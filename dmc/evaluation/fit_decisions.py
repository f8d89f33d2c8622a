"""Fits decision heads by ridge regression from forward passes alone: `dmc calibrate --decisions`.

Layer by layer: all sequences go through one block, which gives its inputs h and its attention; the regression of that
layer is solved; then the next block follows. So the memory is that of the hidden states of all sequences and of one
layer's statistics, and attention, computed in blocks of queries, takes memory linear in T.

Per key/value head the target of token t is ``log(floor + a_t)``, a_t the largest attention that t receives from any query
more than w tokens later, over the queries and the query heads of the group. The features are h_t, h_{t+w} and a constant.
With the target "repeat" these are the queries of a second copy of the sequence, which follows the first: what a model looks up to
write its context again (KVzip, arXiv 2505.23416; KVzap predicts such scores too), whatever a later question asks for. "both"
takes the larger of the two.

At last eviction by the heads runs on a few sequences, so that a threshold drops the share it promises (`fit_levels`).

After each layer the state is written next to the output file; the same command continues from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dmc import __version__
from dmc.evaluation.blocks import attend_in_blocks, mask_near
from dmc.evaluation.fit_levels import LEVELS, MEASURED, NotFiniteError, dropped_share, with_eviction
from dmc.evaluation.fit_state import FitState, fingerprint
from dmc.evaluation.moments import Moments
from dmc.evaluation.sequences import Sequences
from dmc.fitted import QUANTILES, FittedDecisions, interpolate, levels
from dmc.functional import rotate
from dmc.model import Decoder, read_config
from dmc.model.config import ModelConfig
from dmc.model.fingerprint import model_hash

FLOOR = 1e-5  # of the attention, before the logarithm
TARGETS = {
    "later": "queries more than {window} later",
    "repeat": "queries of a second copy",
    "both": "queries more than {window} later, of a second copy too",
}
"""Whose attention the regression predicts."""
_HELD_OUT = 8  # one sequence of so many measures R2 and is not used for the weights that are measured


@dataclass(frozen=True)
class FitSettings:
    """Settings of the regression.

    Attributes:
        window: w, at least 0.
        sinks: first tokens of a document, always kept, not fitted.
        look_ahead: also read h_{t+w}; otherwise h_t alone.
        ridge: added to the diagonal of the features' second moments, relative to its mean.
        min_queries: a token is used only if so many queries come later than its window; without effect with a second copy.
        target: of `TARGETS`. All but "later" run a sequence through the model twice in a row, as one of twice its length.
        block: queries whose attention is computed together; it changes memory and speed, not the result.
    """

    window: int = 64
    sinks: int = 4
    look_ahead: bool = True
    ridge: float = 1e-3
    min_queries: int = 64
    block: int = 256
    target: str = "later"

    def __post_init__(self) -> None:
        """Raises ValueError if a setting is out of range."""
        for name, least in (("window", 0), ("sinks", 0), ("min_queries", 1), ("block", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"ridge must be a positive number, got {self.ridge}")
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} must be one of {', '.join(TARGETS)}")

    @property
    def copies(self) -> int:
        """Copies of a sequence that the model reads."""
        return 1 if self.target == "later" else 2

    def fitted(self, length: int) -> slice:
        """Tokens of a sequence that the regression uses.

        Raises:
            ValueError: if there is none; the sentence says how long a sequence must be.
        """
        queries = self.min_queries if self.copies == 1 else 1
        tokens = slice(self.sinks, length - self.window - queries)
        if tokens.stop <= tokens.start:
            least = self.sinks + self.window + queries + 1
            raise ValueError(
                f"sequences of {length} tokens are too short for window {self.window}, {self.sinks} sinks and {queries} later "
                f"queries: they need at least {least} tokens"
            )
        return tokens


class Target(Protocol):
    """What the regression predicts, collected block by block of queries."""

    def add(self, attention: Tensor, first: int) -> None:
        """Takes attention ``[H, G, b, K]`` of queries ``first``, ``first + 1``, ... on the first K tokens."""

    def result(self) -> Tensor:
        """``[H, T]``, or ``[C, T]`` for any C columns."""


class LargestAttention:
    """``log(floor + largest attention)`` of every token from queries more than ``window`` later.

    Args:
        query: ``[H, G, T, D]``.
        window: w.
        floor: added to the attention.
        asking: attention of queries before this one does not count.
    """

    def __init__(self, query: Tensor, window: int, floor: float = FLOOR, asking: int = 0) -> None:
        self._largest = query.new_zeros(query.shape[0], query.shape[2])
        self._window, self._floor, self._asking = window, floor, asking

    def add(self, attention: Tensor, first: int) -> None:
        """See `Target`."""
        if (before := max(0, self._asking - first)) >= attention.shape[2]:
            return
        far = mask_near(attention[:, :, before:], first + before, self._window).amax((1, 2))
        seen = self._largest[:, : far.shape[1]]
        torch.maximum(seen, far, out=seen)

    def result(self) -> Tensor:
        """See `Target`."""
        return torch.log(self._largest + self._floor)


@torch.no_grad()
def fit_decisions(
    directory: str | Path,
    text: Sequences,
    settings: FitSettings,
    out: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    meta: dict | None = None,
) -> FittedDecisions:
    """Decision heads of a model, fitted on a text.

    Args:
        directory: Hugging Face directory of a plain model.
        text: sequences of tokens of its vocabulary.
        settings: of the regression.
        out: file to write. The state after each layer is in ``.NAME.state`` next to it: the same call continues from
            there, and it is deleted once the file is written.
        device, dtype: of the model; attention and statistics are in fp32, sums of statistics in fp64.
        meta: added to the file's.

    Raises:
        ValueError: if the model was retrofitted, the sequences are too short or too long, a forward pass gives NaN or
            infinity, or a file cannot be written.
    """
    config, digest = read_config(directory), model_hash(directory)
    if config.decision is not None:
        raise ValueError(f"{directory} holds a retrofitted model, which has its own decisions: give the base model")
    count, length = text.tokens.shape
    settings.fitted(length)
    if length * settings.copies > config.positions:
        twice = " read twice" if settings.copies > 1 else ""
        raise ValueError(f"sequences of {length} tokens{twice} are longer than the model's {config.positions} positions")
    model = Decoder.load(directory, dtype=dtype, device=device)
    state = None if out is None else out.with_name(f".{out.name}.state")
    key = fingerprint(digest, text.tokens, settings, dtype, torch.device(device).type)
    read = text.tokens.repeat(1, settings.copies)
    done, layers = FitState.start(state, key, model.embedding.cpu()[read]), config.num_hidden_layers
    measured = text.tokens[:: -(-count // MEASURED)]
    total, start = ((parts[0] * count + parts[1] * len(measured) * layers) for parts in ((layers, len(LEVELS)), done.steps))
    with tqdm(total=total, initial=start, desc="decisions", unit="block") as bar:
        try:
            for index in range(done.layers, layers):
                done.add(*_fit_layer(model, done.hidden, index, settings, bar))
                done.write(state)
            done.hidden = done.hidden[:0]  # not needed any more
            fitted = _decisions(done, text, settings, config, digest, meta or {})
            for level in LEVELS[len(done.dropped) :]:
                threshold = interpolate(level, fitted.quantiles)
                share = dropped_share(model, fitted, measured, threshold, block=settings.block, tick=lambda: bar.update(layers))
                done.dropped.append(share)
                done.write(state)
        except NotFiniteError:  # it would come again
            done.remove(state)
            raise
    pairs = [[level, round(share, 4)] for level, share in zip(LEVELS, done.dropped, strict=True)]
    fitted = replace(
        fitted, quantiles=with_eviction(fitted.quantiles, done.dropped), meta=fitted.meta | {"dropped_with_eviction": pairs}
    )
    if out is not None:
        fitted.save(out)
        done.remove(state)
    return fitted


def _decisions(
    done: FitState, text: Sequences, settings: FitSettings, config: ModelConfig, digest: str, meta: dict
) -> FittedDecisions:
    """Heads of all layers, with the quantiles of the full model's scores."""
    layers = config.num_hidden_layers
    heads, hidden = config.num_key_value_heads, config.hidden_size
    weights = torch.stack(done.weights).mT  # [L, H, F]
    late = weights[..., hidden:-1] if settings.look_ahead else torch.zeros(layers, heads, hidden)
    about = {
        "text": text.name,
        "text_hash": text.text_hash,
        "tokens": text.tokens.numel(),
        "length": text.tokens.shape[1],
        "target": f"log({FLOOR:g} + largest attention from {TARGETS[settings.target].format(window=settings.window)})",
        "look_ahead": settings.look_ahead,
        "ridge": settings.ridge,
        "min_queries": settings.min_queries,
        "r2": [round(value, 4) for value in done.r2],
        "version": __version__,
    }
    return FittedDecisions(
        weights[..., :hidden].contiguous(),
        late.contiguous(),
        weights[..., -1].contiguous(),
        settings.window,
        settings.sinks,
        quantiles(torch.cat([part.flatten() for part in done.scores])),
        digest,
        about | meta,
    )


def _fit_layer(
    model: Decoder, hidden: Tensor, index: int, settings: FitSettings, bar: tqdm
) -> tuple[Tensor, Tensor, float, Tensor]:
    """One layer on all sequences ``[N, T, hidden]``: weights ``[F, H]``, scores ``[N n, H]``, R2, the block's output.

    If there are two copies, T counts both; the regression and the scores are of the first one."""
    length = hidden.shape[1] // settings.copies
    tokens, after = settings.fitted(length), torch.empty_like(hidden)
    parts: list[Moments | None] = [None, None]  # for the weights that R2 is measured of, and for measuring it
    for number, x in enumerate(hidden):
        after[number], features, target = _observe(model, x, index, settings)
        moments = Moments.of(features[tokens], target[:, tokens].T)
        held_out = number % _HELD_OUT == _HELD_OUT - 1
        parts[held_out] = moments if parts[held_out] is None else parts[held_out] + moments
        bar.update()
    most, rest = parts
    r2 = (rest or most).r2(most.ridge(settings.ridge)).mean()
    weights = (most + rest if rest else most).ridge(settings.ridge).float()
    scored = slice(settings.sinks, length - settings.window - 1)
    scores = [features_of(model, x[:length], index, settings)[scored] @ weights for x in hidden]
    return weights.cpu(), torch.cat(scores).cpu(), float(r2), after


def _observe(model: Decoder, x: Tensor, index: int, settings: FitSettings) -> tuple[Tensor, Tensor, Tensor]:
    """One block on one sequence ``[T, hidden]``: its output (on the CPU), features ``[T, F]``, target ``[H, T]``."""
    found = []

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor, *__: Tensor) -> Tensor:
        rope = model.rope(torch.arange(len(x), device=model.device))
        query, key, value = (part.float().transpose(0, 1) for part in (query, key, value))
        query = rotate(query, rope).unflatten(0, (key.shape[0], -1))
        target = LargestAttention(query, settings.window, asking=len(x) // 2 if settings.target == "repeat" else 0)
        out = attend_in_blocks(query, rotate(key, rope), value, block=settings.block, see=target.add)
        found.append(target.result())
        return out.flatten(0, 1).transpose(0, 1).to(model.dtype)

    x = x.to(model.device)
    after = model.block(x, index, attend)
    if not after.isfinite().all():
        raise NotFiniteError(f"layer {index} of the model gives NaN or infinity on the text: check its weights, or use fp32")
    return after.cpu(), features_of(model, x, index, settings), found[0]


def features_of(model: Decoder, x: Tensor, index: int, settings: FitSettings) -> Tensor:
    """``[h_t, h_{t+w}, 1]`` of one sequence, fp32 ``[T, F]``; 0 where there is no token t + w."""
    hidden = model.normed(x.to(model.device), index).float()
    parts = [hidden, hidden.new_ones(len(hidden), 1)]
    if settings.look_ahead:
        parts.insert(1, F.pad(hidden[settings.window :], (0, 0, 0, settings.window)))
    return torch.cat(parts, -1)


def quantiles(scores: Tensor) -> Tensor:
    """`QUANTILES` quantiles, linear between order statistics; `torch.quantile` stops at 16 million elements."""
    ordered = scores.sort().values
    place = levels(QUANTILES) * (len(ordered) - 1)
    low = place.floor().long().clamp(max=max(0, len(ordered) - 2))
    left, right = ordered[low].double(), ordered[(low + 1).clamp(max=len(ordered) - 1)].double()
    return torch.lerp(left, right, place - low).float().cummax(0).values
