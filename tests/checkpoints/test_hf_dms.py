"""The exported model code with DMS: caches that evict, in batches, chunks, blocks and beams."""

import pytest
import torch

from checkpoints.hf_model import eviction_dmc_llama
from checkpoints.hf_model.cache_dmc_llama import DmcCache
from checkpoints.hf_model.configuration_dmc_llama import DmcLlamaConfig
from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM

WINDOW = 4


def made(decision="head", heads=2, **dmc):
    """A random model that marks about half of its tokens."""
    torch.manual_seed(0)
    config = DmcLlamaConfig(
        dmc={"method": "dms", "window": WINDOW, "decision": decision, "offset": 0.0} | dmc,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return DmcLlamaForCausalLM(config).eval()


def text(length, seed=1, rows=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["head", "neuron", "mha", "late"])
def model(request):
    if request.param == "late":
        return made(decide="late")
    return made("head" if request.param == "head" else "neuron", 4 if request.param == "mha" else 2)


@torch.no_grad()
def test_chunks_and_blocks_of_queries_are_one_pass(model, monkeypatch):
    tokens = text(40, rows=2)
    whole = model(tokens)
    lengths = whole.past_key_values.lengths()
    assert (lengths < 40).all() and (lengths >= WINDOW).all() and lengths.float().mean() < 32
    assert max(layer.keys.shape[2] for layer in whole.past_key_values.layers) == lengths.max()  # what went is not held
    monkeypatch.setattr(eviction_dmc_llama, "_QUERIES", 7)
    cache, logits = None, []
    for part in tokens.split(9, 1):
        out = model(part, past_key_values=cache)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(cache.lengths(), lengths)
    assert cache.layers[0].keys.shape[2] == lengths[0].max()
    assert cache.compression_ratio() == pytest.approx(40 / lengths.float().mean().item())


def test_a_padded_batch_generates_what_each_does_alone(model):
    prompts = [text(5, 1), text(23, 2), text(12, 3)]
    settings = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    padded = torch.cat([torch.nn.functional.pad(prompt, (23 - prompt.shape[1], 0)) for prompt in prompts])
    together = model.generate(padded, attention_mask=(padded != 0).long(), **settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(together.sequences[row, 23:], alone.sequences[0, prompt.shape[1] :])
        assert torch.equal(together.past_key_values.lengths()[:, row], alone.past_key_values.lengths()[:, 0])


@torch.no_grad()
def test_packed_documents_are_each_alone():
    """Decided late: what a document's end would add to a logit never comes from the next document."""
    model, rows = made(decide="late"), [text(n, n) for n in (3, 17, 9, 26)]
    packed = model(torch.cat(rows, 1), position_ids=torch.cat([torch.arange(row.shape[1]) for row in rows])[None])
    torch.testing.assert_close(packed.logits, torch.cat([model(row).logits for row in rows], 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(packed.past_key_values.lengths(), model(rows[-1]).past_key_values.lengths())


def test_beams_are_those_without_a_cache(model):
    prompt = text(9)
    settings = dict(num_beams=3, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(model.generate(prompt, **settings), model.generate(prompt, use_cache=False, **settings))


@torch.no_grad()
def test_a_window_of_everything_is_a_plain_llama():
    """And one of less is not: the window is what is used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokens = made(window=50), text(40)
    fields = {key: value for key, value in model.config.to_dict().items() if key not in ("dmc", "model_type")}
    plain = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "decision" not in k})
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (made()(tokens).logits - plain(tokens).logits).abs().max() > 1e-2


def test_what_is_refused(model):
    cache = model(text(6)).past_key_values
    with pytest.raises(ValueError, match="nor evicted ones brought back"):
        cache.crop(3)
    with pytest.raises(ValueError, match="a cache for dmc, and this model is a dms one"):
        model(text(6), past_key_values=DmcCache(2))
    with pytest.raises(ValueError, match="dmc.method must be one of dmc, dms, got 'h2o'"):
        made(method="h2o")
    for window in (0, 2.5, None, True):
        with pytest.raises(ValueError, match="dmc.window must be a whole number of at least 1"):
            made(window=window)
