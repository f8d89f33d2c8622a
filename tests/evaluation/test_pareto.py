"""The Pareto front against the definition, point by point."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmc.evaluation.pareto import between, front, leader

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


def test_between_two_points_lies_on_their_line_in_logarithms():
    points = [(0.1, 0.4), (0.4, 0.1), (0.3, 9.0)]
    assert between(points, 0.2) == pytest.approx(0.2)
    assert between(points, 0.1) == pytest.approx(0.4) and between(points, 0.4) == pytest.approx(0.1)
    assert between(points, 0.5) == pytest.approx(0.1) and between(points, 0.05) is None
    assert between([(1.0, 0.0), (0.5, 1e-2)], 0.75, least=1e-4) == pytest.approx(1e-2 * 1e-2 ** (math.log(1.5) / math.log(2)))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(1e-5, 10)), min_size=1, max_size=8), st.floats(0.01, 1))
def test_between_never_beats_the_front_above_nor_loses_to_the_one_below(cloud, size):
    value = between(cloud, size)
    below = leader(cloud, cloud, size)
    assert (value is None) == (below is None)
    if value is not None:
        assert min(y for _, y in cloud) * (1 - 1e-9) <= value <= below[1] * (1 + 1e-9)
