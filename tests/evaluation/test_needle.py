"""Needle retrieval: how prompts are made, and that a cache which evicts the needle cannot find it."""

import random
from pathlib import Path

import pytest

from dmc.engine import LLM
from dmc.evaluation import needle as module
from dmc.evaluation.haystack import Haystack, read_haystack, standard_prose
from dmc.evaluation.needle import NeedleSettings, as_text, cells, count, needle, report
from dmc.evaluation.needle_plot import plot_needle
from dmc.evaluation.needles import KINDS, draw_needle
from tests.engine import tokenizers

BASE = Path(__file__).parents[2] / "checkpoints" / "base"


@pytest.fixture(scope="module")
def prose():
    return standard_prose()


@pytest.fixture(scope="module")
def full():
    return LLM(BASE, policy="full", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_needles_are_drawn_by_their_seed(full, kind):
    first, again = (draw_needle(kind, full.tokenizer, random.Random(3), 6) for _ in range(2))
    assert first == again != draw_needle(kind, full.tokenizer, random.Random(4), 6)
    assert len(first.choices) == 6 == len({tuple(choice) for choice in first.choices})
    assert {len(choice) for choice in first.choices} == {len(first.choices[0])}
    text = full.tokenizer.decode(first.needle)
    assert full.tokenizer.decode(first.choices[0]) == f" {first.answer}" and first.answer in text
    assert first.answer not in full.tokenizer.decode(first.question)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_prompt(full, prose, depth):
    made = draw_needle("fact", full.tokenizer, random.Random(0), 2)
    tokens, place = module._prompt(full, prose, made, 300, depth, random.Random(1))
    again, _ = module._prompt(full, prose, made, 300, 1 - depth, random.Random(1))
    assert len(tokens) == len(again) == 300
    assert tokens[place : place + len(made.needle)] == made.needle and tokens[-len(made.question) :] == made.question
    hay = tokens[:place] + tokens[place + len(made.needle) : -len(made.question)]
    assert abs(place - depth * len(hay)) < 60 and (place == 0 or full.tokenizer.decode(hay[:place]).endswith("\n"))
    assert full.tokenizer.decode(hay) in prose.text + prose.text and made.answer not in full.tokenizer.decode(hay)


def test_full_cache_finds_what_streaming_has_evicted(full, prose, tmp_path):
    settings = NeedleSettings(lengths=(300,), depths=(0.1, 1.0), kinds=("passkey",), trials=2, choices=4)
    done = []
    kept = needle(full, prose, settings, done.append)
    streaming = LLM(BASE, policy="streaming", policy_settings={"sinks": 4, "recent": 136}, device="cpu")
    evicted = needle(streaming, prose, settings)
    assert sum(done) == count(settings) == len(kept) == 4
    assert [trial.answer for trial in kept] == [trial.answer for trial in evicted]
    middle, end = cells(kept)
    lost, near = cells(evicted)
    assert middle["margin"] > 5 and end["margin"] > 5 and near["margin"] > 5, (middle, end, near)
    assert lost["margin"] < middle["margin"] / 3 and lost["exact"] == 0, (middle, lost)
    assert near["cr"] > 2 and middle["cr"] == 1 and near["held_bytes"] < middle["held_bytes"]
    assert all(trial.tokens == 300 + len(full.tokenizer.inner.encode(f" {trial.answer}")) + 2 for trial in kept)

    figures = report(kept, prose, settings)
    assert figures["haystack_hash"] == prose.hash and len(figures["trials"]) == 4
    text = as_text(figures)
    assert "passkey" in text and f"{middle['exact']:.2f} / {middle['choice']:.2f} / {middle['margin']:+.1f}" in text
    plot_needle(figures, tmp_path / "map.png", title="base")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_generated_answers_are_compared_whole(full):
    made = draw_needle("passkey", full.tokenizer, random.Random(0), 3)

    class Free:
        def __init__(self, text):
            self.tokens = full.tokenizer.inner.encode(text)
            self.stats = full.score([[5, 6, 7]])[0].stats

    where = dict(kind="passkey", length=9, depth=0.5, needle_at=2)
    for said, exact in ((f" {made.answer}. So", True), (f" {made.answer}7", False), (" 1", False), (f" x{made.answer}", False)):
        trial = module._trial(full, made, Free(said), [-1.0, -3.0, -5.0], **where)
        assert trial.exact is exact and trial.choice and trial.margin == 3.0
    assert not module._trial(full, made, Free(" "), [-3.0, -3.0, -5.0], **where).choice


def test_haystack_of_files(full, tmp_path):
    for name, text in (("a.txt", "One line of it.\n" * 40), ("b.txt", "Another.\n" * 40)):
        (tmp_path / name).write_text(text)
    hay = read_haystack([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert hay.name == "a.txt+b.txt" and len(hay.hash) == 16 and hay.hash != read_haystack([tmp_path / "a.txt"]).hash
    tokens = hay.tokens(full.tokenizer, 100, random.Random(0))
    assert len(tokens) == 100 and tokens == hay.tokens(full.tokenizer, 100, random.Random(0))
    with pytest.raises(ValueError, match="has .* tokens and 9999 are needed"):
        hay.tokens(full.tokenizer, 9999, random.Random(0))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    for name, words in (("empty.txt", "holds no text"), ("latin.txt", "not UTF-8"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=words):
            read_haystack([tmp_path / name])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lengths": ()}, "lengths must be"),
        ({"depths": (1.5,)}, "depths must be"),
        ({"kinds": ("pin",)}, "known: passkey, fact"),
        ({"trials": 0}, "trials must be"),
        ({"choices": 1}, "choices must be"),
        ({"lengths": (9999,)}, "2048 positions"),
        ({"lengths": (30,)}, "no room for hay"),
        ({"lengths": (100,), "choices": 5000}, "ask for fewer choices"),
    ],
)
def test_bad_settings_are_refused(full, settings, words):
    with pytest.raises(ValueError, match=words):
        needle(full, Haystack("x", "hay\n" * 999, ""), NeedleSettings(**settings))


@pytest.mark.parametrize("kind", ["byte-level", "llama-2", "llama-2-legacy", "llama-2-fast", "no-strip", "unigram-bytes"])
@pytest.mark.parametrize("needle", KINDS)
def test_needles_of_other_tokenizers(tmp_path, kind, needle):
    """Parts that are encoded one by one read as one text: Decoder 2's tokenizer would put a space before each."""
    tokenizer = tokenizers.load(tmp_path, kind)
    made = draw_needle(needle, tokenizer, random.Random(1), choices=3)
    hay = tokenizer.encode("the text\n")
    text = tokenizer.decode([*hay, *made.needle, *made.question, *made.choices[0]])
    first, line, _, *question = text.split("\n")
    assert first.strip() == "the text" and line[:1] != " " and made.answer in line
    assert question[0][:1] != " " and question[0].endswith(f" {made.answer}") and f"  {made.answer}" not in question[0]
    assert all(tokenizer.decode([*hay, *tokens]).startswith(tokenizer.decode(hay) + " ") for tokens in made.choices)
