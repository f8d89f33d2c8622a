"""Decode attention by the CPU kernels, against the reference in fp64: all kinds of pages, bf16, several threads."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.codecs import trellis
from dmc.kernels import backend
from dmc.kernels import ready as compile_cpu
from dmc.kernels.backend import using
from dmc.kernels.cpu.runs import runs_on_cpu
from dmc.kernels.decode import cpu as decode_cpu
from dmc.kernels.decode.decode import decode_attention
from dmc.kernels.decode.reference import decode_reference
from dmc.kernels.formats.trellis import codes_loop as pages_numba
from dmc.kernels.formats.trellis import levels_loop as levels_numba
from dmc.kernels.formats.trellis.format import TrellisFormat

pytest.importorskip("triton")  # the pages of its tests
from dmc.kernels.cpu.compiled import exponential  # noqa: E402
from dmc.kernels.formats.plain.loop import e4m3  # noqa: E402
from tests.kernels.conftest import assert_close_enough  # noqa: E402
from tests.kernels.test_decode import GEARS, LENGTHS, TRELLISES, gear_pages, paged, queries  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the pages of these tests lie on the GPU then"),
]
KINDS = ("dense", "int8", "fp8")


def check(cache, inputs, index):
    index = torch.tensor(index)
    scale = inputs[0].shape[-1] ** -0.5
    exact = decode_reference(*(x.double() for x in inputs), index, cache, scale=scale)
    torch.testing.assert_close(decode_cpu.decode(*inputs, index, cache, scale).double(), exact, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "groups"), [(8, 1), (20, 3)])
def test_equals_the_twin_whatever_the_lengths(kind, size, groups, dtype):
    check(paged(kind, LENGTHS, size, 16, dtype=dtype), queries(4, groups, size), [5, 0, 4, 3])


@pytest.mark.parametrize(("kind", "size", "groups"), [("int8", 8, 1), ("fp8", 20, 3), ("int8", 64, 2)])
def test_full_precision_entries_of_8_bits(kind, size, groups):
    check(paged(kind, LENGTHS, size, 16, dtype=torch.int8), queries(4, groups, size), [5, 0, 4, 3])


@pytest.mark.parametrize("settings", TRELLISES, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize(
    ("size", "groups", "page", "dtype"), [(16, 2, 16, torch.bfloat16), (40, 1, 12, torch.float32), (16, 3, 16, torch.int8)]
)
def test_trellis_pages(settings, size, groups, page, dtype):
    check(gear_pages(size, page, dtype=dtype, **settings)[0], queries(3, groups, size), [2, 0, 1])


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(rank=2, outliers=0.1) | settings for settings in GEARS),
        dict(bits=8, backbone="kivi", rank=3, outliers=0.0, group=8),
        dict(bits=3, backbone="kivi", rank=0, outliers=0.0, group=7),
        dict(bits=4, backbone="kcvt", rank=0, outliers=0.2),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize(
    ("size", "groups", "page", "dtype"), [(16, 2, 16, torch.bfloat16), (20, 3, 13, torch.float32), (20, 3, 13, torch.int8)]
)
def test_gear_pages(settings, size, groups, page, dtype):
    """Codes, groups that do not divide, outliers and low rank; pages of any number of entries."""
    check(gear_pages(size, page, dtype=dtype, **settings)[0], queries(3, groups, size), [2, 0, 1])


@pytest.mark.skipif(not levels_numba.WIDE, reason="this CPU looks up no vectors")
@pytest.mark.parametrize("rates", [(4, 3), (3, 2), (2.25, 1.75), (1, 1.5), (3.25, 4), (4.5, 5)])
@pytest.mark.parametrize("page", [8, 32])
def test_levels_by_vectors_are_those_of_the_plain_loops(rates, page):
    """At head size 64 every chunk of these rates is whole vectors; bit for bit, and nothing is written behind."""
    codes, table, lines, starts = trellis_page(rates, page, 64)
    assert pages_numba._wide(page, lines)
    kept = np.full(page * 64 + 8, 7.0, np.float32), np.full(page * 64 + 8, 7.0, np.float32)
    for part in range(2):
        mine = lines[starts[part] : starts[part + 1]]
        for out, wide in zip(kept, (True, False), strict=True):
            code, path = np.full(page * 64, 999, np.uint16), np.full(page * 66, 999, np.uint16)
            read = pages_numba.trellis if wide else pages_numba._trellis_by_values
            last = (np.full((page, 16), 5, np.int32),) if wide else ()
            read(codes, page, 64, table, mine, code, path, *last, out)
        assert (kept[0] == kept[1]).all() and (kept[0][-8:] == 7).all()


@pytest.mark.parametrize(("rate", "page", "size"), [(5.5, 32, 64), (2, 12, 64), (2, 32, 40), (2.1, 32, 64)])
def test_where_vectors_do_not_fit(rate, page, size):
    assert not pages_numba._wide(page, trellis_page((rate, rate), page, size)[2])


def trellis_page(rates, page, size):
    """Random codes of a page's keys and then of its values, and what the format says of them."""
    chunks = [tuple(trellis.chunks(rate, size)) for rate in rates]
    levels = {bits: trellis.levels(bits) for part in chunks for _, bits in part}
    stored = {"codes": (torch.uint8, (page * size,)), "scale": (torch.uint8, (page,)), "top": (torch.bfloat16, (1,))}
    fields = {f"{part}_{name}": field for part in "kv" for name, field in stored.items()}
    made = TrellisFormat("tcq", page, size, fields, None, *chunks, levels, torch.eye(size))
    codes = torch.randint(0, 256, (page * size * 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(page))
    return codes.numpy(), *made.tables()


def test_trellis_pages_with_constant_entries():
    cache, _ = gear_pages(16, 16, bits=4, scaled_by=torch.tensor([0.0, 1.0]).repeat(8)[:, None])
    check(cache, queries(3, 2, 16), [2, 0, 1])


def test_threads_share_the_rows(monkeypatch):
    monkeypatch.setattr(decode_cpu, "_LEAST", 100)
    cache, inputs = paged("dense", [(2, 5), (0, 1), (1, 15)] * 8, 8, 16), queries(24, 2, 8)
    alone = decode_cpu.decode(*inputs, torch.arange(24), cache, 0.3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(decode_cpu.decode(*inputs, torch.arange(24), cache, 0.3), alone)
    finally:
        torch.set_num_threads(before)


def test_weights_are_not_written_where_there_is_no_room_for_them():
    """Not to whatever lies at the beginning of the pages' memory, which no row may write to."""
    with pytest.raises(ValueError, match="no scores to add them to"):
        decode_cpu.with_statistics(*queries(4, 2, 8), torch.arange(4), paged("dense", LENGTHS, 8, 16), 0.3, "sum")


def test_no_rows_and_other_dtypes():
    cache, inputs = paged("dense", LENGTHS, 8, 16), queries(4, 2, 8)
    expected = decode_cpu.decode(*inputs, torch.arange(4), cache, 0.3)
    assert decode_cpu.decode(*(x[:0] for x in inputs), torch.arange(0), cache, 0.3).shape == (0, 2, 8)
    inputs[0].requires_grad_()
    inputs[1] = inputs[1].double()
    assert torch.equal(decode_cpu.decode(*inputs, torch.arange(4), cache, 0.3), expected)


def test_a_numba_that_cannot_be_imported_is_done_without(monkeypatch, caplog, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs another NumPy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    backend._numba.cache_clear()
    try:
        assert not runs_on_cpu(torch.zeros(2, 8)) and "cannot be imported (Numba needs another NumPy)" in caplog.text
    finally:
        backend._numba.cache_clear()


def test_loops_that_do_not_compile_are_done_without(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_given_up", False)
    monkeypatch.setattr(compile_cpu, "prepare", lambda _: 1 / 0)
    KVCache(Shape(1, 1, 8, torch.float32), policy("full"), codec("int8"), slots=1)
    assert "cannot compile the CPU kernels (ZeroDivisionError" in caplog.text and not runs_on_cpu(torch.zeros(2, 8))


def test_a_query_of_other_strides():
    cache, inputs = paged("dense", LENGTHS, 8, 16), queries(4, 3, 8)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert not turned[0].is_contiguous()
    assert torch.equal(decode_attention(*turned, torch.arange(4), cache), decode_attention(*inputs, torch.arange(4), cache))


def test_what_runs_by_default(monkeypatch):
    """fp32 on a CPU, pages that the CPU kernels support, and no other setting; without numba PyTorch."""
    x, calls = torch.zeros(2, 8), []
    assert runs_on_cpu(x) and not runs_on_cpu(x.bfloat16()) and not runs_on_cpu(x.double())
    assert paged("dense", LENGTHS, 8, 16).cpu_reads and gear_pages(16, 16, bits=4)[0].cpu_reads
    assert not any(paged(kind, LENGTHS, 8, 16, dtype=torch.float16).cpu_reads for kind in ("dense", "int8"))
    monkeypatch.setattr(decode_cpu, "decode", lambda *args: calls.append(args))
    cache, inputs = paged("dense", LENGTHS, 8, 16), queries(4, 1, 8)
    decode_attention(*inputs, torch.arange(4), cache)
    with using("torch"):
        assert not runs_on_cpu(x)
        decode_attention(*inputs, torch.arange(4), cache)
    decode_attention(*inputs, torch.arange(4), cache, backend="reference")
    monkeypatch.setattr("dmc.kernels.backend._numba", lambda: False)
    assert not runs_on_cpu(x)
    decode_attention(*inputs, torch.arange(4), cache)
    assert len(calls) == 1


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 6, 8])
def test_any_number_of_queries_a_head(groups):
    check(paged("dense", LENGTHS, 20, 16), queries(4, groups, 20), [5, 0, 4, 3])


def test_scores_that_rise_and_fall_by_far():
    """The largest score may come first, last or between; weights far below it vanish, and nothing overflows."""
    cache, inputs, index = paged("dense", [(6, 9)] * 4, 8, 16), queries(4, 2, 8), torch.arange(4)
    for seed, size in enumerate((1e-3, 30.0, 300.0)):
        inputs[0] = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(seed)) * size
        plain = decode_reference(*inputs, index, cache, scale=0.3)
        exact = decode_reference(*(x.double() for x in inputs), index, cache, scale=0.3)
        assert_close_enough(("out",), [decode_cpu.decode(*inputs, index, cache, 0.3)], [plain], [exact])


def test_exponential():
    x = torch.cat([-torch.logspace(-8, 2, 4001), torch.tensor([0.0, -87.0, -87.4, -104.0, -1e30])])
    got = x.clone()
    exponential(got.numpy())
    exact = x.double().exp()
    near = x >= -87
    assert ((got.double() - exact).abs() <= 2**-23 * exact)[near].all() and (got[~near] == 0).all()
    odd = torch.tensor([float("nan"), float("-inf"), -1.0])
    exponential(odd.numpy())
    assert odd[0].isnan() and odd[1] == 0 and odd[2] == pytest.approx(math.exp(-1))


def test_every_fp8_number():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]  # the NaNs
    bits = np.empty(len(codes), np.uint32)
    e4m3(codes.numpy(), bits, bits.view(np.float32))
    assert torch.equal(torch.from_numpy(bits.view(np.float32)), codes.view(torch.float8_e4m3fn).float())


def test_pages_of_several_storages_are_left_to_pytorch():
    cache, inputs = paged("dense", LENGTHS, 8, 16), queries(4, 1, 8)
    apart = replace(cache, full_precision={part: x.clone() for part, x in cache.full_precision.items()})
    assert cache.cpu_reads and not apart.cpu_reads
    index = torch.arange(4)
    torch.testing.assert_close(decode_attention(*inputs, index, apart), decode_attention(*inputs, index, cache))
