"""Problems of prefill attention."""

import torch

from tests.kernels.conftest import DEVICE


def problem(tokens, counts, size, groups, *, first=0, dtype=torch.float32, seed=0):
    """A chunk of queries from position ``first``; rows with ``counts`` entries at random places before its end."""
    g = torch.Generator().manual_seed(seed)
    rows, most, end = len(counts), max(*counts, 1), first + tokens
    rand = lambda *s: torch.randn(*s, generator=g).to(DEVICE, dtype)  # noqa: E731
    entry_positions = torch.full((rows, most), end, dtype=torch.int32)
    for row, count in enumerate(counts):
        entry_positions[row, :count] = torch.randperm(end, generator=g)[:count].sort().values
    positions = torch.arange(first, end, dtype=torch.int32)
    return [
        rand(rows, groups, tokens, size),
        rand(rows, most, size),
        rand(rows, most, size),
        entry_positions.to(DEVICE),
        rand(rows, tokens, size),
        rand(rows, tokens, size),
        positions.to(DEVICE),
    ]
