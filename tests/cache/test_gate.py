"""Policy gate in the cache: sinks, weights of merged tokens, and what is rejected.

The expectation is dense: `dmc.functional_dms.attention` for eviction, `dmc.functional.attention` for merging.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.policies import Policy
from tests.cache.decisions import random_decisions
from tests.cache.test_late import HEADS, LAYERS, ROPE, SIZE, feed, tokens


def make(window, sinks, **changes):
    made = policy("gate", decisions=random_decisions(window=window, sinks=sinks), target_cr=2, length=300, **changes)
    return KVCache(Shape(LAYERS, HEADS, SIZE, torch.float32), made, codec("dense"), slots=2, page_size=4)


def dense(parts, window, sinks, merge, power=1.0):
    """Outputs, and entries per head once the last token is read: a loop over tokens decides."""
    query, key, value, logits, _, late = parts
    length = len(query)
    alpha, omega = torch.zeros(1, HEADS, length), torch.ones(1, HEADS, length)
    for t in range(length - window):
        for head in range(HEADS):
            logit = logits[t, head] + (late[t + window, head] if late is not None else 0)
            alpha[0, head, t] = logit > 0 and t >= sinks + merge
            omega[0, head, t] = torch.exp(-power * logit)
    rope = ROPE(torch.arange(length))
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    if merge:
        out = fn.attention(query, key, value, alpha, omega, window=window, rope=rope)
    else:
        out = dms.attention(query, key, value, alpha, window=window, rope=rope)
    left = max(0, length - window)
    return out[0].transpose(0, 1), length - left + (1 - alpha[0, :, :left]).sum(-1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 50),
    st.data(),
    st.booleans(),
    st.integers(0, 20),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 999),
)
def test_queries_see_what_the_definition_says(length, data, merge, window, sinks, ahead, power, seed):
    """Any split of a text into prompt chunks and generated tokens gives the dense result, and as many entries."""
    prompt = data.draw(st.integers(1, length))
    chunk = data.draw(st.integers(1, prompt))
    layers = tokens(length, seed, ahead)
    cache = make(window, sinks, **({"merge": True, "power": power} if merge else {}))
    slot, outs = feed(cache, layers, prompt, chunk)
    for i, parts in enumerate(layers):
        out, entries = dense(parts, window, sinks, merge, power)
        torch.testing.assert_close(outs[i], out, rtol=1e-4, atol=1e-5)
        assert torch.equal(cache.entries(slot)[i].float(), entries)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("prompt", [1, 3, 11, 40])
def test_sinks_stay_whatever_the_logits_are(prompt, merge):
    layers = [(*parts[:3], torch.full_like(parts[3], torch.inf), *parts[4:]) for parts in tokens(40, 1)]
    slot, outs = feed(cache := make(5, 3, merge=merge), layers, prompt, 2)
    assert (cache.entries(slot) == 5 + 3 + merge).all()
    assert all(out.isfinite().all() for out in outs)


def test_no_other_policy_keeps_sinks_behind_a_ring():
    assert Policy.sinks == policy("dms").sinks == policy("dmc", window=4).sinks == 0


def test_settings():
    fitted = random_decisions(window=9, sinks=3)
    made = policy("gate", decisions=fitted, target_cr=3, merge="true", power=0.5)
    assert (made.ring, made.sinks, made.merges, made.length, made.likely_cr) == (9, 3, True, 1024, 3)
    assert made.threshold == fitted.threshold(3, 1024)
    assert policy("gate", decisions=fitted, target_cr=3, length=200, merge="false").threshold == fitted.threshold(3, 200)
    fitted.meta["length"] = 512
    assert policy("gate", decisions=fitted, target_cr=3).threshold == fitted.threshold(3, 512)
    assert not policy("gate", decisions=fitted, target_cr=3).merges


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decisions": None}, "policy gate needs decisions: give a file that `dmc calibrate MODEL --decisions` has made"),
        ({"target_cr": None}, "policy gate needs target_cr"),
        ({"target_cr": "x"}, "target_cr=x must be a number"),
        ({"target_cr": 0.5}, "at least 1, got 0.5"),
        ({"target_cr": 200}, "target CR 200 is impossible at 1024 tokens"),
        ({"target_cr": 3, "length": 20}, "impossible at 20 tokens"),
        ({"length": 1.5}, "length=1.5 must be a whole number"),
        ({"merge": 1}, "merge=1 must be true or false"),
        ({"merge": "yes"}, "merge=yes must be true or false"),
        ({"power": 1}, "give merge=true"),
        ({"merge": True, "power": -1}, "power=-1 must be a finite number"),
        ({"merge": True, "power": float("inf")}, "power=inf must be"),
        ({"decisions": "none.safetensors"}, "none.safetensors is missing"),
        ({"window": 4}, "no setting window"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        policy("gate", **{"decisions": random_decisions(window=9), "target_cr": 3} | changes)
