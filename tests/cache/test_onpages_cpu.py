"""The cache read by the CPU kernels against the same cache read by PyTorch: everything that moves pages and tables."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given, settings

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.storage.evict import entries
from dmc.kernels.backend import using
from dmc.kernels.decode import cpu as decode_cpu
from dmc.rope import Rope
from tests.cache.stored import frequencies

NOBODY, HEADS, QUERIES, SIZE, SEQUENCES = torch.empty(0, dtype=torch.int64), 2, 4, 8, 3
POLICIES = {
    "dmc": {},
    "full": {},
    "streaming": dict(sinks=1, recent=11),
    "h2o": dict(heavy=7, recent=6),
    "tova": dict(budget=13),
    "dms": dict(window=7),
}
CODECS = {"dense": {}, "int8": {}, "fp8": {}, "tcq": {"bits": 4}, "tcq-3bit": {}, "tcq-2bit": {}, "gear": {}, "kivi": {}}
ROPE = Rope(frequencies(SIZE, 100.0))


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(decode_cpu, "_LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def outs(backend, names, policy_name, page_size, exact, memory, tokens=64):
    """Three sequences of unlike length beside each other; one is forked, one swapped out and in, pages and tables grow."""
    with using(backend):
        chosen, codecs = policy(policy_name, **POLICIES[policy_name]), [codec(name, **CODECS[name]) for name in names]
        cache = KVCache(
            Shape(len(names), HEADS, SIZE, torch.float32),
            chosen,
            codecs,
            slots=2 * SEQUENCES,
            memory=memory,
            page_size=page_size,
            sink_tokens=2,
            window=1,
            exact_dtype=exact,
        )
        assert all(reader.on_pages == (backend == "auto") for reader in cache.readers)
        g = torch.Generator().manual_seed(3)
        normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        texts = [
            [
                (
                    normal(tokens, QUERIES, SIZE),
                    normal(tokens, HEADS, SIZE),
                    normal(tokens, HEADS, SIZE),
                    (normal(tokens, HEADS) > 0).float(),
                    normal(tokens, HEADS).sigmoid(),
                )
                for _ in names
            ]
            for _ in range(SEQUENCES)
        ]
        slots, places, found = [], [3, 9, 21], []
        for text, length in zip(texts, places, strict=True):
            prompt = cache.prompt()
            attend = cache.step(NOBODY, NOBODY, [(prompt, length)], ROPE)
            for layer, parts in enumerate(text):
                attend(layer, *(part[:length] for part in parts))
            slots.append(cache.load(prompt))
        for step in range(tokens - max(places)):
            if step == 20:
                fork = cache.fork(slots[0])
                cache.close(slots[0])
                slots[0], slots[1] = fork, cache.swap_in(cache.swap_out(slots[1]))
            attend = cache.step(torch.tensor(slots), torch.tensor(places), [], ROPE, merges=policy_name == "dmc")
            for layer in range(len(names)):
                parts = (torch.cat([t[layer][i][at : at + 1] for t, at in zip(texts, places, strict=True)]) for i in range(5))
                found.append(attend(layer, *parts))
            places = [place + 1 for place in places]
        cache.check_integrity()
        return torch.stack(found)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(list(CODECS)), min_size=1, max_size=3),
    st.sampled_from(list(POLICIES)),
    st.sampled_from([None, 1, 4, 12, 16]),
    st.sampled_from([None, "fp32", "bf16", "int8"]),
    st.booleans(),
)
@example(["tcq"], "dmc", 4, None, False)
@example(["dense", "tcq-2bit", "int8"], "full", 12, "fp32", True)
@example(["tcq-3bit", "dense"], "h2o", 4, None, False)
@example(["int8"], "tova", 4, None, False)
@example(["tcq"], "dms", 4, "bf16", False)
@example(["fp8"], "streaming", 4, None, False)
@example(["gear", "kivi"], "dmc", 12, None, False)
@example(["gear"], "h2o", 4, None, False)
@example(["tcq"], "h2o", 4, "int8", False)
@example(["tcq-3bit", "gear"], "dms", 4, "int8", True)
@example(["int8"], "dmc", 4, "int8", False)
def test_loops_and_pytorch_read_the_same(names, policy_name, page_size, exact, fixed):
    assume(exact != "int8" or "dense" not in names)
    arguments = names, policy_name, page_size, exact, 1 << 20 if fixed else None
    torch.testing.assert_close(outs("auto", *arguments), outs("torch", *arguments), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("policy_name", ["h2o", "tova"])
def test_threads_write_the_scores_of_their_own_rows(policy_name, threads):
    arguments = ["tcq", "dense"], policy_name, 4, None, None
    torch.testing.assert_close(outs("auto", *arguments), outs("torch", *arguments), rtol=1e-4, atol=2e-5)


def test_a_row_comes_out_the_same_whatever_is_beside_it():
    """Bit for bit: alone, and beside a row that is much longer."""
    cache = KVCache(Shape(1, 1, SIZE, torch.float32), policy("full"), codec("dense"), slots=2)
    rows, g = cache.rows, torch.Generator().manual_seed(0)
    for slot, count in enumerate((7, 900)):
        index = rows.index(0, torch.tensor([slot]))
        rows.load(index, *torch.randn(2, 1, count, SIZE, generator=g), torch.tensor([count]), {})
    inputs = torch.randn(2, 3, SIZE, generator=g), *torch.randn(2, 2, SIZE, generator=g)
    attend = cache.readers[0].attend
    both = attend(rows, torch.tensor([0, 1]), *inputs)[0]
    alone = attend(rows, torch.tensor([0]), *(x[:1] for x in inputs))[0]
    assert torch.equal(both[:1], alone)


def test_fp16_entries_and_other_codecs_are_left_to_pytorch():
    shape = Shape(1, 1, SIZE, torch.float32)
    for name, exact in (("rotated", None), ("svd", None), ("int8", "fp16")):
        cache = KVCache(shape, policy("full"), codec(name), slots=1, page_size=16, exact_dtype=exact)
        assert not cache.readers[0].on_pages


@pytest.mark.parametrize("name", ["tova", "h2o"])
def test_scores_that_the_loops_write_are_pytorchs(name):
    """After steps in which no entry is evicted, of every entry: on encoded pages, in the exact part, and the open one."""
    found = []
    for backend in ("auto", "torch"):
        with using(backend):
            cache = KVCache(Shape(1, HEADS, SIZE, torch.float32), policy(name, share=1.0), codec("dense"), slots=1, page_size=4)
            g = torch.Generator().manual_seed(1)
            prompt = cache.prompt()
            attend, slot = cache.step(NOBODY, NOBODY, [(prompt, 9)], ROPE), None
            for position in range(9, 30):
                count = 1 if slot is not None else 9
                parts = torch.randn(count, QUERIES, SIZE, generator=g), *torch.randn(2, count, HEADS, SIZE, generator=g)
                attend(0, *parts, torch.zeros(count, HEADS), torch.ones(count, HEADS))
                slot = cache.load(prompt) if slot is None else slot
                attend = cache.step(torch.tensor([slot]), torch.tensor([position]), [], ROPE, merges=False)
            index = cache.rows.index(0, torch.tensor([slot]))
            found.append([entries(cache.rows, index, torch.tensor([30, 30])).scores, cache.rows.accumulating_score[index]])
    assert (found[0][0] > 0).sum() > 30
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
