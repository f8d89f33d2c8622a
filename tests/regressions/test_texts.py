"""Texts of completions with tokenizers that strip the first space of what they decode (Llama 2, Mistral)."""

import pytest

from dmc import LLM, SamplingParams
from dmc.engine.sampler import TokenLogprob
from dmc.engine.service import Progress
from dmc.server.answer import Chat, Completion
from tests.engine import tokenizers
from tests.model import tiny


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tiny model with a tokenizer such as Llama 2's."""
    directory = tmp_path_factory.mktemp("model")
    fields = tiny.config(None, vocab_size=tokenizers.write(directory, "llama-2"))
    return LLM(tiny.write(directory, fields, tiny.weights(fields), tokenizer=False), device="cpu")


def always(llm, name, **settings):
    return SamplingParams(temperature=0, max_tokens=3, logit_bias={llm.tokenizer.inner.get_vocab()[name]: 100}, **settings)


# https://github.com/InternLM/lmdeploy/issues/1743: the space before the first generated word was lost.
def test_first_space(llm):
    assert llm.generate("def main(argv):", always(llm, "▁the"))[0].text == " the the the"
    assert llm.generate("def main(argv):", always(llm, "▁the", stop=" the"))[0].text == ""


# https://github.com/declare-lab/instruct-eval/pull/19: the first line of generated code had one space too few.
def test_indentation(llm):
    assert llm.generate("def main(argv):\n", always(llm, "▁"))[0].text == "   "


# https://github.com/triton-inference-server/tensorrtllm_backend/issues/112: texts of single tokens had no spaces, so that
# pieces of a stream joined to one long word.
def test_texts_of_single_tokens(llm):
    tokens = llm.tokenizer.encode("the end of the text")[1:]
    assert "".join(llm.tokenizer.piece(token) for token in tokens) == " the end of the text"


def logprobs(llm, form, chosen, top):
    """The object of log-probabilities for one generated token."""
    vocabulary = llm.tokenizer.inner.get_vocab()
    found = TokenLogprob(vocabulary[chosen], top[chosen], tuple((vocabulary[name], value) for name, value in top.items()))
    progress = Progress(0, "", [vocabulary[chosen]], [llm.tokenizer.piece(vocabulary[chosen])], [found], None)
    return form("m", llm.tokenizer).piece(progress)["choices"][0]["logprobs"]


# https://github.com/vllm-project/vllm/issues/44319: tokens that differ by their first space had the same text, and one
# overwrote the other in top_logprobs.
def test_tokens_with_and_without_a_space(llm):
    top = logprobs(llm, Completion, "▁the", {"▁the": -0.5, "the": -1.5, "▁": -2.5})["top_logprobs"][0]
    assert top == {" the": -0.5, "the": -1.5, " ": -2.5}


# https://github.com/sgl-project/sglang/issues/32290: bytes of characters all had the text U+FFFD, and one overwrote the other.
def test_bytes_of_characters(llm):
    top = {"the": -0.1, "<0xE2>": -0.2, "<0xE3>": -0.3, "<0xF0>": -0.4}
    answer = logprobs(llm, Completion, "the", top)["top_logprobs"][0]
    assert answer == {"the": -0.1, "bytes:\\xe2": -0.2, "bytes:\\xe3": -0.3, "bytes:\\xf0": -0.4}


# https://github.com/ggml-org/llama.cpp/issues/11728: the tokens of top_logprobs had lost their spaces, in text and bytes.
def test_spaces_of_top_logprobs(llm):
    (content,) = logprobs(llm, Chat, "▁the", {"▁the": -0.5, "▁text": -1.5})["content"]
    assert [(each["token"], bytes(each["bytes"])) for each in content["top_logprobs"]] == [(" the", b" the"), (" text", b" text")]
