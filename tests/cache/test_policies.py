"""Policies that evict, against dense attention with a mask that is built token by token."""

import pytest
import torch

from dmc.cache import CODECS, KVCache, Shape, policy
from dmc.cache.policies import Policy
from dmc.functional import rotate
from tests.cache.stored import stored
from tests.cache.test_rows import HEADS, LAYERS, QUERY_HEADS, ROPE, SIZE, decode, feed, prefill, tokens

COUNT, PROMPT = 60, 25


def test_a_policy_that_does_not_do_what_it_says_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match="policy Empty sets evicts and does not define keep"):
        type("Empty", (Policy,), {"evicts": True})


class Unmerged(Policy):
    def decide(self, alpha, omega):
        return torch.zeros_like(alpha), torch.ones_like(omega)


class Heavy(Unmerged):
    """Keeps the ``budget`` entries with the most attention so far, the newest 3 in any case: scattered holes."""

    name, statistics, evicts = "heavy", "sum", True

    def __init__(self, budget=14):
        self.budget = budget

    def keep(self, entries):
        newest = entries.positions > (entries.next - 4)[:, None]
        score = entries.scores.masked_fill(newest, torch.inf).masked_fill(entries.positions < 0, -torch.inf)
        order = score.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(newest).scatter_(-1, order[:, : self.budget], True)


class Latest(Heavy):
    """The same by the attention of the newest query alone, averaged over the heads of the layer."""

    name, statistics = "latest", "last"

    def keep(self, entries):
        mean = entries.scores.unflatten(0, (-1, entries.heads)).mean(1, keepdim=True)
        scores = mean.expand(-1, entries.heads, -1).flatten(0, 1)
        return super().keep(type(entries)(entries.positions, scores, entries.heads, entries.next))


def dense(parts, kind, budget=14):
    """Outputs [T, Hq, D] of one layer and the places held at the end, by a mask over full attention, in fp64."""
    query, key, value, _, _ = (part.double() for part in parts)
    at = ROPE(torch.arange(COUNT))
    query, key = (rotate(x.transpose(0, 1), at) for x in (query, key))
    value, group = value.transpose(0, 1), QUERY_HEADS // HEADS
    held = torch.zeros(HEADS, COUNT, dtype=torch.bool)
    score, outs = torch.zeros(HEADS, COUNT).double(), []
    for i in range(COUNT):
        held[:, i] = True
        shown = held.repeat_interleave(group, 0)
        logits = torch.einsum("hd,htd->ht", query[:, i], key.repeat_interleave(group, 0)) * SIZE**-0.5
        weights = logits.masked_fill(~shown, -torch.inf).softmax(-1)
        outs.append(torch.einsum("ht,htd->hd", weights, value.repeat_interleave(group, 0)))
        mass = weights.unflatten(0, (HEADS, group)).sum(1)
        score = score + mass if kind == "heavy" else mass
        if kind == "streaming":
            held &= (torch.arange(COUNT) < 3) | (torch.arange(COUNT) > i + 1 - 12)
        elif i < PROMPT - 1:
            continue
        else:
            ranked = score.mean(0, keepdim=True).expand(HEADS, -1) if kind == "latest" else score
            ranked = ranked.clone().masked_fill(~held, -torch.inf)
            ranked[:, max(0, i - 2) : i] = torch.inf  # newer than next - 4; the accumulating entry, at i, does not compete
            ranked[:, i] = -torch.inf
            kept = torch.zeros_like(held).scatter_(1, ranked.topk(budget, dim=1).indices, True)
            held &= kept
            held[:, i] = True
    return torch.stack(outs), held


def evicting(made, codec_name="dense", **changes):
    sizes = {"page_size": 4, "sink_tokens": 2, "window": 1} | changes
    return KVCache(
        Shape(LAYERS, HEADS, SIZE, torch.float32),
        made,
        stored(codec_name, layers=LAYERS, heads=HEADS, size=SIZE),
        slots=3,
        **sizes,
    )


POLICIES = {"streaming": lambda: policy("streaming", sinks=3, recent=12), "heavy": Heavy, "latest": Latest}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("chunk", [PROMPT, 4])
@pytest.mark.parametrize("sizes", [{}, {"page_size": 3, "sink_tokens": 0, "window": 0}, {"page_size": 5, "window": 9}])
def test_against_dense_attention_with_a_mask(kind, chunk, sizes):
    layers = tokens(COUNT, seed=11)
    cache = evicting(POLICIES[kind](), **sizes)
    slot, outs = feed(cache, layers, PROMPT, chunk)
    for parts, out, count in zip(layers, outs, cache.entries(slot), strict=True):
        want, held = dense(parts, kind)
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(count, held.sum(-1))
    cache.close(slot)
    assert cache.rows.pool.used == 0


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", CODECS)
def test_pages_are_freed(kind, name):
    """A row never holds more encoded pages than its live entries fill, whatever was evicted from where."""
    cache = evicting(POLICIES[kind](), name)
    slot, _ = feed(cache, tokens(COUNT, seed=12), PROMPT)  # the integrity check after each step looks at the pages
    pages = cache.rows.encoded_count[cache.rows.all_layers(slot)].view(LAYERS, HEADS).long()
    live = cache.entries(slot) - 1 - cache.rows.full_count[cache.rows.all_layers(slot)].view(LAYERS, HEADS)
    assert torch.equal(pages, -(-live // 4)) and cache.entries(slot).max() <= 15
    full = evicting(policy("full"), name)
    other, _ = feed(full, tokens(COUNT, seed=12), PROMPT)
    assert pages.sum() < full.rows.encoded_count[full.rows.all_layers(other)].sum() * 0.7


def test_streaming_forgets_during_the_prompt():
    cache = evicting(policy("streaming", sinks=3, recent=12))
    prompt = prefill(cache, tokens(COUNT, seed=1), COUNT, chunk=6)
    assert all(layer.keys.shape[1] <= 14 for layer in prompt.layers)


def test_a_fork_of_an_evicting_sequence_lives_alone():
    layers = tokens(COUNT, seed=2)
    cache = evicting(Heavy())
    slot = cache.load(prefill(cache, layers, PROMPT))
    copy = cache.fork(slot)
    alone = [decode(cache, slot, layers, place) for place in range(PROMPT, COUNT)]
    cache.close(slot)
    cache.check_integrity()
    again = [decode(cache, copy, layers, place) for place in range(PROMPT, COUNT)]
    for one, two in zip(alone, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"recent": 0}, "recent=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"budget": 3}, "no setting budget; it has: sinks, recent, share"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        policy("streaming", **settings)
    with pytest.raises(ValueError, match="none at all"):
        policy("full", budget=3)
    with pytest.raises(ValueError, match="no setting budget; it has: window, max_entries"):
        policy("dmc", budget=3)
    with pytest.raises(ValueError, match="known: full, dmc, streaming, h2o, tova"):
        policy("lru")
