"""The serving model with an uncompressed cache against transformers' Llama."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dmc import LLM
from dmc.cache import KVCache, Shape, codec, policy
from dmc.model import Decoder
from tests.model import tiny
from tests.model.ropes import KINDS

CASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    **KINDS,
}


def hugging_face(directory, **changes):
    torch.manual_seed(0)
    fields = {**tiny.config(), **changes}
    del fields["model_type"]
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits(changes, tmp_path):
    reference = hugging_face(tmp_path, **changes)
    model = Decoder.load(tmp_path, dtype=torch.float32)
    tokens, nobody = torch.randint(0, tiny.VOCAB, (3, 40)), torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        expected = reference(tokens).logits
    heads = model.config.num_key_value_heads
    cache = KVCache(Shape(tiny.LAYERS, heads, tiny.SIZE, torch.float32), policy("full"), codec("dense"), slots=3, page_size=4)
    prompts = [cache.prompt() for _ in range(3)]
    attend = cache.step(nobody, nobody, [(prompt, 25) for prompt in prompts], model.rope)
    hidden = model.hidden(tokens[:, :25].flatten(), attend)  # three prompts in one pass
    torch.testing.assert_close(model.logits(hidden).unflatten(0, (3, 25)), expected[:, :25], rtol=1e-4, atol=1e-4)
    slots = torch.tensor([cache.load(prompt) for prompt in prompts])
    for place in range(25, 40):
        attend = cache.step(slots, torch.full((3,), place), [], model.rope)
        logits = model.logits(model.hidden(tokens[:, place], attend))
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-4, atol=1e-4)
        cache.check_integrity()
    assert (cache.entries(0) == 40).all()


def test_shards_and_old_rope_fields(tmp_path):
    reference = hugging_face(tmp_path / "whole", rope_parameters={"rope_type": "linear", "rope_theta": 99.0, "factor": 2.0})
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    fields = tiny.config(rope_theta=99.0, rope_scaling={"type": "linear", "factor": 2.0})
    del fields["rope_parameters"]
    (tmp_path / "shards" / "config.json").write_text(json.dumps(fields))
    tokens = [3, 14, 15, 92, 65, 35]
    with torch.no_grad():
        logs = reference(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = logs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for directory in ("whole", "shards"):
        score = LLM(tmp_path / directory, device="cpu").score([tokens], prompt_tokens=3)[0]
        torch.testing.assert_close(score.logprobs, expected, rtol=1e-4, atol=1e-4)
        assert score.stats.cr == 1  # a plain Llama never merges


def test_bf16_runs(tmp_path):
    fields = tiny.config("head")
    directory = tiny.write(tmp_path, fields, tiny.weights(fields))
    tokens = list(range(3, 40))
    exact = LLM(directory, dtype="fp32", device="cpu").score([tokens])[0]
    rough = LLM(directory, dtype="bf16", device="cpu").score([tokens])[0]
    assert (exact.logprobs - rough.logprobs).abs().mean() < 0.3
    assert rough.stats.held["tail"] == exact.stats.held["tail"]  # fp32 whatever the model's dtype
