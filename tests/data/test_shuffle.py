"""The order of an epoch: a permutation, a function of (seed, epoch, index), the published one for small corpora."""

import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shuffle import LISTED, FeistelPermutation, Shuffle


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 1000))
def test_the_keyed_permutation_is_a_bijection(count, seed, epoch):
    permutation = FeistelPermutation(count, f"{seed} {epoch}")
    assert len(permutation) == count
    assert sorted(permutation[i] for i in range(count)) == list(range(count))


@settings(deadline=None, max_examples=60)
@given(st.integers(2**20, 2**45), st.data())
def test_huge_permutations_stay_inside_and_do_not_collide(count, data):
    places = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=50))
    permutation = FeistelPermutation(count, "key")
    found = [permutation[i] for i in places]
    assert len(set(found)) == len(places) and all(0 <= f < count for f in found)


@pytest.mark.parametrize("index", [-1, 10, 10**9])
def test_places_outside_are_refused(index):
    with pytest.raises(IndexError, match=f"index {index} of a permutation of 10"):
        FeistelPermutation(10, "key")[index]


def test_a_permutation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a permutation of 0 things"):
        FeistelPermutation(0, "key")


def test_images_of_neighbours_look_independent():
    """Chi-square over 16 x 16 cells of (image of i, image of i + 1): 255 degrees of freedom, 6 sigma is 390."""
    count, cells = 2**17 + 3, torch.zeros(16, 16)
    permutation = FeistelPermutation(count, "0 0")
    images = [permutation[i] for i in range(20_000)]
    for a, b in zip(images, images[1:], strict=False):
        cells[a * 16 // count, b * 16 // count] += 1
    expected = (len(images) - 1) / 256
    assert ((cells - expected) ** 2 / expected).sum() < 390


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 400), st.integers(0, 2**39), st.booleans())
def test_every_epoch_is_a_new_permutation_and_any_place_is_known_at_once(count, seed, listed):
    shuffle = Shuffle(count, seed, listed=count if listed else 1)
    order = [shuffle.place(i) for i in range(3 * count)]
    epochs = [order[e * count : (e + 1) * count] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 10 or len({tuple(epoch) for epoch in epochs}) == 3
    for i in (2 * count + 1, 0, count, 3 * count - 1):
        assert Shuffle(count, seed, listed=count if listed else 1).place(i) == order[i]


def test_seeds_have_orders_of_their_own():
    for listed in (LISTED, 1):
        orders = {tuple(Shuffle(50, seed, listed=listed).place(i) for i in range(50)) for seed in range(20)}
        assert len(orders) == 20


def test_small_corpora_keep_the_order_of_published_runs():
    """torch's permutation of this seed: changing it changes every number of docs/results."""
    expected = torch.randperm(37, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    shuffle = Shuffle(37, 3)
    assert [shuffle.place(2 * 37 + i) for i in range(37)] == expected


def test_a_huge_corpus_takes_no_memory_and_no_time():
    tracemalloc.start()
    begun = time.process_time()
    shuffle = Shuffle(10**11, 0)
    assert len({shuffle.place(i * 10**9) for i in range(300)}) == 300
    assert time.process_time() - begun < 2 and tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
