"""Rows that may not grow, and a pool in memory of the caller."""

import pytest
import torch

from dmc.cache import KVCache, Shape, codec, policy
from dmc.rope import Rope

LAYERS, HEADS, SIZE = 2, 2, 8
ROPE = Rope([1.0, 0.3, 0.1, 0.03])
KINDS = {"dmc": {}, "late": {"window": 3}, "dms": {"window": 3}}


def started(kind, tokens=9, **more):
    """A cache with one sequence of so many tokens, none of them merged or dropped."""
    name = "dmc" if kind == "late" else kind
    cache = KVCache(Shape(LAYERS, HEADS, SIZE, torch.float32), policy(name, **KINDS[kind]), codec("dense"), slots=2, page_size=4)
    if "memory" in more:
        cache.place(more["memory"])
    prompt = cache.prompt()
    none = torch.zeros(0, dtype=torch.int64)
    run(cache.step(none, none, [(prompt, tokens)], ROPE), tokens, 0)
    return cache, torch.tensor([cache.load(prompt)])


def run(step, tokens, seed, decision=-1.0):
    generator, outs = torch.Generator().manual_seed(seed), []
    for layer in range(LAYERS):
        query, key, value = (torch.randn(tokens, HEADS, SIZE, generator=generator) for _ in range(3))
        logits = torch.full((tokens, HEADS), decision if step.policy.ring is not None else max(0.0, decision))
        outs.append(step(layer, query, key, value, logits, torch.ones(tokens, HEADS)))
    return outs


def counts(cache, slots):
    return cache.entries(int(slots)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_closed_rows_decide_as_the_model_could(kind):
    """Closed rows do in a step what a decision to merge (or drop) in these rows would have done; the others grow. With a window
    it is the decision about the token that leaves it."""
    closed = torch.tensor([[True, False], [False, True]])
    (cache, slots), (other, _) = started(kind), started(kind)
    before = counts(cache, slots)
    for number in range(6):
        at = torch.tensor([9 + number])
        got = run(cache.step(slots, at, [], ROPE, closed=closed), 1, number + 1)
        want = other.step(slots, at, [], ROPE)
        ring = cache.policy.ring is not None
        logits = torch.full((1, HEADS), -1.0)
        generator = torch.Generator().manual_seed(number + 1)
        for layer in range(LAYERS):
            query, key, value = (torch.randn(1, HEADS, SIZE, generator=generator) for _ in range(3))
            decided = (
                (logits, torch.ones(1, HEADS), 9.0 * closed[layer, None])
                if ring
                else (closed[layer, None].float(), torch.ones(1, HEADS))
            )
            out = want(layer, query, key, value, *decided)
            assert torch.equal(got[layer], out)
    assert (
        counts(cache, slots)
        == counts(other, slots)
        == [
            [n + 6 * (not shut) for n, shut in zip(row, line, strict=True)]
            for row, line in zip(before, closed.tolist(), strict=True)
        ]
    )
    cache.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_crowded_sequences_stay_within_their_pages(kind):
    cache, slots = started(kind)
    most = cache.used_pages + 2
    full = 0
    for number in range(40):
        closed = cache.crowded(slots, torch.tensor([most]))
        full += closed is not None
        run(cache.step(slots, torch.tensor([9 + number]), [], ROPE, closed=closed), 1, number)
        assert cache.used_pages <= most
    assert full > 10 and cache.crowded(slots, torch.tensor([most + 100])) is None
    cache.check_integrity()


def test_a_pool_in_memory_of_the_caller():
    memory = torch.full((1000 * 600,), 7, dtype=torch.uint8)
    own, slots = started("dmc")
    placed, _ = started("dmc", memory=memory)
    assert placed.pages == placed.page_limit == memory.numel() // placed.page_bytes - 1
    at = torch.tensor([9])
    for a, b in zip(run(own.step(slots, at, [], ROPE), 1, 5), run(placed.step(slots, at, [], ROPE), 1, 5), strict=True):
        assert torch.equal(a, b)
    assert not memory[: placed.page_bytes].any() and (memory != 7).sum() > placed.page_bytes
    placed.check_integrity()
    with pytest.raises(ValueError, match="holds no page"):
        started("dmc", memory=memory[:100])
