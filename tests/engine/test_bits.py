"""A plain Llama on a CPU whose loops multiply: alone, batched and in chunks its logprobs are the same numbers, bit for bit."""

import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.kernels.linear.cpu import takes
from tests.model import tiny

PROMPTS = [list(range(1, length + 1)) for length in (3, 70, 33, 50, 1)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config(None)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.mark.parametrize("codec", ["dense", "int8", "tcq"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits(directory, dtype, codec):
    if not takes(torch.float32 if dtype == "fp32" else torch.bfloat16):
        pytest.skip("no loops for such products on this CPU")
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=3)

    def answers(**settings):
        llm = LLM(directory, codec=codec, page_size=8, device="cpu", dtype=dtype, **settings)
        return [(output.token_ids, output.logprobs) for output in llm.generate(PROMPTS, greedy)]

    together = answers(max_batch=5)
    assert answers(max_batch=1) == together and answers(max_batch=2, prefill_tokens=17) == together
