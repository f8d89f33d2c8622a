"""Retrieval by generation: what the samples hold, that a question comes after compression, and what the command says."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dmc import LLM
from dmc.cli import main
from dmc.evaluation import suite
from dmc.evaluation.continuations import Request, follow
from dmc.evaluation.haystack import Haystack, standard_prose
from dmc.evaluation.retrieval import KINDS, Sample, Turn, draw_sample

BASE = Path(__file__).parents[2] / "checkpoints" / "base"

HAY = standard_prose()


@pytest.fixture(scope="module")
def llm():
    return LLM(BASE, device="cpu", max_batch=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [250, 500])
def test_a_sample_fills_its_tokens_and_holds_what_is_asked_for(kind, length, llm):
    decode = llm.tokenizer.decode
    for seed in range(5):
        sample = draw_sample(kind, llm.tokenizer, HAY, length, random.Random(seed))
        tokens, text = len(sample.document) + len(sample.turns[0].question), decode(sample.document)
        assert length - (30 if KINDS[kind](random.Random(seed)).fill else 0) <= tokens <= length
        assert sample == draw_sample(kind, llm.tokenizer, HAY, length, random.Random(seed))
        assert sample != draw_sample(kind, llm.tokenizer, HAY, length, random.Random(seed + 9))
        for turn in sample.turns:
            assert all(answer in text and answer in decode(turn.reply) for answer in turn.answers)
            assert not any(answer in decode(turn.question) for answer in turn.answers)
        if kind in ("common", "frequent"):
            words = text.split()
            counts = {word: words.count(word) for word in set(words) if not word.rstrip(".").isdigit()}
            assert {*sorted(counts, key=counts.get)[-3:]} == {*sample.turns[0].answers} or length < 500  # short lists have ties
        if kind in ("single", "multikey"):
            assert text.count(sample.turns[0].answers[0]) == 1


def test_variables_are_assigned_in_the_order_of_the_text(llm):
    text = llm.tokenizer.decode(draw_sample("tracking", llm.tokenizer, HAY, 400, random.Random(2)).document)
    lines = [line for line in text.splitlines() if line.startswith("VAR ")]
    assert lines[0].split(" = ")[1].isdigit()
    assert [line.split()[-1] for line in lines[1:]] == [line.split()[1] for line in lines[:-1]]


def test_a_later_question_goes_through_the_decode_step(llm):
    """As one teacher-forced text: the tokens between context and answer are fed, and the greedy answer is that of `follow`."""
    sample = draw_sample("two-turns", llm.tokenizer, HAY, 200, random.Random(0))
    context, fed = [*sample.document, *sample.turns[0].question], [*sample.turns[0].reply, *sample.turns[1].question]
    done = follow(llm, [Request(context, 5, fed), Request(context, 3)])
    again = follow(llm, [Request(context, [*fed, *done[0].tokens])])[0]
    assert again.logprobs[len(fed) :].tolist() == pytest.approx(done[0].logprobs.tolist(), abs=1e-5)
    assert len(done[0].tokens) == 5 and done[0].stats.prompt_tokens == len(context) - 1
    assert done[1].tokens == follow(llm, [Request(context, 3)])[0].tokens


def test_what_was_found_is_the_share_of_the_answers(llm, monkeypatch):
    """A model that writes the reply finds everything, one that writes half of it half."""
    sample = Sample("multiquery", [1, 2, 3], (Turn([4], ("12345", "54321"), [5, 6]),))
    monkeypatch.setattr(suite, "draw_sample", lambda *_: sample)
    said = iter([" 12345, 54321.", " 12345, 11111", "nothing"])
    real = suite.follow
    monkeypatch.setattr(
        suite, "follow", lambda *given: [replace(one, tokens=llm.tokenizer.encode_inside(next(said))) for one in real(*given)]
    )
    answered = suite.run(llm, HAY, suite.SuiteSettings(lengths=(100,), kinds=("multiquery",), trials=3))
    assert [one.found for one in answered] == [1.0, 0.5, 0.0]
    cell = suite.report(answered, HAY, suite.SuiteSettings())["cells"][0]
    assert cell["found"] == 0.5 and cell["stderr"] == pytest.approx(0.5 / 3**0.5) and cell["n"] == 3


def test_the_command(tmp_path, capsys):
    out = tmp_path / "figures.json"
    flags = ["--lengths", "250", "--trials", "2", "--policy", "snapkv:budget=40", "--json", str(out), "--no-progress"]
    assert main(["eval", str(BASE), "--suite", "quick", "--device", "cpu", *flags]) == 0
    figures = json.loads(out.read_text())["retrieval"]
    assert {cell["kind"] for cell in figures["cells"]} == set(KINDS) and all(cell["n"] == 2 for cell in figures["cells"])
    assert figures["schema"] == 1 and len(figures["samples"]) == 2 * len(KINDS) and figures["all"]["cr"] > 2
    said = capsys.readouterr().out
    assert "three-turns" in said and "dense bf16 / held" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kinds", "passkey"), "unknown kind of retrieval 'passkey'; known: single, multikey"),
        (("--lengths", "40"), "a text of 40 tokens has no room for retrieval of kind 'single'"),
        (("--lengths", "4000"), "positions, and the model has"),
        (("--trials", "0"), "retrieval trials must be at least 1"),
    ],
)
def test_bad_requests_are_one_sentence(flags, said, capsys):
    assert main(["eval", str(BASE), "--suite", "quick", "--device", "cpu", "--no-progress", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_haystack_that_is_too_short(llm):
    with pytest.raises(ValueError, match="give a longer text"):
        draw_sample("single", llm.tokenizer, Haystack("short", "a b c\n", ""), 300, random.Random(0))
