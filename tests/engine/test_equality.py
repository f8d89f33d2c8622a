"""The engine's prefill and decode against Algorithm 1 run token by token through a whole model."""

import pytest
import torch

from dmc import LLM
from dmc.engine.runner import Chunk
from tests.model import tiny

TOKENS = [5, 17, 3, 88, 41, 7, 7, 60, 12, 33, 90, 4, 29, 51, 8, 77, 15, 62, 19, 44]


@pytest.fixture(scope="module", params=[("neuron", 2), ("neuron", 4), ("head", 1), ("head", 4)])
def model(request, tmp_path_factory):
    decision, heads = request.param
    fields = tiny.config(decision, heads=heads)
    tensors = tiny.weights(fields)
    directory = tiny.write(tmp_path_factory.mktemp("model"), fields, tensors)
    logits, lengths = tiny.token_by_token(fields, tensors, TOKENS)
    picked = logits[:-1].log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    _, shorter = tiny.token_by_token(fields, tensors, TOKENS[:-1])
    return directory, logits, picked, shorter


def test_both_decisions_happen(model):
    lengths = model[3]
    assert 0.25 < lengths.sum() / (lengths.numel() * (len(TOKENS) - 1)) < 0.9


@pytest.mark.parametrize("dtype, tolerance", [("fp64", 1e-6), ("fp32", 1e-4)])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_any_split_into_prompt_and_generated(model, dtype, tolerance, page_size):
    """fp64 still rotates by angles computed in fp32, hence 1e-6."""
    directory, _, expected, lengths = model
    llm = LLM(directory, codec="dense", dtype=dtype, page_size=page_size, device="cpu")
    for prompt in (1, 2, 9, len(TOKENS) - 1):
        score = llm.score([TOKENS], prompt_tokens=prompt)[0]
        torch.testing.assert_close(score.logprobs.double(), expected, rtol=0, atol=tolerance)
        assert torch.equal(score.stats.entries, lengths)
        assert score.stats.cr == pytest.approx(lengths.numel() * (len(TOKENS) - 1) / lengths.sum().item())
        assert llm.cache.rows.pool.used == 0
        llm.cache.check_integrity()


def test_whole_logits_after_a_prompt(model):
    directory, expected, _, _ = model
    llm = LLM(directory, dtype="fp32", device="cpu")
    _, (hidden,) = llm.engine.runner.step([], [], [], [Chunk(llm.cache.prompt(), TOKENS)])
    torch.testing.assert_close(llm.model.logits(hidden).double(), expected, rtol=0, atol=1e-4)


def test_alone_is_batched(model):
    """Prompts of different length in one batch, joining as slots come free, give what each gives alone."""
    directory, _, _, _ = model
    llm = LLM(directory, codec="dense", page_size=4, max_batch=2, device="cpu")
    sequences = [TOKENS, TOKENS[3:9], TOKENS[::-1], TOKENS[5:7]]
    for prompt in (1, 4):
        together = llm.score(sequences, prompt_tokens=prompt)
        for tokens, score in zip(sequences, together, strict=True):
            alone = llm.score([tokens], prompt_tokens=prompt)[0]
            torch.testing.assert_close(score.logprobs, alone.logprobs, rtol=0, atol=1e-5)
            assert torch.equal(score.stats.entries, alone.stats.entries)
            assert score.stats.held == alone.stats.held


def test_policy_full_merges_nothing(model):
    score = LLM(model[0], policy="full", device="cpu").score([TOKENS], prompt_tokens=5)[0]
    assert score.stats.cr == 1 and (score.stats.entries == len(TOKENS) - 1).all()
