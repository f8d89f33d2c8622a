"""Which implementation runs, who says so, and what is refused."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch

from dmc.kernels import backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing set, nothing said yet."""
    monkeypatch.setattr(backend, "_default", None)
    monkeypatch.delenv("DMC_KERNELS", raising=False)
    backend.say.cache_clear()
    backend._refusal.cache_clear()
    yield
    backend._refusal.cache_clear()


def on_cpu(size=64, dtype=torch.float32):
    return torch.zeros(1, 1, 1, size, dtype=dtype)


def test_auto_on_a_cpu_is_pytorch_and_says_so_once(caplog):
    """Also under Triton's interpreter, which is for tests and far too slow for anything else."""
    with caplog.at_level(logging.WARNING, "dmc.kernels"):
        assert [backend.choose(on_cpu()) for _ in range(3)] == ["torch"] * 3
    said = "dmc: attention runs in PyTorch: Triton needs a CUDA device, not cpu"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_argument_over_block_over_default_over_environment(monkeypatch):
    monkeypatch.setenv("DMC_KERNELS", "reference")
    assert backend.choose(on_cpu()) == "reference"
    backend.set_default("torch")
    assert backend.choose(on_cpu()) == "torch"
    with backend.using("reference"):
        assert backend.choose(on_cpu()) == "reference"
        assert backend.choose(on_cpu(), "torch") == "torch"
    assert backend.choose(on_cpu()) == "torch"
    backend.set_default("auto")
    assert backend.choose(on_cpu()) == "reference"


@pytest.mark.parametrize("where", ["argument", "environment", "default"])
@pytest.mark.parametrize("name", ["cuda", "flash", "flex"])  # the last two existed once
def test_an_unknown_name_is_refused_and_the_known_ones_listed(monkeypatch, where, name):
    with pytest.raises(ValueError, match=f"unknown kernels '{name}'; known: auto, triton, cpu, torch, reference"):
        if where == "environment":
            monkeypatch.setenv("DMC_KERNELS", name)
        elif where == "default":
            backend.set_default(name)
        backend.choose(on_cpu(), name if where == "argument" else None)


def test_a_former_name_works_with_one_warning(monkeypatch, caplog):
    monkeypatch.setenv("DMC_KERNELS", "sdpa")
    assert [backend.choose(on_cpu()) for _ in range(3)] == ["torch"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "dmc: kernels 'sdpa' are now called 'torch'; the next version does not accept the old name"
    ]


def test_cpu_kernels_run_where_an_operation_has_some(monkeypatch, caplog):
    """No setting and "auto" mean one thing; by name they are refused where they cannot run."""
    fp32 = (torch.float32,)
    assert backend.choose(on_cpu(), cpu=fp32) is backend.choose(on_cpu(), "auto", cpu=fp32) is backend.Backend.CPU
    assert backend.choose(on_cpu(), "cpu", cpu=fp32) == "cpu" and backend.choose(on_cpu(), "torch", cpu=fp32) == "torch"
    assert backend.choose(on_cpu(dtype=torch.float64), cpu=fp32) == "torch" and not caplog.records
    wrong = (torch.float32, (), "this operation has none"), (torch.bfloat16, fp32, "they take torch.float32")
    for dtype, dtypes, reason in wrong:
        with pytest.raises(ValueError, match=f"CPU kernels were asked for, but {reason}.*; choose auto or torch"):
            backend.choose(on_cpu(dtype=dtype), "cpu", cpu=dtypes)
    monkeypatch.setattr(backend, "_numba", lambda: False)
    assert backend.choose(on_cpu(), cpu=fp32) == "torch"
    with pytest.raises(ValueError, match="numba is not installed"):
        backend.choose(on_cpu(), "cpu", cpu=fp32)


@pytest.mark.parametrize(
    ("x", "interpreter", "installed", "reason"),
    [
        (on_cpu(), "0", True, "Triton needs a CUDA device, not cpu"),
        (on_cpu(), "1", False, r"triton is not installed \(pip install -e '\.\[kernels\]' in the checkout\)"),
        (on_cpu(dtype=torch.float64), "1", True, "take bf16, fp16 and fp32, not torch.float64"),
        (on_cpu(63), "1", True, "even head sizes up to 128, not 63"),
        (on_cpu(256), "1", True, "even head sizes up to 128, not 256"),
    ],
)
def test_triton_by_name_is_never_replaced(monkeypatch, x, interpreter, installed, reason):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(ValueError, match=f"Triton kernels were asked for, but .*{reason}; choose auto or torch"):
        backend.choose(x, "triton")


def test_the_cpu_path_needs_no_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # importing it fails
        import torch
        from dmc.kernels.attention.attend import dmc_attention
        x, a = torch.ones(1, 1, 4, 8), torch.zeros(1, 1, 4)
        for _ in range(2):
            assert dmc_attention(x, x, x, a, a + 1, rope=(torch.ones(4, 8), torch.zeros(4, 8))).isfinite().all()
    """
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = "dmc: attention runs in PyTorch: triton is not installed (pip install -e '.[kernels]' in the checkout)"
    assert done.stderr.count(said) == 1


def test_tokens_too_far_apart_for_the_kernels_are_brought_together():
    far, near = (torch.empty_strided((1, 1, 5, 2), (0, 0, step, 1), device="meta") for step in (2**29, 2**20))
    assert backend.in_reach(near) is near and backend.in_reach(far).stride(-2) == 2
    assert backend.in_reach(torch.zeros(1, 1, 2, 3).transpose(2, 3)).stride(-1) == 1
