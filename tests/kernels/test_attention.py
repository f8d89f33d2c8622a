"""The fused training attention against `dmc.functional.attention`: forward and every gradient."""

import pytest
import torch

from dmc import functional as fn
from dmc.kernels.attention.attend import dmc_attention, plain_attention
from tests.functional.reference import rope_tables


def problem(tokens, *, heads=2, groups=2, size=8, starts=False, logit_scale=3.0, seed=0, batch=3):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    begin = torch.zeros(batch, tokens, dtype=torch.bool)
    if starts:
        begin[0] = torch.rand(tokens, generator=g) < 0.1
        begin[-1, tokens // 2] = True
    leaves = dict(
        query=rand(batch, heads * groups, tokens, size),
        key=rand(batch, heads, tokens, size),
        value=rand(batch, heads, tokens, size),
        logits=rand(batch, heads, tokens) * logit_scale + 5,
        omega=torch.sigmoid(rand(batch, heads, tokens)),
    )
    return {k: v.requires_grad_() for k, v in leaves.items()}, begin if starts else None


def run(attend, leaves, starts, tokens, dtype=torch.float32):
    inputs = {k: v.to(dtype) for k, v in leaves.items() if k in ("query", "key", "value")}
    noise = torch.zeros_like(leaves["logits"])
    alpha = fn.sample_alpha(leaves["logits"], noise=noise)
    log_keep = fn.sample_log_keep(leaves["logits"], noise=noise)
    rope = rope_tables(tokens, leaves["key"].shape[-1], dtype=torch.float32)
    return attend(**inputs, alpha=alpha, omega=leaves["omega"], log_keep=log_keep, rope=rope, starts=starts)


@pytest.mark.parametrize("tokens", [1, 2, 63, 200])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (1, 3), (3, 1)])
def test_equals_the_reference_with_gradients(tokens, starts, heads, groups):
    leaves, begin = problem(tokens, heads=heads, groups=groups, starts=starts)
    ours, theirs = run(dmc_attention, leaves, begin, tokens), run(fn.attention, leaves, begin, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((ours * weight).sum(), list(leaves.values()))
    others = torch.autograd.grad((theirs * weight).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_hard_extremes(kind):
    """No merging and all merging, with a bias of exactly 0 or -inf."""
    leaves, _ = problem(40)
    alpha = torch.full_like(leaves["logits"], kind).detach()
    args = {k: leaves[k].detach() for k in ("query", "key", "value", "omega")}
    rope = rope_tables(40, 8, dtype=torch.float32)
    ours = dmc_attention(**args, alpha=alpha, rope=rope)
    torch.testing.assert_close(ours, fn.attention(**args, alpha=alpha, rope=rope), rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    """Scores near 1e3: the diagonal enters as a score, never through its own exponential."""
    leaves, _ = problem(50, seed=3)
    with torch.no_grad():
        leaves["query"] *= 300
    ours, theirs = run(dmc_attention, leaves, None, 50), run(fn.attention, leaves, None, 50)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_plain_attention_in_it(dtype):
    leaves, begin = problem(200, starts=True, logit_scale=1.0)
    exact = run(fn.attention, leaves, begin, 200)
    error = (run(dmc_attention, leaves, begin, 200, dtype).float() - exact).abs().max()
    baseline = (run(fn.attention, leaves, begin, 200, dtype).float() - exact).abs().max()  # rounded inputs alone
    assert error < 3 * baseline


def test_plain_attention_keeps_documents_apart():
    leaves, begin = problem(60, starts=True)
    args = {k: leaves[k].detach() for k in ("query", "key", "value")}
    rope = rope_tables(60, 8, dtype=torch.float32)
    zero = torch.zeros_like(leaves["omega"])
    expected = fn.attention(**args, alpha=zero, omega=zero + 1, rope=rope, starts=begin)
    torch.testing.assert_close(plain_attention(**args, rope=rope, starts=begin), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("tokens", [16, 57])
def test_spans_of_queries_see_what_they_see_in_the_whole(starts, tokens):
    """What context parallelism asks for: two distant runs of queries over all keys, with every gradient."""
    leaves, begin = problem(tokens, starts=starts)
    spans = [(tokens // 8, tokens // 4), (tokens - tokens // 4, tokens - tokens // 8)]
    rows = torch.cat([torch.arange(a, b) for a, b in spans])

    def parts(query, **others):
        return dmc_attention(query[:, :, rows], **others, spans=spans)

    ours, theirs = run(parts, leaves, begin, tokens), run(fn.attention, leaves, begin, tokens)[:, :, rows]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((ours * weight).sum(), list(leaves.values()))
    others = torch.autograd.grad((theirs * weight).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, mine, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()), msg=lambda m, n=name: f"{n}: {m}")
    args = {k: leaves[k].detach() for k in ("query", "key", "value")}
    rope = rope_tables(tokens, 8, dtype=torch.float32)
    whole = plain_attention(**args, rope=rope, starts=begin)[:, :, rows]
    args["query"] = args["query"][:, :, rows]
    torch.testing.assert_close(plain_attention(**args, rope=rope, starts=begin, spans=spans), whole, rtol=1e-4, atol=1e-5)
