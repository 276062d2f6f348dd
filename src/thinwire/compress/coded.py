"""Buffers of gradients averaged through codes: each parameter by the averager that sends the fewest bytes for it.

By default vectors (norms) stay float32 and embeddings go in int8 (`config.compress`), because coarse codes hurt them most.
Of the rest each parameter goes to the cheapest of the averagers (`averager`) that take its shape; a plain all-reduce is always
among them, so what would grow by coding is not coded. Compression may begin after some steps that exchange plainly. On one rank
all is plain, and so exact. The residual of a parameter that is not coded any more goes along exactly, once.

What is not coded rides along where it can, and so does the little of a bucket that would need collectives of its own to be coded.
All of it runs in three stages (`stages`), in the order of the buffers, while the backward pass goes on: on three threads for
buffers of the CPU, on a stream of their own for those of a device.

Buffers hold real numbers of any dtype (`averager.Share`). A gradient that is not finite arrives so on all ranks, and what the
memory has kept in that backward pass is taken back, for whoever scales losses (GradScaler) leaves such a step out; or, if asked
for, all ranks raise one error that names it (`passes`).
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.groups import backend_of, private_copy, release
from thinwire.collectives.ledger import Ledger
from thinwire.compress.assign import Assigned, Assignment
from thinwire.compress.averager import Averager, Piece, Shapes, Share, flags_of
from thinwire.compress.base import finite, spoiled
from thinwire.compress.census import Meeting
from thinwire.compress.memory import Memory, Stateless
from thinwire.compress.passes import Passes
from thinwire.compress.plain import Plain
from thinwire.compress.precondition import Moments, Preconditioned, no_moments
from thinwire.compress.sparse import average_sparse
from thinwire.compress.speed import seconds_in_units
from thinwire.compress.stages import Stages, make_stages
from thinwire.config.compress import SUMMABLE, Coded, NonFinite
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, plain_name

CPU = torch.device("cpu")
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
        stages: Callable[[torch.device], Stages] = make_stages,
    ) -> None:
        """nonfinite: what becomes of a step in which a gradient is not: an error on all ranks, or the average is not either.
        stages: what runs them on the device of the parameters."""
        self._averagers: list[Averager] = [*averagers, Plain(ledger)]
        self._assignment = Assignment(self._averagers, self.is_coded)
        self._memory, self._config, self._ledger = memory, config, ledger
        self.failure: Exception | None = None
        """Why buffers could not be averaged."""
        self._nonfinite: NonFinite = nonfinite
        self._passes: Passes | None = None
        self._meeting: Meeting | None = None
        self._latest: torch.futures.Future[torch.Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        self._world_size = 1
        self._known: dict[str, tuple[int, ...]] = {}
        self._tracks_use = False
        self._private: list[dist.ProcessGroup] = []
        self._stages: Stages | None = None
        self._make_stages = stages
        self._step = 0
        self._loaded_of = 0
        """Ranks of the run whose state was loaded; 0 if none was, or the states of all of them."""
        self._assigned: dict[tuple[Piece, ...], list[Assigned[Piece]]] = {}
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
        for averager, coded, exact in self._assignment.of(parameters, world_size):
            if self._tracks_use and averager.flags_use:
                exact = [*exact, flags_of([*coded, *exact], len(coded) + len(exact))]
            its = averager.transfers(label, coded, exact, axis, world_size)
            if coded and isinstance(self._memory, Preconditioned):
                seconds = sum(one.numel for one in coded) * seconds_in_units(averager.device)
                its[0] = replace(its[0], work_s=its[0].work_s + seconds)
            found += its
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
        coded = [self._assignment.codes(one, world_size) for one in parameters]
        return sum(self._memory.memory_bytes(one.numel, coded=its) for one, its in zip(parameters, coded, strict=True))

    def attach(
        self,
        group: dist.ProcessGroup,
        axis: str,
        known: Shapes,
        device: torch.device = CPU,
        *,
        tracks_use: bool = False,
        moments: Moments = no_moments,
    ) -> None:
        """Before the first step: makes two process groups, and what runs the stages. Collective over all ranks, also where groups
        are smaller.

        known: shapes of all parameters that may come, by name; device: where they lie. tracks_use: `start` will get which of them
        were used. moments: the optimizer's second ones, for gradients that are coded in their units (`precondition`). UserError
        for a device that the group does not serve, and for a loaded state that would have no effect.
        """
        if backend_of(group, device.type) is None:
            served = dist.get_backend_config(group)
            raise UserError(
                f"compress.kind = {self._config.kind!r}: parameters are on {device}, and this group serves {served}; "
                "make one that serves it, or set the kind to none"
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
            averager.attach(self._private[0], self._private[1], device)
        self._stages = self._make_stages(device)
        self._passes = Passes(self._nonfinite, self._memory, on_device=self._stages.on_device, tracks_use=tracks_use)
        self._passes.meet(self._meeting, group)
        self._memory.to(device)
        if isinstance(self._memory, Preconditioned):
            self._memory.moments = moments

    def detach(self) -> None:
        """Waits for what is under way, and ends threads and groups. Collective."""
        if self._stages is not None:
            self._stages.close()
        for one in self._private:
            release(one, self._ledger)
        self._stages, self._private, self._group = None, [], None

    def start(
        self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, *, last: bool, used: Mapping[str, bool] | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Begin to average the flat `buffer` in place; the future holds it. last: the step ends with this one.

        The buffer is of float32, bfloat16, float16 or float64. One without pieces only ends the step, if the exchange `settles`.

        used: by parameter, whether this rank's backward pass has reached it, if use is tracked: what no rank has used is left as
        it is. Called by one thread of each rank, with the same pieces in the same order.
        """
        stages, passes = self._stages, self._passes
        assert stages is not None and passes is not None, "attach() comes first"
        assert (used is not None) == self._tracks_use, "use is tracked, or not"
        assigned = self._shared_out(pieces)
        shares = [
            Share(
                buffer=buffer,
                pieces=coded,
                exact=exact,
                label=label,
                memory=self._memory,
                used=used,
                on_device=stages.on_device,
                census=passes.census(f"{label} {number}"),
            )
            for number, (_, coded, exact) in enumerate(assigned)
        ]
        averages = [averager.average(share) for (averager, _, _), share in zip(assigned, shares, strict=True)]
        step = self._begun(last)

        def first() -> None:
            passes.look({piece.name: piece.of(buffer) for piece in pieces})
            go_on()

        def go_on() -> None:
            for average in averages:
                next(average, None)  # one with fewer stages may be over

        def third() -> torch.Tensor:
            go_on()
            nonfinite = {one: ranks for share in shares for one, ranks in share.nonfinite.items()}
            flags = [share.spoiled for share in shares if share.spoiled is not None]
            passes.conclude(nonfinite, flags, step, last=last)
            for (averager, _, _), share in zip(assigned, shares, strict=True):
                share.restore()
                share.mark(coded=averager.codes)
            return buffer

        self._latest = stages.run(first, go_on, third, buffer, self._fail, last=last)
        return self._latest

    def _shared_out(self, pieces: Sequence[Piece]) -> list[Assigned[Piece]]:
        """Of a bucket in this step: who averages what."""
        if not pieces:
            return []
        if self._step < self._config.after_steps:
            return [(self._averagers[-1], [], list(pieces))]
        key = tuple(pieces)
        if key not in self._assigned:
            self._assigned[key] = self._assignment.of(pieces, self._world_size)
        return self._assigned[key]

    def start_sparse(self, gradient: torch.Tensor, name: str, label: str, *, last: bool) -> torch.futures.Future[torch.Tensor]:
        """As `start`, for a gradient in sparse COO form (`sparse`): the future holds a new one, coalesced, the exact average.

        Without codes, in the order of the first stages; on a device the host waits for it, since its size is not known before.
        """
        stages, passes = self._stages, self._passes
        assert stages is not None and passes is not None, "attach() comes first"
        census = passes.census(label)
        step = self._begun(last)
        mean: list[torch.Tensor] = []

        def first() -> None:
            passes.look({name: gradient.coalesce().values()})
            mean.append(average_sparse(gradient, self._private[0], self._ledger, label))

        def third() -> torch.Tensor:
            nonfinite: dict[str, list[int]] = {}
            if stages.on_device:
                passes.conclude(nonfinite, [spoiled(mean[0].values())], step, last=last)
                return mean[0]
            if not finite(mean[0].values()):
                nonfinite = census([] if finite(gradient.coalesce().values()) else [name]) or {name: []}
            passes.conclude(nonfinite, [], step, last=last)
            return mean[0]

        self._latest = stages.run(first, _nothing, third, gradient, self._fail, last=last)
        return self._latest

    def _begun(self, last: bool) -> int:
        """The number of the step that a buffer belongs to, from 1 on."""
        step = self._step + 1
        self._step += last
        assert self._passes is not None
        self._passes.begin(last=last)
        return step

    def settle(self, *, all_of_them: bool = False) -> None:
        """At the end of the backward pass: wait for the buffers that were started, on the CPU. UserError, on all ranks, if one
        could not be averaged, or on a device in the pass before this one; all_of_them: or in this one, which waits for it."""
        if self._latest is not None and not self.on_device:
            over = threading.Event()
            self._latest.add_done_callback(lambda _: over.set())
            over.wait()
        if self.failure is not None:
            raise self.failure
        if self._passes is not None:
            self._passes.check(all_of_them=all_of_them)

    def flush(self) -> None:
        """Whatever is under way goes on without another buffer. Before a future is waited for in the middle of a step."""
        if self._stages is not None:
            self._stages.flush()

    @property
    def on_device(self) -> bool:
        """Whether futures hold their buffers at once, for whoever waits on a stream."""
        return self._stages is not None and self._stages.on_device

    def state_dict(self) -> dict[str, Any]:
        """The residuals of this rank, and what its averagers carry. UserError if the latest step was spoiled, where one is asked
        for."""
        if self._passes is not None:
            self._passes.check(all_of_them=True)
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
        carried = zip(*(state["carried"] for state in states), strict=True)
        for averager, its in zip(self._averagers, carried, strict=False):  # powersgd had fewer
            averager.adopt(its)
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


def _nothing() -> None:
    pass
