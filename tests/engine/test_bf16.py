"""The engine in bf16 on a CPU, where pages are read by the same loops as in fp32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dmc import LLM, SamplingParams
from dmc.kernels.backend import using
from tests.model import tiny

SEQUENCES = [[7, 8, 9] + list(range(10, 70)), list(range(3, 45)), [5] * 30]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config(None)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


def logprobs(llm, prompt_tokens):
    return torch.cat([score.logprobs for score in llm.score(SEQUENCES, prompt_tokens=prompt_tokens)]).double()


def reference(directory, dtype):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        every = [model(torch.tensor([tokens])).logits[0].double().log_softmax(-1) for tokens in SEQUENCES]
    picked = [x[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0] for x, tokens in zip(every, SEQUENCES, strict=True)]
    return torch.cat(picked)


@pytest.mark.parametrize("prompt_tokens", [1, 20])
def test_no_further_from_fp64_than_transformers_in_bf16(directory, prompt_tokens):
    exact, theirs = reference(directory, torch.float64), reference(directory, torch.bfloat16)
    ours = logprobs(LLM(directory, dtype="bf16", device="cpu", page_size=4), prompt_tokens)
    error, allowed = ((x - exact).square().mean().sqrt() for x in (ours, theirs))
    assert 1e-4 < error < 1.5 * allowed


@pytest.mark.parametrize("codec", ["dense", "int8", "fp8", "tcq"])
def test_the_loops_are_pytorchs_form(directory, codec):
    settings = dict(dtype="bf16", device="cpu", page_size=8, codec=codec)
    llm = LLM(directory, **settings)
    assert llm.cache.rows.storage.exact_dtype == torch.bfloat16 and llm.cache.readers[0].on_pages
    with using("torch"):
        plain = LLM(directory, **settings)
        assert not plain.cache.readers[0].on_pages
        expected = logprobs(plain, 1)
    difference = (logprobs(llm, 1) - expected).abs()
    assert difference.mean() < 0.01 and difference.max() < 0.1


def test_it_generates(directory):
    llm = LLM(directory, dtype="bf16", device="cpu", codec="tcq", page_size=8)
    outputs = llm.generate(SEQUENCES, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [40] * 3
    llm.cache.check_integrity()
    assert llm.cache.rows.pool.used == 0
