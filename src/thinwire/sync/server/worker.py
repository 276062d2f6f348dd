"""A user's own loop as a worker of parameter servers, which come and go: each has connections of its own.

Gradients go up, weights come down; there is no optimizer here, the servers have it. Pulled weights are those of the service's
consistency (`gradient_merger`):

    with thinwire.ParameterServerWorker(model, store="10.0.0.1:29700", name="a") as worker:
        for step in worker.remaining_steps():          # until the servers have merged total_tokens
            loss_of(model, batch(step)).backward()
            worker.step()

Or asynchronous DiLoCo: a replica trains alone, and every H steps hands in how far it went. Its optimizer's own state stays here
and is never synchronised (Douillard et al. 2023). Merges are described in `diloco_merger`:

    with thinwire.AsyncDiLoCo(model, optimizer, every=30, store="10.0.0.1:29700", name="a") as replica:
        for step in replica.remaining_steps():
            loss_of(model, batch(step)).backward()
            optimizer.step()                           # every 30th: push, wait for the merge, go on from its weights
            optimizer.zero_grad()

Parameters may be float32, bfloat16, float16, float64 and complex, mixed; servers keep what 16 bits round off (`flat`).

Each step is progress. Who makes none for the service's `timeout_s` is given up, so in long pauses between steps, such as an
evaluation, call `alive()` now and then.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo, Gradients
from thinwire.errors import UserError
from thinwire.sync.server.client import ServerClient
from thinwire.sync.server.dialer import Dialer
from thinwire.sync.server.flat import FlatParameters
from thinwire.sync.server.merger import Pace


class _Worker:
    """One life of worker `name`; the weights of `model` become the servers' at `with`."""

    client: ServerClient

    def __init__(self, model: nn.Module) -> None:
        self._flat = FlatParameters(model)

    @property
    def ledger(self) -> Ledger:
        """What this worker has sent."""
        return self.client.ledger

    @property
    def first_step(self) -> int:
        """Steps that this name has made and pushed, over all its lives; one that comes later, or again, begins there."""
        return self.client.step

    def remaining_steps(self) -> Iterator[int]:
        """The numbers of this name's next steps, until total_tokens are merged; without an end if that is 0."""
        step = self.first_step
        while self.client.local_steps:
            yield step
            step += 1

    def __enter__(self) -> Self:
        self.client.__enter__()
        self._flat.put(self.client.weights)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
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


class ParameterServerWorker(_Worker):
    """One life of worker `name`, which pushes gradients; the weights of `model` become the servers' at `with`.

    store: "host:port" of the servers. secret_file: the service's, which it asks for unless it is on loopback. UserError without
    servers there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        store: str,
        name: str,
        ledger: Ledger | None = None,
        secret_file: Path | str | None = None,
    ) -> None:
        super().__init__(model)
        self._model = model
        self.client = ServerClient(Dialer(store, secret_file), name, self._flat.values(), self._flat.spans(), ledger=ledger)
        if not isinstance(self.client.service.merge, Gradients):
            raise UserError(f"the servers at {store} want DiLoCo's distances, not gradients; use AsyncDiLoCo")

    def remaining_steps(self) -> Iterator[int]:
        """The numbers of this worker's next steps, which servers count, until total_tokens are merged; without an end if 0."""
        while self.client.local_steps:
            yield self.first_step

    def step(self, *, samples: float = 1.0, learning_rate: float | None = None) -> None:
        """Push the gradients, set them to zero, and take the weights.

        samples: how many are behind the gradients' mean; of them the work is counted; 0: none, which moves nothing.
        learning_rate: for the servers' optimizer, 0 as a warm-up may begin; None: the servers' own. UserError for numbers that
        cannot be.
        """
        weights = self.client.push(self._flat.gradients(), weight=samples, learning_rate=learning_rate)
        self._flat.put(weights)
        self._model.zero_grad(set_to_none=True)


class AsyncDiLoCo(_Worker):
    """One life of replica `name`, which pushes how far it went; the weights of `model` become the servers' at `with`.

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
        super().__init__(model)
        self._optimizer, self._tokens_per_step = optimizer, tokens_per_step
        self._local_steps = self.pushes = 0
        self._hook: Any = None
        pace = Pace(every=every, tokens_per_step=tokens_per_step)
        self.client = ServerClient(Dialer(store, secret_file), name, self._flat.values(), self._flat.spans(), pace)
        if not isinstance(self.client.service.merge, DiLoCo):
            raise UserError(f"the servers at {store} want gradients, not DiLoCo's distances; use ParameterServerWorker")

    def __enter__(self) -> Self:
        super().__enter__()
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._hook.remove()
        try:
            if error is None and self._local_steps:
                self._push()
        except BaseException as broken:
            super().__exit__(type(broken), broken, None)
            raise
        super().__exit__(kind, error, traceback)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._local_steps += 1
        if self._local_steps >= self.client.local_steps:
            self._push()
        else:
            self.client.alive()

    def _push(self) -> None:
        went = self._flat.moved(self.client.weights)
        weight = self._tokens_per_step * self._local_steps
        self._flat.put(self.client.push(went, weight=weight, local_steps=self._local_steps))
        self._local_steps = 0
        self.pushes += 1
