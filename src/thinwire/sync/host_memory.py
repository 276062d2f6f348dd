"""Memory of the host for what replicas keep between exchanges (anchors, outer momentum) where parameters lie on a device.

It is pinned, and copied on a stream of its own, both ways, so that training goes on meanwhile. The training stream waits for a
copy where it begins to use it, and the host only where it reads or writes itself (`settle`). A tensor of the device is taken from
the training stream's memory, and given back to it when the copy has been made.
"""

from contextlib import nullcontext

import torch

from thinwire.collectives.clock import has_streams
from thinwire.compress.stages import current_stream, new_stream


class HostMemory:
    """For tensors of `device`; without streams, as on a CPU, copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, new_stream(device)

    def taken(self, values: torch.Tensor) -> torch.Tensor:
        """A copy in memory of the host, when it has been made."""
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=has_streams(self._device))
        self.store(values, kept)
        return kept

    def store(self, values: torch.Tensor, kept: torch.Tensor) -> None:
        """kept <- values, which nobody changes any more."""
        self._follow()
        with self._stream or nullcontext():
            kept.copy_(values, non_blocking=True)
        if self._stream is not None:
            values.record_stream(self._stream)

    def fetched(self, kept: torch.Tensor) -> torch.Tensor:
        """A copy on the device; to be used after `arrive`."""
        values = torch.empty_like(kept, device=self._device)
        self._follow()
        with self._stream or nullcontext():
            values.copy_(kept, non_blocking=True)
        return values

    def arrive(self) -> None:
        """The current stream waits for all copies that were begun."""
        stream = current_stream(self._device)
        if self._stream is not None and stream is not None:
            stream.wait_stream(self._stream)

    def settle(self) -> None:
        """The host waits for all copies that were begun."""
        if self._stream is not None:
            self._stream.synchronize()

    def _follow(self) -> None:
        """What the current stream has made, or given back, is there for copies that follow."""
        stream = current_stream(self._device)
        if self._stream is not None and stream is not None:
            self._stream.wait_stream(stream)
