"""Bases for Eigen Attention: `dmc calibrate`.

After Saxena et al. (arXiv 2408.05646): the basis of keys comes from keys and queries together, before RoPE, that of
values from values, by the energy (squared singular values) along each direction over a text. A layer keeps as many
directions as its output needs: the ranks are the smallest, by one threshold of energy for keys and values, for which the
output of the layer's attention, after its projection, changes by no more than the budget in the relative Frobenius norm.

Bases are those of each key/value head, its queries those of the group that reads it; the rank is one for all heads of
a layer, the largest that any of them needs, so that pages of a layer are alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.codecs.eigenfile import Bases, EigenFile, write
from dmc.evaluation.windows import Windows
from dmc.functional import attention
from dmc.model import Decoder
from dmc.model.fingerprint import model_hash

Project = Callable[[Tensor], Tensor]  # attention's output ``[T, Hq D]`` → ``[T, hidden]``
_THRESHOLDS = 1 - 10.0 ** -torch.linspace(0.2, 7, 60, dtype=torch.float64)  # of energy, rising
_MEASURED = 2  # windows on which errors are measured


@dataclass
class _Seen:
    """What a layer gave: sums over all windows, and everything of the last few.

    Attributes:
        keys, values: fp64 ``[H, D, D]``, sums of outer products: of keys and queries together, and of values.
        last: (query, key, value, alpha, omega) of windows, query ``[Hq, T, D]``, alpha ``[H, T]``.
    """

    keys: Tensor | float
    values: Tensor | float
    last: list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Calibrated:
    """Ranks and errors of a layer: relative change of the output of its attention."""

    key_rank: int
    value_rank: int
    error: float


def calibrate(
    directory: Path, windows: Windows, out: Path, *, budget: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Calibrated]:
    """Makes the file for `EigenCodec`.

    Args:
        directory: Hugging Face directory of the model.
        windows: of a text; all their tokens are used.
        out: file to write.
        budget: largest error of a layer's output, above 0 and below 1.
        device, dtype: of the model.

    Returns:
        Of each layer.

    Raises:
        ValueError: if the budget is out of range, the windows are longer than the model's positions, or the model is not
            usable.
    """
    if not 0 < budget < 1:
        raise ValueError(f"budget must be above 0 and below 1, got {budget}: 0.02 lets a layer's output change by 2 %")
    model = Decoder.load(directory, dtype=dtype, device=device)
    length = windows.tokens.shape[1]
    if length > model.config.positions:
        raise ValueError(f"windows of {length} tokens are longer than the model's {model.config.positions} positions")
    seen = gather(model, windows.tokens)
    table = model.rope(torch.arange(length, device=model.device))
    layers, results = [], []
    for number, layer in enumerate(tqdm(seen, desc="ranks", unit="layer")):
        bases, found = _fit(layer, budget, table, lambda x, n=number: model.layers[n].output(x))
        layers.append(bases)
        results.append(found)
    notes = {
        "budget": str(budget),
        "text": windows.name,
        "text_hash": windows.text_hash,
        "tokens": str(windows.tokens.numel()),
        "errors": json.dumps([found.error for found in results]),
    }
    write(Path(out), EigenFile(model_hash(directory), model.rope.frequencies, model.rope.scaling, layers, notes))
    return results


@torch.no_grad()
def gather(model: Decoder, windows: Tensor) -> list[_Seen]:
    """Runs the model over windows ``[W, T]``, each from an empty cache, with its own decisions to merge if it makes any.

    One that evicts, or merges what leaves a window, is run in full: entries are then tokens as they were, or means of them,
    which are in the same space.
    """
    config = model.config
    merges = config.method == "dmc" and config.window is None
    shape = Shape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, model.dtype)
    cache = KVCache(shape, policy("dmc" if merges else "full"), codec("dense"), slots=1, device=model.device)
    seen = [_Seen(0.0, 0.0, []) for _ in range(config.num_hidden_layers)]
    nobody = torch.empty(0, dtype=torch.int64, device=model.device)
    for number, tokens in enumerate(tqdm(windows, desc="text", unit="window")):
        attend = cache.step(nobody, nobody, [(cache.prompt(), len(tokens))], model.rope)

        def record(layer: int, *parts: Tensor, attend=attend, number=number) -> Tensor:
            own = parts if merges else (*parts[:3], torch.zeros_like(parts[4]), torch.ones_like(parts[4]))
            _add(seen[layer], [part.transpose(0, 1) for part in own], keep=number >= len(windows) - _MEASURED)
            return attend(layer, *parts)

        model.hidden(tokens.to(model.device), record)
    return seen


def _add(seen: _Seen, parts: list[Tensor], *, keep: bool) -> None:
    query, key, value = (part.double() for part in parts[:3])
    grouped = query.unflatten(0, (len(key), -1)).flatten(1, 2)  # [H, G T, D]
    seen.keys = seen.keys + key.transpose(1, 2) @ key + grouped.transpose(1, 2) @ grouped
    seen.values = seen.values + value.transpose(1, 2) @ value
    if keep:
        seen.last.append(tuple(part.clone() for part in parts))


def directions(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of outer products ``[H, D, D]`` → (directions ``[H, D, D]``, in columns; energy share of the first r ``[H, D]``)."""
    values, vectors = torch.linalg.eigh(energy)
    values = values.flip(-1).clamp(min=0).cumsum(-1)
    return vectors.flip(-1), values / values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)


def _fit(layer: _Seen, budget: float, table: tuple[Tensor, Tensor], project: Project) -> tuple[Bases, Calibrated]:
    """The bases of the smallest ranks whose error is within the budget."""
    keys, key_share = directions(layer.keys)
    values, value_share = directions(layer.values)
    exact = [_output(parts, table, project) for parts in layer.last]
    size = sum(out.square().sum() for out in exact)

    def at(ranks: tuple[int, int]) -> tuple[Bases, float]:
        bases = Bases(keys[:, :, : ranks[0]], values[:, :, : ranks[1]])
        got = [_output(_reduced(parts, bases), table, project) for parts in layer.last]
        lost = sum((a - b).square().sum() for a, b in zip(got, exact, strict=True))
        return bases, float((lost / size).sqrt()) if size > 0 else 0.0

    choices = list(dict.fromkeys(_ranks(key_share, value_share)))
    low, high = 0, len(choices) - 1  # the last, all directions, loses nothing
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(choices[middle])[1] <= budget else (middle + 1, high)
    bases, error = at(choices[low])
    return bases, Calibrated(*choices[low], error)


def _ranks(keys: Tensor, values: Tensor) -> Iterator[tuple[int, int]]:
    """Ranks of keys and values for each threshold, rising; at the end all directions."""
    for threshold in _THRESHOLDS:
        yield tuple(int((share < threshold).sum(-1).max().clamp(max=share.shape[-1] - 1)) + 1 for share in (keys, values))
    yield keys.shape[-1], values.shape[-1]


def _reduced(parts: tuple[Tensor, ...], bases: Bases) -> tuple[Tensor, ...]:
    query, key, value, *decisions = parts
    key, value = (x @ basis.to(x) @ basis.to(x).transpose(1, 2) for x, basis in ((key, bases.keys), (value, bases.values)))
    return query, key, value, *decisions


def _output(parts: tuple[Tensor, ...], table: tuple[Tensor, Tensor], project: Project) -> Tensor:
    """Output of the layer's attention after its projection, fp32 ``[T, hidden]``."""
    query, key, value, alpha, omega = (part[None] for part in parts)
    out = attention(query, key, value, alpha, omega, rope=table)[0]
    return project(out.transpose(0, 1).flatten(1).to(query.dtype)).double()
