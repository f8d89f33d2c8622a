"""The serving model of every family against transformers' own class."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dmc import LLM
from tests.families.models import FAMILIES, directory

TOKENS = torch.randint(3, 2048, (1, 60), generator=torch.Generator().manual_seed(0))


def by_transformers(path, dtype):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(TOKENS[:, :-1]).logits[0].double()
    return logits.log_softmax(-1).gather(1, TOKENS[0, 1:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_in_fp32_and_bf16(family, tmp_path):
    """bf16: within twice of what rounding does to transformers' own model."""
    path = directory(tmp_path, family)
    exact = by_transformers(path, torch.float64)
    for dtype, limit in (("fp32", 1e-4), ("bf16", 2 * (by_transformers(path, torch.bfloat16) - exact).abs().max())):
        for prompt in (1, 30):
            score = LLM(path, device="cpu", dtype=dtype, page_size=4).score(TOKENS.tolist(), prompt_tokens=prompt)[0]
            assert (score.logprobs.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", ["int8", "tcq-4bit"])
def test_codecs_take_every_family(family, codec, tmp_path):
    path = directory(tmp_path, family)
    score = LLM(path, device="cpu", dtype="fp32", codec=codec, page_size=8).score(TOKENS.tolist(), prompt_tokens=20)[0]
    assert (score.logprobs.double() - by_transformers(path, torch.float64)).abs().mean() < 0.5  # of random weights' logits
