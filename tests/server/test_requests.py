"""Request bodies without a server: what is accepted, what null means, and how an error names the field."""

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from dmc.server.schema import ChatRequest, CompletionRequest
from dmc.server.validation import explain

USER = {"role": "user", "content": "x"}


def completion(**fields):
    return CompletionRequest.model_validate({"model": "m", "prompt": "x"} | fields)


def chat(*messages, **fields):
    return ChatRequest.model_validate({"model": "m", "messages": list(messages)} | fields)


def explained(model, body):
    """The sentence and the param that the server answers with."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    error = RequestValidationError([found | {"loc": ("body", *found["loc"])} for found in caught.value.errors()], body=body)
    return explain(error.errors(), error.body)


@pytest.mark.parametrize(
    "model, body", [(CompletionRequest, {"model": "m", "prompt": "x"}), (ChatRequest, {"model": "m", "messages": [USER]})]
)
def test_null_means_not_given(model, body):
    assert model.model_validate(body | {name: None for name in model.model_fields if name not in body}) == (
        model.model_validate(body)
    )
    for name in body:
        said, param = explained(model, body | {name: None})
        assert said == f"{name}: Field required" and param == name
        said, param = explained(model, {key: value for key, value in body.items() if key != name})
        assert said == f"{name}: Field required" and param == name


@pytest.mark.parametrize("name", ["audio", "prediction", "moderation", "web_search_options", "anything_that_comes_later"])
def test_null_of_a_field_that_is_not_served(name):
    assert chat(USER, **{name: None}) == chat(USER) and completion(**{name: None}) == completion()


def test_null_inside_objects():
    assert not completion(stream_options={"include_usage": None, "include_obfuscation": None}).stream_options.include_usage
    assert chat(USER | {"name": None, "tool_calls": None}).messages == chat(USER).messages
    said, param = explained(ChatRequest, {"model": "m", "messages": [USER | {"content": None}]})
    assert said == "messages[0].content: Field required" and param == "messages[0].content"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": True},
        {"functions": []},
        {"function_call": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"metadata": {}},
        {"store": False},
        {"service_tier": "auto"},
        {"reasoning_effort": "none"},
        {"verbosity": "medium"},
        {"top_logprobs": 0},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False}},
        {"stop": []},
        {"logit_bias": {}},
    ],
)
def test_values_that_ask_for_nothing(fields):
    assert chat(USER, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function"}},
        {"functions": [{}]},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "flex"},
        {"reasoning_effort": "low"},
        {"verbosity": "low"},
        {"prediction": {"type": "content"}},
        {"web_search_options": {}},
        {"prompt_cache_options": {}},
    ],
)
def test_what_is_not_served(fields):
    (name,) = fields
    said, param = explained(ChatRequest, {"model": "m", "messages": [USER]} | fields)
    assert said == f"{name} is not served here: leave it out" and param == name


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": "a"}, "a"),
        ({"content": ""}, ""),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": "a", "refusal": None}, "a"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "ab"),
        ({"content": "a", "audio": None, "function_call": None, "tool_calls": None, "annotations": None}, "a"),
        ({"content": "a", "tool_calls": [], "annotations": []}, "a"),
        ({"content": "a", "parsed": None}, "a"),
    ],
)
def test_turns_of_an_assistant(message, text):
    assert chat(USER, {"role": "assistant"} | message).messages[1].turn() == {"role": "assistant", "content": text}


def test_turns_of_others():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for role in ("system", "developer", "user"):
        (message,) = chat({"role": role, "content": parts, "name": "n"}).messages
        assert message.turn() == {"role": role, "content": "ab", "name": "n"}  # templates may use the name


PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    "fields, said, param",
    [
        (
            {"prompt": 5},
            "prompt: must be a string, a list of strings, a list of token ids or a list of lists of token ids",
            "prompt",
        ),
        ({"prompt": [1, "a"]}, "prompt: must be a string, a list of strings", "prompt"),
        ({"prompt": []}, "prompt: List should have at least 1 item", "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]: Input should be a valid integer", "prompt[1][0]"),
        ({"prompt": [1, -1]}, "prompt[1]: Input should be greater than or equal to 0", "prompt[1]"),
        ({"stop": 5}, "stop: must be a string or a list of at most 16 strings", "stop"),
        ({"stop": ["a", ""]}, "stop[1]: String should have at least 1 character", "stop[1]"),
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items", "stop"),
        ({"temperature": "1"}, "temperature: Input should be a valid number", "temperature"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7: Input should be less than or equal to 100", "logit_bias.7"),
        ({"stream_options": {"x": 1}}, "unknown parameter 'stream_options.x'", "stream_options.x"),
        ({"list[str]": 1}, "unknown parameter 'list[str]'", "list[str]"),
        ({"echo": True}, "echo is not served here", "echo"),
        ({"best_of": 2}, "best_of is not served here", "best_of"),
        ({"suffix": "x"}, "suffix is not served here", "suffix"),
    ],
)
def test_names_in_a_completion(fields, said, param):
    answer = explained(CompletionRequest, {"model": "m", "prompt": "x"} | fields)
    assert answer[0].startswith(said) and answer[1] == param


@pytest.mark.parametrize(
    "message, said, param",
    [
        (
            {"role": "tool", "content": "x"},
            "messages[1].role: must be one of 'system', 'developer', 'user', 'assistant'",
            "messages[1].role",
        ),
        ({"content": "x"}, "messages[1].role: Field required", "messages[1].role"),
        ({"role": "user"}, "messages[1].content: Field required", "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content: must be a string or a list of text parts", "messages[1].content"),
        ({"role": "assistant", "content": 5}, "messages[1].content: must be a string or a list", "messages[1].content"),
        (
            {"role": "user", "content": [PART]},
            "messages[1].content[0].type: Input should be 'text'",
            "messages[1].content[0].type",
        ),
        ({"role": "user", "content": "x", "user": 1}, "unknown parameter 'messages[1].user'", "messages[1].user"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[1].tool_calls is not served here", "messages[1].tool_calls"),
        ("x", "messages[1]: Input should be a valid dictionary", "messages[1]"),
    ],
)
def test_names_in_a_chat(message, said, param):
    answer = explained(ChatRequest, {"model": "m", "messages": [USER, message]})
    assert answer[0].startswith(said) and answer[1] == param
    assert explained(ChatRequest, [])[1] is None


def test_of_several_wrong_values_the_first_is_named():
    wrong = {"role": "assistant", "content": "x", "name": 0.5}
    said, param = explained(ChatRequest, {"model": "m", "messages": [wrong, USER, wrong | {"name": []}]})
    assert said == "messages[0].name: Input should be a valid string" and param == "messages[0].name"
