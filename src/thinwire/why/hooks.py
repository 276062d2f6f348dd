"""Marks in any script: an optimizer steps, a first module is called, backward() begins and ends, the data loader is asked."""
# torch's classes are changed for a while:
# mypy: disable-error-code="method-assign,assignment"

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from thinwire.why.meter import Recorder
from thinwire.why.trace import BACKWARD, BACKWARD_END, DATA, DATA_END, FORWARD, OPTIMIZER, STEP

_LOADER = dataloader._BaseDataLoaderIter


@contextmanager
def marked(recorder: Recorder, stepped: Callable[[int], None]) -> Iterator[ExitStack]:
    """Inside, `recorder` gets its marks, and `stepped` is called when an optimizer has stepped, with its number.

    Closing what is given ends this early.
    """
    numbers: dict[int, int] = {}
    firsts: list[Any] = []

    def first(_module: Any, _inputs: Any) -> None:
        if firsts:
            firsts.pop().remove()
            recorder.mark(FORWARD)

    def before(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        recorder.mark(OPTIMIZER, numbers.setdefault(id(optimizer), len(numbers)))

    def after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        number = numbers.setdefault(id(optimizer), len(numbers))
        recorder.mark(STEP, number)
        if recorder.on and not firsts:
            firsts.append(torch.nn.modules.module.register_module_forward_pre_hook(first))
        stepped(number)

    def forget() -> None:
        while firsts:
            firsts.pop().remove()

    backward, following = torch.autograd.backward, _LOADER.__next__
    with ExitStack() as stack:
        stack.callback(forget)
        stack.callback(register_optimizer_step_pre_hook(before).remove)
        stack.callback(register_optimizer_step_post_hook(after).remove)
        stack.callback(setattr, torch.autograd, "backward", backward)
        torch.autograd.backward = _between(recorder, backward, BACKWARD, BACKWARD_END)
        stack.callback(setattr, _LOADER, "__next__", following)
        _LOADER.__next__ = _between(recorder, following, DATA, DATA_END)
        yield stack


def _between(recorder: Recorder, function: Callable[..., Any], begin: str, end: str) -> Callable[..., Any]:
    @wraps(function)
    def marked(*arguments: Any, **options: Any) -> Any:
        recorder.mark(begin)
        try:
            return function(*arguments, **options)
        finally:
            recorder.mark(end)

    return marked
