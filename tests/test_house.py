"""The house: who may import whom, no import circle, few floors, and serving without the packages of training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import (
    ALSO,
    CACHE_FLOORS,
    KERNEL_FLOORS,
    MAY_IMPORT,
    MEASURES,
    ROOT,
    SERVING,
    House,
    circles,
    floors,
    forbidden,
    inner_rooms,
    reaches,
    room,
    training_packages,
    upwards,
)


@pytest.fixture(scope="module")
def house():
    return House(ROOT)


def test_no_circle(house):
    assert len(house.files) > 200
    assert circles(house.arrows) == []


def test_who_may_import_whom(house):
    assert forbidden(house) == []


def test_every_exception_is_needed(house):
    assert [(start, end) for start, end in ALSO if not any(end in house.arrows[name] for name in house.within(start))] == []
    rooms = {room(name) for name in house.files}
    assert [one for one in MAY_IMPORT if one not in rooms] == []


def test_nobody_imports_entries_or_tests(house):
    assert not [
        (name, other)
        for name in house.files
        for other in house.arrows[name]
        if room(name) != "scripts" and room(other) in ("train", "scripts", "tests")
    ]


def test_floors_of_the_kernels(house):
    rooms = inner_rooms(house, "dmc.kernels")
    assert circles(rooms) == [] and upwards(rooms, KERNEL_FLOORS) == []
    assert floors(rooms) <= 5
    assert len(list((ROOT / "dmc" / "kernels").glob("*.py"))) <= 4


def test_floors_of_the_cache(house):
    rooms = inner_rooms(house, "dmc.cache")
    assert circles(rooms) == [] and upwards(rooms, CACHE_FLOORS) == []
    assert floors(rooms) <= 4


def test_nobody_reaches_through_the_cache():
    """What others need of a cache's rows, `KVCache` says itself."""
    files = [path for tree in ("dmc", "scripts", "checkpoints", "data", "integrations") for path in (ROOT / tree).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): reaches(path.read_text()) for path in files}
    found = {path: where for path, where in found.items() if where and not path.startswith("dmc/cache/")}
    assert len(files) > 200 and set(found) == MEASURES, found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("pool = llm.cache.rows.pool", 2),
        ("self._cache.rows.error", 1),
        ("cache.rows", 1),
        ("getattr(cache, 'rows')", 1),
        ("self._own.rows", 1),
        ("cache.used_pages", 0),
        ("table.rows", 0),
        ("from dmc.kernels.rows.rows import gate", 0),
    ],
)
def test_a_reach_through_the_cache_is_found(source, found):
    assert len(reaches(source)) == found


def test_every_folder_is_a_package():
    """setup.py installs packages alone: a folder without __init__.py would be missing from a wheel."""
    folders = {path.parent for path in (ROOT / "dmc").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_serving_imports_no_package_of_training(house):
    assert len(house.within(*SERVING)) > 100
    assert training_packages(house) == []


def test_serving_runs_without_the_packages_of_training(tmp_path):
    """Real imports, and tokens of a small model."""
    program = """
import sys
for name in ("megatron", "datasets", "matplotlib"):
    sys.modules[name] = None  # what is imported then raises ModuleNotFoundError
import dmc, dmc.cli, dmc.server.app
from pathlib import Path
from tests.model import tiny
fields = tiny.config("neuron")
directory = tiny.write(Path(sys.argv[1]), fields, tiny.weights(fields))
output = dmc.LLM(directory, codec="int8").generate([[1, 2, 3]], dmc.SamplingParams(max_tokens=3, temperature=0.0))[0]
assert len(output.token_ids) == 3
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "datasets", "matplotlib") and sys.modules[name]]
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr


# --------------------------------------------------------------------------- the rules, on trees that break them


def tree(folder: Path, **files: str) -> House:
    """A made-up project: its modules, with _x_ for a dot, and their sources."""
    for name, source in files.items():
        path = folder / (name.replace("_x_", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return House(folder)


@pytest.mark.parametrize(
    "back",
    [
        "from dmc.cache.kv import x",
        "import dmc.cache.kv",
        "from dmc.cache import kv",
        "from . import kv",
        "from .kv import x",
        "def f():\n    from dmc.cache import kv",
        "import importlib\nimportlib.import_module('dmc.cache.kv')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dmc.cache.kv import x",
    ],
)
def test_a_circle_is_found(tmp_path, back):
    made = tree(tmp_path, dmc_x_cache_x_kv="from dmc.cache import rows", dmc_x_cache_x_rows=back)
    assert circles(made.arrows) == [["dmc.cache.kv", "dmc.cache.rows"]]


def test_a_long_circle_is_found_and_a_diamond_is_none(tmp_path):
    made = tree(tmp_path, data_x_a="import data.b, data.c", data_x_b="import data.d", data_x_c="import data.d", data_x_d="")
    assert circles(made.arrows) == []
    (tmp_path / "data" / "d.py").write_text("from data import a")
    assert circles(House(tmp_path).arrows) == [["data.a", "data.b", "data.c", "data.d"]]


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("dmc_x_functional", "from dmc.kernels import backend"),
        ("dmc_x_kernels_x_scan", "def f():\n    from dmc.cache.kv import x"),
        ("dmc_x_cache_x_kv", "import dmc.engine.core"),
        ("dmc_x_model_x_llama", "from dmc.cache import kv"),
        ("dmc_x_engine_x_core", "from dmc.server import app"),
        ("dmc_x_server_x_app", "from dmc.cache import kv"),
        ("dmc_x_training_x_trainer", "from dmc.engine import core"),
        ("dmc_x_analysis_x_plots", "from dmc.evaluation import plot"),
        ("data_x_tokens", "from dmc.engine import core"),
        ("checkpoints_x_store", "from data import tokens"),
        ("dmc_x_evaluation_x_plot", "from data import tokens"),
        ("dmc_x_commands_x_eval", "from scripts import report"),
        ("scripts_x_report", "from tests import helper"),
        ("dmc_x_unheard_x_of", "from dmc import functional"),
    ],
)
def test_a_forbidden_arrow_is_found(tmp_path, where, source):
    files = {
        "dmc_x___init__": "",
        "dmc_x_functional": "",
        "dmc_x_kernels_x_backend": "",
        "dmc_x_cache_x_kv": "",
        "dmc_x_engine_x_core": "",
        "dmc_x_server_x_app": "",
        "dmc_x_evaluation_x_plot": "",
        "data_x_tokens": "",
        "scripts_x_report": "",
        "tests_x_helper": "from scripts import report",
    }
    assert forbidden(tree(tmp_path / "allowed", **files)) == []
    wrong = forbidden(tree(tmp_path / "wrong", **files | {where: source}))
    assert len(wrong) == 1 and wrong[0].startswith(where.replace("_x_", "."))


def test_floors_and_upward_imports_are_found(tmp_path):
    made = tree(
        tmp_path,
        dmc_x_kernels_x_backend="from dmc.kernels.scan import merge",
        dmc_x_kernels_x_scan_x_merge="",
        dmc_x_kernels_x_pages_x_paged="from dmc.kernels.formats.plain import loop",
        dmc_x_kernels_x_formats_x_plain_x_loop="from dmc.kernels.formats.trellis import loop",
        dmc_x_kernels_x_formats_x_trellis_x_loop="from dmc.kernels.cpu import host",
        dmc_x_kernels_x_cpu_x_host="",
        dmc_x_kernels_x_decode_x_cpu="from dmc.kernels.formats.plain import loop\nfrom dmc.kernels import backend",
        dmc_x_kernels_x_ready="def f():\n    from dmc.kernels.decode import cpu",
    )
    rooms = inner_rooms(made, "dmc.kernels")
    assert floors(rooms) == 5  # ready, decode, formats.plain, formats.trellis, cpu
    assert upwards(rooms, KERNEL_FLOORS) == [
        "backend imports scan",
        "formats.plain imports formats.trellis",
        "pages imports formats.plain",
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import megatron.core", True),
        ("def f():\n    from datasets import load_dataset", True),
        ("def f():\n    import matplotlib.pyplot", True),
        ("import torch", False),
        ("from data import tokens", True),  # which imports megatron at its top
        ("def f():\n    from data import tokens", False),  # which only runs where it is called
    ],
)
def test_packages_of_training_are_found(tmp_path, source, found):
    made = tree(tmp_path, dmc_x_server_x_app=source, data_x___init__="", data_x_tokens="from megatron.core import x")
    assert bool(training_packages(made)) == found


def test_a_package_of_training_in_a_parent_is_found(tmp_path):
    made = tree(tmp_path, dmc_x_engine_x_core="from data.guides import x", data_x___init__="import datasets", data_x_guides="")
    assert training_packages(made) == ["dmc.engine.core imports datasets by way of data"]
