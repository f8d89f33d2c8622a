"""The engine on a GPU, where the kernels read the cache, against the same engine on the CPU."""

import pytest
import torch

from dmc import LLM, SamplingParams
from tests.model import tiny

PROMPTS = [[7, 8, 9], list(range(3, 45)), [5] * 30]


@pytest.fixture(scope="module", params=["head", "neuron"])
def directory(tmp_path_factory, request):
    fields = tiny.config(request.param)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["dense", "int8", "gear", "tcq", "kivi"])
def test_scores_and_tokens_are_those_of_the_cpu(directory, codec):
    """fp32: log-probabilities fed one by one, and greedy tokens as far as the CPU's are clearly ahead."""
    both = [LLM(directory, codec=codec, page_size=16, device=device, dtype="fp32") for device in ("cuda", "cpu")]
    assert both[0].cache.readers[0].on_pages
    tokens = [prompt + list(range(10, 60)) for prompt in PROMPTS]
    ours, theirs = (llm.score(tokens, prompt_tokens=2) for llm in both)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.logprobs.cpu(), b.logprobs, rtol=1e-3, atol=2e-3)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    a, b = (llm.generate(PROMPTS, params) for llm in both)
    assert [x.token_ids[:4] for x in a] == [x.token_ids[:4] for x in b]
    both[0].cache.check_integrity()


@pytest.mark.gpu
def test_bf16_runs_at_every_batch(directory):
    llm = LLM(directory, codec="tcq", codec_settings={"bits": 4}, page_size=32, device="cuda", dtype="bf16")
    params = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    together = llm.generate(PROMPTS, params)
    assert all(len(x.token_ids) == 80 for x in together)
    assert llm.generate(PROMPTS[:1], params)[0].token_ids[:5] == together[0].token_ids[:5]
