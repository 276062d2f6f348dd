"""What a micro-batch of any model costs, counted on one pass: operations of matrix products, convolutions and attention,
and how many had run before each module's parameters were first used."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from thinwire.workload import Parameter, Workload


def workload_of(model: nn.Module, loss: Callable[[], Tensor], items: int, dtype: str) -> Workload:
    """Of `model`, on the CPU, whose `loss` runs it once on a micro-batch of `items`. dtype: that it will have.

    In float64 what libraries run as a whole, such as an LSTM, runs in parts that can be counted. A module that is never called,
    such as one of attention's own, counts with the one around it. Parameters stand in the order in which gradients become ready,
    backward, which DistributedDataParallel fills its buckets by; it need not be the reverse of that of registration.
    """
    begins: dict[str, float] = {}
    ready: list[str] = []
    with FlopCounterMode(display=False) as counter:

        def begin(name: str, *_: Any) -> None:
            begins.setdefault(name, float(counter.get_total_flops()))

        handles = [module.register_forward_pre_hook(partial(begin, name)) for name, module in model.named_modules()]
        found = loss()
    forward_flops = counter.get_total_flops()
    parameters = dict(model.named_parameters())
    handles += [one.register_post_accumulate_grad_hook(partial(_note, ready, name)) for name, one in parameters.items()]
    found.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    placed = (Parameter(name, tuple(parameters[name].shape), _begin(begins, name) / items, dtype) for name in reversed(ready))
    return Workload(
        parameters=tuple(placed),
        forward_flops_per_token=max(1.0, forward_flops / items),
        tokens_per_microbatch=items,
    )


def _note(ready: list[str], name: str, _: Any) -> None:
    ready.append(name)


def _begin(begins: dict[str, float], name: str) -> float:
    while name:
        name = name.rpartition(".")[0]
        if name in begins:
            return begins[name]
    return 0.0
