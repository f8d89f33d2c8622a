"""What happens to rows between products: the loops for CPUs against PyTorch's operations and fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc.functional import rotate
from dmc.kernels.backend import using
from dmc.kernels.rows import cpu as rows_cpu
from dmc.kernels.rows import rows

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
EXAMPLES = settings(max_examples=40, deadline=None)


def rand(seed, *shape, dtype, spread=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def near(got, exact, roundings, numbers=1):
    """Within so many roundings of the dtype, and what fp32's own operations of ``numbers`` numbers lose."""
    unit = (2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-23) * roundings + numbers**0.5 * 2.0**-22
    assert got.dtype != torch.float64 and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= unit * exact.abs() + 1e-33).all()


@EXAMPLES
@given(st.integers(0, 9), st.integers(1, 200), DTYPES, st.booleans(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_norm(count, size, dtype, more, spread):
    shapes = (count, size), (count, size), (size,)
    x, added, weight = (rand(n, *shape, dtype=dtype, spread=spread) for n, shape in enumerate(shapes))
    total, normed = rows_cpu.norm(x, weight, 1e-5, added if more else None)
    assert torch.equal(total, x + added if more else x)
    exact = total.double()
    near(normed, exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double(), 2, size)
    with using("sdpa"):
        sums, theirs = rows.norm(x, weight, 1e-5, added if more else None)
    assert torch.equal(sums, total)
    near(theirs, normed.double(), 2, size)


@EXAMPLES
@given(count=st.integers(0, 9), size=st.integers(1, 200), dtype=DTYPES, spread=st.sampled_from([1e-3, 1.0, 60.0]))
def test_gate(count, size, dtype, spread):
    x = rand(3, count, 2 * size, dtype=dtype, spread=spread)
    first, second = x.double().chunk(2, dim=-1)
    near(rows_cpu.gate(x), F.silu(first) * second, 2, 8)


@EXAMPLES
@given(heads=st.integers(1, 4), tokens=st.integers(0, 9), half=st.integers(1, 70), dtype=DTYPES)
def test_turn_is_the_twin_bit_for_bit(heads, tokens, half, dtype):
    x = rand(4, tokens, heads, 3 * 2 * half, dtype=dtype)
    rope = rand(5, tokens, 2 * half, dtype=torch.float32), rand(6, tokens, 2 * half, dtype=torch.float32)
    for part in (x[..., : 2 * half].transpose(0, 1), x[..., ::3].transpose(0, 1), x[:, 0, None, : 2 * half].transpose(0, 1)):
        assert torch.equal(rows_cpu.turn(part, rope), rotate(part.float(), rope).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(dtype):
    gates = torch.tensor([0.0, -0.0, 88.0, -88.0, -87.0, -100.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1e-40]).to(dtype)
    x = torch.cat([gates.repeat(5), torch.ones(60, dtype=dtype)])
    assert torch.allclose(rows_cpu.gate(x).float(), F.silu(x[:60].float()), rtol=0.02, atol=1e-35, equal_nan=True)
    for number in (torch.nan, torch.inf, -torch.inf):
        row = torch.ones(3, 40, dtype=dtype)
        row[1, 17] = number
        normed = rows_cpu.norm(row, torch.ones(40, dtype=dtype), 1e-5)[1]
        assert torch.equal(normed.isnan(), F.rms_norm(row, (40,)).isnan()) and not normed[::2].isnan().any()
        turned = rows_cpu.turn(row[None], (torch.ones(3, 40), torch.zeros(3, 40)))[0]
        assert torch.equal(turned.isfinite().all(-1), row.isfinite().all(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_among_others_and_by_threads(dtype, monkeypatch):
    monkeypatch.setattr(rows_cpu, "_LEAST", 100)
    x, weight, more = (rand(n, *shape, dtype=dtype) for n, shape in enumerate(((41, 90), (90,), (41, 90))))
    rope = rand(5, 41, 90, dtype=torch.float32), rand(6, 41, 90, dtype=torch.float32)

    def all_of(rows):
        tables = tuple(table[rows] for table in rope)
        return *rows_cpu.norm(x[rows], weight, 1e-5, more[rows]), rows_cpu.gate(x[rows]), rows_cpu.turn(x[rows][None], tables)[0]

    whole, before = all_of(slice(None)), torch.get_num_threads()
    for n in range(41):
        assert all(torch.equal(one[0], other[n]) for one, other in zip(all_of(slice(n, n + 1)), whole, strict=True))
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(one, other) for one, other in zip(all_of(slice(None)), whole, strict=True))
    finally:
        torch.set_num_threads(before)


def test_other_shapes_and_dtypes_are_refused():
    x = torch.ones(3, 4).bfloat16()
    for weight, more in ((torch.ones(4), None), (x[0, :3], None), (x[0], x[0]), (x[0], x.float())):
        with pytest.raises(ValueError, match="norm of bfloat16 \\[3, 4\\]: the weight is"):
            rows_cpu.norm(x, weight, 1e-5, more)
    with pytest.raises(ValueError, match="two halves"):
        rows_cpu.gate(torch.ones(2, 5))


def test_what_runs_by_default(monkeypatch):
    calls = []
    for name in ("norm", "gate", "turn"):
        monkeypatch.setattr(rows_cpu, name, lambda x, *_, name=name: calls.append((name, x.dtype)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(1, 2, 4, dtype=dtype)
        rows.norm(x, x[0, 0], 1e-5), rows.gate(x), rows.turn(x, (x[0], x[0]))
        with using("sdpa"):
            rows.norm(x, x[0, 0], 1e-5), rows.gate(x), rows.turn(x, (x[0], x[0]))
    assert calls == [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in ("norm", "gate", "turn")]
