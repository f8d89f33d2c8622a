"""The HTTP interface, through the official client where it has the call, and by hand where it has not."""

import json

import httpx
import openai
import pytest

from dmc import LLM, SamplingParams
from tests.server import both
from tests.server.helpers import model_directory, serving


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(directory):
    with serving(directory, settings={"max_body": 20_000, "default_max_tokens": 9}) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    yield
    server.wait_idle()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server, path, **body):
    return httpx.post(f"{server.url}/v1/{path}", json={"model": "tiny"} | body, timeout=60)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "dmc"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion_is_what_the_engine_generates(client, directory):
    answer = both.completion(client)
    llm = LLM(directory, codec="tcq", page_size=8, device="cpu")
    own = llm.generate("hello", SamplingParams(max_tokens=12, temperature=0.7, seed=4))[0]
    assert own.text == answer.choices[0].text
    assert answer.usage.completion_tokens == len(own.token_ids)


def test_stream_is_the_whole_in_pieces(client):
    both.stream(client)


def test_several_prompts_and_completions(client):
    both.several(client)


def test_stop_text_never_shows_in_a_stream(client):
    both.stop(client)


def test_chat(client, server):
    answer = both.chat(client)
    assert answer.usage.completion_tokens <= 9  # the default


def test_stream_ends_with_done(server):
    answer = post(server, "completions", prompt="x", max_tokens=3, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-request-id"]
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(json.loads(line[6:])["object"] for line in lines[:-1])


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        ("completions", {"prompt": "x", "max_tokens": 600}, 400, "1 prompt tokens + max_tokens 600 = 601 are more than the 512"),
        ("completions", {"prompt": "x", "beam_width": 3}, 422, "unknown parameter 'beam_width': it is rejected, not ignored"),
        ("completions", {"prompt": "x", "best_of": 2}, 422, "best_of"),
        ("completions", {"prompt": "x", "echo": True}, 422, "echo"),
        ("completions", {"prompt": "x", "temperature": -1}, 422, "temperature"),
        ("completions", {"prompt": "x", "temperature": "1"}, 422, "temperature"),
        ("completions", {"prompt": "x", "n": True}, 422, "n: "),
        ("completions", {"prompt": ""}, 400, "at least 1"),
        ("completions", {"prompt": []}, 422, "prompt"),
        ("completions", {"prompt": [3, 97]}, 400, "token id 97 is outside"),
        ("completions", {}, 422, "prompt"),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "'a' is not a token id"),
        ("completions", {"prompt": "x", "logit_bias": {"97": 1}}, 400, "token id 97"),
        ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options need stream"),
        ("completions", {"prompt": "x", "model": "gpt"}, 404, "'gpt' is not served here; 'tiny' is"),
        ("chat/completions", {"messages": []}, 422, "messages"),
        ("chat/completions", {"messages": [{"role": "developer", "content": "x"}]}, 400, "no developers"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 422, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 422, "tools is not served here"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "needs logprobs"),
        ("completions", {"prompt": "y" * 30_000}, 413, "larger than 20000 bytes"),
        ("embeddings", {"input": "x"}, 404, "Not Found"),
    ],
)
def test_what_is_refused(server, path, body, status, said):
    answer = post(server, path, **body)
    assert answer.status_code == status and said in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body, status",
    [
        (b"{", 400),
        (b"", 422),
        (b"[]", 422),
        (b"\xff\xfe", 400),
        (b'{"model":"tiny","prompt":"\xc3("}', 400),
        (b'{"model":"tiny","prompt":"\\ud800","max_tokens":1}', 400),
        (b'{"model":"tiny","\\ud800":1,"prompt":"x"}', 422),
        (b'{"model":"tiny","prompt":"x","temperature":NaN}', 422),
        (b'{"a":' * 9000 + b"1" + b"}" * 9000, 413),
        (b"[" * 9000 + b"]" * 9000, 400),
        (b'{"model":"tiny","prompt":"x","max_tokens":' + b"9" * 5000 + b"}", 400),
    ],
)
def test_bodies_that_are_no_request(server, body, status):
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_impossible_for_the_pool(directory):
    with serving(directory, kv_memory=12_000) as small:
        answer = post(small, "completions", prompt="x" * 300, max_tokens=200)
        assert answer.status_code == 400
        assert "300 prompt tokens + max_tokens 200 need about" in answer.json()["error"]["message"]
        assert "kv_memory holds" in answer.json()["error"]["message"]


def test_api_key(directory):
    with serving(directory, settings={"api_key": "secret"}) as locked:
        assert httpx.get(f"{locked.url}/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/", "/nothing"):
            answer = httpx.get(f"{locked.url}{path}")
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("wrong", "secre", "secrets"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret").models.list().data
        # a browser is asked for a password on the page, and then sends it with what the page asks for
        assert httpx.get(f"{locked.url}/").headers["WWW-Authenticate"].startswith("Basic ")
        assert httpx.get(f"{locked.url}/", auth=("any", "secret")).status_code == 200
        tried = httpx.post(f"{locked.url}/try", json={"prompt": "x", "max_tokens": 2}, auth=("", "secret"), timeout=60)
        assert tried.status_code == 200 and "pieces" in tried.text
        for header in ("Basic secret", "Basic !!", "Basic", "Digest secret", "secret"):
            assert httpx.get(f"{locked.url}/", headers={"Authorization": header}).status_code == 401


def test_no_chat_template(tmp_path):
    with serving(model_directory(tmp_path / "plain", template=False)) as plain:
        answer = post(plain, "chat/completions", messages=[{"role": "user", "content": "x"}])
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]


def test_metrics(server, client):
    client.completions.create(model="tiny", prompt="count me", max_tokens=30, extra_body={"ignore_eos": True})
    text = httpx.get(f"{server.url}/metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    label = '{model_name="tiny"}'
    assert values["dmc:num_requests_running" + label] == 0 == values["dmc:kv_held_bytes" + label]
    assert values["dmc:generation_tokens_total" + label] >= 30 and values["dmc:prompt_tokens_total" + label] >= 8
    assert values["dmc:compression_ratio" + label] > 1 and 0 < values["dmc:codec_error_keys" + label] < 0.2
    assert values['dmc:request_success_total{finished_reason="length",model_name="tiny"}'] >= 1
    assert values['dmc:head_compression_ratio{head="1",layer="1",model_name="tiny"}'] > 0
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert values[f"dmc:{name}_count{label}"] > 0


def test_health(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
