"""A rank's part of a decoder: whole heads of attention, columns of the MLP, rows of the vocabulary.

Each rank holds Hq / ranks query heads and H / ranks key/value heads with their rows of the q, k and v projections and
their columns of the output projection, and as many rows of gate and up and columns of down; so a block costs two sums
over ranks, after the output projection and after down (Megatron-LM, arXiv 1909.08053). Merging decisions are a head's own
and need none. Embedding and head are cut by vocabulary: one more sum at the beginning, and a gather of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.model.config import ModelConfig
from dmc.model.decoder import Decoder
from dmc.model.group import Group
from dmc.model.linear import Linear
from dmc.weights import Weights

_ROWS = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "q_proj.bias",
    "k_proj.bias",
    "v_proj.bias",
    "gate_proj.bias",
    "up_proj.bias",
)
_COLUMNS = ("o_proj.weight", "down_proj.weight")
_ONCE = ("o_proj.bias", "down_proj.bias")  # added after the all-reduce, hence by one of them
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def check_split(config: ModelConfig, ranks: int) -> None:
    """Refuses a number of ranks that the model cannot be cut into.

    Raises:
        ValueError: if ``ranks`` is below 1, or does not divide the key/value heads or the MLP.
    """
    heads, inner = config.num_key_value_heads, config.intermediate_size
    if ranks < 1:
        raise ValueError(f"tensor_parallel must be at least 1, got {ranks}")
    if heads % ranks:
        fine = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0 and inner % n == 0)
        raise ValueError(
            f"tensor_parallel {ranks} does not divide the model's {heads} key/value heads, and a head's cache is never cut; "
            f"possible: {fine}"
        )
    if inner % ranks:
        raise ValueError(f"tensor_parallel {ranks} does not divide the model's intermediate_size of {inner}")


def shard_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """Sizes of one rank's part; the vocabulary stays whole.

    Raises:
        ValueError: see `check_split`.
    """
    check_split(config, ranks)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // ranks,
        num_key_value_heads=config.num_key_value_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )


class ShardedDecoder(Decoder):
    """`Decoder` on one of several ranks; `hidden` gives the same on all ranks, rank 0 alone has the `logits`.

    Args:
        config: of the whole model.
        weights: of the whole model; only this rank's part is read.
        group: of the ranks.
        dtype, device: as for `Decoder`.

    Raises:
        ValueError: as for `Decoder`, or if the model cannot be cut so.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, *, group: Group, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.group = group
        local, rows = shard_config(config, group.ranks), -(-config.vocab_size // group.ranks)
        part = ShardWeights(weights, group.rank, group.ranks, config.vocab_size, logits=config.logits_per_head)
        super().__init__(replace(local, vocab_size=rows), part, dtype=dtype, device=device)
        self.config, self.part = config, local
        self.embedding = _Embedding(self.embedding, group)
        for layer in self.layers:
            layer.output, layer.down = _Summed(layer.output, group), _Summed(layer.down, group)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `Decoder.logits`; None on ranks other than 0, which only compute their part of the vocabulary."""
        parts = self.group.gather(super().logits(hidden))
        return None if parts is None else torch.cat(parts, dim=-1)[..., : self.config.vocab_size]


class ShardWeights:
    """A rank's part of `Weights`, under the same names and by the same method.

    Args:
        weights: of the whole model.
        rank, ranks: which part of how many.
        vocabulary: tokens of the whole model.
        logits: rows of the decision head for each key/value head; see `ModelConfig.logits_per_head`.
    """

    def __init__(self, weights: Weights, rank: int, ranks: int, vocabulary: int, *, logits: int = 2) -> None:
        self.directory = weights.directory
        self._weights, self._rank, self._ranks, self._vocabulary, self._logits = weights, rank, ranks, vocabulary, logits

    def __iter__(self) -> Iterator[str]:
        """The names of the whole model."""
        return iter(self._weights)

    def __len__(self) -> int:
        """How many tensors the whole model has."""
        return len(self._weights)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """This rank's part of a tensor, which must have ``shape``.

        Raises:
            ValueError: see `Weights.get`.
        """
        rank, ranks = self._rank, self._ranks
        if name.endswith(_VOCABULARY):
            rows, columns = shape
            which = slice(min(rank * rows, self._vocabulary), min((rank + 1) * rows, self._vocabulary))
            part = self._weights.part(name, (self._vocabulary, columns), 0, which)
            return F.pad(part, (0, 0, 0, rows - len(part)))
        if name.endswith(_ROWS):
            return self._weights.part(name, (shape[0] * ranks, *shape[1:]), 0, _nth(rank, shape[0]))
        if name.endswith(_COLUMNS):
            return self._weights.part(name, (shape[0], shape[1] * ranks), 1, _nth(rank, shape[1]))
        if name.endswith(("decision.weight", "decision.bias")):  # rows of one kind for all heads, then of the next kind
            heads, whole = shape[0] // self._logits, (shape[0] * ranks, *shape[1:])
            return torch.cat(
                [self._weights.part(name, whole, 0, _nth(kind * ranks + rank, heads)) for kind in range(self._logits)]
            )
        tensor = self._weights.get(name, shape)
        return torch.zeros_like(tensor) if rank and name.endswith(_ONCE) else tensor


@dataclass
class _Summed:
    """A linear map of inputs that are cut over ranks."""

    linear: Linear
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.sum(self.linear(x))


@dataclass
class _Embedding:
    """Rows of the vocabulary, cut over ranks."""

    weight: Tensor
    group: Group

    def __getitem__(self, tokens: Tensor) -> Tensor:
        local = tokens - self.group.rank * len(self.weight)
        here = (local >= 0) & (local < len(self.weight))
        return self.group.sum(self.weight[local.where(here, 0)].masked_fill(~here[:, None], 0))


def _nth(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)
