"""Requests nobody would write, by the thousand: never a 5xx, never a hang, nothing left behind; and memory stays flat."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import hypothesis.strategies as st
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from dmc.server.schema import ChatRequest, CompletionRequest
from tests.server.helpers import model_directory, serving

ALLOWED = {200, 400, 404, 408, 413, 422, 429}
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-2, 5), st.floats(), st.text(max_size=20))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
VALID = {
    "prompt": st.text("abc \n", min_size=1, max_size=30) | st.lists(st.integers(0, 96), min_size=1, max_size=20),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=9)}),
        min_size=1,
        max_size=3,
    ),
    "max_tokens": st.integers(1, 6),
    "max_completion_tokens": st.integers(1, 6),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 9),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "seed": st.integers(0, 9),
    "stop": st.text("ab", min_size=1, max_size=2),
    "stream": st.booleans(),
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 96).map(str), st.floats(-9, 9), max_size=3),
    "model": st.just("tiny"),
}


@st.composite
def requests(draw):
    """A request of the schema with some fields left out, and some replaced by anything."""
    path, model = draw(st.sampled_from([("completions", CompletionRequest), ("chat/completions", ChatRequest)]))
    needed = {"model", "prompt" if model is CompletionRequest else "messages"}
    body = {}
    for name in model.model_fields:
        if name in VALID and (name in needed or draw(st.booleans())):
            body[name] = draw(VALID[name])
    for name in draw(st.lists(st.sampled_from([*model.model_fields, "tools", "\ud800", ""]), max_size=2)):
        body[name] = draw(JSON)
    body.setdefault("max_tokens", 3)
    return path, body


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = model_directory(tmp_path_factory.mktemp("served") / "model")
    with serving(directory, settings={"max_body": 100_000, "body_timeout": 1.0, "default_max_tokens": 5}) as running:
        yield running


def check_schema(server, examples):
    client = httpx.Client(timeout=60)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(requests())
    def run(request):
        path, body = request
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = client.post(f"{server.url}/v1/{path}", content=content, headers=headers)
        assert answer.status_code in ALLOWED, (body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        elif body.get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert answer.json()["usage"]["completion_tokens"] > 0

    run()
    server.wait_idle()


def check_sockets(server, count):
    """Whole and cut requests with bytes changed, some closed half-way; the server answers everyone afterwards."""
    choose = random.Random(0)
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 46\r\n\r\n"
        b'{"model":"tiny","prompt":"abc","max_tokens":3}'
    )
    for _ in range(count):
        sent = bytearray(whole)
        for _ in range(choose.randrange(3)):
            sent[choose.randrange(len(sent))] = choose.randrange(256)
        with server.socket() as connection:
            connection.settimeout(10)
            connection.sendall(bytes(sent[: choose.randrange(1, len(sent) + 1)]))
            if choose.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)  # answers whatever it has, or closes
                answer = connection.recv(65536)
                assert not answer or int(answer.split()[1]) in ALLOWED | {405, 431, 499}, (sent, answer)
    server.wait_idle()
    assert httpx.get(f"{server.url}/health").status_code == 200


def check_soak(server, count):
    """Resident memory after ``count`` requests and after a quarter more. Until then the allocator's arenas fill, and oneDNN's
    cache of compiled products: one for every number of tokens that a step happens to hold."""
    client, process = httpx.Client(timeout=60), psutil.Process()

    def ask(seed):
        body = {"model": "tiny", "prompt": "x" * (1 + seed % 40), "max_tokens": 1 + seed % 7, "seed": seed}
        body["stream"] = seed % 3 == 0
        return client.post(f"{server.url}/v1/completions", json=body).status_code

    sizes = []
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert set(pool.map(ask, range(count // 4))) == {200}
            server.wait_idle()
            sizes.append(process.memory_info().rss)
    assert sizes[4] - sizes[3] < 20e6, sizes


def test_schema(server):
    check_schema(server, 60)


def test_sockets(server):
    check_sockets(server, 60)


def test_soak(server):
    check_soak(server, 480)


@pytest.mark.slow
def test_ten_thousand(server):
    check_schema(server, 7_000)
    check_sockets(server, 3_000)


@pytest.mark.slow
def test_two_thousand(server):
    check_soak(server, 2_000)
