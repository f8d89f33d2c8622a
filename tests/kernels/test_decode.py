"""Decode attention over pages against its reference implementation and fp64: rows of every length, all kinds of pages."""

from dataclasses import replace

import pytest
import torch

from dmc.cache.codecs import trellis
from dmc.cache.codecs.gear import GearCodec
from dmc.cache.codecs.tcq import TcqCodec
from dmc.cache.storage.pages import Layout
from dmc.kernels.decode.decode import decode_attention
from dmc.kernels.decode.reference import decode_reference
from dmc.kernels.formats.plain.format import MAIN, PlainFormat
from dmc.kernels.pages.key_bias import KeyBias
from dmc.kernels.pages.paged import Paged
from dmc.rope import Rope
from tests.cache.stored import frequencies
from tests.kernels.conftest import DEVICE, assert_close_enough

pytest.importorskip("triton")
from dmc.kernels.decode import gpu as decode_triton  # noqa: E402
from dmc.kernels.formats.trellis import grouped as trellis_grouped_triton  # noqa: E402
from dmc.kernels.formats.trellis import single as trellis_single_triton

pytestmark = pytest.mark.usefixtures("poison")
PLAIN = list(MAIN)


def full_fields(dtype, entries, size):
    """Fields of a page of full-precision entries, as `dmc.cache.storage.full` has them."""
    fields = {name: (dtype, (entries, size)) for name in "kv"}
    return fields | ({f"{name}_scale": (torch.bfloat16, (entries,)) for name in "kv"} if dtype == torch.int8 else {})


def random_full(name, shape, dtype, g):
    """Random content of such a field."""
    x = torch.randn(shape, generator=g)
    if name.endswith("scale"):
        return x.abs() / 40
    return (x * 40).round().clamp(-127, 127) if dtype == torch.int8 else x


def paged(kind, lengths, size, page, *, dtype=torch.float32, per_full_page=12, columns=None, seed=0):
    """Rows of ``lengths`` (encoded pages, full-precision entries) over one byte pool, pages dealt out in random order.

    Memory that nothing owns holds 0xFF bytes: NaN as any float.
    """
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    encoded_columns = columns or max(1, max(pages for pages, _ in lengths))
    full_columns = max(1, max(-(-exact // per_full_page) for _, exact in lengths))
    count = 1 + rows * (encoded_columns + full_columns)
    wide = {"dense": dtype, "int8": torch.int8, "fp8": torch.uint8}[kind]
    fields = {MAIN[kind].format(part): (wide, (page, size)) for part in "kv"}
    fields |= {f"{part}_scale": (torch.bfloat16, (page,)) for part in "kv" if kind != "dense"}
    made = PlainFormat(kind, page, size, fields, None)
    full_precision = full_fields(dtype, per_full_page, size)
    page_bytes = max(sum(t.itemsize * torch.Size(s).numel() for t, s in part.values()) for part in (fields, full_precision))
    memory = torch.full((count, -(-page_bytes // 16) * 16), 255, dtype=torch.uint8)

    def views(part):
        found, offset = {}, 0
        for name, (kind_, shape) in sorted(part.items(), key=lambda field: -field[1][0].itemsize):
            width = kind_.itemsize * torch.Size(shape).numel()
            found[name] = memory[:, offset : offset + width].view(kind_).unflatten(-1, shape)
            offset += width
        return found

    memory = memory.to(DEVICE)
    encoded, full_precision = views(fields), views(full_precision)
    order = (torch.randperm(count - 1, generator=g) + 1).tolist()
    tables = torch.zeros(rows, encoded_columns, dtype=torch.int32), torch.zeros(rows, full_columns, dtype=torch.int32)
    for row, (pages, exact) in enumerate(lengths):
        for column in range(pages):
            tables[0][row, column] = at = order.pop()
            for name, field in encoded.items():
                x = torch.randn(field.shape[1:], generator=g)
                if name.endswith("codes"):
                    x = (x * 40).round().clamp(-127, 127)
                if name.endswith("scale"):
                    x = x.abs() / 40 if kind == "int8" else x.abs()
                if name.endswith("numbers"):
                    x = x.to(torch.float8_e4m3fn).view(torch.uint8)
                field[at] = x.to(field)
        for place in range(exact):
            column = place // per_full_page
            if place % per_full_page == 0:
                tables[1][row, column] = order.pop()
            for name, field in full_precision.items():
                x = random_full(name, field.shape[2:], dtype, g)
                field[tables[1][row, column], place % per_full_page] = x.to(field)
    counts = torch.tensor(lengths, dtype=torch.int32).to(DEVICE)
    return Paged(made, encoded, full_precision, *(t.to(DEVICE) for t in tables), counts[:, 0].clone(), counts[:, 1].clone())


def queries(rows, groups, size, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in ((rows, groups, size), (rows, size), (rows, size))]


def check(cache, inputs, index, **options):
    index, scale = torch.tensor(index, device=DEVICE), inputs[0].shape[-1] ** -0.5
    ours = decode_attention(*inputs, index, cache, backend="triton")
    # Memory that no row owns reads as NaN: the reference implementation masks it, the fp64 result shows that it did.
    plain = decode_reference(*inputs, index, cache, scale=scale)
    exact = decode_reference(*(x.double() for x in inputs), index, cache, scale=scale)
    assert exact.isfinite().all()
    assert_close_enough(("out",), [ours], [plain], [exact], **options)


def with_key_bias(cache, seed=0):
    """The same rows of a model whose keys have a bias: what is encoded is without it, at positions that pages hold."""
    g, rows = torch.Generator().manual_seed(seed), len(cache.encoded_count)
    bias = torch.randn(1, 3, cache.head_size, generator=g) * 4
    rope = Rope(frequencies(cache.head_size, 100.0), device=DEVICE)
    pages = len(cache.full_precision["k"])
    places = torch.randint(-1, 90, (pages, cache.page), generator=g, dtype=torch.int32).to(DEVICE)
    made = KeyBias(bias.to(DEVICE), rope)
    made.features(places)
    heads = torch.arange(rows, device=DEVICE) % 3
    return replace(cache, encoded=cache.encoded | {"position": places}, key_bias=made, heads=heads)


LENGTHS = [(0, 0), (0, 1), (1, 0), (1, 15), (3, 7), (0, 13)]  # (encoded pages, full-precision entries)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_the_twin_whatever_the_lengths(kind, groups):
    check(paged(kind, LENGTHS, 8, 16), queries(4, groups, 8), [5, 0, 4, 3])


@pytest.mark.parametrize(("kind", "groups", "size"), [("int8", 1, 8), ("fp8", 3, 20)])
def test_full_precision_entries_of_8_bits(kind, groups, size):
    check(paged(kind, LENGTHS, size, 16, dtype=torch.int8), queries(4, groups, size), [5, 0, 4, 3])


@pytest.mark.parametrize(("groups", "size", "page", "settings"), [
    (3, 16, 32, dict(bits=4, backbone="kivi", rank=1, outliers=0.1)), (1, 32, 16, dict(bits=4)), (4, 128, 16, dict(bits=3)),
    (3, 16, 16, dict(bits=8)),
])  # fmt: skip
def test_full_precision_entries_of_8_bits_beside_codes(groups, size, page, settings):
    """The min/max kernel, and the three of trellis pages: of one query, of grouped ones, and the general one."""
    check(gear_pages(size, page, dtype=torch.int8, **settings)[0], queries(3, groups, size), [2, 0, 1], floor=3e-6)


@pytest.mark.parametrize(("kind", "groups", "size"), [("dense", 1, 8), ("int8", 3, 8), ("fp8", 2, 20)])
def test_the_bias_of_keys_enters_plain_pages(kind, groups, size):
    check(with_key_bias(paged(kind, LENGTHS, size, 16)), queries(4, groups, size), [5, 0, 4, 3])


@pytest.mark.parametrize(("groups", "size"), [(1, 16), (3, 20)])
def test_the_bias_of_keys_enters_minmax_pages(groups, size):
    check(with_key_bias(gear_pages(size, 16, **GEARS[0])[0]), queries(3, groups, size), [2, 0, 1], floor=3e-6)


@pytest.mark.parametrize(("groups", "bits", "size", "page"), [(1, 4, 32, 16), (4, 3, 128, 16), (3, 8, 16, 16)])
def test_the_bias_of_keys_enters_trellis_pages(groups, bits, size, page):
    """The three kernels: of one query, of grouped ones, and the general one."""
    check(with_key_bias(gear_pages(size, page, bits=bits)[0]), queries(3, groups, size), [2, 0, 1], floor=3e-6)


@pytest.mark.parametrize("page", [40, 50])
def test_pages_longer_than_a_piece_and_no_multiple_of_a_tile(page):
    check(paged("dense", [(0, 3), (2, 7), (3, 0)], 8, page), queries(3, 1, 8), [2, 0, 1])


def test_all_rows_empty_gives_the_own_value():
    inputs = queries(2, 2, 8)
    out = decode_attention(*inputs, torch.tensor([1, 0], device=DEVICE), paged("dense", [(0, 0)] * 2, 8, 16), backend="triton")
    torch.testing.assert_close(out, inputs[2][:, None].expand_as(out))


def test_low_precision_queries():
    check(paged("int8", LENGTHS, 16, 16, dtype=torch.float16), queries(4, 2, 16, torch.float16), [1, 2, 3, 4])


def test_unknown_pages_are_refused():
    with pytest.raises(ValueError, match="plain pages are dense, int8, fp8, not 'zip'"):
        PlainFormat("zip", 16, 8, {}, None)
    fields = {"k_codes": (torch.int8, (16, 8)), "k_scale": (torch.bfloat16, (16,))}
    fields |= {"v_" + name[2:]: field for name, field in fields.items()}
    with pytest.raises(ValueError, match="int8 pages have the fields .*; missing: k_codes, k_scale, v_codes, v_scale"):
        Paged(PlainFormat("int8", 16, 8, fields, None), {}, {}, *[torch.zeros(1)] * 4)


def gear_pages(size, page, *, dtype=torch.float32, scaled_by=1.0, **settings):
    """Rows over pages that the project's codec encoded, in one byte pool; and the keys and values that it decodes."""
    g = torch.Generator().manual_seed(0)
    codec = GearCodec(**settings) if "backbone" in settings else TcqCodec(**settings)
    keys, values = torch.randn(2, 6, page, size, generator=g) * torch.rand(size, generator=g).mul(3) * scaled_by
    blocks = codec.encode(keys, values)
    where = Layout({name: (x.dtype, tuple(x.shape[1:])) for name, x in blocks.tensors.items()})
    full_precision = Layout(full_fields(dtype, 12, size))
    memory = torch.full((14, max(where.nbytes, full_precision.nbytes)), 255, dtype=torch.uint8)
    memory[0] = 0  # the pool's null page
    for name, view in full_precision.views(memory).items():
        view[8:] = random_full(name, view[8:].shape, dtype, g)
    for name, view in where.views(memory).items():
        view[1:7] = blocks.tensors[name]
    memory = memory.to(DEVICE)
    fields = where.views(memory)
    tables = torch.tensor([[1, 2, 3, 4], [6, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[8, 9], [10, 0], [11, 0]])
    counts = torch.tensor([4, 1, 0]), torch.tensor([13, 0, 5])
    small = [x.int().to(DEVICE) for x in (*tables, *counts)]
    made = codec.page_format(page, size, torch.float32, DEVICE)
    return Paged(made, fields, full_precision.views(memory), *small), codec.decode(blocks)


GEARS = [dict(bits=bits, backbone=backbone) for bits, backbone in ((4, "kivi"), (3, "kcvt"), (2, "token"))]


@pytest.mark.parametrize("settings", [*GEARS, dict(bits=8, backbone="kivi", rank=2, outliers=0.0, group=8)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gear_pages(settings, groups):
    """Packed codes, outliers and low rank against the reference, and that against the codec."""
    settings = {"rank": 1, "outliers": 0.1, **settings}
    cache, (keys, values) = gear_pages(16, 32, **settings)
    inputs = queries(3, groups, 16)
    check(cache, inputs, [2, 0, 1], floor=3e-6)
    entries = [torch.cat([x[5], own[2][None]]) for x, own in zip((keys.to(DEVICE), values.to(DEVICE)), inputs[1:], strict=True)]
    expected = ((inputs[0][2] @ entries[0].T) * 16**-0.5).softmax(-1) @ entries[1]
    index = torch.tensor([2, 0, 1], device=DEVICE)
    for backend in ("torch", "triton"):
        torch.testing.assert_close(decode_attention(*inputs, index, cache, backend=backend)[2], expected, rtol=1e-4, atol=1e-5)


TRELLISES = [
    dict(bits=4),
    dict(bits=3),
    dict(bits=2),
    dict(bits=8),
    dict(key_bits=6.5, value_bits=1),
    dict(key_bits=7, value_bits=5),
]


@pytest.mark.parametrize("settings", TRELLISES, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("groups", [1, 2])
def test_trellis_pages(settings, groups):
    """Every width of codes, one chunk and two; against the reference, and that against the codec."""
    cache, (keys, values) = gear_pages(16, 16, **settings)
    inputs = queries(3, groups, 16)
    check(cache, inputs, [2, 0, 1], floor=3e-6)
    entries = [torch.cat([x[5], own[2][None]]) for x, own in zip((keys.to(DEVICE), values.to(DEVICE)), inputs[1:], strict=True)]
    expected = ((inputs[0][2] @ entries[0].T) * 16**-0.5).softmax(-1) @ entries[1]
    index = torch.tensor([2, 0, 1], device=DEVICE)
    for backend in ("torch", "triton"):
        torch.testing.assert_close(decode_attention(*inputs, index, cache, backend=backend)[2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(key_bits=4.5, value_bits=3.5),
        dict(key_bits=3.25, value_bits=2.5),
        dict(key_bits=1.5, value_bits=5),
        pytest.param(dict(key_bits=1, value_bits=4.25), marks=pytest.mark.slow),
        pytest.param(dict(bits=2), marks=pytest.mark.slow),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize(
    ("size", "page"),
    [(80, 32), (128, 64), pytest.param(64, 128, marks=pytest.mark.slow), pytest.param(96, 256, marks=pytest.mark.slow)],
)
def test_trellis_pages_of_one_query_a_head(settings, size, page):
    """The kernel without matrix products: every width and every pair of chunks that it takes, blocks of 4 to 32 entries."""
    cache, _ = gear_pages(size, page, **settings)
    assert trellis_single_triton.takes(1, cache.format.key + cache.format.value)
    check(cache, queries(3, 1, size), [2, 0, 1], floor=3e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_several_pages_a_piece(groups, monkeypatch):
    """Pieces as long as on a GPU: a program goes from page to page."""
    monkeypatch.setattr(decode_triton, "interpreted", lambda: False)
    cache, _ = gear_pages(128, 64, bits=4)
    assert cache.encoded_count.max() > 1
    check(cache, queries(3, groups, 128), [2, 0, 1], floor=3e-6)


@pytest.mark.parametrize(
    "settings",
    [
        dict(key_bits=4.5, value_bits=3.5),
        pytest.param(dict(key_bits=3.25, value_bits=2.5), marks=pytest.mark.slow),
        dict(key_bits=5, value_bits=1.5),
        dict(bits=2),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize(("page", "groups"), [(16, 2), (64, 4), pytest.param(32, 16, marks=pytest.mark.slow)])
def test_trellis_pages_of_grouped_queries(settings, page, groups):
    """The kernel with tiles of blocks on top of each other, 8 of 2 entries to 2 of 8."""
    cache, _ = gear_pages(128, page, **settings)
    assert trellis_grouped_triton.takes(groups, page, cache.format.key, cache.format.value)
    check(cache, queries(3, groups, 128), [2, 0, 1], floor=3e-6)


def test_which_kernel_reads_trellis_pages(monkeypatch):
    launched = []
    for name, module in (("single", trellis_single_triton), ("grouped", trellis_grouped_triton)):
        monkeypatch.setattr(module, "launch", lambda grid, shared, constants, name=name: launched.append((name, constants["G"])))
    shapes = (1, 128, 16, 4), (2, 128, 16, 4), (17, 128, 16, 4), (3, 80, 16, 4), (1, 128, 16, 8), (2, 128, 16, 8), (2, 64, 64, 2)
    for groups, size, page, bits in (*shapes, (4, 128, 128, 4)):
        cache, _ = gear_pages(size, page, bits=bits)
        decode_attention(*queries(3, groups, size), torch.tensor([2, 0, 1], device=DEVICE), cache, backend="triton")
    assert launched == [("single", 1), ("grouped", 2), ("grouped", 2)]


def test_levels_are_the_same_on_both_sides_of_0():
    """Of the table of 5 bits the kernel reads one half."""
    assert torch.equal(trellis.levels(5), -trellis.levels(5).flip(0))


def test_trellis_pages_with_constant_entries():
    """Entries of zeros (scale code 255) and equal entries."""
    cache, _ = gear_pages(16, 16, bits=4, scaled_by=torch.tensor([0.0, 1.0]).repeat(8)[:, None])
    check(cache, queries(3, 2, 16), [2, 0, 1], floor=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80, 96])
@pytest.mark.parametrize("page", [16, 32])
def test_trellis_matrix_in_the_interpreter(size, page):
    cache, _ = gear_pages(size, page, bits=3)
    check(cache, queries(3, 4, size), [2, 0, 1], floor=3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", TRELLISES, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trellis_pages_on_a_gpu(settings, size, groups, dtype):
    cache, _ = gear_pages(size, 32, dtype=dtype, **settings)
    check(cache, queries(3, groups, size, dtype), [2, 0, 1], floor=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", GEARS)
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gear_pages_on_a_gpu(settings, size, groups, dtype):
    cache, _ = gear_pages(size, 32, dtype=dtype, rank=2, outliers=0.05, **settings)
    check(cache, queries(3, groups, size, dtype), [2, 0, 1], floor=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("page", [16, 64, 256])
@pytest.mark.parametrize("size", [64, 80])
def test_matrix_in_the_interpreter(kind, page, size):
    check(paged(kind, [(2, 5), (0, 1), (1, 20)], size, page, per_full_page=9), queries(3, 4, size), [2, 0, 1], floor=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("page", [16, 32, 64, 256, 300])
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_on_a_gpu(kind, page, size, groups, dtype):
    lengths = [(0, 0), (0, 1), (1, 0), (40, 11), (7, 3), (100, 12), (0, 12), (1, 1)] * 4
    check(paged(kind, lengths, size, page, dtype=dtype), queries(32, groups, size, dtype), list(range(32)), floor=5e-3)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    """Captured once, replayed with other lengths: the result is that of the lengths at replay."""
    cache, inputs = paged("dense", [(4, 5), (2, 9)], 64, 16, columns=8), queries(2, 4, 64)
    index = torch.arange(2, device=DEVICE)
    decode_attention(*inputs, index, cache, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*inputs, index, cache, backend="triton")
    cache.encoded_count.copy_(torch.tensor([1, 2], device=DEVICE))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, decode_reference(*inputs, index, cache, scale=64**-0.5), rtol=1e-4, atol=1e-4)
