"""Pages that the CPU kernels make of entries are those of PyTorch's form, bit for bit."""

import pytest
import torch

from dmc.cache.codecs import trellis
from dmc.cache.codecs.rotated import ROTATIONS, Rotated
from dmc.kernels.backend import using
from dmc.kernels.formats.trellis import cpu as rotated_cpu


def check(x, codec):
    with using("torch"):
        theirs = codec.encode(x)
    ours = codec.encode(x)
    assert ours.keys() == theirs.keys()
    for name, field in theirs.items():
        assert ours[name].dtype == field.dtype and torch.equal(ours[name], field), (name, codec)


def entries(pages, count, size, seed, spread=1.0):
    x = torch.randn(*pages, count, size, generator=torch.Generator().manual_seed(seed)) * spread
    x[..., 0] += 4 * spread  # as keys are: a channel with a mean far from 0
    return x


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("count, size", [(32, 64), (16, 128), (1, 7), (5, 20), (64, 96), (100, 12), (128, 80)])
def test_the_same_pages(count, size, mean, rotation):
    for seed, rate in enumerate((1, 2.5, 3.25, 4.5, 7.75, 8)):
        check(entries((3, 2), count, size, seed, (1.0, 1e-3, 1e4)[seed % 3]), Rotated(rate, mean, rotation=rotation, seed=seed))


@pytest.mark.parametrize("rate", trellis.RATES)
def test_every_rate(rate):
    check(entries((5,), 32, 64, 1), Rotated(rate, True))


@pytest.mark.parametrize("mean", [False, True])
def test_zeros_and_extremes(mean):
    x = entries((7,), 32, 64, 2)
    x[0], x[1, 5], x[2, :, 3] = 0.0, 0.0, 0.0
    x[3] *= 1e37
    x[4] *= 1e-40
    x[5] = 1.0
    x[6, 9] *= 1e6
    codec = Rotated(3.5, mean)
    check(x, codec)
    assert codec.decode(codec.encode(x), 32, 64).isfinite().all()


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_heads_of_one_number(rotation, seed):
    """Whose rotation is a sign."""
    x, codec = entries((2,), 16, 1, seed), Rotated(8, False, rotation=rotation, seed=seed)
    torch.testing.assert_close(codec.decode(codec.encode(x), 16, 1), x, rtol=0.1, atol=0.05)
    check(x, codec)


def test_no_pages_other_dtypes_and_strides():
    codec = Rotated(4, True)
    check(torch.empty(0, 32, 64), codec)
    x = entries((4,), 64, 32, 3)
    check(x.transpose(1, 2), codec)
    assert torch.equal(codec.encode(x.transpose(1, 2))["codes"], codec.encode(x.transpose(1, 2).double())["codes"])


def test_numbers_that_are_none_end_in_their_own_page():
    codec, x = Rotated(4, True), entries((5,), 32, 64, 4)
    expected = codec.encode(x)
    x[2, 3, 5], x[3, 1, 1] = torch.nan, torch.inf
    got = codec.encode(x)
    for name in expected:
        assert torch.equal(got[name][[0, 1, 4]], expected[name][[0, 1, 4]])


@pytest.mark.parametrize("count", [16, 32, 100])
def test_a_page_is_the_same_alone_and_by_threads(count, monkeypatch):
    monkeypatch.setattr(rotated_cpu, "_LEAST", 100)
    codec, x = Rotated(3.5, True), entries((13,), count, 64, 5)
    whole, before = codec.encode(x), torch.get_num_threads()
    for n in range(13):
        assert all(torch.equal(field[0], whole[name][n]) for name, field in codec.encode(x[n : n + 1]).items())
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(field, whole[name]) for name, field in codec.encode(x).items())
    finally:
        torch.set_num_threads(before)
