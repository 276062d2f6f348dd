"""The process group: c10d's calls as MPI's non-blocking ones.

Each method prepares its tensors in the caller's thread, submits an exchange (`engine`) and returns its Work. An exchange compares
the ranks' calls (`agreement`), starts MPI's own collective on the group's communicator, and copies the result out where a tensor
is not contiguous or is one of a list. MPI chooses the algorithm, and so which bytes go where.

What MPI reads or writes is a local variable of the steps, and so lives until they end: mpi4py's requests do not hold it.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.mpi.agreement import Call, agreed, agreed_parts
from thinwire.collectives.mpi.buffers import Reductions, op_name, raw
from thinwire.collectives.mpi.engine import Engine, Exchange, Lane, MpiWork, Receive, Steps
from thinwire.collectives.mpi.host import buffer_for, contiguous, copy_out, separate, settled
from thinwire.collectives.mpi.library import Library
from thinwire.errors import UserError

Plan = tuple[Call, Callable[[], Steps]]
"""What all ranks must do alike, and how this one does it."""


class MpiGroup:
    """The ranks of one communicator. Tensors of a device go through memory of the host (`host`). It takes c10d's calls, from the
    `MeteredGroup` around it."""

    def __init__(self, library: Library, engine: Engine, reductions: Reductions, comm: Any, lane: Lane) -> None:
        self._library, self._engine, self._reductions, self._comm, self._lane = library, engine, reductions, comm, lane
        self._p: int = comm.Get_size()

    def rank(self) -> int:
        return int(self._comm.Get_rank())

    def size(self) -> int:
        return self._p

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._lane.timeout_s)

    def give_up(self, why: str) -> None:
        """End all calls that are on their way, and those to come, with an error. Returns at once."""
        self._engine.give_up(self._lane, why)

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        name = self._reduction(tensors, opts)

        def steps() -> Steps:
            flats = [contiguous(tensor) for tensor in tensors]
            in_place = self._library.MPI.IN_PLACE
            sources = [in_place if self._library.good_in_place else self._reductions.spec(flat.clone()) for flat in flats]
            yield [
                self._comm.Iallreduce(source, self._reductions.spec(flat), self._reductions.op(flat.dtype, name))
                for source, flat in zip(sources, flats, strict=True)
            ]
            self._finish(tensors, flats, name)

        return self._submit(tensors, (Call("all_reduce", tensors[0].dtype, _values(tensors), reduction=name), steps))

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        (tensor,), root, name = tensors, opts.rootRank, self._reduction(tensors, opts)

        def steps() -> Steps:
            flat, op = contiguous(tensor), self._reductions.op(tensor.dtype, name)
            spec = self._reductions.spec(flat)
            if self.rank() == root:
                yield [self._comm.Ireduce(self._library.MPI.IN_PLACE, spec, op, root)]
                self._finish([tensor], [flat], name)
            else:
                yield [self._comm.Ireduce(spec, None, op, root)]

        return self._submit(tensors, (Call("reduce", tensor.dtype, tensor.numel(), root, name), steps))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        (output,), (parts,) = outputs, inputs
        self._check_list("reduce_scatter", parts, output)
        return self._reduce_scatter(output, lambda: contiguous(torch.cat([part.reshape(-1) for part in parts])), opts)

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        self._check_whole("reduce_scatter", input, output)
        return self._reduce_scatter(output, lambda: separate(input, output), opts)

    def _reduce_scatter(self, output: torch.Tensor, whole: Callable[[], torch.Tensor], opts: Any) -> dist.Work:
        name = self._reduction([output], opts)

        def steps() -> Steps:
            flat, source, op = buffer_for(output), whole(), self._reductions.op(output.dtype, name)
            yield [self._comm.Ireduce_scatter_block(self._reductions.spec(source), self._reductions.spec(flat), op)]
            self._finish([output], [flat], name)

        call = Call("reduce_scatter", output.dtype, output.numel() * self._p, reduction=name)
        return self._submit([output], (call, steps))

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        (tensor,) = tensors
        root = opts.rootRank

        def steps() -> Steps:
            flat = contiguous(tensor)
            yield [self._comm.Ibcast(self._bytes(flat), root)]
            copy_out([tensor], [flat])

        return self._submit(tensors, (Call("broadcast", tensor.dtype, tensor.numel(), root), steps))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        (parts,), (tensor,) = outputs, inputs
        return self._submit(parts, self._gathered(parts, tensor))

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        # outputs[rank][tensor], where the plain call has outputs[tensor][rank]
        columns = [[row[index] for row in outputs] for index in range(len(inputs))]
        plans = [self._gathered(column, tensor) for column, tensor in zip(columns, inputs, strict=True)]
        return self._submit([tensor for row in outputs for tensor in row], *plans)

    def _gathered(self, parts: Sequence[torch.Tensor], tensor: torch.Tensor) -> Plan:
        self._check_list("all_gather", parts, tensor)

        def steps() -> Steps:
            own, whole = contiguous(tensor), torch.empty(self._p * tensor.numel(), dtype=tensor.dtype)
            yield [self._comm.Iallgather(self._bytes(own), self._bytes(whole))]
            copy_out(parts, whole.view(self._p, -1).unbind())

        return Call("all_gather", tensor.dtype, tensor.numel()), steps

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        self._check_whole("all_gather", output, input)

        def steps() -> Steps:
            own, flat = separate(input, output), buffer_for(output)
            yield [self._comm.Iallgather(self._bytes(own), self._bytes(flat))]
            copy_out([output], [flat])

        return self._submit([output], (Call("all_gather", input.dtype, input.numel()), steps))

    def alltoall_base(self, output: Any, input: Any, output_sizes: Any, input_sizes: Any, opts: Any = None) -> dist.Work:
        sent, received = _splits(input, input_sizes, self._p), _splits(output, output_sizes, self._p)

        def steps() -> Steps:
            flat = buffer_for(output)
            yield from self._all_to_all(separate(input, output), sent, flat, received)
            copy_out([output], [flat])

        return self._submit([output], (Call("all_to_all", input.dtype, -1), steps))

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        self._check_count("all_to_all", inputs)
        self._check_count("all_to_all", outputs)
        sent, received = ([part.nbytes for part in parts] for parts in (inputs, outputs))

        def steps() -> Steps:
            source = contiguous(torch.cat([part.reshape(-1) for part in inputs]))
            flat = torch.empty(_values(outputs), dtype=outputs[0].dtype)
            yield from self._all_to_all(source, sent, flat, received)
            copy_out(outputs, flat.split([part.numel() for part in outputs]))

        return self._submit(outputs, (Call("all_to_all", inputs[0].dtype, -1), steps))

    def _all_to_all(self, source: torch.Tensor, sent: list[int], target: torch.Tensor, received: list[int]) -> Steps:
        byte = self._library.MPI.BYTE
        yield from agreed_parts(self._comm, sent, received, self._lane.name)
        yield [self._comm.Ialltoallv([raw(source), sent, byte], [raw(target), received, byte])]

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (tensor,), root = inputs, opts.rootRank
        parts = outputs[0] if self.rank() == root else []
        if self.rank() == root:
            self._check_list("gather", parts, tensor)

        def steps() -> Steps:
            own, whole = contiguous(tensor), torch.empty(len(parts) * tensor.numel(), dtype=tensor.dtype)
            yield [self._comm.Igather(self._bytes(own), self._bytes(whole) if parts else None, root)]
            copy_out(parts, whole.view(self._p, -1).unbind() if parts else [])

        return self._submit(parts, (Call("gather", tensor.dtype, tensor.numel(), root), steps), read=[tensor])

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (tensor,), root = outputs, opts.rootRank
        parts = inputs[0] if self.rank() == root else []
        if self.rank() == root:
            self._check_list("scatter", parts, tensor)

        def steps() -> Steps:
            flat = buffer_for(tensor)
            source = self._bytes(contiguous(torch.cat([part.reshape(-1) for part in parts]))) if parts else None
            yield [self._comm.Iscatter(source, self._bytes(flat), root)]
            copy_out([tensor], [flat])

        return self._submit(outputs, (Call("scatter", tensor.dtype, tensor.numel(), root), steps))

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._submit([], (Call("barrier"), _nothing))  # that all have compared their calls is the barrier

    def send(self, tensors: Any, peer: int, tag: int) -> dist.Work:
        (tensor,) = tensors
        self._library.check_tag(tag)
        flat = contiguous(tensor)

        def steps() -> Steps:
            yield [self._comm.Isend(self._bytes(flat), peer, tag)]

        what = f"send of {flat.nbytes} B to its rank {peer}"
        return self._engine.submit(Exchange(what, steps(), MpiWork([tensor]), self._lane, ordered=False))

    def recv(self, tensors: Any, peer: int, tag: int) -> dist.Work:
        return self._receive(tensors[0], peer, tag, f"recv from its rank {peer}")

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        return self._receive(tensors[0], self._library.MPI.ANY_SOURCE, tag, "recv from any rank")

    def _receive(self, tensor: torch.Tensor, source: int, tag: int, what: str) -> dist.Work:
        self._library.check_tag(tag)
        MPI, work, expected, wait = self._library.MPI, MpiWork([tensor]), tensor.nbytes, settled([tensor])

        def unlike(came: str) -> UserError:
            where = f"{what} in group {self._lane.name!r}"
            return UserError(f"{where}: {came} came where {expected} B were expected; both sides must name one size")

        def steps() -> Steps:
            flat = buffer_for(tensor)
            request = self._comm.Irecv(self._bytes(flat), source, tag)
            status = MPI.Status()
            try:
                yield [Receive(request, status)]
            except MPI.Exception as error:
                if error.Get_error_class() != MPI.ERR_TRUNCATE:
                    raise
                raise unlike("a larger message") from None
            got = status.Get_count(MPI.BYTE)
            if got != expected:
                raise unlike(f"{got} B")
            work.source = status.Get_source()
            wait()  # for what the device still reads there
            copy_out([tensor], [flat])

        return self._engine.submit(Exchange(f"{what} of {expected} B", steps(), work, self._lane, ordered=False))

    def _submit(self, outputs: Any, *plans: Plan, read: Sequence[torch.Tensor] = ()) -> dist.Work:
        """One Work for one or several collectives, which run one after another. read: tensors, beside these on one device."""
        wait = settled([*outputs, *read])

        def whole() -> Steps:
            wait()
            for call, steps in plans:
                yield from agreed(self._comm, call, self._lane.name)
                yield from steps()

        work = MpiWork(list(outputs))
        return self._engine.submit(Exchange(plans[0][0].op, whole(), work, self._lane, ordered=True))

    def _reduction(self, tensors: Sequence[torch.Tensor], opts: Any) -> str:
        name = op_name(opts.reduceOp) if opts is not None else "SUM"
        for tensor in tensors:
            self._reductions.check(tensor.dtype, name)
        return name

    def _finish(self, tensors: Sequence[torch.Tensor], flats: Sequence[torch.Tensor], name: str) -> None:
        if name == "AVG":
            for flat in flats:
                flat.div_(self._p)
        copy_out(tensors, flats)

    def _bytes(self, tensor: torch.Tensor) -> list[Any]:
        return [raw(tensor), self._library.MPI.BYTE]

    def _check_whole(self, op: str, whole: torch.Tensor, part: torch.Tensor) -> None:
        if whole.numel() != self._p * part.numel() or whole.dtype != part.dtype:
            raise UserError(
                f"{op}: {whole.numel()} values of {whole.dtype} are not {self._p} times {part.numel()} of {part.dtype}; "
                "the whole must have one part for each rank"
            )

    def _check_count(self, op: str, parts: Sequence[torch.Tensor]) -> None:
        if len(parts) != self._p:
            raise UserError(f"{op}: {len(parts)} tensors for {self._p} ranks; the list must have one for each")

    def _check_list(self, op: str, parts: Sequence[torch.Tensor], own: torch.Tensor) -> None:
        self._check_count(op, parts)
        for rank, part in enumerate(parts):
            if part.numel() != own.numel() or part.dtype != own.dtype:
                raise UserError(
                    f"{op}: the tensor for rank {rank} has {part.numel()} values of {part.dtype}, "
                    f"this rank's own {own.numel()} of {own.dtype}; they must be alike"
                )


def _values(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _splits(tensor: torch.Tensor, rows: Sequence[int], p: int) -> list[int]:
    """Bytes for each rank: `rows` of the first dimension, equal parts where none are given."""
    if not rows:
        if tensor.dim() == 0 or tensor.shape[0] % p:
            raise UserError(f"all_to_all: a tensor of shape {tuple(tensor.shape)} has no {p} equal parts; give the splits")
        rows = [tensor.shape[0] // p] * p
    if len(rows) != p or sum(rows) != tensor.shape[0]:
        raise UserError(f"all_to_all: splits {list(rows)} for {p} ranks and {tensor.shape[0]} rows; one for each, and all rows")
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    return [count * row_bytes for count in rows]


def _nothing() -> Steps:
    yield from ()
