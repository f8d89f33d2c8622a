"""Requests that other OpenAI-compatible servers rejected, though OpenAI accepts them."""

import pytest
from pydantic import ValidationError

from dmc.server.schema import ChatRequest, CompletionRequest
from tests.server.test_requests import explained

USER = {"role": "user", "content": "hi"}


def turn(message):
    return ChatRequest.model_validate({"model": "m", "messages": [USER, message, USER]}).messages[1].turn()


# https://github.com/Soju06/codex-lb/issues/2037: "refusal": null in an assistant's earlier message was rejected.
def test_refusal_null():
    assert turn({"role": "assistant", "content": "a", "refusal": None}) == {"role": "assistant", "content": "a"}


# https://github.com/tashfeenahmed/freellmapi/issues/165: an assistant's earlier message with null or empty content was rejected.
@pytest.mark.parametrize("content", [None, ""])
def test_content_null(content):
    assert turn({"role": "assistant", "content": content}) == {"role": "assistant", "content": ""}


# https://github.com/ggml-org/llama.cpp/issues/25515: "temperature": null was an error on both routes.
@pytest.mark.parametrize("model, needed", [(CompletionRequest, {"prompt": "x"}), (ChatRequest, {"messages": [USER]})])
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_p",
        "n",
        "stream",
        "stream_options",
        "presence_penalty",
        "frequency_penalty",
        "max_tokens",
        "max_completion_tokens",
        "echo",
        "logprobs",
        "stop",
        "seed",
        "logit_bias",
        "user",
        "tools",
        "response_format",
        "top_k",
    ],
)
def test_nullable_parameters(model, needed, name):
    assert model.model_validate(needed | {"model": "m", name: None}) == model.model_validate(needed | {"model": "m"})


# https://github.com/onyx-dot-app/onyx/pull/13532: strict servers rejected "tools": [], which clients without tools send.
def test_no_tools():
    asked = {"model": "m", "messages": [USER]}
    assert ChatRequest.model_validate(asked | {"tools": []}) == ChatRequest.model_validate(asked)
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(asked | {"tools": [{"type": "function", "function": {"name": "f"}}]})


# https://github.com/vllm-project/vllm/issues/5797: a client that sends "functions": null could not be used.
def test_functions_null():
    asked = {"model": "m", "messages": [{"role": "system", "content": "s"}, USER], "stream": True, "temperature": 0.0}
    assert ChatRequest.model_validate(asked | {"functions": None}) == ChatRequest.model_validate(asked)


# https://github.com/vllm-project/vllm/pull/10463: errors named fields by the validator's labels, such as messages, 0, typed-dict.
def test_names_of_fields():
    message = USER | {"opts": {"visible": False}}
    said, param = explained(ChatRequest, {"model": "m", "messages": [message]})
    assert said.startswith("unknown parameter 'messages[0].opts'") and param == "messages[0].opts"
