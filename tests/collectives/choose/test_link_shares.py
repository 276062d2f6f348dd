"""Max-min fair rates: no link carries more than it can, and every connection has a link that holds it back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.collectives.choose.links import Sharing


@given(
    capacity=st.lists(st.sampled_from([1.0, 2.5, 10.0, 1e9]), min_size=1, max_size=6),
    data=st.data(),
)
def test_every_connection_has_a_bottleneck(capacity: list[float], data: st.DataObject) -> None:
    """Its rate is the greatest on a full link (Bertsekas and Gallager: that is what max-min fair means)."""
    link = st.integers(0, len(capacity) - 1)
    routes = data.draw(st.lists(st.lists(link, min_size=1, max_size=4, unique=True), min_size=1, max_size=12))
    active = data.draw(st.lists(st.integers(0, len(routes) - 1), min_size=1, unique=True).map(sorted))
    sharing = Sharing(routes, capacity)
    rates = dict(zip(active, sharing.rates(np.array(active))[0], strict=True))
    used = [sum(rate for one, rate in rates.items() if number in routes[one]) for number in range(len(capacity))]
    assert all(amount <= most * (1 + 1e-9) for amount, most in zip(used, capacity, strict=True))
    for one, rate in rates.items():
        assert any(
            used[number] >= capacity[number] * (1 - 1e-9)
            and rate >= max(rates[other] for other in active if number in routes[other]) * (1 - 1e-9)
            for number in routes[one]
        )


def test_what_is_left_goes_to_those_who_can_use_it() -> None:
    """Two share link 0 with 1 each; the third has link 1 for itself but for one of them: 10 - 1."""
    rates = Sharing([[0], [0, 1], [1]], [2.0, 10.0]).rates(np.array([0, 1, 2]))[0]
    assert rates == pytest.approx([1, 1, 9])


def test_what_is_acknowledged_takes_its_share_on_the_route_back() -> None:
    """Two nodes that both send: a tenth of each direction goes to acknowledgements of the other, at first guess."""
    sharing = Sharing([[0], [1]], [11.0, 11.0], back=[[1], [0]], acknowledged=0.1)
    rates, carried = sharing.rates(np.array([0, 1]))
    assert rates == pytest.approx([11 - 1.1] * 2) and carried == pytest.approx([1.1 * 9.9] * 2)
    rates, carried = sharing.rates(np.array([0]))
    assert rates == pytest.approx([11.0]) and carried == pytest.approx([11.0, 1.1])


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.floats(1e-3, 1e12))
def test_links_that_tie_give_the_same_rate_to_the_bit(flows: list[int], share: float) -> None:
    """k connections on a link of k shares: whatever the sums round to, all end in one event of a simulation."""
    routes = [[link] for link, count in enumerate(flows) for _ in range(count)]
    capacity = [sum([share] * count) for count in flows]
    rates = Sharing(routes, capacity).rates(np.arange(len(routes)))[0]
    assert len(set(rates.tolist())) == 1
