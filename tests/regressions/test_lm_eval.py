"""The model class for the lm-evaluation-harness: chat templates, and BOS."""

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from dmc import LLM  # noqa: E402
from dmc.evaluation.lm_eval import CompressedLM  # noqa: E402
from tests.engine import tokenizers  # noqa: E402
from tests.model import tiny  # noqa: E402

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer such as Llama 2's, which adds BOS."""
    directory = tmp_path_factory.mktemp("model")
    fields = tiny.config(None, vocab_size=tokenizers.write(directory, "llama-2", chat_template=TEMPLATE))
    llm = LLM(tiny.write(directory, fields, tiny.weights(fields), tokenizer=False), device="cpu")
    return CompressedLM(llm, progress=False)


# https://github.com/abetlen/llama-cpp-python/issues/1999: --apply_chat_template ended in NotImplementedError, since the
# harness's model class had no tokenizer_name.
def test_apply_chat_template(model):
    assert model.tokenizer_name and model.chat_template(True) == TEMPLATE
    assert model.apply_chat_template([{"role": "user", "content": "the text"}]) == "<s>[user] the text\n"


# https://github.com/lang-uk/ukrainian-llm-leaderboard/issues/5: prompts in a chat template that writes BOS had it twice.
def test_bos_of_a_chat_template(model):
    text = model.apply_chat_template([{"role": "user", "content": "the text"}])
    tokens = model.tok_encode(text)
    assert tokens.count(1) == 1 and tokens[0] == 1 and model.tok_encode("the text").count(1) == 1


# https://github.com/EleutherAI/lm-evaluation-harness/issues/3333: rolling log-likelihoods had BOS twice and scored it.
def test_bos_of_rolling_log_likelihoods(model):
    text = "def main(argv):\n    return the text"
    tokens = model.tokenizer.encode(text)
    assert tokens[0] == 1
    (score,) = model.llm.score([tokens])
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    assert model.loglikelihood_rolling([request]) == pytest.approx([score.logprobs.sum().item()], abs=1e-3)
