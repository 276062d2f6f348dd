"""`thinwire bench regret`: its clusters, its bars, and that cells which are in the file are not run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from thinwire.bench import regret
from thinwire.bench.registry import find
from thinwire.errors import UserError


def row(cell: str, plan: str, predicted_s: float, measured_s: float | None, tokens: float = 1.0) -> dict[str, Any]:
    error = predicted_s / measured_s - 1 if measured_s else None
    return {
        "cell": cell,
        "plan": plan,
        "predicted_s": predicted_s,
        "measured_s": measured_s,
        "error": error,
        "tokens": tokens,
        "failed": "",
    }


def test_all_hosts_of_a_cluster_compute_as_much_together() -> None:
    for name in regret.CLUSTERS:
        cluster = regret.cluster_of(name)
        assert 2 <= cluster.world_size <= 8 and sum(cluster.declared_rates or ()) == pytest.approx(regret.TOTAL_FLOPS_PER_S)
    assert len(regret.CLUSTERS) == 12 and len(regret.GRID) == 8


def test_a_cell_is_near_if_the_plan_predicted_fastest_is_within_5_percent_of_the_fastest() -> None:
    rows = [
        row("a", "pipeline", 1.0, 1.04),
        row("a", "shard", 1.1, 1.0),
        row("b", "shard", 1.0, 2.0),
        row("b", "diloco", 1.2, 1.5),
    ]
    bars = {one["bar"]: one for one in regret.judged(rows)}
    assert bars["near"]["value"] == 0.5 and bars["winners"]["value"] == 2
    dearer = [*rows[:2], row("b", "shard", 1.0, 2.0), row("b", "diloco", 1.2, 1.5, tokens=1.5)]
    assert {one["bar"]: one for one in regret.judged(dearer)}["near"]["value"] == 1.0
    assert bars["median error"]["value"] == pytest.approx((0.1 + 0.2) / 2)
    rows.append(row("b", "tensor", 1.0, None) | {"failed": "error: memory: 2 ranks would need about 9 GiB"})
    assert {one["bar"]: one for one in regret.judged(rows)}["out of memory"]["value"] == 1


def test_cells_that_are_in_the_file_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"2 at 5 Mbit/s; {model}" for model in regret.MODELS]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [row(names[0], "shard", 1.0, 1.0)]}))
    ran: list[str] = []
    monkeypatch.setattr(regret, "_cell", lambda cell, steps: ran.append(cell) or [row(cell, "shard", 1.0, 1.0)])
    rows = find("regret")(None, {"cells": ["2 at 5 Mbit/s"], "json": str(path)})
    assert ran == names[1:] and [one["cell"] for one in rows if "plan" in one] == names
    assert [one["cell"] for one in json.loads(path.read_text())["rows"]] == names
    with pytest.raises(UserError, match=r"--cells nowhere: there are 2 at 5 Mbit/s; width 128"):
        find("regret")(None, {"cells": ["nowhere"]})
