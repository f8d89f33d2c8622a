"""What the tests of Triton kernels share: a device, poisoned memory, and the measure of an error."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


@pytest.fixture
def poison(monkeypatch):
    """Memory that kernels are given to write to holds NaN (floats) or a large number: what they miss is seen."""

    def poisoned(allocate):
        def run(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 101)

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def assert_close_enough(names, ours, plain, exact, *, factor=2.0, floor=1e-6):
    """Each of ``ours`` is at most ``factor`` times as far from ``exact`` as ``plain`` is, up to rounding (``floor``).

    Distances are root mean squares; ``exact`` is fp64, ``plain`` the same computation in plain PyTorch in the dtype
    under test.
    """
    for name, a, b, e in zip(names, ours, plain, exact, strict=True):
        assert a.isfinite().all(), f"{name}: not finite"
        size = e.square().mean().sqrt().item()
        mine, theirs = ((x.double() - e).square().mean().sqrt().item() for x in (a, b))
        allowed = factor * theirs + floor * max(size, 1)
        assert mine <= allowed, f"{name}: error {mine:.2e}, plain PyTorch's {theirs:.2e}, size {size:.2e}"
