"""Buckets of gradients averaged through a codec: matrices coded, the rest as it is.

By default vectors (norms) and embeddings stay float32: they are few, and coarse steps hurt them most. What is coded travels in
two shots (`twoshot`), the rest of the bucket in one all-reduce. A codec whose payloads may be summed (bfloat16, float16) needs
neither: the whole bucket is cast and all-reduced.

All of it runs on one thread in the order of the buckets, on a process group of its own, while the backward pass goes on.
"""

import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.executor import Executor
from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import Codec
from thinwire.compress.plain import GRADIENT_BYTES
from thinwire.compress.twoshot import Piece, TwoShot, shard_length
from thinwire.config.run import Coded
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

TRIED_VALUES, TRIES = 2**17, 4


class CodedExchange:
    """The exchange through `codec`; see `thinwire.compress.exchange.Exchange`."""

    def __init__(self, codec: Codec, config: Coded, ledger: Ledger) -> None:
        self._codec, self._config, self._ledger = codec, config, ledger
        self.failure: Exception | None = None
        self._names: Mapping[int, str] = {}
        self._restored: dict[str, torch.Tensor] = {}
        self._group: dist.ProcessGroup | None = None
        self._two_shot: TwoShot | None = None
        self._executor: Executor | None = None

    def is_coded(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a parameter goes through the codec."""
        if len(shape) < 2 and not self._config.vectors:
            return False
        return not any(fnmatch(name, pattern) for pattern in self._config.exclude)

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """Codes, averages, and the all-reduce of what is not coded; exactly what `start` sends. Times the codec."""
        if self._codec.summable:
            values = sum(parameter.numel for parameter in parameters)
            size = values * self._codec.wire_dtype.itemsize
            return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=size)]
        coded = [parameter for parameter in parameters if self.is_coded(parameter.name, parameter.shape)]
        length = sum(shard_length(parameter.shape, world_size, self._codec.block) for parameter in coded)
        plain = sum(parameter.numel for parameter in parameters if parameter not in coded) * GRADIENT_BYTES
        size = self._codec.payload_bytes(length)
        found = []
        if length:
            encode_s, decode_s = self._seconds_per_value
            others = (world_size - 1) * length
            first = others * encode_s
            second = length * encode_s + (others * (2 if self._config.feedback else 1) + world_size * length) * decode_s
            found += [
                Transfer(label=f"{label} codes", axis=axis, op="all_to_all", message_bytes=world_size * size, work_s=first),
                Transfer(label=f"{label} averages", axis=axis, op="all_gather", message_bytes=size, work_s=second),
            ]
        if plain:
            found.append(Transfer(label=f"{label} plain", axis=axis, op="all_reduce", message_bytes=plain))
        return found

    def attach(self, group: dist.ProcessGroup, axis: str, names: Mapping[int, str]) -> None:
        """Makes a process group and a thread. names: by id of the parameter. Collective over all ranks. UserError on CUDA."""
        if "nccl" in dist.get_backend(group):
            raise UserError(f"compress.kind = {self._config.kind!r}: only on CPUs yet, and this group is NCCL's; set it to none")
        self._group = _private_copy(group, f"{axis} exchange")
        self._ledger.axes[self._group.group_name] = axis
        self._names = names
        self._two_shot = TwoShot(self._codec, self._group, self._ledger, feedback=self._config.feedback)
        self._two_shot.owed.update(self._restored)
        self._executor = Executor("thinwire-exchange")

    def detach(self) -> None:
        """Waits for what is under way. Collective."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None

    def start(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Hands the bucket to the thread."""
        assert self._executor is not None, "attach() comes first"
        buffer, label = bucket.buffer(), f"bucket {bucket.index()}"
        if self._codec.summable:
            return self._executor.submit(lambda: self._sum(buffer, label))
        coded, plain = self._split(bucket)
        return self._executor.submit(lambda: self._average(buffer, coded, plain, label), self._fail)

    def state_dict(self) -> dict[str, Any]:
        """What this rank still owes to the average, by parameter name."""
        return {"owed": dict(self._two_shot.owed) if self._two_shot else dict(self._restored)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step."""
        if not isinstance(state.get("owed"), dict):
            raise UserError(
                f"the checkpoint holds nothing for compress.kind = {self._config.kind!r}; resume with the kind it was made with"
            )
        self._restored = state["owed"]
        if self._two_shot is not None:
            self._two_shot.owed = dict(self._restored)

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Deals out anew what is owed to the average: 1/p sum_i e_i stays the same, so each new rank takes exactly that."""
        for state in states:
            self.load_state_dict(state)
        names = {name for state in states for name in state["owed"]}
        total = {name: sum(state["owed"][name] for state in states if name in state["owed"]) for name in names}
        self.load_state_dict({"owed": {name: owed / len(states) for name, owed in total.items()}})

    @cached_property
    def _seconds_per_value(self) -> tuple[float, float]:
        """What coding and decoding take here: the fastest of a few tries on a vector of a bucket's size."""
        values = torch.linspace(-1, 1, TRIED_VALUES // self._codec.block * self._codec.block)
        encode, decode = [], []
        for _ in range(TRIES):
            started = time.perf_counter()
            payload = self._codec.encode(values)
            coded = time.perf_counter()
            self._codec.decode(payload, values.numel())
            encode.append(coded - started)
            decode.append(time.perf_counter() - coded)
        return min(encode) / values.numel(), min(decode) / values.numel()

    def _split(self, bucket: dist.GradBucket) -> tuple[list[Piece], list[Piece]]:
        """The coded and the plain parameters of a bucket, in its order."""
        assert self._group is not None
        coded, plain, first = [], [], 0
        for parameter in bucket.parameters():
            name, numel = self._names[id(parameter)], prod(parameter.shape)
            if self.is_coded(name, parameter.shape):
                shard = shard_length(parameter.shape, self._group.size(), self._codec.block)
                coded.append(Piece(name, first, numel, shard))
            else:
                plain.append(Piece(name, first, numel, 0))
            first += numel
        return coded, plain

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error

    def _average(self, buffer: torch.Tensor, coded: list[Piece], plain: list[Piece], label: str) -> torch.Tensor:
        assert self._two_shot is not None and self._group is not None
        if coded:
            self._two_shot.average(buffer, coded, label)
        if plain:
            parts = [buffer[piece.first : piece.first + piece.numel] for piece in plain]
            together = torch.cat(parts).div_(self._group.size())
            with self._ledger.label(f"{label} plain"):
                dist.all_reduce(together, group=self._group)
            for part, mean in zip(parts, together.split([piece.numel for piece in plain]), strict=True):
                part.copy_(mean)
        return buffer

    def _sum(self, buffer: torch.Tensor, label: str) -> torch.Tensor:
        assert self._group is not None
        cast = buffer.div_(self._group.size()).to(self._codec.wire_dtype)
        with self._ledger.label(label):
            dist.all_reduce(cast, group=self._group)
        return buffer.copy_(cast)


def _private_copy(group: dist.ProcessGroup, description: str) -> dist.ProcessGroup:
    """A new group of the same ranks. Collective over all ranks, whatever their group: each must make all groups in one order.

    (torch could let the members of a group make it alone, but it names such a group by its ranks and what each process has made
    before, and members with different pasts then wait for each other for ever.)
    """
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, tuple(dist.get_process_group_ranks(group)))
    made = {
        ranks: dist.new_group(ranks, backend=dist.get_backend(group), group_desc=description) for ranks in sorted(set(groups))
    }
    return made[tuple(dist.get_process_group_ranks(group))]
