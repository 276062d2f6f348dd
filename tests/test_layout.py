"""The layout: ranks and coordinates are two names of one thing, and the groups of each axis divide the ranks."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import UserError
from thinwire.layout import AXES, EVERYONE, Layout

layouts = st.builds(Layout, **{axis: st.integers(1, 4) for axis in AXES})


@given(layouts)
def test_every_rank_has_its_own_coordinates(layout) -> None:
    places = [tuple(layout.coordinates(rank)[axis] for axis in AXES) for rank in range(layout.world_size)]
    assert places == list(product(*(range(degree) for degree in layout.degrees)))


@given(layouts, st.sampled_from(AXES))
def test_groups_of_an_axis_divide_the_ranks_and_differ_on_that_axis_only(layout, axis) -> None:
    groups = layout.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        places = [layout.coordinates(rank) for rank in group]
        assert [place.pop(axis) for place in places] == list(range(getattr(layout, axis)))
        assert all(place == places[0] for place in places)


@given(layouts)
def test_groups_of_two_axes_meet_in_one_rank_at_most(layout) -> None:
    member = {axis: {rank: k for k, group in enumerate(layout.groups(axis)) for rank in group} for axis in AXES}
    for one, other in combinations(AXES, 2):
        meetings = [(member[one][rank], member[other][rank]) for rank in range(layout.world_size)]
        assert len(set(meetings)) == len(meetings)


@given(layouts)
def test_the_last_used_axis_has_neighbouring_ranks(layout) -> None:
    used = [axis for axis in AXES if getattr(layout, axis) > 1]
    for group in layout.groups(used[-1]) if used else []:
        assert list(group) == list(range(group[0], group[0] + len(group)))


@given(layouts)
def test_gradients_are_averaged_over_replicas_and_over_the_ranks_of_a_sequence(layout) -> None:
    merged = ("data",) if layout.seq == 1 else ("data", "expert", "seq")
    for group in layout.of_gradients.groups("data"):
        places = [layout.coordinates(rank) for rank in group]
        found = {tuple(place.pop(axis) for axis in merged) for place in places}
        assert found == set(product(*(range(getattr(layout, axis)) for axis in merged)))
        assert all(place == places[0] for place in places)
    assert layout.of_gradients.replicas == layout.replicas * layout.seq
    assert layout.senders("data") == layout.of_gradients.groups("data") and layout.senders("seq") == layout.groups("seq")
    for axis in ("outer", "pipe", "tensor", EVERYONE):
        assert layout.senders(axis) == layout.groups(axis)


@given(layouts, st.integers(1, 2000))
def test_only_the_right_number_of_ranks_fits(layout, world_size) -> None:
    layout.check(layout.world_size)
    if world_size != layout.world_size:
        with pytest.raises(UserError, match=rf"needs {layout.world_size} ranks, but there are {world_size}; change \[layout\]"):
            layout.check(world_size)


def test_a_layout_reads_as_a_product() -> None:
    assert str(Layout(data=2, tensor=4)) == "data 2 x tensor 4"
    assert str(Layout()) == "data 1"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: Layout(data=0), "layout.data = 0: a degree is 1 or more"),
        (lambda: Layout(data=2).coordinates(2), "there is no rank 2 in layout data 2, which has 2"),
        (lambda: Layout(data=2).coordinates(-1), "there is no rank -1 in layout data 2"),
        (lambda: Layout().groups("dats"), "there is no axis 'dats'; axes: outer, pipe, data, expert, seq, shard, tensor"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(broken, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        broken()
    assert "\n" not in str(error.value)
