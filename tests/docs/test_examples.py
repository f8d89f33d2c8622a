"""The examples: their policy is the tutorial's, and the script and the notebook run from the file to the figure."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT
from tests.docs.test_tutorial import FILE

EXAMPLES = ROOT / "examples"
CELLS = [
    "".join(cell["source"])
    for cell in json.loads((EXAMPLES / "own_policy.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]


def test_the_policy_is_that_of_the_tutorial():
    own = (EXAMPLES / "strided.py").read_text()
    assert own.strip() == FILE.strip() == CELLS[0].removeprefix("%%writefile strided.py\n").strip()


def test_the_notebook_holds_no_outputs():
    notebook = json.loads((EXAMPLES / "own_policy.ipynb").read_text())
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])


@pytest.fixture
def folder(tmp_path):
    """A copy of the examples next to the model, as in the checkout."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    return tmp_path / "examples"


def started(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def assert_measured(out, said):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 3 + 2 * 3 and all("result" in row for row in rows)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and "strided:Strided:recent=64,stride=4" in said


@pytest.mark.slow
def test_the_script_runs(folder):
    done = started(folder, "own_policy.py", "--out", "out", "--windows", "2", "--scored", "8")
    assert done.returncode == 0, done.stderr
    assert_measured(folder / "out", done.stdout)
    assert len(json.loads((folder / "out" / "differences.json").read_text())["differences"]) == 8


def test_the_notebook_runs(folder):
    """Cell by cell in one process, as a kernel runs it; a cell that begins with %%writefile writes its text."""
    (folder / "strided.py").unlink()
    cells = [cell.replace("windows, scored = 4, 64", "windows, scored = 2, 8") for cell in CELLS]
    assert cells != CELLS
    runner = (
        "import json, pathlib, sys\nsys.path.insert(0, '')\nnames = {'__name__': '__main__'}\n"
        "for cell in json.loads(sys.argv[1]):\n    first, _, rest = cell.partition('\\n')\n"
        "    if first.startswith('%%writefile '):\n        pathlib.Path(first.split()[1]).write_text(rest)\n"
        "    else:\n        exec(cell, names)\n"
    )
    done = started(folder, "-c", runner, json.dumps(cells))
    assert done.returncode == 0, done.stderr
    assert "dense bf16" in done.stdout
    assert_measured(folder / "runs" / "own-policy", done.stdout)
