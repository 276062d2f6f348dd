"""`thinwire bench applications`: bars, what is refused before any run, and one small race, whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from thinwire.bench import applications
from thinwire.bench.applications import bars, example_of
from thinwire.bench.registry import find
from thinwire.bench.sync import Link, setting_of, shaped
from thinwire.bench.sync_methods import make_method
from thinwire.cluster import load_cluster
from thinwire.config.task import Kind
from thinwire.errors import UserError
from thinwire.plan.cost import predict
from thinwire.tasks.catalogue import CATALOGUE


def measured(method: str, seconds: float | None, waits: float, link_bps: float) -> dict[str, Any]:
    return {"task": "qa", "method": method, "link_bps": link_bps, "seconds_to_score": seconds, "waits": waits}


@pytest.mark.parametrize(
    ("ours_s", "waits", "link_bps", "asked", "held"),
    [
        (10.0, 0.6, 10e6, True, True),
        (11.0, 0.6, 10e6, True, False),
        (None, 0.6, 10e6, True, False),
        (None, 0.4, 10e6, False, True),
        (30.0, 0.6, 100e6, False, True),
    ],
)
def test_int4_has_to_be_sooner_where_ddp_waits(
    ours_s: float | None, waits: float, link_bps: float, asked: bool, held: bool
) -> None:
    rows = [measured("ddp", 30.0, waits, link_bps), measured("int4", ours_s, 0.1, link_bps)]
    (row,) = bars(rows)
    assert (row["bar"] is not None, row["held"]) == (asked, held)
    assert row["ratio"] == (30.0 / ours_s if ours_s else None)
    assert bars(rows[:1]) == []


def test_each_task_has_an_example() -> None:
    assert {example_of(kind).task.kind for kind in CATALOGUE} == set(CATALOGUE) == set(Kind.__args__) - {"generation"}  # type: ignore[attr-defined]


def test_what_is_wrong_is_one_line() -> None:
    for cluster, options, message in (
        (None, {"links": ["10 Mbit/s"]}, "--cluster"),
        ("four-hosts-100mbit", {"tasks": ["knitting"]}, "there is no 'knitting'"),
        ("four-hosts-100mbit", {"links": [10]}, "name the unit"),
    ):
        with pytest.raises(UserError, match=message):
            find("applications")(cluster, options)
    with pytest.raises(UserError, match="not shared out evenly"):
        find("large_batch")("four-hosts-100mbit", {"batches": [63]})


@pytest.mark.long
def test_a_small_race_is_whole_and_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback, where nothing is predicted."""
    options = {
        "tasks": ["intent_slots"],
        "methods": ["ddp", "int4"],
        "ranks": 2,
        "steps": 3,
        "turns": 1,
        "turn_s": 0.0,
        "json": str(tmp_path / "rows.json"),
    }
    rows = find("applications")(None, options)
    ddp, int4, bar = rows
    assert (ddp["method"], int4["method"], ddp["short_of_ddp"]) == ("ddp", "int4", 0.0)
    for row in (ddp, int4):
        assert 0 <= row["score"] <= 100 and not row["held"] and 0 < row["seconds_to_score"] <= 3 * row["step_s"]
    assert int4["wire_bytes_per_step"] < 0.3 * ddp["wire_bytes_per_step"] and bar["ratio"] > 0
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows[:2]
    monkeypatch.setattr(applications, "compare", None)
    assert find("applications")(None, options) == rows


@pytest.mark.long
def test_steps_are_predicted_on_links() -> None:
    """DDP sends eight times what int4 does, and waits for as much longer."""
    application = applications.read_application("intent_slots", 4, {})
    cluster = shaped(load_cluster("four-hosts-100mbit"), Link(10e6))
    methods = [make_method(name, application.base) for name in ("ddp", "int4")]
    ddp, int4 = (predict(*setting_of(method, application.workload, cluster)) for method in methods)
    assert ddp.compute_s == int4.compute_s and ddp.exposed_s > 3 * int4.exposed_s > 0
