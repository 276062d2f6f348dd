"""The two collectives of a `fully_shard` unit, coded: what FSDP2 calls in the place of its own.

Each is a job of several steps (code, exchange, decode), on a process group of its own.

On CPUs it runs on a thread that works in the order of the calls; weights and gradients have a thread and a group each. There
FSDP2's own collectives are over when they return, so nothing overlaps. Here an all-gather is waited for when FSDP2 needs the
weights, and a reduce-scatter at the end of the backward pass if nobody reads its gradients sooner; else it is waited for at once.

On a device all steps are launched on the current stream: FSDP2 calls with its own stream for all-gathers, or for reduce-scatters,
records an event behind what was launched, and has others wait for that. Where it gathers on the computing stream (async_op), what
is returned launches the decoding when it is waited for. Nothing is read on the host (`backward`).

Sums are made in float32, of float64 in float64, in the order of ranks, and rounded once: same inputs, same bits. Complex numbers
are pairs of real ones. Wang et al. 2023 (ZeRO++, arXiv 2306.10209).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.executor import Executor
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather, all_to_all
from thinwire.compress.base import spoiled, sum_in_order
from thinwire.compress.precision import wide, widened
from thinwire.compress.sharded.backward import BackwardPass
from thinwire.compress.sharded.layout import Row, label_of
from thinwire.compress.sharded.replicas import Replicas
from thinwire.compress.sharded.residual import Residual
from thinwire.compress.sharded.units import Unit
from thinwire.errors import UserError

HERE, EARLIER = 1, 2
"""Flags of a row: it is not finite; something in this backward pass was not, on the rank that sends it."""


class Passes(Protocol):
    """Who wants to know of forward and backward passes."""

    def wait(self) -> AbstractContextManager[None]:
        """Entered while a pass on the CPU stands still for what is under way."""
        ...

    def label(self, own: str) -> str:
        """For the ledger, of what the pass sends; in a step `own`."""
        ...


class Unobserved:
    """The Passes of which nobody wants to know."""

    def wait(self) -> AbstractContextManager[None]:
        return nullcontext()

    def label(self, own: str) -> str:
        return own


@dataclass
class Lane:
    """A process group that nobody else uses, and the thread that works on it; None: jobs are launched."""

    group: dist.ProcessGroup
    ledger: Ledger
    executor: Executor | None
    passes: Passes = field(default_factory=Unobserved)


def real(flat: Tensor) -> Tensor:
    """A flat buffer as real numbers, in the same memory."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


class _FutureWork(dist.Work):
    """A job of the thread as FSDP2 knows it."""

    def __init__(self, future: "torch.futures.Future[Tensor]", passes: Passes) -> None:
        super().__init__()
        self._future, self._passes = future, passes

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Raises what the job has raised."""
        with self._passes.wait():
            self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Without waiting."""
        return self._future.done()


class _LaterWork(dist.Work):
    """What is left to be launched, on the stream that waits."""

    def __init__(self, launch: Callable[[], object]) -> None:
        super().__init__()
        self._launch: Callable[[], object] | None = launch

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Of the stream only."""
        if self._launch is not None:
            self._launch()
            self._launch = None
        return True


class _Collective:
    """What FSDP2 asks of both."""

    def __init__(self, unit: Unit, row: Row, lane: Lane) -> None:
        self._unit, self._row, self._lane = unit, row, lane

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer that a thread may write into, also for a forward pass in inference mode."""
        with torch.inference_mode(False):
            return torch.empty(*size, dtype=dtype, device=device)

    def _check(self, flat: Tensor, values: int) -> None:
        if flat.dtype == torch.uint8:
            raise UserError(f"unit {self._unit.name or 'root'} mixes dtypes in its buffer; compress_sharded wants one")
        if flat.numel() != values:
            raise UserError(
                f"unit {self._unit.name or 'root'} hands over {flat.numel()} of {values} values: some parameters have no "
                "gradient in this step; call set_reduce_scatter_unused_params(True), or leave them out of the unit"
            )

    def _rows(self, number: int, exact: Tensor, *, flagged: bool = False) -> Tensor:
        """`number` rows with their exact parts filled in."""
        itemsize = exact.element_size()
        rows = exact.new_empty(number, self._row.row_bytes(itemsize, flagged=flagged), dtype=torch.uint8)
        rows[:, : self._row.exact_values * itemsize].view(exact.dtype).copy_(exact)
        rows[:, self._row.exact_values * itemsize :] = 0
        return rows

    def _exact(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What `_rows` filled in."""
        return rows[:, : self._row.exact_values * dtype.itemsize].view(dtype)

    def _codes(self, row: Tensor, itemsize: int) -> Tensor:
        """Where the codes of one row lie."""
        first = self._row.exact_bytes(itemsize)
        return row[first : first + self._row.payload_bytes]


class CodedAllGather(_Collective):
    """Weights: each rank codes its own chunk once, and decodes all chunks, its own too, so that all have the same weights.

    second: where weights are gathered again from fewer ranks, which hold what was decoded: as it is. None: they are not.
    """

    def __init__(self, unit: Unit, row: Row, lane: Lane, second: Lane | None = None) -> None:
        super().__init__(unit, row, lane)
        self._second = second
        self._second_group = unit.secondary_group

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Never waits; FSDP2 waits for what is returned when it needs the weights, or for the current stream."""
        output, own = real(output_tensor), real(input_tensor)
        again = self._second is not None and group == self._second_group
        lane = self._second if self._second is not None and again else self._lane
        if not again:
            self._check(own, self._row.chunk)
        begin = self._begin_plain if again or self._row.codec is None else self._begin
        label = lane.passes.label(label_of(self._unit.name, "weights"))

        def job() -> Tensor:
            begin(output, own, lane, label)()
            return output

        if lane.executor is not None:
            return _FutureWork(lane.executor.submit(job), lane.passes)
        if async_op:
            return _LaterWork(begin(output, own, lane, label))
        job()
        return None

    def _begin_plain(self, output: Tensor, own: Tensor, lane: Lane, label: str) -> Callable[[], object]:
        """Returns what is left to do."""
        return all_gather(output, own, lane.group, lane.ledger, label).wait

    def _begin(self, output: Tensor, own: Tensor, lane: Lane, label: str) -> Callable[[], object]:
        """Returns what is left to do."""
        row, size = self._row, own.element_size()
        assert row.codec is not None
        decode, chunk = row.codec.decode, own.view(1, -1)
        sent = self._rows(1, row.take(chunk, False))
        self._codes(sent[0], size).copy_(row.codec.encode(row.take(chunk, True)[0].float()))
        received = sent.new_empty(row.world_size, row.row_bytes(size))
        work = all_gather(received.view(-1), sent.view(-1), lane.group, lane.ledger, label)

        def finish() -> None:
            work.wait()
            chunks = output.view(row.world_size, -1)
            row.put(chunks, self._exact(received, own.dtype), False)
            for source in range(row.world_size):
                values = decode(self._codes(received[source], size), row.coded_values)
                row.put(chunks[source : source + 1], values.view(1, -1), True)

        return finish


class CodedReduceScatter(_Collective):
    """Gradients: each rank codes the chunks of the others, and adds up what arrives for its own.

    residual: None: no feedback. replicas: None where there are none.
    """

    def __init__(
        self, unit: Unit, row: Row, lane: Lane, residual: Residual | None, backward: BackwardPass, replicas: Replicas | None
    ) -> None:
        super().__init__(unit, row, lane)
        self.residual, self._backward, self._replicas = residual, backward, replicas
        self._partial: Tensor | None = None
        """What was added up since it was averaged over the replicas last."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Waits at once only if somebody reads `output_tensor` before the end of the backward pass."""
        output, gradients = real(output_tensor), real(input_tensor)
        self._check(gradients, self._row.world_size * self._row.chunk)
        factor = self._unit.factor(op, 1 if self._replicas is None else self._replicas.number)
        adds_up = self._replicas is not None and not self._unit.averages
        if adds_up:
            output.zero_()  # until then FSDP2 adds nothing to what there is
            self._backward.forget(self._unit.without_gradients())
        later = op != dist.ReduceOp.SUM and self._unit.may_wait_for_gradients()  # after a SUM FSDP2 divides the output itself
        job = partial(self._averaged, output, gradients, factor, adds_up, final=later)
        self._backward.run(job, self._lane.executor, later=later or adds_up)
        return None

    def _averaged(self, output: Tensor, gradients: Tensor, factor: float, adds_up: bool, *, final: bool) -> Tensor:
        """final: whether nobody changes `output` behind it."""
        if self._replicas is None:
            self._reduce(output, gradients, factor)
            if final:
                self._backward.reduced(self._unit.shape, output)
            return output
        exact = output.dtype in (torch.float32, torch.float64) and not adds_up
        chunk = output if exact else output.new_empty(output.shape, dtype=wide(output.dtype))
        self._reduce(chunk, gradients, factor)
        if self._partial is not None:
            chunk += self._partial
        chunk[:1].masked_fill_(self._backward.spoiled, torch.nan)  # for the other replicas, also of those chunks that are finite
        self._partial = chunk if adds_up else None
        if not adds_up:
            self._backward.then(self._replicas.average(self._unit.name, chunk), None if exact else output)
        return output

    def _reduce(self, output: Tensor, gradients: Tensor, factor: float) -> Tensor:
        row, rank, size = self._row, self._lane.group.rank(), gradients.element_size()
        chunks = gradients.view(row.world_size, -1)
        sent = self._rows(row.world_size, row.take(chunks, False), flagged=True)
        values = row.take(chunks, True)
        bad = torch.stack([spoiled(chunk) for chunk in chunks])
        self._backward.found(bad, lambda: row.not_finite(chunks))
        sent[:, -1] = HERE * bad + EARLIER * self._backward.own
        if self.residual is not None:
            self.residual.add_to(values)
        others = [shard for shard in range(row.world_size) if shard != rank]
        if row.codec is not None:
            if self._backward.on_device or bool(bad.any()):
                values.masked_fill_(bad.view(-1, 1), 0)  # codes of what is not finite say nothing; the flag does
            for shard in others:
                self._codes(sent[shard], size).copy_(row.codec.encode(values[shard].float()))
        received = torch.empty_like(sent)
        work = all_to_all(received, sent, self._lane.group, self._lane.ledger, label_of(self._unit.name, "gradients"))
        own = values[rank]
        if self.residual is not None and row.codec is not None:  # while the codes travel
            for shard in others:
                values[shard] -= row.codec.decode(self._codes(sent[shard], size), row.coded_values)
            self.residual.keep(values)
        work.wait()

        flags = received[:, -1]
        self._backward.spoiled = self._backward.spoiled | (flags != 0).any()
        result = output.view(1, -1)
        exact = widened(self._exact(received, gradients.dtype))
        row.put(result, sum_in_order(list(exact)).mul_(factor).view(1, -1), False)
        if row.codec is not None:
            decode, number = row.codec.decode, row.coded_values
            parts = [own if i == rank else decode(self._codes(received[i], size), number) for i in range(row.world_size)]
            scale = torch.full((), factor, dtype=own.dtype, device=own.device)
            scale.masked_fill_((flags & HERE != 0).any(), torch.nan)
            row.put(result, sum_in_order([part.to(own.dtype) for part in parts]).mul_(scale).view(1, -1), True)
        return output
