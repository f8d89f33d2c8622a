"""A plain Llama on a CPU: alone, batched and in chunks it chooses the same tokens; logprobs differ by rounding alone."""

import pytest

from dmc import LLM, SamplingParams
from tests.model import tiny

PROMPTS = [list(range(1, length + 1)) for length in (3, 70, 33, 50, 1)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config(None)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


def answers(directory, **settings):
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=3)
    llm = LLM(directory, page_size=8, device="cpu", **settings)
    return llm.generate(PROMPTS, greedy)


@pytest.mark.parametrize("codec", ["dense", "int8", "tcq"])
def test_fp32(directory, codec):
    together = answers(directory, codec=codec, max_batch=5)
    for settings in ({"max_batch": 1}, {"max_batch": 2, "prefill_tokens": 17}):
        for ours, other in zip(answers(directory, codec=codec, **settings), together, strict=True):
            assert ours.token_ids == other.token_ids
            for one, another in zip(ours.logprobs, other.logprobs, strict=True):
                assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
