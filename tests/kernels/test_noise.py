"""The noise is a Logistic(0, 1) sample, and a function of where it is used alone."""

import math

import pytest
import torch

from dmc.kernels.decisions.noise import logistic

# Every argument at two values that differ by little, and numbers beyond 32 bits.
PLACES = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (2**32 + 1, 5, 3), (7, 10**6, 79)]


def draw(seed=0, step=0, layer=0, *, samples=16, heads=8, tokens=128):
    ranges = (x if isinstance(x, torch.Tensor) else torch.arange(x) for x in (samples, heads, tokens))
    return logistic(seed, step, layer, **dict(zip(("samples", "heads", "tokens"), ranges, strict=True)))


def kolmogorov_smirnov(x):
    """Largest distance between the empirical and the logistic distribution function, times sqrt(n)."""
    x = x.flatten().double().sort().values
    n = len(x)
    expected = 1 / (1 + (-x).exp())
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - expected).max(), (expected - steps[:-1]).max()).item()


@pytest.mark.parametrize("place", PLACES)
def test_it_is_logistic(place):
    x = draw(*place, samples=32, heads=8, tokens=256)  # 65,536 values
    assert x.shape == (32, 8, 256) and x.dtype == torch.float32 and x.isfinite().all()
    assert kolmogorov_smirnov(x) < 1.95  # exceeded once in a thousand by a perfect generator
    assert abs(x.mean()) < 4 * math.pi / math.sqrt(3 * x.numel())
    assert x.var().item() == pytest.approx(math.pi**2 / 3, rel=0.03)


def test_every_row_and_column_is_logistic():
    """No token, head or sequence has a distribution of its own."""
    x = draw(samples=64, heads=64, tokens=64)
    for dim in range(3):
        worst = max(kolmogorov_smirnov(part) for part in x.unbind(dim))  # 64 parts of 4,096 values each
        assert worst < 2.3


def test_it_is_finite_at_both_ends():
    assert draw(samples=128, heads=32, tokens=512).abs().max() < 17.5  # 23 bits: log(2^24) at most


def test_same_arguments_same_noise_whatever_else_is_drawn():
    first = draw(3, 4, 5)
    torch.manual_seed(99)
    torch.rand(10)
    assert torch.equal(first, draw(3, 4, 5))


@pytest.mark.parametrize("dim", range(3))
def test_a_slice_of_the_draw_is_the_draw_of_the_slice(dim):
    """Tensor ranks hold some heads, data ranks some sequences: each draws its own part of the same noise."""
    names = ("samples", "heads", "tokens")
    sizes = {"samples": 12, "heads": 12, "tokens": 12}
    whole = draw(5, 6, 7, **sizes)
    for part in (torch.arange(4), torch.arange(5, 12), torch.tensor([11, 0, 3])):
        assert torch.equal(draw(5, 6, 7, **(sizes | {names[dim]: part})), whole.index_select(dim, part))


def test_other_seeds_steps_and_layers_are_unrelated():
    draws = torch.stack([draw(*place, samples=8, heads=8, tokens=256).flatten() for place in PLACES])
    correlation = torch.corrcoef(draws.double()) - torch.eye(len(PLACES), dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(draws.shape[1])


@pytest.mark.parametrize("shift", [1, 2, 7])
@pytest.mark.parametrize("dim", range(3))
def test_neighbours_are_unrelated(dim, shift):
    x = draw(samples=40, heads=40, tokens=40)
    size = x.shape[dim] - shift
    pair = torch.stack([x.narrow(dim, 0, size).flatten(), x.narrow(dim, shift, size).flatten()]).double()
    assert abs(torch.corrcoef(pair)[0, 1]) < 4.5 / math.sqrt(pair.shape[1])


def test_samples_far_into_a_run_do_not_repeat():
    early, late = draw(samples=torch.arange(64)), draw(samples=torch.arange(64) + 10**9)
    assert len(torch.cat([early, late])[:, 0, 0].unique()) == 128
