"""Bytes held at the shape and context that the base model is measured at."""

import pytest
import torch

from dmc.cache import KVCache, Shape, codec, policy
from dmc.rope import Rope
from tests.cache.stored import frequencies


@pytest.mark.parametrize("layers, shares", [(6, (0.02, 0.48)), (4, (0.25, 0.25)), (6, (0.1, 0.4))])
def test_tcq_at_cr_4_holds_a_seventh_of_dense_bf16(layers, shares):
    """1,000 tokens, 2 heads of size 64 that keep the given shares of their tokens, fp32 model: all settings default."""
    tokens, heads, size = 1000, 2, 64
    cache = KVCache(Shape(layers, heads, size, torch.float32), policy("dmc"), codec("tcq", bits=4), slots=1)
    rope = Rope(frequencies(size, 1e4))
    generator = torch.Generator().manual_seed(0)
    prompt, nobody = cache.prompt(), torch.empty(0, dtype=torch.int64)
    attend = cache.step(nobody, nobody, [(prompt, tokens)], rope)
    for layer in range(layers):
        query, key, value = torch.randn(3, tokens, heads, size, generator=generator)
        alpha = (torch.rand(tokens, heads, generator=generator) > torch.tensor(shares)).float()
        attend(layer, query, key, value, alpha, torch.ones(tokens, heads))
    slot = cache.load(prompt)
    cr = layers * heads * tokens / cache.entries(slot).sum().item()
    assert cr == pytest.approx(4, rel=0.05)
    ratio = cache.dense_bytes(tokens) / sum(cache.held(slot).values())
    assert ratio / (cr / 4) > 7
