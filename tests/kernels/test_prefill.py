"""Prefill attention against its reference implementation, fp64, and the training form of DMC with hard decisions."""

import pytest
import torch

from dmc import functional as fn
from dmc.kernels.prefill.prefill import prefill_attention, prefill_reference
from tests.kernels.conftest import DEVICE, assert_close_enough
from tests.kernels.prompts import problem

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")


def check(arguments, **options):
    scale = arguments[0].shape[-1] ** -0.5
    exact = prefill_reference(*(x.double() if x.is_floating_point() else x for x in arguments), scale=scale)
    plain = prefill_reference(*arguments, scale=scale)
    assert_close_enough(("out",), [prefill_attention(*arguments, backend="triton")], [plain], [exact], **options)


@pytest.mark.parametrize(
    ("tokens", "first", "counts"), [(1, 0, (0, 1)), (33, 0, (0, 33, 5)), (40, 50, (60, 17)), (1, 63, (40, 64))]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_twin_whatever_the_lengths(tokens, first, counts, groups):
    check(problem(tokens, counts, 8, groups, first=first))


def test_low_precision():
    check(problem(40, (10, 40), 24, 2, dtype=torch.float16))


def test_is_the_training_form_with_hard_decisions():
    """Compacted entries and own states give what attention over all intermediate states gives."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 50, 8, generator=g).to(DEVICE) for heads in (4, 2, 2))
    alpha = (torch.rand(1, 2, 50, generator=g) < 0.6).float().to(DEVICE)
    omega = torch.rand(1, 2, 50, generator=g).to(DEVICE) + 0.1
    alpha[..., 0] = 0
    merged = fn.accumulate(torch.cat([key, value], -1), alpha, omega)[0][0]
    keys, values = merged[..., :8], merged[..., 8:]
    closes = torch.cat([alpha[0, :, 1:] == 0, torch.zeros(2, 1, dtype=torch.bool, device=DEVICE)], 1)
    most = int(closes.sum(1).max())
    order = torch.where(closes, 0, 1).argsort(dim=1, stable=True)[:, :most]
    places = torch.where(closes.gather(1, order), order, 50).int()
    take = order[..., None].expand(-1, -1, 8)
    ours = prefill_attention(
        query[0].unflatten(0, (2, 2)),
        keys.gather(1, take),
        values.gather(1, take),
        places,
        keys,
        values,
        torch.arange(50, dtype=torch.int32, device=DEVICE),
        backend="triton",
    )
    torch.testing.assert_close(ours.flatten(0, 1), fn.attention(query, key, value, alpha, omega)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matrix_in_the_interpreter(size, dtype):
    check(problem(130, (130, 40, 0), size, 3, dtype=dtype, first=7))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 63, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_on_a_gpu(size, tokens, dtype):
    check(problem(tokens, (tokens, tokens // 4, 0, 1), size, 4, dtype=dtype, first=100))
