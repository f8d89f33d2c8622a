"""Model and cache of an `LLM`, as settings that can be sent to another process and as what they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dmc.cache import Codec, KVCache, Policy, Shape
from dmc.cache.policies.gate import GatePolicy
from dmc.engine.memory import AUTO, automatic
from dmc.engine.runner import Runner
from dmc.model import Llama, Weights, read_config
from dmc.model.fitted_heads import FittedHeads
from dmc.model.group import Group
from dmc.model.key_bias import key_bias
from dmc.model.sharded import ShardedLlama


@dataclass(frozen=True)
class Parts:
    """What a model and its cache are made from.

    Attributes:
        path: Hugging Face directory.
        dtype: of the model.
        policy, codec: ready made; a list has a codec for each layer.
        cache: the other settings of `dmc.cache.KVCache`, but shape and device; ``memory`` may be "auto".
    """

    path: Path
    dtype: torch.dtype
    policy: Policy
    codec: Codec | list[Codec]
    cache: dict

    @property
    def automatic(self) -> bool:
        """True if the size of the page pool follows from the memory that the model leaves."""
        return self.cache["memory"] == AUTO

    def runner(self, device: torch.device, group: Group | None = None) -> Runner:
        """Loads the model, or with a group this rank's part of it, and makes the cache of its heads.

        Args:
            device: of both.
            group: of the ranks; None: this process has the whole model. With a group and an `automatic` size the caller bounds
                the caches, all alike, once every rank has its part.

        Raises:
            ValueError: if the directory or a setting is not usable.
        """
        config = read_config(self.path)
        heads = config.num_key_value_heads // (group.ranks if group else 1)
        shape = Shape(config.num_hidden_layers, heads, config.head_dim, self.dtype)
        settings = self.cache | ({"memory": None} if self.automatic else {})
        weights = Weights(self.path)
        part = {"rank": group.rank, "ranks": group.ranks} if group else {}
        bias = key_bias(config, weights, dtype=self.dtype, device=device, **part)
        cache = KVCache(shape, self.policy, self.codec, key_bias=bias, device=device, **settings)
        if group:
            sharded = ShardedLlama(config, weights, group=group, dtype=self.dtype, device=device)
            return Runner(self._decided(sharded, group.rank, group.ranks), cache)
        model = self._decided(Llama(config, weights, dtype=self.dtype, device=device))
        if self.automatic:
            cache.bound(automatic(device), tokens=config.positions)
        return Runner(model, cache)

    def _decided(self, model: Llama, rank: int = 0, ranks: int = 1) -> Llama:
        """The model, with the heads of fitted decisions if the policy has some."""
        if isinstance(self.policy, GatePolicy):
            work = torch.float64 if self.dtype == torch.float64 else torch.float32
            model.fitted = FittedHeads.of(
                self.policy.fitted, self.policy.threshold, dtype=work, device=model.device, rank=rank, ranks=ranks,
            )
        return model
