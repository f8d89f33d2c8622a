"""Prefill attention by the CPU kernels, against the reference implementation in fp64, and their matmuls against NumPy's."""

import numpy as np
import pytest
import torch

from dmc.cache.policies import policy
from dmc.cache.reading.prompt_attention import Seen, prompt_attention
from dmc.kernels.backend import Backend, using
from dmc.kernels.cpu import tiles as tiles_numba
from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.prefill import cpu as prefill_cpu
from dmc.kernels.prefill.prefill import prefill_attention, prefill_reference
from tests.kernels.conftest import assert_close_enough
from tests.kernels.prompts import problem

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="the problems of these tests lie on the GPU then")]
WIDTHS = pytest.mark.parametrize(
    "paired",
    [False, pytest.param(True, marks=pytest.mark.skipif(not tiles_numba.PAIRED, reason="this CPU has no products of bf16"))],
)


def exactly(arguments, scale):
    return prefill_reference(*(x.double() if x.is_floating_point() else x for x in arguments), scale=scale)


def check(arguments, scale=0.3):
    plain = prefill_reference(*arguments, scale=scale)
    assert_close_enough(("out",), [prefill_cpu.prefill(*arguments, scale)], [plain], [exactly(arguments, scale)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "first", "counts"),
    [(1, 0, (0, 1)), (33, 0, (0, 33, 5)), (40, 50, (60, 17)), (1, 300, (129, 64)), (300, 7, (307, 128, 127, 0))],
)
@pytest.mark.parametrize(("size", "groups"), [(7, 1), (16, 3), (80, 2)])
def test_equals_the_twin_whatever_the_lengths(tokens, first, counts, size, groups, dtype):
    check(problem(tokens, counts, size, groups, first=first, dtype=dtype))


@pytest.mark.parametrize("size", [64, 96, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(size, dtype):
    check(problem(70, (70, 33), size, 4, first=100, dtype=dtype), size**-0.5)


def test_without_products_of_bf16(monkeypatch):
    monkeypatch.setattr(prefill_cpu, "PAIRED", False)
    check(problem(40, (60, 17), 24, 2, first=30, dtype=torch.bfloat16))


def test_a_chunk_does_not_change_a_query():
    query, keys, values, places, own_keys, own_values, positions = problem(300, (290, 170), 32, 3)
    whole = prefill_cpu.prefill(query, keys, values, places, own_keys, own_values, positions, 0.2)
    for start, end in ((0, 1), (1, 130), (130, 300)):
        part = slice(start, end)
        entries = (x[:, :-7] if end < 250 else x for x in (keys, values, places))  # and what no query of it sees may be missing
        here = prefill_cpu.prefill(query[:, :, part], *entries, own_keys[:, part], own_values[:, part], positions[part], 0.2)
        assert torch.equal(here, whole[:, :, part])


def test_threads_share_the_queries(monkeypatch):
    monkeypatch.setattr(prefill_cpu, "_LEAST", 100)
    arguments = problem(200, (200, 20, 90), 16, 2)
    alone, before = prefill_cpu.prefill(*arguments, 0.3), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(prefill_cpu.prefill(*arguments, 0.3), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_rise_and_fall_by_far(dtype):
    for size in (1e-3, 30.0, 1000.0, 1e15):
        arguments = problem(150, (150, 60), 16, 2, dtype=dtype)
        arguments[0] *= size
        check(arguments)


def test_a_nan_reaches_the_queries_that_see_it_and_no_others():
    arguments = problem(200, (199,), 16, 2)
    arguments[3][0] = torch.arange(199)
    arguments[1][0, 140, 3] = torch.nan
    out = prefill_cpu.prefill(*arguments, 0.3)
    assert out[:, :, :141].isfinite().all() and out[:, :, 141:].isnan().all()


def test_no_tokens_no_entries_and_gradients():
    arguments = problem(5, (5,), 8, 2)
    none = arguments[0][:, :, :0], *arguments[1:4], *(x[:, :0] for x in arguments[4:6]), arguments[6][:0]
    assert prefill_attention(*none).shape == (1, 2, 0, 8)
    alone = [arguments[0], *(x[:, :0] for x in arguments[1:4]), *arguments[4:]]
    torch.testing.assert_close(prefill_attention(*alone), arguments[5][:, None].expand(-1, 2, -1, -1))
    expected = prefill_attention(*arguments)
    arguments[0].requires_grad_()
    arguments[4].requires_grad_()
    assert torch.equal(prefill_attention(*arguments), expected)


def test_strides_do_not_matter():
    arguments = problem(50, (40, 50), 16, 3)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in arguments]
    assert torch.equal(prefill_attention(*turned), prefill_attention(*arguments))


def test_what_runs_by_default(monkeypatch):
    calls, real = [], prefill_cpu.prefill
    monkeypatch.setattr(prefill_cpu, "prefill", lambda *args: calls.append(args[0].dtype) or real(*args))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        prefill_attention(*problem(5, (5,), 8, 1, dtype=dtype))
    arguments = problem(5, (5,), 8, 1)
    prefill_attention(*arguments, backend="reference")
    with using("torch"):
        prefill_attention(*arguments)
    assert calls == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("merged", [False, True])
def test_prompts_are_the_same_in_pytorch(merged):
    """`prompt_attention` by the CPU kernels and by PyTorch's two forms: everything an entry of its own, and merged."""
    query, keys, values, places, own_keys, own_values, positions = problem(90, (89, 89), 32, 3)
    if not merged:
        keys, values, places[:] = own_keys[:, :-1], own_values[:, :-1], torch.arange(89)
    seen = Seen(keys, values, places, own_keys, own_values, positions.long(), merged)
    ours, theirs = (prompt_attention(query.flatten(0, 1), seen, policy("dmc"), one)[0] for one in (Backend.CPU, Backend.TORCH))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@compiled()
def _product(a, b, c, steps, columns, paired, add):
    at = [np.int64(a.ctypes.data), np.int64(b.ctypes.data), np.int64(c.ctypes.data)]
    tiles_numba.product(at[0], a.shape[1], at[1], b.shape[1], at[2], c.shape[1], steps, columns, paired, add)


@WIDTHS
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("many", [1, 2, 3, 4, 5, 11])
def test_products_of_tiles(many, add, paired):
    """Any number of columns, and nothing is written beside them."""
    g, columns, steps = torch.Generator().manual_seed(many), many * tiles_numba.LANES, 2 * many + 1
    pair = 2 if paired else 1
    dtype = torch.bfloat16 if paired else torch.float32
    a = torch.randn(tiles_numba.ROWS, steps * pair, generator=g).to(dtype)
    b = torch.randn(steps * pair, columns, generator=g).to(dtype)
    c = torch.randn(tiles_numba.ROWS + 1, columns + 3, generator=g)
    expected = c.double()
    expected[:-1, :columns] = (expected[:-1, :columns] if add else 0) + a.double() @ b.double()
    words = b.unflatten(0, (steps, pair)).transpose(1, 2).contiguous()  # neighbours along the sum side by side
    _product(*(x.reshape(len(x), -1).view(torch.int32).numpy() for x in (a, words)), c.numpy(), steps, columns, paired, add)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)
