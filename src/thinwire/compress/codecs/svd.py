"""The best low-rank approximation of a matrix, exactly.

    G = U S V^T,  sent: L = U_r S_r and R = V_r in float32,  decoded: L R^T          r = min(rank, rows, columns)

No matrix of rank r is closer: ||G - L R^T||_F^2 is the sum of the squares of the singular values that are left out. It is the
reference for methods that approximate it by cheaper means, as PowerSGD does by one step of the power iteration; a whole
decomposition costs O(rows columns min(rows, columns)) each time, and on CUDA torch waits for it on the host. A parameter is taken
as the matrix [shape[0], all the rest].

Computed in float64. Singular vectors come with either sign; here the largest entry of each column of V, the first if several are,
is positive. Equal singular values leave their vectors open, so payloads may then differ between kinds of processors; ranks decode
the payload of one rank to the same bits on processors of one kind. Where a value is not finite, nothing that is decoded is.
Eckart & Young 1936; Vogels et al. 2019 (PowerSGD).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.compress.base import TensorCodec, check_payload, check_tensor, matrix_shape, spoiled
from thinwire.errors import UserError


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> U S [rows, r] and V [columns, r] in the dtype of `matrix`, which is about U S V^T."""
    kept = min(rank, *matrix.shape)
    bad = spoiled(matrix)  # and then nothing that comes out is finite; the decomposition would not end, or raise
    left, sizes, right = torch.linalg.svd(matrix.to(torch.float64).masked_fill(bad, 0.0), full_matrices=False)
    left, right = left[:, :kept] * sizes[:kept], right[:kept].T
    if kept:
        signs = right.gather(0, right.abs().argmax(0, keepdim=True)).sign()
        left, right = left * signs, right * signs
    return left.to(matrix.dtype).masked_fill(bad, torch.nan), right.to(matrix.dtype).masked_fill(bad, torch.nan)


@dataclass(frozen=True)
class TruncatedSVD(TensorCodec):
    """Low rank; 32 (rows + columns) rank bits for a matrix of rows x columns."""

    rank: int = 4
    """Or the smaller side of the matrix, where that is less."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"compress.rank = {self.rank}: a rank is at least 1")

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Two factors in float32."""
        rows, columns = matrix_shape(shape)
        return 4 * (rows + columns) * min(self.rank, rows, columns)

    def encode(self, values: Tensor) -> Tensor:
        """float32 of any shape -> [payload_bytes] uint8: U S, then V, row by row."""
        check_tensor(values)
        factors = truncated_svd(values.view(matrix_shape(values.shape)), self.rank)
        return torch.cat([factor.reshape(-1) for factor in factors]).view(torch.uint8)

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        check_payload(payload, self.payload_bytes(shape))
        rows, columns = matrix_shape(shape)
        kept = min(self.rank, rows, columns)
        left, right = payload.clone().view(torch.float32).split([rows * kept, columns * kept])  # clone: aligned for float32
        return (left.view(rows, kept) @ right.view(columns, kept).T).view(tuple(shape))
