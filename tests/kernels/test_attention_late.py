"""The linear-memory attention of late merging against `dmc.functional.attention`, with every gradient."""

import pytest
import torch

from dmc import functional as fn
from dmc.kernels.attention.attend import late_attention
from tests.functional.reference import rope_tables
from tests.kernels.test_attention import problem


def run(attend, leaves, starts, tokens, window, dtype=torch.float32, **options):
    inputs = {name: leaves[name].to(dtype) for name in ("query", "key", "value")}
    noise, logits = torch.zeros_like(leaves["logits"]), leaves["logits"]
    alpha, log_keep = fn.sample_alpha(logits, noise=noise), fn.sample_log_keep(logits, noise=noise)
    if window is not None and starts is not None:
        alpha = alpha.masked_fill(fn.undecided(starts, window)[:, None], 0.0)
    rope = rope_tables(tokens, leaves["key"].shape[-1], dtype=torch.float32)
    return attend(
        **inputs, alpha=alpha, omega=leaves["omega"], window=window, log_keep=log_keep, rope=rope, starts=starts, **options
    )


def check(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    mine, others = (torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True) for out in (ours, theirs))
    for leaf, a, b in zip(leaves.values(), mine, others, strict=True):
        a, b = (torch.zeros_like(leaf) if grad is None else grad for grad in (a, b))  # nothing leaves the window
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(
    ("tokens", "window"), [(1, 0), (9, 0), (9, 1), (63, 5), (200, 64), (200, 150), (64, 62), (64, 61), (64, 63), (40, 90)]
)
@pytest.mark.parametrize(("heads", "groups", "starts"), [(2, 2, False), (1, 3, True), (3, 1, True)])
def test_equals_the_reference_with_gradients(tokens, window, heads, groups, starts):
    leaves, begin = problem(tokens, heads=heads, groups=groups, starts=starts)
    check(run(late_attention, leaves, begin, tokens, window), run(fn.attention, leaves, begin, tokens, window), leaves)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize(("tokens", "window"), [(16, 0), (16, 3), (57, 9), (57, 30)])
def test_spans_of_queries_see_what_they_see_in_the_whole(starts, tokens, window):
    """What context parallelism asks for: two distant runs of queries over all keys; the band crosses their borders."""
    leaves, begin = problem(tokens, starts=starts)
    spans = [(tokens // 8, tokens // 4), (tokens - tokens // 4, tokens - tokens // 8)]
    rows = torch.cat([torch.arange(a, b) for a, b in spans])

    def parts(query, **others):
        return late_attention(query[:, :, rows], **others, spans=spans)

    check(run(parts, leaves, begin, tokens, window), run(fn.attention, leaves, begin, tokens, window)[:, :, rows], leaves)


@pytest.mark.parametrize("kind", [0.0, 1.0])
@pytest.mark.parametrize("window", [0, 4])
def test_hard_extremes(kind, window):
    """All kept, and all merged into one entry: log(1 - alpha) of 0 and of -inf."""
    leaves, _ = problem(37)
    alpha = torch.full(leaves["logits"].shape, kind)
    rope = rope_tables(37, leaves["key"].shape[-1], dtype=torch.float32)
    inputs = {name: leaves[name] for name in ("query", "key", "value", "omega")}
    ours, theirs = (f(**inputs, alpha=alpha, window=window, rope=rope) for f in (late_attention, fn.attention))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_is_as_exact_as_its_dtype():
    """The error to fp32 is at most twice that of the reference in bf16 (its inputs are rounded alike)."""
    leaves, begin = problem(120, starts=True)
    exact = run(fn.attention, leaves, begin, 120, 16)
    error = (run(late_attention, leaves, begin, 120, 16, torch.bfloat16).float() - exact).abs().mean()
    rounding = (run(fn.attention, leaves, begin, 120, 16, torch.bfloat16).float() - exact).abs().mean()
    assert error < 2 * rounding


def test_memory_is_linear_in_the_length():
    """Bytes that autograd keeps, at four times the length."""

    def kept(tokens):
        leaves, _ = problem(tokens, heads=1, groups=1)
        total = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: total.add((x.data_ptr(), x.nbytes)) or x, lambda x: x):
            run(late_attention, leaves, None, tokens, 16)
        return sum(size for _, size in total)

    assert kept(2048) < 4.2 * kept(512)
