"""TCQ: its rotation, its trellis, and the presets made of it; and GEAR over it."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.codecs import trellis
from dmc.cache.codecs.rotated import rotation

PRESETS = ("tcq-4bit", "tcq-3bit", "tcq-2bit")


def page(*shape, seed=0):
    """Keys with a few large channels about a mean of their own, and values with a few large numbers."""
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    keys[..., ::7] = keys[..., ::7] * 3 + 10
    values[..., ::5, ::11] *= 9
    return keys, values


def error(x, y):
    return ((x.double() - y.double()).norm() / x.double().norm()).item()


def by_automaton(path):
    """Subsets that a path goes through, by the definition of Ungerboeck's four-state code."""
    one_ago = two_ago = 0
    for u in path:
        yield 2 * (u ^ two_ago) + one_ago
        one_ago, two_ago = u, one_ago


@pytest.mark.parametrize("rate, length", [(1, 7), (2, 5), (1.5, 6), (1.25, 7)])
def test_the_path_is_the_best_of_all_paths(rate, length):
    x = torch.randn(12, length, generator=torch.Generator().manual_seed(3)) * 1.3
    tables = [trellis.levels(bits).view(-1, 4) for count, bits in trellis.chunks(rate, length) for _ in range(count)]
    best = torch.full((len(x),), torch.inf)
    for path in itertools.product((0, 1), repeat=length):
        subsets = by_automaton(path)
        cost = sum((x[:, t, None] - tables[t][:, s]).square().amin(-1) for t, s in enumerate(subsets))
        best = torch.minimum(best, cost)
    got = (x - trellis.read(trellis.choose(x, rate), rate)).square().sum(-1)
    torch.testing.assert_close(got, best)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(trellis.RATES), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_are_read_as_the_automaton_says(rate, length, seed):
    chunks = trellis.chunks(rate, length)
    assert sum(count for count, _ in chunks) == length
    width = [bits for count, bits in chunks for _ in range(count)]
    assert abs(sum(width) - rate * length) <= 0.5
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, 2**bits, (), generator=generator) for bits in width]).to(torch.uint8)
    subsets = by_automaton((codes & 1).tolist())
    expected = [trellis.levels(w)[4 * (int(c) >> 1) + s] for w, c, s in zip(width, codes, subsets, strict=True)]
    assert torch.equal(trellis.read(codes, rate), torch.stack(expected))


@pytest.mark.parametrize("bits, scalar", [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22)])
def test_closer_to_normal_values_than_the_best_scalar_quantiser(bits, scalar):
    """In dB; the scalar figures are those of Max (1960), the bound is Shannon's."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    decibels = -10 * math.log10((x - trellis.read(trellis.choose(x, bits), bits)).square().mean().item())
    assert scalar + (0.4 if bits == 1 else 1.0) < decibels < 6.03 * bits


@pytest.mark.parametrize("size", [1, 2, 6, 20, 60, 64, 80, 96, 127, 128, 192])
def test_rotation_is_orthogonal_and_spreads_every_channel(size):
    matrix = rotation(size, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-12 or size <= 2


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRESETS),
    st.integers(1, 80),
    st.integers(1, 100),
    st.integers(0, 2**31),
    st.sampled_from((0, 0.02)),
    st.integers(0, 2),
)
def test_any_block_and_any_head_size(name, entries, size, seed, outliers, rank):
    """Attention over blocks is attention over what they decode to, and fp64 agrees."""
    keys, values = page(2, entries, size, seed=seed)
    made = codec("gear", bits=int(name[4]), backbone="trellis", outliers=outliers, rank=rank) if outliers or rank else codec(name)
    blocks = made.encode(keys, values)
    k, v = made.decode(blocks)
    assert k.shape == keys.shape and v.shape == values.shape and torch.isfinite(k).all() and torch.isfinite(v).all()
    generator = torch.Generator().manual_seed(seed)
    query, weights = torch.randn(2, 3, size, generator=generator), torch.rand(2, 3, entries, generator=generator)
    limit = 1e-4 * (1 + keys.abs().amax() * size)
    for dtype in (torch.float32, torch.float64):
        scores, out = made.scores(blocks, query.to(dtype)), made.combine(blocks, weights.to(dtype))
        assert scores.dtype == out.dtype == dtype
        assert ((scores - query.double() @ k.double().mT).abs() <= limit).all()
        assert ((out - weights.double() @ v.double()).abs() <= limit).all()


def test_error_falls_with_every_quarter_bit_and_with_rank():
    keys, values = page(3, 64, 64)

    def errors(**settings):
        made = codec("tcq", **settings) if "rank" not in settings else codec("gear", backbone="trellis", outliers=0, **settings)
        k, v = made.decode(made.encode(keys, values))
        return torch.tensor([error(keys, k), error(values, v)])

    by_bits = [errors(key_bits=rate, value_bits=rate) for rate in trellis.RATES]
    by_rank = [errors(bits=2, rank=rank) for rank in (0, 2, 8, 64)]
    for falling in (by_bits, by_rank):
        assert all((after < before).all() for before, after in itertools.pairwise(falling))
    assert (by_bits[-1] < 0.012).all() and (by_rank[-1] < 0.01).all()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_lose_less_than_kivi_at_the_same_bits(name):
    """On keys and values with outliers; KIVI may even hold more."""
    keys, values = page(6, 64, 64)
    bits = int(name[4])
    made, kivi = codec(name), codec("kivi", bits=bits, group=64)
    blocks, theirs = made.encode(keys, values), kivi.encode(keys, values)
    assert made.nbytes(blocks) < kivi.nbytes(theirs)
    ours, theirs = made.decode(blocks), kivi.decode(theirs)
    assert error(keys, ours[0]) < error(keys, theirs[0])
    assert error(values, ours[1]) < error(values, theirs[1])


@pytest.mark.parametrize("entries, size", [(64, 64), (32, 128), (20, 80), (7, 5)])
@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_what_the_formula_says(name, entries, size):
    """(key_bits + value_bits) / 2 + 8/D + 4/N + 24/(N D) bits per element, and what packing rounds up."""
    keys, values = page(3, entries, size)
    made = codec(name)
    blocks = made.encode(keys, values)
    assert made.nbytes(blocks) == sum(tensor.untyped_storage().nbytes() for tensor in blocks.tensors.values())
    rates = (made.key_bits + made.value_bits) / 2
    expected = 2 * entries * size * (rates + 8 / size + 4 / entries + 24 / (entries * size)) / 8
    slack = 8 + entries * (size * 0.25 % 1 > 0)  # a byte a plane, and rates that do not divide the head size
    assert expected - slack <= made.nbytes(blocks) / 3 <= expected + slack
    if size in (64, 128):
        assert made.nbytes(blocks) == 3 * expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e30, 1e-30])
def test_constant_pages(name, value):
    x = torch.full((2, 16, 12), value)
    made = codec(name)
    keys, values = made.decode(made.encode(x, x))
    assert torch.isfinite(keys).all() and torch.isfinite(values).all()
    torch.testing.assert_close(keys, x, rtol=0.01, atol=1e-33)  # the mean is all there is
    assert error(x, values) < 0.75 if value else torch.equal(values, x)


@pytest.mark.parametrize("name", PRESETS)
def test_whole_range_of_bf16(name):
    """Up to its largest value, down to subnormals, and tokens of very different size in one page."""
    keys, values = page(3, 32, 64)
    for factor in (1e-38, 1e36, torch.finfo(torch.bfloat16).max):
        x, y = ((z / z.abs().max() * factor).bfloat16() for z in (keys, values))
        made = codec(name)
        for before, after in zip((x, y), made.decode(made.encode(x, y)), strict=True):
            assert torch.isfinite(after.bfloat16()).all()
            assert error(before, after) < 0.5
    mixed = values * torch.logspace(0, -12, 32)[:, None]
    mixed[:, 3] = 0
    back = codec(name).decode(codec(name).encode(mixed, mixed))[1]
    first = slice(0, 3)
    assert error(mixed[:, first], back[:, first]) < 0.5 and (back[:, 3] == 0).all()
    assert (back.norm(dim=-1) <= 2 * mixed.norm(dim=-1) + mixed.norm(dim=-1).amax() / 100).all()


def test_a_page_alone_is_a_page_in_a_batch():
    keys, values = page(2, 5, 64, 64)
    for name in PRESETS:
        made = codec(name)
        blocks = made.encode(keys.bfloat16(), values.bfloat16())
        alone = made.encode(keys[1, 2].bfloat16(), values[1, 2].bfloat16())
        for field, tensor in alone.tensors.items():
            assert torch.equal(blocks.tensors[field][1, 2], tensor), field


def test_sinks_stay_exact_under_every_preset():
    shape = Shape(1, 2, 16, torch.float32)
    for name in PRESETS:
        assert KVCache(shape, policy("full"), codec(name), slots=1).rows.storage.sink_tokens == 4


@pytest.mark.parametrize(
    "settings_, said",
    [
        ({"key_bits": 9}, "key_bits must be quarters of a bit from 1 to 8"),
        ({"value_bits": 2.1}, "value_bits"),
        ({"rank": 2}, "the tcq.* codec has no setting rank; it has: bits, key_bits, value_bits"),
        ({"bits": 5}, "2, 3, 4, 8"),
    ],
)
def test_settings_that_are_refused(settings_, said):
    with pytest.raises(ValueError, match=said):
        codec("tcq", **settings_)
    with pytest.raises(ValueError, match=said):
        codec("tcq-4bit", **settings_)


def test_presets_take_changes_and_list_their_settings():
    assert codec("tcq-2bit", value_bits=3).value_bits == 3
    assert (codec("tcq-2bit").page_size, codec("tcq").page_size) == (64, 32)
    with pytest.raises(ValueError, match="no setting levels; it has: bits, key_bits, value_bits"):
        codec("tcq-2bit", levels=3)
