"""Paced compute: a rank computes at the rate that its device declares, however busy the machine really is.

In a lab many ranks share few cores, and an idle rank lends its core to the others; stragglers and waiting would then vanish.
So each forward and each backward pass follows the clock of the declared device. With F_j the forward flops before matrix j
(`Parameter.forward_flops_before`), f_j its own, F those of the whole pass, and a pass that takes T = flops / flops_per_s from its
start t:

    forward    the module of matrix j returns no sooner than         t + T (F_j + f_j) / F
    backward   the gradient of matrix j is ready no sooner than      t + T (1 - B_j / B)

B_j of B being what the backward pass still has to do then (`Workload.backward_flops_remaining`): as F_j of F, but where
activations are computed again.

The exchange goes on while a rank sleeps. Going backward it sleeps before the module, as long as there is time to spare, so that
gradients become ready when they would on the declared device. What takes longer than its share is made up for by the rest of the
pass; by how much passes end late is added up and reported. Evaluation is not paced. While a rank waits for others within a pass,
the clock of the pass stands still.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from thinwire.errors import UserError
from thinwire.parallel.waits import Waits, sleep_until
from thinwire.workload import Parameter, Workload

PACED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.Embedding)
"""Whose modules are held: each has a matrix, or a tensor of more dims, and is called as a module."""
SMOOTHING = 0.2
"""Weight of the newest pass in the running mean of what a module takes."""


@dataclass
class _Stage:
    """One matrix product: its module, when it is over going forward and backward (shares of the pass), and what it takes here."""

    module: nn.Module
    forward_end: float
    backward_end: float
    takes_s: float = 0.0
    started: float = 0.0


@dataclass
class Pacer:
    """Hooks on a model. forward_s and backward_s: declared seconds of one micro-batch; waits: within passes; late_s: by how much
    passes were missed."""

    forward_s: float
    backward_s: float
    waits: Waits = field(default_factory=Waits)
    declared_s: float = 0.0
    late_s: float = 0.0
    _pass_started: float = 0.0
    _goes_back: bool = False
    _ended: bool = False
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, workload: Workload, flops_per_s: float, waits: Waits | None = None) -> "Pacer":
        """The pace of a device that achieves `flops_per_s` in training."""
        forward = workload.forward_flops_per_token * workload.tokens_per_microbatch / flops_per_s
        backward = workload.backward_flops_per_token * workload.tokens_per_microbatch / flops_per_s
        return cls(forward_s=forward, backward_s=backward, waits=waits or Waits())

    @contextmanager
    def attached(self, model: nn.Module, workload: Workload) -> Iterator[None]:
        """Hooks on, at the end hooks off. UserError for a model that has none of PACED."""
        stages = _stages(model, workload)
        if not stages:
            raise UserError(
                "paced compute needs linear layers, convolutions, recurrent layers or embeddings, and this model has none; use "
                "--unpaced"
            )
        self._keep(model.register_forward_pre_hook, self._begin_pass)
        self._keep(model.register_forward_hook, self._end_pass)
        for stage in stages:
            before_others = partial(stage.module.register_forward_hook, prepend=True)  # what is computed then goes to other ranks
            self._keep(before_others, partial(self._end_forward, stage.forward_end))
            if not isinstance(stage.module, nn.Linear):
                self._keep(stage.module.register_forward_hook, partial(self._note_backward, stage))
                continue
            self._keep(stage.module.register_full_backward_pre_hook, partial(self._begin_backward, stage))
            self._keep(stage.module.register_full_backward_hook, partial(self._end_backward, stage))
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @property
    def missed_fraction(self) -> float:
        """How much longer than declared the passes took so far."""
        return self.late_s / self.declared_s if self.declared_s else 0.0

    @property
    def _clock_start(self) -> float:
        """When the pass would have begun if nobody had been waited for in it."""
        return self._pass_started + self.waits.since(self._pass_started)

    def _keep(self, register: Callable[..., torch.utils.hooks.RemovableHandle], hook: Callable[..., None]) -> None:
        self._handles.append(register(hook))

    def _begin_pass(self, *_: object) -> None:
        self._pass_started, self._goes_back, self._ended = time.perf_counter(), False, False

    def _begin_back(self, *_: object) -> None:
        self._pass_started, self._goes_back, self._ended = time.perf_counter(), True, False

    def _end_pass(self, model: nn.Module, arguments: object, output: object) -> None:
        """The whole forward pass; the backward pass begins when the gradient of its output is there."""
        self._end_forward(1.0)
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(self._begin_back)

    def _end_forward(self, share: float, *_: object) -> None:
        if torch.is_grad_enabled() and not self._goes_back:  # then it is computed again
            self._hold(share, self.forward_s)

    def _note_backward(self, stage: _Stage, module: nn.Module, inputs: tuple[object, ...], output: Any) -> None:
        """Hold its backward pass as that of a linear layer; of one whose inputs want no gradient, such as an embedding, when that
        of its output is there, which is as far as can be seen."""
        out: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        wanting = [one for one in inputs if isinstance(one, torch.Tensor) and one.requires_grad]
        if out.requires_grad and wanting:
            out.register_hook(partial(self._begin_backward, stage))
            wanting[0].register_hook(partial(self._end_backward, stage))
        elif out.requires_grad:
            out.register_hook(partial(self._hold_backward, stage.backward_end))

    def _hold_backward(self, share: float, *_: object) -> None:
        self._hold(share, self.backward_s)

    def _begin_backward(self, stage: _Stage, *_: object) -> None:
        sleep_until(self._clock_start + stage.backward_end * self.backward_s - stage.takes_s)
        stage.started = time.perf_counter()

    def _end_backward(self, stage: _Stage, *_: object) -> None:
        took = time.perf_counter() - stage.started
        stage.takes_s += (took - stage.takes_s) * (SMOOTHING if stage.takes_s else 1.0)
        self._hold(stage.backward_end, self.backward_s)

    def _hold(self, share: float, pass_s: float) -> None:
        """Sleep until `share` of the pass should be over; at its end see whether that was kept."""
        late = -sleep_until(self._clock_start + share * pass_s)
        if share == 1.0 and not self._ended:
            self._ended = True
            self.declared_s += pass_s
            self.late_s += max(0.0, late)


def _stages(model: nn.Module, workload: Workload) -> list[_Stage]:
    """Those of PACED among the owners of the workload's matrices, in the order of the forward pass."""
    whole = workload.forward_flops_per_token
    owners: dict[nn.Module, Parameter] = {}
    for parameter in workload.parameters:
        owner = model.get_submodule(parameter.name.rpartition(".")[0])
        if len(parameter.shape) > 1 and isinstance(owner, PACED):
            owners.setdefault(owner, parameter)
    found = sorted(owners.items(), key=lambda one: one[1].forward_flops_before)
    nexts = [parameter.forward_flops_before for _, parameter in found[1:]] + [whole]
    return [
        _Stage(
            module=module,
            forward_end=min((one.forward_flops_before + 2.0 * one.numel) / whole, following / whole, 1.0 - 1e-9),
            backward_end=1.0 - workload.backward_flops_remaining(one.name) / workload.backward_flops_per_token,
        )
        for (module, one), following in zip(found, nexts, strict=False)
    ]
