"""Linear layers in compiled loops: against fp64, and a row alone against the same row among others."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc.kernels.cpu import threads as module
from dmc.kernels.cpu.tiles import FP16, KNOWN, PAIRED
from dmc.kernels.linear.cpu import Panels
from dmc.kernels.linear.loop import WIDTH

DTYPES = [torch.float32] + [torch.bfloat16] * PAIRED


def layer(outputs, inputs, dtype=torch.float32, rounded=None, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.1
    weight = weight if rounded is None else weight.to(rounded)
    added = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    return weight.to(dtype), added, generator


def exact(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40), inputs=st.integers(1, 130), outputs=st.integers(1, 3 * WIDTH + 1), bias=st.booleans(),
    dtype=st.sampled_from(DTYPES), rounded=st.sampled_from([None, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)
def test_the_product_to_rounding(rows, inputs, outputs, bias, dtype, rounded, seed):
    weight, added, generator = layer(outputs, inputs, dtype, rounded, bias, seed)
    panels, x = Panels(weight, added), torch.randn(rows, inputs, generator=generator).to(dtype)
    got, right = panels(x), exact(x, weight, added)
    assert got.dtype == dtype and got.shape == (rows, outputs) and torch.equal(panels.dense(), weight)
    sizes = exact(x.abs(), weight.abs(), None if added is None else added.abs())  # of what was added up
    rounding = 2.0**-8 * right.abs() if dtype == torch.bfloat16 else 0
    assert ((got.double() - right).abs() <= rounding + (inputs + 2) * 2.0**-24 * sizes + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [None, torch.bfloat16, torch.float16])
def test_a_row_is_the_same_alone_and_among_others(dtype, rounded):
    weight, bias, generator = layer(100, 77, dtype, rounded)
    panels, x = Panels(weight, bias), torch.randn(31, 77, generator=generator).to(dtype)
    whole = panels(x)
    for count in range(1, 31):
        assert torch.equal(panels(x[-count:]), whole[-count:])


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 29])
def test_threads_change_nothing(rows, openmp, monkeypatch):
    """Both with PyTorch's threads and, as where it has others than OpenMP's, with Python's."""
    if not openmp:
        monkeypatch.setattr(module, "_openmp", lambda: None)
    elif module._openmp() is None:
        pytest.skip("PyTorch's threads are not OpenMP's here")
    weight, bias, generator = layer(20 * WIDTH + 5, 512)
    panels, x = Panels(weight, bias), torch.randn(rows, 512, generator=generator)
    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got.append(panels(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_strides_and_shapes():
    weight, bias, generator = layer(40, 24)
    panels, x = Panels(weight, bias), torch.randn(3, 5, 48, generator=generator)
    for view in (x[..., :24], x[..., ::2], x[1, :, 24:], x[:, 2, :24], x[0, 0, :24]):
        torch.testing.assert_close(panels(view), F.linear(view, weight, bias))


@pytest.mark.parametrize("rounded", [None, torch.bfloat16, torch.float16])
def test_weights_are_held_in_the_bits_that_they_need(rounded):
    weight, _, _ = layer(9, 50, rounded=rounded)
    held = rounded if rounded != torch.float16 or FP16 in KNOWN else None
    assert Panels(weight).held == (held or torch.float32)
    weight[3, 4] = 1 + 2.0**-20
    assert Panels(weight).held == torch.float32 and torch.equal(Panels(weight).dense(), weight)


def test_no_number_is_lost():
    weight, _, generator = layer(33, 20)
    x = torch.randn(14, 20, generator=generator)
    x[3, 5], x[4, 6], x[5, 0] = float("nan"), float("inf"), 3e38
    got, right = Panels(weight)(x), F.linear(x, weight)
    assert torch.equal(got.isnan(), right.isnan()) and torch.equal(got.isinf(), right.isinf())


def test_other_states_are_refused():
    panels = Panels(torch.ones(4, 6))
    states = torch.ones(2, 6)
    for x in (states.double(), states[:, :5], states.bfloat16(), states.to("meta")):
        with pytest.raises(ValueError, match="states are torch.float32 of 6 numbers"):
            panels(x)
    for weight in (torch.ones(4, 6).half(), torch.ones(4, 0)):
        with pytest.raises(ValueError, match="no panels"):
            Panels(weight)


def test_work_of_unlike_sizes_wakes_the_same_threads():
    """To libgomp a smaller team is a reason to end threads, and the next larger one to make them again."""
    if not Path("/proc/self/task").is_dir() or module._openmp() is None:
        pytest.skip("threads cannot be told apart here")
    program = """if True:
        import os, torch
        from dmc.kernels.rows import cpu as rows_cpu
        from dmc.kernels.linear.cpu import Panels
        torch.set_num_threads(4)
        panels, x, weight = Panels(torch.randn(512, 512)), torch.randn(32, 512), torch.ones(512)
        seen = set()
        for n in range(20):
            panels(x)
            rows_cpu.norm(x[: 1 + n % 32], weight, 1e-5)
            rows_cpu.gate(x)
            seen |= set(os.listdir("/proc/self/task")) if n > 1 else set()
        assert seen == set(os.listdir("/proc/self/task")), len(seen)
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
