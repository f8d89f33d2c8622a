"""`dmc.functional` against token loops in fp64 and against properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc import functional as fn
from tests.functional import reference as ref

KINDS = ("between", "hard", "none", "all", "mixed")


def draw_alpha(kind, shape, generator):
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "between":
        return u * 0.98 + 0.01
    if kind == "hard":
        return (u > 0.4).double()
    if kind == "mixed":
        return torch.where(u < 0.3, 0.0, torch.where(u > 0.7, 1.0, u))
    return torch.full(shape, float(kind == "all"), dtype=torch.float64)


@st.composite
def problems(draw, max_tokens=80, kinds=KINDS):
    batch, heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens, size = draw(st.integers(1, max_tokens)), draw(st.sampled_from([2, 4, 6]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    starts = torch.rand(batch, tokens, generator=g) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    return dict(
        query=rand(batch, heads * groups, tokens, size),
        key=rand(batch, heads, tokens, size),
        value=rand(batch, heads, tokens, size),
        alpha=draw_alpha(draw(st.sampled_from(kinds)), (batch, heads, tokens), g),
        omega=torch.sigmoid(rand(batch, heads, tokens) * 3),
        starts=starts,
    )


@settings(max_examples=60, deadline=None)
@given(problems(max_tokens=140))
def test_accumulate_equals_the_loop(p):
    merged, z = fn.accumulate(p["key"], p["alpha"], p["omega"], starts=p["starts"])
    expected, expected_z = ref.merge_loop(p["key"], p["alpha"], p["omega"], p["starts"])
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z, expected_z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 1024, 1057, 2100])
def test_accumulate_long_and_fp32(tokens):
    """Several levels of the scan, in fp32 against the fp64 loop."""
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, 2, tokens, 3, generator=g)
    alpha = draw_alpha("mixed", (1, 2, tokens), g).float()
    omega = torch.rand(1, 2, tokens, generator=g) + 0.01
    merged, z = fn.accumulate(x, alpha, omega)
    expected, expected_z = ref.merge_loop(x.double(), alpha.double(), omega.double(), torch.zeros(1, tokens))
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.double(), expected_z, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(problems(max_tokens=70))
def test_accumulate_gradients_equal_the_loops(p):
    leaves = [p[n].clone().requires_grad_() for n in ("key", "alpha", "omega")]
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(p["key"].shape, generator=g, dtype=torch.float64)
    merged, z = fn.accumulate(*leaves, starts=p["starts"])
    expected, expected_z = ref.merge_loop(*leaves, p["starts"])
    ours = torch.autograd.grad((merged * weight).sum() + (z * weight[..., 0]).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum() + (expected_z * weight[..., 0]).sum(), leaves, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-8, atol=1e-10)


def test_accumulate_gradcheck():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 37, 2, generator=g, dtype=torch.float64, requires_grad=True)
    alpha = (torch.rand(1, 2, 37, generator=g, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    omega = (torch.rand(1, 2, 37, generator=g, dtype=torch.float64) + 0.1).requires_grad_()
    starts = torch.zeros(1, 37, dtype=torch.bool)
    starts[0, 20] = True
    assert torch.autograd.gradcheck(lambda *a: fn.accumulate(*a, starts=starts), (x, alpha, omega))


@settings(max_examples=25, deadline=None)
@given(problems(max_tokens=24))
def test_attention_equals_the_loop(p):
    size, tokens = p["key"].shape[-1], p["key"].shape[2]
    out = fn.attention(**p, rope=ref.rope_tables(tokens, size))
    torch.testing.assert_close(out, ref.attend_loop(**p, rotated=True), rtol=1e-9, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(problems(max_tokens=14, kinds=("between",)))
def test_attention_gradients_equal_the_loops(p):
    starts = p.pop("starts")
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    weight = torch.randn(p["query"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = torch.autograd.grad((fn.attention(**leaves, starts=starts) * weight).sum(), list(leaves.values()))
    theirs = torch.autograd.grad(
        (ref.attend_loop(**leaves, starts=starts, rotated=False) * weight).sum(), list(leaves.values()), allow_unused=True
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-7, atol=1e-9)


def test_attention_gradcheck():
    g = torch.Generator().manual_seed(5)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    alpha = (torch.rand(1, 1, 6, generator=g, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    omega = (torch.rand(1, 1, 6, generator=g, dtype=torch.float64) + 0.2).requires_grad_()
    rope = ref.rope_tables(6, 2)
    assert torch.autograd.gradcheck(
        lambda *a: fn.attention(*a, rope=rope), (rand(1, 2, 6, 2), rand(1, 1, 6, 2), rand(1, 1, 6, 2), alpha, omega)
    )


@settings(max_examples=30, deadline=None)
@given(problems(max_tokens=40, kinds=("hard", "none", "all")))
def test_hard_attention_is_algorithm_1(p):
    """With alpha in {0, 1} the training form is inference, and lengths are sum(1 - alpha)."""
    size, tokens = p["key"].shape[-1], p["key"].shape[2]
    p["starts"] = torch.zeros_like(p["starts"])
    out = fn.attention(**p, rope=ref.rope_tables(tokens, size))
    alpha = fn.mask_starts(p["alpha"], None)
    for b in range(len(out)):
        expected, lengths = ref.algorithm_1(p["query"][b], p["key"][b], p["value"][b], p["alpha"][b], p["omega"][b], rotated=True)
        torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-10)
        assert torch.equal(lengths, (1 - alpha[b]).sum(-1).long())


def test_documents_are_independent():
    """A packed sequence gives what its documents give alone (RoPE is relative)."""
    g = torch.Generator().manual_seed(2)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = rand(1, 4, 30, 4), rand(1, 2, 30, 4), rand(1, 2, 30, 4)
    alpha, omega = torch.rand(1, 2, 30, generator=g, dtype=torch.float64), torch.rand(1, 2, 30, generator=g, dtype=torch.float64)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, [11, 12]] = True
    rope = ref.rope_tables(30, 4)
    packed = fn.attention(q, k, v, alpha, omega, rope=rope, starts=starts)
    for a, b in ((0, 11), (11, 12), (12, 30)):
        part = [t[:, :, a:b] for t in (q, k, v, alpha, omega)]
        alone = fn.attention(*part, rope=tuple(t[: b - a] for t in rope))
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-9, atol=1e-10)


def test_no_merging_is_plain_attention():
    """alpha = 0 everywhere equals torch's own causal attention, grouped queries included."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, 50, 8, generator=g) for h in (6, 2, 2))
    rope = ref.rope_tables(50, 8, dtype=torch.float32)
    zero = torch.zeros(2, 2, 50)
    out = fn.attention(q, k, v, zero, torch.rand(2, 2, 50, generator=g) + 0.1, rope=rope)
    plain = torch.nn.functional.scaled_dot_product_attention(
        fn.rotate(q, rope), fn.rotate(k, rope), v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_sampling_follows_the_gumbel_sigmoid():
    """alpha > 1/2 exactly as often as a Logistic variable exceeds offset - logit."""
    torch.manual_seed(0)
    alpha = fn.sample_alpha(torch.full((200_000,), 4.0))
    assert abs((alpha > 0.5).float().mean().item() - 1 / (1 + math.e)) < 0.005
    assert alpha.dtype == torch.float32 and alpha.min() >= 0 and alpha.max() <= 1


def test_log_keep_is_exact_where_alpha_rounds_to_one():
    logits = torch.tensor([60.0, 5.0, -60.0])
    noise = torch.zeros(3)
    alpha, log_keep = fn.sample_alpha(logits, noise=noise), fn.sample_log_keep(logits, noise=noise)
    assert alpha[0] == 1
    torch.testing.assert_close(log_keep, torch.tensor([-550.0, -math.log(2), 0.0]))


def test_hard_decision_and_importance():
    assert fn.round_alpha(torch.tensor([4.9, 5.0, 5.1], dtype=torch.bfloat16)).tolist() == [0, 0, 1]
    torch.testing.assert_close(fn.importance(torch.tensor([0.0])), torch.sigmoid(torch.tensor([5.0])))


@pytest.mark.parametrize(("alpha", "target", "loss"), [([0.0, 0.0], 4, 0.75), ([1.0, 1.0], 4, 0.0), ([0.5, 0.5], 1, 0.0)])
def test_compression_loss(alpha, target, loss):
    assert fn.compression_loss(torch.tensor(alpha), target).item() == pytest.approx(loss)


def test_compression_loss_is_one_sided():
    alpha = torch.tensor([0.9, 0.9], requires_grad=True)
    assert torch.equal(torch.autograd.grad(fn.compression_loss(alpha, 2.0), alpha)[0], torch.zeros(2))


@pytest.mark.parametrize("target", [0.5, 0, -1, math.nan, math.inf])
def test_bad_target_is_refused(target):
    with pytest.raises(ValueError, match="target_cr"):
        fn.compression_loss(torch.zeros(3), target)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of key heads"):
        fn.attention(torch.zeros(1, 3, 4, 2), *[torch.zeros(1, 2, 4, 2)] * 2, *[torch.zeros(1, 2, 4)] * 2)
