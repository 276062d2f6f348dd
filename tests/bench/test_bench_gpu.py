"""The benchmark of devices: how its rows come from what was measured, and all of it that a CPU can run."""

from types import SimpleNamespace
from typing import Any

import pytest

from thinwire.bench import collectives, gpu
from thinwire.bench.gpu import DEFAULTS, RACK_CASES, SHOWN, collective_table, run, step_table, term_table
from thinwire.cluster import load_cluster
from thinwire.errors import UserError
from thinwire.record import StepCost

SMALL = {"preset": "1m", "large": "1m", "micro_batch": 1, "sequence": 16, "steps": 2, "numel": 1 << 16, "turns": 1, "ranks": 2}
METHODS = ["none", "ddp", "int4", "fsdp", "sharded", "none2", "streaming2-int4"]
LEARNS = {"seeds": 1, "train_steps": 8, "model": {"layers": 2, "width": 32, "heads": 2, "context": 64}}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_a_cpu_can_run_is_whole() -> None:
    """All parts but those of a lab, with replicas that end equal where they exchange."""
    parts = ["codecs", "steps", "losses"]
    rows = run(None, {**DEFAULTS, **SMALL, **LEARNS, "parts": parts, "methods": METHODS, "kinds": ["int4", "sign"]})
    assert {tuple(row) for row in rows} == {tuple(rows[0])}, "one table"
    assert [row["held"] for row in rows] == [None] * len(rows), "there is no bar for CPUs"
    shown = {part: [row["what"] for row in rows if row["shows"] == part] for part in SHOWN}
    assert shown["codecs"] == [f"{kind} {what} against a copy" for kind in ("int4", "sign") for what in ("encode", "decode")]
    assert all(row["note"] == "the CPU's bits: yes" for row in rows if row["shows"] == "codecs")
    assert shown["steps"] == [
        *("none against ddp", "ddp", "int4 against ddp", "fsdp against ddp", "sharded against fsdp", "none2 against ddp"),
        "streaming2-int4 against ddp",
    ]
    apart = [float(row["note"].removeprefix("weights apart by ")) for row in rows if row["shows"] == "steps"]
    assert [one > 0 for one in apart] == [name.startswith("none") for name in METHODS]
    assert shown["losses"] == ["int8 against ddp", "int4 against ddp", "sharded against fsdp"]
    assert len(shown["time"]) == 1


@pytest.mark.long
def test_what_codes_cost_is_measured_where_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """By launches, as on a device, where nobody looks at what a group delivers that sends nothing."""
    monkeypatch.setattr("thinwire.compress.stages.launched", lambda device: True)
    (row,) = gpu._coding({**DEFAULTS, **SMALL})
    assert row["value"] == pytest.approx(row["ours_s"] / row["other_s"] - 1) and row["bar"] == "<= 0.05"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_device", lambda number: gpu.torch.device("meta"))


def one(method: str, step_s: float, peak_bytes: int) -> dict[str, Any]:
    return {"method": method, "step_s": step_s, "peak_bytes": peak_bytes, "gradient_bytes": 100, "weights_apart": 0.0}


def test_steps_are_held_to_their_bars_on_the_cluster_of_the_bars_alone(on_gpu: None) -> None:
    measured = [one("ddp", 1.5, 400), one("int8", 0.5, 500), one("int4", 0.2, 640), one("none30", 0.1, 300)]
    measured.append(one("streaming30-int4", 0.101, 500))
    found = {"ranks": 4, "device": "H", "preset": "30m", "methods": measured}
    names = [its["method"] for its in measured]
    rows = {row["what"]: row for row in step_table("four-hosts-1gbit", names, found)}
    assert rows["int8 against ddp"]["value"] == pytest.approx(3.0) and rows["int8 against ddp"]["held"] is False
    assert rows["int4 against ddp"]["bar"] == ">= 6" and rows["int4 against ddp"]["held"] is True
    assert rows["streaming30-int4 against none30"]["held"] is True
    above = rows["int4 above ddp, in sizes of the gradients"]
    assert above["value"] == pytest.approx(2.4) and above["bar"] == "<= 2.3" and above["held"] is False
    thin = step_table("four-hosts-100mbit", names, found)
    assert {row["bar"] for row in thin if row["shows"] == "steps"} == {None}


def cost(**changes: float) -> StepCost:
    parts = {"step_s": 1.0, "compute_s": 0.3, "exposed_s": 0.6, "waiting_s": 0.0, "optimizer_s": 0.08, "host_s": 0.02}
    return StepCost.model_validate(parts | {"tokens_per_s": 1.0, "wire_bytes_per_step": 1.0} | changes)


def test_terms_are_held_by_their_share_or_by_milliseconds(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace(item="token")
    facts: Any = SimpleNamespace(predicted=cost(step_s=1.09, compute_s=0.36, optimizer_s=0.076), measured=cost(), record=record)
    monkeypatch.setattr(
        gpu, "card_rows", lambda _: [type("Row", (), {"difference": 0.07}), type("Row", (), {"difference": 0.09})]
    )
    rows = {row["what"]: row for row in term_table("case", facts)}
    held = {what: row["held"] for what, row in rows.items()}
    assert held["step: error"] is True and held["compute: error"] is False and held["waiting for the wire: error"] is True
    assert held["optimizer: error"] is True and "4 ms" in rows["optimizer: error"]["note"]
    assert rows["parts that do not add up to the step"]["value"] == pytest.approx(0.0)
    assert rows["cards above the ledger"]["value"] == 0.09 and held["cards above the ledger"] is False


def test_collectives_are_held_to_nccl_and_to_the_bound(on_gpu: None) -> None:
    cluster = load_cluster(DEFAULTS["racks"])
    assert cluster.world_size == 8
    found = [
        collectives._row(cluster, case, {"turns": turns, "algorithm": "ring", "predicted": {"ours": 1.0, "native": 1.0}})
        for case in RACK_CASES
        for turns in [{"native": [0.25], "ours": [0.07 if case.op == "all_reduce" else 0.26]}]
    ]
    rows = collective_table(RACK_CASES, found)
    assert [row["what"].split()[0] for row in rows] == ["all_reduce", "all_reduce", *(case.op for case in RACK_CASES[1:])]
    assert [row["held"] for row in rows] == [True, True, False, False, False, False]
    assert rows[1]["value"] == pytest.approx(0.07 / rows[1]["other_s"])


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(UserError, match="there is no 'speed'"):
        run(None, {**DEFAULTS, "parts": ["speed"]})
