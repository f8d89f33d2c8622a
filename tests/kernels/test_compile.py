"""Every training kernel compiles to an H100's machine code, on a machine without one."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80, 128])
def test_training_kernels_compile_for_sm90(size):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sm90", str(size)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert kernels == {"_segment_ends", "_forward", "_segment_starts", "_backward", "_rotate", "_delta", "_backward_keys",
                       "_backward_queries"}
