"""A user's own loop as a replica of asynchronous DiLoCo: it trains alone, and every H steps hands in how far it went.

    with thinwire.AsyncDiLoCo(model, optimizer, every=30, store="10.0.0.1:29700", name="a") as replica:
        for step in replica.remaining_steps():         # until the servers have merged total_tokens
            loss_of(model, batch(step)).backward()
            optimizer.step()                           # every 30th: push, wait for the merge, go on from its weights
            optimizer.zero_grad()

Each optimizer step is progress. Who makes none for the service's `timeout_s` is given up, so in long pauses between steps, such
as an evaluation, call `replica.alive()` now and then. The optimizer's own state stays here and is never synchronised (Douillard
et al. 2023). Merges are described in `merges`.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo
from thinwire.errors import UserError
from thinwire.sync.server.client import ServerClient
from thinwire.sync.server.dial import Dialer
from thinwire.sync.server.flat import FlatParameters
from thinwire.sync.server.merger import Pace


class AsyncDiLoCo:
    """One life of replica `name`; the weights of `model` become the servers' at `with`.

    store: "host:port" of the servers. secret_file: the service's, which it asks for unless it is on loopback. every: local steps
    between pushes, 0: as the servers say; what is left at the end is pushed too. tokens_per_step: by which its pushes are
    weighed, and the work is counted. UserError for numbers that cannot be, or without servers there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        store: str,
        name: str,
        every: int = 0,
        tokens_per_step: float = 1.0,
        secret_file: Path | str | None = None,
    ) -> None:
        self._flat = FlatParameters(model)
        self._optimizer, self._tokens_per_step = optimizer, tokens_per_step
        self._local_steps = 0
        self._hook: Any = None
        pace = Pace(every=every, tokens_per_step=tokens_per_step)
        self.client = ServerClient(Dialer(store, secret_file), name, self._flat.values(), self._flat.spans(), pace)
        if not isinstance(self.client.service.merge, DiLoCo):
            raise UserError(f"the servers at {store} want gradients, not DiLoCo's distances; use ParameterServerWorker")
        self.pushes = 0

    @property
    def ledger(self) -> Ledger:
        """What this replica has sent."""
        return self.client.ledger

    @property
    def first_step(self) -> int:
        """Local steps that this name has made and pushed, over all its lives."""
        return self.client.step

    def remaining_steps(self) -> Iterator[int]:
        """The numbers of this name's next steps, until total_tokens are merged; without an end if that is 0."""
        step = self.first_step
        while self.client.local_steps:
            yield step
            step += 1

    def __enter__(self) -> "AsyncDiLoCo":
        self.client.__enter__()
        self._flat.put(self.client.weights)
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._hook.remove()
        try:
            if error is None and self._local_steps:
                self._push()
        except BaseException as broken:
            self.client.__exit__(type(broken), broken, None)
            raise
        self.client.__exit__(kind, error, traceback)

    def alive(self) -> None:
        """Say that the loop is where it should be, in a pause between steps; cheap. PeerLost if this life was given up."""
        self.client.alive()

    def state_dict(self) -> dict[str, Any]:
        """What coding has lost; small, and saved by whoever wants to come back with it."""
        return self.client.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step."""
        self.client.load_state_dict(state)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._local_steps += 1
        if self._local_steps >= self.client.local_steps:
            self._push()
        else:
            self.client.alive()

    def _push(self) -> None:
        went = self.client.weights - self._flat.values()
        weight = self._tokens_per_step * self._local_steps
        self._flat.put(self.client.push(went, weight=weight, local_steps=self._local_steps))
        self._local_steps = 0
        self.pushes += 1
