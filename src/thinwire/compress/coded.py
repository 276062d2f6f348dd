"""Buffers of gradients averaged through codes: each parameter by the averager that sends the fewest bytes for it.

By default vectors (norms) and embeddings stay float32: they are few, and coarse codes hurt them most. Of the rest each
parameter goes to the cheapest of the averagers (`averager`) that take its shape; a plain all-reduce is always among them, so what
would grow by coding is not coded. Compression may begin after some steps that exchange plainly. On one rank all is plain, and so
exact. The residual of a parameter that is not coded any more goes along exactly, once.

What is not coded rides along where it can, and so does the little of a bucket that would need collectives of its own to be coded.
All of it runs on three threads, a stage of the averages on each and in the order of the buffers, while the backward pass goes on.

Buffers hold real numbers of any dtype (`averager.Share`). A gradient that is not finite arrives so on all ranks, and what the
memory has kept in that backward pass is taken back, for whoever scales losses (GradScaler) leaves such a step out; or, if asked
for, all ranks raise one error that names it.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from thinwire.collectives.executor import Executor
from thinwire.collectives.groups import backend_of, private_copy, release, timeout_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import RIDE_BYTES, Averager, Piece, Shapes, Share, flags_of
from thinwire.compress.base import finite
from thinwire.compress.census import Meeting, not_finite
from thinwire.compress.memory import Memory, Stateless
from thinwire.compress.plain import Plain
from thinwire.compress.sparse import average_sparse
from thinwire.config.compress import SUMMABLE, Coded, NonFinite
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, plain_name

_Part = TypeVar("_Part", Piece, Parameter)
_Assigned = tuple[Averager, list[_Part], list[_Part]]
"""What an averager codes, and what rides along with it."""


LOST = ("Connection", "closed", "Timed out", "gloo", "Broken pipe")
"""Words of errors by which a rank sees that another one has gone."""


class CodedExchange(Stateless):
    """The exchange by the cheapest of `averagers`, or plainly. Calls come in the same order on every rank."""

    settles = True
    """Whether `settle` raises what goes wrong; else futures do."""

    def __init__(
        self,
        averagers: Sequence[Averager],
        memory: Memory,
        config: Coded,
        ledger: Ledger,
        nonfinite: NonFinite = "raise",
    ) -> None:
        """nonfinite: what becomes of a step in which a gradient is not: an error on all ranks, or the average is not either."""
        self._averagers: list[Averager] = [*averagers, Plain(ledger)]
        self._plain = len(averagers)
        self._memory, self._config, self._ledger = memory, config, ledger
        self.failure: Exception | None = None
        """Why buffers could not be averaged."""
        self._nonfinite: NonFinite = nonfinite
        if nonfinite == "average":
            memory.stage()
        self._passes, self._spoiled = 0, False
        """Backward passes so far, and whether something in the one that is under way is not finite."""
        self._meeting: Meeting | None = None
        self._latest: torch.futures.Future[torch.Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        self._world_size = 1
        self._known: dict[str, tuple[int, ...]] = {}
        self._tracks_use = False
        self._private: list[dist.ProcessGroup] = []
        self._threads: tuple[Executor, ...] = ()
        self._step = 0
        self._loaded_of = 0
        """Ranks of the run whose state was loaded; 0 if none was, or the states of all of them."""
        self._assigned: dict[tuple[Piece, ...], list[_Assigned[Piece]]] = {}
        """Of each bucket that has come so far."""

    @property
    def settled_after(self) -> int:
        """Steps after which it sends what `transfers` says; before, it exchanges plainly."""
        return self._config.after_steps + max(averager.settled_after for averager in self._averagers)

    def is_coded(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a parameter may be coded."""
        return self._config.is_coded(name, shape)

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """What one bucket of `parameters` will send, in the order in which `start` sends it; no communication."""
        found = []
        for averager, coded, exact in self._assign(parameters, world_size):
            if self._tracks_use and averager.flags_use:
                exact = [*exact, flags_of([*coded, *exact], len(coded) + len(exact))]
            found += averager.transfers(label, coded, exact, axis, world_size)
        return found

    def residuals(self) -> dict[str, torch.Tensor]:
        """What coding has left out on this rank so far, by parameter name, flat; float32, or float64 of gradients in float64."""
        return self._memory.residuals()

    def owed(self) -> dict[str, torch.Tensor]:
        """The old name of `residuals`."""
        warnings.warn("owed() is now residuals()", FutureWarning, stacklevel=2)
        return self.residuals()

    def memory_bytes(self, parameters: Sequence[Parameter], world_size: int) -> int:
        """What error feedback holds on each rank, or the momentum of dgc."""
        routes = [self._cheapest(one.name, one.shape, world_size) for one in parameters]
        pairs = zip(parameters, routes, strict=True)
        return sum(self._memory.memory_bytes(one.numel, coded=route != self._plain) for one, route in pairs)

    def attach(self, group: dist.ProcessGroup, axis: str, known: Shapes, *, tracks_use: bool = False) -> None:
        """Before the first step: makes two process groups and three threads. Collective over all ranks, also where groups are
        smaller.

        known: shapes of all parameters that may come, by name. tracks_use: `start` will get which of them were used.
        UserError on CUDA, and for a loaded state that would have no effect.
        """
        if backend_of(group, "cpu") is None:
            served = dist.get_backend_config(group)
            raise UserError(
                f"compress.kind = {self._config.kind!r}: only on CPUs yet, and this group serves {served}; set it to none"
            )
        self._group, self._world_size, self._tracks_use = group, group.size(), tracks_use
        self.failure, self._latest = None, None
        self._known = {name: tuple(shape) for name, shape in known.items()}
        self._check_loaded()
        self._assigned = {}
        self._private = [private_copy(group, f"{axis} exchange {stage}") for stage in ("first", "second")]
        self._meeting = Meeting(self._private[0])
        for one in self._private:
            self._ledger.axes[one.group_name] = axis
        for averager in self._averagers:
            averager.attach(*self._private)
        self._threads = Executor("thinwire-first"), Executor("thinwire-second"), Executor("thinwire-third")

    def detach(self) -> None:
        """Waits for what is under way, and ends threads and groups. Collective."""
        for thread in self._threads:
            thread.close()
        for one in self._private:
            release(one, self._ledger)
        self._threads, self._private, self._group = (), [], None

    def start(
        self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, *, last: bool, used: Mapping[str, bool] | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Begin to average the flat `buffer` in place; the future holds it. last: the step ends with this one.

        The buffer is of float32, bfloat16, float16 or float64. One without pieces only ends the step, if the exchange `settles`.

        used: by parameter, whether this rank's backward pass has reached it, if use is tracked: what no rank has used is left as
        it is. Called by one thread of each rank, with the same pieces in the same order.
        """
        assert self._threads, "attach() comes first"
        assert (used is not None) == self._tracks_use, "use is tracked, or not"
        if buffer.device.type != "cpu":
            raise UserError(f"{label} is on {buffer.device}, and {self._config.kind} is for CPUs only yet; set it to none")
        if not pieces:
            assigned: list[_Assigned[Piece]] = []
        elif self._step < self._config.after_steps:
            assigned = [(self._averagers[-1], [], list(pieces))]
        else:
            assigned = self._assigned.get(key := tuple(pieces)) or self._assign(pieces, self._world_size)
            self._assigned[key] = assigned
        shares: list[Share] = []
        for number, (_, coded, exact) in enumerate(assigned):
            census = self._census(f"{label} {number}")
            shares.append(
                Share(buffer=buffer, pieces=coded, exact=exact, label=label, memory=self._memory, census=census, used=used)
            )
        averagers = [averager for averager, _, _ in assigned]
        stages = [averager.average(share) for averager, share in zip(averagers, shares, strict=True)]

        def finished() -> torch.Tensor:
            _next_stages(stages, gone_on.wait())
            nonfinite = {name: ranks for share in shares for name, ranks in share.nonfinite.items()}
            self._conclude(nonfinite, step, last=last)
            for averager, share in zip(averagers, shares, strict=True):
                share.mark(coded=averager.codes)
            return buffer

        step = self._begun(last)
        begun = self._threads[0].submit(lambda: _next_stages(stages, buffer))
        gone_on = self._threads[1].submit(lambda: _next_stages(stages, begun.wait()))
        self._latest = self._threads[2].submit(finished, self._fail)
        return self._latest

    def start_sparse(self, gradient: torch.Tensor, name: str, label: str, *, last: bool) -> torch.futures.Future[torch.Tensor]:
        """As `start`, for a gradient in sparse COO form (`sparse`): the future holds a new one, coalesced, the exact average.

        On the first thread, without codes.
        """
        assert self._threads, "attach() comes first"
        census = self._census(label)

        def finished() -> torch.Tensor:
            mean, nonfinite = passed_on.wait(), dict[str, list[int]]()
            if not finite(mean.values()):
                nonfinite = census([] if finite(gradient.coalesce().values()) else [name]) or {name: []}
            self._conclude(nonfinite, step, last=last)
            return mean

        step = self._begun(last)
        begun = self._threads[0].submit(lambda: average_sparse(gradient, self._private[0], self._ledger, label))
        passed_on = self._threads[1].submit(begun.wait)
        self._latest = self._threads[2].submit(finished, self._fail)
        return self._latest

    def _begun(self, last: bool) -> int:
        """The number of the step that a buffer belongs to, from 1 on."""
        step = self._step + 1
        self._step += last
        self._passes += last
        return step

    def settle(self) -> None:
        """At the end of the backward pass: wait for the buffers that were started. UserError, on all ranks, if one could not be
        averaged."""
        if self._latest is not None:
            over = threading.Event()
            self._latest.add_done_callback(lambda _: over.set())
            over.wait()
        if self.failure is not None:
            raise self.failure

    def _census(self, about: str) -> Callable[[Sequence[str]], dict[str, list[int]]]:
        """Of one share, which may be asked more than once."""
        numbers, passes = count(), self._passes

        def ask(found: Sequence[str]) -> dict[str, list[int]]:
            assert self._meeting is not None and self._group is not None
            return self._meeting.census(f"pass {passes} {about} {next(numbers)}", found, timeout_of(self._group))

        return ask

    def _conclude(self, nonfinite: Mapping[str, list[int]], step: int, *, last: bool) -> None:
        """After all results of a bucket: on the third thread, in the order of the buckets."""
        if self._nonfinite == "raise":
            if nonfinite:
                raise UserError(not_finite(nonfinite, step))
            return
        self._spoiled |= bool(nonfinite)
        if last:
            if self._spoiled:
                self._memory.rollback()
            else:
                self._memory.commit()
            self._spoiled = False

    def state_dict(self) -> dict[str, Any]:
        """The residuals of this rank, and what its averagers carry."""
        return {
            "kind": self._config.kind,
            "ranks": self._world_size if self._known else self._loaded_of,
            "step": self._step,
            "memory": self._memory.state_dict(),
            "carried": [averager.state_dict() for averager in self._averagers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step. UserError if another kind of exchange wrote it, or as many ranks as there are not."""
        self._load([state], int(state.get("ranks", 0)))

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Gives each new rank the mean of the residuals: 1/p sum_i e_i stays the same."""
        self._load(states, 0)

    def _load(self, states: Sequence[dict[str, Any]], ranks: int) -> None:
        if not any(states) and self._config.kind in SUMMABLE:
            return  # written when casts had none
        for state in states:
            if state.get("kind") != self._config.kind:
                raise UserError(
                    f"the checkpoint was made with compress.kind = {state.get('kind', 'none')!r}, not {self._config.kind!r}; "
                    "resume with the kind it was made with"
                )
        states = [_with_plain_names(state) for state in states]
        self._loaded_of, self._step = ranks, states[0]["step"]
        self._memory.adopt([state["memory"] for state in states])
        for index, averager in enumerate(self._averagers):
            averager.adopt([state["carried"][index] for state in states])
        self._check_loaded()

    def _check_loaded(self) -> None:
        """Once both the state and the ranks and parameters are known: UserError for a state that would not be used."""
        if self._group is None:
            return
        if self._loaded_of not in (0, self._world_size):
            raise UserError(
                f"the state is of one of {self._loaded_of} ranks, and there are {self._world_size}: the residuals of the others "
                "would be lost; hand the states of all of them to adopt()"
            )
        for name, values in self.residuals().items():
            if name not in self._known:
                raise UserError(
                    f"the state holds a residual of {name!r}, and the model has no such parameter but {len(self._known)} "
                    f"others, first {next(iter(self._known), '')!r}; load it into the model it was made with"
                )
            if values.numel() != prod(self._known[name]):
                raise UserError(
                    f"the state holds a residual of {values.numel()} values of {name!r}, which has {prod(self._known[name])}; "
                    "load it into the model it was made with"
                )

    def _assign(self, parts: Sequence[_Part], world_size: int) -> "list[_Assigned[_Part]]":
        """Each averager that has a share of the bucket: what it codes, and what rides along with it."""
        routes = self._routes(parts, world_size)
        coding = sorted({route for route in routes if route != self._plain})
        assigned: list[_Assigned[_Part]] = [(averager, [], []) for averager in self._averagers]
        for part, route in zip(parts, routes, strict=True):
            if route != self._plain:
                assigned[route][1].append(part)
            else:
                able = [other for other in coding if self._averagers[other].carries(part.numel, world_size)]
                assigned[able[0] if able else self._plain][2].append(part)
        return [one for one in assigned if one[1] or one[2]]

    def _routes(self, parts: "Sequence[_Part]", world_size: int) -> list[int]:
        """The cheapest averager of each part; but what saves less than its collectives cost rides along with another, exactly."""
        p, plain = world_size, self._plain
        routes = [self._cheapest(part.name, part.shape, p) for part in parts]
        for route in sorted(set(routes) - {plain}):
            mine = [part for part, its in zip(parts, routes, strict=True) if its == route]
            others = [self._averagers[other] for other in set(routes) - {route, plain}]
            coded, exact = (
                sum(self._averagers[index].sent_bytes(part.shape, p) or 0 for part in mine) for index in (route, plain)
            )
            if exact - coded <= RIDE_BYTES and all(any(other.carries(part.numel, p) for other in others) for part in mine):
                routes = [plain if its == route else its for its in routes]
        return routes

    def _cheapest(self, name: str, shape: Sequence[int], world_size: int) -> int:
        """Index of the averager; at equal bytes the first one, so that plainly is the last resort."""
        if world_size == 1 or not self.is_coded(name, shape):
            return self._plain
        sizes = [averager.sent_bytes(shape, world_size) for averager in self._averagers]
        return min((size, index) for index, size in enumerate(sizes) if size is not None)[1]

    def _fail(self, error: Exception) -> None:
        """Of this rank, or of another one that has left its reason and its connections."""
        if self.failure is not None:
            return
        if isinstance(error, UserError):  # which all ranks have
            self.failure = error
            return
        assert self._meeting is not None
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
        cause = self._meeting.cause() if lost else None
        if lost and cause is None:  # that rank is gone, and left no reason
            self.failure = error
            return
        if cause is None:
            self._meeting.leave(error)
            cause = f"rank {dist.get_rank()}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        self.failure = UserError(f"compress.kind = {self._config.kind!r}: {cause}")
        self.failure.__cause__ = error


def _with_plain_names(state: Any) -> Any:
    """Parameters of a compiled model are those of the model, in whatever table of a state they stand."""
    if not isinstance(state, dict):
        return state
    return {plain_name(key) if isinstance(key, str) else key: _with_plain_names(value) for key, value in state.items()}


def _next_stages(stages: Sequence[Iterator[None]], buffer: torch.Tensor) -> torch.Tensor:
    """Of averages that may be over already."""
    for stage in stages:
        next(stage, None)
    return buffer
