"""The Triton kernels of late merging against plain PyTorch and fp64: forward and every gradient."""

import pytest
import torch

from dmc import functional as fn
from dmc.kernels.attention.attend import late_attention
from tests.functional.reference import rope_tables
from tests.kernels import test_attention_late as in_pytorch
from tests.kernels.conftest import DEVICE, assert_close_enough
from tests.kernels.test_attention_triton import LARGE, SIZES, problem, results

pytest.importorskip("triton")
from dmc.kernels.attention.gpu import attend_late  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
NAMES = ("out", "d query", "d merged key", "d merged value", "d bias", "d recent key", "d recent value")


def naive(query, key, value, bias, recent_key, recent_value, *, window, starts=None):
    """All scores in memory, every product and the softmax's result in the dtype of the query."""
    tokens, size = key.shape[-2:]
    rows = query.shape[2]
    queries = query.unflatten(1, (key.shape[1], -1))
    place = torch.arange(tokens, device=query.device)
    behind = place[tokens - rows :, None] - place
    same = torch.ones(1, rows, tokens, dtype=torch.bool, device=query.device)
    if starts is not None:
        document = starts.cumsum(-1)
        same = document[:, tokens - rows :, None] == document[:, None, :]
    same = same[:, None, None]
    past, recent = ((queries @ x[:, :, None].mT).to(bias.dtype) * size**-0.5 for x in (key, recent_key))
    past = past + bias[:, :, None, None].masked_fill(behind == window + 1, 0)
    past = past.masked_fill(~(same & (behind > window)), -torch.inf)
    recent = recent.masked_fill(~(same & (behind >= 0) & (behind <= window)), -torch.inf)
    weights = torch.cat([past, recent], -1).softmax(-1).to(value.dtype)
    return (weights @ torch.cat([value, recent_value], 2)[:, :, None]).flatten(1, 2)


def check(tokens, window, size=8, **options):
    floor = options.pop("floor", 1e-6)
    tensors, starts = problem(tokens, size, **options)
    (_, recent_key, recent_value, _), _ = problem(tokens, size, **options | {"seed": 1})
    tensors += [recent_key, recent_value]
    with_window = lambda attend: lambda *x, starts: attend(*x, window=window, starts=starts)  # noqa: E731
    exact = results(with_window(naive), tensors, starts, torch.float64)
    ours, plain = (results(with_window(attend), tensors, starts) for attend in (attend_late, naive))
    assert_close_enough(NAMES, ours, plain, exact, floor=floor)


@pytest.mark.parametrize(
    ("tokens", "window", "options"),
    [
        (1, 0, {}),
        (37, 1, {"packed": True}),
        (39, 9, {"groups": 3}),
        (53, 35, {"packed": True, "batch": 2, "groups": 1}),
        (34, 32, {}),
        (20, 50, {"heads": 2, "groups": 1}),
        pytest.param(36, 0, {}, marks=pytest.mark.slow),
        pytest.param(33, 32, {}, marks=pytest.mark.slow),
    ],
)
def test_equals_plain_pytorch_with_gradients(tokens, window, options):
    """Windows of 0, 1, of more than a block, that leave one or no token behind them, and longer than the sequence."""
    check(tokens, window, **options)


@pytest.mark.parametrize(
    ("rows", "packed"),
    [(21, True), pytest.param(1, False, marks=pytest.mark.slow), pytest.param(40, False, marks=pytest.mark.slow)],
)
def test_the_last_rows_alone(rows, packed):
    check(61, 11, rows=rows, packed=packed)


@pytest.mark.parametrize("kind", ["all", "large", pytest.param("none", marks=pytest.mark.slow)])
def test_extremes(kind):
    check(37, 5, 24, kind=kind, floor=LARGE if kind == "large" else 1e-6)


def test_low_precision():
    check(40, 7, 16, dtype=torch.float16)


def whole(backend, tokens, window, spans):
    """Output and gradients of the trainer's call: decisions, merge and rotation included."""
    g = torch.Generator().manual_seed(3)
    rand = lambda *s: torch.randn(*s, generator=g).to(DEVICE).requires_grad_()  # noqa: E731
    leaves = query, key, value, logits, weights = [
        rand(1, *shape) for shape in ((2, tokens, 8), (1, tokens, 8), (1, tokens, 8), (1, tokens), (1, tokens))
    ]
    starts = torch.zeros(1, tokens, dtype=torch.bool, device=DEVICE)
    starts[0, [0, tokens // 3]] = True
    options = dict(offset=0.5, temperature=0.5, noise=torch.zeros_like(logits))
    kept = fn.undecided(starts, window)[:, None]
    alpha, log_keep = (sample(logits, **options).masked_fill(kept, 0.0) for sample in (fn.sample_alpha, fn.sample_log_keep))
    rows = torch.cat([torch.arange(a, b) for a, b in spans or [(0, tokens)]]).to(DEVICE)
    out = late_attention(
        query[:, :, rows],
        key,
        value,
        alpha,
        fn.importance(weights),
        window=window,
        log_keep=log_keep,
        starts=starts,
        spans=spans,
        rope=[x.to(DEVICE) for x in rope_tables(tokens, 8, dtype=torch.float32)],
        backend=backend,
    )
    return out, *torch.autograd.grad((out * torch.randn(out.shape, generator=g).to(DEVICE)).sum(), leaves)


@pytest.mark.parametrize(
    ("window", "spans"),
    [(3, [(2, 6), (12, 21)]), pytest.param(0, None, marks=pytest.mark.slow), pytest.param(5, None, marks=pytest.mark.slow)],
)
def test_the_dispatcher_agrees_whatever_runs(window, spans):
    """With every gradient, decisions and weights included; spans of queries are what context parallelism asks for."""
    reference, *others = (whole(backend, 21, window, spans) for backend in ("reference", "torch", "triton"))
    assert all(x.abs().max() > 0 for x in reference)
    for other in others:
        for a, b in zip(other, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, b.abs().max().item()))


def test_auto_takes_triton_where_it_can_run(monkeypatch):
    """As on a GPU, where "auto" comes to Triton."""
    from dmc.kernels.attention import attend, gpu

    calls = []
    monkeypatch.setattr(attend, "choose", lambda x, backend: "triton" if backend in (None, "auto") else backend)
    monkeypatch.setattr(gpu, "attend_late", lambda *x, **options: calls.append(1) or attend_late(*x, **options))
    leaves, begin = in_pytorch.problem(9, heads=1, groups=1, batch=1)
    ours, theirs = (in_pytorch.run(f, leaves, begin, 9, 2) for f in (late_attention, fn.attention))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("window", [3, 64])
@pytest.mark.parametrize("size", [16, *SIZES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matrix_in_the_interpreter(size, dtype, window):
    check(141, window, size, dtype=dtype, heads=2, packed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 3, 64, 300])
@pytest.mark.parametrize("tokens", [1, 65, 129, 1000])
@pytest.mark.parametrize("size", [16, *SIZES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_matrix_on_a_gpu(tokens, window, size, dtype, packed):
    check(tokens, window, size, dtype=dtype, batch=2, heads=2, groups=3, packed=packed)


@pytest.mark.gpu
def test_memory_is_linear_in_the_length():
    """Peak memory of forward and backward pass: twice the tokens, twice the bytes, at 16K and 32K tokens."""

    def peak(tokens):
        (query, key, value, bias), _ = problem(tokens, 128, dtype=torch.bfloat16, heads=2, groups=2)
        leaves = [x.requires_grad_() for x in (query, key, value, bias, key.clone(), value.clone())]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend_late(*leaves, window=64).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(32768) < 2.2 * peak(16384)
