"""Rows of the cache: what is encoded when, what is held, and that pages come back."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmc.cache import CODECS, KVCache, PoolExhausted, Shape, policy
from dmc.cache.reading import plan
from dmc.cache.reading.gathered import Gathered
from dmc.cache.reading.pagewise import PageByPage
from dmc.functional import accumulate, rotate
from dmc.rope import Rope
from tests.cache.stored import frequencies, stored

LAYERS, HEADS, QUERY_HEADS, SIZE = 2, 2, 4, 8
NOBODY = torch.empty(0, dtype=torch.int64)
ROPE = Rope(frequencies(SIZE, 100.0))


def make(codec_name="tcq", *, slots=3, memory=None, policy_name="dmc", policy_settings=None, **changes):
    sizes = {"page_size": 4, "sink_tokens": 2, "window": 1} | changes
    return KVCache(
        Shape(LAYERS, HEADS, SIZE, torch.float32),
        policy(policy_name, **(policy_settings or {})),
        stored(codec_name, layers=LAYERS, heads=HEADS, size=SIZE),
        slots=slots,
        memory=memory,
        **sizes,
    )


def tokens(count, seed):
    """(query, key, value, alpha, omega) of ``count`` tokens for each layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        (
            normal(count, QUERY_HEADS, SIZE),
            normal(count, HEADS, SIZE),
            normal(count, HEADS, SIZE),
            (normal(count, HEADS) > 0).float(),
            normal(count, HEADS).sigmoid(),
        )
        for _ in range(LAYERS)
    ]


def prefill(cache, layers, length, chunk=None, outs=None):
    """A prompt out of the first ``length`` tokens, in chunks."""
    made = cache.prompt()
    for start in range(0, length, chunk or length):
        end = min(start + (chunk or length), length)
        attend = cache.step(NOBODY, NOBODY, [(made, end - start)], ROPE)
        for i, parts in enumerate(layers):
            out = attend(i, *(part[start:end] for part in parts), **hidden(attend, parts, start, end))
            if outs is not None:
                outs[i].append(out)
    assert made.done == length
    return made


def decode(cache, slot, layers, place):
    """One more token → output of each layer [Hq, D]."""
    attend = cache.step(torch.tensor([slot]), torch.tensor([place]), [], ROPE)
    return [
        attend(i, *(part[place : place + 1] for part in parts), **hidden(attend, parts, place, place + 1))[0]
        for i, parts in enumerate(layers)
    ]


def hidden(attend, parts, start, end):
    """Hidden states ``[T, HEADS * SIZE]`` if the policy reads them: the keys, heads next to each other."""
    return {"hidden": parts[1][start:end].flatten(1)} if attend.reads_hidden else {}


def feed(cache, layers, prompt, chunk=None):
    """A sequence: ``prompt`` tokens prefilled, the rest decoded → slot, outputs of each layer [T, Hq, D]."""
    outs = [[] for _ in layers]
    slot = cache.load(prefill(cache, layers, prompt, chunk, outs))
    cache.check_integrity()
    for place in range(prompt, len(layers[0][0])):
        for i, out in enumerate(decode(cache, slot, layers, place)):
            outs[i].append(out[None])
        cache.check_integrity()
    return slot, [torch.cat(out) for out in outs]


def expected_entries(parts):
    """Final closed entries of each head by `functional.accumulate`: keys and values, lists of [c, D]."""
    _, key, value, alpha, omega = parts
    states, _ = accumulate(torch.cat([key, value], -1).transpose(0, 1)[None], alpha.T[None], omega.T[None])
    keys = rotate(states[..., :SIZE], ROPE(torch.arange(len(key))))[0]
    closes = torch.cat([alpha.T[:, 1:] == 0, torch.zeros(HEADS, 1, dtype=torch.bool)], -1)
    return [(keys[h][closes[h]], states[0, h, :, SIZE:][closes[h]]) for h in range(HEADS)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 60),
    st.data(),
    st.integers(1, 7),
    st.integers(0, 5),
    st.integers(0, 4),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.integers(0, 1000),
)
def test_what_is_encoded_follows_from_the_entries_alone(length, data, page_size, sinks, window, exact, seed):
    """Any split into chunks of a prompt and generated tokens gives the same pages, full-precision and accumulating entries."""
    prompt = data.draw(st.integers(1, length))
    chunk = data.draw(st.integers(1, prompt))
    layers = tokens(length, seed)
    cache = make(page_size=page_size, sink_tokens=sinks, window=window, exact_dtype=exact)
    slot, _ = feed(cache, layers, prompt, chunk)
    for i, parts in enumerate(layers):
        index = cache.rows.index(i, torch.tensor([slot]))
        keys, values, valid = cache.rows.full_entries(index)
        pages, owner = cache.rows.encoded_pages(index)
        for h, (want_keys, want_values) in enumerate(expected_entries(parts)):
            count = len(want_keys)
            full = max(0, count - sinks - window) // page_size
            assert (owner == h).sum() == full and valid[h].sum() == count - full * page_size
            assert cache.entries(slot)[i, h] == count + 1 == (1 - parts[3][:, h]).sum() + parts[3][0, h]
            kept = torch.tensor([n for n in range(count) if n < sinks or n >= sinks + full * page_size], dtype=torch.int64)
            tolerance = {"fp32": (1e-4, 1e-5), "bf16": (1e-2, 1e-2), "int8": (1e-4, 0.05)}[exact]
            for got, want in ((keys, want_keys), (values, want_values)):
                torch.testing.assert_close(got[h][valid[h]].float(), want[kept].float(), rtol=tolerance[0], atol=tolerance[1])
            if full:
                packing = cache.rows.packings[i]
                decoded = packing.codec.decode(cache.rows.blocks(pages[owner == h], packing))
                inside = slice(sinks, sinks + full * page_size)
                for got, want in zip(decoded, (want_keys[inside], want_values[inside]), strict=True):
                    assert (got.flatten(0, 1) - want).norm() < 0.25 * want.norm() + 0.1
    cache.close(slot)
    assert cache.rows.pool.used == 0
    cache.check_integrity()


def test_decode_attends_to_what_is_held():
    """The last token's output equals plain attention over decoded pages, full-precision and accumulating entries."""
    layers = tokens(50, seed=3)
    cache = make()
    slot, outs = feed(cache, layers, prompt=7)
    for i, parts in enumerate(layers):
        index = cache.rows.index(i, torch.tensor([slot]))
        keys, values, valid = cache.rows.full_entries(index)
        pages, owner = cache.rows.encoded_pages(index)
        packing = cache.rows.packings[i]
        page_keys, page_values = packing.codec.decode(cache.rows.blocks(pages, packing))
        own = cache.rows.numerators[index] / cache.rows.z[index, None]
        now = ROPE(torch.tensor([49]))
        query = rotate(parts[0][49][:, None], now)[:, 0]
        for h in range(HEADS):
            mine = owner == h
            k = torch.cat([page_keys[mine].flatten(0, 1), keys[h][valid[h]].float(), rotate(own[h : h + 1, :SIZE], now)])
            v = torch.cat([page_values[mine].flatten(0, 1), values[h][valid[h]].float(), own[h : h + 1, SIZE:]])
            for g in (2 * h, 2 * h + 1):
                want = torch.softmax(k @ query[g] / SIZE**0.5, 0) @ v
                torch.testing.assert_close(outs[i][-1, g], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tcq", "dense"])
def test_held_bytes_are_those_of_the_tensors(name):
    """An independent count: pages of each row from its entries, accumulating entries and tables from their shapes."""
    cache = make(name, exact_dtype="bf16")
    slot, _ = feed(cache, tokens(45, seed=1), prompt=20)
    other, _ = feed(cache, tokens(9, seed=2), prompt=9)
    rows, codec_ = cache.rows, cache.rows.packings[0].codec
    blank = codec_.encode(*torch.zeros(2, 4, SIZE, dtype=torch.bfloat16))
    page = -(-max(codec_.nbytes(blank), 4 * SIZE) // 8) * 8
    assert page == rows.pool.page_bytes and rows.per_full_page == page // (4 * SIZE)
    pages = exact = 0
    for count in (cache.entries(slot) - 1).flatten().tolist():
        full = max(0, count - 3) // 4
        pages, exact = pages + full, exact + -(-(count - 4 * full) // rows.per_full_page)
    tables = 4 * (rows.encoded_table.shape[1] + rows.full_table.shape[1] + 2)
    heads = LAYERS * HEADS
    assert cache.held(slot) == {
        "pages": pages * page,
        "exact": exact * page,
        "tail": heads * 4 * (2 * SIZE + 1),
        "tables": heads * tables,
    }
    assert (
        cache.held(slot)["pages"] + cache.held(slot)["exact"] + cache.held(other)["pages"] + cache.held(other)["exact"]
        == rows.pool.used * page
    )
    assert cache.dense_bytes(45) == 45 * heads * 2 * SIZE * 2


def test_a_fixed_pool_refuses_and_stays_whole():
    cache = make("dense", memory=6 * 256)  # 256 bytes: a page of 4 fp32 entries
    assert cache.rows.pool.page_bytes == 256 and cache.worst_pages(9) > 6
    with pytest.raises(PoolExhausted, match="of 6"):
        feed(cache, tokens(40, seed=0), prompt=40)
    assert cache.rows.pool.used == 0 and cache.free_slots == 3
    cache.check_integrity()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("policy_name, settings_", [("full", {}), ("dmc", {}), ("streaming", {"sinks": 3, "recent": 14})])
def test_chunks_and_swapping_change_nothing(name, policy_name, settings_):
    """Every codec and policy: a prompt in chunks, and a sequence that goes to host memory and back before each token."""
    layers, results = tokens(70, seed=4), []
    for chunk, swapping in ((40, False), (40, True), (7, False), (1, True)):
        cache = make(name, policy_name=policy_name, policy_settings=settings_)
        prompt = prefill(cache, layers, 40, chunk)
        assert (prompt.nbytes > 0) and cache.rows.pool.used == 0
        slot = cache.load(prompt)
        for place in range(40, 70):
            if swapping:
                before = cache.held(slot), cache.entries(slot)
                away = cache.swap_out(slot)
                assert cache.rows.pool.used == 0 and away.nbytes > 0
                cache.check_integrity()
                slot = cache.swap_in(away)
                assert cache.held(slot) == before[0] and torch.equal(cache.entries(slot), before[1])
            outs = decode(cache, slot, layers, place)
            cache.check_integrity()
        results.append((torch.stack(outs), cache.held(slot)))
    assert torch.equal(results[0][0], results[1][0])  # swapping is exact to the bit
    for out, held in results[1:]:
        assert held == results[0][1]
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("lengths", [(40, 40, 38), (60, 9, 30), (5, 44, 44), (3, 3, 3)])
def test_padded_rows_are_ragged_rows(name, lengths, monkeypatch):
    """Rows of like and of unlike length, some without a page: one by one, all in one group, and page by page."""
    cache, seen = make(name, policy_name="full"), []
    slots = torch.tensor([cache.load(prefill(cache, tokens(count, seed=count), count)) for count in lengths])
    index = cache.rows.index(1, slots)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, *shape, generator=generator) for shape in ((2, SIZE), (SIZE,), (SIZE,)))
    for values, alike in ((1, 1.0), (1 << 20, 1.0), (1 << 20, 0.0)):
        monkeypatch.setattr(plan, "_VALUES", {"cpu": values})
        monkeypatch.setattr(plan, "_ALIKE", alike)
        seen.append(Gathered(cache.rows.packings[1]).attend(cache.rows, index, query, key, value)[0])
    seen.append(PageByPage(cache.rows.packings[1]).attend(cache.rows, index, query, key, value)[0])
    seen.append(cache.readers[1].attend(cache.rows, index, query, key, value)[0])
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-4, atol=1e-5)


def test_swapping_in_needs_pages():
    cache = make("dense", memory=40 * 256)
    slot, _ = feed(cache, tokens(30, seed=0), prompt=30)
    away = cache.swap_out(slot)
    cache.rows.pool.take(40 - len(away.pages) + 1)
    with pytest.raises(PoolExhausted):
        cache.swap_in(away)
    assert cache.free_slots == 3


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow together, fork, go to host memory and back, and end, in any order; the cache stays whole."""

    policy_name, policy_settings = "dmc", {}

    def __init__(self):
        super().__init__()
        self.cache = make(slots=4, policy_name=self.policy_name, policy_settings=self.policy_settings)
        self.live, self.away, self.seed = {}, [], 0

    @precondition(lambda self: self.cache.free_slots)
    @rule(length=st.integers(1, 30), chunk=st.integers(1, 30))
    def start(self, length, chunk):
        self.seed += 1
        layers = tokens(length, self.seed)
        slot = self.cache.load(prefill(self.cache, layers, length, chunk))
        self.live[slot] = (length, self.opened(torch.stack([parts[3] for parts in layers])))

    @precondition(lambda self: self.cache.free_slots and self.live)
    @rule(data=st.data())
    def fork(self, data):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        used = self.cache.rows.pool.used
        copy = self.cache.fork(slot)
        self.live[copy] = self.live[slot]
        assert self.cache.held(copy) == self.cache.held(slot)
        if self.policy_name == "dmc":  # encoded pages are shared, and counted once
            assert (self.cache.rows.pool.used - used) * self.cache.rows.pool.page_bytes == self.cache.held(slot)["exact"]
            assert self.cache.shared_bytes(slot) == self.cache.held(slot)["pages"]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        self.away.append((self.cache.swap_out(slot), self.live.pop(slot)))

    @precondition(lambda self: self.away and self.cache.free_slots)
    @rule()
    def come_back(self):
        swapped, state = self.away.pop()
        self.live[self.cache.swap_in(swapped)] = state

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 12))
    def grow(self, steps):
        slots = list(self.live)
        for _ in range(steps):
            self.seed += 1
            places = torch.tensor([self.live[slot][0] for slot in slots])
            attend = self.cache.step(torch.tensor(slots), places, [], ROPE)
            layers = tokens(len(slots), self.seed)
            for i, parts in enumerate(layers):
                out = attend(i, *parts)
                assert torch.isfinite(out).all()
            for row, slot in enumerate(slots):
                length, entries = self.live[slot]
                more = torch.stack([1 - parts[3][row] for parts in layers])
                self.live[slot] = (length + 1, entries + more.long())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        self.cache.close(slot)
        del self.live[slot]

    @staticmethod
    def opened(alpha):
        alpha = alpha.clone()
        alpha[:, 0] = 0
        return (1 - alpha).sum(1).long()

    @invariant()
    def whole(self):
        self.cache.check_integrity()
        for slot, (length, entries) in self.live.items():
            if self.policy_name == "streaming":
                entries = torch.full_like(entries, min(length, 3 + 9 - 1))
            assert torch.equal(self.cache.entries(slot), entries)
        if not self.live:
            assert self.cache.rows.pool.used == 0


class StreamingMachine(CacheMachine):
    policy_name, policy_settings = "streaming", {"sinks": 3, "recent": 9}


TestCache, TestStreaming = CacheMachine.TestCase, StreamingMachine.TestCase
TestCache.settings = TestStreaming.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda rows: rows.pool.take(1), "more or fewer owners"),
        (
            lambda rows: rows.pool.owners.__setitem__(int(rows.encoded_table[rows.encoded_count.nonzero()[0], 0]), 2),
            "more or fewer owners",
        ),
        (lambda rows: rows.pool._stack.__setitem__(0, int(rows.full_table[0, 0])), "lost, or free while owned"),
        (lambda rows: rows.encoded_count.__setitem__(rows.encoded_count.nonzero()[0], 9), "more or fewer"),
        (lambda rows: rows.full_table.__setitem__((0, 0), int(rows.full_table[1, 0])), "more or fewer owners"),
        (lambda rows: rows.pool.memory.__setitem__((0, 0), 1), "null page"),
        (lambda rows: rows.z.zero_(), "no accumulating entry"),
    ],
)
def test_integrity_check_finds(harm, said):
    cache = make(slots=1)
    feed(cache, tokens(40, seed=5), prompt=30)
    harm(cache.rows)
    with pytest.raises(RuntimeError, match=said):
        cache.check_integrity()
