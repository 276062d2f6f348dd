"""What a planner says of a run before there are ranks is what the run says of itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import config_of, run_training

from pool import Pool
from thinwire.cluster import Cluster, Device, Host
from thinwire.config.run import load_run
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.cost import predict
from thinwire.record import RunFolder
from thinwire.report.facts import Facts, transfer_rows
from thinwire.traffic import EVALUATION
from thinwire.train.outline import outline
from thinwire.train.task import shape_with

STREAMING = {"kind": "streaming", "every": 5, "layers_per_fragment": 1, "overlap": 2}
"""Of 12 steps the last period is not complete."""


def here(ranks: int) -> Cluster:
    return Cluster(name="here", hosts=(Host(name="here", devices=tuple(Device(name=f"here/cpu{i}") for i in range(ranks))),))


def test_outer_steps_cost_what_they_touch_once_a_period() -> None:
    """More with a momentum; exposed, however long fragments may be under way."""

    def exposed_s(touched: float | None, **sync: Any) -> float:
        config = load_run(None, [f"sync.{key}={value}" for key, value in sync.items()])
        setting, transfers, _ = outline(config, config.model.shape(), Layout(outer=2), here(2), (1e9, 1e9))
        assert setting.outer_bytes > 0
        return predict(setting if touched is None else replace(setting, outer_bytes=touched), transfers).exposed_s

    for sync in ({"kind": "diloco", "every": 10}, {"kind": "streaming", "every": 10, "overlap": 5}):
        one, other = exposed_s(None, **sync), exposed_s(None, **{**sync, "every": 30})
        assert one - exposed_s(0.0, **sync) == pytest.approx(3 * (other - exposed_s(0.0, **{**sync, "every": 30})))
        assert one > exposed_s(None, **sync, outer_momentum=0.0)


@pytest.mark.parametrize(
    ("pool", "layout", "options"),
    [
        ("ranks2", {"pipe": 2}, {"model": {"tied": True}, "pipeline": {"schedule": "zbv"}}),
        ("ranks4", {"tensor": 2, "data": 2}, {"compress": {"kind": "int8"}}),
        pytest.param("ranks4", {"tensor": 2, "pipe": 2}, {"pipeline": {"activations": "int8"}}, marks=pytest.mark.long),
        pytest.param(
            "ranks4", {"outer": 2, "data": 2}, {"sync": STREAMING, "compress": {"kind": "int4"}}, marks=pytest.mark.long
        ),
        pytest.param("ranks4", {"expert": 2, "data": 2}, {"model": {"experts": 4}}, marks=pytest.mark.long),
        pytest.param("ranks4", {"seq": 2, "tensor": 2}, {}, marks=pytest.mark.long),
        pytest.param("ranks4", {"pipe": 2, "data": 2}, {"compress": {"kind": "bf16"}}, marks=pytest.mark.long),
        ("ranks2", {"shard": 2}, {"sharded": {"weights": "int8", "gradients": "int4"}}),
        pytest.param("ranks4", {"shard": 2, "data": 2}, {"sharded": {"reshard": "never"}}, marks=pytest.mark.long),
        pytest.param("ranks4", {"shard": 2, "pipe": 2}, {}, marks=pytest.mark.long),
    ],
    ids=["pipe", "tensor", "tensor-pipe", "outer", "expert", "seq-tensor", "pipe-data", "shard", "shard-data", "shard-pipe"],
)
def test_an_outline_predicts_what_the_run_predicts(
    request: pytest.FixtureRequest, tmp_path: Path, pool: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    """To the byte; the timing of codes aside."""
    ranks: Pool = request.getfixturevalue(pool)
    config = config_of(tmp_path, layout, 2, **options)
    folder = RunFolder.open(ranks.run(run_training, config)[0].folder)
    known = folder.predicted()
    assert known is not None and all(row.equal for row in transfer_rows(Facts(folder)) if row.predicted_bytes > 0)
    shape = shape_with(config.model, 256)
    found = Layout(**layout)
    setting, transfers, _ = outline(config, shape, found, here(ranks.world_size), (1e9,) * ranks.world_size)
    said = predict(setting, transfers)
    sent = [(one.transfer.label, one.transfer.axis, one.transfer.op, one.transfer.message_bytes) for one in said.transfers]
    run = [one for one in known.transfers if one.label != EVALUATION]
    assert sent == [(one.label, one.axis, one.op, one.message_bytes) for one in run]
    for one, other in zip(said.transfers, run, strict=True):
        assert (one.transfer.calls, one.transfer.every, one.wire_bytes_per_step, one.even) == (
            other.calls,
            other.every,
            other.wire_bytes_per_step,
            other.even,
        )
    assert said.tokens_per_step / said.step_s == pytest.approx(said.as_record()["tokens_per_s"])


def test_what_training_refuses_is_refused() -> None:
    config = load_run(None, ["layout.pipe=2", "sync.kind=diloco", "compress.kind=int4"])
    with pytest.raises(UserError, match="would average in two ways"):
        outline(config, config.model.shape(), Layout(outer=4, pipe=2), here(8), (1e9,) * 8)
