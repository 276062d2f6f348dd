"""Whole runs of a model of experts learn the same whatever replicas there are, and send what was predicted."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from small_run import config_of, losses, on_one_rank, run_training, scores

from pool import Pool
from thinwire.config.run import RunConfig
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json
from thinwire.sync.joined import Mean, joined
from thinwire.train.trained import open_trained

pytestmark = pytest.mark.heavy

CLIP = {"clip": 0.05}
MODEL = {"layers": 2, "experts": 4, "capacity": 1.0, "balance": 0.05}
"""Some choices find no slot."""


def run_of(folder: Path, layout: dict[str, int], num_micro: int = 2, **sections: Any) -> RunConfig:
    return config_of(folder, layout, num_micro, **{**sections, "model": MODEL | sections.get("model", {})})


def unequal_rows(folder: Path) -> list[dict[str, Any]]:
    """Of what was predicted, what the ledger has otherwise."""
    rows = [row for row in as_json(Facts(RunFolder.open(folder)))["transfers"] if row["predicted_bytes"] is not None]
    assert rows
    return [row for row in rows if not row["equal"]]


@pytest.mark.long
def test_two_replicas_equal_one_rank(ranks1: Pool, ranks2: Pool, tmp_path: Path) -> None:
    expected = on_one_rank(ranks1, tmp_path / "one", 4, model=MODEL)
    folder = ranks2.run(run_training, run_of(tmp_path / "two", {"data": 2}))[0].folder
    assert losses(folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(folder) == pytest.approx(expected[1], rel=1e-9)
    assert not unequal_rows(folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int4", "powersgd", "dgc", "bf16"])
def test_gradients_of_experts_travel_in_codes(ranks1: Pool, ranks2: Pool, tmp_path: Path, kind: str) -> None:
    model = {"dtype": "float32"}
    expected = on_one_rank(ranks1, tmp_path / "one", 4, model=MODEL | model)
    outcome = ranks2.run(run_training, run_of(tmp_path / "two", {"data": 2}, model=model, compress={"kind": kind}))[0]
    assert scores(outcome.folder)[12] == pytest.approx(expected[1][12], rel=0.05)
    assert losses(outcome.folder) != losses(tmp_path / "one" / "run") and not unequal_rows(outcome.folder)


@pytest.mark.long
def test_products_in_bfloat16_learn_alike(ranks2: Pool, tmp_path: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        config = run_of(tmp_path / dtype, {"data": 2}, model={"dtype": "float32"}, train={"dtype": dtype})
        found.append(scores(ranks2.run(run_training, config)[0].folder)[12])
    assert found[0] == pytest.approx(found[1], rel=0.02) and found[0] != found[1]


@pytest.mark.parametrize(
    ("pool", "layout"),
    [
        ("ranks2", {"expert": 2}),
        ("ranks4", {"data": 2, "expert": 2}),
        pytest.param("ranks4", {"expert": 4}, marks=pytest.mark.long),
        pytest.param("ranks4", {"expert": 2, "pipe": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_ranks_that_share_experts_equal_one_and_send_what_was_predicted(
    ranks1: Pool, request: pytest.FixtureRequest, tmp_path: Path, pool: str, layout: dict[str, int]
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    expected = on_one_rank(ranks1, tmp_path / "one", 4, model=MODEL, train=CLIP)
    config = run_of(tmp_path / "shared", layout, 4 * layout.get("pipe", 1) // ranks.world_size, train=CLIP)
    folder = ranks.run(run_training, config)[0].folder
    assert losses(folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(folder) == pytest.approx(expected[1], rel=1e-9)
    assert not unequal_rows(folder)
    run = RunFolder.open(folder)
    rows = [row for row in as_json(Facts(run))["transfers"] if row["predicted_bytes"] is not None]
    assert {"experts' slots", "gradients of slots", "gradient norm", "bucket 0", "evaluation passes"} <= {
        row["label"] for row in rows
    }
    each_step = sum(row.wire_bytes_per_step for row in run.predicted().transfers if row.every == 1)  # type: ignore[union-attr]
    assert median(event.wire_bytes for event in run.steps()) == each_step
    trained = open_trained(folder, tmp_path / "cache")
    assert trained.held_out_loss() == pytest.approx(trained.recorded, rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "layout"),
    [
        ("1f1b", {"pipe": 2}),
        pytest.param("zb1p", {"pipe": 2}, marks=pytest.mark.long),
        pytest.param("zbv", {"pipe": 2, "data": 2}, marks=pytest.mark.long),
    ],
)
def test_stages_of_a_pipeline_balance_their_experts(
    ranks1: Pool, request: pytest.FixtureRequest, tmp_path: Path, schedule: str, layout: dict[str, int]
) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{2 * layout.get('data', 1)}")
    expected = on_one_rank(ranks1, tmp_path / "one", 4, model=MODEL)
    config = run_of(tmp_path / "stages", layout, 4 // layout.get("data", 1), pipeline={"schedule": schedule})
    folder = ranks.run(run_training, config)[0].folder
    assert losses(folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(folder) == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("sync", [{"kind": "diloco", "every": 3}, {"kind": "streaming", "every": 4, "overlap": 2}], ids=str)
def test_replicas_whose_ranks_share_experts_exchange_rarely(ranks4: Pool, tmp_path: Path, sync: dict[str, Any]) -> None:
    """As replicas of two ranks that each have all, also when they are interrupted, and what is whole stays equal to the bit."""
    whole = ranks4.run(run_training, run_of(tmp_path / "whole", {"outer": 2, "data": 2}, sync=sync))[0].folder
    config = run_of(tmp_path / "split", {"outer": 2, "expert": 2}, sync=sync)
    ranks4.run(run_training, config, None, 5)
    folder = ranks4.run(run_training, config, tmp_path / "split" / "run")[0].folder
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-9) and not unequal_rows(folder)
    assert scores(folder) == pytest.approx(scores(whole), rel=1e-9)
    parts = [torch.load(path, weights_only=True)["model"] for path in sorted((folder / "checkpoints").glob("*/part-*.pt"))[-2:]]
    dense = parts[0].keys() & parts[1].keys()
    assert "blocks.0.attention.qkv.weight" in dense and all(torch.equal(parts[0][name], parts[1][name]) for name in dense)


CODED = {"kind": "int4", "exclude": [], "vectors": True, "exchange": "gather"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("turns", "sections"),
    [
        ([("ranks2", {"expert": 2}), ("ranks2", {"data": 2}), ("ranks2", {"expert": 2})], {}),
        pytest.param(
            [("ranks4", {"pipe": 2, "expert": 2}), ("ranks2", {"expert": 2}), ("ranks4", {"pipe": 2, "expert": 2})],
            {},
            marks=pytest.mark.long,
        ),
        pytest.param(
            [("ranks4", {"data": 2, "expert": 2}), ("ranks4", {"expert": 4}), ("ranks1", {}), ("ranks2", {"expert": 2})],
            {},
            marks=pytest.mark.long,
        ),
        pytest.param(
            [("ranks4", {"data": 2, "expert": 2}), ("ranks4", {"data": 4}), ("ranks4", {"expert": 4})],
            {"compress": CODED, "model": {"dtype": "float32"}, "experts": {"slots": "int8"}},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_any_layout_goes_on_with_what_any_other_wrote(
    request: pytest.FixtureRequest, tmp_path: Path, turns: list[tuple[str, dict[str, int]]], sections: dict[str, Any]
) -> None:
    pools: list[Pool] = [request.getfixturevalue(pool) for pool, _ in turns]
    counts = [4 * layout.get("pipe", 1) // ranks.world_size for ranks, (_, layout) in zip(pools, turns, strict=True)]
    whole = pools[0].run(run_training, run_of(tmp_path / "whole", turns[0][1], counts[0], **sections))[0].folder
    folder = tmp_path / "cut" / "run"
    for number, (ranks, (_, layout)) in enumerate(zip(pools, turns, strict=True)):
        config = run_of(tmp_path / "cut", layout, counts[number], **sections)
        last = number == len(turns) - 1
        outcomes = ranks.run(run_training, config, folder if number else None, 99 if last else 3 * (number + 1))
        assert {one.reason for one in outcomes} == {"done" if last else "interrupted"}
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-3 if sections else 1e-9)
    assert scores(folder)[12] == pytest.approx(scores(whole)[12], rel=1e-3 if sections else 1e-9)


def test_what_replicas_owe_of_dense_parameters_is_kept_when_they_become_one_row() -> None:
    """Each owes its own; of its experts it alone."""
    owed = [{"embed.weight": torch.full((4,), float(rank)), f"{rank}": torch.full((4,), 7.0 + rank)} for rank in range(2)]
    states = [{"memory": {"storage": "float32", "kept": kept, "numels": dict.fromkeys(kept, 4)}} for kept in owed]
    found = joined(states, ["embed.weight", "0", "1"], 0, Mean())["memory"]
    assert {name: value.tolist() for name, value in found["kept"].items()} == {
        "embed.weight": [0.5] * 4,
        "0": [7.0] * 4,
        "1": [8.0] * 4,
    }
    assert found["numels"] == dict.fromkeys(found["kept"], 4)


@pytest.mark.long
def test_resumed_equals_uninterrupted_with_codes_everywhere(ranks4: Pool, tmp_path: Path) -> None:
    """To the bit, with what error feedback owes."""
    layout, model = {"data": 2, "expert": 2}, {"dtype": "float32"}
    sections: dict[str, Any] = {"compress": CODED, "model": model, "experts": {"slots": "int8"}}
    whole = ranks4.run(run_training, run_of(tmp_path / "whole", layout, **sections))[0].folder
    config = run_of(tmp_path / "cut", layout, **sections)
    ranks4.run(run_training, config, None, 6)
    folder = ranks4.run(run_training, config, tmp_path / "cut" / "run")[0].folder
    assert losses(folder) == losses(whole) and scores(folder) == scores(whole) and not unequal_rows(folder)
    plain = ranks4.run(run_training, run_of(tmp_path / "plain", layout, model=model))[0].folder
    assert scores(whole)[12] == pytest.approx(scores(plain)[12], rel=0.05)
    sent = [sum(one.wire_bytes for one in RunFolder.open(run).steps()) for run in (whole, plain)]
    assert sent[0] < 0.4 * sent[1]


def test_what_cannot_work_is_refused_before_ranks_start(tmp_path: Path) -> None:
    for axis in ("seq", "tensor"):
        with pytest.raises(ValueError, match=rf"layout.{axis} = 2"):
            run_of(tmp_path, {axis: 2})
    with pytest.raises(ValueError, match=r"layout.expert = 3: model.experts = 4 .* the nearest degree that can be taken is 2"):
        run_of(tmp_path, {"expert": 3})
    with pytest.raises(ValueError, match=r"'int4' with sync.kind = 'diloco' and layout.expert = 2: codes depend on the experts"):
        run_of(tmp_path, {"expert": 2}, sync={"kind": "diloco"}, compress={"kind": "int4"})
    with pytest.raises(ValueError, match=r"each of layout.expert = 2 ranks has a part"):
        run_of(tmp_path, {"expert": 2}, sync={"kind": "local_sgd", "every_inside": 2})
    with pytest.raises(ValueError, match=r"leave it out with layout.expert"):
        run_of(tmp_path, {"expert": 2}, sync={"assign": "by_speed", "accumulate": 8})
