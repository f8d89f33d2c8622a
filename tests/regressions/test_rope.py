"""RoPE settings that other projects dropped or misread, served here and compared with transformers' Llama."""

import pytest
import torch
from transformers import LlamaForCausalLM

from dmc import LLM, SamplingParams
from tests.model.ropes import KINDS, LONGROPE, YARN, fields
from tests.model.test_rope import directory_of


def assert_served(directory, length):
    """The log probabilities of a text that is half a prompt are those of transformers."""
    tokens = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = LlamaForCausalLM.from_pretrained(directory)(tokens).logits[0, :-1].log_softmax(-1)
    score = LLM(directory, device="cpu", dtype="fp32").score(tokens.tolist(), prompt_tokens=length // 2)[0]
    torch.testing.assert_close(score.logprobs, logs.gather(1, tokens[0, 1:, None])[:, 0], rtol=0, atol=1e-4)


# https://github.com/ml-explore/mlx-lm/pull/1507: an explicit attention_factor of YaRN was replaced by the computed one.
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_an_explicit_attention_factor_of_yarn_counts(factor, tmp_path):
    assert_served(directory_of(tmp_path, **fields(**YARN, attention_factor=factor)), 40)


# https://github.com/sgl-project/sglang/pull/22711: YaRN's mscale and mscale_all_dim were ignored, 28 % too large a factor.
def test_mscale_of_yarn_counts(tmp_path):
    assert_served(directory_of(tmp_path, **fields(**YARN, mscale=1.0, mscale_all_dim=1.0)), 40)


# https://github.com/sgl-project/sglang/pull/26187: YaRN under rope_parameters was dropped where rope_scaling was read.
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_yarn_counts_in_both_forms_of_the_settings(form, tmp_path):
    rope = dict(YARN)
    changes = {form: rope} if form == "rope_parameters" else {"rope_theta": rope.pop("rope_theta"), form: rope}
    assert_served(directory_of(tmp_path, **changes), 40)


# https://github.com/huggingface/transformers/issues/25104: beyond the trained length dynamic scaling rotates new keys otherwise
# than those in the cache.
def test_dynamic_scaling_is_served_where_it_fits_the_cache_and_refused_beyond(tmp_path):
    directory = directory_of(tmp_path, **KINDS["dynamic"])
    assert_served(directory, 64)
    with pytest.raises(ValueError, match="the keys in the cache are already rotated"):
        LLM(directory, device="cpu").generate([list(range(3, 60))], SamplingParams(max_tokens=8))


# https://github.com/huggingface/transformers/pull/33129: generation over the length at which longrope changes from short to long
# factors gave garbled text.
def test_generation_over_the_length_at_which_longrope_changes_is_refused(tmp_path):
    directory = directory_of(tmp_path, **KINDS["longrope"])
    with pytest.raises(ValueError, match="more than the 48 positions .*the keys in the cache are already rotated"):
        LLM(directory, device="cpu").generate([list(range(3, 44))], SamplingParams(max_tokens=8))


# https://github.com/unslothai/unsloth/pull/10681: a text of exactly the original length was rotated with the long factors.
def test_longrope_has_the_short_factors_at_exactly_the_original_length(tmp_path):
    assert_served(directory_of(tmp_path, **fields(256, **LONGROPE)), LONGROPE["original_max_position_embeddings"])
