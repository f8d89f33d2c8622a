"""Codecs: packing, quantisation, GEAR's three parts, and attention over encoded pages."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dmc.cache import codec
from dmc.cache.codecs.backbones import BACKBONES, BITS, MIN_MAX
from dmc.cache.codecs.bits import PLANES, pack, packed_bytes, unpack
from dmc.cache.codecs.outliers import find, outlier_count


def page(*shape, seed=0, outliers=True):
    """Keys with a few large channels and values with a few large numbers, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, *shape, generator=generator)
    if outliers:
        keys[..., ::7] = keys[..., ::7] * 6 + 10
        values[..., ::5, ::11] *= 9
    return keys, values


def error(x, y):
    return ((x - y).norm() / x.norm()).item()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(tuple(PLANES)), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_codes_pack_and_unpack_exactly(bits, count, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_bytes(count, bits))
    assert packed.shape[1] <= count * bits / 8 + len(PLANES[bits])
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(unpack(packed, bits, count, torch.float32), codes.float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backbone", MIN_MAX)
def test_backbone_error_is_half_a_step(bits, backbone):
    """Against an independent min/max over each group; the rounding of scales to bf16 may add 2 %."""
    keys, values = page(3, 32, 16)
    made = codec("gear", bits=bits, backbone=backbone, **({} if backbone == "kcvt" else {"group": 8}), rank=0, outliers=0)
    decoded = made.decode(made.encode(keys, values))
    by_token = {"token": (True, True), "kcvt": (False, True), "kivi": (False, True)}[backbone]
    for x, y, token in zip((keys, values), decoded, by_token, strict=True):
        rows, got = (x, y) if token else (x.mT, y.mT)
        if backbone != "kcvt":
            rows, got = rows.unflatten(-1, (-1, 8)), got.unflatten(-1, (-1, 8))
        spread = rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)
        largest = rows.abs().amax(-1, keepdim=True)
        step = (spread + largest / 128) / (2**bits - 1)
        assert ((rows - got).abs() <= 0.51 * step + largest * 1e-6).all()


def test_error_falls_with_bits_rank_and_outliers():
    keys, values = page(4, 64, 64)

    def errors(**settings):
        made = codec("gear", backbone="kivi", **settings)
        k, v = made.decode(made.encode(keys, values))
        return torch.tensor([error(keys, k), error(values, v)])

    by_bits = [errors(bits=bits) for bits in BITS]
    by_rank = [errors(bits=2, rank=rank) for rank in (0, 1, 2, 4, 16, 64)]
    by_outliers = [errors(bits=2, rank=0, outliers=share) for share in (0, 0.02, 0.1, 0.3)]
    for falling in (by_bits, by_rank, by_outliers):
        assert all((after < before).all() for before, after in zip(falling, falling[1:], strict=False))
    assert (by_rank[-1] < 0.01).all()  # full rank leaves bf16 rounding


def test_low_rank_is_the_best_of_its_rank():
    residual = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1)).double()
    residual = residual @ torch.diag(torch.tensor([0.5**i for i in range(12)]).double())
    from dmc.cache.codecs.lowrank import low_rank

    left, right = low_rank(residual, 3, rounds=12, seed=0)
    got = (residual - left @ right.mT).norm(dim=(1, 2))
    best = torch.linalg.svdvals(residual)[:, 3:].norm(dim=1)
    torch.testing.assert_close(got, best, rtol=1e-3, atol=0)
    torch.testing.assert_close(left.mT @ left, torch.eye(3).double().expand(3, 3, 3))
    assert torch.equal(low_rank(residual[:1], 3, rounds=12, seed=0)[0], left[:1])  # a page alone, as in a batch


@pytest.mark.parametrize("share, length, count", [(0.02, 64, 1), (0.02, 100, 2), (0.06, 50, 3), (0.3, 20, 6)])
def test_outliers_are_the_highest_and_the_lowest(share, length, count):
    """Half of them each, the odd one on the side that is farther from the mean."""
    x = torch.randn(40, length, generator=torch.Generator().manual_seed(2)).exp()  # most of what is far from the mean is high
    assert outlier_count(share, length) == count
    where, rest = find(x, count)
    half = count // 2
    for row, places, others in zip(x, where, rest, strict=True):
        order = row.argsort().tolist()
        wanted = set(order[:half]) | set(order[length - half :])
        if count % 2:
            ends = order[half], order[length - half - 1]
            wanted.add(max(ends, key=lambda place, row=row: (row[place] - row.mean()).abs()))
        assert set(places.tolist()) == wanted and len(wanted) == count
        kept = row[[place for place in range(length) if place not in wanted]]
        assert others.amax() == kept.amax() and others.amin() == kept.amin()


@pytest.mark.parametrize("entries, size", [(64, 64), (33, 60), (17, 80), (5, 8), (1, 4), (20, 2), (300, 16)])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("bits", BITS)
def test_attention_over_blocks_is_attention_over_decode(entries, size, backbone, bits):
    keys, values = page(2, entries, size)
    made = codec("gear", bits=min(bits, 4) if backbone == "lloyd" else bits, backbone=backbone)
    blocks = made.encode(keys, values)
    k, v = made.decode(blocks)
    assert k.shape == keys.shape and v.shape == values.shape
    assert error(keys, k) < 0.7 and error(values, v) < 0.7
    query, weights = torch.randn(2, 3, size), torch.rand(2, 3, entries)
    torch.testing.assert_close(made.scores(blocks, query), query @ k.mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(made.combine(blocks, weights), weights @ v, rtol=1e-4, atol=1e-3)


def test_the_low_rank_part_is_never_formed(monkeypatch):
    """During attention no product of a page's A and B is taken: each product has the query or the weights in it."""
    keys, values = page(2, 48, 40)
    made = codec("gear", backbone="kivi", rank=3)
    blocks = made.encode(keys, values)
    shapes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append((a.shape, b.shape)) or matmul(a, b))
    made.scores(blocks, torch.randn(2, 5, 40))
    made.combine(blocks, torch.rand(2, 5, 48))
    assert len(shapes) == 6 and all(left[-2] == 5 for left, _ in shapes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e30, 1e-30])
def test_constant_pages(bits, value):
    x = torch.full((2, 16, 12), value)
    made = codec("gear", bits=bits, backbone="kivi")
    for y in made.decode(made.encode(x, x)):
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y, x, rtol=0.01, atol=1e-33)


@pytest.mark.parametrize("backbone", MIN_MAX)
def test_values_beyond_fp16(backbone):
    keys, values = (1e8 * x for x in page(2, 32, 24))
    made = codec("gear", bits=8, backbone=backbone)
    for x, y in zip((keys, values), made.decode(made.encode(keys.bfloat16(), values.bfloat16())), strict=True):
        assert torch.isfinite(y).all() and error(x, y) < 0.02


def test_bytes_are_what_the_formula_says():
    """bits + 32 / group + 16 rank (1/D + 1/N) + 24 c / n, as documented; and GEAR-L and the bare backbone."""
    keys, values = page(7, 64, 64)
    cases = (({}, 6.875), ({"rank": 1}, 5.375), ({"rank": 2, "outliers": 0}, 5.5), ({"outliers": 0, "rank": 0, "bits": 3}, 3.5))
    for settings_, bits in cases:
        made = codec("gear", backbone="kivi", **settings_)
        blocks = made.encode(keys, values)
        assert made.nbytes(blocks) == 7 * 2 * 64 * 64 * bits / 8
        assert all(tensor.shape[0] == 7 for tensor in blocks.tensors.values())
    for name, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        dense = codec("dense", dtype=name)
        assert dense.nbytes(dense.encode(keys, values)) == 7 * 2 * 64 * 64 * size


def test_leading_dimensions_are_free():
    keys, values = page(2, 3, 16, 8)
    made = codec("gear", bits=3, backbone="kivi")
    blocks = made.encode(keys, values)
    alone = made.encode(keys[1, 2], values[1, 2])
    for name, tensor in alone.tensors.items():
        assert torch.equal(blocks.tensors[name][1, 2], tensor), name


@pytest.mark.parametrize("name, steps", [("int8", 127), ("fp8", 448)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_one_scale_for_each_token_and_head(name, steps, scale):
    """Against rounding written out in fp64: half a step for int8, a sixteenth of the number for E4M3."""
    keys, values = (x * scale for x in page(3, 16, 24))
    keys[0, 3] = 0
    made = codec(name)
    blocks = made.encode(keys, values)
    assert made.nbytes(blocks) == 2 * 3 * 16 * (24 + 2)
    for x, y in zip((keys, values), made.decode(blocks), strict=True):
        largest = x.double().abs().amax(-1, keepdim=True)
        step = largest / steps * (1 + 2**-7)
        bound = step / 2 if name == "int8" else x.double().abs() / 16 + step * 2**-9
        assert ((x.double() - y.double()).abs() <= bound * 1.01 + 1e-38).all()
        assert torch.isfinite(y).all() and (y[0, 3] == 0).all() == (x is keys)
    query, weights = torch.randn(3, 2, 24), torch.rand(3, 2, 16)
    k, v = made.decode(blocks)
    torch.testing.assert_close(made.scores(blocks, query), query @ k.mT, rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(made.combine(blocks, weights), weights @ v, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_encoding_again_loses_nothing_more(name):
    made = codec(name)
    once = made.decode(made.encode(*page(4, 16, 32)))
    for x, y in zip(once, made.decode(made.encode(*once)), strict=True):
        torch.testing.assert_close(x, y, rtol=0.02 if name == "int8" else 0.07, atol=0.03)


def test_dense_is_lossless():
    keys, values = page(2, 5, 8)
    made = codec("dense")
    assert all(map(torch.equal, made.decode(made.encode(keys, values)), (keys, values)))


@pytest.mark.parametrize(
    "settings_, said",
    [
        ({"bits": 5}, "2, 3, 4, 8"),
        ({"backbone": "kv"}, "kcvt, kivi, token, trellis, lloyd, got"),
        ({"rank": -1}, "rank=-1"),
        ({"outliers": 0.5}, "outliers=0.5"),
        ({"scale_dtype": "fp16"}, "bf16, fp32"),
        ({"levels": 3}, "no setting levels"),
        ({"bits": True}, "bits must be a whole number, got True"),
        ({"group": 2.5}, "group must be a whole number, got 2.5"),
    ],
)
def test_settings_that_are_refused(settings_, said):
    with pytest.raises(ValueError, match=said):
        codec("gear", **settings_)


def test_a_whole_number_is_one_however_it_is_written():
    assert type(codec("gear", bits=2.0).key_bits) is int and type(codec("kivi", bits=4.0, group=32.0).group) is int
    assert codec("tcq", key_bits=2.25).key_bits == 2.25 and type(codec("gear", backbone="kivi", group=32.0).group) is int
    assert type(codec("gear-4bit", rounds=4.0, rank=2.0).rounds) is int
    with pytest.raises(ValueError, match="rounds must be a whole number"):
        codec("gear-2bit", rounds=True)


@pytest.mark.parametrize("pages", [1, 2, 12, 60, 270])
def test_sampled_errors_take_turns(pages):
    """One call a step brings a page of each layer and head, always in the same order: in time each of them is looked at."""
    from dmc.cache.storage.error import _SAMPLED, CodecError

    measured, x = CodecError(), torch.randn(pages, 4, 8)
    looked = set()
    lossy = codec("int8")
    for _ in range(2 * _SAMPLED + 20 * pages):
        before = measured.pages
        measured.sample(lossy, lossy.encode(x, x), x, x)
        if measured.pages > before:
            looked.add(-(measured._seen - pages) % _SAMPLED)
    assert looked == set(range(min(pages, _SAMPLED))) and 0 < measured.relative[0] < 0.02
