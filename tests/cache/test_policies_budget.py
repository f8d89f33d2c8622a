"""Budgets of evicting policies: never exceeded, the newest and the first are kept, pages are freed."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.policies import budget
from dmc.cache.storage import evict
from tests.cache.test_rows import HEADS, LAYERS, SIZE, decode, prefill, tokens

SHARES = st.none() | st.sampled_from([0.2, 0.5, 1.0])


def places(cache, slot):
    """Positions of the closed entries of each row, as sets."""
    index = cache.rows.all_layers(slot)
    there = evict.entries(cache.rows, index, torch.zeros_like(index))
    return [{int(place) for place in row if place >= 0} for row in there.positions]


def check_row(made, held, following):
    """The entries that the query at ``following`` sees, and the accumulating entry: what a policy promises."""
    share = made.share
    whole = made.most_entries(following + 1)
    assert len(held) + 2 == whole, (sorted(held), whole)  # neither more nor, where there are tokens enough, fewer
    if made.name == "tova":
        return
    recent = made.recent
    if share is not None:
        recent = whole - made.sinks if made.name == "streaming" else max(2, whole * recent // (made.heavy + recent))
    assert set(range(max(0, following + 1 - recent), following - 1)) <= held
    if made.name == "streaming":
        assert set(range(min(made.sinks, following - 1))) <= held


def run(made, length, prompt, page_size, sinks, codec_name):
    cache = KVCache(
        Shape(LAYERS, HEADS, SIZE, torch.float32), made, codec(codec_name), slots=2, page_size=page_size, sink_tokens=sinks
    )
    layers = tokens(length, seed=length)
    slot = cache.load(prefill(cache, layers, prompt, chunk=7))
    for place in range(prompt, length + 1):
        cache.check_integrity()  # a row holds no more pages than its entries need
        rows = places(cache, slot)
        for held in rows:
            check_row(made, held, place)
        if made.name == "tova":
            assert all(rows[HEADS * layer] == rows[HEADS * layer + 1] for layer in range(LAYERS))
        assert cache.entries(slot).max() <= made.most_entries(place)
        if place < length:
            decode(cache, slot, layers, place)
    used = cache.rows.pool.used
    assert used <= cache.worst_pages(length)
    cache.close(slot)
    assert cache.rows.pool.used == 0


@pytest.mark.parametrize(
    "name, chosen, marks",
    [("h2o", {"heavy": 14, "recent": 12}, 8), ("tova", {"budget": 26}, 8), ("streaming", {"sinks": 4, "recent": 22}, 4)],
)
def test_bytes_are_those_of_the_formula(name, chosen, marks):
    """(budget - 2) entries of 2 D b bytes and their marks, up to whole pages: 16 encoded entries, the rest exact."""
    made = policy(name, **chosen)
    cache = KVCache(Shape(LAYERS, HEADS, SIZE, torch.float32), made, codec("dense"), slots=1, page_size=4)
    layers = tokens(60, seed=3)
    slot = cache.load(prefill(cache, layers, 40))
    for place in range(40, 60):
        decode(cache, slot, layers, place)
    held, entry = cache.held(slot), 2 * SIZE * 4 + marks
    rows = LAYERS * HEADS
    least = rows * 24 * entry
    assert least <= held["pages"] + held["exact"] < least + rows * 2 * cache.rows.pool.page_bytes
    assert cache.rows.pool.page_bytes == 4 * entry
    assert held["tail"] == rows * (8 * SIZE + (8 if marks == 8 else 4))


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(2, 45), st.integers(1, 5), st.integers(0, 3), st.sampled_from(["dense", "tcq"]), SHARES)
@pytest.mark.parametrize("name", ["h2o", "tova", "streaming"])
def test_promises(name, data, length, page_size, sinks, codec_name, share):
    chosen = {
        "h2o": {"heavy": st.integers(1, 12), "recent": st.integers(2, 12)},
        "tova": {"budget": st.integers(2, 24)},
        "streaming": {"sinks": st.integers(0, 6), "recent": st.integers(2, 12)},
    }[name]
    made = policy(name, **{setting: data.draw(values) for setting, values in chosen.items()}, share=share)
    run(made, length, data.draw(st.integers(1, length)), page_size, sinks, codec_name)


@given(st.data(), st.integers(1, 4), st.integers(0, 9), st.integers(0, 10))
def test_top_is_the_highest(data, rows, columns, count):
    def table(values):
        return torch.tensor(data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))).view(rows, columns)

    scores, among = table(st.integers(0, 3)).float(), table(st.booleans()).bool()
    kept = budget.top(scores, among, count)
    for row in range(rows):
        ranked = sorted((n for n in range(columns) if among[row, n]), key=lambda n, r=row: (-scores[r, n].item(), -n))
        assert set(kept[row].nonzero().flatten().tolist()) == set(ranked[:count])
    assert torch.equal(kept, budget.top(scores, among, torch.full((rows, 1), count)))


@given(st.floats(0.001, 1), st.integers(1, 10**6))
def test_a_share_is_one_number_for_counts_and_tensors(share, count):
    whole = budget.of_tokens(share, count)
    assert whole == budget.of_tokens(share, torch.tensor([count])).item() and whole >= max(budget.LEAST, share * count)
    # A window that follows from it never reopens: what was out of sight stays so.
    assert budget.of_tokens(share, count + 1) - whole in (0, 1)


@pytest.mark.parametrize(
    "name, settings_, said",
    [
        ("h2o", {"heavy": 0}, "heavy=0 must be a whole number, at least 1"),
        ("h2o", {"recent": 1}, "recent=1 .* at least 2"),
        ("tova", {"budget": 1}, "budget=1 .* at least 2"),
        ("tova", {"budget": 12.5}, "budget=12.5 must be a whole number"),
        ("h2o", {"share": 0}, "share=0 must be above 0 and at most 1"),
        ("tova", {"share": "half"}, "share=half must be above 0"),
        ("streaming", {"recent": 1}, "recent=1 .* at least 2"),
        ("streaming", {"sinks": 15, "share": 0.5}, "sinks=15 .* at most 14"),
        ("tova", {"heavy": 3}, "no setting heavy; it has: budget, share"),
    ],
)
def test_settings_that_are_refused(name, settings_, said):
    with pytest.raises(ValueError, match=said):
        policy(name, **settings_)
