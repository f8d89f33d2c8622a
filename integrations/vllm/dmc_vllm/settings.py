"""What a model is served with: its configuration, and the settings ``additional_config={"dmc": {...}}`` of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dmc import hub
from dmc.cache import Codec, KVCache, Policy, Shape
from dmc.engine.llm import codec_for, policy_for
from dmc.model import ModelConfig, read_config
from dmc.model.key_bias import key_bias
from dmc.weights import Weights
from dmc_vllm.reservation import Reservation

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KNOWN = ("cap", "codec", "codec_settings")
"""Settings; `read` describes them."""
CODECS = ("dense", "int8", "tcq", "gear")
"""Codecs that are tested in vLLM."""
MARGIN = 0.05  # of the measured CR of a model that merges at once


@dataclass(frozen=True)
class Serving:
    """See the head of this file.

    Attributes:
        path: the model's directory.
        config: of the whole model.
        shape: of the cache.
        policy, codec: of the cache.
        reservation: what vLLM's scheduler reserves.
    """

    path: Path
    config: ModelConfig
    shape: Shape
    policy: Policy
    codec: Codec
    reservation: Reservation

    def cache(self, slots: int, device: torch.device | str = "cpu") -> KVCache:
        """An empty cache for so many sequences."""
        bias = None
        if self.codec.lossy:  # lossy codecs get keys without their bias
            bias = key_bias(self.config, Weights(self.path), dtype=self.shape.dtype, device=device)
        return KVCache(self.shape, self.policy, self.codec, slots=slots, key_bias=bias, device=device)


def read(vllm_config: VllmConfig) -> Serving:
    """The settings of an engine.

    ``additional_config["dmc"]`` may have:

        cap: tokens per reserved entry behind the window, at least 1. Default: the CR that the checkpoint reports, for models
            that merge at once less 5 %. The CR of a model with a window includes the window, so it has a margin already.
        codec: how full pages are stored, one of `CODECS`. Default: dense.
        codec_settings: of the codec, such as ``{"bits": 4}``.

    Raises:
        ValueError: if the model's directory or a setting cannot be used; one sentence.
    """
    given = (vllm_config.additional_config or {}).get("dmc", {})
    if not isinstance(given, dict):
        raise ValueError(f"additional_config has dmc={given!r}, which must be a JSON object such as {{\"cap\": 4}}")
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise ValueError(f"additional_config has an unknown setting dmc.{unknown[0]}; known: {', '.join(KNOWN)}")
    path = hub.located(vllm_config.model_config.model)
    config = read_config(path)
    if config.method is None:
        raise ValueError(f"{path} was not retrofitted, and dmc-vllm serves retrofitted models alone: use dmc serve")
    name, settings = given.get("codec", "dense"), given.get("codec_settings")
    if name not in CODECS:
        raise ValueError(f"codec={name!r} is not supported in vLLM; supported: {', '.join(CODECS)}")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"codec_settings={settings!r} must be a JSON object such as {{\"bits\": 4}}")
    policy, codec = policy_for(config, path, None, None), codec_for(name, settings, None, path)
    shape = Shape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, vllm_config.model_config.dtype)
    cache = KVCache(shape, policy, codec, slots=1)  # for the figures of its pages
    reservation = Reservation.of(
        heads=shape.layers * shape.heads, full_precision_pages=cache.full_precision_pages, page_size=cache.page_size,
        page_bytes=cache.page_bytes, window=policy.ring or 0, cap=_cap(given.get("cap"), config, path),
    )
    return Serving(path, config, shape, policy, codec, reservation)


def _cap(given: object, config: ModelConfig, path: Path) -> float:
    if given is None:
        if config.measured_cr is None:
            raise ValueError(f"{path} does not report its CR (dmc.measured_cr of config.json): set cap, such as 4")
        return max(1.0, config.measured_cr * (1 - MARGIN if config.window is None else 1))
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError(f"cap={given!r} must be a number of tokens per reserved entry, at least 1")
    return float(given)
