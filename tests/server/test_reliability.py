"""What clients do to a server: going away, half requests, too many at once; and what the engine's failure looks like."""

import json
import random
import socket
import struct
import threading
import time

import httpx
import pytest

from tests.server.helpers import model_directory, serving

LONG = {"model": "tiny", "prompt": "go on", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(directory):
    with serving(directory, settings={"body_timeout": 2.0, "max_body": 20_000}) as running:
        yield running


def raw(server, body, *, length=None, path="/v1/completions", extra=""):
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{extra}"
    head += f"Content-Length: {len(sent) if length is None else length}\r\n\r\n"
    return head.encode() + sent


def post(server, body, **options):
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, **options)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["at once", "while it runs"])
def test_a_client_that_goes_away_frees_its_pages(server, stream, when):
    for _ in range(4):
        connection = server.socket()
        connection.sendall(raw(server, LONG | {"stream": stream}))
        if when == "while it runs":
            deadline = time.monotonic() + 20
            while not server.llm.engine.scheduler.running and time.monotonic() < deadline:
                time.sleep(0.005)
            assert server.llm.engine.scheduler.running
        connection.close()
    deadline = time.monotonic() + 10
    gauges = [f'dmc:num_requests_{what}{{model_name="tiny"}} 0.0' for what in ("running", "waiting")]
    while not all(gauge in (text := httpx.get(f"{server.url}/metrics").text) for gauge in gauges):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)  # a busy machine may read what was sent "at once" when an idle server has been seen already
    server.wait_idle(10)
    server.llm.cache.check_integrity()
    assert post(server, LONG | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    "sent, expected",
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (raw(None, {}, length=19_999), b"408"),  # fewer bytes than announced, and then nothing
        (raw(None, b"\xff\xfe{}"), b"400"),
        (raw(None, {"model": "tiny"}, length=10**9), b"413"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 200_000, b"400"),  # a head without end
    ],
)
def test_what_is_no_request(server, sent, expected):
    with server.socket() as connection:
        connection.sendall(sent)
        assert expected in connection.recv(4096).split(b"\r\n")[0]
    server.wait_idle()


@pytest.mark.parametrize(
    "sent, answered", [(b"", b""), (b"POST /v1/comp", b"408"), (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /heal", b"408")]
)
def test_a_head_that_never_ends(directory, sent, answered):
    """Nothing, half a head, half a second head: the connection is closed in time, whoever has begun gets 408."""
    with serving(directory, settings={"head_timeout": 0.5}) as hasty, hasty.socket() as connection:
        started, got = time.monotonic(), b""
        connection.sendall(sent)
        while piece := connection.recv(4096):
            got += piece
        assert 0.4 < time.monotonic() - started < 20
        last = got.rpartition(b"HTTP/1.1 ")[2]
        assert last.startswith(answered) and (not answered or json.loads(last.partition(b"\r\n\r\n")[2])["error"]["message"])


def test_a_head_byte_by_byte(directory):
    """Dripping does not start the time again; a whole head in time is answered, however long the answer takes."""
    with serving(directory, settings={"head_timeout": 1.0}) as hasty:
        with hasty.socket() as connection:
            connection.settimeout(0.1)
            started, got = time.monotonic(), b""
            while not got and time.monotonic() - started < 20:
                connection.sendall(b"A")
                try:
                    got = connection.recv(4096)
                except TimeoutError:
                    continue
            assert b"408" in got.split(b"\r\n")[0]
        release, step = threading.Event(), hasty.llm.engine.step
        hasty.llm.engine.step = lambda: (release.wait(30), step())[1]
        threading.Timer(2.5, release.set).start()
        assert post(hasty, LONG | {"max_tokens": 2}).status_code == 200


def check_disconnects(server, count):
    """Clients that leave at random moments: before the answer, in it, with half a request sent."""
    choose = random.Random(0)
    for number in range(count):
        body = raw(server, LONG | {"stream": bool(number % 2), "n": 1 + number % 3})
        connection = server.socket()
        connection.sendall(body if number % 5 else body[: choose.randrange(1, len(body))])
        time.sleep(choose.random() * 0.05)
        if choose.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    server.wait_idle(10)
    server.llm.cache.check_integrity()
    text = httpx.get(f"{server.url}/metrics").text
    assert 'dmc:num_requests_running{model_name="tiny"} 0.0' in text and 'num_requests_waiting{model_name="tiny"} 0.0' in text


def test_disconnects(server):
    check_disconnects(server, 20)


@pytest.mark.slow
def test_two_hundred_disconnects(server):
    check_disconnects(server, 200)


def test_a_slow_reader_holds_nobody_up(server):
    connection = server.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.sendall(raw(server, LONG | {"stream": True, "logprobs": 20, "n": 4}))
    answer = post(server, LONG | {"max_tokens": 5})
    assert answer.status_code == 200
    connection.close()
    server.wait_idle(30)


def test_more_than_the_queue_holds(directory):
    with serving(directory, settings={"max_waiting": 4}, max_batch=2) as small:
        answers = []

        def ask(seed):
            answers.append(post(small, {"model": "tiny", "prompt": "q", "max_tokens": 40, "seed": seed, "ignore_eos": True}))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        codes = [answer.status_code for answer in answers]
        assert len(codes) == 40 and set(codes) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"]["code"] == "queue_full"
            else:  # nothing that was accepted is lost
                assert answer.json()["usage"]["completion_tokens"] == 40
        small.wait_idle()
        for body in ({"n": 5}, {"n": 3, "prompt": ["a", "b"]}):  # never to be had, so not 429
            answer = post(small, {"model": "tiny", "prompt": "q", "max_tokens": 2} | body)
            assert answer.status_code == 400 and "at most 4 can wait" in answer.json()["error"]["message"]
        assert post(small, {"model": "tiny", "prompt": "q", "max_tokens": 2, "n": 4}).status_code == 200


def test_a_pool_that_is_too_small_for_all_gives_the_same_tokens(directory):
    def ask(server, number):
        body = {"model": "tiny", "prompt": "abc" * (5 + number), "max_tokens": 60, "seed": number, "ignore_eos": True}
        return post(server, body).json()["choices"][0]["text"]

    with serving(directory) as wide:
        expected = [ask(wide, number) for number in range(5)]
    with serving(directory, kv_memory=9_000, prefill_tokens=16) as tight:
        tight.llm.engine.predictor.pages = lambda tokens: 1
        texts = [None] * 5
        threads = [threading.Thread(target=lambda n=n: texts.__setitem__(n, ask(tight, n))) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert texts == expected and tight.llm.engine.preemptions > 0
        tight.wait_idle()


def test_shutting_down(directory):
    with serving(directory) as ending:
        with httpx.stream("POST", f"{ending.url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 60}) as answer:
            lines = answer.iter_lines()
            next(lines)
            ending.service.accepting = False
            refused = post(ending, LONG)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["Retry-After"] and httpx.get(f"{ending.url}/health").status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"  # what runs goes on


def test_the_engine_fails(directory):
    with serving(directory) as broken:
        results = []

        def ask(stream):
            answer = post(broken, LONG | {"stream": stream})
            results.append((answer.status_code, answer.text))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False, False)]
        for thread in threads:
            thread.start()
        while len(broken.llm.engine.scheduler.running) < 3:
            time.sleep(0.005)

        def explode():
            raise RuntimeError("boom")

        broken.llm.engine.step = explode
        for thread in threads:
            thread.join(30)
        assert sorted(status for status, _ in results) == [200, 503, 503]
        assert all("boom" in text for _, text in results)
        health = httpx.get(f"{broken.url}/health")
        assert health.status_code == 503 and "boom" in health.json()["error"]["message"]
        assert post(broken, LONG).status_code == 503
        assert 'dmc:engine_alive{model_name="tiny"} 0.0' in httpx.get(f"{broken.url}/metrics").text


def test_no_progress_turns_health_503(directory):
    with serving(directory, settings={"stall_timeout": 0.3}) as stuck:
        release, step = threading.Event(), stuck.llm.engine.step
        stuck.llm.engine.step = lambda: (release.wait(30), step())[1]
        asking = threading.Thread(target=post, args=(stuck, LONG | {"max_tokens": 3}))
        asking.start()
        deadline = time.monotonic() + 10
        while httpx.get(f"{stuck.url}/health").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        answer = httpx.get(f"{stuck.url}/health")
        assert answer.status_code == 503 and "no step was finished for 0.3 seconds" in answer.text
        release.set()
        asking.join(30)
        assert httpx.get(f"{stuck.url}/health").status_code == 200
