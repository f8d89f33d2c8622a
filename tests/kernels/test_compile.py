"""Every training kernel compiles to an H100's machine code, on a machine without one."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


TRAINING = {
    "_weights",
    "_segment_ends",
    "_forward",
    "_segment_starts",
    "_backward",
    "_decisions",
    "_rotate",
    "delta_rows",
    "forward",
    "backward_keys",
    "backward_queries",
    "_soft",
    "_soft_backward",
}
SERVING = {
    "_segments",
    "_gear_segments",
    "_trellis_segments",
    "_single_segments",
    "_grouped_segments",
    "_together",
    "_prefill",
    "_shifts",
}
GROWING = {"_append", "_take", "_plain", "_trellis", "_settle"}


@pytest.mark.slow
@pytest.mark.parametrize(("part", "expected"), [("train", TRAINING), ("serve", SERVING), ("grow", GROWING)])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_kernels_compile_for_sm90(part, expected, size):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sm90", part, str(size)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    left_out = {"_grouped_segments"} if size == 80 else set()  # whose words would fill less than two thirds of its columns
    assert {line.split()[0] for line in done.stdout.splitlines()} == expected - left_out


SHUFFLED = """
import sys, torch
from dmc.cache.codecs.tcq import TcqCodec
from tests.kernels.sm90 import Recorder, decoding_pages, lane_tables
size, bits, page, groups = map(int, sys.argv[1:])
with Recorder() as recorder:
    decoding_pages(size, torch.bfloat16, TcqCodec(bits), groups=groups, page=page)
(name, _, _, spilled, _, loop), _ = recorder.found
print(name, spilled, loop, *sorted(lane_tables(recorder.ptx[name]).values()))
"""


@pytest.mark.parametrize(
    ("size", "bits", "page", "groups", "codes"),
    [
        (128, 4, 64, 4, [128, 128, 128, 128]),
        pytest.param(128, 4, 64, 1, [128, 128, 128, 128], marks=pytest.mark.slow),
        pytest.param(64, 3, 128, 1, [32, 64, 64, 128], marks=pytest.mark.slow),
        pytest.param(64, 2, 16, 1, [32, 32], marks=pytest.mark.slow),
        pytest.param(64, 2, 32, 3, [64, 64], marks=pytest.mark.slow),
    ],
)
def test_tables_of_levels_lie_in_the_lanes(size, bits, page, groups, codes):
    """What the interpreter cannot run: every shuffle reads a table that each lane loaded its number of.

    ``codes`` of a thread, of each table: one and two chunks, one and two warps, columns that are no power of two.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SHUFFLED, *map(str, (size, bits, page, groups))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    name, spilled, loop, *shuffles = done.stdout.split()
    assert (name, spilled) == ("_single_segments" if groups == 1 else "_grouped_segments", "0")
    assert [int(x) for x in shuffles] == codes
    if page == 64:
        assert int(loop) < 8 * sum(codes)  # instructions of a thread for its codes of a page
