"""Rank 0's table, without ranks: what is complete is announced once, in one order; what can never be fails, naming who lacks."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from thinwire.adapters.horovod.controller import FUSION_BYTES, Controller, Leaving, Waiting
from thinwire.adapters.horovod.request import Request

VECTOR = (("float32", (4,)),)


def reduce(name: str, **fields: object) -> Request:
    return replace(Request(kind="allreduce", name=name, tensors=VECTOR, op="sum"), **fields)  # type: ignore[arg-type]


@given(st.integers(1, 4), st.data())
def test_whatever_the_order_each_request_is_announced_once_when_all_have_asked(ranks: int, data: st.DataObject) -> None:
    names = ["a", "b", "c", "d"]
    left = {rank: data.draw(st.permutations(names)) for rank in range(ranks)}
    controller, seen = Controller(ranks, 60), []
    asked = dict.fromkeys(names, 0)
    while any(left.values()):
        rank = data.draw(st.sampled_from([rank for rank, own in left.items() if own]))
        now = [left[rank].pop() for _ in range(data.draw(st.integers(1, len(left[rank]))))]
        for name in now:
            asked[name] += 1
        found = [part.request.name for one in controller.receive(rank, [reduce(name) for name in now]) for part in one.parts]
        assert all(asked[name] == ranks for name in found)
        seen += found
    assert sorted(seen) == names


def test_alike_requests_travel_together_up_to_the_limit() -> None:
    large = (("float32", (FUSION_BYTES // 8,)),)
    together = [reduce("a"), reduce("b"), reduce("c", op="max"), reduce("d"), *(reduce(n, tensors=large) for n in "efg")]
    found = Controller(1, 60).receive(0, together)
    assert [[part.request.name for part in one.parts] for one in found] == [["a", "b"], ["c"], ["d", "e"], ["f", "g"]]


def test_ranks_that_wait_for_each_other_fail_and_others_do_not() -> None:
    controller = Controller(4, 60)
    for rank, name in enumerate("xyzz"):
        assert not controller.receive(rank, [reduce(name)])
    asked = [reduce(name).key for name in "xyzz"]
    for rank in (0, 1, 2):  # rank 3 does something else still: it may ask for x, y and z
        assert not controller.receive(rank, [Waiting(asked[rank])])
    errors = {one.error for one in controller.receive(3, [Waiting(asked[3])])}
    assert len(errors) == 3
    assert any("allreduce of 'z': ranks 2 and 3 asked for it, and it is missing on ranks 0 and 1" in error for error in errors)
    assert not controller.receive(0, [Waiting(asked[0])])  # it was answered


def test_a_wait_that_crossed_its_answer_means_nothing() -> None:
    controller = Controller(2, 60)
    controller.receive(0, [reduce("x")])
    assert controller.receive(1, [reduce("x")])
    controller.receive(0, [Waiting(reduce("x").key)])
    assert not controller.receive(1, [reduce("y"), Waiting(reduce("y").key)])


def test_what_a_busy_rank_does_not_ask_for_fails_after_the_time_out() -> None:
    now = [0.0]
    controller = Controller(2, 60, lambda: now[0])
    controller.receive(0, [reduce("x"), Waiting(reduce("x").key)])
    now[0] = 61
    (found,) = controller.receive(0, [Waiting(reduce("x").key)])
    assert "missing on rank 1, after 60 s" in found.error


def test_joined_ranks_complete_sums_only_and_the_last_one_is_named() -> None:
    controller = Controller(3, 60)
    join = Request(kind="join", name="join")
    controller.receive(1, [join])
    assert not controller.receive(0, [reduce("x")])
    assert not controller.receive(2, [reduce("x")])[0].error
    controller.receive(0, [reduce("y", op="max")])
    assert "rank 1 joined" in controller.receive(2, [reduce("y", op="max")])[0].error
    assert not controller.receive(0, [join])
    assert controller.receive(2, [join])[0].result == 2


def test_a_process_set_has_one_number_and_twice_is_an_error() -> None:
    controller = Controller(2, 60)
    add = Request(kind="add_process_set", name="process set", splits=(1,))
    numbers = []
    for _ in range(2):
        controller.receive(0, [add])
        (found,) = controller.receive(1, [add])
        numbers.append(found.result if not found.error else found.error)
    assert numbers[0] == 1 and "process set of rank 1 already" in numbers[1]
    assert controller.receive(1, [reduce("own", members=1)])[0].ranks == (1,)


def test_the_end_of_a_rank_is_the_end_of_all() -> None:
    (found,) = Controller(2, 60).receive(1, [Leaving("has shut Horovod down")])
    assert found.end and found.ranks == (0, 1) and found.error == "rank 1 has shut Horovod down"
