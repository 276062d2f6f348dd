"""Averaging in low rank: one step of the power iteration, whose two factors are all-reduced.

p ranks, w_i = g_i + e_i the matrix that rank i should send, [n, m] with n >= m (a parameter of more dimensions as [first, all
others], a wide one transposed), Q [r, m] of the step before, Gaussian from the parameter's name in the first step:

    P   = sum_i w_i Q^T           all-reduce in bfloat16, [n, r]
    B   = orthonormal basis of P  by Householder's QR, on each rank from the same bits
    Q_i = B^T w_i                 [r, m]
    Q   = 1/p sum_i Q_i           all-reduce
    result  B Q                   error l_i = w_i - B Q_i

Q is linear in w, so the result is the projection onto B of what one process knows that has the mean of all w_i. Nothing is lost
to the average, whatever B is: 1/p sum_i l_i = 1/p sum_i w_i - result. So P, which only says what B spans, may be rounded, and Q,
what arrives, is not: hence the longer side is P's. (w_i - result would do as error as well, but it also keeps by how much rank i
differs from the mean; that part never arrives anywhere, and grows for ever.)

Q goes on to the next step, so over steps B turns to the r largest singular vectors of what is sent. Column k of P is then
sigma_k^2 times one of them, and each is rounded by its own size, 2^-9 of it. QR's basis is complete even where P has a lower
rank, or is zero: it ends with any columns then, and a matrix that was zero for some steps is found again.

Matrices for which n m is less than twice r (n + m), and vectors, are not taken; they go along with Q, exactly. All matrices of a
bucket share two collectives. The sums of an all-reduce over more than two ranks depend on where in its message a value stands, so
results in other buckets agree within rounding (that of P), not to the bit. B Q is a matrix product: bit-equal on ranks with the
same kind of processor.

Vogels, Karimireddy & Jaggi 2019 (PowerSGD).
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.averager import Averager, Parameters, Share, exact_bytes, flags_of, ring_bytes
from thinwire.compress.base import matrix_shape, spoiled
from thinwire.compress.memory import Memory
from thinwire.compress.speed import seconds_of_stages
from thinwire.errors import UserError
from thinwire.traffic import Transfer

P_DTYPE = torch.bfloat16
WORTH = 2
"""How many times smaller the two factors must be than the matrix."""

TRIED_VALUES = 2**20


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """n and m of a parameter, the longer one first."""
    rows, columns = matrix_shape(shape)
    return max(rows, columns), min(rows, columns)


def upright(matrix: Tensor) -> Tensor:
    """[n, m] with n >= m, a view."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()


def product_of(base: Tensor, right: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """B [n, r] and Q [r, m] -> two matrices whose product is B Q, transposed where `shape` is wide."""
    return (base, right) if len(base) == shape[0] else (right.t(), base.t())


def first_right(name: str, rank: int, columns: int) -> Tensor:
    """[rank, columns]: where the iteration of this parameter begins, on all ranks."""
    return torch.randn(rank, columns, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def bases(left: Tensor, rows: Sequence[int], rank: int) -> list[Tensor]:
    """Flat P of matrices with so many rows each -> their B [n, r]. Neighbours with equal rows go together."""
    found: list[Tensor] = []
    start = 0
    for height, group in groupby(rows):
        count = len(list(group))
        end = start + count * height * rank
        found += torch.linalg.qr(left[start:end].view(count, height, rank)).Q.unbind()
        start = end
    return found


class PowerSGD(Averager):
    """See the top of the file. Q goes on from step to step, equal on all ranks; what rides along is behind it."""

    def __init__(self, memory: Memory, ledger: Ledger, *, rank: int = 4) -> None:
        self._memory, self._ledger, self._rank = memory, ledger, rank
        self._rights: dict[str, Tensor] = {}
        self._seconds: dict[tuple[tuple[int, int], torch.device], tuple[float, float]] = {}

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float | None:
        """Of P and Q; None where they are not worth it."""
        if len(shape) < 2:
            return None
        rows, columns = sides(shape)
        if WORTH * self._rank * (rows + columns) > rows * columns:
            return None
        p_bytes = ring_bytes(self._rank * rows, world_size, P_DTYPE.itemsize)
        return p_bytes + ring_bytes(self._rank * columns, world_size)

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """An all-reduce of all P, and one of all Q and what is exact. Times the products."""
        shapes = [sides(parameter.shape) for parameter in parameters]
        first = sum(self._work_s(shape)[0] for shape in shapes)
        second = sum(self._work_s(shape)[1] for shape in shapes)
        p_values, q_values = (self._rank * sum(lengths) for lengths in zip(*shapes, strict=True))
        left, size = P_DTYPE.itemsize * p_values, P_DTYPE.itemsize
        right = exact_bytes([flags_of(parameters, q_values), *exact])
        return [
            Transfer(label=f"{label} P", axis=axis, op="all_reduce", message_bytes=left, item_bytes=size, work_s=first),
            Transfer(label=f"{label} Q", axis=axis, op="all_reduce", message_bytes=right, work_s=second),
        ]

    def average(self, share: Share) -> Iterator[None]:
        """Two collectives, see the top of the file. What is not finite is found on all ranks, in P."""
        buffer, pieces = share.buffer, sorted(share.pieces, key=lambda piece: sides(piece.shape))
        wanted = [self._memory.exact(piece.name, piece.of(buffer)).view(matrix_shape(piece.shape)) for piece in pieces]
        matrices = [upright(matrix) for matrix in wanted]
        rows = [len(matrix) for matrix in matrices]

        products = wanted[0].new_empty(self._rank * sum(rows))
        parts = products.split([self._rank * height for height in rows])
        for matrix, piece, part in zip(matrices, pieces, parts, strict=True):
            torch.mm(matrix, self._right(piece.name, matrix).t(), out=part.view(-1, self._rank))
        left = products.to(P_DTYPE)
        sent = all_reduce(left, self._first, self._ledger, f"{share.label} P")
        yield

        sent.wait()
        bad = spoiled(left)  # as the sum over ranks is where any rank's gradient is not finite
        basis = bases(left.to(products.dtype), rows, self._rank)
        widths = [self._rank * matrix.shape[1] for matrix in matrices]
        own = products.new_empty(sum(widths))
        for matrix, base, part in zip(matrices, basis, own.split(widths), strict=True):
            torch.mm(base.t(), matrix, out=part.view(self._rank, -1))
        mean = torch.cat([own, share.riding()]).div_(self._second.size())
        sent = all_reduce(mean, self._second, self._ledger, f"{share.label} Q")
        yield

        sent.wait()
        share.arrived(mean[len(own) :], known=bad)
        owns, means = own.split(widths), mean[: len(own)].split(widths)
        for piece, matrix, whole, base, mine, all_of_us in zip(pieces, matrices, wanted, basis, owns, means, strict=True):
            if not share.counts(piece):
                continue
            if self._memory.keeps:  # before the result, which may lie where `whole` does
                factors = product_of(base, mine.view(self._rank, -1), whole.shape)
                self._memory.keep(piece.name, torch.addmm(whole, *factors, alpha=-1).view(-1))
            right = all_of_us.view(self._rank, -1)
            if share.on_device:
                self._rights[piece.name] = share.counted(piece, right, self._right(piece.name, matrix))
                right = right * share.factor
            elif not share.nonfinite:
                self._rights[piece.name] = right
            factors, result = product_of(base, right, whole.shape), piece.of(buffer).view(whole.shape)
            if buffer.dtype == right.dtype:
                torch.mm(*factors, out=result)
            else:
                result.copy_(torch.mm(*factors))

    def state_dict(self) -> dict[str, Any]:
        """Q of every parameter."""
        return {"rights": {name: right.clone() for name, right in self._rights.items()}}

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Q was equal on all ranks. UserError if it is of another rank of matrices."""
        rights = states[0]["rights"]
        for name, right in rights.items():
            if right.shape[0] != self._rank:
                raise UserError(
                    f"the checkpoint was made with compress.rank = {right.shape[0]} ({name}), not {self._rank}; "
                    "resume with the rank it was made with"
                )
        self._rights = {name: right.clone() for name, right in rights.items()}

    def _right(self, name: str, matrix: Tensor) -> Tensor:
        """Q [r, m] for `matrix` [n, m]; from the beginning where a checkpoint has one for another side of it."""
        shape = (self._rank, matrix.shape[1])
        if name not in self._rights or self._rights[name].shape != shape:
            self._rights[name] = first_right(name, *shape).to(matrix)
        return self._rights[name].to(matrix)

    def _work_s(self, shape: tuple[int, int]) -> tuple[float, float]:
        """Before P and after it, measured here on a bucket full of such matrices or of their rows."""
        if (shape, self.device) not in self._seconds:
            height, columns = shape
            rows = min(height, max(self._rank, TRIED_VALUES // columns))
            count = max(1, TRIED_VALUES // (rows * columns))
            values = torch.ones(count, rows, columns, device=self.device)
            right = first_right("", self._rank, columns).to(self.device)

            def run() -> Iterator[None]:
                wanted = [value + value if self._memory.keeps else value for value in values]
                left = torch.cat([matrix @ right.t() for matrix in wanted]).to(P_DTYPE)
                yield
                found = bases(left.float().view(-1), [rows] * count, self._rank)
                for value, matrix, base in zip(values, wanted, found, strict=True):
                    own = base.t() @ matrix
                    if self._memory.keeps:
                        torch.addmm(matrix, base, own, alpha=-1)
                    torch.mm(base, own, out=value)
                yield

            before, after = seconds_of_stages(run, self.device)
            scale = height / rows / count
            self._seconds[shape, self.device] = before * scale, after * scale
        return self._seconds[shape, self.device]
