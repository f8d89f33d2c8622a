"""Rotary position tables: frequencies and attention factor from transformers, one table for all of dmc.

The serving model, training and the eigen codec look positions up in a `Rope`. What the rotary settings of a config.json
mean is decided by transformers alone (`LlamaRotaryEmbedding`, which is that of every family here); the exported model code
calls the same class.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

_START = 64  # positions of the first table


@dataclass(frozen=True)
class RopeSettings:
    """The rotary embedding of a model, as transformers computes it for sequences of up to `positions` tokens.

    Attributes:
        rope_type: name of the scaling method, "default" if there is none.
        frequencies: D / 2 inverse frequencies, exact values of fp32.
        scaling: attention factor (yarn, longrope); cos and sin are multiplied by it.
        positions: tokens of the longest sequence that these frequencies are right for.
        fixed: True if longer sequences keep the frequencies; False for dynamic and longrope, which change those of all
            tokens of a longer sequence.
    """

    rope_type: str
    frequencies: tuple[float, ...]
    scaling: float
    positions: int
    fixed: bool

    @property
    def why_limited(self) -> str:
        """Why a longer sequence is rejected, to go behind an error message; empty if `fixed`."""
        if self.fixed:
            return ""
        return (
            f" (rope_type {self.rope_type!r} gives all tokens of a longer sequence other frequencies, and the keys in the "
            "cache are already rotated)"
        )


def settings_of(config: PreTrainedConfig) -> RopeSettings:
    """The rotary settings of a model's configuration.

    Raises:
        ValueError: if transformers' Llama cannot compute with them; one sentence.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = copy.deepcopy(config)  # transformers writes defaults into it
    parameters = config.rope_parameters
    kind = parameters.get("rope_type")
    known = ["default", *sorted(ROPE_INIT_FUNCTIONS)]
    if kind not in known:
        raise ValueError(f"rope_type {kind!r}: known are {', '.join(known)}, one for all layers")
    try:
        rotary = LlamaRotaryEmbedding(config)
        frequencies, scaling = rotary.inv_freq.float().cpu(), float(rotary.attention_scaling)
    except KeyError as error:
        raise ValueError(f"the rotary settings of rope_type {kind!r} lack {error.args[0]!r}") from None
    except (ArithmeticError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"transformers cannot compute rope_type {kind!r} of {parameters}: {_said(error)}") from None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 2 * len(frequencies) != size:
        raise ValueError(
            f"rope_type {kind!r} rotates {2 * len(frequencies)} of the {size} dimensions of a head "
            f"(partial_rotary_factor {parameters.get('partial_rotary_factor')}), which transformers' Llama cannot run: "
            "only rope_type 'proportional' rotates a part of a Llama's head"
        )
    if not (bool(frequencies.isfinite().all()) and 0 < scaling < float("inf")):
        raise ValueError(f"rope_type {kind!r} of {parameters} gives frequencies or an attention factor that are not finite")
    positions = config.max_position_embeddings
    if kind == "longrope":
        positions = min(positions, config.rope_parameters["original_max_position_embeddings"])
    return RopeSettings(kind, tuple(frequencies.tolist()), scaling, positions, kind not in ("dynamic", "longrope"))


def _said(error: Exception) -> str:
    """An error's text in one line; a KeyError's without the quotes that `str` puts around it."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


class Rope:
    """Positions → (cos, sin), computed in fp32 as transformers does; the table grows with the positions asked for.

    Args:
        frequencies: D / 2 inverse frequencies.
        scaling: cos and sin are multiplied by it.
        limit: positions from this one on raise ValueError; None for no limit.
        dtype: of the tables, fp32 or fp64.
        device: of the tables; they follow the positions if those are on another.
    """

    def __init__(
        self,
        frequencies: Sequence[float] | Tensor,
        scaling: float = 1.0,
        *,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.frequencies = torch.as_tensor(frequencies, dtype=torch.float32, device=device)
        self.scaling, self.limit, self.dtype = scaling, limit, dtype
        self._tables = self._compute(_START)

    @classmethod
    def of(cls, settings: RopeSettings, *, dtype: torch.dtype, device: torch.device | str) -> Rope:
        """The table of some settings."""
        limit = None if settings.fixed else settings.positions
        return cls(settings.frequencies, settings.scaling, limit=limit, dtype=dtype, device=device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Int64 ``[...]`` → (cos, sin), each ``[..., D]`` in the half-split layout.

        Raises:
            ValueError: if a position is at or above `limit`.
        """
        highest = int(positions.max()) if positions.numel() else 0
        if self.limit is not None and highest >= self.limit:
            raise ValueError(f"position {highest} has other frequencies: these hold for {self.limit} positions")
        if positions.device != self.frequencies.device:
            self.frequencies = self.frequencies.to(positions.device)
            self._tables = tuple(table.to(positions.device) for table in self._tables)
        if highest >= len(self._tables[0]):
            self._tables = self._compute(max(highest + 1, 2 * len(self._tables[0])))
        cos, sin = self._tables
        return cos[positions], sin[positions]

    def inverse(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, but the tables that undo the rotation: rotated back, and divided by the scaling of both."""
        cos, sin = self(positions)
        return cos / self.scaling**2, -sin / self.scaling**2

    def _compute(self, positions: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(positions, dtype=torch.float32, device=self.frequencies.device)
        angles = torch.outer(places, self.frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(self.dtype), (angles.sin() * self.scaling).to(self.dtype)
