"""How the CPU kernels are kept on disk."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dmc
from dmc.kernels.cpu import compiled

PROGRAM = """
import numpy as np
from kept.cpu import compiled
from kept.caller import twice
print(twice(np.float32(3)), compiled.KEPT, sum(twice.stats.cache_hits.values()))
"""


def run(folder, cache, **more):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | more
    return subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True, timeout=120).split()


HEAD = "from kept.cpu.compiled import compiled\n"


@pytest.fixture
def package(tmp_path):
    """A package with the decorator, for other kernels than the project's."""
    folder = tmp_path / "kept"
    (folder / "cpu").mkdir(parents=True)
    (folder / "__init__.py").touch()
    shutil.copy(Path(compiled.__file__), folder / "cpu")
    return folder


def test_a_changed_file_is_not_hidden_by_what_was_kept_of_its_caller(package, tmp_path):
    callee = package / "below" / "deeper" / "callee.py"
    callee.parent.mkdir(parents=True)
    callee.write_text(HEAD + "@compiled()\ndef times(x):\n    return x * 2\n")
    (package / "caller.py").write_text(
        HEAD + "from kept.below.deeper.callee import times\n@compiled()\ndef twice(x):\n    return times(x)\n"
    )
    cache = tmp_path / "cache"
    assert run(tmp_path, cache) == ["6.0", "True", "0"]
    assert run(tmp_path, cache) == ["6.0", "True", "1"]  # read, not compiled
    callee.write_text(callee.read_text().replace("* 2", "* 5"))
    assert run(tmp_path, cache) == ["15.0", "True", "0"]


def test_a_changed_constant_is_not_hidden_by_what_was_kept(package, tmp_path):
    constants = package / "constants.py"
    constants.write_text("FACTOR = 2\n")
    (package / "caller.py").write_text(
        HEAD + "from kept.constants import FACTOR\n@compiled()\ndef twice(x):\n    return x * FACTOR\n"
    )
    cache = tmp_path / "cache"
    assert run(tmp_path, cache) == ["6.0", "True", "0"]
    assert run(tmp_path, cache) == ["6.0", "True", "1"]
    constants.write_text("FACTOR = 5\n")
    assert run(tmp_path, cache) == ["15.0", "True", "0"]


def test_a_changed_file_outside_of_the_package_is_compiled_again(package, tmp_path):
    """As that of a page format which somebody else has: the package's digest does not know it."""
    (package / "caller.py").write_text("from other import twice\n")
    other = tmp_path / "other.py"
    other.write_text(HEAD + "@compiled()\ndef twice(x):\n    return x * 2\n")
    cache = tmp_path / "cache"
    assert run(tmp_path, cache) == ["6.0", "True", "0"]
    assert run(tmp_path, cache) == ["6.0", "True", "1"]
    other.write_text(other.read_text().replace("* 2", "* 5"))
    assert run(tmp_path, cache) == ["15.0", "True", "0"]


PROJECT = Path(dmc.__file__).parent
MAKERS = {"compiled", "callback", "njit", "jit", "cfunc", "vectorize", "guvectorize", "intrinsic", "overload"}


def makers(tree):
    """Names of numba's decorators, and of the project's own, that a file calls or decorates functions with."""
    for node in ast.walk(tree):
        used = [node.func] if isinstance(node, ast.Call) else getattr(node, "decorator_list", [])
        for one in used:
            name = ast.unparse(one).split(".")
            if name[-1] in MAKERS and name[0] != "triton":
                yield name[-1]


def test_every_compiled_file_is_dated():
    """Also one that somebody adds to a new folder, or outside the kernels."""
    made = {path for path in PROJECT.rglob("*.py") if any(makers(ast.parse(path.read_text())))}
    dated = set(compiled.sources(compiled._ROOM, compiled._PACKAGE))
    assert len(made) >= 5 and not made - dated
    assert {"host", "layout"} <= {path.stem for path in dated}  # constants that machine code holds
    assert not any("import triton" in path.read_text() for path in dated)


def test_a_change_of_any_compiled_file_changes_the_date(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(compiled._ROOM, copy, ignore=shutil.ignore_patterns("__pycache__"))
    known = {compiled.digest(copy, compiled._PACKAGE)}
    assert known == {compiled.digest(compiled._ROOM, compiled._PACKAGE)}
    for path in compiled.sources(copy, compiled._PACKAGE):
        path.write_text(path.read_text() + "# changed\n")
        known.add(compiled.digest(copy, compiled._PACKAGE))
    assert len(known) == 1 + len(compiled.sources(copy, compiled._PACKAGE))
    (copy / "backend.py").write_text("# no compiled function reads this file\n")
    assert compiled.digest(copy, compiled._PACKAGE) in known


def test_nowhere_to_keep_them(package, tmp_path):
    """Each process then compiles for itself."""
    (package / "caller.py").write_text(HEAD + "@compiled()\ndef twice(x):\n    return x * 2\n")
    (package / "__pycache__").touch()  # a file where there should be folders
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "below")
    assert run(tmp_path, below, HOME=below, XDG_CACHE_HOME=below) == ["6.0", "False", "0"]
