"""Attention of the report against transformers and against loops; its entropy at the extremes."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dmc import functional as fn
from dmc.analysis import attention
from dmc.analysis.attention import FIRST, NEWEST, States, attend, states, weights
from dmc.model import Decoder

BASE = Path(__file__).parents[2] / "checkpoints/base"


def _random_gqa(directory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _layers(directory, tokens):
    model, kept = Decoder.load(directory, dtype=torch.float32), []
    rope = model.rope(torch.arange(len(tokens)))

    def through(_, *parts):
        kept.append(states(*parts, rope))
        return attend(kept[-1], 4).out

    with torch.no_grad():
        model.hidden(torch.tensor(tokens), through)
    return kept


@pytest.mark.parametrize("name", ["random", "base"])
def test_weights_are_those_of_transformers(name, tmp_path, monkeypatch):
    directory = BASE if name == "base" else _random_gqa(tmp_path)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(model.config.vocab_size, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), output_attentions=True).attentions
    monkeypatch.setattr(attention, "_SCORES", 70 * 6 * 9)  # chunks of 9 queries or so
    layers = _layers(directory, tokens)
    assert len(layers) == len(expected)
    for layer, theirs in zip(layers, expected, strict=True):
        chunks = list(weights(layer))
        assert len(chunks) > 5 and [start for start, _ in chunks][1] == chunks[0][1].shape[2]
        ours = torch.cat([chunk for _, chunk in chunks], dim=2).flatten(0, 1)
        torch.testing.assert_close(ours, theirs[0], atol=2e-5, rtol=1e-4)
        found = attend(layer, 50)
        torch.testing.assert_close(found.leading, ours[:, :50, :50])
        logs = torch.where(ours > 0, ours.log2(), 0.0)
        torch.testing.assert_close(found.entropy, -(ours * logs).sum(-1), atol=1e-5, rtol=1e-4)
        late = ours[:, FIRST + NEWEST - 1 :]
        torch.testing.assert_close(found.first, late[..., :FIRST].sum(-1).mean(-1))
        near = torch.stack([late[:, i, t - NEWEST + 1 : t + 1].sum(-1) for i, t in enumerate(range(FIRST + NEWEST - 1, 70))])
        torch.testing.assert_close(found.newest, near.mean(0))


def test_output_is_that_of_the_reference_with_merges():
    generator = torch.Generator().manual_seed(2)
    heads, group, tokens, size = 2, 3, 40, 8

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = normal(tokens, heads * group, size), normal(tokens, heads, size), normal(tokens, heads, size)
    alpha, omega = (normal(tokens, heads) > 0).double(), normal(tokens, heads).sigmoid()
    angle = normal(tokens, size // 2).repeat(1, 2)
    rope = angle.cos(), angle.sin()
    layer = states(query, key, value, alpha, omega, rope)
    expected = fn.attention(*(x.transpose(0, 1)[None] for x in (query, key, value, alpha, omega)), rope=rope)[0]
    found = attend(layer, 40)
    torch.testing.assert_close(found.out.transpose(0, 1), expected)
    torch.testing.assert_close(found.leading.sum(-1), torch.ones(heads * group, tokens, dtype=torch.float64))
    seen = (found.leading > 0).sum(-1).view(heads, group, tokens)
    assert torch.equal(layer.visible[:, None].expand_as(seen), seen)
    alpha[0] = 0
    assert [len(layer.entries(head)[0]) for head in range(heads)] == (1 - alpha).sum(0).long().tolist()


def _states(query, keys):
    return States(query, keys, keys, keys, torch.zeros(keys.shape[:2], dtype=torch.bool))


def test_entropy_of_even_and_of_one_hot_attention():
    tokens, size = 64, 64
    even = attend(_states(torch.zeros(1, 2, tokens, size), torch.randn(1, tokens, size)), tokens)
    expected = torch.tensor([math.log2(t) for t in range(1, tokens + 1)])
    torch.testing.assert_close(even.entropy, expected.expand(2, -1))
    one_hot = attend(_states(1000 * torch.eye(tokens)[None, None], torch.eye(tokens)[None]), tokens)
    assert one_hot.entropy.abs().max() < 1e-6
    assert one_hot.newest == pytest.approx(1) and one_hot.first == pytest.approx(0)


def test_shares_need_tokens_enough():
    short = attend(_states(torch.zeros(1, 1, FIRST + NEWEST - 1, 4), torch.zeros(1, FIRST + NEWEST - 1, 4)), 8)
    assert short.first.isnan().all() and short.newest.isnan().all() and short.leading.shape == (1, 8, 8)
