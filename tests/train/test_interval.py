"""Where the seconds of a step go on a device that the host runs ahead of, by a fake stream: not yet run on a GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from fake_stream import Device
from thinwire.collectives.clock import DeviceClock, HostClock
from thinwire.config.optimizer import SGD
from thinwire.config.run import TrainSection
from thinwire.train.interval import Interval
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import Stepper

COMPUTE_S, WIRE_S, UPDATE_S, OUTER_S, HOST_S = 0.034, 1.45, 0.015, 0.2, 0.005


class Exchanging:
    """Gradients are ready after the last micro-batch; the stream then waits for the wire, and after the step."""

    def __init__(self, device: Device, clock: Any) -> None:
        self._device, self._clock, self.ready_at = device, clock, None

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        yield
        self._device.enqueue(COMPUTE_S / 2)
        if last:
            self.ready_at = self._clock.now()
            self._device.enqueue(WIRE_S)

    def after_step(self, step: int) -> None:
        self._device.enqueue(OUTER_S)


def stepper(device: Device, clock: Any, monkeypatch: pytest.MonkeyPatch) -> Stepper:
    monkeypatch.setattr("thinwire.train.step.clock_of", lambda _: clock)
    model = nn.Linear(4, 1)
    train = TrainSection(optimizer=SGD(momentum=0.0), learning_rate=0.1, warmup_steps=0, clip=1.0)
    optimizer = make_optimizer(model, train)
    optimizer.register_step_post_hook(lambda *_: device.enqueue(UPDATE_S))
    return Stepper(
        model=model,
        optimizer=optimizer,
        sync=Exchanging(device, clock),  # type: ignore[arg-type]
        loss=lambda model, batch: model(batch).sum(),
        precision=torch.enable_grad,
        train=train,
    )


@pytest.mark.parametrize("ahead", [True, False])
def test_the_parts_are_those_of_the_stream_and_add_up_to_the_step(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the host runs ahead, or waits after each step and is slow to begin the next one; a pause is no step's."""
    device = Device()
    clock = DeviceClock(device.event)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)  # where the device is when the host waits for it
    runs = stepper(device, clock, monkeypatch)
    interval = Interval(clock)
    for step in range(4):
        if not ahead:
            device.reach(device.end_s + HOST_S)
        interval.add(runs.run(step, [torch.ones(2, 4)] * 2, 2))
        if step == 1:
            device.reach(device.end_s)
            with interval.paused():
                device.enqueue(7.0)
                device.reach(device.end_s)
    assert device.waits == 0, "the host waits when it asks, and not before"
    device.reach(device.end_s)
    assert interval.loss() == pytest.approx(sum(float(ran.loss) for ran in interval._ran) / 4)
    found = interval.end(interval.times())
    wanted = {"compute_s": COMPUTE_S, "wait_s": WIRE_S + OUTER_S, "optimizer_s": UPDATE_S, "host_s": 0.0 if ahead else HOST_S}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert sum(wanted.values()) == pytest.approx(found["step_s"], rel=0.02)


def test_on_the_host_what_compute_and_waiting_leave_is_the_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(Exchanging):
        @contextmanager
        def microbatch(self, *, last: bool) -> Iterator[None]:
            yield
            self.ready_at = self._clock.now()
            time.sleep(0.05)

        def after_step(self, step: int) -> None: ...

    clock = HostClock()
    runs = stepper(Device(), clock, monkeypatch)
    object.__setattr__(runs, "sync", Waits(Device(), clock))
    interval = Interval(clock)
    interval.add(runs.run(0, [torch.ones(2, 4)], 1))
    time.sleep(0.02)
    found = interval.end(interval.times())
    assert found.keys() == {"step_s", "compute_s", "wait_s", "optimizer_s"}
    assert found["wait_s"] >= 0.05 and found["optimizer_s"] >= 0.02
    assert found["compute_s"] + found["wait_s"] + found["optimizer_s"] == pytest.approx(found["step_s"])


def test_without_a_mark_of_its_own_a_step_is_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    clock = DeviceClock(device.event)
    runs = stepper(device, clock, monkeypatch)
    first = runs.run(0, [torch.ones(2, 4)], 1).times()
    runs.sync.microbatch = lambda last: torch.enable_grad()  # type: ignore[method-assign]
    runs.sync.after_step = lambda step: None  # type: ignore[method-assign]
    second = runs.run(1, [torch.ones(2, 4)], 1).times()
    assert first.wait_s == pytest.approx(WIRE_S + OUTER_S) and second.wait_s == 0.0
