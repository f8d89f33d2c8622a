"""The fused attention of DMS, and the band it is made of, against `dmc.functional_dms.attention` with every gradient."""

import pytest
import torch

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.kernels.attention.attend import dms_attention
from dmc.kernels.attention.band import band_attention
from tests.functional.reference import rope_tables
from tests.kernels.test_attention import problem


def run(attend, leaves, starts, tokens, window, dtype=torch.float32):
    inputs = {name: leaves[name].to(dtype) for name in ("query", "key", "value")}
    noise, logits = torch.zeros_like(leaves["logits"]), leaves["logits"]
    alpha, log_keep = fn.sample_alpha(logits, noise=noise), fn.sample_log_keep(logits, noise=noise)
    rope = rope_tables(tokens, leaves["key"].shape[-1], dtype=torch.float32)
    return attend(**inputs, alpha=alpha, window=window, log_keep=log_keep, rope=rope, starts=starts)


def check(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    wanted = [leaf for name, leaf in leaves.items() if name != "omega"]
    mine = torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True)
    others = torch.autograd.grad((theirs * weight).sum(), wanted, allow_unused=True)
    for a, b in zip(mine, others, strict=True):
        b = torch.zeros_like(a) if b is None else b
        a = torch.zeros_like(b) if a is None else a  # nothing is behind the band
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (9, 1), (63, 5), (200, 64), (200, 150), (64, 63), (64, 62), (40, 90)])
@pytest.mark.parametrize(("heads", "groups", "starts"), [(2, 2, False), (1, 3, True), (3, 1, True)])
def test_equals_the_reference_with_gradients(tokens, window, heads, groups, starts):
    leaves, begin = problem(tokens, heads=heads, groups=groups, starts=starts)
    check(run(dms_attention, leaves, begin, tokens, window), run(dms.attention, leaves, begin, tokens, window), leaves)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize(("tokens", "window"), [(16, 3), (57, 9), (57, 30)])
def test_spans_of_queries_see_what_they_see_in_the_whole(starts, tokens, window):
    """What context parallelism asks for: two distant runs of queries over all keys."""
    leaves, begin = problem(tokens, starts=starts)
    spans = [(tokens // 8, tokens // 4), (tokens - tokens // 4, tokens - tokens // 8)]
    rows = torch.cat([torch.arange(a, b) for a, b in spans])

    def parts(query, **others):
        return dms_attention(query[:, :, rows], **others, spans=spans)

    check(run(parts, leaves, begin, tokens, window), run(dms.attention, leaves, begin, tokens, window)[:, :, rows], leaves)


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_hard_extremes(kind):
    """Nothing and everything marked, with a bias of exactly 0 or -inf."""
    leaves, _ = problem(70)
    args = {k: leaves[k].detach() for k in ("query", "key", "value")} | {"alpha": torch.full((3, 2, 70), kind)}
    rope = rope_tables(70, 8, dtype=torch.float32)
    ours, theirs = (attend(**args, window=6, rope=rope) for attend in (dms_attention, dms.attention))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    leaves, _ = problem(90, seed=3)
    with torch.no_grad():
        leaves["query"] *= 300
    ours, theirs = run(dms_attention, leaves, None, 90, 7), run(dms.attention, leaves, None, 90, 7)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_reference_in_it(dtype):
    leaves, begin = problem(200, starts=True, logit_scale=1.0)
    exact = run(dms.attention, leaves, begin, 200, 20)
    error = (run(dms_attention, leaves, begin, 200, 20, dtype).float() - exact).abs().max()
    baseline = (run(dms.attention, leaves, begin, 200, 20, dtype).float() - exact).abs().max()  # rounded inputs alone
    assert error < 3 * baseline


# ------------------------------------------------------------------------------------------- the band alone


def banded(query, key, value, window, scale):
    rows, tokens = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    behind = torch.arange(tokens - rows, tokens)[:, None] - torch.arange(tokens)
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    scores = scores.masked_fill((behind < 0) | (behind > window), -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(groups, 1), scores.logsumexp(-1)


@pytest.mark.parametrize(("tokens", "rows", "window"), [(1, 1, 1), (7, 7, 2), (150, 150, 3), (150, 40, 80), (150, 149, 100)])
def test_the_band_and_its_gradients(tokens, rows, window):
    g = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, h, t, 4, generator=g, dtype=torch.float64, requires_grad=True)
        for h, t in ((6, rows), (2, tokens), (2, tokens))
    ]
    ours, theirs = band_attention(*leaves, window=window, scale=0.7), banded(*leaves, window, 0.7)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    totals = [sum((x * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in (ours, theirs)]
    grads = [torch.autograd.grad(total, leaves) for total in totals]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_grows_with_the_text_and_not_with_its_square():
    """Bytes that autograd keeps: four times the tokens, four times the bytes."""

    def kept(tokens):
        leaves, _ = problem(tokens, batch=1)
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(dms_attention, leaves, None, tokens, 16)
        return sum(size for size, _ in sizes.values())

    assert kept(512) < 4.3 * kept(128)
