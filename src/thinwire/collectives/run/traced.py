"""Calls that schedules run, as events of torch.profiler: gloo and NCCL enter theirs themselves.

An event has the name "thinwire:OP", the shapes of its tensors where the profiler asks for them, and lasts from the call until its
results are there. It is entered only while somebody profiles, so that it costs nothing otherwise.
"""

from collections.abc import Callable, Sequence

import torch


def traced(name: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None] | None:
    """Begin an event on this thread; what ends it, on any thread, once. None while nobody profiles."""
    if not torch.autograd._profiler_enabled():
        return None
    event = torch.autograd._record_function_with_args_enter(name, *tensors)
    return lambda: torch.autograd._record_function_with_args_exit(event)
