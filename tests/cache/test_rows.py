"""Rows of the cache: what is encoded when, what is held, and that pages come back."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmc.cache import KVCache, PoolExhausted, Shape, codec, policy
from dmc.functional import accumulate, rotate
from dmc.model import Rope

LAYERS, HEADS, QUERY_HEADS, SIZE = 2, 2, 4, 8
ROPE = Rope(SIZE, {"rope_type": "default", "rope_theta": 100.0}, dtype=torch.float32, device="cpu")


def make(codec_name="gear", *, slots=3, memory=None, **changes):
    sizes = {"page_size": 4, "sink_tokens": 2, "window": 1} | changes
    return KVCache(
        Shape(LAYERS, HEADS, SIZE, torch.float32), policy("dmc"), codec(codec_name), slots=slots, memory=memory, **sizes
    )


def tokens(count, seed, batch=1):
    """(query, key, value, alpha, omega) of ``count`` tokens for each layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        (
            normal(batch, QUERY_HEADS, count, SIZE), normal(batch, HEADS, count, SIZE),
            normal(batch, HEADS, count, SIZE), (normal(batch, HEADS, count) > 0).float(),
            normal(batch, HEADS, count).sigmoid(),
        )
        for _ in range(LAYERS)
    ]


def feed(cache, slot, layers, prompt):
    """A sequence: ``prompt`` tokens prefilled, the rest decoded → outputs of each layer [Hq, T, D]."""
    slots, outs = torch.tensor([slot]), [[] for _ in layers]
    length = layers[0][0].shape[2]
    attend = cache.prefill(slots, torch.tensor([prompt]), ROPE)
    for i, parts in enumerate(layers):
        outs[i].append(attend(i, *(part[:, :, :prompt] for part in parts)))
    for place in range(prompt, length):
        attend = cache.decode(slots, torch.tensor([place]), ROPE)
        for i, parts in enumerate(layers):
            outs[i].append(attend(i, *(part[:, :, place : place + 1] for part in parts)))
        cache.check_integrity()
    return [torch.cat(out, 2)[0] for out in outs]


def expected_entries(parts):
    """Final closed entries of each head by `functional.accumulate`: keys and values, lists of [c, D]."""
    _, key, value, alpha, omega = parts
    states, _ = accumulate(torch.cat([key, value], -1), alpha, omega)
    count = key.shape[2]
    keys = rotate(states[..., :SIZE], ROPE(torch.arange(count)))[0]
    closes = torch.cat([alpha[0, :, 1:] == 0, torch.zeros(HEADS, 1, dtype=torch.bool)], -1)
    return [(keys[h][closes[h]], states[0, h, :, SIZE:][closes[h]]) for h in range(HEADS)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 60), st.data(), st.integers(1, 7), st.integers(0, 5), st.integers(0, 4),
    st.sampled_from(["fp32", "bf16"]), st.integers(0, 1000),
)
def test_what_is_encoded_follows_from_the_entries_alone(length, data, page_size, sinks, window, exact, seed):
    """Any split into prompt and generated tokens leaves the same pages, exact entries and tail."""
    prompt = data.draw(st.integers(1, length))
    layers = tokens(length, seed)
    cache = make(page_size=page_size, sink_tokens=sinks, window=window, exact_dtype=exact)
    slot = cache.open()
    feed(cache, slot, layers, prompt)
    for i, parts in enumerate(layers):
        index = cache.rows.index(i, torch.tensor([slot]))
        keys, values, valid = cache.rows.exact_entries(index)
        pages, owner = cache.rows.closed_pages(index)
        for h, (want_keys, want_values) in enumerate(expected_entries(parts)):
            count = len(want_keys)
            full = max(0, count - sinks - window) // page_size
            assert (owner == h).sum() == full and valid[h].sum() == count - full * page_size
            assert cache.entries(slot)[i, h] == count + 1 == (1 - parts[3][0, h]).sum() + parts[3][0, h, 0]
            kept = torch.tensor([n for n in range(count) if n < sinks or n >= sinks + full * page_size], dtype=torch.int64)
            dtype = cache.rows.storage.exact_dtype
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if exact == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(keys[h][valid[h]], want_keys[kept].to(dtype), **tolerance)
            torch.testing.assert_close(values[h][valid[h]], want_values[kept].to(dtype), **tolerance)
            if full:
                decoded = cache.rows.storage.codec.decode(cache.rows.blocks(pages[owner == h]))
                inside = slice(sinks, sinks + full * page_size)
                for got, want in zip(decoded, (want_keys[inside], want_values[inside]), strict=True):
                    assert (got.flatten(0, 1) - want).norm() < 0.25 * want.norm() + 0.1
    cache.close(slot)
    assert cache.rows.pool.used == 0
    cache.check_integrity()


def test_decode_attends_to_what_is_held():
    """The last token's output equals plain attention over decoded pages, exact entries and tail."""
    layers = tokens(50, seed=3)
    cache = make()
    slot = cache.open()
    outs = feed(cache, slot, layers, prompt=7)
    for i, parts in enumerate(layers):
        index = cache.rows.index(i, torch.tensor([slot]))
        keys, values, valid = cache.rows.exact_entries(index)
        pages, owner = cache.rows.closed_pages(index)
        page_keys, page_values = cache.rows.storage.codec.decode(cache.rows.blocks(pages))
        own = cache.rows.numerators[index] / cache.rows.z[index, None]
        now = ROPE(torch.tensor([49]))
        query = rotate(parts[0][0, :, 49:], now)[:, 0]
        for h in range(HEADS):
            mine = owner == h
            k = torch.cat([page_keys[mine].flatten(0, 1), keys[h][valid[h]].float(), rotate(own[h : h + 1, :SIZE], now)])
            v = torch.cat([page_values[mine].flatten(0, 1), values[h][valid[h]].float(), own[h : h + 1, SIZE:]])
            for g in (2 * h, 2 * h + 1):
                want = torch.softmax(k @ query[g] / SIZE**0.5, 0) @ v
                torch.testing.assert_close(outs[i][g, -1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gear", "dense"])
def test_held_bytes_are_those_of_the_tensors(name):
    """An independent count: pages of each row from its entries, tail and tables from their shapes."""
    cache = make(name, exact_dtype="bf16")
    slot, other = cache.open(), cache.open()
    feed(cache, slot, tokens(45, seed=1), prompt=20)
    feed(cache, other, tokens(9, seed=2), prompt=9)
    rows, store = cache.rows, cache.rows.storage
    blank = store.codec.encode(*torch.zeros(2, 4, SIZE, dtype=torch.bfloat16))
    page = -(-max(store.codec.nbytes(blank), 4 * SIZE) // 8) * 8
    assert page == rows.pool.page_bytes and rows.per_open_page == page // (4 * SIZE)
    pages = exact = 0
    for count in (cache.entries(slot) - 1).flatten().tolist():
        full = max(0, count - 3) // 4
        pages, exact = pages + full, exact + -(-(count - 4 * full) // rows.per_open_page)
    tables = 4 * (rows.closed_table.shape[1] + rows.open_table.shape[1] + 2)
    heads = LAYERS * HEADS
    assert cache.held(slot) == {
        "pages": pages * page, "exact": exact * page, "tail": heads * 4 * (2 * SIZE + 1), "tables": heads * tables,
    }
    assert cache.held(slot)["pages"] + cache.held(slot)["exact"] + cache.held(other)["pages"] + cache.held(other)[
        "exact"
    ] == rows.pool.used * page
    assert cache.dense_bytes(45) == 45 * heads * 2 * SIZE * 2


def test_a_fixed_pool_refuses_and_stays_whole():
    cache = make("dense", memory=6 * 256)  # 256 bytes: a page of 4 fp32 entries
    assert cache.rows.pool.page_bytes == 256 and cache.worst_pages(9) > 6
    slot = cache.open()
    with pytest.raises(PoolExhausted, match="6 are free|of 6"):
        feed(cache, slot, tokens(40, seed=0), prompt=40)
    cache.close(slot)
    assert cache.rows.pool.used == 0


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow together and go, in any order; the cache stays whole after every step."""

    def __init__(self):
        super().__init__()
        self.cache, self.live, self.seed = make(slots=4), {}, 0

    @precondition(lambda self: self.cache.free_slots)
    @rule(length=st.integers(1, 30))
    def start(self, length):
        slot = self.cache.open()
        self.seed += 1
        attend = self.cache.prefill(torch.tensor([slot]), torch.tensor([length]), ROPE)
        layers = tokens(length, self.seed)
        for i, parts in enumerate(layers):
            attend(i, *parts)
        self.live[slot] = (length, torch.stack([self.opened(parts) for parts in layers]))

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 12))
    def grow(self, steps):
        slots = list(self.live)
        for _ in range(steps):
            self.seed += 1
            places = torch.tensor([self.live[slot][0] for slot in slots])
            attend = self.cache.decode(torch.tensor(slots), places, ROPE)
            layers = tokens(1, self.seed, batch=len(slots))
            for i, parts in enumerate(layers):
                out = attend(i, *parts)
                assert torch.isfinite(out).all()
            for row, slot in enumerate(slots):
                length, entries = self.live[slot]
                more = torch.stack([1 - parts[3][row, :, 0] for parts in layers])
                self.live[slot] = (length + 1, entries + more.long())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        self.cache.close(slot)
        del self.live[slot]

    @staticmethod
    def opened(parts):
        alpha = parts[3][0].clone()
        alpha[:, 0] = 0
        return (1 - alpha).sum(-1).long()

    @invariant()
    def whole(self):
        self.cache.check_integrity()
        for slot, (_, entries) in self.live.items():
            assert torch.equal(self.cache.entries(slot), entries)
        if not self.live:
            assert self.cache.rows.pool.used == 0


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("harm, said", [
    (lambda rows: rows.pool.take(1), "lost"),
    (lambda rows: rows.closed.__setitem__(rows.closed.nonzero()[0], 9), "more or fewer"),
    (lambda rows: rows.open_table.__setitem__((0, 0), int(rows.open_table[1, 0])), "owned twice"),
    (lambda rows: rows.pool.memory.__setitem__((0, 0), 1), "null page"),
    (lambda rows: rows.z.zero_(), "no tail"),
])
def test_integrity_check_finds(harm, said):
    cache = make(slots=1)
    feed(cache, cache.open(), tokens(40, seed=5), prompt=30)
    harm(cache.rows)
    with pytest.raises(RuntimeError, match=said):
        cache.check_integrity()
