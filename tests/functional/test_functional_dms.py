"""`dmc.functional_dms` against a token loop in fp64 and against properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc import functional_dms as dms
from tests.functional.reference import evicting_cache, evicting_loop, rope_tables
from tests.functional.test_functional import problems


@settings(max_examples=40, deadline=None)
@given(problems(max_tokens=24, kinds=("between", "hard", "mixed", "none")), st.integers(0, 26), st.booleans())
def test_equals_the_loop(p, window, rotated):
    p.pop("omega")
    rope = rope_tables(*p["key"].shape[2:]) if rotated else None
    ours = dms.attention(**p, window=window, rope=rope)
    torch.testing.assert_close(ours, evicting_loop(**p, window=window, rotated=rotated), rtol=1e-9, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(problems(max_tokens=16, kinds=("between",)), st.integers(0, 8))
def test_gradients_equal_the_loops(p, window):
    leaves = [p[name].clone().requires_grad_() for name in ("query", "key", "value", "alpha")]
    weight = torch.randn(p["query"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = []
    for attend in (
        lambda *a: dms.attention(*a, window=window, starts=p["starts"]),
        lambda *a: evicting_loop(*a, p["starts"], window=window, rotated=False),
    ):
        grads.append(torch.autograd.grad((attend(*leaves) * weight).sum(), leaves, allow_unused=True))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-8, atol=1e-10)


def test_gradcheck():
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    alpha = (torch.rand(1, 2, 9, generator=g, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, 5] = True
    assert torch.autograd.gradcheck(
        lambda *a: dms.attention(*a, window=2, starts=starts, rope=rope_tables(9, 4)),
        (rand(1, 4, 9, 4), rand(1, 2, 9, 4), rand(1, 2, 9, 4), alpha),
    )


@settings(max_examples=25, deadline=None)
@given(problems(max_tokens=30, kinds=("hard",)), st.integers(0, 32))
def test_hard_decisions_are_a_cache_that_evicts(p, window):
    """Attention over a list of entries from which tokens are really removed, and its length."""
    ours = dms.attention(p["query"], p["key"], p["value"], p["alpha"], window=window)[0]
    out, lengths = evicting_cache(*(p[n][0] for n in ("query", "key", "value", "alpha")), window=window, rotated=False)
    torch.testing.assert_close(ours, out, rtol=1e-9, atol=1e-10)
    assert torch.equal(dms.cache_lengths(p["alpha"], window)[0], lengths)


def test_a_window_of_everything_is_causal_attention_and_none_sees_the_own_token_alone():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 7, 4, generator=g, dtype=torch.float64) for _ in range(3))
    gone = torch.ones(1, 2, 7, dtype=torch.float64)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(dms.attention(q, k, v, gone, window=6), plain)
    torch.testing.assert_close(dms.attention(q, k, v, gone, window=0), v)
    assert dms.cache_lengths(gone, 6).tolist() == [[6, 6]] and dms.cache_lengths(gone, 0).tolist() == [[0, 0]]


def test_key_bias_takes_the_exact_logarithm():
    alpha = torch.tensor([[[0.0, 0.5, 1.0]]])
    assert dms.key_bias(alpha).tolist() == [[[0.0, pytest.approx(math.log(0.5)), -math.inf]]]
    given = torch.tensor([[[-80.0, -1.0, -2.0]]])
    assert dms.key_bias(alpha, log_keep=given) is given


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"query": (1, 3, 5, 4)}, "multiple of key heads"),
        ({"alpha": (1, 2, 4)}, r"alpha \[B, H, T\]"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    shapes = {"query": (1, 4, 5, 4), "key": (1, 2, 5, 4), "value": (1, 2, 5, 4), "alpha": (1, 2, 5)}
    window = change.pop("window", 2)
    with pytest.raises(ValueError, match=words):
        dms.attention(**{name: torch.zeros(shape) for name, shape in (shapes | change).items()}, window=window)
