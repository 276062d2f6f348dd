"""When something happened, by the clock of what does the work: the host's, or events in a device's queues.

A device computes beside the host, which only enqueues: time.perf_counter() there says when a call was enqueued. An event in the
queue (stream) happens when all that was enqueued before it is over. What lies between two events is known once both have
happened; to ask whether one has (`passed`) does not wait.
"""

import time
from collections.abc import Callable
from functools import partial

import torch


class HostClock:
    """Moments are seconds: what is called is over when the call returns."""

    on_device = False

    def now(self) -> float:
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class DeviceClock:
    """Moments are events in the stream that is current on the calling thread. new_event: with timing."""

    on_device = True

    def __init__(self, new_event: Callable[[], torch.Event]) -> None:
        self._new_event = new_event

    def now(self) -> torch.Event:
        event = self._new_event()
        event.record()
        return event

    def passed(self, moment: torch.Event) -> bool:
        return moment.query()

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        """Waits for both, if they have not happened yet."""
        begin.synchronize()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> HostClock | DeviceClock:
    """By which work on `device` is timed."""
    return DeviceClock(partial(torch.Event, device, enable_timing=True)) if has_streams(device) else HostClock()


def has_streams(device: torch.device) -> bool:
    """Whether `device` computes on streams beside the host, and there is one here: then futures are of it, and copies to it from
    pinned memory go on by themselves."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type
