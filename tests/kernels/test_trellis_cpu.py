"""The trellis codes that the CPU kernels choose are those of PyTorch's form, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc.cache.codecs import trellis
from dmc.cache.codecs.tcq import TcqCodec
from dmc.kernels.backend import using
from dmc.kernels.formats.trellis import cpu as rotated_cpu
from dmc.kernels.formats.trellis import viterbi_cpu as trellis_cpu


def both(x, rate):
    parts = trellis.chunks(rate, x.shape[-1])
    with using("torch"):
        expected = trellis.choose(x, rate)
    return trellis_cpu.choose(x, parts, {bits: trellis.levels(bits) for _, bits in parts}), expected


@given(
    rate=st.sampled_from(trellis.RATES),
    length=st.integers(1, 80),
    rows=st.sampled_from([0, 1, 63, 64, 65, 200]),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_codes_are_the_same(rate, length, rows, seed, spread):
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * spread
    got, expected = both(x, rate)
    assert got.dtype == torch.uint8 and torch.equal(got, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_values_midway_between_levels_go_the_same_way(bits):
    levels = trellis.levels(bits)
    middles = torch.cat([(levels[step:] + levels[:-step]) / 2 for step in (1, 2, 4) if step < len(levels)])
    places = torch.randint(len(middles), (300, 24), generator=torch.Generator().manual_seed(bits))
    got, expected = both(middles[places], bits)
    assert torch.equal(got, expected)


def test_the_codes_are_the_cheapest_of_all_paths():
    """Against every path of a short vector, tried one by one in fp64."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    levels = trellis.levels(1).double()
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for path in range(16):
        u = [0, 0, *((path >> t) & 1 for t in range(4))]  # with 1 bit a code is its path: a subset has one level
        chosen = torch.stack([levels[2 * (u[t] ^ u[t - 2]) + u[t - 1]] for t in range(2, 6)])
        best = torch.minimum(best, (x.double() - chosen).square().sum(-1))
    got = trellis_cpu.choose(x, [(4, 1)], {1: trellis.levels(1)})
    cost = (x.double() - trellis.read(got, 1).double()).square().sum(-1)
    torch.testing.assert_close(cost, best, rtol=1e-6, atol=1e-6)


def test_threads_share_the_vectors(monkeypatch):
    monkeypatch.setattr(trellis_cpu, "_LEAST", 100)
    x = torch.randn(500, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got, expected = both(x, 3.25)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, expected)


def test_the_codec_uses_them(monkeypatch):
    calls = []
    real = rotated_cpu.encode
    monkeypatch.setattr(rotated_cpu, "encode", lambda *given, **named: (calls.append(1), real(*given, **named))[1])
    keys, values = torch.randn(2, 3, 32, 64)
    fields = TcqCodec().encode(keys, values).tensors
    assert len(calls) == 2
    with using("torch"):
        plain = TcqCodec().encode(keys, values).tensors
    assert len(calls) == 2 and all(torch.equal(fields[name], plain[name]) for name in plain)
