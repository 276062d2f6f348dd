"""Gradients where ranks have experts of their own (`parallel.experts`), averaged in each step.

    dense parameters    over d data x e expert ranks      experts    over the d data ranks that have the same ones

Where `outer` replicas exchange rarely, that is within each of them. Both when the backward passes are over, each in buckets of
its own, by the same kind of exchange.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import EveryStep
from thinwire.layout import DENSE, DENSE_AXES, REPLICAS, Layout
from thinwire.sync.after_backward import AfterBackwardSync, Everything
from thinwire.sync.base import Synchroniser
from thinwire.sync.joined import joined
from thinwire.traffic import Transfer
from thinwire.workload import Workload, is_of_expert


@dataclass(frozen=True)
class _Names:
    """Of experts' parameters, or of all others."""

    of_experts: bool

    def __contains__(self, name: object) -> bool:
        return is_of_expert(str(name)) == self.of_experts


class ExpertRanksSync(Synchroniser):
    """See the top of the file. One per rank; the mesh has the axes of `layout`."""

    def __init__(self, config: EveryStep, compress: NoCompression | Coded, layout: Layout, ledger: Ledger) -> None:
        super().__init__(config.accumulate)
        inside = DENSE if layout.data > 1 else "expert"
        self._layout, self._axis = layout, layout.replica_axis if layout.outer == 1 else inside
        axes = {self._axis: _Names(False)} | ({"data": _Names(True)} if layout.data > 1 else {})
        self._each = [
            AfterBackwardSync(config, axis, ledger, make_exchange(compress, ledger, moments=True), names)
            for axis, names in axes.items()
        ]

    @property
    def ready_at(self) -> Any:
        return self._each[-1].ready_at

    @property
    def settled_after(self) -> int:
        return max(one.settled_after for one in self._each)

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        return [transfer for one in self._each for transfer in one.traffic(workload, layout)]

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """As `AfterBackwardSync.attached`, of both."""
        if self._axis in (DENSE, REPLICAS):
            mesh[("outer",) * (self._axis == REPLICAS) + DENSE_AXES]._flatten(self._axis)
        with _all(one.attached(model, optimizer, mesh) for one in self._each):
            yield model

    def rehearsal(self) -> AbstractContextManager[None]:
        return _all(one.rehearsal() for one in self._each)

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """At the end of the last all gradients are exchanged. Collective then."""
        return _all(one.microbatch(last) for one in self._each)

    def state_dict(self) -> dict[str, Any]:
        """As of one synchroniser of all that this rank has."""
        return joined([one.state_dict() for one in self._each], Everything())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for one in self._each:
            ranks = {"ranks": getattr(self._layout, one.axis)} if "ranks" in state else {}
            one.load_state_dict(joined([state], one.names) | ranks)

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        for one in self._each:
            one.adopt([joined([state], one.names) for state in states])


@contextmanager
def _all(entered: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in entered:
            stack.enter_context(one)
        yield
