"""Rotary position tables of Llama: default, linear and llama3 scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Rope:
    """Positions → (cos, sin), computed in fp32 as Hugging Face does and kept for positions seen so far.

    Args:
        head_size: D.
        parameters: "rope_type" ("default", "linear" or "llama3"), "rope_theta" and what the type needs.
        dtype: of the tables, fp32 or fp64.
        device: of the tables.

    Raises:
        ValueError: if the type is another, or a parameter that it needs is missing.
    """

    def __init__(self, head_size: int, parameters: dict, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.frequencies = _frequencies(head_size, parameters).to(device)
        self.dtype = dtype
        self._tables = self._compute(64)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Int64 ``[...]`` → (cos, sin), each ``[..., D]`` in the half-split layout."""
        highest = int(positions.max())
        if highest >= self._tables[0].shape[0]:
            self._tables = self._compute(max(highest + 1, 2 * self._tables[0].shape[0]))
        cos, sin = self._tables
        return cos[positions], sin[positions]

    def _compute(self, positions: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(
            torch.arange(positions, dtype=torch.float32, device=self.frequencies.device), self.frequencies
        )
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _frequencies(head_size: int, parameters: dict) -> Tensor:
    kind = parameters["rope_type"]
    if kind not in _SCALINGS:
        raise ValueError(f"rope_type {kind!r} cannot be served; known: {', '.join(_SCALINGS)}")
    pairs = torch.arange(0, head_size, 2, dtype=torch.int64).float()
    frequencies = 1.0 / parameters["rope_theta"] ** (pairs / head_size)
    try:
        return _SCALINGS[kind](frequencies, parameters)
    except KeyError as error:
        raise ValueError(f"rope parameters of type {kind!r} lack {error.args[0]!r}") from error


def _linear(frequencies: Tensor, parameters: dict) -> Tensor:
    return frequencies / parameters["factor"]


def _llama3(frequencies: Tensor, parameters: dict) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


_SCALINGS = {"default": lambda frequencies, _: frequencies, "linear": _linear, "llama3": _llama3}
