"""Micro-batches assigned by speed, on real ranks: the mathematics of one global batch, resumed bit for bit."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from small_run import make_config, run_paced_on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fake_stream import Device
from pool import Pool, Rank
from thinwire.cluster import Quantity, dump_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.clock import DeviceClock
from thinwire.config.compress import Coded
from thinwire.config.run import EveryStep, RunConfig, TrainSection
from thinwire.errors import UserError
from thinwire.record import Assigned, RunFolder
from thinwire.sync.every_step import EveryStepSync
from thinwire.tomlfile import validate
from thinwire.train import part
from thinwire.train.assign import Assignment
from thinwire.train.checkpoint.disks import find_disks
from thinwire.train.checkpoint.files import newest_whole, read_progress
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts
from thinwire.train.runtime import StopRequest
from thinwire.train.step import Ran, Stepper, StepTimes
from thinwire.train.trainer import Trainer
from thinwire.train.worker import Outcome
from thinwire.workload import Workload

ROWS, WIDTH = 6, 24
LEARNING_RATE = 0.1
LOG_EVERY = 3
"""The assignment follows the usual one of so many steps."""


def plain_model() -> nn.Module:
    torch.manual_seed(3)
    stack = [module for _ in range(3) for module in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(*stack, nn.Linear(WIDTH, 1, bias=False))


def rows(step: int, index: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1000 * step + index))


def one_process(steps: int, total: int) -> tuple[list[torch.Tensor], list[float]]:
    """The reference: plain PyTorch on the whole batch of each step, nothing of ours. Weights at the end, losses of the steps."""
    model, losses = plain_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.cat([rows(step, index) for index in range(total)])).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], losses


class Declared(Stepper):
    """A stepper whose micro-batches take as long as `seconds(step)` declares, whatever the machine does."""

    def run(self, step: int, batches: Any, num_micro: int, mean_micro: float | None = None) -> Ran:
        ran = super().run(step, batches, num_micro, mean_micro)
        parts = StepTimes(compute_s=num_micro * self.seconds(step), wait_s=10.0, optimizer_s=0.0)
        object.__setattr__(ran, "times", lambda: parts)
        return ran

    def seconds(self, step: int) -> float:
        raise NotImplementedError


class Regression:
    """A Task."""

    unit, item, num_sums, score_is = "squares", "row", 2, None

    def __init__(self) -> None:
        self.workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in plain_model().named_parameters()], ROWS)

    def build_model(self) -> nn.Module:
        return plain_model()

    def batch(self, step: int, index: int) -> torch.Tensor:
        return rows(step, index)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).square().mean()

    def score(self, model: nn.Module, replica: int) -> tuple[float, float]:
        return 0.0, 1.0

    def shown(self, model: nn.Module, count: int) -> list[str]:
        return []

    def score_of(self, sums: Sequence[float]) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}


class Notes:
    """In place of a Reporter: the losses and assignments that it is given."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.assignments: list[Assignment] = []
        self.waiting_s: list[float] = []

    def step(self, event: Any) -> None:
        self.losses.append(event.loss)
        self.waiting_s.append(event.waiting_s)

    def assigned(self, step: int, counts: Assignment) -> None:
        self.assignments.append(counts)

    def evaluation(self, *_: object) -> None: ...

    def examples(self, *_: object) -> None: ...

    def checkpoint(self, *_: object) -> None: ...

    def end(self, *_: object) -> None: ...


def on_streams(context: Rank, folder: Path, counts: Assignment) -> list[Assignment]:
    """Assignments where a micro-batch is enqueued at once, and takes rank 1's stream three times as long as rank 0's."""
    device = Device()

    class Launched(Stepper):
        def passes(self, batches: Any, *numbers: float) -> torch.Tensor:
            return super().passes(map(self.launched, batches), *numbers)

        def launched(self, batch: Any) -> Any:
            device.enqueue(3.0 if context.rank else 1.0)
            return batch

    with ExitStack() as stack:
        for module in ("train.step", "sync.every_step"):
            stack.enter_context(mock.patch(f"thinwire.{module}.clock_of", lambda _: DeviceClock(device.event)))
        return train(context, folder, counts, LOG_EVERY + 1, {0: 1.0}, Launched)[2]


def test_micro_batches_are_assigned_by_the_seconds_of_devices(ranks2: Pool, tmp_path: Path) -> None:
    """By their events, whatever the host took to launch."""
    assert ranks2.run(on_streams, tmp_path, (4, 4)) == [[(6, 2)]] * 2


def train(
    context: Rank,
    folder: Path,
    counts: Assignment,
    steps: int,
    slow: dict[int, float],
    kind: type[Stepper] | None = None,
) -> Any:
    """(weights, losses, assignments, waiting_s) of a run that begins with `counts`. slow: from these steps on, a micro-batch of
    the last rank takes so many times as long as the others'; where given, the assignment follows the speed."""

    class Slow(Declared):
        def seconds(self, step: int) -> float:
            begun = [factor for first, factor in slow.items() if step >= first]
            return begun[-1] if begun and context.rank == context.world_size - 1 else 1.0

    task, notes = Regression(), Notes()
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    sync = EveryStepSync(EveryStep(bucket_bytes=2048), "data", context.ledger)
    mesh = init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("data",))
    settings = TrainSection(
        steps=steps,
        learning_rate=LEARNING_RATE,
        final_learning_rate=1.0,
        warmup_steps=0,
        clip=0,
        log_every=LOG_EVERY if slow else 1,
        eval_every=0,
    )
    with sync.attached(model, optimizer, mesh) as replica:
        stepper = (kind or (Slow if slow else Stepper))(
            model=replica, optimizer=optimizer, sync=sync, loss=task.loss, precision=torch.enable_grad, train=settings
        )
        stepper.rehearse(task.batch(0, context.rank))
        trainer = Trainer(
            task=task,
            stepper=stepper,
            train=settings,
            parts=Parts(model=model, optimizer=optimizer, sync=sync, ledger=context.ledger, rank=context.rank),
            group=mesh.get_group("data"),
            replica=context.rank,
            device=torch.device("cpu"),
            stop=StopRequest(),
            saver=Saver(folder, find_disks(folder), keep=3),
            reporter=notes,  # type: ignore[arg-type]
            assignment=counts,
            by_speed=bool(slow),
        )
        trainer.run(0)
    return [parameter.detach() for parameter in model.parameters()], notes.losses, notes.assignments, notes.waiting_s


@pytest.mark.parametrize(("pool", "counts"), [("ranks2", (1, 3)), ("ranks4", (2, 1, 5, 3))])
def test_any_assignment_equals_one_process_on_the_global_batch(
    request: pytest.FixtureRequest, tmp_path: Path, pool: str, counts: Assignment
) -> None:
    weights, losses = one_process(4, sum(counts))
    wrong, _ = one_process(4, sum(counts) - 1)
    ranks: Pool = request.getfixturevalue(pool)
    for ours, reported, assignments, _ in ranks.run(train, tmp_path, counts, 4, {}):
        assert reported == pytest.approx(losses, abs=1e-6) and assignments == []
        for mine, theirs in zip(ours, weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert max(float((mine - other).abs().max()) for mine, other in zip(ours, wrong, strict=True)) > 1e-4
    assert read_progress(newest_whole(tmp_path)).assignment == counts


def test_a_rank_that_slows_down_gets_fewer_and_as_many_when_it_recovers(ranks4: Pool, tmp_path: Path) -> None:
    """The last rank takes 1.7 times as long after the first report, and is as fast as the others again after the third."""
    steps = 5 * LOG_EVERY
    found = ranks4.run(train, tmp_path, (3, 3, 3, 3), steps, {LOG_EVERY: 1.7, 3 * LOG_EVERY: 1.0})
    weights, losses = one_process(steps, 12)
    expected = [sum(losses[first : first + LOG_EVERY]) / LOG_EVERY for first in range(0, steps, LOG_EVERY)]
    assert found[0][2] == [(4, 3, 3, 2), (3, 3, 3, 3)], "four passes at most, where three long ones took 5.1; then three"
    assert found[0][3] == pytest.approx([0, 5.1 - 3, 0, 4 - 4, 0]), "of 10 s, what the slowest rank computed longer"
    assert found[3][3] == pytest.approx([0, 0, 4 - 2 * 1.7, 4 - 2, 0])
    for ours, reported, assignments, _ in found:
        assert assignments == found[0][2], "all ranks assign the same"
        assert reported == pytest.approx(expected, abs=1e-6)
        for mine, theirs in zip(ours, weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def uneven_config(folder: Path, kind: str) -> RunConfig:
    config = make_config(folder)
    coded = config if kind == "none" else config.model_copy(update={"compress": Coded(kind=kind)})  # type: ignore[arg-type]
    sync = EveryStep(accumulate=2, bucket_bytes=4096, assign="by_speed")
    return coded.model_copy(update={"sync": sync, "train": config.train.model_copy(update={"log_every": LOG_EVERY})})


def one_third_the_speed(folder: Path, scale: float) -> Path:
    """A cluster file of two hosts: a micro-batch takes about 30 and 90 ms over `scale`."""
    cluster = equal_hosts(2, 1e9)
    for device, rate in zip(cluster.devices, (1e8 * scale, 3.3e7 * scale), strict=True):
        object.__setattr__(device, "flops_per_s", Quantity(rate))
    path = folder / "cluster.toml"
    dump_cluster(cluster, path)
    return path


def run_paced(context: Rank, config: RunConfig, cluster: Path, resume: Path | None, stop_after: int, declared: bool) -> Outcome:
    """declared: reports have the declared seconds, so that a pass which the machine made late changes no assignment."""

    class AtItsRate(Declared):
        def seconds(self, step: int) -> float:
            return (1.0, 1e8 / 3.3e7)[context.rank]

    with pytest.MonkeyPatch.context() as patch:
        if declared:
            patch.setattr(part, "Stepper", AtItsRate)
        return run_paced_on(context, config, cluster, resume, stop_after)


@pytest.mark.parametrize(
    ("kind", "declared"),
    [
        ("int4", True),
        *(pytest.param(kind, False, marks=[pytest.mark.long, pytest.mark.timed]) for kind in ("none", "int4")),
    ],
)
@pytest.mark.long
def test_an_uneven_run_sends_what_was_predicted_and_resumes_bit_for_bit(
    ranks2: Pool, tmp_path: Path, kind: str, declared: bool
) -> None:
    """Where passes are late and their real seconds are reported, the run assigns anew, adds gradients up in another order, and
    another run no longer equals it bit for bit."""
    cluster, runs = one_third_the_speed(tmp_path, 100.0 if declared else 1.0), {}
    for name, stop_after in (("whole", 10**9), ("cut", 6)):
        (tmp_path / name).mkdir()
        config = uneven_config(tmp_path / name, kind)
        runs[name] = ranks2.run(run_paced, config, cluster, None, stop_after, declared)[0].folder
    progress = read_progress(newest_whole(runs["cut"] / "checkpoints"))
    assert (progress.step, progress.assignment, progress.tokens) == (6, (3, 1), 6 * 4 * 2 * 16)
    assert ranks2.run(run_paced, config, cluster, runs["cut"], 10**9, declared)[0].reason == "done"
    assert read_progress(newest_whole(runs["whole"] / "checkpoints")).assignment == (3, 1), "no pass was late"
    whole, resumed = (
        [(event.step, event.tokens, event.loss) for event in RunFolder.open(runs[name]).steps()] for name in ("whole", "cut")
    )
    assert whole == resumed and len(whole) == 12 / LOG_EVERY
    logged = [event.micro_batches for event in RunFolder.open(runs["whole"]).events() if isinstance(event, Assigned)]
    assert logged[-1] == (3, 1)
    predicted, measured = RunFolder.open(runs["whole"]).predicted(), RunFolder.open(runs["whole"]).measured()
    assert predicted is not None and measured is not None
    wanted, found = (
        {(row.label, row.op, row.message_bytes): row.wire_bytes_per_step for row in cost.transfers if row.every == 1}
        for cost in (predicted, measured)
    )
    assert wanted == found and len(wanted) >= 4
    assert predicted.waiting_s < 0.1 * predicted.compute_s
    assert declared or predicted.compute_s == pytest.approx(measured.compute_s, rel=0.5)


@pytest.mark.parametrize(
    ("sync", "told"),
    [
        ({"assign": "by_speed"}, "sync: assign = 'by_speed' with accumulate = 1 leaves each rank its one micro-batch"),
        ({"assign": "by_speed", "kind": "diloco"}, "assign = 'by_speed': only kind = 'every_step' assigns micro-batches"),
        ({"assign": "by_luck"}, "sync.assign = 'by_luck'"),
    ],
)
def test_an_assignment_that_cannot_be_is_refused_in_one_line(sync: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=r"^run\.toml: ") as refused:
        validate(RunConfig, {"sync": sync}, "run.toml")
    assert told in str(refused.value) and "\n" not in str(refused.value)
