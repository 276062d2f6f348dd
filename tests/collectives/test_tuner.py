"""What is chosen from given seconds, for which sizes, and what is predicted of it. No ranks: a group of one."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fixed_schedules import quick
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.transport import Place
from thinwire.collectives.tuned import tuner as tuner_module
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.implementation import NATIVE, Call, Implementation, example, wire_bytes
from thinwire.collectives.tuned.tuner import Chosen, Tuner, size_class, undecided
from thinwire.traffic import Transfer


class Advised(Advisor):
    """Two that are not native, in this order."""

    def implementations(self, op: str, message_bytes: int, ranks: Any, root: int) -> list[Implementation]:
        return [Implementation("first", order=(0,)), Implementation("second", order=(0,)), NATIVE]


def place(rank: int = 0, size: int = 1) -> Place:
    return Place(dist.HashStore(), rank, tuple(range(size)), timedelta(seconds=20))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(place())
    yield made
    made.close()


@pytest.mark.parametrize(
    "seconds, best",
    [
        ([1.04, 1.00, 2.00], "first"),  # as good as the best, and advised before it
        ([1.06, 1.00, 2.00], "second"),
        ([0.96, 1.20, 1.00], "first"),
        ([0.98, 1.20, 1.00], "native"),  # not worth it
        ([0.0066, 0.02, 0.0100], "first"),
        ([0.0068, 0.02, 0.0100], "native"),  # a short call must win clearly
    ],
)
def test_the_first_of_equal_ones_wins_if_it_is_worth_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: list[float], best: str
) -> None:
    lines: list[str] = []
    tuner = Tuner(Advised(), report=lines.append)
    with quick():
        monkeypatch.setattr(tuner_module, "measure", lambda engine, implementations, call: seconds)
        assert tuner.decide(engine, example("all_reduce", 4000, engine)).name == best
    assert len(lines) == 1 and f": {best}, " in lines[0]
    assert [one.name for one in tuner.chosen.values()] == [best]


@pytest.mark.parametrize(
    ("seconds", "places"),
    [
        ([0.9, 0.001, 0.5], [0, 1, 2]),  # whatever it took, connecting may have been most of it
        ([10.0, 4.0, 9.0], [1]),
        ([10.0, 5.0, 1.0], [2]),
        ([10.0, 5.0, 6.0], [0, 1, 2]),
        ([10.0], [0]),
    ],
)
def test_what_has_lost_by_far_takes_no_turn(seconds: list[float], places: list[int]) -> None:
    assert undecided(seconds) == places


@given(st.integers(2, 1 << 40))
def test_a_class_holds_what_is_above_one_power_of_two_up_to_the_next(message_bytes: int) -> None:
    found = size_class(message_bytes)
    assert 2 ** (found - 1) < message_bytes <= 2**found


def predicted(order: Sequence[int], op: str, message_bytes: int) -> tuple[tuple[int, int, int], ...]:
    tuner = Tuner(Advised())
    ranks = tuple(range(len(order)))
    tuner.chosen[ranks, op, size_class(message_bytes), 0] = Implementation("reordered", order=tuple(order))
    transfer = Transfer(op=op, axis="data", message_bytes=message_bytes, label="", calls=1)
    return Chosen(tuner, equal_hosts(len(order), 1e9)).flows(transfer, ranks)


@pytest.mark.parametrize("op", ["all_reduce", "broadcast", "reduce"])
@given(order=st.permutations(range(5)))
def test_flows_of_ranks_in_another_order_are_what_each_of_them_sends(op: str, order: list[int]) -> None:
    """As the ledger enters it; a broadcast begins at the root, and every other rank gets the message once."""
    flows, n = predicted(order, op, 400), 400
    for rank in range(5):
        one = Engine(place(rank, 5))
        call: Call = example(op, n, one)
        sent = sum(size for source, _, size in flows if source == rank)
        assert sent == wire_bytes(Implementation("reordered", order=tuple(order)), call, one)
    if op == "broadcast":
        assert sorted(target for _, target, _ in flows) == [1, 2, 3, 4] and flows[0][0] == 0
