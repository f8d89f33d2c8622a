"""How the loops for CPUs are kept on disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmc.kernels import loops_numba

PROGRAM = """
import numpy as np
from kept import loops_numba
from kept.caller_numba import twice
print(twice(np.float32(3)), loops_numba.KEPT, sum(twice.stats.cache_hits.values()))
"""


def run(folder, cache, **more):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | more
    return subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True, timeout=120).split()


HEAD = "from kept.loops_numba import compiled\n"


@pytest.fixture
def package(tmp_path):
    """A package with the decorator, for other loops than the project's."""
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(Path(loops_numba.__file__), folder)
    return folder


def test_a_changed_file_is_not_hidden_by_what_was_kept_of_its_caller(package, tmp_path):
    callee = package / "callee_numba.py"
    callee.write_text(HEAD + "@compiled()\ndef times(x):\n    return x * 2\n")
    (package / "caller_numba.py").write_text(
        HEAD + "from kept.callee_numba import times\n@compiled()\ndef twice(x):\n    return times(x)\n"
    )
    cache = tmp_path / "cache"
    assert run(tmp_path, cache) == ["6.0", "True", "0"]
    assert run(tmp_path, cache) == ["6.0", "True", "1"]  # read, not compiled
    callee.write_text(callee.read_text().replace("* 2", "* 5"))
    assert run(tmp_path, cache) == ["15.0", "True", "0"]


def test_nowhere_to_keep_them(package, tmp_path):
    """Each process then compiles for itself."""
    (package / "caller_numba.py").write_text(HEAD + "@compiled()\ndef twice(x):\n    return x * 2\n")
    (package / "__pycache__").touch()  # a file where there should be folders
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "below")
    assert run(tmp_path, below, HOME=below, XDG_CACHE_HOME=below) == ["6.0", "False", "0"]
