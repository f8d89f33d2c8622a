"""Late merging in `dmc.functional` against token loops in fp64 and against properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc import functional as fn
from tests.functional import late_reference as late
from tests.functional.reference import rope_tables
from tests.functional.test_functional import problems

WINDOWS = st.one_of(st.sampled_from([0, 1, 3]), st.integers(0, 60))


def attend(p, window, rotated):
    rope = rope_tables(p["key"].shape[2], p["key"].shape[3]) if rotated else None
    return fn.attention(**p, window=window, rope=rope)


@settings(max_examples=60, deadline=None)
@given(problems(max_tokens=40, kinds=("between",)), WINDOWS, st.booleans())
def test_soft_decisions_equal_the_loop(p, window, rotated):
    expected = late.late_loop(**p, window=window, rotated=rotated)
    torch.testing.assert_close(attend(p, window, rotated), expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(problems(max_tokens=50, kinds=("hard", "none", "all")), WINDOWS)
def test_hard_decisions_equal_the_cache(p, window):
    """Each document by itself: ring, accumulating entry and final entries give what attention gives, and as many entries."""
    out = attend(p, window, True)
    tokens = p["key"].shape[2]
    kept = (1 - p["alpha"].masked_fill(fn.undecided(p["starts"], window)[:, None], 0.0)).sum(-1)
    for row in range(len(out)):
        edges = [0, *(t for t in range(1, tokens) if p["starts"][row, t]), tokens]
        entries = torch.zeros(p["key"].shape[1])
        for first, stop in zip(edges[:-1], edges[1:], strict=True):
            # The loop counts positions from 0; scores depend on differences alone.
            part = {name: p[name][row, :, first:stop] for name in ("query", "key", "value", "alpha", "omega")}
            expected, lengths = late.late_cache(**part, window=window, rotated=True)
            torch.testing.assert_close(out[row, :, first:stop], expected, rtol=1e-8, atol=1e-10)
            entries += lengths
        assert torch.equal(kept[row].float(), entries)


@settings(max_examples=30, deadline=None)
@given(problems(max_tokens=30))
def test_a_window_that_covers_everything_is_plain_attention(p):
    """Nothing leaves a window of T - 1 tokens: decisions have no effect."""
    tokens = p["key"].shape[2]
    plain = fn.attention(**(p | {"alpha": torch.zeros_like(p["alpha"])}), rope=rope_tables(tokens, p["key"].shape[3]))
    for window in (tokens - 1, tokens, tokens + 7):
        torch.testing.assert_close(attend(p, window, True), plain, rtol=1e-10, atol=1e-12)
        assert fn.undecided(p["starts"], window).all()


@settings(max_examples=30, deadline=None)
@given(problems(max_tokens=30), WINDOWS)
def test_undecided_tokens_have_no_effect(p, window):
    fixed = fn.undecided(p["starts"], window)[:, None]
    other = p | {"alpha": p["alpha"].masked_fill(fixed, 0.5)}
    torch.testing.assert_close(attend(p, window, False), attend(other, window, False), rtol=0, atol=0)


def test_window_0_is_not_merging_at_once():
    """At once, a query sees its own token only inside its state; with window 0 it sees the token itself as well."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    alpha, omega = torch.ones(1, 1, 6, dtype=torch.float64), torch.ones(1, 1, 6, dtype=torch.float64)
    assert not torch.allclose(fn.attention(q, k, v, alpha, omega), fn.attention(q, k, v, alpha, omega, window=0))


@pytest.mark.parametrize("window", [0, 2, 20])
def test_gradients(window):
    g = torch.Generator().manual_seed(window)
    tokens, size = 9, 4
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, key, value, logits, weights = (
        draw(1, 4, tokens, size),
        draw(1, 2, tokens, size),
        draw(1, 2, tokens, size),
        draw(1, 2, tokens),
        draw(1, 2, tokens),
    )
    starts = torch.zeros(1, tokens, dtype=torch.bool)
    starts[0, 5] = True
    rope = rope_tables(tokens, size)

    def run(query, key, value, logits, weights):
        return fn.attention(query, key, value, logits.sigmoid(), weights.sigmoid(), window=window, rope=rope, starts=starts)

    assert torch.autograd.gradcheck(run, (query, key, value, logits, weights))


def test_a_negative_window_is_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="window must be None or at least 0, got -1"):
        fn.attention(x, x, x, x[..., 0], x[..., 0] + 1, window=-1)
