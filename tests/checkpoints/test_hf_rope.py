"""The exported model code against transformers' Llama, where it merges and evicts nothing: every kind of RoPE.

dynamic and longrope change the frequencies of all tokens at a length. transformers leaves the keys in the cache as they
were rotated, and so does the export.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.hf_model.configuration_dmc_llama import DmcLlamaConfig
from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM
from tests.model.ropes import KINDS

FIELDS = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
NOTHING = {  # that is never decided
    "dmc": {"method": "dmc", "decision": "head", "offset": 1e9},
    "dms": {"method": "dms", "decision": "head", "offset": 1e9, "window": 5},
}


def models(method, changes):
    """(transformers' Llama, the export with the same weights)."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**FIELDS | changes)).eval()
    ours = DmcLlamaForCausalLM(DmcLlamaConfig(dmc=NOTHING[method], **FIELDS | changes)).eval()
    missing, unknown = ours.load_state_dict(llama.state_dict(), strict=False)
    assert not unknown and all("decision" in name for name in missing)
    return llama, ours


def text(rows, length, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("method", NOTHING)
@torch.no_grad()
def test_logits_at_any_length_and_in_any_pieces(method, changes):
    llama, ours = models(method, changes)
    tokens = text(2, 90)  # beyond the 64 and 48 at which dynamic and longrope change
    for length in (20, 90, 30):  # and back
        torch.testing.assert_close(ours(tokens[:, :length]).logits, llama(tokens[:, :length]).logits, rtol=1e-4, atol=1e-4)
    caches = [None, None]
    for piece in tokens.split([40, 1, 1, 20, 10, 1, 1, 16], 1):
        outs = [model(piece, past_key_values=cache, use_cache=True) for model, cache in zip((llama, ours), caches, strict=True)]
        caches = [out.past_key_values for out in outs]
        torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
@pytest.mark.parametrize("method", NOTHING)
def test_generation_over_the_length_at_which_the_frequencies_change(method, kind):
    llama, ours = models(method, KINDS[kind])
    settings = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False)
    prompt = text(2, 45)
    got, wanted = (model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings) for model in (ours, llama))
    assert torch.equal(got, wanted)
