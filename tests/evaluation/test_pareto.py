"""The Pareto front against the definition, point by point."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmc.evaluation.pareto import front, leader

values = st.one_of(st.integers(0, 4).map(float), st.floats(-1e6, 1e6), st.just(math.inf))
points = st.lists(st.tuples(values, values), max_size=12)


def dominates(one, other):
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(points)
def test_front_is_what_nothing_dominates(cloud):
    kept = front(cloud)
    beaten = {i for i, point in enumerate(cloud) if any(dominates(other, point) for other in cloud)}
    assert {cloud[i] for i in kept} == {point for i, point in enumerate(cloud) if i not in beaten}
    assert len({cloud[i] for i in kept}) == len(kept)
    assert kept == sorted(kept, key=lambda i: cloud[i])
    assert all(i == cloud.index(cloud[i]) for i in kept)


@given(points, values)
def test_leader_is_the_least_that_fits(cloud, most):
    found = leader(cloud, cloud, most)
    able = [point for point in cloud if point[0] <= most]
    assert found == min(able, key=lambda point: (point[1], point[0]), default=None)
    if found is not None and all(math.isfinite(x) for x in found):
        assert found in [cloud[i] for i in front(cloud)]


def test_no_number_is_refused():
    with pytest.raises(ValueError, match="must be numbers"):
        front([(1.0, math.nan)])
