"""Checks of an OpenAI server with the tests' tiny model, through the official client: of `dmc serve` (test_api.py), and of vLLM
with this project's plugin (tests/integrations)."""

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def completion(client):
    """A seed gives the same text again; log-probabilities of every token. Returns the answer."""
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0.7, seed=4, logprobs=2)
    text = answer.choices[0].text
    again = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0.7, seed=4)
    assert text and again.choices[0].text == text
    assert answer.usage.prompt_tokens == 5 and answer.usage.total_tokens == 5 + answer.usage.completion_tokens
    assert answer.object == "text_completion"
    logs = answer.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(logs.text_offset)
    assert len(logs.tokens) == answer.usage.completion_tokens
    assert all(value <= 0 for value in logs.token_logprobs)
    return answer


def stream(client):
    asked = {"model": "tiny", "prompt": "stream", "max_tokens": 20, "seed": 1, "logprobs": 0}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason and len(pieces) > 5
    assert pieces[-1].usage == whole.usage and pieces[-1].choices == []
    tokens = [token for piece in pieces[:-1] if piece.choices[0].logprobs for token in piece.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens


def several(client):
    """Several prompts, and several completions of each."""
    answer = client.completions.create(model="tiny", prompt=["ab", "cde"], n=3, max_tokens=6, seed=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 5 and len({choice.text for choice in answer.choices[:3]}) == 3
    ids = client.completions.create(model="tiny", prompt=[[67, 68], [69, 70, 71]], max_tokens=1, temperature=0)
    assert len(ids.choices) == 2
    assert client.completions.create(model="tiny", prompt=[67, 68], max_tokens=1, temperature=0).choices[0].text == (
        ids.choices[0].text
    )


def stop(client):
    """A stop text never shows in a stream."""
    full = client.completions.create(model="tiny", prompt="abc", max_tokens=30, temperature=0, extra_body={"ignore_eos": True})
    stop = full.choices[0].text[9:12]
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "temperature": 0, "stop": [stop, "@@@@"]}
    pieces = list(client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}))
    text = "".join(piece.choices[0].text for piece in pieces)
    assert text == full.choices[0].text.split(stop)[0] and pieces[-1].choices[0].finish_reason == "stop"


def chat(client, **limit):
    """A conversation, whole and streamed. ``limit``: of the answer's tokens. Returns the answer."""
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, logprobs=True, top_logprobs=2, **limit)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len("s:S;u:hi;a:")
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens and len(content[0].top_logprobs) == 2
    assert bytes(content[0].bytes).decode() == content[0].token
    pieces = list(client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, stream=True, **limit))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    short = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=2, temperature=0)
    assert short.usage.completion_tokens <= 2
    return answer
