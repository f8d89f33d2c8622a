"""`dmc serve --tensor-parallel 2` as a process: what its clients see when a rank dies, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from tests.server.helpers import model_directory
from tests.server.test_process import LONG, ROOT, Process


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("served") / "tiny")


def ranks_of(server):
    return psutil.Process(server.process.pid).children()


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


def test_a_rank_dies_under_its_clients(directory):
    server = Process(directory, "--tensor-parallel", "2", "--max-batch", "2")
    (rank,) = ranks_of(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        rank.send_signal(signal.SIGKILL)
        started = time.monotonic()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and "rank 1 has ended by signal 9" in json.loads(rest[-2][6:])["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert httpx.post(f"{server.url}/v1/completions", json=LONG).status_code == 503
    assert server.end() == 1 and time.monotonic() - started < 30


@pytest.mark.slow
def test_a_rank_dies_while_nothing_runs(directory):
    server = Process(directory, "--tensor-parallel", "2")
    (rank,) = ranks_of(server)
    rank.send_signal(signal.SIGKILL)
    assert server.end() == 1
    assert any("rank 1 has ended by signal 9" in line.get("error", "") for line in server.lines)


@pytest.mark.slow
def test_sigterm_to_all_lets_running_requests_end(directory):
    """A supervisor signals every process of a service: ranks leave it to rank 0, which drains."""
    server = Process(directory, "--tensor-parallel", "2")
    (rank,) = ranks_of(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        for process in (rank, server.process):
            process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and len(rest) > 200
    assert server.end() == 0 and gone([rank])


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_server(directory):
    server = Process(directory, "--tensor-parallel", "2")
    (rank,) = ranks_of(server)
    server.process.kill()
    server.process.wait()
    assert gone([rank])


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, said", [(signal.SIGKILL, "rank 1 has ended"), (signal.SIGSTOP, "rank 1 has not answered for 4 seconds")]
)
def test_a_rank_of_torchrun_dies_or_hangs(directory, tmp_path, number, said):
    """The ranks are nobody's children here: those that are left find out who it was."""
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dmc",
        "serve",
        str(directory),
        "--port",
        "0",
        "--device",
        "cpu",
        "--rank-timeout",
        "4",
    ]
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command, cwd=ROOT, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r'"listening".*"port": (\d+)', log.read_text())):
            assert launcher.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        workers = psutil.Process(launcher.pid).children()
        (victim,) = [worker for worker in workers if worker.environ()["RANK"] == "1"]
        with httpx.stream("POST", f"http://127.0.0.1:{found[1]}/v1/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            victim.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and said in json.loads(rest[-2][6:])["error"]["message"]
        assert launcher.wait(timeout=60) != 0 and gone(workers)
    finally:
        for process in [*psutil.Process(launcher.pid).children(), launcher] if launcher.poll() is None else []:
            process.kill()
