"""Which optional libraries a run uses: transformer-engine for the linear layers, apex or it for the optimizer.

Nothing is needed but torch; what is installed is used by setting, and a run says at its start what it took.
None of the three could be run without a GPU: the choice is tested, the libraries' own code is not.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model: classes with megatron-core's constructor, and the name of their library."""

    column: type = ColumnParallelLinear
    row: type = RowParallelLinear
    name: str = "megatron-core"


def layers(choice: str) -> Layers:
    """The layers of ``run.transformer_engine``: ``never``, ``always``, or ``auto`` (where it is installed and there is a GPU).

    Raises:
        ValueError: if it is asked for and cannot be used here.
    """
    if choice == "never":
        return Layers()
    lacking = missing()
    if lacking is None:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return Layers(TEColumnParallelLinear, TERowParallelLinear, "transformer-engine")
    if choice == "always":
        raise ValueError(f"run.transformer_engine=always, but {lacking}: use auto or never")
    return Layers()


def missing() -> str | None:
    """Why transformer-engine cannot be used here; None if it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed (pip install transformer-engine[pytorch])"
    if not torch.cuda.is_available():
        return "there is no CUDA device, which transformer-engine needs"
    return None


def describe(choice: str) -> str:
    """What a run of ``run.transformer_engine`` = ``choice`` computes with, in a line."""
    adam = megatron_optimizer.Adam.__module__.split(".")[0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"on {device}: linear layers of {layers(choice).name}, Adam of {adam}, torch {torch.__version__}"
