"""A serving-only installation: what it installs, and what each command that needs more says there."""

import importlib
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from dmc.extras import needed_for, required
from tests.docs.programs import setup_arguments
from tests.model import tiny
from tests.training.helpers import ROOT

TRAINING_ONLY = {"megatron-core", "datasets", "matplotlib"}
IMPORTED = ("megatron", "datasets", "matplotlib")


@pytest.fixture(scope="module")
def requirements():
    """What setup.py asks for: by extra, "" without one."""
    said = setup_arguments()
    return {"": said["install_requires"], **said["extras_require"]}


def names(lines):
    return {Requirement(line).name.lower() for line in lines}


def test_serving_asks_for_no_package_of_training(requirements):
    assert TRAINING_ONLY <= names(requirements["train"])
    for extra in ("", "serve", "kernels", "log", "ray"):
        assert not TRAINING_ONLY & names(requirements[extra])
    assert names(requirements["train"]) <= names(requirements["dev"])  # the tests train


def test_no_package_of_serving_asks_for_one_of_training(requirements):
    """Also indirectly, as far as packages are installed here."""
    known, waiting = set(), [Requirement(line) for line in requirements[""] + requirements["serve"]]
    while waiting:
        one = waiting.pop()
        if one.name.lower() in known or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        known.add(one.name.lower())
        try:
            waiting += [Requirement(line) for line in metadata.requires(one.name) or ()]
        except metadata.PackageNotFoundError:
            continue
    assert {"torch", "transformers", "numba"} <= known and not TRAINING_ONLY & known


def test_the_scripts_install_the_extra():
    assert "EXTRAS='[train]' source scripts/env.sh" in (ROOT / "scripts" / "quickstart.sh").read_text()
    assert "EXTRAS=${EXTRAS-[dev,log]}" in (ROOT / "scripts" / "env.sh").read_text()  # dev has all of train
    assert "[train,log]" in (ROOT / "docs" / "cluster.md").read_text()


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """Runs a command in a process where packages are missing."""
    folder = tmp_path_factory.mktemp("lacking")

    def run(*command, without=IMPORTED):
        (folder / "sitecustomize.py").write_text(f"import sys\nfor name in {without}:\n    sys.modules[name] = None\n")
        return subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"},
        )

    return run


CHEAP = [  # command, the package that the sentence names
    (("-m", "dmc.cli", "train", "--target-cr", "4"), "megatron-core"),
    (("-m", "dmc.cli", "export", "a", "b"), "megatron-core"),
    (("scripts/prepare_data.py", "x.txt", "--tokenizer", "a", "--output", "b"), "megatron-core"),
    (("-m", "dmc.cli", "frontier", "--base", "checkpoints/base", "--out", "OUT"), "matplotlib"),
    (("-m", "dmc.cli", "inspect", "checkpoints/base", "--prompt", "a", "--out", "OUT"), "matplotlib"),
    (("-m", "dmc.cli", "eval", "checkpoints/base", "--needle", "--plot", "needle.png"), "matplotlib"),
]
DEAR = [
    (("train.py",), "megatron-core"),
    (("train.py", "--help"), "megatron-core"),
    (("scripts/export_hf.py", "a", "b"), "megatron-core"),
    (("scripts/mha_to_gqa.py", "a", "b", "--kv-heads", "1"), "megatron-core"),
    (("scripts/prepare_data.py", "--verify", "a"), "megatron-core"),
    (("scripts/quickstart_report.py", "a"), "megatron-core"),
    (("scripts/base_card.py", "a"), "megatron-core"),
    (("scripts/bench_train.py",), "megatron-core"),
    (("scripts/crash_store.py",), "megatron-core"),
]


@pytest.mark.parametrize(("command", "package"), [*CHEAP, *(pytest.param(*one, marks=pytest.mark.slow) for one in DEAR)])
def test_one_sentence_and_exit_2(lacking, command, package, tmp_path):
    done = lacking(*(tmp_path / "out" if argument == "OUT" else argument for argument in command))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(rf"(dmc \w+|error): .+ needs {package}: pip install -e '\.\[train\]' in the checkout\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_report_needs_matplotlib_before_it_exports(lacking, tmp_path):
    done = lacking("scripts/quickstart_report.py", tmp_path, without=("matplotlib",))
    assert done.returncode == 2
    assert done.stderr == "error: the report needs matplotlib: pip install -e '.[train]' in the checkout\n"
    assert list(tmp_path.iterdir()) == []


def test_commands_of_serving_run_without(lacking, tmp_path):
    fields = tiny.config("neuron")
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    done = lacking("-m", "dmc.cli", "generate", directory, "--prompt", "abc", "--max-tokens", "3", "--codec", "int8")
    assert done.returncode == 0, done.stderr
    listed = lacking("-m", "dmc.cli", "--help")
    assert listed.returncode == 0 and "train" in listed.stdout and "export" in listed.stdout


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("dmc.evaluation.needle_plot", lambda m: m.plot_needle({}, "x.png")),
        ("dmc.analysis.plots", lambda m: m.pyplot()),
        ("dmc.analysis.figures", lambda m: m.colours([[1.0]])),
    ],
)
def test_plots_without_matplotlib_are_one_sentence(monkeypatch, module, call):
    loaded = importlib.import_module(module)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^the (plot|report) needs matplotlib: pip install -e '\.\[train\]' in the checkout$"):
        call(loaded)


def test_a_saved_or_published_dataset_without_datasets_is_one_sentence(monkeypatch, tmp_path):
    import data
    from data import sources

    monkeypatch.delitem(sys.modules, "data.hub", raising=False)
    monkeypatch.delattr(data, "hub", raising=False)  # `from data import hub` takes what an earlier test has left there
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^a dataset of the Hub needs datasets: pip install -e '\.\[train\]' in the checkout$"):
        next(iter(sources.documents(sources.Request(["someone/something"]), sources.Progress())))
    (tmp_path / "state.json").write_text('{"_data_files": [1]}')
    with pytest.raises(ValueError, match=r"^a saved dataset needs datasets: pip install -e '\.\[train\]' in the checkout$"):
        next(iter(sources.documents(sources.Request([str(tmp_path)]), sources.Progress())))


def test_what_is_said_of_what():
    with pytest.raises(ValueError, match="^x needs a checkout of the project: run pip install -e . there$"), needed_for("x"):
        raise ModuleNotFoundError("no", name="data.tokens")
    with pytest.raises(ValueError, match=r"^x needs fastapi: pip install -e '\.\[serve\]' in the checkout$"), needed_for("x"):
        raise ModuleNotFoundError("no", name="fastapi.responses")
    with pytest.raises(ModuleNotFoundError), needed_for("x"):  # an error of the program
        raise ModuleNotFoundError("no", name="dmc.nowhere")
    required("x", "matplotlib")
