"""`thinwire bench collectives`: networks are what their bars are about, rows are judged rightly, a small one is really run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.bench.collectives import DEFAULTS, TURNS_S, Case, _predictions, _row, measure, network, turns_worth
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.synthesis.bounds import bound
from warm import warm_labs

MIB = 1 << 20


def rates(name: str) -> dict[tuple[str, str], float]:
    return {(link.source, link.target): link.bandwidth_bps.value for link in network(name).links}


def test_networks_are_those_of_the_bars() -> None:
    whole, half = rates("two-racks"), rates("two-racks-half")
    assert whole.keys() == half.keys()
    assert {ends for ends in whole if half[ends] != whole[ends]} == {
        ends for ends in whole if "switch" in ends and any(end.startswith("rack-") for end in ends)
    }
    assert all(half[ends] in (whole[ends], whole[ends] / 2) for ends in whole)
    quarter, slow = rates("one-slow-host"), rates("one-half-host")
    fast = max(quarter.values())
    assert {ends for ends in quarter if quarter[ends] != fast} == {ends for ends in quarter if "slow" in ends}
    assert quarter["slow", "switch"] == fast / 4 and slow["slow", "switch"] == slow["switch", "slow"] == fast / 2
    # What a ring takes on links like these is known: 2 (p-1)/p n over the slowest card; the bound is one message over it.
    assert bound(network("one-slow-host"), "all_reduce", 4 * MIB).seconds == pytest.approx(4 * MIB * 8 * 1.0466 / 25e6, rel=1e-3)


@pytest.mark.parametrize(
    "case, ours_s, ordered_s, held",
    [
        (Case("all_reduce", 4 * MIB, 1.5), 0.66, None, True),
        (Case("all_reduce", 4 * MIB, 1.5), 0.68, None, False),
        (Case("all_reduce", 4 * MIB, 1.0, of_bound=1.05), 0.66, None, False),
        (Case("all_reduce", 4 * MIB, 1.0, of_bound=1.1), 0.66, None, True),
        (Case("all_reduce", 4 * MIB, 1.0, ordered=1.5), 0.5, 0.74, False),
        (Case("all_reduce", 4 * MIB, 1.0, ordered=1.5), 0.5, 0.76, True),
    ],
)
def test_a_row_is_held_by_all_its_bars(case: Case, ours_s: float, ordered_s: float | None, held: bool) -> None:
    turns = {"native": [1.2, 1.0], "ours": [ours_s, 2.0], "ordered": [ordered_s or 0.0]}
    found = {"algorithm": "ring", "turns": turns, "predicted": {"ours": 0.45, "native": 1.0}}
    row = _row(equal_hosts(8, 1e8), case, found)
    assert row["held"] == held and row["ratio"] == 1.0 / ours_s
    assert row["of_bound"] == pytest.approx(ours_s / (2 * 7 / 8 * 4 * MIB * 8 * 1.0466 / 1e8), rel=1e-3)
    assert row["error"] == pytest.approx(abs(0.45 - ours_s) / ours_s)


@given(turn_s=st.lists(st.floats(1e-6, 100), min_size=1, max_size=3), wanted=st.integers(1, 9))
def test_turns_take_a_bounded_time(turn_s: list[float], wanted: int) -> None:
    """All that are wanted where there is room, else as many as fit, and one always."""
    turns = turns_worth(turn_s, wanted)
    assert 1 <= turns <= wanted
    assert turns == 1 or turns * sum(turn_s) <= TURNS_S
    assert turns == wanted or (turns + 1) * sum(turn_s) > TURNS_S * (1 - 1e-9)


@pytest.mark.parametrize(("turn_s", "turns"), [([0.6, 0.6], 3), ([5.0, 0.8, 1.3], 2), ([10.0, 4.0], 1), ([60.0, 0.1], 1)])
def test_long_calls_take_fewer_turns(turn_s: list[float], turns: int) -> None:
    assert turns_worth(turn_s, 3) == turns


def test_predictions_are_judged_by_the_median_and_the_worst() -> None:
    assert _predictions([{"error": error} for error in (0.01, 0.09, 0.19)])["held"]
    assert not _predictions([{"error": error} for error in (0.01, 0.09, 0.21)])["held"]
    assert not _predictions([{"error": error} for error in (0.01, 0.11, 0.19)])["held"]


@pytest.mark.long
@pytest.mark.lab
@pytest.mark.timeout(120)
def test_a_small_network_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    cases = Case("broadcast", 256 * 1024, 0.1), Case("all_reduce", 64, 0.01, back_to_back=0.01)
    options = {**DEFAULTS, "turns": 2, "repeats": 3, "tried": 1, "short_s": 1.0}
    with warm_labs():
        rows = measure(equal_hosts(3, 100e6), cases, options)
    assert [row["case"] for row in rows] == ["3-hosts, after a barrier", "3-hosts, back to back"] * 2
    for row in rows:
        assert row["held"] and row["predicted_s"] > 0 and row["native_predicted_s"] > 0 and row["hosts"] == 3
        assert row["turns"] == 2
    printed = capfd.readouterr().err
    for what in ("choosing what to run", "native, once", "ours, once", "turn 2 of 2", "predicting"):
        assert f"3-hosts: 0 of 2: broadcast of 256 KiB: {what}" in printed
    whole = rows[0]
    assert whole["bound_s"] == pytest.approx(256 * 1024 * 8 * 1.0466 / 100e6, rel=0.01)
    assert 0.7 * whole["bound_s"] < whole["native_s"] < 20 * whole["bound_s"]  # the bucket of a shaped link lets 16 KiB ride free
