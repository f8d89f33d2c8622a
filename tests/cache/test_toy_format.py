"""A page format from outside of the package, in this one file: 16-bit floats, with a reference, a CPU and a Triton reader."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.cache import KVCache, Shape, policy
from dmc.cache.codecs import Blocks, Codec
from dmc.kernels.backend import interpreted, using
from dmc.kernels.decode.decode import decode_attention
from dmc.kernels.pages.format import CpuReader, PageFormat
from dmc.kernels.pages.paged import Paged
from tests.model import tiny

triton = pytest.importorskip("triton")
pytest.importorskip("numba")
import triton.language as tl  # noqa: E402

from dmc.kernels.cpu.callback import callback, halves_at, longs_at, matrix_at, singles_at, words_at  # noqa: E402
from dmc.kernels.cpu.compiled import compiled  # noqa: E402
from dmc.kernels.cpu.products import add, score  # noqa: E402
from dmc.kernels.pages.segments import attend_segment, full_segment, page_words, store_segment  # noqa: E402


class HalfCodec(Codec):
    name, lossy, page_size = "half", False, 8

    def encode(self, keys, values):
        return Blocks({"k_half": keys.half(), "v_half": values.half()}, *keys.shape[-2:])

    def decode(self, blocks):
        pytest.fail("PyTorch reads the pages, and no kernel")

    def make_page_format(self, entries, head_size, fields, device):
        return HalfFormat(self.name, entries, head_size, fields, self.fields)


@dataclass(frozen=True, eq=False)
class HalfFormat(PageFormat):
    cpu_reads = triton_reads = True

    def reference(self, fields, part, work):
        return fields[f"{part}_half"].to(work)

    def cpu_reader(self, offsets):
        facts = np.array([self.page, self.head_size, offsets["k_half"], offsets["v_half"]])
        return CpuReader(keys, values, facts, np.zeros(1, np.float32), 4 * self.page * self.head_size)

    def triton_read(self, grid, arguments, paged, constants):
        k, v = paged.encoded["k_half"], paged.encoded["v_half"]
        _segments[grid](**arguments, keys=k, values=v, kp=page_words(k), vp=page_words(v), PAGE=self.page, **constants)


@compiled()
def _entries(at, n, d, room):
    count = n * d
    source, bits, out = halves_at(at, count), words_at(room, count), singles_at(room, count)
    for i in range(count):
        code = np.uint32(source[i])
        bits[i] = ((code & np.uint32(0x8000)) << np.uint32(16)) | ((code & np.uint32(0x7FFF)) << np.uint32(13))
    for i in range(count):
        out[i] *= np.float32(2.0**112)  # the difference of the exponents' biases
    return matrix_at(room, n, d)


@callback
def keys(page, facts, constants, queries, groups, scores, room):
    n, d, begin, _ = longs_at(facts, 4)
    score(matrix_at(queries, groups, d), _entries(page + begin, n, d, room), matrix_at(scores, groups, n))


@callback
def values(page, facts, constants, weights, groups, sums, room):
    n, d, _, begin = longs_at(facts, 4)
    add(matrix_at(weights, groups, n), _entries(page + begin, n, d, room), matrix_at(sums, groups, d))


@triton.jit
def _segments(
    query,
    index,
    encoded_count,
    full_count,
    first_full,
    encoded_table,
    full_table,
    keys,
    values,
    full_keys,
    full_values,
    sums,
    parts,
    scale,
    et,
    ft,
    kp,
    vp,
    fkp,
    fvp,
    PAGE: tl.constexpr,
    PER_FULL: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.load(index + tl.program_id(0)).to(tl.int64)
    if tl.program_id(1) < first_full:
        start, length = tl.program_id(1) * SEGMENT, tl.load(encoded_count + row) * PAGE
        if start < length:
            top, total, acc = attend_segment(
                query,
                encoded_table + row * et,
                keys,
                values,
                keys,
                keys,
                kp,
                vp,
                0,
                0,
                start,
                length,
                scale,
                PAGE,
                False,
                SEGMENT,
                TILE,
                GROUPS,
                PRECISION,
                D,
                BLOCK,
                G,
            )
            store_segment(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)
    else:
        full_segment(
            query,
            full_table + row * ft,
            full_count + row,
            first_full,
            full_keys,
            full_values,
            keys,
            sums,
            parts,
            scale,
            fkp,
            fvp,
            PER_FULL,
            SEGMENT,
            TILE,
            GROUPS,
            PRECISION,
            D,
            BLOCK,
            G,
        )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config("neuron")
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.mark.parametrize(
    "backend", ["auto", pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter"))]
)
def test_the_engine_generates_what_dense_pages_give(directory, backend):
    params, found = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1), []
    for codec in (HalfCodec(), "dense"):
        with using(backend if codec != "dense" else "torch"):
            llm = LLM(directory, codec=codec, page_size=8, sink_tokens=0, dtype="fp32", device="cpu")
            if codec != "dense":
                assert llm.cache.readers[0].on_pages
            found.append(llm.generate([[7, 8, 9] * 9, [5, 6] * 10], params))
    for ours, theirs in zip(*found, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert [x.logprob for x in ours.logprobs] == pytest.approx([x.logprob for x in theirs.logprobs], abs=2e-3)


@pytest.mark.parametrize(
    "backend", [None, pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter"))]
)
def test_readers_equal_the_reference(backend):
    g, codec = torch.Generator().manual_seed(0), HalfCodec()
    made = codec.page_format(8, 8, torch.float32)
    memory = torch.zeros(7, 256, dtype=torch.uint8)
    fields = {
        f"{part}_half": memory[:, 128 * n : 128 * (n + 1)].view(torch.float16).unflatten(1, (8, 8)) for n, part in enumerate("kv")
    }
    full_precision = {
        part: memory[:, 128 * n : 128 * (n + 1)].view(torch.float32).unflatten(1, (4, 8)) for n, part in enumerate("kv")
    }
    for view in fields.values():
        view[1:4] = torch.randn(3, 8, 8, generator=g).half()
    for view in full_precision.values():
        view[4:] = torch.randn(3, 4, 8, generator=g)
    tables = torch.tensor([[1, 3], [2, 0]]), torch.tensor([[4], [6]])
    rows = Paged(made, fields, full_precision, *(x.int() for x in (*tables, torch.tensor([2, 1]), torch.tensor([3, 4]))))
    inputs = torch.randn(2, 3, 8, generator=g), *torch.randn(2, 2, 8, generator=g)
    index = torch.tensor([1, 0])
    ours, reference = (decode_attention(*inputs, index, rows, backend=one) for one in (backend, "reference"))
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
def test_entries_outside_pages_in_8_bits_are_left_to_pytorch(monkeypatch):
    """By a kernel that does not know of their scales."""
    monkeypatch.setattr(HalfCodec, "lossy", True)
    shape = Shape(1, 1, 8, torch.float32)
    with using("triton"):
        caches = [KVCache(shape, policy("full"), HalfCodec(), slots=1, exact_dtype=exact) for exact in ("fp32", "int8")]
    assert [cache.readers[0].on_pages for cache in caches] == [True, False]
