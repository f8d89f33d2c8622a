"""What a model is served with: its configuration, and the settings ``additional_config={"dmc": {...}}`` of vLLM."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dmc import hub
from dmc.cache import Codec, KVCache, Policy, Shape
from dmc.cache.policies.gate import GatePolicy
from dmc.engine.llm import codec_for, policy_for
from dmc.model import ModelConfig, read_config
from dmc.model.fitted_heads import FittedHeads
from dmc.model.key_bias import key_bias
from dmc.model.sharded import shard_config
from dmc.weights import Weights
from dmc_vllm.reservation import Reservation

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KNOWN = ("cap", "codec", "codec_settings", "policy", "policy_settings", "decisions", "target_cr", "max_entries", "exact_dtype")
"""Settings; `read` describes them."""
CODECS = ("dense", "int8", "tcq", "gear")
"""Codecs that are tested in vLLM."""
POLICIES = ("dmc", "dms", "gate")
"""Policies that are tested in vLLM."""
EXAMPLES = {"codec_settings": '{"bits": 4}', "policy_settings": '{"merge": true}'}
MARGIN = 0.05  # of the measured CR of a model that merges at once


@dataclass(frozen=True)
class Serving:
    """See the head of this file.

    Attributes:
        path: the model's directory.
        config: of the whole model.
        ranks: among which tensor parallelism divides it.
        part: sizes of a rank's part (`dmc.model.sharded`).
        shape: of a rank's cache.
        policy, codec: of the cache.
        exact_dtype: see `dmc.cache.KVCache`.
        cap: tokens per reserved entry behind the window.
    """

    path: Path
    config: ModelConfig
    ranks: int
    part: ModelConfig
    shape: Shape
    policy: Policy
    codec: Codec
    exact_dtype: str | None
    cap: float

    @functools.cached_property
    def reservation(self) -> Reservation:
        """What vLLM's scheduler reserves, on each rank.

        Raises:
            ValueError: if these settings do not go together.
        """
        cache = self.cache(1, "cpu", 0)
        return Reservation.of(
            heads=self.shape.layers * self.shape.heads,
            full_precision_pages=cache.full_precision_pages,
            page_size=cache.page_size,
            page_bytes=cache.page_bytes,
            window=self.policy.ring or 0,
            sinks=self.policy.sinks,
            max_entries=self.policy.max_entries,
            cap=self.cap,
        )

    def cache(self, slots: int, device: torch.device | str, rank: int) -> KVCache:
        """An empty cache of a rank's heads, for so many sequences."""
        bias = None
        if self.codec.lossy:  # lossy codecs get keys without their bias
            place = {"dtype": self.shape.dtype, "device": device}
            bias = key_bias(self.config, Weights(self.path), rank=rank, ranks=self.ranks, **place)
        settings = {"exact_dtype": self.exact_dtype, "key_bias": bias, "device": device}
        return KVCache(self.shape, self.policy, self.codec, slots=slots, **settings)

    def fitted_heads(self, device: torch.device | str, rank: int) -> FittedHeads | None:
        """A rank's heads of fitted decisions, with which a model that was not retrofitted decides; None: it was retrofitted."""
        if not isinstance(self.policy, GatePolicy):
            return None
        place = {"dtype": torch.float32, "device": device}
        return FittedHeads.of(self.policy.fitted, self.policy.threshold, rank=rank, ranks=self.ranks, **place)


def given(vllm_config: VllmConfig) -> dict | None:
    """The settings of this plugin; None: vLLM got none.

    Raises:
        ValueError: if they are no JSON object.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or "dmc" not in additional:
        return None
    if not isinstance(additional["dmc"], dict):
        raise ValueError(f'additional_config has dmc={additional["dmc"]!r}, which must be a JSON object such as {{"cap": 4}}')
    return additional["dmc"]


def read(vllm_config: VllmConfig) -> Serving:
    """The settings of an engine.

    ``additional_config["dmc"]`` may have:

        cap: tokens per reserved entry behind the window, at least 1. Default: ``target_cr``, or the CR that the checkpoint
            reports, for models that merge at once less 5 %. A CR of a model with a window includes the window, so it has a margin
            already.
        codec: how full pages are stored, one of `CODECS`. Default: dense.
        codec_settings: of the codec, such as ``{"bits": 4}``.
        policy: one of `POLICIES`. Default: the method that the model was retrofitted with.
        policy_settings: of the policy, such as ``{"merge": true}``.
        decisions, target_cr: of policy gate, as `dmc.LLM` takes them: a file for this model, and the CR to reach.
        max_entries: as `dmc.LLM` takes it: largest number of entries of a head behind the window.
        exact_dtype: of entries outside encoded pages, as `dmc.cache.KVCache` takes it, such as "int8".

    Raises:
        ValueError: if the model's directory or a setting cannot be used, or the model cannot be divided among the ranks of
            tensor parallelism; one sentence.
    """
    settings = given(vllm_config) or {}
    unknown = sorted(set(settings) - set(KNOWN))
    if unknown:
        raise ValueError(f"additional_config has an unknown setting dmc.{unknown[0]}; known: {', '.join(KNOWN)}")
    path = hub.located(vllm_config.model_config.model)
    config, ranks = read_config(path), vllm_config.parallel_config.tensor_parallel_size
    part = shard_config(config, ranks)
    policy = _policy(settings, config, path)
    codec = codec_for(_name("codec", settings, CODECS) or "dense", _object("codec_settings", settings), None, path)
    shape = Shape(part.num_hidden_layers, part.num_key_value_heads, part.head_dim, vllm_config.model_config.dtype)
    exact = settings.get("exact_dtype")
    if exact is not None and not isinstance(exact, str):
        raise ValueError(f"exact_dtype={exact!r} must be a name such as bf16 or int8")
    cap = _cap(settings.get("cap"), policy, config, path)
    serving = Serving(path, config, ranks, part, shape, policy, codec, exact, cap)
    _ = serving.reservation  # computed here, so that what is wrong is said before the engine starts
    return serving


def _policy(settings: dict, config: ModelConfig, path: Path) -> Policy:
    name, decisions = _name("policy", settings, POLICIES), settings.get("decisions")
    if config.method is None and name != GatePolicy.name:
        raise ValueError(
            f"{path} was not retrofitted: give policy gate with decisions and target_cr in additional_config, or leave dmc out "
            "of additional_config, and vLLM serves the model with its own cache"
        )
    if decisions is not None and not isinstance(decisions, str):
        raise ValueError(f"decisions={decisions!r} must be the name of a file that `dmc calibrate MODEL --decisions` has made")
    return policy_for(
        config,
        path,
        name,
        _object("policy_settings", settings),
        decisions=decisions,
        target_cr=settings.get("target_cr"),
        max_entries=settings.get("max_entries"),
    )


def _name(setting: str, settings: dict, known: tuple[str, ...]) -> str | None:
    """A setting that is one of some names; None if it is not there."""
    name = settings.get(setting)
    if name is not None and name not in known:
        raise ValueError(f"{setting}={name!r} is not supported in vLLM; supported: {', '.join(known)}")
    return name


def _object(setting: str, settings: dict) -> dict | None:
    """A setting that is a JSON object; None if it is not there."""
    value = settings.get(setting)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{setting}={value!r} must be a JSON object such as {EXAMPLES[setting]}")
    return value


def _cap(cap: object, policy: Policy, config: ModelConfig, path: Path) -> float:
    if cap is None:
        expected = policy.likely_cr or config.measured_cr
        if expected is None:
            raise ValueError(f"{path} does not report its CR (dmc.measured_cr of config.json): set cap, such as 4")
        return max(1.0, expected * (1 - MARGIN if policy.ring is None else 1))
    if isinstance(cap, bool) or not isinstance(cap, int | float):
        raise ValueError(f"cap={cap!r} must be a number of tokens per reserved entry, at least 1")
    return float(cap)
