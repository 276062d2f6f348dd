"""The ledger: sums are exact, snapshots subtract, labels belong to the thread that issues."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_stream import Device
from thinwire.collectives.clock import DeviceClock, HostClock
from thinwire.collectives.ledger import SETUP_STEP, Call, Group, Ledger, Total, difference
from thinwire.collectives.wire import sent_bytes

WORLD = Group("0", 1, 4)

calls = st.tuples(
    st.sampled_from(["", "loss", "bucket 0"]),
    st.sampled_from(["all_reduce", "all_gather", "broadcast", "send", "barrier"]),
    st.integers(0, 4096),
    st.integers(0, 3),
)


def enter(ledger: Ledger, label: str, op: str, message_bytes: int, root: int) -> Total:
    with ledger.label(label):
        return ledger.enter(op, message_bytes, WORLD, root)


@given(st.lists(calls), st.lists(calls))
def test_snapshots_subtract_to_what_was_entered_between_them(first, second) -> None:
    ledger, fresh = Ledger(), Ledger()
    for call in first:
        enter(ledger, *call)
    before = ledger.snapshot()
    for call in second:
        enter(ledger, *call)
        enter(fresh, *call)
    assert difference(ledger.snapshot(), before) == fresh.snapshot()


@given(st.lists(calls))
def test_the_total_is_the_sum_of_the_entries_and_of_the_formula(entered) -> None:
    ledger = Ledger()
    for call in entered:
        enter(ledger, *call)
    rows = ledger.entries(rank=1)
    expected = sum(sent_bytes(op, n, WORLD.size, WORLD.rank, root) for _, op, n, root in entered)
    assert ledger.sent_bytes == sum(row["wire_bytes"] for row in rows) == expected
    assert sum(row["calls"] for row in rows) == len(entered)


def test_a_snapshot_does_not_change_afterwards() -> None:
    ledger = Ledger()
    enter(ledger, "", "all_reduce", 8, 0)
    snapshot = ledger.snapshot()
    enter(ledger, "", "all_reduce", 8, 0)
    assert [total.calls for total in snapshot.values()] == [1]


def test_labels_nest_and_end_also_after_an_error() -> None:
    ledger = Ledger()
    try:
        with ledger.label("outer"):
            with ledger.label("inner"):
                ledger.enter("all_reduce", 1, WORLD)
            ledger.enter("all_reduce", 1, WORLD)
            raise RuntimeError
    except RuntimeError:
        ledger.enter("all_reduce", 1, WORLD)
    assert [call.label for call in ledger.snapshot()] == ["inner", "outer", ""]


def test_a_thread_does_not_inherit_a_label() -> None:
    ledger = Ledger()
    with ledger.label("main"):
        thread = threading.Thread(target=ledger.enter, args=("all_reduce", 1, WORLD))
        thread.start()
        thread.join(10)
    assert [call.label for call in ledger.snapshot()] == [""]


def test_steps_and_seconds() -> None:
    ledger = Ledger()
    total = enter(ledger, "", "all_reduce", 8, 0)
    for ledger.step in (3, 5, 7):
        enter(ledger, "", "all_reduce", 8, 0)
    (entry,) = ledger.snapshot().values()
    assert (entry.first_step, entry.last_step, entry.calls, entry.seconds) == (SETUP_STEP, 7, 4, 0.0)
    ledger.completed(total, HostClock(), issued=0.0)
    (entry,) = ledger.snapshot().values()
    assert entry.seconds > 0


def test_on_a_device_seconds_lie_between_events_and_nobody_waits_for_them() -> None:
    """Three calls of 2 s of a device that the host is ahead of: what is not over is missing, and comes with a later look."""
    device, ledger = Device(), Ledger()
    clock = DeviceClock(device.event)
    for _ in range(3):
        issued = clock.now()
        total = enter(ledger, "", "all_reduce", 8, 0)
        device.enqueue(2.0)
        ledger.completed(total, clock, issued)
    for after_s, seconds in ((1.9, 0.0), (4.1, 4.0), (6.0, 6.0), (9.0, 6.0)):
        device.reach(after_s)
        (entry,) = ledger.snapshot().values()
        assert (entry.calls, entry.seconds) == (3, pytest.approx(seconds))
    assert device.waits == 0 and not ledger._under_way


def test_calls_that_are_over_do_not_pile_up_unread() -> None:
    device, ledger = Device(), Ledger()
    clock = DeviceClock(device.event)
    for _ in range(100):
        total = enter(ledger, "", "all_reduce", 8, 0)
        ledger.completed(total, clock, clock.now())
        device.enqueue(1.0)
        device.reach(device.end_s)
    assert len(ledger._under_way) <= 1


def test_the_axis_is_the_groups_own_until_the_ledger_knows_better() -> None:
    ledger = Ledger()
    group = Group("7", 0, 2, "tensor")
    ledger.enter("all_reduce", 8, group)
    ledger.axes["7"] = "data"
    ledger.enter("all_reduce", 8, group)
    assert [call.axis for call in ledger.snapshot()] == ["tensor", "data"]


def test_no_entry_is_lost_when_threads_enter_at_once() -> None:
    ledger = Ledger()

    def work(label: str) -> None:
        for _ in range(500):
            enter(ledger, label, "all_reduce", 8, 0)

    threads = [threading.Thread(target=work, args=(label,)) for label in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    call = Call(label="a", axis="world", op="all_reduce", world_size=4, message_bytes=8)
    assert ledger.snapshot()[call].calls == 1000
    assert ledger.sent_bytes == 2000 * sent_bytes("all_reduce", 8, 4, 1)


def test_entries_are_rows_for_a_json_file() -> None:
    ledger = Ledger(step=2)
    enter(ledger, "loss", "all_reduce", 8, 0)
    assert json.loads(json.dumps(ledger.entries(rank=1))) == [
        {
            "rank": 1,
            "label": "loss",
            "axis": "world",
            "op": "all_reduce",
            "world_size": 4,
            "message_bytes": 8,
            "calls": 1,
            "wire_bytes": 12,
            "seconds": 0.0,
            "first_step": 2,
            "last_step": 2,
        }
    ]
