"""Late merging and late eviction in the cache: what queries see, what is held, and every way a sequence can come about.

The expectation is dense: `dmc.functional.attention` with a window, or `dmc.functional_dms.attention`.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.cache import KVCache, Shape, policy
from dmc.rope import Rope
from tests.cache.decisions import random_decisions
from tests.cache.stored import frequencies, stored

LAYERS, HEADS, QUERY_HEADS, SIZE = 2, 2, 4, 8
NOBODY = torch.empty(0, dtype=torch.int64)
ROPE = Rope(frequencies(SIZE, 100.0))


def make(codec_name="dense", *, name="dmc", window=5, slots=3, memory=None, dtype=torch.float32, most=None, **changes):
    sizes = {"page_size": 4, "sink_tokens": 2, "window": 1} | changes
    made = policy(name, window=window, **({} if most is None else {"max_entries": most}))
    return KVCache(
        Shape(LAYERS, HEADS, SIZE, dtype),
        made,
        stored(codec_name, layers=LAYERS, heads=HEADS, size=SIZE),
        slots=slots,
        memory=memory,
        **sizes,
    )


def tokens(count, seed, ahead=True):
    """(query, key, value, logits, omega, late) of ``count`` tokens for each layer."""
    g = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(LAYERS):
        made = [torch.randn(count, heads, SIZE, generator=g) for heads in (QUERY_HEADS, HEADS, HEADS)]
        made += [torch.randn(count, HEADS, generator=g), torch.randn(count, HEADS, generator=g).sigmoid()]
        layers.append((*made, torch.randn(count, HEADS, generator=g) if ahead else None))
    return layers


def part(parts, start, end):
    return [None if x is None else x[start:end] for x in parts]


def prefill(cache, layers, length, chunk, outs):
    made = cache.prompt()
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        attend = cache.step(NOBODY, NOBODY, [(made, end - start)], ROPE)
        for i, parts in enumerate(layers):
            outs[i].append(attend(i, *part(parts, start, end)))
    return made


def decode(cache, slots, texts, position):
    attend = cache.step(torch.tensor(slots), torch.tensor([position] * len(slots)), [], ROPE)
    outs = []
    for i in range(LAYERS):
        each = [part(layers[i], position, position + 1) for layers in texts]
        outs.append(attend(i, *(None if x[0] is None else torch.cat(x) for x in zip(*each, strict=True))))
    return outs


def feed(cache, layers, prompt, chunk):
    outs = [[] for _ in layers]
    slot = cache.load(prefill(cache, layers, prompt, chunk, outs))
    cache.check_integrity()
    for position in range(prompt, len(layers[0][0])):
        for i, out in enumerate(decode(cache, [slot], [layers], position)):
            outs[i].append(out)
        cache.check_integrity()
    return slot, [torch.cat(out) for out in outs]


def decisions(parts, window, name, most=None):
    """Hard alpha ``[1, H, T]`` of tokens that leave the window: 1 merges or drops. ``most`` entries open at most."""
    logits = parts[3].T.clone()
    if parts[5] is not None and len(parts[5]) > window:
        logits[:, : len(parts[5]) - window] += parts[5][window:].T
    alpha = (logits > 0).float()
    if name == "dmc":
        alpha[:, 0] = 0
    if most is not None:
        opens = (alpha == 0).cumsum(-1)
        alpha = torch.where(opens > most, 1.0, alpha)
    return alpha[None]


def expected(parts, window, name, most=None):
    query, key, value, _, omega, _ = parts
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    alpha, rope = decisions(parts, window, name, most), ROPE(torch.arange(query.shape[2]))
    if name == "dms":
        return dms.attention(query, key, value, alpha, window=window, rope=rope)[0].transpose(0, 1)
    return fn.attention(query, key, value, alpha, omega.T[None], window=window, rope=rope)[0].transpose(0, 1)


def held(parts, window, name, most=None):
    """Entries of each head after the last token: the ring, and what left it."""
    left = decisions(parts, window, name, most)[0, :, : max(0, len(parts[0]) - window)]
    return min(window, len(parts[0])) + (1 - left).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.data(),
    st.sampled_from(["dmc", "dms"]),
    st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 70)),
    st.booleans(),
    st.sampled_from([None, 1, 2, 5]),
    st.integers(1, 7),
    st.integers(0, 5),
    st.integers(0, 4),
    st.integers(0, 999),
)
def test_queries_see_what_the_definition_says(length, data, name, window, ahead, most, page_size, sinks, recent, seed):
    """Any split of a text into prompt chunks and generated tokens gives the dense result, and as many entries."""
    most = None if most is None else most + sinks
    prompt = data.draw(st.integers(1, length))
    chunk = data.draw(st.integers(1, prompt))
    layers = tokens(length, seed, ahead and window > 0)
    cache = make(name=name, window=window, most=most, page_size=page_size, sink_tokens=sinks)
    slot, outs = feed(cache, layers, prompt, chunk)
    for i, parts in enumerate(layers):
        torch.testing.assert_close(outs[i], expected(parts, window, name, most), rtol=1e-4, atol=1e-5)
        assert torch.equal(cache.entries(slot)[i].float(), held(parts, window, name, most).float())
    assert cache.rows.pool.used <= cache.worst_pages(length)
    if most is not None:
        assert cache.entries(slot).max() <= window + most and cache.worst_pages(length) <= cache.worst_pages(window + most)
    cache.close(slot)
    cache.check_integrity()
    assert cache.rows.pool.used == 0


@pytest.mark.parametrize("name", ["dmc", "dms"])
def test_alone_equals_batched_equals_preempted_equals_forked(name):
    """Bit for bit, of sequences that are at the same position."""
    texts = [tokens(40, seed) for seed in (1, 2)]
    alone = []
    for layers in texts:
        cache = make(name=name)
        alone.append(feed(cache, layers, 11, 11)[1])
    cache = make(name=name, slots=4)
    outs = [[[] for _ in range(LAYERS)] for _ in texts]
    slots = [cache.load(prefill(cache, layers, 11, 4, outs[n])) for n, layers in enumerate(texts)]
    for position in range(11, 40):
        if position == 20:
            slots[0] = cache.swap_in(cache.swap_out(slots[0]))
        if position == 25:
            other = cache.fork(slots[1])
            cache.close(slots[1])
            slots[1] = other
        for i, out in enumerate(decode(cache, slots, texts, position)):
            for n in range(len(texts)):
                outs[n][i].append(out[n : n + 1])
        cache.check_integrity()
    for n in range(len(texts)):
        for i in range(LAYERS):
            torch.testing.assert_close(torch.cat(outs[n][i])[11:], alone[n][i][11:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dmc", "dms"])
@pytest.mark.parametrize("codec_name", ["int8", "kivi", "gear-4bit", "tcq-4bit", "eigen"])
def test_every_codec_takes_what_leaves_the_ring(name, codec_name):
    """Close to the dense result; the ring and the sinks stay in full precision."""
    layers = tokens(70, 5)
    cache = make(codec_name, name=name, window=8)
    slot, outs = feed(cache, layers, 20, 9)
    for i, parts in enumerate(layers):
        want = expected(parts, 8, name)
        assert (outs[i] - want).norm() < 0.35 * want.norm()  # vectors of 8 numbers: codecs are at their worst
    assert cache.rows.encoded_count[cache.rows.all_layers(slot)].sum() > 0


def test_prefixes_share_only_what_is_decided():
    """A page is shared if the common tokens alone decided every entry in it, the look ahead included."""
    texts = [tokens(60, 3), tokens(60, 3)]
    for i in range(LAYERS):  # the second text differs from position 40 on
        texts[1][i] = tuple(torch.cat([a[:40], torch.randn_like(a[40:])]) for a in texts[0][i])
    cache = make("int8", window=6, slots=3, page_size=2, sink_tokens=0)
    alone = make("int8", window=6, slots=3, page_size=2, sink_tokens=0)
    outs = [[[] for _ in range(LAYERS)] for _ in range(3)]
    first = cache.load(prefill(cache, texts[0], 60, 60, outs[0]))
    second = cache.load(prefill(cache, texts[1], 60, 60, outs[1]), donor=first, common=40)
    assert cache.shared_bytes(second) > 0
    other = alone.load(prefill(alone, texts[1], 60, 60, outs[2]))
    for i in range(LAYERS):
        rows = [c.rows.index(i, torch.tensor([slot])) for c, slot in ((cache, second), (alone, other))]
        for h in range(HEADS):
            pages = [
                c.rows.encoded_table[r[h], : int(c.rows.encoded_count[r[h]])] for c, r in zip((cache, alone), rows, strict=True)
            ]
            blocks = [c.rows.blocks(p, c.rows.packings[i]).tensors for c, p in zip((cache, alone), pages, strict=True)]
            assert all(torch.equal(blocks[0][key], blocks[1][key]) for key in blocks[0])
    cache.check_integrity()


@pytest.mark.parametrize("name", ["dmc", "dms"])
def test_a_bound_of_entries_bounds_memory(name):
    """Pages stop growing once every head has its entries, however long the text; the step then asks for no page either."""
    layers = tokens(300, 8)
    cache = make("int8", name=name, window=4, most=6, page_size=2, sink_tokens=1)
    outs = [[] for _ in layers]
    slot = cache.load(prefill(cache, layers, 10, 10, outs))
    used, asked = [], []
    for position in range(10, 300):
        asked.append(cache.append_pages(torch.tensor([slot])))
        before = cache.rows.pool.used
        decode(cache, [slot], [layers], position)
        used.append(cache.rows.pool.used)
        assert used[-1] <= before + asked[-1] <= cache.worst_pages(300) == cache.worst_pages(10_000)
    assert (cache.entries(slot) == 4 + 6).all()
    assert len(set(used[100:])) == 1 and set(asked[100:]) == {0}


@pytest.mark.parametrize("sinks", [1, 4])
def test_a_bound_needs_an_entry_behind_the_sinks(sinks):
    make("int8", most=sinks + 1, sink_tokens=sinks)
    with pytest.raises(ValueError, match=f"max_entries={sinks} holds nothing but the {sinks} sinks .* at least {sinks + 1}"):
        make("int8", most=sinks, sink_tokens=sinks)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        (dict(window=-1), "window=-1 must be a whole number, at least 0"),
        (dict(window=4, max_entries=0), "max_entries=0 must be"),
        (dict(max_entries=4), "merging at once has no window"),
        (dict(window=2.5), "window=2.5 must be"),
        (dict(window=4, max_entries=True), "max_entries=True must be"),
    ],
)
def test_settings_out_of_range(settings_, words):
    with pytest.raises(ValueError, match=words):
        policy("dmc", **settings_)


def test_a_bound_below_the_sinks_of_fitted_decisions():
    given = dict(decisions=random_decisions(sinks=3), target_cr=2, length=60)
    assert policy("gate", max_entries=4, **given).max_entries == 4
    for most in (0, 3):
        with pytest.raises(ValueError, match=f"max_entries={most} must be .* at least 4: more than the sinks .3."):
            policy("gate", max_entries=most, **given)
    with pytest.raises(ValueError, match="dms policy: max_entries=0 must be"):
        policy("dms", max_entries=0)
