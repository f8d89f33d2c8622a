"""Full pages are encoded on the device: bit for bit as the codecs do it, and over many steps as the cache itself does."""

import pytest
import torch

from dmc.kernels.append.append import append_tokens
from dmc.kernels.encode.encode import encode_pages
from dmc.kernels.pages.paged import NO_COLUMN, NO_PAGE
from tests.kernels.conftest import DEVICE
from tests.kernels.growing import (
    HEADS,
    LAYERS,
    append,
    back,
    cache,
    content,
    fill,
    growing,
    load,
    own_states,
    rope,
    same,
    step,
    tokens,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
PLAIN = ["dense", "int8", "fp8"]
BACKENDS = ("triton", "reference")


def equal_blocks(ours, theirs):
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, x in ours.tensors.items():
        assert torch.equal(x, theirs.tensors[name]), f"{name} of {(x != theirs.tensors[name]).sum()} of {x.numel()} differ"


def entries(rows, count, size):
    """Entries of every magnitude, some of them 0, some with two values that fall between codes."""
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, rows, count, size, generator=g)
    scale = 10.0 ** torch.randint(-30, 30, (rows, count, 1), generator=g)
    keys, values = keys * scale, values.half().float()
    keys[:, ::5], values[:, 1::7] = 0.0, 0.0
    values[:, ::3, 0], values[:, ::3, 1:] = 127.0, (values[:, ::3, 1:] * 8).round() / 2  # int8 of scale 1: ties
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # fp8 of scale 1: ties
    between = (numbers[1:] + numbers[:-1])[torch.randint(126, values[:, ::4, 1:].shape, generator=g)] / 2
    values[:, ::4, 0], values[:, ::4, 1:] = 448.0, between * torch.randn(between.shape, generator=g).sign()
    return keys, values


@pytest.mark.parametrize("exact", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", PLAIN)
def test_bit_for_bit_as_the_codec(kind, exact):
    """Rows in every state, full ones among them; several full-precision pages per row, a window that moves over old slots."""
    check_bits(kind, exact, 10)


def check_bits(kind, exact, size, page=7):
    counts = [22 + page, 0, 21 + page, 22 + page, 22 + page, 1, 20 + page, 22 + page, 22 + page]
    both = [cache(kind, size=size, page_size=page, sink_tokens=3, window=19, exact_dtype=exact, slots=3) for _ in range(2)]
    keys, values = entries(len(counts), 22 + page, size)
    keys = keys.clamp(-6e4, 6e4) if exact == "fp16" else keys
    for held, backend in zip(both, BACKENDS, strict=True):
        fill(held, counts, keys, values)
        state = growing(held)
        encode_pages(state, torch.tensor([8, 0, 1, -1, 2, 3, 5, 6, 7], device=DEVICE), backend=backend)
        assert not state.failed.any()
        assert state.full_count[:9].tolist() == [22, 0, 21 + page, 22, 22 + page, 1, 20 + page, 22, 22]
        encode_pages(state, torch.tensor([4], device=DEVICE), backend=backend)
        back(held)
    (ours, ours_pages), (theirs, theirs_pages) = map(content, both)
    same(ours, theirs, bits=True)
    equal_blocks(ours_pages, theirs_pages)
    assert all(len(x) == 5 for x in ours_pages.tensors.values())


SHAPES = [
    ("dense", "fp16", dict(page_size=4, sink_tokens=2, window=1)),
    ("int8", "fp32", dict(page_size=1, sink_tokens=0, window=0)),
    ("fp8", "bf16", dict(page_size=3, sink_tokens=0, window=2)),
    ("dense", "bf16", dict(page_size=4, sink_tokens=0, window=0)),
    ("tcq", "bf16", dict(page_size=3, sink_tokens=1, window=1)),
]
NAMED = pytest.mark.parametrize(("kind", "exact", "shape"), SHAPES, ids=["-".join(shape[:2]) for shape in SHAPES])


@NAMED
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_as_the_cache_itself(kind, exact, shape, backend):
    """Prompts of unequal lengths, then tokens at random decisions: after each step the two caches hold the same."""
    check_steps(kind, exact, shape, backend, steps=5 if backend == "triton" else 24)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "exact", "shape"), SHAPES[:-1], ids=["-".join(shape[:2]) for shape in SHAPES[:-1]])
def test_many_more_steps(kind, exact, shape):
    check_steps(kind, exact, shape, "triton", steps=40, size=8, lengths=(3, 1, 40))


def check_steps(kind, exact, shape, backend, *, steps, size=6, lengths=(1, 18), compare=same):
    turn, both = rope(size), [cache(kind, size=size, exact_dtype=exact, **shape, columns=128, pages=2000) for _ in range(2)]
    texts = [tokens(length + steps, size, seed, merging=0.3) for seed, length in enumerate(lengths)]
    for held in both:
        slots = [load(held, text, length, turn) for text, length in zip(texts, lengths, strict=True)]
    ours, theirs = both
    state = growing(ours)
    for more in range(steps):
        places = [length + more for length in lengths]
        parts = [
            [torch.stack([text[layer][part][place] for text, place in zip(texts, places, strict=True)]) for part in range(4)]
            for layer in range(LAYERS)
        ]
        step(theirs, slots, places, parts, turn)
        for layer, part in enumerate(parts):
            got = append(state, ours, layer, slots, places, part, turn, backend=backend)
            encode_pages(state, ours.rows.index(layer, torch.tensor(slots, device=DEVICE)), backend=backend)
            for own, want in zip(got, own_states(theirs, layer, slots, places, turn), strict=True):
                torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-5)
        back(ours)
        found, expected = content(ours), content(theirs)
        compare(found[0], expected[0])
        decoded = [held.rows.packings[0].codec.decode(pages) for held, (_, pages) in zip(both, (found, expected), strict=True)]
        for x, y in zip(*decoded, strict=True):
            assert (x.float() - y.float()).norm() <= 0.01 * y.float().norm()
    assert theirs.rows.encoded_count.max() > 2 and ours.rows.pool.used == theirs.rows.pool.used and not state.failed.any()
    for slot in slots:
        ours.close(slot)
    assert ours.rows.pool.used == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_page_or_a_column_rows_stay_full(backend):
    """And are encoded by the next call once there is room."""
    held = cache("int8", page_size=4, sink_tokens=2, window=1, columns=4)
    keys, values = entries(9, 7, 8)
    fill(held, [7] * 9, keys, values)
    state, index = growing(held), torch.arange(9, device=DEVICE)
    state.free.fill_(2)
    before = held.rows.full_entries(index)[0].clone()
    encode_pages(state, index, backend=backend)
    done = state.encoded_count[:9] == 1
    assert done.sum() == 2 and int(state.failed) == NO_PAGE and (state.full_count[:9][~done] == 7).all()
    assert torch.equal(held.rows.full_entries(index[~done])[0], before[~done])
    given = 2 * held.rows.full_pages(7) - 2 * held.rows.full_pages(3)
    assert int(state.free) == given and (state.encoded_table[:9] > 0).sum() == 2 and not state.memory[0].any()
    state.failed.zero_()
    state.free.add_(100)
    state.encoded_count[0] = 4  # as many as the table has columns
    state.full_count[0] = 7
    encode_pages(state, index, backend=backend)
    assert int(state.failed) == NO_COLUMN and state.full_count[0] == 7 and state.encoded_count[:9].tolist() == [4] + [1] * 8
    assert (state.encoded_table[:9, 0] > 0).all() or not done[0]


RATES = [dict(bits=4), dict(bits=2), dict(bits=8), dict(key_bits=6.5, value_bits=1), dict(key_bits=3.25, value_bits=5)]
RATED = pytest.mark.parametrize("settings", RATES, ids=lambda settings: "-".join(map(str, settings.values())))


@RATED
def test_trellis_pages_lose_no_more_than_the_codecs(settings):
    """Every width of codes, one chunk and two; pages that are no power of two."""
    check_errors(settings, 16, 13, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "page"), [(64, 32), (80, 16), (96, 64), (128, 9)])
def test_trellis_pages_of_usual_sizes(size, page):
    check_errors({"bits": 3}, size, page, "fp32")


def check_errors(settings, size, page, exact):
    """Of each page of keys and values, the squared error of what the kernel wrote beside that of the codec's own."""
    counts = [3 + page, 2 + page, 3 + page, 3 + page, 0, 3 + page]
    held = cache("tcq", size=size, page_size=page, sink_tokens=3, window=0, exact_dtype=exact, codec=settings)
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(size, generator=g) * 4
    keys, values = torch.randn(2, len(counts), 3 + page, size, generator=g)
    keys = keys * scale + scale
    keys[2], values[2] = keys[2] * 1e30, values[2] * 1e-30
    keys[3], values[3] = 0.0, 0.0
    keys[5, ::2], values[5, ::2], values[5, 1::4] = 0.0, 0.0, values[5, 1::4] * 1e-3
    fill(held, counts, keys, values)
    state = growing(held)
    encode_pages(state, torch.arange(len(counts), device=DEVICE), backend="triton")
    back(held)
    index = torch.tensor([0, 2, 3, 5], device=DEVICE)
    assert state.encoded_count.sum() == 4 and (state.encoded_count[index] == 1).all()
    packing = held.rows.packings[0]
    pages = held.rows.blocks(held.rows.encoded_pages(index)[0], packing)
    stored = [x[index.cpu(), 3:].to(held.rows.storage.exact_dtype) for x in (keys, values)]
    wanted = packing.codec.encode(*stored)
    for name, x in pages.tensors.items():
        assert (x.cpu() == wanted.tensors[name]).float().mean() >= 0.95, name  # the others are decided by the last digits
    for x, y, z in zip(packing.codec.decode(pages), packing.codec.decode(wanted), stored, strict=True):
        x, y, z = x.double().cpu(), y.double(), z.double()
        mine, codecs = ((some - z).square().sum((1, 2)) for some in (x, y))
        assert torch.isfinite(x).all() and (mine <= 1.02 * codecs + 1e-12 * z.square().sum((1, 2))).all(), mine / codecs


def test_pages_that_no_kernel_writes_are_refused():
    state = growing(cache("kivi"))
    with pytest.raises(ValueError, match="the Triton kernels do not write kivi pages; choose kernels=torch"):
        encode_pages(state, torch.arange(2, device=DEVICE), backend="triton")


@pytest.mark.parametrize("kind", PLAIN)
def test_no_full_row_changes_nothing(kind):
    held = cache(kind)
    keys, values = entries(9, 6, 8)
    fill(held, [0, 1, 2, 3, 4, 5, 6, 6, 0], keys, values)
    state = growing(held)
    before = held.rows.pool.memory.clone()
    encode_pages(state, torch.arange(9, device=DEVICE), backend="triton")
    back(held)
    assert torch.equal(held.rows.pool.memory, before) and not state.encoded_count.any() and HEADS == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "page", "exact"), [(64, 16, "bf16"), (80, 64, "fp32"), (128, 256, "fp16")])
@pytest.mark.parametrize("kind", PLAIN)
def test_bit_for_bit_on_a_gpu(kind, exact, page, size):
    check_bits(kind, exact, size, page)


@pytest.mark.gpu
@NAMED
def test_many_steps_on_a_gpu(kind, exact, shape):
    check_steps(kind, exact, shape, "triton", steps=60, size=64, lengths=(1, 18, 33))


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("number", "size", "page"), [(0, 64, 64), (1, 80, 16), (2, 96, 32), (3, 128, 64), (4, 128, 256)])
def test_trellis_pages_on_a_gpu(number, size, page):
    check_errors(RATES[number], size, page, "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*PLAIN, "tcq"])
def test_capture_in_a_cuda_graph(kind):
    """Append and encode captured once, replayed token after token: the same pages and counts as the cache's own."""
    shape = dict(size=64, exact_dtype="bf16", page_size=8, sink_tokens=2, window=3, columns=64)
    turn, both, text = rope(64), [cache(kind, **shape) for _ in range(2)], tokens(70, 64, 0, merging=0.3)
    for held in both:
        slot = load(held, text, 5, turn)
    ours, theirs = both
    state, tables = growing(ours), turn(torch.arange(128, device=DEVICE))
    index, place = ours.rows.index(0, torch.tensor([slot], device=DEVICE)), torch.tensor([5], device=DEVICE)
    token = [x[5].clone() for x in text[0]]

    def run(index):
        append_tokens(state, index, *token, place, tables, backend="triton")
        encode_pages(state, index, backend="triton")

    run(torch.full_like(index, -1))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(index)
    for at in range(5, 70):
        step(theirs, [slot], [at], [[part[at : at + 1] for part in layer] for layer in text], turn)
        for x, part in zip(token, text[0], strict=True):
            x.copy_(part[at])
        place.fill_(at)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(ours.rows.encoded_count[index], theirs.rows.encoded_count[index]) and not state.failed.any()
    assert torch.equal(ours.rows.full_count[index], theirs.rows.full_count[index]) and ours.rows.encoded_count[index].min() > 2
    packing = ours.rows.packings[0]
    sides = [packing.codec.decode(held.rows.blocks(held.rows.encoded_pages(index)[0], packing)) for held in both]
    for x, y in zip(*sides, strict=True):
        assert (x.float() - y.float()).norm() <= 0.01 * y.float().norm()
