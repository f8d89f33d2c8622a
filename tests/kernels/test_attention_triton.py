"""The Triton training attention against plain PyTorch and fp64: forward and every gradient."""

import pytest
import torch

from dmc import functional as fn
from dmc.kernels.attention.attend import dmc_attention, plain_attention
from tests.functional.reference import rope_tables
from tests.kernels.conftest import DEVICE, assert_close_enough

pytest.importorskip("triton")
from dmc.kernels.attention.gpu import attend  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
NAMES = ("out", "d query", "d key", "d value", "d bias")


def naive(query, key, value, bias, *, starts=None, window=0):
    """Attention with all scores in memory, every product and the softmax's result in the dtype of the query."""
    tokens, size = key.shape[-2:]
    rows = query.shape[2]
    queries = torch.nn.functional.pad(query, (0, 0, tokens - rows, 0)).unflatten(1, (key.shape[1], -1))
    scores = (queries @ key[:, :, None].transpose(-1, -2)).to(bias.dtype) * size**-0.5
    place = torch.arange(tokens, device=query.device)
    exempt = place[:, None] - place <= window
    scores = scores + bias[:, :, None, None].masked_fill(exempt, 0)
    visible = torch.ones_like(exempt).tril()
    if starts is not None:
        document = starts.cumsum(-1)
        visible = visible & (document[:, :, None] == document[:, None, :])[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)[..., -rows:, :]
    return (scores.softmax(-1).to(value.dtype) @ value[:, :, None]).flatten(1, 2)


def problem(tokens, size, *, batch=1, heads=1, groups=2, rows=None, dtype=torch.float32, kind="mixed", packed=False, seed=0):
    """Tensors as views of [T, B, H, D], the layout that megatron-core hands over; a bias with -inf in it."""
    g = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(tokens, batch, h, size, generator=g).permute(1, 2, 0, 3).to(dtype) for h in (heads * groups, heads, heads)
    )
    if kind == "large":
        query = query * 100
    logits = torch.randn(batch, heads, tokens, generator=g) * 4
    bias = {"none": torch.zeros_like(logits), "all": torch.full_like(logits, -torch.inf)}.get(kind)
    if bias is None:
        bias = torch.nn.functional.logsigmoid(logits)
        bias[..., 2::7] = -torch.inf
    starts = torch.zeros(batch, tokens, dtype=torch.bool)
    if packed:
        starts = torch.rand(batch, tokens, generator=g) < 0.03
        starts[-1, [tokens // 3, tokens - 1]] = True
    tensors = [x.to(DEVICE) for x in (query[:, :, tokens - (rows or tokens) :], key, value, bias)]
    return tensors, starts.to(DEVICE) if packed else None


def results(run, tensors, starts, dtype=None):
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in tensors]
    out = run(*leaves, starts=starts)
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, generator=g).to(tensors[0].dtype).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


LARGE = 3e-5  # scores of some 500: one rounding of such a score in fp32, which the order of its sum decides


def check(tensors, starts, **options):
    exact = results(naive, tensors, starts, torch.float64)
    assert_close_enough(NAMES, results(attend, tensors, starts), results(naive, tensors, starts), exact, **options)


@pytest.mark.parametrize(("tokens", "packed"), [(1, False), (63, True), (100, False)])
def test_equals_plain_pytorch_with_gradients(tokens, packed):
    check(*problem(tokens, 8, packed=packed, batch=1 + packed))


@pytest.mark.parametrize("kind", ["none", "all", "large"])
def test_extremes(kind):
    check(*problem(50, 24, kind=kind, heads=2, groups=1), floor=LARGE if kind == "large" else 1e-6)


def test_low_precision():
    check(*problem(70, 16, dtype=torch.float16))


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_rows_alone(packed):
    check(*problem(70, 8, rows=21, packed=packed))


def test_without_a_bias():
    (query, key, value, bias), starts = problem(70, 8, kind="none", packed=True)
    exact = results(naive, (query, key, value, bias), starts, torch.float64)[:4]
    ours = results(lambda *a, starts: attend(*a, None, starts=starts), (query, key, value), starts)
    plain = results(naive, (query, key, value, bias), starts)[:4]
    assert_close_enough(NAMES[:4], ours, plain, exact)


def whole(backend, attention, tokens, groups, spans=None):
    """Output and gradients of a whole attention call, merge and rotation included."""
    g = torch.Generator().manual_seed(3)
    rand = lambda *s: torch.randn(*s, generator=g).to(DEVICE).requires_grad_()  # noqa: E731
    query, key, value = rand(1, 2 * groups, tokens, 8), rand(1, 2, tokens, 8), rand(1, 2, tokens, 8)
    logits, weights = rand(1, 2, tokens), rand(1, 2, tokens)
    noise = torch.zeros_like(logits)
    starts = torch.zeros(1, tokens, dtype=torch.bool, device=DEVICE)
    starts[0, [0, tokens // 3]] = True
    rope = [x.to(DEVICE) for x in rope_tables(tokens, 8, dtype=torch.float32)]
    rows = torch.cat([torch.arange(a, b) for a, b in spans or [(0, tokens)]]).to(DEVICE)
    options = dict(offset=0.5, temperature=0.5, noise=noise)
    decisions = () if attention is plain_attention else (fn.sample_alpha(logits, **options), fn.importance(weights))
    extra = {} if attention is plain_attention else {"log_keep": fn.sample_log_keep(logits, **options)}
    out = attention(query[:, :, rows], key, value, *decisions, rope=rope, starts=starts, spans=spans, backend=backend, **extra)
    leaves = [query, key, value, logits, weights][: 5 if decisions else 3]
    return out, *torch.autograd.grad((out * torch.randn(out.shape, generator=g).to(DEVICE)).sum(), leaves)


@pytest.mark.parametrize("attention", [dmc_attention, plain_attention])
@pytest.mark.parametrize("spans", [None, [(5, 17), (40, 61)]])
def test_the_dispatchers_agree_whatever_runs(attention, spans):
    """The trainer's two calls, also for the spans of context parallelism: reference, PyTorch and Triton."""
    reference, *others = (whole(backend, attention, 61, 2, spans) for backend in ("reference", "torch", "triton"))
    for other in others:
        for a, b in zip(other, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, b.abs().max().item()))


SIZES = [60, 64, 80, 96, 128]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "all"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matrix_in_the_interpreter(size, dtype, kind):
    check(*problem(200, size, dtype=dtype, kind=kind, heads=2, packed=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "none", "all", "large"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 129, 1000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_matrix_on_a_gpu(tokens, size, dtype, kind, packed):
    # One token's weight is 1 and its gradients 0, as differences of products that are rounded: of the size of the queries.
    floor = 1e-4 if kind == "large" and tokens == 1 else 1e-6
    check(*problem(tokens, size, dtype=dtype, kind=kind, batch=2, heads=2, groups=3, packed=packed), floor=floor)


@pytest.mark.gpu
def test_memory_is_linear_in_the_length():
    """Peak memory of forward and backward pass: twice the tokens, twice the bytes, at 16K and 32K tokens."""

    def peak(tokens):
        tensors, _ = problem(tokens, 128, dtype=torch.bfloat16, heads=2, groups=2)
        leaves = [x.requires_grad_() for x in tensors]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(*leaves).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(32768) < 2.2 * peak(16384)


# ------------------------------------------------------------------------------------------- a band exempt from the bias (DMS)


@pytest.mark.parametrize(
    ("tokens", "window", "packed", "rows"),
    [(63, 5, True, None), (100, 40, False, None), (40, 64, False, None), (90, 17, True, 30)],
)
def test_a_band_that_is_exempt(tokens, window, packed, rows):
    tensors, starts = problem(tokens, 8, packed=packed, batch=1 + packed, rows=rows)

    def run(*leaves, starts):
        return attend(*leaves, starts=starts, window=window)

    def plain(*leaves, starts):
        return naive(*leaves, starts=starts, window=window)

    exact = results(plain, tensors, starts, torch.float64)
    assert_close_enough(NAMES, results(run, tensors, starts), results(plain, tensors, starts), exact)
