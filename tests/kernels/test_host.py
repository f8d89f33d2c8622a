"""What the CPU kernels take for the CPU's vectors, and that they are right on narrower ones."""

import os
import platform
import subprocess
import sys

import pytest

from dmc.kernels.cpu import host as module
from dmc.kernels.cpu.host import Host, host

PROGRAM = """
import sys
import torch
from dmc.kernels.cpu.host import host
from dmc.kernels.prefill import cpu as prefill_cpu
from dmc.kernels.prefill.prefill import prefill_reference
from tests.kernels.prompts import problem

torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    for tokens, counts, size, groups in ((33, (33, 5), 20, 3), (150, (150, 129), 64, 1), (1, (0, 1), 7, 2)):
        case = problem(tokens, counts, size, groups, dtype=dtype)
        exact = prefill_reference(*(x.double() if x.is_floating_point() else x for x in case), scale=0.2)
        error = (prefill_cpu.prefill(*case, 0.2) - exact).abs().max().item()
        assert error < (1e-5 if dtype == torch.float32 else 0.05), (dtype, tokens, error)
        if dtype == torch.float32:
            part = prefill_cpu.prefill(case[0][:, :, -1:], *case[1:4], *(x[:, -1:] for x in case[4:6]), case[6][-1:], 0.2)
            assert torch.equal(part, prefill_cpu.prefill(*case, 0.2)[:, :, -1:])
if "decode" in sys.argv:
    from tests.kernels.test_decode import gear_pages, paged, queries
    from tests.kernels.test_decode_cpu import check
    for kind in ("dense", "int8", "fp8"):
        check(paged(kind, [(2, 5), (0, 1), (1, 0)], 20, 16), queries(3, 3, 20), [2, 0, 1])
    check(gear_pages(64, 32, bits=4)[0], queries(3, 2, 64), [2, 0, 1])
print(host().lanes, host().vectors)
"""
AVX2, NONE = dict(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx,+avx2,+fma"), dict(NUMBA_CPU_NAME="x86-64")
X86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="features of x86")


@pytest.fixture
def fresh():
    host.cache_clear()
    yield
    host.cache_clear()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("+avx512f,+avx512bf16,+avx2,+fma", Host(16, 4, True, True, True)),
        ("+avx512f,-avx512bf16", Host(16, 4, True, False, True)),
        ("-avx512f,+avx2,+fma", Host(8, 2, True, False, False)),
        ("+avx2,-fma", Host(4, 2, False, False, False)),
        ("+neon", Host(4, 4, True, False, False)),
        ("", Host(4, 2, False, False, False)),
    ],
)
def test_sizes_follow_from_the_features_that_numba_compiles_for(features, expected, fresh, monkeypatch):
    monkeypatch.setattr(module, "get_host_cpu_features", lambda: features)
    for setting in ("CPU_NAME", "CPU_FEATURES"):
        monkeypatch.setattr(module.config, setting, None)
    assert host() == expected
    host.cache_clear()
    monkeypatch.setattr(module, "get_host_cpu_features", lambda: "+avx512f")
    monkeypatch.setattr(module.config, "CPU_FEATURES", features)
    assert host() == expected


def test_of_a_cpu_that_is_only_named_nothing_is_known(fresh, monkeypatch):
    monkeypatch.setattr(module.config, "CPU_NAME", "znver4")
    monkeypatch.setattr(module.config, "CPU_FEATURES", None)
    assert host() == Host(4, 2, False, False, False)


def test_a_process_without_compilation_is_pytorch_s():
    program = """if True:
        import torch
        from dmc.cache import codec
        from dmc.kernels.cpu.runs import runs_on_cpu
        assert not runs_on_cpu(torch.ones(1))
        codec("tcq").encode(*torch.randn(2, 1, 32, 64))
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})


@X86
@pytest.mark.parametrize(
    ("settings", "what", "expected"),
    [
        (dict(NUMBA_ENABLE_AVX="0"), "prompts", "4 2"),
        *(
            pytest.param(settings, "decode", sizes, marks=pytest.mark.slow)
            for settings, sizes in ((AVX2, "8 2"), (NONE, "4 2"), (dict(NUMBA_ENABLE_AVX="0"), "4 2"))
        ),
    ],
)
def test_a_process_of_a_narrower_cpu(settings, what, expected, tmp_path):
    """Compiled anew, in a cache of its own."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-c", PROGRAM, *what.split()]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[-2] == expected
