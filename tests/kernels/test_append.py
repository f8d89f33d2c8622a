"""A token merges or starts an entry on the device: against the reference implementation, and against the cache itself."""

from dataclasses import replace

import pytest
import torch

from dmc.kernels.append.append import append_tokens
from dmc.kernels.pages.paged import NO_PAGE, NOT_ENCODED, Growing
from tests.kernels.conftest import DEVICE
from tests.kernels.growing import HEADS, LAYERS, append, back, cache, content, growing, load, own_states, rope, same, step, tokens

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
BACKENDS = ("triton", "reference")


def pair(*lengths, size=8, seed=0, merging=0.5, **settings):
    """Two caches with the same sequences, of so many tokens each; the tokens that follow, and the rotation."""
    settings = {"page_size": 8, "sink_tokens": 0, "window": 60} | settings
    turn, both = rope(size), [cache("int8", size=size, **settings) for _ in range(2)]
    texts = [tokens(length + 40, size, seed + number, merging=merging) for number, length in enumerate(lengths)]
    for held in both:
        slots = [load(held, text, length, turn) for text, length in zip(texts, lengths, strict=True)]
    return both, slots, texts, turn


def following(texts, places):
    """The tokens at ``places``, one of each text: of each layer key, value ``[S, H, D]``, alpha, omega ``[S, H]``."""
    return [
        [torch.stack([text[layer][part][place] for text, place in zip(texts, places, strict=True)]) for part in range(4)]
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "dtype"), [(8, "fp32"), (6, "bf16"), (10, "fp16")])
def test_grows_as_the_cache_itself_does(backend, size, dtype):
    """Sequences of unequal lengths, heads that merge beside heads that append, over several pages of full-precision entries."""
    (ours, theirs), slots, texts, turn = pair(1, 9, 23, size=size, exact_dtype=dtype)
    state, lengths = growing(ours), [1, 9, 23]
    for more in range(6):
        places = [length + more for length in lengths]
        parts = following(texts, places)
        step(theirs, slots, places, parts, turn)
        for layer, part in enumerate(parts):
            got = append(state, ours, layer, slots, places, part, turn, backend=backend)
            for own, want in zip(got, own_states(theirs, layer, slots, places, turn), strict=True):
                torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-5)
    back(ours)
    same(content(ours)[0], content(theirs)[0])
    assert state.full_count.max() > state.per_full_page and not state.failed.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merging", [0.0, 1.0])
def test_all_append_and_all_merge(backend, merging):
    (ours, theirs), slots, texts, turn = pair(3, merging=merging)
    state = growing(ours)
    for place in range(3, 14):
        parts = following(texts, [place])
        step(theirs, slots, [place], parts, turn)
        for layer, part in enumerate(parts):
            append(state, ours, layer, slots, [place], part, turn, backend=backend)
    back(ours)
    same(content(ours)[0], content(theirs)[0])
    assert (ours.rows.full_count[ours.rows.all_layers(slots[0])] == (13 if merging == 0 else 0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decision", [0.0, 1.0])
def test_a_row_without_an_open_entry_opens_one(backend, decision):
    held, turn = cache("dense", page_size=64), rope(8)
    state = growing(held)
    key, value, _, omega = (x[:1] for x in tokens(1, 8, 0)[0])
    got = append(state, held, 0, [1], [0], (key, value, torch.full_like(omega, decision), omega), turn, backend=backend)
    torch.testing.assert_close(got[0], key[0])  # position 0 is not rotated
    torch.testing.assert_close(got[1], value[0])
    assert torch.equal(state.z[3:6], omega[0]) and not state.z[:3].any() and not state.z[6:].any()
    assert not state.full_count.any() and int(state.free) == 400


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_of_the_batch_that_are_not_in_use(backend):
    (ours, theirs), slots, texts, turn = pair(5, 7)
    state, parts = growing(ours), following(texts, [5, 7])
    step(theirs, slots, [5, 7], parts, turn)
    for layer, part in enumerate(parts):
        index = ours.rows.index(layer, torch.tensor(slots, device=DEVICE))
        index = torch.cat([index[:HEADS], torch.full((HEADS,), -1, device=DEVICE), index[HEADS:]])
        padded = [torch.cat([x[:1], torch.full_like(x[:1], float("nan")), x[1:]]).flatten(0, 1) for x in part]
        places = torch.tensor([5, 0, 7], dtype=torch.int32, device=DEVICE)
        got = append_tokens(state, index, *padded, places, turn(torch.arange(64, device=DEVICE)), backend=backend)
        assert not got[0][HEADS : 2 * HEADS].any() and not got[1][HEADS : 2 * HEADS].any()
    back(ours)
    same(content(ours)[0], content(theirs)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_free_page_nothing_is_written(backend):
    """Of the rows that need a page, as many as there are get one; the others stay as they were, and the flag tells."""
    (ours, _), slots, texts, turn = pair(1, 1, merging=0.0)
    state = growing(ours)
    state.free.fill_(4)
    before = {name: getattr(state, name).clone() for name in ("numerators", "z", "full_count", "full_table")}
    part = following(texts, [1, 1])[0]
    append(state, ours, 0, slots, [1, 1], part, turn, backend=backend)
    index = ours.rows.index(0, torch.tensor(slots, device=DEVICE))
    grown = state.full_count[index] == 1
    assert grown.sum() == 4 and int(state.free) == 0 and int(state.failed) == NO_PAGE
    for name, x in before.items():
        now = getattr(state, name)
        assert torch.equal(now[index[~grown]], x[index[~grown]]) and not torch.equal(now[index[grown]], x[index[grown]])
    assert state.full_table[index[grown], 0].unique().numel() == 4
    assert (state.owners[state.full_table[index[grown], 0].long()] == 1).all()
    assert not state.memory[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_row_takes_nothing_until_it_is_encoded(backend):
    (ours, _), slots, texts, turn = pair(1, page_size=2, window=0, merging=0.0)
    state = growing(ours)
    for place in (1, 2, 3):
        append(state, ours, 0, slots, [place], following(texts, [place])[0], turn, backend=backend)
    index = ours.rows.index(0, torch.tensor(slots, device=DEVICE))
    assert (state.full_count[index] == 2).all() and int(state.failed) == NOT_ENCODED
    assert torch.equal(state.numerators[index, :8], texts[0][0][0][2] * texts[0][0][3][2][:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_page_is_zeroed(backend):
    """What it held as an encoded page could read as NaN."""
    (ours, _), slots, texts, turn = pair(1, merging=0.0)
    state = growing(ours)
    state.memory[1:] = 255
    append(state, ours, 0, slots, [1], following(texts, [1])[0], turn, backend=backend)
    pages = state.full_table[ours.rows.index(0, torch.tensor(slots, device=DEVICE)), 0].long()
    for part in "kv":
        assert not state.full_precision[part][pages, 1:].any() and state.full_precision[part][pages, 0].isfinite().all()


def test_wrong_views_are_refused():
    state = growing(cache("dense"))
    views = {name: getattr(state, name) for name in Growing.__dataclass_fields__}
    with pytest.raises(ValueError, match="free must be int32 on the device, got torch.int64"):
        Growing(**views | {"free": state.free.long()})
    with pytest.raises(ValueError, match="the kernels read k as float32 .100, 8., and the codec stores float32 .4, 8.;"):
        replace(state.format, page=100)
    with pytest.raises(ValueError, match="a row has up to 103 full-precision entries, but its . full-precision pages hold"):
        fields = {name: (dtype, (100, *shape[1:])) for name, (dtype, shape) in state.format.fields.items()}
        Growing(**views | {"format": replace(state.format, page=100, fields=fields)})
    with pytest.raises(ValueError, match=r"numerators \(18, 15\) torch.float32 must be \[rows, 16\]"):
        Growing(**views | {"numerators": state.numerators[:, :15]})
    x = torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="4 rows for 3 positions"):
        append_tokens(state, torch.arange(4), x, x, x[:, 0], x[:, 0], torch.arange(3), (x, x))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_a_gpu(size, dtype):
    test_grows_as_the_cache_itself_does("triton", size, dtype)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    """Captured once, replayed for other tokens at other places, with other decisions."""
    (ours, theirs), slots, texts, turn = pair(4, 11, size=64)
    state, tables = growing(ours), turn(torch.arange(64, device=DEVICE))
    first = following(texts, [4, 11])[0]
    index = ours.rows.index(0, torch.tensor(slots, device=DEVICE))
    held = [x.flatten(0, 1).clone() for x in first]
    places, unused = torch.tensor([4, 11], device=DEVICE), torch.full_like(index, -1)
    run = lambda index: append_tokens(state, index, *held, places, tables, backend="triton")  # noqa: E731
    run(unused)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own = run(index)
    for more in range(20):
        parts = following(texts, [4 + more, 11 + more])
        step(theirs, slots, [4 + more, 11 + more], parts, turn)
        for x, new in zip(held, parts[0], strict=True):
            x.copy_(new.flatten(0, 1))
        places.copy_(torch.tensor([4 + more, 11 + more], device=DEVICE))
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(own[0], own_states(theirs, 0, slots, [23, 30], turn)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.rows.full_count[index], theirs.rows.full_count[index])
    torch.testing.assert_close(ours.rows.full_entries(index)[0], theirs.rows.full_entries(index)[0], rtol=1e-5, atol=1e-5)
