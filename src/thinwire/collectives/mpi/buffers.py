"""Tensors as MPI sees them: memory with a count and a datatype, and the operation that reduces it.

What is only moved is moved as bytes, whatever its type. What is reduced has a datatype of MPI's, except that MPI knows neither
bfloat16 nor float16: those travel as 16-bit words, 2 B a value, and an operation of ours adds them, rounding after each sum
as gloo does. AVG is SUM and a division at the end; of booleans SUM and PRODUCT are "or" and "and".
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.run.runner import COMBINE
from thinwire.errors import UserError

NAMES = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
_BITWISE = ("BAND", "BOR", "BXOR")

_DATATYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint8: "UINT8_T",
    torch.bool: "UINT8_T",
}
_WORDS = (torch.bfloat16, torch.float16)
_OF_BOOLEANS = {"SUM": "MAX", "PRODUCT": "MIN", "BOR": "MAX", "BAND": "MIN"}


def raw(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor, as bytes. No copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def op_name(op: Any) -> str:
    """The name of a reduction as torch passes it. UserError for one that is not known here."""
    for name in NAMES:
        if op == getattr(dist.ReduceOp, name):
            return name
    raise UserError(f"reduction {op} does not exist over MPI; there are {', '.join(NAMES)}")


class Reductions:
    """MPI's datatypes and operations for torch's. MPI holds few operations made in Python, so each is made once."""

    def __init__(self, MPI: Any) -> None:
        self._MPI = MPI
        self._made: dict[tuple[torch.dtype, str], Any] = {}

    def check(self, dtype: torch.dtype, name: str) -> None:
        """UserError where `dtype` cannot be reduced by `name`. The same answer on each rank."""
        integer = not dtype.is_floating_point
        known = dtype in _DATATYPES or dtype in _WORDS
        boolean = dtype == torch.bool and name in ("AVG", "BXOR")
        if not known or boolean or (name == "AVG" and integer) or (name in _BITWISE and not integer):
            raise UserError(f"{name} of {str(dtype).removeprefix('torch.')} does not exist over MPI; convert the tensor first")

    def spec(self, tensor: torch.Tensor) -> list[Any]:
        """A contiguous tensor as an argument of a reducing call."""
        kind = self._MPI.UINT16_T if tensor.dtype in _WORDS else getattr(self._MPI, _DATATYPES[tensor.dtype])
        return [raw(tensor), kind]

    def op(self, dtype: torch.dtype, name: str) -> Any:
        """The operation, AVG's being that of SUM."""
        name = "SUM" if name == "AVG" else name
        if dtype in _WORDS:
            if (dtype, name) not in self._made:
                self._made[dtype, name] = self._MPI.Op.Create(_on_words(dtype, name), commute=True)
            return self._made[dtype, name]
        if dtype == torch.bool:
            name = _OF_BOOLEANS.get(name, name)
        return getattr(self._MPI, {"PRODUCT": "PROD"}.get(name, name))


def _on_words(dtype: torch.dtype, name: str) -> Callable[[Any, Any, Any], None]:
    reduce = COMBINE[name.lower()]

    def combine(others: Any, totals: Any, _datatype: Any) -> None:
        if others.nbytes:
            total = torch.frombuffer(totals, dtype=dtype)
            reduce(total, torch.frombuffer(others, dtype=dtype), out=total)

    return combine
