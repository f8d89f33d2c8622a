"""Fitted decisions with random heads: about as many tokens score above 0 as below."""

import torch
from safetensors.torch import save_file

from dmc.fitted import FittedDecisions


def random_decisions(*, layers=2, heads=2, hidden=32, window=5, sinks=2, ahead=True, model="none", seed=0):
    draw = torch.Generator().manual_seed(seed)
    arrival, late = torch.randn(2, layers, heads, hidden, generator=draw) / hidden**0.5
    return FittedDecisions(
        arrival,
        late if ahead else torch.zeros_like(late),
        torch.randn(layers, heads, generator=draw) / 4,
        window,
        sinks,
        torch.linspace(-2, 2, 100),
        model,
    )


def random_heads(path, layers, heads, hidden, seed=0):
    """A file of linear heads for policy kvzap, whose scores are about as often above 0 as below; its name."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(layers, heads, hidden, generator=draw) / hidden**0.5
    save_file({"weight": weight, "bias": torch.randn(layers, heads, generator=draw) / 4}, path)
    return str(path)
