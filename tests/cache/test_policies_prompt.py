"""Policies that look at keys, values and queries, against dense versions in fp64 that follow the papers token by token."""

import math

import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.cache import KVCache, Policy, PromptPolicy, Shape, policy
from dmc.cache.policies import POLICIES
from dmc.cache.policies.entries import Moments
from dmc.cache.reading.prompt import NONE
from dmc.functional import rotate
from tests.cache.stored import stored
from tests.cache.test_rows import HEADS, LAYERS, QUERY_HEADS, ROPE, SIZE, feed, prefill, tokens
from tests.model import tiny

COUNT, PROMPT, BUDGET, WINDOW, GROUP = 56, 40, 14, 6, QUERY_HEADS // HEADS
SETTINGS = {
    "snapkv": dict(window=WINDOW, kernel=3),
    "pyramidkv": dict(window=WINDOW, kernel=3, beta=4),
    "adakv": dict(window=WINDOW, kernel=3, least=0.25),
    "expected": dict(future=9, sinks=2),
    "knorm": {},
    "random": dict(seed=3),
    "merged": dict(budget=36),
}


def made(name, **changes):
    return policy(name, **{"budget": BUDGET} | SETTINGS[name] | changes)


def states(parts):
    """Rotated queries ``[Hq, T, D]`` and keys ``[H, T, D]``, values, all fp64."""
    query, key, value = (part.double().transpose(0, 1) for part in parts[:3])
    at = ROPE(torch.arange(query.shape[1]))
    return rotate(query, at), rotate(key, at), value


def snap(parts):
    """Mean attention of the window's queries per older token, averaged over ``kernel`` neighbours: ``[H, T - WINDOW]``."""
    query, key, _ = states(parts)
    older, scores = PROMPT - WINDOW, torch.zeros(HEADS, PROMPT).double()
    for head in range(HEADS):
        for group in range(GROUP):
            for i in range(older, PROMPT):
                logits = key[head, : i + 1] @ query[head * GROUP + group, i] / math.sqrt(SIZE)
                scores[head, : i + 1] += logits.softmax(-1) / (GROUP * WINDOW)
    pooled = torch.zeros(HEADS, older).double()
    for n in range(older):
        pooled[:, n] = scores[:, max(0, n - 1) : min(older, n + 2)].sum(-1) / 3
    return pooled


def chosen_snap(parts, layer, size):
    best = snap(parts).topk(size - WINDOW, dim=-1).indices
    return [{*range(PROMPT - WINDOW, PROMPT), *row.tolist()} for row in best]


def chosen_pyramid(parts, layer, _):
    """Two layers: the first has 2 m - m // beta behind its window, the last m // beta, m their mean."""
    mean = BUDGET - WINDOW
    return chosen_snap(parts, layer, WINDOW + [2 * mean - mean // 4, mean // 4][layer])


def chosen_ada(parts, layer, size):
    scores, each = snap(parts), size - WINDOW
    sets = [set(row.topk(int(each * 0.25)).indices.tolist()) for row in scores]
    rest = sorted((float(scores[h, n]), h, n) for h in range(HEADS) for n in range(scores.shape[1]) if n not in sets[h])
    for _, head, n in rest[::-1][: each * HEADS - sum(map(len, sets))]:
        sets[head].add(n)
    return [{*range(PROMPT - WINDOW, PROMPT), *one} for one in sets]


def chosen_expected(parts, layer, size):
    _, key, value = states(parts)
    raw = parts[0][:PROMPT].double().transpose(0, 1)  # before RoPE
    sets = []
    for head in range(HEADS):
        weights = torch.zeros(PROMPT - 1).double()
        for group in range(GROUP):
            mine = raw[head * GROUP + group]
            turns = []  # the matrix of RoPE at each future position, column by column
            for position in range(PROMPT, PROMPT + 9):
                table = tuple(x.double() for x in ROPE(torch.tensor([position])))
                turns.append(rotate(torch.eye(SIZE).double()[:, None], tuple(x.expand(SIZE, 1, -1) for x in table))[:, 0].T)
            turn = torch.stack(turns).mean(0)
            mean, covariance = turn @ mine.mean(0), turn @ torch.cov(mine.T, correction=0) @ turn.T
            logits = torch.stack([k @ mean / math.sqrt(SIZE) + k @ covariance @ k / (2 * SIZE) for k in key[head, : PROMPT - 1]])
            weights += logits.softmax(-1) / GROUP
        scores = weights * value[head, : PROMPT - 1].norm(dim=-1)
        scores[:2] = math.inf
        sets.append({PROMPT - 1, *scores.topk(size - 1).indices.tolist()})
    return sets


def held_by(cache, prompt, number):
    """Positions of the entries that stay in each head, the newest token's among them."""
    layer, counts = prompt.final(number)
    rows = (row[:count].tolist() for row, count in zip(layer.positions, counts, strict=True))
    return [{prompt.done - 1, *(place for place in row if place != NONE)} for row in rows]


def cache_of(one, codec="dense", **sizes):
    return KVCache(
        Shape(LAYERS, HEADS, SIZE, torch.float32),
        one,
        stored(codec, layers=LAYERS, heads=HEADS, size=SIZE),
        slots=3,
        **{"page_size": 4, "sink_tokens": 2, "window": 1} | sizes,
    )


CHOSEN = {"snapkv": chosen_snap, "pyramidkv": chosen_pyramid, "adakv": chosen_ada, "expected": chosen_expected}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("chunk", [PROMPT, 7, 1])
def test_a_prompt_keeps_what_the_paper_says(name, chunk):
    layers = tokens(PROMPT, seed=4)
    cache = cache_of(made(name))
    prompt = prefill(cache, layers, PROMPT, chunk)
    for number, parts in enumerate(layers):
        assert held_by(cache, prompt, number) == CHOSEN[name](parts, number, BUDGET)


@pytest.mark.parametrize("name", [*CHOSEN, "merged"])
@pytest.mark.parametrize("codec", ["dense", "int8"])
def test_generated_tokens_attend_to_what_stayed_and_to_each_other(name, codec):
    """Decoding, fork and swap, against dense attention over the chosen positions; nothing is evicted after the prompt."""
    layers = tokens(COUNT, seed=5)
    cache = cache_of(made(name), codec)
    slot, outs = feed(cache, layers, PROMPT, 9)
    inner = "snapkv" if name == "merged" else name
    for number, parts in enumerate(layers):
        query, key, value = states(parts)
        short = [part[:PROMPT] for part in parts]
        if name == "merged":
            sets = held_by(cache, prefill(cache, layers, PROMPT), number)
            keys, values = merged(parts, sets)
        else:
            sets, keys, values = CHOSEN[inner](short, number, BUDGET), key, value
        assert cache.entries(slot)[number].tolist() == [len(one) + COUNT - PROMPT for one in sets]
        for head, own in enumerate(sets):
            there = torch.tensor(sorted(own))
            for i in range(PROMPT, COUNT):
                seen = torch.cat([there, torch.arange(PROMPT, i + 1)])
                for group in range(GROUP):
                    which = head * GROUP + group
                    weights = (keys[head, seen] @ query[which, i] / math.sqrt(SIZE)).softmax(-1)
                    tolerance = dict(rtol=1e-4, atol=1e-5) if codec == "dense" else dict(rtol=0, atol=0.05)
                    torch.testing.assert_close(outs[number][i, which].double(), weights @ values[head, seen], **tolerance)
    cache.close(cache.swap_in(cache.swap_out(cache.fork(slot))))
    cache.close(slot)
    cache.check_integrity()
    assert cache.rows.pool.used == 0


def merged(parts, sets):
    """Means of the tokens that are nearest to each position that stays, older ones first; the newest token stays alone."""
    _, keys, values = states(parts)
    raw, new_keys, new_values = parts[1].double().transpose(0, 1), keys.clone(), values.clone()
    for head, own in enumerate(sets):
        stay = sorted(own - {PROMPT - 1})
        groups = {n: [] for n in stay}
        for token in range(PROMPT - 1):
            groups[min(stay, key=lambda n, token=token: (abs(n - token), n))].append(token)
        for n, members in groups.items():
            mean = raw[head, members].mean(0)
            new_keys[head, n] = rotate(mean[None], tuple(x.double() for x in ROPE(torch.tensor([n]))))[0]
            new_values[head, n] = values[head, members].mean(0)
    return new_keys, new_values


@pytest.mark.parametrize("name", ["knorm", "random"])
@pytest.mark.parametrize("chunk", [PROMPT, 7])
def test_scores_that_tokens_bring_with_them(name, chunk):
    """A query sees itself, the token before it, and the older ones with the highest scores, of those that stayed so far."""
    layers = tokens(COUNT, seed=6)
    cache = cache_of(made(name))
    slot, outs = feed(cache, layers, PROMPT, chunk)
    for number, parts in enumerate(layers):
        query, key, value = states(parts)
        if name == "knorm":
            scores = -parts[1].double().norm(dim=-1).T
        else:
            scores = made(name).arrival(parts[1], parts[2], torch.arange(COUNT)).double().T
        for head in range(HEADS):
            stay = set(range(PROMPT - 1))
            for i in range(PROMPT, COUNT + 1):  # before query i: the token before it is not in the competition
                stay = set(sorted(stay, key=lambda n: (scores[head, n], n))[max(0, len(stay) - (BUDGET - 2)) :]) | {i - 1}  # noqa: B023
                if i == COUNT:
                    break
                seen = torch.tensor(sorted(stay | {i}))
                for group in range(GROUP):
                    which = head * GROUP + group
                    weights = (key[head, seen] @ query[which, i] / math.sqrt(SIZE)).softmax(-1)
                    torch.testing.assert_close(outs[number][i, which].double(), weights @ value[head, seen], rtol=1e-4, atol=1e-5)
            assert cache.entries(slot)[number, head] == len(stay)
    cache.close(slot)
    assert cache.rows.pool.used == 0


def test_random_scores_differ_by_seed_head_and_position_and_are_even():
    scores = policy("random", seed=1).arrival(torch.zeros(20000, 3, 4), None, torch.arange(20000))
    assert len(scores.unique()) > 0.99 * scores.numel() and abs(float(scores.mean()) - 0.5) < 0.01
    assert abs(float(torch.corrcoef(scores.T)[0, 1])) < 0.03
    assert (scores != policy("random", seed=2).arrival(torch.zeros(20000, 3, 4), None, torch.arange(20000))).float().mean() > 0.99


def test_a_share_of_the_prompt():
    layers = tokens(200, seed=1)
    for name, rounding in (("snapkv", 0), ("pyramidkv", 1), ("adakv", 0), ("expected", 0), ("merged", 0)):
        cache = cache_of(made(name, share=0.25))
        slot = cache.load(prefill(cache, layers, 200))
        assert abs(float(cache.entries(slot).double().mean()) - 50) <= rounding


def test_moments_of_stretches_are_those_of_the_whole():
    query = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    parts = Moments.of(query[:20]) + Moments.of(query[20:])
    for head in range(3):
        torch.testing.assert_close(parts.covariance[head], torch.cov(query[:, head].T, correction=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts.mean[head], query[:, head].mean(0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config(None)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.mark.parametrize("name", SETTINGS)
def test_alone_and_in_a_batch_and_in_chunks(name, directory):
    """The same tokens whatever the schedule; prompts are not shared by a policy that cuts them by their end."""
    prompts = [[7, 8, 9, 11] * 12, [7, 8, 9, 11] * 11 + [5], [3, 4] * 9]
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    make = lambda **more: LLM(  # noqa: E731
        directory, policy=made(name), device="cpu", dtype="fp32", page_size=8, **more
    )
    llm = make(max_batch=1)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert len(set(map(tuple, alone))) == 3
    for options in ({}, {"prefill_tokens": 5}):
        assert [output.token_ids for output in make(max_batch=3, **options).generate(prompts, params)] == alone


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("snapkv", dict(budget=20, window=32), "budget=20 must be more than the window of 32"),
        ("snapkv", dict(kernel=4), "kernel=4 must be odd"),
        ("snapkv", dict(window=0), "window=0 must be a whole number, at least 1"),
        ("pyramidkv", dict(beta=0), "beta=0 must be a whole number, at least 1"),
        ("adakv", dict(least=2), "least=2 must be between 0 and 1"),
        ("expected", dict(share=0.0), "share=0.0 must be above 0"),
        ("expected", dict(budget=5, sinks=4), "sinks=4 must be at most 3"),
        ("expected", dict(share=0.5, sinks=15), "at most 14"),
        ("merged", dict(of="h2o"), "of='h2o' must be one of snapkv, pyramidkv"),
        ("knorm", dict(budget=1), "budget=1 must be a whole number, at least 2"),
        ("random", dict(seed=-1), "seed=-1"),
    ],
)
def test_bad_settings_are_one_sentence(name, settings, said):
    with pytest.raises(ValueError, match=said):
        policy(name, **settings)


@pytest.mark.parametrize(
    ("base", "body", "said"),
    [
        (Policy, dict(evicts=True, prompt_only=True), "sets prompt_only and does not define keep_prompt"),
        (PromptPolicy, dict(visible=lambda self, places, queries: None), "sets prompt_only and defines visible"),
        (Policy, dict(arrival=lambda self, k, v, p: k), "defines arrival, so it must set merges to False"),
    ],
)
def test_contradictions_are_refused_when_a_class_is_made(base, body, said):
    with pytest.raises(TypeError, match=said):
        type("Odd", (base,), body)


def test_all_of_them_are_registered():
    assert set(SETTINGS) < set(POLICIES)
