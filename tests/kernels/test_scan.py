"""The Triton scan of eq. 9 against its reference implementation and fp64: forward and every gradient."""

import pytest
import torch

from dmc import functional as fn
from dmc.kernels.attention.rotate import rotate
from dmc.kernels.scan.merge import merge, merge_reference
from tests.functional.reference import rope_tables
from tests.kernels.conftest import DEVICE, assert_close_enough

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
NAMES = ("keys", "values", "d key", "d value", "d alpha", "d omega")


def problem(tokens, size, kind="mixed", *, batch=1, heads=2, dtype=torch.float32, packed=False, seed=0):
    """key, value (as views of [T, B, H, D], the layout that megatron-core hands over), alpha, omega; starts."""
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(tokens, batch, heads, size, generator=g).permute(1, 2, 0, 3) for _ in range(2))
    logits = torch.randn(batch, heads, tokens, generator=g)
    alpha = {
        "mixed": torch.sigmoid(4 * logits),
        "none": torch.zeros_like(logits),
        "all": torch.ones_like(logits),
        "extreme": torch.sigmoid(200 * logits),
        "nearly all": 1 - 1e-7 * torch.rand(logits.shape, generator=g),
        "hard": (logits > 0).float(),
    }[kind]
    if heads > 1 and kind == "mixed":
        alpha[:, 0] = 0.99 + 0.01 * alpha[:, 0]  # a head that hardly ever opens an entry
    omega = torch.sigmoid(3 * torch.randn(batch, heads, tokens, generator=g))
    starts = torch.zeros(batch, tokens, dtype=torch.bool)
    if packed:
        starts = torch.rand(batch, tokens, generator=g) < 0.05
        starts[-1, [0, tokens // 2, tokens - 1]] = True
    tensors = [x.to(DEVICE) for x in (key.to(dtype), value.to(dtype), alpha, omega)]
    return tensors, starts.to(DEVICE) if packed else None


def results(run, tensors, starts, dtype=None):
    """Outputs and gradients for a fixed random gradient of the outputs."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in tensors]
    tokens, size = leaves[0].shape[-2:]
    rope = [table.to(DEVICE, dtype or torch.float32) for table in rope_tables(tokens, size)]
    out = run(*leaves, rope=rope, starts=starts)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=g).to(tensors[0].dtype).to(x) for x in out]  # the same in every dtype
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, weights)]


def check(tensors, starts, **options):
    ours = results(lambda *a, **k: merge(*a, **k, backend="triton"), tensors, starts)
    plain = results(merge_reference, tensors, starts)
    exact = results(merge_reference, tensors, starts, torch.float64)
    assert_close_enough(NAMES, ours, plain, exact, **options)


@pytest.mark.parametrize(("tokens", "size", "packed"), [(1, 8, False), (17, 6, False), (70, 8, True)])
def test_equals_the_twin_with_gradients(tokens, size, packed):
    check(*problem(tokens, size, packed=packed))


@pytest.mark.parametrize("kind", ["none", "all", "extreme", "nearly all", "hard"])
def test_extreme_decisions(kind):
    check(*problem(40, 4, kind, heads=1))


def test_low_precision():
    check(*problem(40, 8, dtype=torch.float16, heads=1))


def test_without_merging_values_come_out_bit_for_bit():
    (key, value, alpha, omega), _ = problem(70, 8, "none", dtype=torch.float16)
    rope = [x.to(DEVICE) for x in rope_tables(70, 8, dtype=torch.float32)]
    _, values = merge(key, value, alpha, omega, rope=rope, backend="triton")
    assert torch.equal(values, value)


def test_without_gradients_nothing_is_kept():
    (key, value, alpha, omega), starts = problem(70, 8, heads=1, packed=True)
    rope = [x.to(DEVICE) for x in rope_tables(70, 8, dtype=torch.float32)]
    ours = merge(key, value, alpha, omega, rope=rope, starts=starts, backend="triton")
    torch.testing.assert_close(ours, merge_reference(key, value, alpha, omega, rope=rope, starts=starts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (45, 6)])
def test_rotation_equals_the_twin_with_gradients(tokens, size):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 2, 3, size, generator=g).permute(1, 2, 0, 3).to(DEVICE)
    rope = [table.to(DEVICE) for table in rope_tables(tokens, size, dtype=torch.float32)]
    weight = torch.randn(x.shape, generator=g).to(DEVICE)
    found = []
    for run in (lambda leaf: rotate(leaf, rope, backend="triton"), lambda leaf: fn.rotate(leaf, rope)):
        leaf = x.detach().requires_grad_()
        out = run(leaf)
        found.append((out.detach(), *torch.autograd.grad(out, leaf, weight)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


LARGE = dict(tokens=[1, 31, 32, 33, 63, 64, 257, 1000], size=[60, 64, 80, 96, 128])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "all"])
@pytest.mark.parametrize("tokens", [63, 300])
@pytest.mark.parametrize("size", LARGE["size"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matrix_in_the_interpreter(tokens, size, dtype, kind):
    check(*problem(tokens, size, kind, dtype=dtype, heads=1, packed=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "none", "all", "extreme", "nearly all", "hard"])
@pytest.mark.parametrize("tokens", LARGE["tokens"])
@pytest.mark.parametrize("size", LARGE["size"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_on_a_gpu(tokens, size, dtype, kind):
    check(*problem(tokens, size, kind, dtype=dtype, batch=2, heads=3, packed=True))
