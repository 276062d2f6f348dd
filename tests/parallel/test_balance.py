"""The best cut, against all cuts."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import UserError
from thinwire.parallel.balance import cut

COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=8)


def slowest(stages: list[range], costs: list[int], rates: list[float], crossing: list[int], per_byte: list[float]) -> float:
    computing = [sum(costs[i] for i in units) / rate for units, rate in zip(stages, rates, strict=True)]
    sending = [crossing[units[-1]] * seconds for units, seconds in zip(stages, per_byte, strict=False)]
    return max(*computing, *sending, 0.0)


@given(costs=COSTS, data=st.data())
def test_no_cut_has_a_faster_slowest_stage(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    rates = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=stages, max_size=stages))
    crossing = data.draw(st.lists(st.integers(0, 9), min_size=len(costs), max_size=len(costs)))
    per_byte = data.draw(st.lists(st.sampled_from([0.0, 1.0, 5.0]), min_size=stages - 1, max_size=stages - 1))
    found = cut(costs, stages, rates, crossing, per_byte)
    assert [unit for units in found for unit in units] == list(range(len(costs)))
    assert all(len(units) > 0 for units in found)
    bounds = (((0, *ends), (*ends, len(costs))) for ends in combinations(range(1, len(costs)), stages - 1))
    best = min(slowest([range(a, b) for a, b in zip(*ends, strict=True)], costs, rates, crossing, per_byte) for ends in bounds)
    assert slowest(found, costs, rates, crossing, per_byte) == pytest.approx(best)


def test_more_stages_than_units_is_refused() -> None:
    with pytest.raises(UserError, match="4 stages cannot be made of 3 units"):
        cut([1, 1, 1], 4)
