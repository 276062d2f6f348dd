"""A device's queue as the host sees it, without a device: what is enqueued takes its declared time, after all before it."""

from typing import Any


class Device:
    """One stream. now_s: how far it has come; end_s: when all that was enqueued is over. The host waits by `reach` only."""

    def __init__(self) -> None:
        self.now_s, self.end_s, self.waits = 0.0, 0.0, 0

    def enqueue(self, seconds: float) -> None:
        """Work; it begins when what is before it is over, and not before now."""
        self.end_s = max(self.end_s, self.now_s) + seconds

    def reach(self, moment_s: float) -> None:
        """Time goes on to there."""
        self.now_s = max(self.now_s, moment_s)

    def event(self) -> Any:
        return Event(self)


class Event:
    """As torch.Event, which happens when all that was enqueued before `record` is over."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.happens_s = float("inf")

    def record(self) -> None:
        self.happens_s = max(self._device.end_s, self._device.now_s)

    def query(self) -> bool:
        return self.happens_s <= self._device.now_s

    def synchronize(self) -> None:
        if not self.query():
            self._device.waits += 1
            self._device.reach(self.happens_s)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds; as CUDA's, only of what has happened."""
        assert self.query() and end.query(), "elapsed_time of an event that has not happened"
        return 1e3 * (end.happens_s - self.happens_s)
