"""`dmc serve --tensor-parallel 2` as a process: what its clients see when a rank dies, and how it ends."""

import json
import signal
import time

import httpx
import psutil
import pytest

from tests.server.helpers import model_directory
from tests.server.test_process import LONG, Process


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
