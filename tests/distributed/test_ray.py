"""Two replicas behind Ray Serve, one of them killed: requests before, during and after."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.helpers import model_directory

ROOT = Path(__file__).parents[2]
BODY = {"model": "tiny", "prompt": "go on", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
LONG = {"max_tokens": 450}
PATIENCE = 600  # seconds, for Ray's many processes on a busy machine


def ray_or_skip():
    return pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")


class Cluster:
    """Ray, its proxy and two replicas, in processes of their own."""

    def __init__(self, directory, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_raylet_start_wait_time_s": str(PATIENCE),
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ray_cluster", str(directory), str(port)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        assert any(line.startswith('{"ready"') for line in self.process.stdout), log.read_text()

    def replicas(self):
        """Process ids."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "ray::ServeReplica" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return sorted(found)

    def close(self):
        try:
            self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    ray_or_skip()
    path = tmp_path_factory.mktemp("ray")
    cluster = Cluster(model_directory(path / "tiny"), path / "log.txt")
    yield cluster
    cluster.close()


def ask(cluster, results, place, **changes):
    """One request; what became of it, or None for as long as it hangs."""
    try:
        answer = httpx.post(f"{cluster.url}/v1/completions", json=BODY | changes, timeout=PATIENCE)
        results[place] = answer.status_code
    except httpx.HTTPError as error:
        results[place] = type(error).__name__


@pytest.mark.slow
def test_one_of_two_replicas_is_killed(cluster):
    assert httpx.get(f"{cluster.url}/health", timeout=PATIENCE).status_code == 200
    before = [httpx.post(f"{cluster.url}/v1/completions", json=BODY, timeout=PATIENCE).json() for _ in range(4)]
    assert len({one["choices"][0]["text"] for one in before}) == 1 and before[0]["usage"]["completion_tokens"] == 12

    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=BODY | {"stream": True}, timeout=PATIENCE) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
    assert text == before[0]["choices"][0]["text"] and len(lines) > 4

    first = cluster.replicas()
    assert len(first) == 2
    results = [None] * 8
    threads = [
        threading.Thread(target=ask, args=(cluster, results, place), kwargs=LONG | {"stream": place % 2 == 0}, daemon=True)
        for place in range(len(results))
    ]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(first[0], signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert None not in results, f"requests hang: {results}"
    assert 200 in results, results  # those of the other replica
    assert any(result != 200 for result in results), results  # nobody is given half an answer as a whole one

    while len(now := cluster.replicas()) < 2 or first[0] in now:  # Ray makes another
        assert time.monotonic() < end, now
        time.sleep(0.5)
    after = [httpx.post(f"{cluster.url}/v1/completions", json=BODY, timeout=PATIENCE) for _ in range(6)]
    assert [one.status_code for one in after] == [200] * 6
    assert {one.json()["choices"][0]["text"] for one in after} == {text}


def test_unknown_settings_are_refused():
    ray_or_skip()
    from dmc.server.ray import Arguments, build

    with pytest.raises(ValueError, match="replica"):
        Arguments(directory="x", replica=2)
    with pytest.raises(ValueError, match="max_body must be above 0"):
        build(Arguments(directory="x", max_body=0))


def test_the_deployment_file():
    """Its arguments are those of `build`, and what it names exists."""
    ray_or_skip()
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from dmc.server.ray import Arguments, build

    schema = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy/ray-serve.yaml").read_text()))
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert [deployment.name for deployment in application.deployments] == ["Replica"]
    arguments = Arguments(**application.args)
    assert (ROOT / arguments.directory / "config.json").is_file()
    built = build(arguments)
    assert built is not None
