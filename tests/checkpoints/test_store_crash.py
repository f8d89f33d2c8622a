"""Saves that are killed at any moment lose nothing that was complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = Path("/dev/shm")  # what a process wrote outlives its kill there too, and flushing costs nothing


def crash(directory, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "crash_store.py"), "--directory", str(directory)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture
def directory(tmp_path):
    """A directory in memory where there is such a file system."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path / "checkpoints"
        return
    link = tmp_path / "memory"
    path = MEMORY / f"crash-{os.getpid()}"
    path.mkdir()
    link.symlink_to(path)
    yield path / "checkpoints"
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.parametrize("kills", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_lose_nothing(directory, kills):
    done = crash(directory, "--kills", kills)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{kills} kills, nothing complete was lost:")
    for kind in ("operation", "time", "writer"):
        assert f"'{kind}': " in done.stdout
