"""Tensors in memory of the host, which is all that MPI reads and writes: those of a device are copied there and back.

A copy goes through pinned memory and is over when the call that makes it returns, on whatever thread. What a device has yet to
write into a tensor is waited for before it is read: `settled`, by the clock of the stream on which the caller enqueued it.
"""

from collections.abc import Callable, Sequence

import torch

from thinwire.collectives.clock import DeviceClock, clock_of, has_streams


def lies_on_host(tensor: torch.Tensor) -> bool:
    """Whether MPI can read and write it where it is."""
    return tensor.device.type == "cpu"


def settled(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Called on the thread that has filled them; the result waits until their device has. Nothing on the host."""
    clocks = {tensor.device: clock_of(tensor.device) for tensor in tensors}
    moments = [clock.now() for clock in clocks.values() if isinstance(clock, DeviceClock)]

    def wait() -> None:
        for moment in moments:
            moment.synchronize()

    return wait


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Itself where it lies so on the host, else a copy there."""
    return tensor.contiguous() if lies_on_host(tensor) else _empty(tensor).view(tensor.shape).copy_(tensor)


def separate(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`source` contiguous, and in memory of its own: MPI forbids that a call reads what it writes, FSDP2 gathers in place."""
    if not lies_on_host(source):
        return contiguous(source)
    shared = source.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
    return source.clone(memory_format=torch.contiguous_format) if shared else source.contiguous()


def buffer_for(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if MPI can write into it, else one of its size."""
    return tensor if lies_on_host(tensor) and tensor.is_contiguous() else _empty(tensor)


def copy_out(tensors: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]) -> None:
    """What has come, to where it belongs."""
    for tensor, flat in zip(tensors, flats, strict=True):
        if tensor.data_ptr() != flat.data_ptr() or not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=has_streams(tensor.device))
