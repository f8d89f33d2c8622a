"""The official client: conversations in which it sends the server's own answers back, and every parameter as None."""

import inspect

import openai
import pytest

from tests.server.helpers import model_directory, serving

FIXED = {"self", "messages", "model", "prompt", "stream", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = model_directory(tmp_path_factory.mktemp("served") / "model")
    with serving(directory, settings={"default_max_tokens": 6}) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def nothing(create):
    """None for every optional parameter of a call."""
    names = set(inspect.signature(create).parameters) - FIXED
    assert {"temperature", "top_p", "n", "stop", "seed", "logprobs", "max_tokens", "user", "stream_options"} <= names
    return dict.fromkeys(names)


def prompt_tokens(messages):
    """Tokens of a conversation: one per character, in the form of the tests' chat template."""
    return len("".join(f"{role[0]}:{content};" for role, content in messages) + "a:")


@pytest.mark.parametrize("form", ["object", "dump", "dictionary"])
def test_three_turns(client, form):
    create = client.chat.completions.create
    sent, said = [], []
    for question in ("one", "two", "three"):
        sent.append({"role": "user", "content": question})
        said.append(("user", question))
        answer = create(model="tiny", messages=sent, stream=None, **nothing(create))
        assert answer.usage.prompt_tokens == prompt_tokens(said)
        message = answer.choices[0].message
        sent.append({"object": message, "dump": message.model_dump(), "dictionary": message.to_dict()}[form])
        said.append(("assistant", message.content))
    assert len(sent) == 6


def test_three_turns_streamed(client):
    create = client.chat.completions.create
    sent, said = [], []
    for question in ("one", "two", "three"):
        sent.append({"role": "user", "content": question})
        said.append(("user", question))
        given = nothing(create) | {"stream_options": {"include_usage": True}}
        *pieces, last = create(model="tiny", messages=sent, stream=True, **given)
        assert last.usage.prompt_tokens == prompt_tokens(said)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert pieces[-1].choices[0].finish_reason
        sent.append({"role": "assistant", "content": text})
        said.append(("assistant", text))
        assert list(create(model="tiny", messages=sent[:1], stream=True, **nothing(create)))


def test_three_turns_of_the_clients_own_stream(client):
    """`chat.completions.stream` collects the answer in an object with more fields, all None."""
    sent, said = [], []
    for question in ("one", "two", "three"):
        sent.append({"role": "user", "content": question})
        said.append(("user", question))
        with client.chat.completions.stream(model="tiny", messages=sent, stream_options={"include_usage": True}) as stream:
            assert list(stream)  # its own final completion raises an error for an answer that max_tokens cut
            answer = stream.current_completion_snapshot
        assert answer.usage.prompt_tokens == prompt_tokens(said)
        sent.append(answer.choices[0].message.model_dump())
        said.append(("assistant", answer.choices[0].message.content))


def test_completions_with_nothing_given(client):
    create = client.completions.create
    answer = create(model="tiny", prompt="x", stream=None, **nothing(create))
    assert answer.choices[0].logprobs is None and 0 < answer.usage.completion_tokens <= 16
    assert list(create(model="tiny", prompt="x", stream=True, **nothing(create)))
