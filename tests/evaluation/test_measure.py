"""The measuring core against transformers, the byte formula and the engine's own scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from dmc import LLM
from dmc.evaluation.measure import measure, prefill
from dmc.evaluation.reference import reference
from dmc.evaluation.windows import Windows, cut_windows, read_windows
from tests.model import tiny

PROMPT, SCORED = 21, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("base"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same vocabulary, other weights and number of heads."""
    fields = tiny.config(heads=4)
    return tiny.write(tmp_path_factory.mktemp("other"), fields, tiny.weights(fields, seed=1))


@pytest.fixture(scope="module")
def windows():
    tokens = torch.randint(3, 97, (3, PROMPT + SCORED + 1), generator=torch.Generator().manual_seed(0))
    return Windows(tokens, PROMPT, "random")


def by_transformers(directory, windows):
    """Log-probabilities ``[W, S, V]`` at the scored places."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        return model(windows.tokens[:, :-1]).logits[:, windows.prompt :].log_softmax(-1)


def test_uncompressed_is_transformers(base, windows):
    expected = by_transformers(base, windows)
    following = windows.tokens[:, PROMPT + 1 :, None]
    perplexity = math.exp(-expected.gather(-1, following).mean().item())
    found = measure(LLM(base, policy="full", max_batch=2), windows, reference=reference(base, windows, store=None))
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.base_perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1 and found.cr == 1


def test_kl_between_two_models_is_that_of_transformers(base, other, windows):
    wanted, found = by_transformers(base, windows), by_transformers(other, windows)
    each = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean(1)
    result = measure(LLM(other, policy="full"), windows, reference=reference(base, windows, store=None))
    assert result.kl == pytest.approx(each.mean().item(), rel=1e-4)
    assert result.kl_stderr == pytest.approx(each.std().item() / math.sqrt(3), rel=1e-3)
    assert result.share == pytest.approx(2 * result.held_bytes / result.dense_bytes)  # it has twice the base's heads
    assert result.agreement == pytest.approx((wanted.argmax(-1) == found.argmax(-1)).double().mean().item())


@pytest.mark.parametrize(
    "policy, codec", [("full", "dense"), ("full", "int8"), ("dmc", "dense"), ("dmc", "tcq"), ("streaming", "dense")]
)
def test_numbers_are_those_of_the_engine_at_every_length(tmp_path, windows, policy, codec):
    """`LLM.score` on windows cut after 1, 2, ... scored tokens: what is predicted last, and what is held then."""
    fields = tiny.config("head")
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    settings = {"policy_settings": {"sinks": 2, "recent": 7}} if policy == "streaming" else {}

    def make():
        return LLM(directory, policy=policy, codec=codec, page_size=4, **settings)

    scores = [
        make().score(windows.tokens[:, : PROMPT + 1 + steps].tolist(), prompt_tokens=PROMPT) for steps in range(1, SCORED + 1)
    ]
    found = measure(make(), windows)
    assert found.perplexity == pytest.approx(
        math.exp(-sum(score.logprobs[-1].item() for step in scores for score in step) / (3 * SCORED)), rel=1e-5
    )
    held = [score.stats.held_bytes for step in scores for score in step]
    assert found.held_bytes == pytest.approx(sum(held) / len(held))
    assert found.held_bytes_end == pytest.approx(sum(held[-3:]) / 3)
    assert sum(found.held_end.values()) == pytest.approx(found.held_bytes_end)
    assert found.ratio_end == pytest.approx(scores[-1][0].stats.dense_bytes * 3 / sum(held[-3:]))
    entries = torch.stack([score.stats.entries for score in scores[-1]]).sum(0)
    assert found.cr == pytest.approx(3 * (PROMPT + SCORED) * entries.numel() / entries.sum().item())
    assert (found.cr > 1.3) == (policy != "full")
    assert found.kl is None and found.base is None


def test_bytes_of_a_full_cache_follow_the_formula(base, windows):
    found = measure(LLM(base, policy="full", codec_settings={"dtype": "bf16"}, codec="dense", page_size=8), windows)
    rows, entry = tiny.LAYERS * 2, 2 * 2 * tiny.SIZE
    closed = PROMPT + SCORED - 1
    assert found.held_end["pages"] == rows * (closed // 8) * 8 * entry
    assert found.held_end["exact"] == rows * 8 * entry * (closed % 8 > 0)
    assert found.held_end["tail"] == rows * 4 * (2 * tiny.SIZE + 1)
    assert found.dense_bytes_end == rows * entry * (PROMPT + SCORED)
    assert found.dense_bytes == rows * entry * (PROMPT + (SCORED + 1) / 2)


def test_batches_and_shared_prompts_change_nothing(base, windows):
    kept = reference(base, windows, store=None)

    def make(batch, codec="tcq"):
        # In fp64, as in test_rule: the last bit of a sum, which a batch changes, can decide a code of a lossy codec.
        return LLM(base, policy="full", codec=codec, page_size=4, max_batch=batch, dtype="fp64")

    together, done = make(3), []
    prompts = prefill(make(1, "dense"), windows)
    results = [
        measure(together, windows, reference=kept, progress=done.append),
        measure(together, windows, reference=kept, prompts=prompts),
        measure(together, windows, reference=kept, prompts=prompts),
        measure(make(1), windows, reference=kept),
        measure(make(2), windows, reference=kept, prompts=prompts),
    ]
    assert sum(done) == 3 * SCORED
    for result in results[1:]:
        assert result.kl == pytest.approx(results[0].kl, rel=1e-4)
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-6)
        assert result.held_end == results[0].held_end
    assert results[0].kl > 0
    assert together.cache.rows.pool.used == 0


def test_reference_is_kept_and_made_anew_if_damaged(base, other, windows, tmp_path):
    first = reference(base, windows, store=tmp_path)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    again = reference(base, windows, store=tmp_path)
    assert torch.equal(first.hidden, again.hidden) and path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(first.hidden, reference(base, windows, store=tmp_path).hidden)
    assert path.stat().st_mtime_ns != stamp
    reference(other, windows, store=tmp_path)
    reference(base, Windows(windows.tokens, PROMPT - 1), store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_windows_of_a_text(base, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i % 94) for i in range(100)))
    found = read_windows(text, base, prompt=10, scored=5, count=3)
    assert found.tokens.shape == (3, 16) and found.prompt == 10 and found.scored == 5 and found.name == "text.txt"
    assert found.tokens[0].tolist() == list(range(3, 19))
    assert (found.tokens[:, 1:] - found.tokens[:, :-1]).remainder(94).eq(1).all()
    assert [row[0] - 3 for row in found.tokens.tolist()] == [0, 33, 66]
    assert found.hash != read_windows(text, base, prompt=11, scored=4, count=3).hash
    before = found.text_hash
    text.write_text(text.read_text() + "x")
    assert read_windows(text, base, prompt=10, scored=5, count=3).text_hash != before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 7}, "100 tokens in 1 texts, which give 6 windows"),
        ({"scored": 0}, "scored must be at least 1"),
        ({"prompt": 0}, "prompt must be at least 1"),
        ({"text": "no.txt"}, "no.txt cannot be read"),
        ({"text": "bytes.txt"}, "bytes.txt is not UTF-8"),
        ({"tokenizer": "none"}, "config.json"),
    ],
)
def test_wrong_windows_are_refused(base, tmp_path, change, message):
    (tmp_path / "text.txt").write_text("x" * 100)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    arguments = {"text": "text.txt", "tokenizer": base, "prompt": 10, "scored": 5, "count": 3} | change
    arguments |= {"text": tmp_path / arguments["text"]}
    with pytest.raises(ValueError, match=message):
        read_windows(**arguments)


def test_wrong_measurements_are_refused(base, windows, tmp_path):
    fields = tiny.config("head")
    retrofitted = tiny.write(tmp_path / "retrofitted", fields, tiny.weights(fields))
    with pytest.raises(ValueError, match="give the base model"):
        reference(retrofitted, windows, store=None)
    with pytest.raises(ValueError, match="other windows"):
        measure(LLM(base), windows, reference=reference(base, Windows(windows.tokens, 5), store=None))
    with pytest.raises(ValueError, match="256 positions"):
        measure(LLM(base), Windows(torch.ones(1, 300, dtype=torch.int64), 100))
    with pytest.raises(ValueError, match="cannot hold a window"):
        measure(LLM(base, kv_memory=4_000), windows)
    small = tiny.config(vocab_size=50)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        measure(LLM(tiny.write(tmp_path / "small", small, tiny.weights(small))), windows)
    with pytest.raises(ValueError, match="at least one window"):
        Windows(windows.tokens[:, : PROMPT + 1], PROMPT)


def test_windows_of_several_texts_stay_within_them(base):
    texts = ["a" * 20, "b" * 5, "c" * 70, "d" * 33]
    found = cut_windows(texts, base, prompt=5, scored=4, count=6, name="texts").tokens
    assert found.shape == (6, 10) and (found == found[:, :1]).all()
    letters = [chr(row[0] + 30) for row in found.tolist()]
    assert letters == sorted(letters) and set(letters) == {"a", "c", "d"} and letters.count("c") >= 3
