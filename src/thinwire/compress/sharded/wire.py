"""The two collectives of a `fully_shard` unit, coded: what FSDP2 calls in the place of its own.

Each is a job of several steps (code, exchange, decode) on a thread that works in the order of the calls, on a process group of
its own; weights and gradients have a thread and a group each. On CPUs FSDP2's own collectives are over when they return, so
nothing overlaps. Here an all-gather is waited for when FSDP2 needs the weights, and a reduce-scatter at the end of the
backward pass if nobody reads its gradients sooner; else it is waited for at once.

Sums are made in float32 in the order of ranks: same inputs, same bits. Wang et al. 2023 (ZeRO++, arXiv 2306.10209).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.backend import ALL_GATHER
from thinwire.collectives.executor import Executor
from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import finite, sum_in_order
from thinwire.compress.sharded.layout import Row, label_of
from thinwire.compress.sharded.residual import Residual
from thinwire.compress.sharded.units import Unit, at_end_of_backward
from thinwire.errors import UserError


@dataclass
class Lane:
    """A process group that nobody else uses, and the thread that works on it."""

    group: dist.ProcessGroup
    ledger: Ledger
    executor: Executor


class _FutureWork(dist.Work):
    """A job of the thread as FSDP2 knows it."""

    def __init__(self, future: "torch.futures.Future[Tensor]") -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Raises what the job has raised."""
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Without waiting."""
        return self._future.done()


class _Collective:
    """What FSDP2 asks of both."""

    def __init__(self, unit: Unit, row: Row, lane: Lane) -> None:
        self._unit, self._row, self._lane = unit, row, lane

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer that the thread may write into, also for a forward pass in inference mode."""
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

    def _rows(self, number: int, exact: Tensor) -> Tensor:
        """`number` rows with their exact parts filled in."""
        itemsize = exact.element_size()
        rows = torch.zeros(number, self._row.row_bytes(itemsize), dtype=torch.uint8)
        rows[:, : self._row.exact_values * itemsize].view(exact.dtype).copy_(exact)
        return rows

    def _exact(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What `_rows` filled in."""
        return rows[:, : self._row.exact_values * dtype.itemsize].view(dtype)

    def _codes(self, row: Tensor, itemsize: int) -> Tensor:
        """Where the codes of one row lie."""
        first = self._row.exact_bytes(itemsize)
        return row[first : first + self._row.payload_bytes]


class CodedAllGather(_Collective):
    """Weights: each rank codes its own chunk once, and decodes all chunks, its own too, so that all have the same weights."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Never waits; FSDP2 waits for what is returned when it needs the weights."""
        self._check(input_tensor, self._row.chunk)
        return _FutureWork(self._lane.executor.submit(lambda: self._gather(output_tensor, input_tensor)))

    def _gather(self, output: Tensor, own: Tensor) -> Tensor:
        row, size = self._row, own.element_size()
        chunk = own.view(1, -1)
        sent = self._rows(1, row.take(chunk, False))
        if row.codec is not None:
            self._codes(sent[0], size).copy_(row.codec.encode(row.take(chunk, True)[0]))
        received = torch.empty(row.world_size, row.row_bytes(size), dtype=torch.uint8)
        with self._lane.ledger.label(label_of(self._unit.name, "weights")):
            ALL_GATHER(received.view(-1), sent.view(-1), group=self._lane.group)
        chunks = output.view(row.world_size, -1)
        row.put(chunks, self._exact(received, own.dtype), False)
        if row.codec is not None:
            for source in range(row.world_size):
                values = row.codec.decode(self._codes(received[source], size), row.coded_values)
                row.put(chunks[source : source + 1], values.view(1, -1), True)
        return output


class CodedReduceScatter(_Collective):
    """Gradients: each rank codes the chunks of the others, and adds up what arrives for its own. residual: None: no feedback."""

    def __init__(self, unit: Unit, row: Row, lane: Lane, residual: Residual | None) -> None:
        super().__init__(unit, row, lane)
        self.residual = residual

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Waits at once only if somebody reads `output_tensor` before the end of the backward pass."""
        self._check(input_tensor, self._row.world_size * self._row.chunk)
        factor = self._unit.factor(op)
        future = self._lane.executor.submit(lambda: self._reduce(output_tensor, input_tensor, factor))
        later = op != dist.ReduceOp.SUM and self._unit.may_wait_for_gradients()  # after a SUM FSDP2 divides the output itself
        if not (later and at_end_of_backward(future.wait)):
            future.wait()
        return None

    def _reduce(self, output: Tensor, gradients: Tensor, factor: float) -> Tensor:
        row, rank, size = self._row, self._lane.group.rank(), gradients.element_size()
        chunks = gradients.view(row.world_size, -1)
        if not finite(gradients):
            raise UserError(
                f"the gradient of unit {self._unit.name or 'root'} is not finite; lower the learning rate, or look at the data "
                "of this step"
            )
        sent = self._rows(row.world_size, row.take(chunks, False))
        values = row.take(chunks, True)
        if self.residual is not None:
            self.residual.add_to(values)
        others = [shard for shard in range(row.world_size) if shard != rank]
        if row.codec is not None:
            for shard in others:
                self._codes(sent[shard], size).copy_(row.codec.encode(values[shard]))
        received = torch.empty_like(sent)
        with self._lane.ledger.label(label_of(self._unit.name, "gradients")):
            work = dist.all_to_all_single(received, sent, group=self._lane.group, async_op=True)
        own = values[rank]
        if self.residual is not None and row.codec is not None:  # while the codes travel
            for shard in others:
                values[shard] -= row.codec.decode(self._codes(sent[shard], size), row.coded_values)
            self.residual.keep(values)
        work.wait()

        result = output.view(1, -1)
        exact = self._exact(received, gradients.dtype)
        exact = exact if exact.dtype == torch.float64 else exact.to(torch.float32)
        row.put(result, sum_in_order(list(exact)).mul_(factor).view(1, -1), False)
        if row.codec is not None:
            decode, number = row.codec.decode, row.coded_values
            parts = [own if i == rank else decode(self._codes(received[i], size), number) for i in range(row.world_size)]
            row.put(result, sum_in_order(parts).mul_(factor).view(1, -1), True)
        return output
