"""The benchmark scripts run from end to end on tiny shapes, and gpu_check.sh knows its steps."""

import json
import re
import subprocess
import sys

import pytest

from tests.training.helpers import ROOT

EXPECTED = {
    "decode": {"CR 1 dense", "CR 4 dense", "CR 4 int8", "CR 4 fp8", "CR 4 tcq-4bit", "CR 4 gear"},
    "kernels": {"twin", "plain: PyTorch's causal attention", "DMC: torch", "late merging: torch", "plain: all keys"},
    "layer": {"plain", "DMC: torch"},
}


@pytest.mark.parametrize(
    "name", ["decode", pytest.param("kernels", marks=pytest.mark.slow), pytest.param("layer", marks=pytest.mark.slow)]
)
def test_a_small_run_on_a_cpu(tmp_path, name):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"bench_{name}.py", "--device", "cpu", "--small", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert EXPECTED[name] <= {row["what"] for row in results["rows"]}
    for row in results["rows"]:
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["calls"] >= 3
    assert results["roofline"]["copy_bytes_per_s"] > 0 and results["environment"]["device"].startswith("CPU")
    table = (tmp_path / f"{name}.md").read_text()
    assert all(f"| {row['what']} |" in table for row in results["rows"])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    if name == "decode":
        kernel = {row["what"]: row for row in results["rows"] if row["section"] == "kernel"}
        grown = [row for row in results["rows"] if row["section"] == "grow"]
        assert len(grown) == 5 and all(row["put back ms"] > 0 and row["tokens/s"] > 0 for row in grown)
        assert 3 < kernel["CR 1 dense"]["bytes"] / kernel["CR 4 dense"]["bytes"] < 5
        assert kernel["CR 4 tcq-4bit"]["bytes"] < 0.6 * kernel["CR 4 dense"]["bytes"]
        assert kernel["CR 4 tcq-4bit"]["bytes"] < kernel["CR 4 gear"]["bytes"] < 0.7 * kernel["CR 4 dense"]["bytes"]
        assert kernel["CR 4 int8"]["bytes"] < 0.6 * kernel["CR 4 dense"]["bytes"]


def test_a_small_run_of_the_trainer(tmp_path):
    sizes = (
        "--length 64 --layers 1 --batch 1 --repeats 3 --hidden 32 --heads 2 --kv-heads 1 --head-size 16 --ffn 64 --vocab 128 "
        "--window 8"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/bench_train.py", *sizes.split(), "--json", tmp_path / "train.json"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} |" in done.stdout for name in ("plain", "dmc", "late", "late+teacher", "decisions", "scan"))
    found = json.loads((tmp_path / "train.json").read_text())
    assert set(found["late_ratio"]) == {"late", "late+teacher"} and 0.1 < found["late_ratio"]["late"]["median"] < 10


def gpu_check(*steps, **environment):
    command = ["bash", ROOT / "scripts" / "gpu_check.sh", *steps]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment or None)


def test_gpu_check_lists_its_steps_and_refuses_others():
    steps = gpu_check("--list").stdout.split()
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    assert steps and all(re.search(rf"^    {step}\)", text, flags=re.MULTILINE) for step in steps)
    done = gpu_check("bench-everything")
    assert done.returncode == 2 and "unknown step bench-everything; known: environment" in done.stderr


def test_gpu_check_without_vllm(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    out = tmp_path / "out"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(broken), "OUT": str(out)}
    done = gpu_check(**environment)
    assert "left out, since DMC_VLLM_PYTHON" in done.stdout
    assert "== bench-train" in done.stdout and "== test-vllm" not in done.stdout
    done = gpu_check("bench-vllm", **environment)
    assert done.returncode == 1 and "DMC_VLLM_PYTHON must name an interpreter" in (out / "bench-vllm.log").read_text()


def test_gpu_check_says_which_step_failed(tmp_path):
    """A step that fails fails the whole and is named; its log is kept."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such device\nexit 3\n")
    broken.chmod(0o755)
    done = gpu_check("test-scan", PATH="/usr/bin:/bin", PYTHON=str(broken), OUT=str(tmp_path / "out"))
    assert done.returncode == 1 and "failed: test-scan" in done.stderr
    assert "no such device" in (tmp_path / "out" / "test-scan.log").read_text()
