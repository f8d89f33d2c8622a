"""Texts of answers and of their log-probabilities, with a tokenizer such as Llama 2's: it strips the first space of what it
decodes, and writes characters that it does not know as bytes."""

import functools
import json
import tempfile
from pathlib import Path

import httpx
import openai
import pytest

from dmc.engine.sampler import TokenLogprob
from dmc.server.answer import Chat, Completion, Part
from tests.engine import tokenizers
from tests.model import tiny
from tests.server.helpers import TEMPLATE, serving


@functools.cache
def tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        return tokenizers.load(Path(folder), "llama-2")


def token(name):
    return tokenizer().inner.get_vocab()[name]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "model"
    size = tokenizers.write(directory, "llama-2", chat_template=TEMPLATE)
    fields = tiny.config(None, vocab_size=size, max_position_embeddings=512)
    tiny.write(directory, fields, tiny.weights(fields), tokenizer=False)
    with serving(directory) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def always(*names):
    """Parameters with which a model generates these tokens alone."""
    return {"model": "tiny", "temperature": 0, "logit_bias": {str(token(name)): 100 for name in names}}


def test_first_space_and_stop_texts(client):
    asked = always("▁the") | {"prompt": "def main(argv):", "max_tokens": 4}
    whole = client.completions.create(**asked).choices[0]
    assert whole.text == " the the the the"
    pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True)]
    assert pieces == [" the"] * 4
    for stop, text, tokens in ((" ", "", 1), (" the", "", 1), ([" the the"], "", 2), ("e th", " th", 2)):
        for stream in (False, True):
            answer = client.completions.create(**asked, stop=stop, stream=stream)
            parts = [part for part in answer if part.choices] if stream else [answer]
            assert "".join(part.choices[0].text for part in parts) == text, stop
            assert parts[-1].choices[0].finish_reason == "stop"
        assert client.completions.create(**asked, stop=stop).usage.completion_tokens == tokens
    assert (
        client.chat.completions.create(messages=[{"role": "user", "content": "x"}], max_tokens=2, **always("▁the"))
        .choices[0]
        .message.content
        == " the the"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client, stream):
    """Whatever a random model says: bytes of characters, special tokens, parts of words."""
    asked = {"model": "tiny", "prompt": "the text", "max_tokens": 40, "logprobs": 20, "extra_body": {"ignore_eos": True}}
    for seed in range(3):
        answer = client.completions.create(**asked, seed=seed, stream=stream)
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        text = "".join(choice.text for choice in choices)
        logs = {
            name: [each for choice in choices if choice.logprobs for each in getattr(choice.logprobs, name)]
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
        }
        assert {len(each) for each in logs.values()} == {40}
        special = {tokenizer().name(each) for each in tokenizer().special}
        assert "".join(each for each in logs["tokens"] if each not in special) == text
        for each, value, offset, top in zip(*logs.values(), strict=True):
            assert each in special or text[offset:].startswith(each)
            assert top[each] == value and 20 <= len(top) <= 21 and sorted(top.values(), reverse=True) == list(top.values())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chats(client, stream):
    """The bytes of all tokens are those of the text."""
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "the"}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    for names in (("<0xE2>", "<0x82>", "<0xAC>"), ("▁the",)):
        answers = [client.chat.completions.create(**asked, logit_bias={str(token(name)): 100 for name in names}, stream=stream)]
        choices = [part.choices[0] for answer in answers for part in (answer if stream else [answer])]
        text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
        content = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
        assert "".join(each.token for each in content) == text and len(content) == 4
        if text.isascii():
            assert text == " the" * 4 and b"".join(bytes(each.bytes) for each in content).decode() == text
        for each in content:
            assert len(each.top_logprobs) == 20


def logs(form, chosen, pieces, top=(), ended=None):
    found = [TokenLogprob(token(name), -1.0, tuple((token(other), value) for other, value in top)) for name in chosen]
    return form("m", tokenizer())._logprobs(Part(0, "".join(pieces), found, list(pieces), ended))


def test_characters_of_several_tokens():
    names, pieces = ["▁the", "<0xE2>", "<0x82>", "<0xAC>", "</s>"], [" the", "", "", "€", ""]
    answer = logs(Completion, names, pieces)
    assert answer["tokens"] == [" the", "", "", "€", "</s>"] and answer["text_offset"] == [0, 4, 4, 4, 5]
    content = logs(Chat, names, pieces)["content"]
    assert [each["token"] for each in content] == answer["tokens"] and content[-1]["bytes"] is None
    assert bytes(byte for each in content[:-1] for byte in each["bytes"]).decode() == " the€"
    assert [each["bytes"] for each in content[1:4]] == [[0xE2], [0x82], [0xAC]]


def test_tokens_of_one_text_are_kept_apart():
    top = [("<0x74>", -0.1), ("t", -0.2), ("<0xE2>", -0.3), ("<0xE3>", -0.4), ("the", -0.5), ("▁the", -0.6)]
    answer = logs(Completion, ["t"], ["t"], top)["top_logprobs"][0]  # the chosen token is known by its text
    assert answer == {
        f"token_id:{token('<0x74>')}": -0.1,
        "bytes:\\xe2": -0.3,
        "bytes:\\xe3": -0.4,
        "the": -0.5,
        " the": -0.6,
        "t": -1.0,
    }
    content = logs(Chat, ["t"], ["t"], top)["content"][0]["top_logprobs"]
    assert [each["token"] for each in content] == ["t", "t", "bytes:\\xe2", "bytes:\\xe3", "the", " the"]
    assert [each["bytes"] for each in content] == [[0x74], [0x74], [0xE2], [0xE3], [*b"the"], [*b" the"]]


def test_a_stop_token_keeps_its_text():
    """It is not in the text, so it has no bytes and does not move the offset."""
    answer = logs(Completion, ["▁the", "▁text"], [" the", ""], ended="eos")
    assert answer["tokens"] == [" the", " text"] and answer["text_offset"] == [0, 4]
    assert logs(Chat, ["▁the", "▁text"], [" the", ""], ended="eos")["content"][1]["bytes"] is None


def test_pieces_of_the_page(server):
    prompt = "def main(argv):\n    return the text"
    answer = httpx.post(f"{server.url}/try", json={"prompt": prompt, "max_tokens": 3, "temperature": 0}, timeout=60)
    first, *rest = [json.loads(event[6:]) for event in answer.text.split("\n\n") if event]
    assert first["pieces"][0] == "<s>" and "".join(first["pieces"][1:]) == prompt
    assert len(first["pieces"]) == len(tokenizer().encode(prompt))
    assert sum(len(event["pieces"]) for event in rest) == 3
