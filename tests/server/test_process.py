"""`dmc serve` as a process: its logs, its signals, its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.server.helpers import model_directory

ROOT = Path(__file__).parents[2]
LONG = {"model": "tiny", "prompt": "go on", "max_tokens": 300, "ignore_eos": True, "stream": True}
BREAK = """
import sys
from dmc.engine.core import Engine
step = Engine.step
def broken(self):
    if any(len(sequence.tokens) > 20 for sequence in self.scheduler.running):
        raise RuntimeError("boom")
    return step(self)
Engine.step = broken
from dmc.cli import main
sys.exit(main(sys.argv[1:]))
"""


SAY = """
import logging, sys
import dmc.cli
load = dmc.cli.load
def said(options):
    logging.getLogger("dmc.kernels").warning("loops were compiled")
    return load(options)
dmc.cli.load = said
sys.exit(dmc.cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("served") / "tiny")


class Process:
    def __init__(self, directory, *flags, code=None):
        start = ["-c", code] if code else ["-m", "dmc.cli"]
        self.process = subprocess.Popen(
            [sys.executable, *start, "serve", str(directory), "--port", "0", "--device", "cpu", *flags],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        self.lines = []
        self.url = f"http://127.0.0.1:{self.until('listening')['port']}"

    def until(self, event):
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"the process ended without {event}: {self.lines}")

    def end(self):
        _, rest = self.process.communicate(timeout=60)
        self.lines += [json.loads(line) for line in rest.splitlines()]
        return self.process.returncode


def test_what_is_said_while_the_model_is_loaded_is_a_line_of_the_logs(directory):
    server = Process(directory, code=SAY)
    assert server.lines[0]["event"] == "loops were compiled" and server.lines[0]["logger"] == "dmc.kernels"
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_sigterm_lets_running_requests_end(directory):
    server = Process(directory)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.until("draining")
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.post(f"{server.url}/v1/completions", json=LONG).status_code == 503
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and len(rest) > 200
    assert server.end() == 0
    done = next(line for line in server.lines if line["event"] == "request" and line["status"] == 200)
    assert done["completion_tokens"] == 300 and done["prompt_tokens"] == 5 and done["held_bytes"] > 0 and done["cr"] > 1
    assert {line["status"] for line in server.lines if line["event"] == "request"} == {200, 503}


@pytest.mark.slow
def test_drain_timeout(directory):
    server = Process(directory, "--drain-timeout", "0.2")
    body = LONG | {"max_tokens": 500, "n": 8}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and "shut down before" in rest[-2]
    assert server.end() == 0 and time.monotonic() - started < 20


def test_the_engine_fails_and_so_does_the_process(directory):
    server = Process(directory, code=BREAK)
    answer = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": False}, timeout=60)
    assert answer.status_code == 503 and "boom" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.end() == 1
    assert any(line["event"] == "engine failed" and "boom" in line["error"] for line in server.lines)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--max-waiting", "0"], "max_waiting must be above 0"),
        (["--policy", "streaming:recent"], "'recent' is not SETTING=VALUE"),
        (["--policy", "streaming:recent=0"], "recent=0"),
        (["--max-batch", "0"], "max_batch must be at least 1"),
    ],
)
def test_wrong_use(directory, flags, said, capsys):
    from dmc.cli import main

    assert main(["serve", str(directory), "--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_port_that_is_taken(directory):
    server = Process(directory)
    other = subprocess.run(
        [sys.executable, "-m", "dmc.cli", "serve", str(directory), "--device", "cpu", "--port", server.url.rpartition(":")[2]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert other.returncode != 0 and "address already in use" in other.stderr
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
