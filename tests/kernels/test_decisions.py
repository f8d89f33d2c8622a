"""The relaxed decisions in one pass, against their reference implementation, forward and backward."""

import pytest
import torch

from dmc.kernels.decisions import noise
from dmc.kernels.decisions.decide import Drawn, soft_decisions
from tests.kernels.conftest import DEVICE

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
SETTINGS = {"offset": 2.5, "temperature": 0.1}


def problem(batch, heads, tokens, *, seed=0, size=10.0, strided=False):
    """Logits of alpha and omega, apart or side by side in memory as a decision head leaves them; a mask; where noise is drawn."""
    g = torch.Generator().manual_seed(seed)
    both = torch.randn(batch, tokens, heads, 2, generator=g) * size
    both[..., 0] += SETTINGS["offset"]
    logits, weights = (both.to(DEVICE).permute(0, 2, 1, 3)[..., i] for i in range(2))
    if not strided:
        logits, weights = logits.contiguous(), weights.contiguous()
    kept = torch.rand(batch, 1, tokens, generator=g).to(DEVICE) < 0.1
    kept[..., 0] = True
    samples = torch.randint(2**40, (batch,), generator=g).to(DEVICE)
    return logits, weights, kept, Drawn(7, 123_456, 31, samples, 5, torch.arange(3, tokens + 3, device=DEVICE))


def both(logits, weights, kept, drawn, **settings):
    """Outputs and gradients of the kernels and of the reference implementation."""
    found = []
    for backend in ("triton", "reference"):
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (logits, weights)]
        made = soft_decisions(*leaves, kept, drawn, backend=backend, **SETTINGS | settings)
        outs = [x for x in (made.alpha, made.log_keep, made.omega) if x is not None]
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=g).to(DEVICE) for x in outs]
        grads = torch.autograd.grad(outs, [x for x in leaves if x is not None], upstream)
        found.append([*outs, made.soft_kept, made.hard_kept, *grads])
    return zip(*found, strict=True)


@pytest.mark.parametrize(("shape", "strided"), [((1, 1, 1), False), ((2, 3, 63), True), ((1, 2, 64), False), ((3, 2, 130), True)])
@pytest.mark.parametrize("omega", [True, False])
def test_as_the_twin(shape, strided, omega):
    logits, weights, kept, drawn = problem(*shape, strided=strided)
    for ours, theirs in both(logits, weights if omega else None, kept, drawn):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)  # a noise's last bit counts tenfold over the temperature


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_as_the_twin_on_a_gpu(tokens):
    for ours, theirs in both(*problem(2, 8, tokens, strided=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_extreme_logits():
    """Far out alpha is 0 or 1, log(1 - alpha) is exact, and nothing is infinite or NaN."""
    logits, weights, kept, drawn = problem(1, 2, 80, size=3000.0)
    outs = [ours for ours, _ in both(logits, weights, kept, drawn)]
    alpha, log_keep, omega, *_ = outs
    assert all(x.isfinite().all() for x in outs)
    assert ((alpha == 0) | (alpha == 1)).float().mean() > 0.9 and log_keep.min() < -10_000
    for ours, theirs in both(logits, weights, kept, drawn):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_the_noise_is_drawn_where_it_was():
    """Far from any decision log(1 - alpha) is the noise itself, over the temperature: equal to rounding."""
    logits, weights, kept, drawn = problem(2, 3, 70)
    logits = torch.full_like(logits, 50.0)
    made = soft_decisions(logits, weights, kept, drawn, offset=0.0, temperature=1.0, backend="triton")
    heads = torch.arange(5, 8, device=DEVICE)
    sample = noise.logistic(7, 123_456, 31, samples=drawn.samples, heads=heads, tokens=drawn.tokens)
    torch.testing.assert_close(-made.log_keep - 50, sample, rtol=0, atol=1e-5)
    other = soft_decisions(
        logits,
        weights,
        kept,
        Drawn(7, 123_456, 30, drawn.samples, 5, drawn.tokens),
        offset=0.0,
        temperature=1.0,
        backend="triton",
    )
    assert (other.log_keep - made.log_keep).abs().mean() > 1


def test_gradients_that_nobody_asked_for():
    """Of alpha alone, as DMS in hard tests; and a mask that is one row for all samples."""
    logits, weights, kept, drawn = problem(2, 2, 40)
    kept = kept[:1].expand(2, 1, 40)
    found = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        made = soft_decisions(leaf, None, kept, drawn, backend=backend, **SETTINGS)
        assert made.omega is None and not made.soft_kept.requires_grad
        found.append(torch.autograd.grad(made.alpha.sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)
