"""gloo with two ways of NCCL. Its messages have no tags: they match in order, and what begins as one is one Work. And a call
that need not be waited for gives no Work."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.run.transport import GlooTransport, Place


class AllOf:
    """Is waited for often."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        while self._works:
            self._works.pop().wait()
        return True


class Tagless:
    """A gloo group."""

    def __init__(self, group: Any) -> None:
        self._group, self._begun = group, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        assert tag == 0
        self._begun.append(self._group.send(tensors, peer, 0))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        assert tag == 0
        self._begun.append(self._group.recv(tensors, peer, 0))

    def _start_coalescing(self, device: torch.device) -> None:
        assert device.type == "cpu" and not self._begun

    def _end_coalescing(self, device: torch.device) -> AllOf:
        begun, self._begun = self._begun, []
        return AllOf(begun)


class TaglessTransport(GlooTransport):
    """With a group of its own for agreements."""

    most_tag = 0

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.control = super().new_group("control", range(place.size))

    def new_group(self, name: str, order: Sequence[int]) -> Tagless:
        return Tagless(super().new_group(name, order))


class Workless:
    """A gloo group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._group, name)
        return partial(_called, found) if callable(found) and name not in ("rank", "size") else found


def _called(call: Any, *arguments: Any) -> Any:
    work = call(*arguments)
    if getattr(arguments[-1], "asyncOp", True):
        return work
    work.wait()
    return None


def workless(options: Any, place: Place) -> Workless:
    return Workless(dist.ProcessGroupGloo(options.store, place.rank, place.size, place.timeout))


def over_tagless(options: Any, place: Place) -> tuple[Workless, TaglessTransport]:
    """An `InnerFactory`."""
    return workless(options, place), TaglessTransport(place)
