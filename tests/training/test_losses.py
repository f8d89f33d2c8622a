"""The losses and their gradients against torch's own, on one process and with the vocabulary cut in parts."""

import threading

import pytest
import torch
import torch.nn.functional as F

from dmc.training.losses import language_and_distillation

B, T, V = 3, 7, 24
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0), (0.25, 0.0), (0.0, 0.0)]


class Group:
    """What the losses ask a process group; `torch.distributed.all_reduce` over the threads that hold its ranks."""

    def __init__(self, size):
        self._size, self._slots = size, [None] * size
        self._barrier, self._local = threading.Barrier(size, timeout=30), threading.local()

    def rank(self):
        return self._local.rank

    def size(self):
        return self._size

    def all_reduce(self, x, op=torch.distributed.ReduceOp.SUM, group=None):
        self._slots[group.rank()] = x.clone()
        self._barrier.wait()
        parts = torch.stack(self._slots)
        self._barrier.wait()
        x.copy_(parts.amax(0) if op == torch.distributed.ReduceOp.MAX else parts.sum(0))

    def run(self, work):
        """``work(rank)`` of every rank; their results in order."""
        results, failures = [None] * self._size, []

        def target(rank):
            self._local.rank = rank
            try:
                results[rank] = work(rank)
            except Exception as error:
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results


def inputs(dtype=torch.float32, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (spread * torch.randn(B, T, V, generator=generator) for _ in range(2))
    return logits.to(dtype), torch.randint(V, (B, T), generator=generator), teacher.to(dtype)


def expected(logits, labels, teacher, lm_weight, kl_weight):
    """Sums over tokens by torch in fp64, and the gradient of the weighted sum."""
    logits = logits.double().requires_grad_()
    language = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    divergence = torch.zeros((), dtype=torch.float64)
    if teacher is not None:
        target = teacher.double().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="sum")
    loss = lm_weight * language + kl_weight * divergence
    grad = torch.autograd.grad(loss, logits)[0] if loss.requires_grad else torch.zeros_like(logits)
    return loss.detach(), language.detach(), divergence.detach(), grad


def ours(logits, labels, teacher, lm_weight, kl_weight, group, scale=1.0):
    logits = logits.clone().requires_grad_()
    loss, language, divergence = language_and_distillation(
        logits, labels, teacher, lm_weight=lm_weight, kl_weight=kl_weight, group=group
    )
    assert not language.requires_grad and not divergence.requires_grad
    assert loss.dtype == language.dtype == divergence.dtype == torch.float32 and loss.shape == ()
    (scale * loss).backward()
    return loss.detach(), language, divergence, logits.grad


def assert_equal(got, wanted, **tolerance):
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), **({"rtol": 1e-5, "atol": 2e-6} | tolerance))


@pytest.mark.parametrize("teaching", [True, False])
@pytest.mark.parametrize(("lm_weight", "kl_weight"), WEIGHTS)
def test_values_and_gradients_are_torchs(process_group, lm_weight, kl_weight, teaching):
    logits, labels, teacher = inputs()
    teacher = teacher if teaching else None
    got = ours(logits, labels, teacher, lm_weight, kl_weight, process_group)
    assert_equal(got, expected(logits, labels, teacher, lm_weight, kl_weight))


@pytest.mark.parametrize("size", [1, 2])
def test_only_scored_tokens_count(process_group, monkeypatch, size):
    """Values and gradients are those of the scored rows alone; of the others nothing is left, whatever their logits are."""
    logits, labels, teacher = inputs()
    scored = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.5
    assert scored.any() and not scored.all()
    group = Group(size)
    if size > 1:
        monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    width = V // size

    def work(rank):
        part = logits[..., rank * width : (rank + 1) * width].clone().requires_grad_()
        target = teacher[..., rank * width : (rank + 1) * width].contiguous()
        mine = process_group if size == 1 else group
        found = language_and_distillation(part, labels, target, lm_weight=0.5, kl_weight=2.0, group=mine, scored=scored)
        found[0].backward()
        return *(x.detach() for x in found), part.grad

    wanted = expected(logits[scored][None], labels[scored][None], teacher[scored][None], 0.5, 2.0)
    whole = torch.zeros_like(logits, dtype=torch.float64)
    whole[scored] = wanted[3][0]
    for rank, got in enumerate(group.run(work)):
        assert_equal(got, (*wanted[:3], whole[..., rank * width : (rank + 1) * width]))


def test_the_gradient_is_scaled_by_what_comes_back(process_group):
    logits, labels, teacher = inputs()
    got = ours(logits, labels, teacher, 0.5, 2.0, process_group, scale=-3.0)[3]
    torch.testing.assert_close(got.double(), -3 * expected(logits, labels, teacher, 0.5, 2.0)[3], rtol=1e-5, atol=1e-5)


def test_the_teacher_itself_has_no_divergence(process_group):
    logits, labels, _ = inputs()
    loss, _, divergence, grad = ours(logits, labels, logits, 0.0, 1.0, process_group)
    assert loss == divergence == 0 and grad.abs().max() == 0


def test_large_logits_stay_finite(process_group):
    logits, labels, teacher = inputs(spread=3000.0)
    got = ours(logits, labels, teacher, 0.5, 2.0, process_group)
    assert all(x.isfinite().all() for x in got)
    assert_equal(got, expected(logits, labels, teacher, 0.5, 2.0))


def test_inputs_are_left_as_they_are(process_group):
    logits, labels, teacher = inputs()
    copies = [x.clone() for x in (logits, labels, teacher)]
    ours(logits, labels, teacher, 0.5, 2.0, process_group)
    assert all(torch.equal(a, b) for a, b in zip((logits, labels, teacher), copies, strict=True))


def test_bf16_logits_are_summed_in_fp32(process_group):
    logits, labels, teacher = inputs(torch.bfloat16)
    got = ours(logits, labels, teacher, 0.5, 2.0, process_group)
    wanted = expected(logits, labels, teacher, 0.5, 2.0)
    assert_equal(got[:3], wanted[:3])
    assert got[3].dtype == torch.bfloat16
    assert_equal(got[3:], wanted[3:], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("spread", [3.0, 3000.0])
@pytest.mark.parametrize(("lm_weight", "kl_weight"), WEIGHTS)
def test_a_cut_vocabulary_gives_the_same(monkeypatch, ranks, spread, lm_weight, kl_weight):
    """Each rank holds V / ranks logits: the same three numbers on all of them, and its part of the gradient."""
    logits, labels, teacher = inputs(spread=spread)
    group = Group(ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    parts = list(zip(logits.chunk(ranks, -1), teacher.chunk(ranks, -1), strict=True))
    results = group.run(lambda r: ours(parts[r][0], labels, parts[r][1], lm_weight, kl_weight, group))
    wanted = expected(logits, labels, teacher, lm_weight, kl_weight)
    for result in results:
        assert_equal(result[:3], wanted[:3])
    assert_equal([torch.cat([result[3] for result in results], -1)], wanted[3:])
