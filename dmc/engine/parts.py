"""An engine as settings that can be sent to another process, and as what they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dmc.cache import Codec, KVCache, Policy, Shape
from dmc.cache.policies.gate import GatePolicy
from dmc.engine.core import Engine
from dmc.engine.memory import AUTO, automatic
from dmc.engine.ranks import Ranks
from dmc.engine.runner import Runner
from dmc.engine.scheduler import KEPT_PROMPTS
from dmc.engine.sharded_cache import ShardedCache
from dmc.model import Decoder, ModelConfig, read_config
from dmc.model.fitted_heads import FittedHeads
from dmc.model.key_bias import key_bias
from dmc.model.sharded import ShardedDecoder
from dmc.weights import Weights


@dataclass(frozen=True)
class Parts:
    """What an engine is made from.

    Attributes:
        path: Hugging Face directory.
        dtype: of the model.
        policy, codec: ready made; a list has a codec for each layer.
        max_batch, prefill_tokens: see `Engine`.
        cache: the other settings of `dmc.cache.KVCache`, but shape, slots and device; ``memory`` may be "auto".
    """

    path: Path
    dtype: torch.dtype
    policy: Policy
    codec: Codec | list[Codec]
    max_batch: int
    prefill_tokens: int
    cache: dict

    @property
    def automatic(self) -> bool:
        """True if the size of the page pool follows from the memory that the model leaves."""
        return self.cache["memory"] == AUTO

    def engine(self, device: torch.device, ranks: Ranks | None = None) -> Engine:
        """Loads the model, or this rank's part of it, and makes the cache of its heads.

        Args:
            device: of both.
            ranks: of a tensor-parallel engine; None: this process has the whole model. With ranks and an `automatic` size the
                caller bounds the caches, all alike, once every rank has its part.

        Raises:
            ValueError: if the directory or a setting is not usable.
        """
        runner = self._whole(device) if ranks is None else self._sharded(device, ranks)
        return Engine(runner, max_batch=self.max_batch, prefill_tokens=self.prefill_tokens, ranks=ranks)

    def _whole(self, device: torch.device) -> Runner:
        config, weights = read_config(self.path), Weights(self.path)
        bias = key_bias(config, weights, dtype=self.dtype, device=device)
        cache = KVCache(self._shape(config, 1), self.policy, self.codec, key_bias=bias, device=device, **self._settings())
        model = self._decided(Decoder(config, weights, dtype=self.dtype, device=device))
        if self.automatic:
            cache.bound(automatic(device), tokens=config.positions)
        return Runner(model, cache)

    def _sharded(self, device: torch.device, ranks: Ranks) -> Runner:
        config, weights, group = read_config(self.path), Weights(self.path), ranks.group
        part = {"rank": group.rank, "ranks": group.ranks}
        bias, shape = key_bias(config, weights, dtype=self.dtype, device=device, **part), self._shape(config, group.ranks)
        cache = ShardedCache(group, shape, self.policy, self.codec, key_bias=bias, device=device, **self._settings())
        model = self._decided(ShardedDecoder(config, weights, group=group, dtype=self.dtype, device=device), **part)
        return Runner(model, cache, group)

    def _shape(self, config: ModelConfig, ranks: int) -> Shape:
        return Shape(config.num_hidden_layers, config.num_key_value_heads // ranks, config.head_dim, self.dtype)

    def _settings(self) -> dict:
        return self.cache | {"slots": self.max_batch + KEPT_PROMPTS} | ({"memory": None} if self.automatic else {})

    def _decided(self, model: Decoder, rank: int = 0, ranks: int = 1) -> Decoder:
        """The model, with the heads of fitted decisions if the policy has some."""
        if isinstance(self.policy, GatePolicy):
            work = torch.float64 if self.dtype == torch.float64 else torch.float32
            model.fitted = FittedHeads.of(
                self.policy.fitted, self.policy.threshold, dtype=work, device=model.device, rank=rank, ranks=ranks
            )
        return model
