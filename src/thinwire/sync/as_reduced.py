"""Gradients of shards averaged between replicas within the backward pass: a unit's as soon as it is reduced over its shards.

A bucket is a unit, or as many as `bucket_bytes` wants: the blocks from the last one on, then the root. Ranks reduce units in one
order, on one thread, and hand each over here (`parallel.sharded.LocalShards.listener`); so buckets go out in one order too. What
is not handed over goes out when the passes are over.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.compress.sharded.layout import label_of
from thinwire.layout import Layout
from thinwire.sync.after_backward import AfterBackwardSync
from thinwire.traffic import REPLICAS, Transfer
from thinwire.workload import Parameter, Workload


class AsReducedSync(AfterBackwardSync):
    """See the top of the file. One per rank; `model` of `attached` has this rank's shards."""

    _labels: Sequence[str] = ()
    _gradients: Mapping[str, torch.Tensor]
    _waiting: Sequence[set[str]]

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """What each bucket sends; how much hides is simulated (`plan.sharded`)."""
        return [
            one
            for label, bucket in by_unit(workload.parameters, self._config.bucket_bytes)
            for one in self._exchange.transfers(label, bucket, self._axis, getattr(layout, self._axis))
        ]

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """As of the base."""
        with super().attached(model, optimizer, mesh) as attached:
            self._gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
            self._begin()
            yield attached

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """As of the base."""
        with super().microbatch(last):
            yield
        if last:
            self._begin()

    def give(self, unit: str, values: Mapping[str, torch.Tensor]) -> None:
        """Gradients of a unit, by name; a bucket that is whole goes out. Collective over the axis."""
        for name, value in values.items():
            self._gradients[name].copy_(value)
        for index, missing in enumerate(self._waiting):
            if missing and missing & values.keys():
                missing -= values.keys()
                if not missing:
                    buffer, pieces = self._buckets[index]
                    last = index == len(self._buckets) - 1
                    self._started[index] = self._exchange.start(buffer, pieces, self._label(index), last=last)

    def _begin(self) -> None:
        self._waiting = [{piece.name for piece in pieces} for _, pieces in self._buckets]

    def _label(self, index: int) -> str:
        return self._labels[index]

    def _assigned(self, model: torch.nn.Module) -> list[list[Parameter]]:
        listed = [one for bucket in super()._assigned(model) for one in bucket]
        order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
        found = by_unit(sorted(listed, key=lambda one: order[one.name]), self._config.bucket_bytes)
        self._labels = [label for label, _ in found]
        return [bucket for _, bucket in found]


def by_unit(parameters: Sequence[Parameter], bucket_bytes: int) -> list[tuple[str, list[Parameter]]]:
    """Buckets in the order in which they go out, with the label of what completes each: its last unit."""
    units: dict[str, list[Parameter]] = {}
    for one in parameters:
        first, _, rest = one.name.partition(".")
        units.setdefault(f"{first}.{rest.partition('.')[0]}" if first == "blocks" else "", []).append(one)
    root, found, held = units.pop("", []), list[tuple[str, list[Parameter]]](), list[Parameter]()
    ordered = [*reversed(units.items()), *([("", root)] if root else [])]
    for number, (name, its) in enumerate(ordered):
        held += its
        if sum(one.stored_bytes for one in held) >= bucket_bytes or number == len(ordered) - 1:
            found.append((label_of(name, REPLICAS), held))
            held = []
    return found
