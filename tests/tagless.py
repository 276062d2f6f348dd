"""gloo as if its messages had no tags, as NCCL's have none: they match in order, and what begins as one is one Work."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.run.links import GlooLinks, Place


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


class TaglessLinks(GlooLinks):
    """With a group of its own to talk in."""

    most_tag = 0

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.talk = super().join("talk", range(place.size))

    def join(self, name: str, order: Sequence[int]) -> Tagless:
        return Tagless(super().join(name, order))


def over_tagless(told: Any, place: Place) -> tuple[Any, TaglessLinks]:
    """An `Inner`."""
    return dist.ProcessGroupGloo(told.store, place.rank, place.size, place.timeout), TaglessLinks(place)
