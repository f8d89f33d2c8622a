"""The scripts: --help explains, the report is complete."""

import json
import subprocess
import sys

import pytest

from tests.training.helpers import ROOT, small_run, train


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240, cwd=ROOT, **options)


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_parse(script):
    assert run("bash", "-n", ROOT / "scripts" / script).returncode == 0


PYTHON_SCRIPTS = (
    "bench_bytes",
    "bench_commits",
    "bench_decode",
    "bench_kernels",
    "bench_late",
    "bench_layer",
    "bench_peer",
    "bench_serve",
    "bench_step",
    "bench_train",
    "bench_vllm",
    "budget_stream",
    "export_hf",
    "gguf_fp32",
    "gguf_to_hf",
    "mha_to_gqa",
    "quickstart_report",
    "retrieval",
    "ring_storage",
    "train_tokenizer",
)
SCRIPTS = ("train.py", *(f"scripts/{name}.py" for name in PYTHON_SCRIPTS))


@pytest.mark.parametrize(
    "script",
    [pytest.param(one, marks=() if one in ("train.py", "scripts/bench_serve.py") else pytest.mark.slow) for one in SCRIPTS],
)
def test_help_explains(script):
    done = run(sys.executable, ROOT / script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and len(done.stdout) > 300


def test_quickstart_refuses_an_unknown_flag():
    done = run("bash", ROOT / "scripts" / "quickstart.sh", "--fats")
    assert done.returncode == 2 and "known: --fresh, --compare" in done.stderr


def test_report_of_two_runs(tmp_path):
    """Every row of the table, each scored on the same text, and the pictures."""
    retrofit = small_run(tmp_path, "retrofit", "--target-cr", 3)
    small_run(tmp_path, "control", "dmc.method=none", "run.steps=4")
    done = run(sys.executable, ROOT / "scripts" / "quickstart_report.py", tmp_path, "--all-budgets")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    both = tcq, gear = "DMC CR 3 + TCQ, 4 bit", "DMC CR 3 + GEAR, 4 bit (published recipe)"
    assert {"base", "DMC CR 2", "DMC CR 3", *both} < rows.keys()
    plain = rows["DMC CR 3"]
    for name in both:  # each through a cache of its own, close to what the same model says without a codec
        assert rows[name]["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
        assert rows[name]["perplexity"] != plain["perplexity"]
        assert rows[name]["measured_cr"] == pytest.approx(plain["measured_cr"], rel=0.02)
        assert f"| {name} | " in (tmp_path / "table.md").read_text()
    assert rows[tcq]["perplexity"] != rows[gear]["perplexity"] and rows[tcq]["bytes_per_token"] != rows[gear]["bytes_per_token"]
    assert sum("control" in name for name in rows) == 1
    evicting = [row for name, row in rows.items() if name.startswith("base + ")]
    assert len(evicting) == 6 and all(row["heads"] and row["measured_cr"] > 1.5 for row in evicting)  # held, not supposed
    for row in rows.values():
        assert row["perplexity"] > 1 and row["bytes_per_token"] > 0 and row["measured_cr"] >= 1
    evaluations = [json.loads(x) for x in (retrofit / "metrics.jsonl").read_text().splitlines() if "eval_cr" in x]
    assert rows["base"]["perplexity"] == pytest.approx(evaluations[0]["eval_perplexity"], rel=1e-4)
    assert rows["DMC CR 3"]["perplexity"] == pytest.approx(evaluations[-1]["eval_perplexity"], rel=1e-4)
    # The engine does not cache the last token, which nothing follows: the ratios differ by that one.
    assert rows["DMC CR 3"]["measured_cr"] == pytest.approx(evaluations[-1]["eval_cr"], rel=0.05)
    for name in ("loss.png", "heads.png", "segments.html", "table.md"):
        assert (tmp_path / name).stat().st_size > 200
    assert not list(tmp_path.glob(".*"))


def test_report_without_runs_is_one_sentence(tmp_path):
    done = run(sys.executable, ROOT / "scripts" / "quickstart_report.py", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path) in done.stderr


def test_help_lists_the_whole_configuration():
    done = train("--help")
    for section in ("data.", "dmc.", "distill.", "optim.", "parallel.", "run.", "log."):
        assert f"\n  {section}   " in done.stdout
