"""KIVI, rotated Lloyd-Max and online SVD, each against its definition written out in fp64, and their properties."""

import itertools
import math

import pytest
import torch

from dmc.cache import codec
from dmc.cache.codecs.lloyd import levels
from dmc.cache.codecs.rotated import rotation
from tests.cache.test_codecs import error, page

SIZES = (64, 80, 96, 128)


def grouped_min_max(vector, group, bits):
    """One vector in fp64, by the definition: each group of the paper to 2**bits even steps from its lowest value."""
    out = []
    for part in vector.split(group):
        low, high = part.min(), part.max()
        step = (high - low) / (2**bits - 1)
        out.append(low + (((part - low) / step).round() if step > 0 else 0 * part) * step)
    return torch.cat(out)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_is_its_definition(size, bits):
    """Keys along the tokens of a channel, values along the channels of a token; scales in bf16 may differ by a rounding."""
    keys, values = page(2, 32, size)
    made = codec("kivi", bits=bits, group=16)
    blocks = made.encode(keys, values)
    got_keys, got_values = made.decode(blocks)
    for n in range(2):
        for x, got in ((keys[n].T, got_keys[n].T), (values[n], got_values[n])):
            for vector, coded in list(zip(x.double(), got.double(), strict=True))[::9]:
                step = max((part.max() - part.min()).item() for part in vector.split(16)) / (2**bits - 1)
                far = (coded - grouped_min_max(vector, 16, bits)).abs()
                assert far.median() < 0.1 * step and far.max() < 1.1 * step + vector.abs().max() / 128  # a code at an edge
    assert made.nbytes(blocks) == 2 * 2 * 32 * size * (bits + 32 / 16) / 8
    by_bits = [made.decode(made.encode(keys, values)) for made in (codec("kivi", bits=bits) for bits in (2, 3, 4, 8))]
    for part, exact in ((0, keys), (1, values)):
        assert all(error(exact, a[part]) > error(exact, b[part]) for a, b in itertools.pairwise(by_bits))


def density(t, size):
    return (1 - t * t) ** ((size - 3) / 2)


@pytest.mark.parametrize("size", [4, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_are_lloyds_and_maxs(size, bits):
    """Each level is the mean of what is nearest to it, by an integral over t on a fine grid; none was pasted."""
    table = levels(bits, size).double() / math.sqrt(size)
    t = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    nearest = torch.bucketize(t, (table[1:] + table[:-1]) / 2)
    weight = density(t, size)
    mass, moment = (torch.zeros(2**bits).double().index_add_(0, nearest, part) for part in (weight, weight * t))
    torch.testing.assert_close(table, moment / mass, rtol=2e-3, atol=2e-4)


def test_many_channels_are_normal():
    """The textbook codebooks of the normal law (Max 1960) are the limit."""
    for bits, known in ((1, (0.7979,)), (2, (0.4528, 1.5104))):
        torch.testing.assert_close(levels(bits, 4096)[2 ** (bits - 1) :], torch.tensor(known), rtol=2e-3, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotated_is_its_definition(size, kind):
    """Rotate, divide by the length, take the nearest level, and back; the stored length may be off by a hundredth."""
    keys, values = page(2, 16, size)
    made = codec("rotated", bits=3, rotation=kind, seed=5)
    blocks = made.encode(keys, values)
    turn = rotation(size, torch.zeros((), dtype=torch.float64), kind=kind, seed=5)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    table = levels(3, size).double()
    for x, got in zip((keys, values), made.decode(blocks), strict=True):
        y = x.double() @ turn
        length = y.norm(dim=-1, keepdim=True) / math.sqrt(size)
        coded = table[((y / length)[..., None] - table).abs().argmin(-1)]
        want = coded * length @ turn.T
        assert error(want, got) < 0.09  # length and gain: the levels' own norm is a few per cent less
        assert abs(error(x, got) - error(x, want)) < 0.01
    assert made.nbytes(blocks) == 2 * (2 * 16 * (size * 3 / 8 + 1) + 2 * 2)


def test_rotated_error_is_that_of_the_codebook_whatever_the_vectors():
    """The errors of Max (1960) for the normal law, here for values with huge channels."""
    keys, values = page(3, 64, 64)
    for bits, square in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        made = codec("rotated", bits=bits, rotation="orthogonal")
        got = made.decode(made.encode(keys, values))
        assert error(values, got[1]) ** 2 == pytest.approx(square, rel=0.2)
    plain, mean = (codec("rotated", bits=2, mean=on) for on in (0, 1))
    assert error(keys, mean.decode(mean.encode(keys, values))[0]) < 0.6 * error(keys, plain.decode(plain.encode(keys, values))[0])
    assert mean.nbytes(mean.encode(keys, values)) - plain.nbytes(plain.encode(keys, values)) == 3 * (64 + 2)


@pytest.mark.parametrize("size", SIZES)
def test_svd_error_is_the_tail_of_the_singular_values(size):
    keys, values = (x.double() for x in page(3, 48, size))
    for rank in (1, 7, 32, 48):
        made = codec("svd", rank=rank, factors="fp32")
        blocks = made.encode(keys, values)
        for x, got in zip((keys, values), made.decode(blocks), strict=True):
            tail = torch.linalg.svdvals(x)[:, rank:].square().sum(-1).sqrt()
            torch.testing.assert_close((x - got).norm(dim=(1, 2)), tail, rtol=1e-4, atol=2e-5 * x.norm().item())
        assert made.nbytes(blocks) == 3 * 2 * 4 * (rank * (48 + size) + rank)
    for factors, width, off in (("bf16", 2, 0.005), ("fp16", 2, 0.001), ("int8", 1, 0.02)):
        made = codec("svd", rank=8, factors=factors)
        blocks = made.encode(keys, values)
        exact = codec("svd", rank=8, factors="fp32")
        for got, want in zip(made.decode(blocks), exact.decode(exact.encode(keys, values)), strict=True):
            assert error(want, got) < off
        assert made.nbytes(blocks) == 3 * 2 * (8 * width * (48 + size) + 4 * 8)


def test_svd_never_forms_a_page(monkeypatch):
    keys, values = page(2, 48, 40)
    made = codec("svd", rank=3)
    blocks = made.encode(keys, values)
    shapes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append(a.shape) or matmul(a, b))
    made.scores(blocks, torch.randn(2, 5, 40))
    made.combine(blocks, torch.rand(2, 5, 48))
    assert len(shapes) == 4 and all(shape[-2] == 5 for shape in shapes)


ALL = [
    ("kivi", {"bits": 2}),
    ("kivi", {"bits": 4, "group": 7}),
    ("rotated", {"bits": 2}),
    ("rotated", {"bits": 4, "mean": 1}),
    ("svd", {"rank": 5}),
    ("svd", {"rank": 99, "factors": "int8"}),
]


@pytest.mark.parametrize("name, own", ALL)
def test_attention_over_blocks_is_attention_over_decode(name, own):
    for entries, size in ((33, 60), (17, 80), (1, 4), (64, 128), (5, 1)):
        keys, values = page(2, entries, size)
        made = codec(name, **own)
        blocks = made.encode(keys, values)
        k, v = made.decode(blocks)
        assert k.shape == keys.shape and v.shape == values.shape
        query, weights = torch.randn(2, 3, size), torch.rand(2, 3, entries)
        torch.testing.assert_close(made.scores(blocks, query), query @ k.mT, rtol=1e-4, atol=2e-3)
        torch.testing.assert_close(made.combine(blocks, weights), weights @ v, rtol=1e-4, atol=2e-3)
        alone = made.encode(keys[1], values[1])
        assert all(torch.equal(blocks.tensors[field][1], tensor) for field, tensor in alone.tensors.items())


@pytest.mark.parametrize("name, own", ALL)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e30, 1e-30])
def test_constant_pages_and_the_range_of_bf16(name, own, value):
    x = torch.full((2, 16, 12), value)
    made = codec(name, **own)
    for y in made.decode(made.encode(x, x)):
        assert torch.isfinite(y).all() and ((y - x).norm() <= 0.4 * x.norm())
    keys, values = (3e37 * x for x in page(2, 16, 24, outliers=False))
    for x, y in zip((keys, values), made.decode(made.encode(keys.bfloat16(), values.bfloat16())), strict=True):
        assert torch.isfinite(y).all() and error(x.double(), y.double()) < 0.9


@pytest.mark.parametrize(
    "name, own, said",
    [
        ("kivi", {"bits": 1}, "2, 3, 4, 8"),
        ("kivi", {"group": 0}, "got 0"),
        ("kivi", {"rank": 1}, "no setting rank"),
        ("rotated", {"bits": 8}, "1, 2, 3, 4, 5, 6"),
        ("rotated", {"mean": 2}, "got 2"),
        ("rotated", {"rotation": "dct"}, "hadamard"),
        ("rotated", {"seed": -1}, "got -1"),
        ("svd", {"rank": 0}, "got 0"),
        ("svd", {"factors": "int4"}, "bf16, fp16, int8"),
    ],
)
def test_settings_that_are_refused(name, own, said):
    with pytest.raises(ValueError, match=said):
        codec(name, **own)
