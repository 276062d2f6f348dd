"""Laws of the verdict, on steps whose parts are known: what costs most is named, and what a remedy makes of a step is what a step
with it takes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import OPTIMIZER_S, OUTSIDE_S, Script

from thinwire.cluster import Cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.spec import ClusterSpec, expand
from thinwire.errors import UserError
from thinwire.why.causes import (
    BANDWIDTH,
    CARD,
    HOST,
    LATENCY,
    LOADER,
    NOTHING,
    ORDER,
    OVERLAP,
    Case,
    causes,
)
from thinwire.why.remedies import remedies
from thinwire.why.replay import replay
from thinwire.why.steps import period, profile
from thinwire.why.text import as_record, judge, ranks
from thinwire.why.trace import PLAIN, STEP, Mark, Trace

MIB = 1 << 20


def hosts(*rates: str, uplink: str = "") -> Cluster:
    """With `uplink` the first half stands in one rack, the others in another."""
    places = {"host": [], "rack": []}
    for number, rate in enumerate(rates):
        rack = {"rack": f"r{2 * number // len(rates)}"} if uplink else {}
        places["host"].append({"name": f"h{number}", "card": {"bandwidth_bps": rate}} | rack)
    if uplink:
        places["rack"] = [{"name": name, "uplink": {"bandwidth_bps": uplink}} for name in ("r0", "r1")]
    return expand(ClusterSpec.model_validate({"name": "known", **places}))


def interleaved(cluster: Cluster) -> Cluster:
    half = cluster.world_size // 2
    return replace(
        cluster, ranks=tuple(name for pair in zip(cluster.ranks[:half], cluster.ranks[half:], strict=True) for name in pair)
    )


FAST, SLOW = "100 Mbit/s", "25 Mbit/s"
SLOW_CARD, EQUAL = hosts(FAST, FAST, FAST, SLOW), hosts(*[FAST] * 4)
RACKS = hosts(*[FAST] * 4, uplink="30 Mbit/s")
MANY = Script(cluster=equal_hosts(4, 1e9), forward_s=0.005, buckets=(2048,) * 200)

PLANTED = [
    (CARD, Script(cluster=SLOW_CARD), Script(cluster=EQUAL)),
    (ORDER, Script(cluster=interleaved(RACKS)), Script(cluster=RACKS)),
    (HOST, Script(cluster=EQUAL, buckets=(100_000,), slower={2: 2.5}), Script(cluster=EQUAL, buckets=(100_000,))),
    (LOADER, Script(cluster=EQUAL, data_s=0.2, buckets=(100_000,)), Script(cluster=EQUAL, buckets=(100_000,))),
    (LATENCY, MANY, replace(MANY, buckets=(200 * 2048,))),
    (OVERLAP, Script(cluster=EQUAL, buckets=(MIB // 2,), late=True), Script(cluster=EQUAL, buckets=(MIB // 16,) * 8)),
]


@pytest.mark.parametrize(("planted", "script", "remedied"), PLANTED, ids=[planted for planted, _, _ in PLANTED])
def test_the_planted_cause_is_named_and_its_remedy_is_predicted(planted: str, script: Script, remedied: Script) -> None:
    case = script.case()
    found = causes(case)
    assert found[0].name == planted
    assert found[0].saving_s == pytest.approx(script.step_s - remedied.step_s, rel=0.05)
    assert remedies(case, found)[0].step_s == pytest.approx(remedied.step_s, rel=0.05)


def test_the_terms_of_each_rank_add_up_to_the_step() -> None:
    for _, script, _ in PLANTED:
        case = script.case()
        assert case.profile.step_s == pytest.approx(script.step_s)
        for row in ranks(case):
            terms = sum(value for key, value in row.items() if key.endswith("_s"))
            assert terms == pytest.approx(script.step_s)
            assert row["optimizer_s"] == pytest.approx(OPTIMIZER_S) and row["outside_s"] == pytest.approx(OUTSIDE_S)
            assert row["data_s"] == pytest.approx(script.data_s)


def test_ranks_wait_for_the_slow_one_and_all_for_the_wire() -> None:
    script = Script(cluster=EQUAL, slower={1: 2.0})
    rows = ranks(script.case())
    assert [row["waiting_s"] for row in rows] == pytest.approx([3 * script.forward_s, 0.0] + [3 * script.forward_s] * 2)
    assert len({round(row["exposed_s"], 9) for row in rows}) == 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3))
def test_clocks_may_show_anything(shifts: list[float]) -> None:
    script = PLANTED[2][1]
    known = script.case().profile
    shifted = profile(script.traces([0.0, *shifts]), [0.0, *shifts])
    assert shifted.waiting_s == pytest.approx(known.waiting_s, abs=1e-9)
    assert shifted.exposed_s == pytest.approx(known.exposed_s, abs=1e-9)
    assert shifted.step_s == pytest.approx(known.step_s)


def test_a_replay_of_what_was_is_what_was() -> None:
    for _, script, _ in PLANTED:
        case = script.case()
        assert replay(case.profile.programs, case.prices.measured) == pytest.approx(script.step_s, rel=1e-6)


def test_a_script_that_only_computes_has_nothing_to_be_named() -> None:
    found = causes(Script(cluster=EQUAL, forward_s=1.0, buckets=(1000,)).case())
    assert found[0].name == NOTHING


def test_where_all_links_are_equal_and_all_overlaps_bandwidth_is_named() -> None:
    verdict = judge(Script(cluster=EQUAL, buckets=(4 * MIB,) * 4).case())
    assert verdict.causes[0].name == BANDWIDTH
    names = [one.name for one in verdict.remedies]
    assert "one host is enough" in names and "gradients in int4" in names and any("DiLoCo" in name for name in names)
    record = as_record(verdict)
    assert record["cause"] == BANDWIDTH and record["links"][0]["of_step"] > 0.8


def test_steps_without_an_optimizer_are_found_by_the_pattern_of_calls() -> None:
    assert period("xyabcabcabc") == 3
    assert period("abcd") == 0
    script = Script(cluster=EQUAL, buckets=(1000, 2000), steps=12)
    known = script.case().profile
    bare = [[event for event in trace if getattr(event, "what", "") != "step"] for trace in script.traces()]
    found = profile(bare, [0.0] * 4)
    assert len(found.calls) == 2 and found.step_s == pytest.approx(known.step_s)


def thinned(trace: Trace, sooner_s: float) -> Trace:
    """With the calls of one step of three, of which the others are so much shorter."""
    found: Trace = []
    number, shift_s = -1, 0.0
    for event in trace:
        ends = isinstance(event, Mark) and event.what == STEP
        if ends:
            shift_s += sooner_s * (number % 3 > 0)
            number += 1
        for name in ("at", "issued", "begun", "ended"):
            if getattr(event, name, None) is not None:
                setattr(event, name, getattr(event, name) - shift_s)
        if number % 3 == 0 or isinstance(event, Mark):
            found.append(event)
        if ends and number % 3:
            found.append(Mark(event.at, PLAIN))
    return found


def test_how_long_a_step_is_is_said_by_those_that_are_not_noted() -> None:
    script = Script(cluster=EQUAL, buckets=(100_000, 200_000), steps=15, slower={1: 1.5})
    known = script.case()
    found = Case(profile([thinned(trace, 0.003) for trace in script.traces()], [0.0] * 4), EQUAL)
    assert found.profile.step_s == pytest.approx(known.profile.step_s - 0.003)
    assert found.profile.calls.keys() == known.profile.calls.keys() and found.busy_s == pytest.approx(
        [one * found.profile.step_s / known.profile.step_s for one in known.busy_s]
    )
    assert found.step_s() == pytest.approx(found.profile.step_s), "and so do predictions"


def test_what_never_repeats_is_refused() -> None:
    script = Script(cluster=EQUAL, steps=2)
    with pytest.raises(UserError, match="no step repeats: of 2 steps 2 are alike"):
        script.case()
