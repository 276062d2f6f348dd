"""A user's own loop as a worker of parameter servers: gradients go up, weights come down.

    with thinwire.ParameterServerWorker(model, store="10.0.0.1:29700", name="a") as worker:
        for step in worker.remaining_steps():          # until the servers have merged total_tokens
            loss_of(model, batch(step)).backward()
            worker.step()

Each `step` is progress. Who makes none for the service's `timeout_s` is given up, so in long pauses between steps, such as an
evaluation, call `worker.alive()` now and then. There is no optimizer here: the servers have it. Pulled weights are those of the
service's consistency (`gradients`).
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Gradients
from thinwire.errors import UserError
from thinwire.sync.server.client import ServerClient
from thinwire.sync.server.dial import Dialer
from thinwire.sync.server.flat import FlatParameters


class ParameterServerWorker:
    """One life of worker `name`; the weights of `model` become the servers' at `with`.

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
        self._flat = FlatParameters(model)
        self._model = model
        self.client = ServerClient(Dialer(store, secret_file), name, self._flat.values(), self._flat.spans(), ledger=ledger)
        if not isinstance(self.client.service.merge, Gradients):
            raise UserError(f"the servers at {store} want DiLoCo's distances, not gradients; use AsyncDiLoCo")

    @property
    def first_step(self) -> int:
        """Steps that are behind; a worker that comes later, or again, begins there."""
        return self.client.step

    def remaining_steps(self) -> Iterator[int]:
        """The numbers of this worker's next steps, until total_tokens are merged; without an end if that is 0."""
        while self.client.local_steps:
            yield self.first_step

    def __enter__(self) -> "ParameterServerWorker":
        self.client.__enter__()
        self._flat.put(self.client.weights)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.client.__exit__(kind, error, traceback)

    def step(self, *, samples: float = 1.0, learning_rate: float | None = None) -> None:
        """Push the gradients, set them to zero, and take the weights.

        samples: how many are behind the gradients' mean; of them the work is counted; 0: none, which moves nothing.
        learning_rate: for the servers' optimizer, 0 as a warm-up may begin; None: the servers' own. UserError for numbers that
        cannot be.
        """
        weights = self.client.push(self._flat.gradients(), weight=samples, learning_rate=learning_rate)
        self._flat.put(weights)
        self._model.zero_grad(set_to_none=True)

    def alive(self) -> None:
        """Say that the loop is where it should be, in a pause between steps; cheap. PeerLost if this life was given up."""
        self.client.alive()

    def state_dict(self) -> dict[str, Any]:
        """What coding has lost; small, and saved by whoever wants to come back with it."""
        return self.client.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step."""
        self.client.load_state_dict(state)
