"""Continuations over the compressed cache: against the model written out in fp64, and against `LLM.score`."""

import random

import pytest
import torch

from dmc.engine import LLM
from dmc.evaluation.continuations import Request, follow
from tests.model import tiny


def _model(tmp_path_factory, decision):
    fields = tiny.config(decision)
    tensors = tiny.weights(fields)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tensors), fields, tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return _model(tmp_path_factory, None)


@pytest.fixture(scope="module")
def retrofitted(tmp_path_factory):
    return _model(tmp_path_factory, "head")


def _tokens(seed, count):
    return random.Random(seed).choices(range(3, 90), k=count)


def _requests():
    shared = _tokens(1, 29)
    return [
        Request(shared, _tokens(2, 5)),
        Request(_tokens(3, 1), _tokens(4, 6)),
        Request(shared, 7),
        Request(_tokens(5, 11), 3),
        Request(shared, _tokens(6, 1)),
        Request(_tokens(7, 2), _tokens(8, 9)),
        Request(_tokens(3, 1), 2),
    ]


@pytest.mark.parametrize("decision, batch", [("head", 1), ("head", 16), (None, 3)])
def test_equals_the_model_written_out(plain, retrofitted, decision, batch):
    directory, fields, tensors = retrofitted if decision else plain
    llm = LLM(directory, dtype="fp64", max_batch=batch, page_size=4, device="cpu", prefill_tokens=16)
    done = []
    for request, scored in zip(_requests(), follow(llm, _requests(), done.append), strict=True):
        logits, _ = tiny.token_by_token(fields, tensors, [*request.context, *scored.tokens])
        expected = logits.log_softmax(-1)[len(request.context) - 1 : -1]
        own = expected[torch.arange(request.length), torch.tensor(scored.tokens)]
        assert (scored.logprobs.double() - own).abs().max() < 1e-5
        assert scored.greedy == bool((expected.argmax(-1) == torch.tensor(scored.tokens)).all())
        assert isinstance(request.continuation, list) or scored.greedy
        # All but the last token went into the cache.
        if request.length == 7:
            _, lengths = tiny.token_by_token(fields, tensors, [*request.context, *scored.tokens][:-1])
            assert torch.equal(scored.stats.entries, lengths)
        assert scored.stats.cached_tokens == len(request.context) + request.length - 1
    assert sum(done) == len(_requests())
    assert llm.cache.free_slots == batch + 4 and llm.cache.rows.pool.used == 0


@pytest.mark.parametrize("policy", ["dmc", "streaming", "h2o"])
def test_reads_encoded_pages_as_generation_does(retrofitted, policy):
    settings = {"streaming": {"sinks": 2, "recent": 12}, "h2o": {"heavy": 8, "recent": 8}}.get(policy, {})
    common = dict(policy=policy, policy_settings=settings, page_size=4, sink_tokens=1, device="cpu")
    lossy = LLM(retrofitted[0], codec="tcq", codec_settings={"bits": 2}, **common)
    dense = follow(LLM(retrofitted[0], **common), _requests())
    context, continuation = _requests()[0].context, _requests()[0].continuation
    for each, exact, request in zip(follow(lossy, _requests()), dense, _requests(), strict=True):
        (alone,) = lossy.score([[*request.context, *each.tokens]], prompt_tokens=max(1, len(request.context) - 1))
        assert torch.allclose(each.logprobs, alone.logprobs[len(request.context) - 1 :], atol=2e-5)
        if list(request.context) == context and request.continuation == continuation:
            assert each.stats.held["pages"] > 0
            assert (each.logprobs - exact.logprobs)[0].abs() > 1e-4  # the first scored token reads encoded pages already
    lossy.cache.check_integrity()
    assert lossy.cache.rows.pool.used == 0


@pytest.mark.parametrize(
    "requests, words",
    [
        ([Request([], [3])], "at least one token"),
        ([Request([3], [])], "at least one token"),
        ([Request([3], 0)], "at least one"),
        ([Request([3, 97], [4])], "outside the model's vocabulary of 97"),
        ([Request([3], [-1])], "outside"),
        ([Request([3] * 250, [4] * 8)], "250 tokens and a continuation of 8 need 257 positions"),
    ],
)
def test_bad_requests_are_refused(plain, requests, words):
    with pytest.raises(ValueError, match=words):
        follow(LLM(plain[0], device="cpu"), requests)


def test_memory(plain):
    llm = LLM(plain[0], device="cpu", page_size=4, kv_memory=40_000)
    scores = follow(llm, _requests())  # fewer at a time
    for scored, free in zip(scores, follow(LLM(plain[0], device="cpu", page_size=4), _requests()), strict=True):
        assert torch.allclose(scored.logprobs, free.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="kv_memory of .* pages cannot hold the longest request"):
        follow(LLM(plain[0], device="cpu", page_size=4, kv_memory=4_000), _requests())
