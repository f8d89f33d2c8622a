"""Blends: how they are written, the share of each corpus at every prefix, and what is refused."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.blend import Interleave, Part, parse

WEIGHTS = st.lists(st.integers(1, 2000), min_size=1, max_size=8)


def shares(weights):
    return [Fraction(w, sum(weights)) for w in weights]


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(1, 1500))
@example([997, 1, 1, 1], 1500)
@example([1] * 8, 100)
@example([5, 3, 3, 3, 1, 1], 1500)
def test_every_prefix_has_the_shares_to_within_one_sequence(weights, samples):
    deal, counts = Interleave(shares(weights)), [0] * len(weights)
    for i in range(samples):
        corpus, index = deal(i)
        assert index == counts[corpus]  # each corpus gives its sequences in their order, none twice
        counts[corpus] += 1
        assert all(abs(n - s * (i + 1)) < 1 for n, s in zip(counts, shares(weights), strict=True))
    assert deal.counts(samples) == counts


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.lists(st.integers(0, 20_000), min_size=1, max_size=10))
def test_any_place_is_the_same_whatever_was_asked_before(weights, places):
    """What a resumed run and every other rank rely on."""
    used = Interleave(shares(weights))
    for place in places:
        fresh = Interleave(shares(weights))
        assert fresh(place) == used(place) and fresh.counts(place) == used.counts(place)


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(0, 10**15))
def test_places_far_away_keep_the_shares(weights, place):
    counts = Interleave(shares(weights)).counts(place)
    assert sum(counts) == place
    assert all(abs(n - s * place) < 1 for n, s in zip(counts, shares(weights), strict=True))


@settings(deadline=None, max_examples=60)
@given(WEIGHTS)
def test_the_deal_repeats_with_the_common_denominator(weights):
    deal, period = Interleave(shares(weights)), sum(weights)
    assert [deal(i)[0] for i in range(min(period, 200))] == [deal(period + i)[0] for i in range(min(period, 200))]


def test_equal_shares_take_turns():
    deal = Interleave(shares([1, 1, 1]))
    assert [deal(i) for i in range(6)] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_shares_must_be_shares():
    for wrong in ([Fraction(1, 2)], [Fraction(0), Fraction(1)], [Fraction(3, 2), Fraction(-1, 2)]):
        with pytest.raises(ValueError, match="must be positive and sum to 1"):
            Interleave(wrong)


# ------------------------------------------------------------------------------------------- how they are written


@pytest.mark.parametrize("text", ["stdlib", "a.txt", " a.txt ,b.jsonl", "runs/corpus", "data:v2.txt", "C:corpus", "infra:x"])
def test_no_weights_is_one_corpus(text):
    assert parse(text, "data.text") == [Part(text.strip(), Fraction(1))]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.7:A,0.3:B", [("A", 7, 10), ("B", 3, 10)]),
        ("7:A, 3:B", [("A", 7, 10), ("B", 3, 10)]),
        ("1:A,1:B,1:C", [("A", 1, 3), ("B", 1, 3), ("C", 1, 3)]),
        ("5:A", [("A", 1, 1)]),
        ("1e-1:A,.9:B", [("A", 1, 10), ("B", 9, 10)]),
        ("0:A,2:B", [("B", 1, 1)]),
        ("1:a:b,1:C", [("a:b", 1, 2), ("C", 1, 2)]),
        ("1/3:A,2/3:B", [("A", 1, 3), ("B", 2, 3)]),
        ([{"path": "A", "weight": 0.7}, {"path": "x.txt,y.txt", "weight": 0.3}], [("A", 7, 10), ("x.txt,y.txt", 3, 10)]),
        ([{"path": "A", "weight": "1e2"}, {"path": "B", "weight": 300}], [("A", 1, 4), ("B", 3, 4)]),
    ],
)
def test_weights_are_exact_and_relative(value, expected):
    assert parse(value, "data.text") == [Part(text, Fraction(a, b)) for text, a, b in expected]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0:A,0:B", r"the weights of data.text sum to 0 \(0:A, 0:B\): give at least one"),
        ("0:A", "sum to 0"),
        ([], "sum to 0"),
        ("-1:A,2:B", "gives 'A' the weight -1: it must be a number of at least 0"),
        ("nan:A,1:B", "'A' the weight nan"),
        ("1:A,inf:B", "'B' the weight inf"),
        ("1:A,B", "gives 'B' no weight"),
        ("1.2.3:A", "'A' the weight 1.2.3"),
        ("1/0:A", "1/0"),
        ([{"path": "A", "weight": None}], "no weight"),
        ([{"path": "A", "weight": True}], "the weight True"),
        ([{"path": "A", "weight": []}], r"the weight \[\]"),
        ([{"path": "A"}], r"holds \{'path': 'A'\}: an entry"),
        (["A"], "holds 'A'"),
        ([{"path": 3, "weight": 1}], "an entry of a list is"),
    ],
)
def test_wrong_blends_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        parse(value, "data.text")
