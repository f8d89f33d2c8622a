"""The order of an epoch: a permutation, a function of (seed, epoch, index), that of published runs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shuffle import Shuffle


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 400), st.integers(0, 2**39))
def test_every_epoch_is_a_new_permutation_and_any_place_is_known_at_once(count, seed):
    shuffle = Shuffle(count, seed)
    order = [shuffle.place(i) for i in range(3 * count)]
    epochs = [order[e * count : (e + 1) * count] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 10 or len({tuple(epoch) for epoch in epochs}) == 3
    for i in (2 * count + 1, 0, count, 3 * count - 1):
        assert Shuffle(count, seed).place(i) == order[i]


def test_seeds_have_orders_of_their_own():
    orders = {tuple(Shuffle(50, seed).place(i) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20


def test_the_order_is_that_of_published_runs():
    """torch's permutation of this seed: changing it changes every number of docs/results."""
    expected = torch.randperm(37, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    shuffle = Shuffle(37, 3)
    assert [shuffle.place(2 * 37 + i) for i in range(37)] == expected
