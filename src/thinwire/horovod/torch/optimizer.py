"""An optimizer whose gradients are reduced over the ranks while the backward pass goes on.

    g = 1/p sum over ranks of g_i         Average; with gradient_predivide_factor f:  f/p sum of g_i/f
    g = sum over ranks of g_i             Sum
    w <- w + Adasum of all (w_i - w)      Adasum: each rank makes its own step w_i, and the steps are summed (`adasum`)

As soon as a parameter has its gradient (for the last time before a step, with backward_passes_per_step), it goes out; rank 0 says
in which order, so that ranks may differ in theirs. `step` waits for all. A parameter that the backward pass of this rank has not
reached goes out with zeros, or what it had, so that the others do not wait for it.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.horovod.members import ProcessSet
from thinwire.adapters.horovod.request import Request
from thinwire.horovod.torch.calls import Adasum, Average, ReduceOp, global_process_set, reduced
from thinwire.horovod.torch.compression import Code, Compression
from thinwire.horovod.torch.mpi_ops import sparse_allreduce_async

Parameters = list[torch.Tensor]
NOT_SKIPPED = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
    "This reduces the gradients once more; step within optimizer.skip_synchronize()."
)


def DistributedOptimizer(  # noqa: PLR0913 - Horovod's
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Parameters] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """`optimizer`, of the same class and with the same state and options, with gradients reduced over `process_set`.

    named_parameters: names by which ranks find each other's gradients and codes keep residuals; without, parameters are counted.
    compression: see `Compression`. groups: parameters that travel together once all of them have gradients: lists of them, or
    into how many lists they are cut; num_groups: the old name. sparse_as_dense: sparse gradients travel as dense ones.

    On ranks outside of `process_set`, or where it has one, the optimizer steps alone. All ranks of the set make it.

    ValueError for names that are missing or given twice, for groups that overlap, and for gradient_predivide_factor without
    Average; NotImplementedError for Adasum with options that it does not have.
    """
    names = _names(optimizer, named_parameters)
    if gradient_predivide_factor != 1.0 and op is not Average:
        raise ValueError(f"gradient_predivide_factor = {gradient_predivide_factor} works with op=hvd.Average only")
    if op is Adasum and (groups or num_groups or process_set.process_set_id or isinstance(compression, Code)):
        raise NotImplementedError("Adasum takes no groups, no process set and no codes; leave them out")
    for parameter in names:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    base: type = _AdasumSteps if op is Adasum else _Steps
    made: Any = object.__new__(type(type(optimizer).__name__, (base, type(optimizer)), {}))
    made.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}  # which a scheduler has wrapped
    made._parameter_names = names
    made._gradients = Gradients(
        names,
        op,
        process_set,
        compression,
        scales=(1 / gradient_predivide_factor, gradient_predivide_factor),
        groups=_groups([one for one in names if one.requires_grad], num_groups if groups is None else groups),
        sparse_as_dense=sparse_as_dense,
    )
    made._gradients.expect(backward_passes_per_step)
    if op is not Adasum:
        made._gradients.attach()
    return made


class Gradients:
    """What is under way of one optimizer's gradients."""

    def __init__(
        self,
        names: dict[torch.Tensor, str],
        op: ReduceOp,
        process_set: ProcessSet,
        compression: Any,
        *,
        scales: tuple[float, float],
        groups: list[Parameters],
        sparse_as_dense: bool,
    ) -> None:
        self._names, self._op, self._set, self._compression = names, op, process_set, compression
        self._scales, self._sparse_as_dense = scales, sparse_as_dense
        self._trained = [parameter for parameter in names if parameter.requires_grad]
        self._group = {parameter: group for group in groups for parameter in group}
        self._ready: set[torch.Tensor] = set()
        """Whose gradients are complete, but for others of their group."""
        self.under_way: dict[torch.Tensor, Callable[[], None]] = {}
        """By the first parameter of each message: waits for it, and puts gradients into their places."""
        self._sent: set[torch.Tensor] = set()
        self._owner = f"optimizer {next(CONTEXT.engine.owners)}" if isinstance(compression, Code) else ""
        self.expect(1)

    def expect(self, passes: int) -> None:
        """So many backward passes before each step."""
        self._passes = passes
        self._left = dict.fromkeys(self._trained, passes)

    def attach(self) -> None:
        """From now on gradients go out as they come."""
        if not self._set.included() or self._set.size() == 1:
            self._trained = []
            return
        own = weakref.ref(self)

        def come(parameter: torch.Tensor) -> None:
            gradients = own()
            if gradients is not None:  # else the optimizer is gone, and its parameters are not
                gradients.come(parameter)

        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(come)

    def come(self, parameter: torch.Tensor) -> None:
        """Its gradient has grown by a backward pass. AssertionError if it was complete already."""
        if not self._left[parameter]:
            raise AssertionError(
                f"the gradient of {self._names[parameter]} was computed more than backward_passes_per_step = {self._passes} "
                "times before step(); raise backward_passes_per_step to accumulate gradients"
            )
        self._left[parameter] -= 1
        if not self._left[parameter]:
            self._complete(parameter)

    def synchronize(self) -> None:
        """Wait for all gradients of this step; those that did not come go out now. Collective."""
        for parameter in self._trained:
            if parameter not in self._ready and parameter not in self._sent:
                if parameter.grad is None and not parameter.requires_grad:
                    continue  # frozen meanwhile
                self._complete(parameter)
        for finish in self.under_way.values():
            finish()
        if self._owner and self._sent:
            engine, coding = CONTEXT.engine, self._compression.coding
            engine.submit(Request(kind="end_step", name=self._owner, coding=coding, owner=self._owner)).value()
        self.under_way, self._sent = {}, set()
        self.expect(self._passes)

    def _complete(self, parameter: torch.Tensor) -> None:
        group = self._group.get(parameter, [parameter])
        self._ready.add(parameter)
        if all(one in self._ready for one in group):
            self._ready.difference_update(group)
            self._sent.update(group)
            self._send(group)

    def _send(self, group: Parameters) -> None:
        for parameter in group:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sparse = [one for one in group if _gradient(one).is_sparse]
        for parameter in sparse:
            self.under_way[parameter] = self._send_sparse(parameter, _gradient(parameter))
        dense = [one for one in group if one not in sparse]
        if dense:
            self.under_way[dense[0]] = self.reduce([_gradient(one) for one in dense], self._names[dense[0]])

    def _send_sparse(self, parameter: torch.Tensor, gradient: torch.Tensor) -> Callable[[], None]:
        name = self._names[parameter]
        if not self._sparse_as_dense:
            take = sparse_allreduce_async(gradient, name, self._op, self._set)
            return lambda: setattr(parameter, "grad", take())
        dense = gradient.to_dense()
        wait = self.reduce([dense], name)

        def finish() -> None:
            wait()
            parameter.grad = dense.to_sparse(gradient.sparse_dim())

        return finish

    def reduce(self, tensors: Parameters, name: str) -> Callable[[], None]:
        """Begin to reduce `tensors` in place; what is returned waits for it."""
        if isinstance(self._compression, Code):
            code = {"coding": self._compression.coding, "owner": self._owner}
            handle = reduced(tensors, self._op, name, self._scales, self._set, in_place=True, **code)
            return lambda: handle.value()  # type: ignore[no-any-return]
        small, contexts = zip(*map(self._compression.compress, tensors), strict=True)
        handle = reduced(small, self._op, name, self._scales, self._set, in_place=True)

        def finish() -> None:
            for tensor, new, context in zip(tensors, handle.value(), contexts, strict=True):
                if new is not tensor:
                    tensor.copy_(self._compression.decompress(new, context))

        return finish


class _Steps:
    """Before the user's class of optimizers: steps with reduced gradients."""

    _gradients: Gradients
    _skips = _synchronized = False

    def synchronize(self) -> None:
        """Wait until the gradients are reduced, to clip them for example; then step within `skip_synchronize`."""
        self._gradients.synchronize()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Inside, `step` takes the gradients as they are."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From the next step on."""
        self._gradients.expect(passes)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With the gradients of all ranks. closure: computes loss and gradients, which are then reduced. Collective."""
        if closure is not None:
            return super().step(lambda: self._reduced(closure))  # type: ignore[misc]
        if not self._skips:
            if self._synchronized:
                warnings.warn(NOT_SKIPPED, stacklevel=2)
            self.synchronize()
        self._synchronized = False
        return super().step()  # type: ignore[misc]

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """AssertionError while gradients are under way."""
        if self._gradients.under_way:
            raise AssertionError("zero_grad() after backward() spoils gradients under way; call step() or synchronize() first")
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]

    def _reduced(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        self._gradients.synchronize()
        return loss


class _AdasumSteps(_Steps):
    """Each rank makes its own step; then all make the Adasum of them."""

    _parameter_names: dict[torch.Tensor, str]

    def synchronize(self) -> None:
        """Nothing: gradients are each rank's own."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """AssertionError: there is nothing to skip."""
        raise AssertionError("skip_synchronize() is not possible with Adasum, which reduces steps, not gradients")
        yield

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Collective."""
        trained = [one for one in self._parameter_names if one.requires_grad]
        before = [one.clone() for one in trained]
        loss = super(_Steps, self).step(closure)  # type: ignore[misc]
        steps = [one - old for one, old in zip(trained, before, strict=True)]
        waits = [self._gradients.reduce([one], self._parameter_names[to]) for one, to in zip(steps, trained, strict=True)]
        for wait in waits:
            wait()
        for parameter, old, step in zip(trained, before, steps, strict=True):
            parameter.copy_(old + step)
        return loss


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    groups = enumerate(optimizer.param_groups)
    held = [(f"{at}.{place}", one) for at, group in groups for place, one in enumerate(group["params"])]
    if named_parameters is None:
        return {parameter: f"noname.{where}" for where, parameter in held}
    named = list(named_parameters)
    if any(not isinstance(one, tuple) or len(one) != 2 or not isinstance(one[0], str) for one in named):
        raise ValueError("named_parameters is to hold pairs of a name and a parameter, as model.named_parameters() gives them")
    names = [name for name, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"named_parameters has several parameters of the name {sorted(twice)[0]!r}; each needs one of its own")
    known = {parameter: name for name, parameter in named}
    if missing := [where for where, parameter in held if parameter not in known]:
        raise ValueError(f"named_parameters has no name for {len(missing)} of the optimizer's {len(held)} parameters; name all")
    return {parameter: known[parameter] for _, parameter in held}


def _groups(parameters: Parameters, groups: int | Sequence[Parameters] | None) -> list[Parameters]:
    if not groups:
        return []
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError(f"groups = {groups}: into so many lists nothing can be cut")
        size, more = divmod(len(parameters), groups)
        ends = [index * size + min(index, more) for index in range(groups + 1)]
        return [cut for first, end in pairwise(ends) if (cut := parameters[first:end])]
    found = [list(group) for group in groups]
    held = [one for group in found for one in group]
    if not all(isinstance(one, torch.Tensor) for one in held) or len(set(held)) < len(held):
        raise ValueError("groups is to be a list of lists of parameters, with none of them twice")
    return [[one for one in group if one in set(parameters)] for group in found]
