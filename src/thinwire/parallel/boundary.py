"""A stage of torch.distributed.pipelining whose sends are coded: activations going forward, their gradients going back.

What is sent is the payload of a `BoundaryCodec`, whose size follows from the shape alone; it is decoded into the buffer that
PyTorch's stage has for what arrives, just before the stage uses it. Sends of stages on the same rank (V schedules) stay as they
are: nothing crosses a wire.

Receives can be posted before the step (`post`): a message then travels when it is sent, and not only when its receiver has got
so far as to ask for it. In the order in which the other rank sends, by which gloo and MPI match them. On a device, whose calls on
one communicator follow one another, the schedule's own order stays. Passes without gradients are no schedule's: `arrival` and
`send` hand on what crosses in them, in the same codes.

Where a stage knows which `samples` the step's micro-batches are, and both sides keep copies, activations travel as the change
since a sample's last visit (`compress.activations.differences`).

The stage also notes when it computed what, by the clock of its device: from these moments come the seconds of a step and the
timeline of the report. PyTorch's stage calls these methods on every torch that we run on; `tests/parallel/test_pipeline.py` would
fail where it does not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from thinwire.collectives.clock import clock_of
from thinwire.compress.activations.boundary import BoundaryCodec
from thinwire.compress.activations.differences import Differences, Visit


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """How a stage's neighbours are reached: codecs of what is sent each way, None: as it is. Shapes are of one micro-batch.
    copies: of activations of samples that return, which then are coded otherwise."""

    arriving: tuple[Tensor, ...]
    """What the stage gets, on `meta`."""
    leaving: tuple[Tensor, ...]
    """What it gives, on `meta`."""
    activations_in: BoundaryCodec | None = None
    activations_out: BoundaryCodec | None = None
    gradients_in: BoundaryCodec | None = None
    gradients_out: BoundaryCodec | None = None
    copies_in: Differences | None = None
    copies_out: Differences | None = None


@dataclass(frozen=True)
class Computed:
    """One pass of one micro-batch through a stage. kind: F forward, B backward, I of inputs only, W of weights only."""

    kind: str
    stage: int
    micro: int
    begin: Any
    end: Any


class CodedStage(PipelineStage):
    """One per stage and rank."""

    def __init__(
        self,
        module: nn.Module,
        place: tuple[int, int],
        group: dist.ProcessGroup,
        device: torch.device,
        crossing: Crossing,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """place: the stage's index, and the number of stages. precision: entered around each forward pass."""
        self._crossing, self._precision = crossing, precision
        self._payloads: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        self._posted: dict[tuple[str, int], list[dist.Work]] = {}
        self.samples: Sequence[Sequence[int]] = ()
        """Of each micro-batch of the step, by number; none: not known."""
        self.clock = clock_of(device)
        self.computed: list[Computed] = []
        """Since the last `clear_runtime_states`, which begins a step."""
        self.hold: Callable[[str, Any], None] | None = None
        """Called with the kind of a pass and the moment when it began, before it counts as over: paced compute."""
        super().__init__(
            module,
            *place,
            device,
            input_args=crossing.arriving,
            output_args=crossing.leaving,
            group=group,
        )

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.computed.clear()

    @property
    def posts(self) -> bool:
        """Whether receives may come before the schedule asks for them; see the top of the file."""
        return not self.clock.on_device

    def post(self, kind: str, chunk: int) -> None:
        """Begin to receive the activation ("F") or gradient ("B") of a micro-batch of the step that is about to begin."""
        ops = self.get_fwd_recv_ops(chunk) if kind == "F" else self.get_bwd_recv_ops(chunk)
        self._posted[kind, chunk] = dist.batch_isend_irecv(ops) if ops else []

    def arrival(self, source: int) -> Callable[[], Tensor]:
        """Begin to receive an activation of a pass without gradients from that rank; what is returned waits for it."""
        like, codec = self._crossing.arriving[0], self._crossing.activations_in
        shape, dtype = (like.shape, like.dtype) if codec is None else ((codec.payload_bytes(like.shape),), torch.uint8)
        arrived = torch.empty(shape, dtype=dtype, device=self.device)
        work = dist.irecv(arrived, group=self.group, group_src=source)

        def there() -> Tensor:
            if work is not None:
                work.wait()
            return arrived if codec is None else codec.unpack(arrived, like.shape, like.dtype)

        return there

    def send(self, x: Tensor, target: int) -> Callable[[], Any]:
        """Begin to send what leaves in such a pass; what is returned waits until it is gone."""
        codec = self._crossing.activations_out
        leaving = x.contiguous() if codec is None else codec.pack(x)
        work = dist.isend(leaving, group=self.group, group_dst=target)
        assert work is not None, "this rank is one of the group"
        return work.wait

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if ("F", fwd_chunk_id) in self._posted:
            return []
        return self._receiving("F", fwd_chunk_id, super().get_fwd_recv_ops(fwd_chunk_id), self._arriving(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if ("B", bwd_chunk_id) in self._posted:
            return []
        return self._receiving("B", bwd_chunk_id, super().get_bwd_recv_ops(bwd_chunk_id), self._crossing.gradients_in)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        codec = self._visit(self._crossing.copies_out, fwd_chunk_id) or self._crossing.activations_out
        return _sending(super().get_fwd_send_ops(fwd_chunk_id), codec)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return _sending(super().get_bwd_send_ops(bwd_chunk_id), self._crossing.gradients_out)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self._decode("F", fwd_chunk_id, self._arriving(fwd_chunk_id))
        with self._precision():
            return self._noted("F", fwd_chunk_id, super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self._decode("B", bwd_chunk_id, self._crossing.gradients_in)
        kind = "B" if kwargs.get("full_backward", True) else "I"
        return self._noted(kind, bwd_chunk_id, super().backward_one_chunk, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self._noted("W", bwd_chunk_id, super().backward_weight_one_chunk, *args, **kwargs)

    def copies(self) -> Iterator[tuple[str, Differences]]:
        """Of either side that has them, with its name."""
        for side, copies in (("input", self._crossing.copies_in), ("output", self._crossing.copies_out)):
            if copies is not None:
                yield side, copies

    def _visit(self, copies: Differences | None, chunk: int) -> Visit | None:
        return Visit(copies, self.samples[chunk]) if copies is not None and self.samples else None

    def _arriving(self, chunk: int) -> BoundaryCodec | Visit | None:
        return self._visit(self._crossing.copies_in, chunk) or self._crossing.activations_in

    def _noted(self, kind: str, chunk: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = self.clock.now()
        result = run(chunk, *args, **kwargs)
        if self.hold is not None:
            self.hold(kind, begin)
        self.computed.append(Computed(kind, self.stage_index, chunk, begin, self.clock.now()))
        return result

    def _receiving(self, kind: str, chunk: int, ops: list[dist.P2POp], codec: BoundaryCodec | Visit | None) -> list[dist.P2POp]:
        """The same, of payloads."""
        if codec is not None:
            for op in ops:
                target, size = op.tensor, codec.payload_bytes(op.tensor.shape)
                op.tensor = torch.empty(size, dtype=torch.uint8, device=target.device)
                self._payloads.setdefault((kind, chunk), []).append((op.tensor, target))
        return ops

    def _decode(self, kind: str, chunk: int, codec: BoundaryCodec | Visit | None) -> None:
        for work in self._posted.pop((kind, chunk), ()):
            work.wait()
        for payload, target in self._payloads.pop((kind, chunk), ()):
            assert codec is not None, "there are payloads only where there is a codec"
            target.copy_(codec.unpack(payload, target.shape, target.dtype))


def _sending(ops: list[dist.P2POp], codec: BoundaryCodec | Visit | None) -> list[dist.P2POp]:
    for op in ops if codec is not None else ():
        assert codec is not None
        op.tensor = codec.pack(op.tensor)
    return ops
