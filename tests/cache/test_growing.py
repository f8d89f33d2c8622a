"""Generated tokens that enter the rows through kernels, against the same steps by PyTorch."""

import gc
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from dmc import LLM, SamplingParams
from dmc.cache import CODECS, KVCache, PoolExhausted, Shape, codec, policy
from dmc.cache.reading import growing
from dmc.cache.reading.onpages import OnPages
from dmc.cache.storage.pages import PagePool
from dmc.engine.predict import Predictor
from dmc.kernels.backend import Backend, interpreted, using
from dmc.kernels.decode import gpu as decode_triton
from dmc.kernels.encode import gpu as encode_triton
from dmc.kernels.formats.trellis import encode as encode_trellis_triton
from tests.cache.test_rows import HEADS, LAYERS, ROPE, SIZE, make, prefill, tokens
from tests.model import tiny

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="tests/engine/test_gpu.py is for GPUs")
GROWN = ("dense", "int8", "fp8", "tcq", "tcq-4bit", "tcq-2bit")
SETTINGS = {"page_size": 16, "sink_tokens": 2, "window": 1}


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


def layered():
    """A codec a layer, their pages of unequal numbers of entries."""
    shape, codecs = Shape(LAYERS, HEADS, SIZE, torch.float32), [codec("int8"), codec("dense")]
    return KVCache(shape, policy("dmc"), codecs, slots=3, page_size=5, sink_tokens=1, window=2)


def run(cache, texts, starts, steps, *, merges, chunked=None):
    """Prompts of unequal lengths, then steps of all of them, on the way with chunks of another prompt → slots, outputs."""
    slots = [cache.load(prefill(cache, text, start)) for text, start in zip(texts, starts, strict=True)]
    more, outs, before = cache.prompt(), [], cache.rows.encoded_count.sum()
    for step in range(steps):
        places = [start + step for start in starts]
        chunk = [(more, 2)] if chunked is not None else []
        attend = cache.step(torch.tensor(slots), torch.tensor(places), chunk, ROPE, merges=merges)
        for layer in range(LAYERS):
            parts = [[text[layer][i][place : place + 1] for text, place in zip(texts, places, strict=True)] for i in range(5)]
            if chunked is not None:
                for i in range(5):
                    parts[i].append(chunked[layer][i][2 * step : 2 * step + 2])
            outs.append(attend(layer, *(torch.cat(part) for part in parts)))
    assert cache.rows.encoded_count.sum() > before
    return slots, outs


def state(cache, slot):
    """All that a sequence holds: counts, accumulating and full-precision entries, and decoded pages."""
    rows, found = cache.rows, []
    for layer in range(LAYERS):
        index = rows.index(layer, torch.tensor([slot]))
        keys, values, valid = rows.full_entries(index)
        pages, owner = rows.encoded_pages(index)
        packing = rows.packings[layer]
        decoded = [x.float() for x in packing.codec.decode(rows.blocks(pages, packing))]
        found += [rows.full_count[index], rows.encoded_count[index], owner, rows.z[index], rows.numerators[index]]
        found += [keys[valid].float(), values[valid].float(), *decoded]
    return found


SLOW = [pytest.param(name, True, marks=pytest.mark.slow) for name in GROWN[2:] if name != "tcq-4bit"]


NAMES = [("dense", True), ("int8", False), ("tcq-4bit", True), ("layered", True)]


@needs_interpreter
@pytest.mark.parametrize(("name", "merges"), [*NAMES, *SLOW])
def test_steps_leave_what_pytorch_leaves(name, merges):
    starts, steps = [3, 33, 50], 9
    texts, chunked, both = [tokens(60, seed=seed) for seed in range(3)], tokens(20, seed=9), []
    for backend in ("triton", "torch"):
        with using(backend):
            cache = layered() if name == "layered" else make(name, policy_name="dmc" if merges else "full", **SETTINGS)
            assert all(reader.writes == (backend == "triton") for reader in cache.readers)
            both.append((cache, *run(cache, texts, starts, steps, merges=merges, chunked=chunked)))
            cache.check_integrity()
    for ours, theirs in zip(both[0][2], both[1][2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)
    for mine, other in zip(both[0][1], both[1][1], strict=True):
        for ours, theirs in zip(state(both[0][0], mine), state(both[1][0], other), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # full-precision entries are bf16: one rounding
        both[0][0].close(mine)
    assert both[0][0].rows.pool.used == 0


@needs_interpreter
def test_what_the_codec_loses_is_sampled(monkeypatch):
    """One page of every layer that encodes some, its error as PyTorch's way measures it; the heads take turns."""
    monkeypatch.setattr("dmc.cache.storage.error._SAMPLED", 2)
    text, found = tokens(70, seed=4), []
    for backend in ("triton", "torch"):
        with using(backend):
            cache = make("int8", page_size=4, policy_name="full")
            monkeypatch.setattr(cache.rows.error, "due", lambda: True)
            rows = []
            read = cache.rows.read_full
            monkeypatch.setattr(cache.rows, "read_full", lambda *at, read=read, rows=rows: (rows.append(at[0]), read(*at))[1])
            run(cache, [text], [2], 60, merges=False)
            found.append(cache.rows.error)
            if backend == "triton":
                assert {int(row[0]) % HEADS for row in rows if row.dim() == 1} == set(range(HEADS))
    assert found[0].pages > 20
    for ours, theirs in zip(found[0].relative, found[1].relative, strict=True):
        assert 0.002 < ours < 0.02 and abs(ours - theirs) < 0.3 * theirs


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal", "repeat_interleave.Tensor")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        masks = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for x in a
        )
        if masks or any(name.startswith(each) for each in self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@needs_interpreter
@pytest.mark.parametrize("merges", [True, False])
def test_no_layer_waits_for_the_device(merges, monkeypatch):
    """The kernels apart, which the interpreter runs with PyTorch's operations: they cannot wait, having no host."""
    cache, text = make("tcq-4bit", **SETTINGS), tokens(40, seed=1)
    slot = cache.load(prefill(cache, text, 30))
    launched = []
    assert cache.rows.error.due()  # the first and every 97th layer waits, to compare a page

    class Silent:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *a, **k: launched.append(self.name)

    attend = cache.step(torch.tensor([slot]), torch.tensor([30]), [], ROPE, merges=merges)
    from dmc.kernels.append import gpu as append_triton
    from dmc.kernels.formats.plain import decode as decode_plain
    from dmc.kernels.formats.plain import encode as encode_plain

    for module in (append_triton, encode_triton, encode_plain, encode_trellis_triton, decode_triton, decode_plain):
        for name in ("_append", "_take", "_plain", "_settle", "_trellis", "_together", "_pieces"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Silent(name))
    monkeypatch.setattr("dmc.kernels.formats.trellis.general._trellis_segments", Silent("_trellis_segments"))
    for name in ("tolist", "cpu", "numpy", "item"):  # not all of them are operations
        monkeypatch.setattr(torch.Tensor, name, lambda x, *_, name=name: pytest.fail(f"a layer reads the device: {name}"))
    with Waits() as waits:
        for layer in range(LAYERS):
            attend(layer, *(part[30:31] for part in text[layer]))
    monkeypatch.undo()
    assert launched == LAYERS * ["_append", "_take", "_trellis", "_settle", "_trellis_segments", "_together"]
    assert waits.seen == []
    with using("torch"), Waits() as waits:  # that the count sees anything: PyTorch's way waits several times a layer
        other = make("tcq-4bit", **SETTINGS)
        slot = other.load(prefill(other, text, 30))
        waits.seen.clear()
        attend = other.step(torch.tensor([slot]), torch.tensor([30]), [], ROPE)
        for layer in range(LAYERS):
            attend(layer, *(part[30:31] for part in text[layer]))
    assert len(waits.seen) >= LAYERS


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(1, 7),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_a_step_needs_no_more_than_was_counted(lengths, page, sinks, window, seed):
    """Pages and columns, in the order in which the kernels take and give them."""
    with using("reference"):
        cache = make("int8", page_size=page, sink_tokens=sinks, window=window)
        texts = [tokens(length + 1, seed + i) for i, length in enumerate(lengths)]
        slots = [cache.load(prefill(cache, text, length)) for text, length in zip(texts, lengths, strict=True)]
        index = cache.rows.indices(torch.tensor(slots))
        pages, columns = growing.needs(cache.rows, index)
        cache.rows.widen(columns)
        cache.rows.pool.reserve(pages)
        kernels = OnPages(cache.rows.packings[0], Backend.REFERENCE, writes=True)
        state = kernels.growing(cache.rows)
        state.free.fill_(pages)
        every, (one, zero) = index.flatten(), (torch.ones(index.numel()), torch.zeros(index.numel()))
        vectors = torch.randn(2, index.numel(), SIZE)
        places = torch.tensor(lengths).repeat(LAYERS)
        kernels.append(cache.rows, every, *vectors, zero, one, places, ROPE(torch.arange(64)))
        kernels.encode(cache.rows, every)
        assert int(state.failed) == 0
        assert int((cache.rows.encoded_count[every]).max()) <= columns


def test_a_row_can_open_a_page_and_fill_one_at_once():
    """With so many full-precision entries the token before the last needs another full-precision page."""
    cache = make("int8", page_size=16, sink_tokens=0, window=0)
    fits = cache.rows.per_full_page
    window = (1 - 16) % fits
    cache = make("int8", page_size=16, sink_tokens=0, window=window)
    text = tokens(16 + window, seed=3)
    for layer in text:
        layer[3].zero_()  # nothing merges
    slot = cache.load(prefill(cache, text, 16 + window))  # its last token is the accumulating entry
    pages, columns = growing.needs(cache.rows, cache.rows.indices(torch.tensor([slot])))
    assert pages == 2 * LAYERS * HEADS and columns == 1


def test_rows_that_no_kernel_writes():
    others = [name for name in CODECS if name not in GROWN]
    for name in others:
        cache = make(name, page_size=16)
        assert not any(reader.writes for reader in cache.readers)
    evicting = make("int8", policy_name="tova", policy_settings={"budget": 12}, page_size=16)
    assert not evicting.readers[0].writes
    for name in GROWN:
        cache = make(name, page_size=16)
        assert cache.readers[0].writes
    with using("auto"):
        cache = make("int8", page_size=16)
        assert not cache.readers[0].writes


def test_what_kernels_could_not_do_is_not_lost():
    pool = PagePool(8, limit=4)
    _, _, failed = pool.lend()
    failed.fill_(1)
    with pytest.raises(RuntimeError, match="page reservation too small"):
        _ = pool.free
    with pytest.raises(PoolExhausted, match="5 pages were asked for and 4 of 4 are free"):
        pool.reserve(5)


@needs_interpreter
@pytest.mark.parametrize("codec_name", ["int8", pytest.param("dense", marks=pytest.mark.slow)])
def test_an_engine_whose_memory_is_short(codec_name, tmp_path, monkeypatch):
    """Sequences share a prompt's pages, are preempted and come back; texts are those of an engine with room, by PyTorch."""
    fields = tiny.config("neuron")
    directory = tiny.write(tmp_path, fields, tiny.weights(fields))
    prompts = [[7, 8, 9], list(range(3, 30)), list(range(3, 28)) + [5] * 4]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, n=2)
    common = {"codec": codec_name, "page_size": 4, "sink_tokens": 0, "dtype": "fp32"}
    with using("torch"):
        roomy = LLM(directory, **common)
        wanted = roomy.generate(prompts, params)
    pool, held = roomy.cache.rows.pool, max(x.stats.held["pages"] + x.stats.held["exact"] for x in wanted)
    memory = max(roomy.cache.worst_pages(29 + 12) * pool.page_bytes, 2 * held)
    monkeypatch.setattr(Predictor, "pages", lambda self, tokens: 1)
    short = LLM(directory, kv_memory=memory, **common)
    assert all(reader.writes for reader in short.cache.readers)
    got = short.generate(prompts, params)
    assert [x.token_ids for x in got] == [x.token_ids for x in wanted]
    assert [x.stats.entries.tolist() for x in got] == [x.stats.entries.tolist() for x in wanted]
    assert short.engine.preemptions > 0
    short.cache.check_integrity()
    assert short.cache.rows.pool.used == 0
    sharing = LLM(directory, **common).generate(prompts[1:2], params)
    assert [x.token_ids for x in sharing] == [x.token_ids for x in wanted[2:4]] and any(x.stats.shared_bytes for x in sharing)


def test_a_cache_that_is_dropped_is_gone():
    """Without waiting for the garbage collector, which knows nothing of a device's memory."""
    gc.collect()
    gc.disable()
    try:
        cache = make("int8")
        cache.readers[0].growing(cache.rows)
        pool = weakref.ref(cache.rows.pool)
        del cache
        assert pool() is None
    finally:
        gc.enable()
