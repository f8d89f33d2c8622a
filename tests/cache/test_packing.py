"""Layers with codecs of their own: each behaves as in a cache where all layers have its codec and its page size."""

import pytest
import torch

from dmc.cache import KVCache, Shape, codec, policy
from tests.cache.test_policies import Heavy
from tests.cache.test_rows import HEADS, LAYERS, SIZE, decode, feed, prefill, tokens

SHAPE = Shape(LAYERS, HEADS, SIZE, torch.float32)
PAIRS = {
    "tcq": (lambda: codec("tcq", bits=8), lambda: codec("tcq", bits=2)),
    "other": (lambda: codec("int8"), lambda: codec("gear", bits=2, backbone="token", group=8, rank=0, outliers=0)),
    "dense": (lambda: codec("dense", dtype="fp32"), lambda: codec("fp8")),
}


def made(codecs, page_size=4, policy_=None, **changes):
    sizes = {"slots": 2, "sink_tokens": 2, "window": 1, "exact_dtype": "bf16"} | changes
    return KVCache(SHAPE, policy_ or policy("dmc"), codecs, page_size=page_size, **sizes)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("evicting", [False, True])
def test_a_layer_is_as_it_is_alone(kind, evicting):
    codecs, layers = [make() for make in PAIRS[kind]], tokens(50, seed=5)
    cache = made(codecs, policy_=Heavy() if evicting else None)
    first, second = (packing.page_size for packing in cache.rows.packings)
    assert first < second
    slot, outs = feed(cache, layers, prompt=30)
    slot = cache.swap_in(cache.swap_out(slot))
    cache.check_integrity()
    for i, (own, packing) in enumerate(zip(codecs, cache.rows.packings, strict=True)):
        alone = made(own, packing.page_size, Heavy() if evicting else None)
        there, want = feed(alone, layers, prompt=30)
        torch.testing.assert_close(outs[i], want[i], rtol=1e-5, atol=1e-6)
        assert torch.equal(cache.entries(slot)[i], alone.entries(there)[i])
        index = cache.rows.index(i, torch.tensor([slot]))
        assert torch.equal(cache.rows.encoded_count[index], alone.rows.encoded_count[alone.rows.index(i, torch.tensor([there]))])


def test_pages_are_as_full_as_they_can_be():
    """Every layer's page fits, one more entry would not; the average layer has about the entries asked for."""
    codecs = [codec("tcq", bits=bits) for bits in (4, 2)]
    cache = made(codecs, None)
    rows = cache.rows
    for packing in rows.packings:
        more = packing.codec.layout(packing.page_size + 1, SIZE, torch.bfloat16)
        size = sum(kind.itemsize * torch.Size(shape).numel() for kind, shape in more.values())
        assert packing.layout.nbytes <= rows.pool.page_bytes < size
    assert rows.packings[0].page_size < 32 < rows.packings[1].page_size
    slot = cache.load(prefill(cache, tokens(200, seed=1), 200))
    held = cache.held(slot)
    assert held["pages"] + held["exact"] == rows.pool.used * rows.pool.page_bytes
    layers = tokens(210, seed=1)
    before = cache.append_pages(torch.tensor([slot]))
    free = rows.pool.used
    decode(cache, slot, layers, 200)
    assert rows.pool.used - free <= before


def test_pages_that_are_predicted_are_pages_that_are_taken():
    cache = made([codec("tcq", bits=4), codec("tcq", bits=2)], 6, policy("full"))
    for count in (1, 9, 23, 60):
        slot = cache.load(prefill(cache, tokens(count, seed=count), count))
        entries = cache.entries(slot)
        assert cache.likely_pages(entries.float()) == cache.rows.pool.used <= cache.worst_pages(count)
        cache.close(slot)


def test_as_many_codecs_as_layers():
    with pytest.raises(ValueError, match="3 codecs were given, one per layer, but the model has 2 layers"):
        made([codec("int8")] * 3)
