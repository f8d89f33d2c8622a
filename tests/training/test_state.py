"""How the compression loss reaches the decisions, and how what was decided is counted."""

import pytest
import torch

from dmc import functional
from dmc.training import attention
from dmc.training.state import AddGradient, DecisionCounts
from tests.checkpoints.tiny import LAYERS, VOCAB, tiny
from tests.training.models import logits, megatron

pytestmark = pytest.mark.usefixtures("process_group")


def test_add_gradient_is_the_gradient_of_the_compression_loss():
    """Losses are sums over the B * T tokens, divided once at the end; so is ``tokens * compression_loss``."""
    alpha = torch.rand(3, 4, 2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # [L, B, H, T]
    weights = torch.randn(alpha.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (alpha.clone().requires_grad_() for _ in range(2))
    hinge = functional.compression_loss(theirs, 4.0)
    assert hinge > 0  # open
    out = AddGradient.apply(ours, -0.7 / (3 * 2))
    assert torch.equal(out, alpha)
    (out * weights).sum().backward()
    ((theirs * weights).sum() + 0.7 * (4 * 10) * hinge).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("decision", ["head", "neuron"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_model_gets_the_gradient_of_the_compression_loss(monkeypatch, decision, packed):
    """Every parameter's gradient with the constant is the one by autograd through the alphas of all layers."""
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    if packed:
        starts[0, [5, 6, 17]] = True
    model = megatron(tiny(decision, heads=2), "soft", temperature=0.5)
    state, cr_weight = model.config.dmc_state, 3.0

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.cpu().clone() for name, p in model.named_parameters()}

    def data_loss():
        return (logits(model, ids, starts=starts) * torch.linspace(-1, 1, VOCAB)).sum()

    state.alpha_gradient = -cr_weight / (LAYERS * 2)
    ours = gradients(data_loss())

    state.alpha_gradient, alphas = 0.0, []

    def recorded(query, key, value, alpha, omega, **options):
        alphas.append(alpha)
        return original(query, key, value, alpha, omega, **options)

    original = attention.dmc_attention
    monkeypatch.setattr(attention, "dmc_attention", recorded)
    loss = data_loss()
    hinge = functional.compression_loss(torch.stack(alphas), 100.0)
    assert hinge > 0.1
    theirs = gradients(loss + cr_weight * ids.numel() * hinge)
    without = gradients(data_loss())
    for name in ours:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
    part = "decision" if decision == "head" else "linear_qkv"
    assert all((ours[n] - without[n]).abs().max() > 1e-3 for n in ours if part in n)


def test_a_constant_of_zero_changes_nothing():
    x = torch.randn(5, requires_grad=True)
    (AddGradient.apply(x, 0.0) * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0))


def test_counts_go_to_their_layer_and_heads_and_are_emptied():
    counts = DecisionCounts(3, 4)
    counts.add(1, 2, torch.tensor([1.5, 2.5]), torch.tensor([1.0, 3.0]))  # the second half of two tensor ranks' heads
    counts.add(1, 0, torch.tensor([0.5, 4.0]), torch.tensor([0.0, 4.0]))
    counts.add(1, 2, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    counts.add(2, 0, torch.ones(4), torch.zeros(4))
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    expected[0, 1] = torch.tensor([0.5, 4.0, 2.5, 2.5])
    expected[1, 1] = torch.tensor([0.0, 4.0, 2.0, 3.0])
    expected[0, 2] = 1
    assert torch.equal(counts.total(), expected)
    assert counts.total().sum() == 0


def test_counts_are_kept_apart_from_the_graph_and_in_fp64():
    counts = DecisionCounts(1, 1)
    soft = torch.tensor([float(2**24)], requires_grad=True)
    for _ in range(3):
        counts.add(0, 0, soft, torch.ones(1))
        counts.add(0, 0, torch.ones(1), torch.ones(1))
    total = counts.total()
    assert not total.requires_grad and total[0].item() == 3 * 2**24 + 3  # fp32 would have lost the ones


@pytest.mark.parametrize("recompute", [False, True])
def test_a_recomputed_layer_is_counted_once(recompute):
    """The first of its two passes runs without gradients."""
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    model = megatron(tiny("head", heads=2), "soft", counts=True)
    for layer in model.decoder.layers:
        layer.self_attention.checkpoint_core_attention = recompute
    logits(model, ids).sum().backward()
    soft, hard = model.config.dmc_state.decisions.total()
    assert 0 < hard.sum() < ids.numel() * hard.numel() and soft.max() <= ids.numel()
    model.config.dmc_state.mode = "hard"
    with torch.no_grad():
        logits(model.eval(), ids)
    first, again = model.config.dmc_state.decisions.total()
    assert torch.equal(first, again)
    assert (again[0] - hard[0]).abs().max() == 0  # hidden states before the first attention do not depend on the mode
