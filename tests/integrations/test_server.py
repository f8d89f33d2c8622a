"""vLLM's OpenAI server with an export, in a process of the other environment, answers the checks of `dmc serve`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from dmc import LLM, SamplingParams
from tests.server import both
from tests.server.helpers import model_directory

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("DMC_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DMC_VLLM_PYTHON names no interpreter with vLLM (integrations/vllm/make_env.sh)"),
]
FLAGS = [
    "--served-model-name",
    "tiny",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--no-enable-prefix-caching",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    "128",
    "--kv-cache-memory-bytes",
    str(8 << 20),
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
    "--additional-config",
    '{"dmc": {"cap": 1}}',
]
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
    "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles parts of its sampler when a request first needs them
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations/vllm")]),
}
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
USER = [{"role": "user", "content": "weather?"}]


class Server:
    """The server's process, in a group of its own: it starts another one."""

    def __init__(self, directory, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "log.txt"
        # The command `vllm serve` of vllm-cpu looks for the metadata of a package vllm, and does not start.
        start = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*start, "--host", "127.0.0.1", *FLAGS],
                cwd=folder,
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds=900):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"no answer within {seconds} s: {self.log.read_text()[-4000:]}")

    def metric(self, name):
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def stats(self):
        """Figures of the cache; see `dmc_vllm.requests.Requests.stats`."""
        answer = httpx.post(f"{self.url}/collective_rpc", json={"method": "dmc_stats"}, timeout=30)
        return answer.json()["results"][0]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = model_directory(tmp_path_factory.mktemp("served") / "model", head_dim=16, architectures=["DmcLlamaForCausalLM"])
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words[" "], words["\n"] = words.pop("`"), words.pop("~")  # both are in the form of a tool call
    file.write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory):
    running = Server(directory, tmp_path_factory.mktemp("server"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_greedy_text_is_that_of_our_engine(client, directory):
    prompts = ["hello", "a-much-longer-prompt," * 9]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
    )
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    own = LLM(directory, device="cpu", dtype="fp32").generate(prompts, params)
    assert [choice.text for choice in answer.choices] == [output.text for output in own]


@pytest.mark.parametrize("check", [both.completion, both.stream, both.several, both.stop])
def test_completions(client, check):
    check(client)


def test_chat(client):
    assert both.chat(client, max_tokens=9).usage.completion_tokens <= 9


def test_structured_output(client):
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(model="tiny", messages=USER, max_tokens=400, seed=seed, response_format=form)
        assert answer.choices[0].finish_reason == "stop"
        said = json.loads(answer.choices[0].message.content)
        assert set(said) == {"unit", "days"} and said["unit"] in "CF" and said["days"] in (1, 2, 3)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools(client, choice):
    """The calls of a model of random weights: their form is what vLLM's grammar makes of it."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}]
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=400, seed=seed, tools=tools, tool_choice=choice
        )
        calls = answer.choices[0].message.tool_calls
        assert calls and {call.function.name for call in calls} == {"weather"}
        for call in calls:
            said = json.loads(call.function.arguments)
            assert set(said) == {"unit", "days"} and said["unit"] in "CF" and said["days"] in (1, 2, 3)


def test_tools_that_the_model_may_leave_out(client):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}]
    answer = client.chat.completions.create(model="tiny", messages=USER, max_tokens=9, temperature=0, tools=tools)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_what_is_refused(client):
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model="tiny", prompt="x" * 600, max_tokens=1)


def test_200_requests_of_which_half_go_away(server):
    """Every block is free at the end, and the others are answered in full."""
    lengths, errors = {}, []

    def ask(number):
        body = {
            "model": "tiny",
            "prompt": "x" * (1 + number * 37 % 150),
            "max_tokens": 40,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
                pieces = 0
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        pieces += 1
                        usage = json.loads(line[6:]).get("usage")
                        lengths[number] = usage["completion_tokens"] if usage else None
                    if number % 2 and pieces > number % 20:
                        break
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors and len(lengths) == 200
    assert {lengths[number] for number in range(0, 200, 2)} == {40}
    assert sum(lengths[number] is None for number in range(1, 200, 2)) > 80  # a piece may hold several tokens
    end = time.monotonic() + 60
    while server.metric("num_requests_running") or server.metric("num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.1)
    last = {"model": "tiny", "prompt": "x", "max_tokens": 2, "ignore_eos": True}  # its last step brings the gauges up to date
    assert httpx.post(f"{server.url}/v1/completions", json=last, timeout=60).status_code == 200
    assert server.metric("kv_cache_usage_perc") == 0
    while server.stats()["requests"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert server.stats()["pages"] == server.stats()["forced"] == 0
