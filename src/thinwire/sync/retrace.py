"""Replicas that go alone for H steps and then take these steps again, together.

Parameters lie in buckets, which take turns: each is exchanged every H steps, at even distances, so that a step sends a part of
the model. A bucket is the same on all replicas, its optimizer's state too, where its period begins: x, m and v. For H steps
replica r goes on as if it were alone. Then its gradients of the period are averaged, and all go back and take the H steps with
the average:

    u = 1/M sum over replicas of C( 1/H sum over the period of g_r )            C: of codes, with or without feedback
    (x, m, v) <- H steps of the optimizer from (x, m, v), each with u and with the learning rate that its step had
    v <- v + (H - 1) (v - beta_2^H v_before)                                    (`again`)

The average goes out within the backward pass, bucket by bucket, as gradients that are averaged in each step do, and where a
replica was is forgotten. So what makes H > 1 cost is only that g_r is taken where replica r stood, up to H - 1 steps of its own
away, and that it is older by up to so many steps than the update that it is part of; what is sent is 1/H.

AdamW divides by the root of v, to which the noise of a step's gradient belongs. u has the noise of H steps' mean, whose variance
is 1/H of that, therefore the last line. Where there is no noise it makes v too large, and steps shorter, by up to the root of H.

The last gradient of a period is sent before anybody knows by what it will be clipped. It counts as scaled by what the replica's
gradients were scaled by in the step before, from the end of the backward pass to the optimizer's step; the others as they were
used.

Averaging moved parameters instead (`local_steps`) leaves to each replica its own moments: v is then of the noise of one replica's
gradient, and m of its direction. Related: 0/1 Adam (Lu et al. 2022, arXiv 2202.06009: local steps by frozen second moments),
CoCoD-SGD (Shen et al. 2019).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future

from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.exchange import Exchange
from thinwire.config.sync import Retrace
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.again import Again, State, Taken, placed
from thinwire.sync.base import Synchroniser
from thinwire.sync.buckets import Names, described
from thinwire.sync.initial_values import make_same
from thinwire.sync.local_steps import Schedule
from thinwire.sync.parts import Part, Rows, buffers, taking_turns, turns
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, Workload

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""In which gradients of a period are added up."""


@dataclass
class _Bucket:
    """buffer: flat, where the `gradients` of the parameters are, as far as these are its `parts`; total: of the gradients used
    since step `since`; taken: where the period began, each part's values and state. missing: how many gradients the backward pass
    still owes; sent, under_way: an average that has begun."""

    index: int
    buffer: Tensor
    pieces: list[Piece]
    parts: list[Rows]
    gradients: list[Tensor]
    total: Tensor
    since: int = 0
    taken: Taken = field(default_factory=list)
    missing: int = 0
    sent: Tensor | None = None
    under_way: "Future[Tensor] | None" = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each once."""
        return list({id(part.parameter): part.parameter for part in self.parts}.values())


class RetraceSync(Synchroniser):
    """See the top of the file. One per rank, which is a replica; they lie along `axis`."""

    replicas_differ = True

    def __init__(self, config: Retrace, axis: str, ledger: Ledger, exchange: Exchange) -> None:
        super().__init__(config.accumulate)
        self._config, self._axis, self._ledger, self._exchange = config, axis, ledger, exchange
        self._buckets: list[_Bucket] = []
        self._places: dict[str, tuple[_Bucket, int]] = {}
        """Of parameters, by name."""
        self._turns: dict[int, list[int]] = {}
        """Of the buckets, by H."""
        self._schedule = Schedule(every=config.every, first=config.first)
        self._again: Again | None = None
        self._done = 0
        self._due: list[_Bucket] = []
        """In the last micro-batch of a step: whose turn it is, and who has not been sent yet."""
        self._scaled: Tensor | None = None
        """By what the latest gradient was scaled after its backward pass, []."""
        self._norm: Tensor | None = None
        self._restored: State | None = None

    @property
    def settled_after(self) -> int:
        return self._schedule.first_steps + self._exchange.settled_after * self._config.every

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """Each bucket once in H steps, those of a turn one after the other; each may hide under the rest of its backward pass."""
        found, buckets = [], self._assigned(workload.parameters)
        for index, (bucket, turn) in enumerate(zip(buckets, turns(buckets, self._config.every), strict=True)):
            window = workload.tokens_per_microbatch * workload.backward_flops_remaining(bucket[-1].whole)
            for transfer in self._exchange.transfers(f"bucket {index}", bucket, self._axis, getattr(layout, self._axis)):
                found.append(replace(transfer, every=self._config.every, event=f"turn {turn}", window_flops=window))
        return found

    @contextmanager
    def attached(self, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[nn.Module]:
        """Puts gradients into buckets. Begins from the first replica's values, or goes on with a state. Collective.

        UserError for an optimizer other than AdamW, and for a state of other parameters."""
        longest = max([self._config.every, *(every for _, every in self._config.first)])
        again = Again(optimizer, 2 * longest)  # one period may end the part of a run in which H is another
        group, names = mesh.get_group(self._axis), Names(model)
        self._again, self._clock = again, clock_of(names.device)
        with self._ledger.label("replica set-up"):
            if self._restored is None:
                make_same({**dict(model.named_parameters()), **dict(model.named_buffers())}, group)
            buckets = self._assigned(described(model))
            shapes = {part.name: part.shape for bucket in buckets for part in bucket}
            self._exchange.attach(group, self._axis, shapes, names.device, moments=self._moments)
        self._begin(model, buckets)
        handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._ready, bucket)))
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()
            self._exchange.detach()
            self._buckets, self._again = [], None

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Around forward and backward; in the last of a step buckets whose turn it is are averaged. Collective then."""
        due = [bucket for bucket in self._buckets if self._is_due(bucket)] if last else []
        for bucket in due:
            bucket.missing = len(bucket.parameters)
        self._due = list(due)
        yield
        self._ready_at = self._clock.now()
        if last:
            self._send(all_of_them=True)
            self._norm = self._smallest().norm()
            self._arrive(due)

    def after_step(self, step: int) -> None:
        """Local. Steps are counted here: a caller may number them anew."""
        self._done += 1

    @torch.no_grad()
    def finish(self) -> None:
        """After the last step: what was not sent yet is, and all take these steps again. Collective."""
        late = [bucket for bucket in self._buckets if bucket.since < self._done]
        for bucket in late:
            self._start(bucket, bucket.total, self._done, f"final {bucket.index}", last=bucket is late[-1])
        self._arrive(late)
        self._retrace(late, last_too=True)
        self._conclude(late, self._done)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds where the buckets' periods began, which is the same on all replicas. Local."""
        held = [part.of(part.parameter.detach()) for bucket in self._buckets for part in bucket.parts]
        own = [values.clone() for values in held]
        for values, (taken, _) in zip(held, (one for bucket in self._buckets for one in bucket.taken), strict=True):
            values.copy_(taken)
        try:
            yield
        finally:
            for values, mine in zip(held, own, strict=True):
                values.copy_(mine)

    def state_dict(self) -> State:
        """What the exchange carries, and where periods began; before `attached` what was loaded."""
        if self._restored is not None:
            return self._restored
        return {
            "exchange": self._exchange.state_dict(),
            "done": self._done,
            "rates": list(self._again.rates) if self._again else [],
            "scaled": self._scaled,
            "buckets": [
                {
                    "names": [piece.name for piece in bucket.pieces],
                    "since": bucket.since,
                    "total": bucket.total.clone(),
                    "taken": bucket.taken,
                }
                for bucket in self._buckets
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Before `attached`."""
        self._exchange.load_state_dict(state["exchange"])
        self._restored = state

    def adopt(self, states: Sequence[State]) -> None:
        """All begin a period where the model is, which holds where those before began. Before `attached`."""
        self._exchange.adopt([state["exchange"] for state in states])
        self._done = states[0]["done"]

    def _assigned(self, parameters: Sequence[Parameter]) -> list[list[Part]]:
        return taking_turns(parameters, self._config.bucket_bytes, self._config.every)

    @torch.no_grad()
    def _begin(self, model: nn.Module, buckets: Sequence[Sequence[Part]]) -> None:
        named, self._buckets = dict(model.named_parameters()), []
        self._turns = {every: turns(buckets, every) for every in (self._config.every, *(one for _, one in self._config.first))}
        for index, (bucket, (buffer, pieces)) in enumerate(zip(buckets, buffers(buckets, model), strict=True)):
            total = torch.zeros_like(buffer, dtype=WIDE.get(buffer.dtype, buffer.dtype))
            parts: Any = [part.of(named[part.whole]) for part in bucket]
            gradients = [one.parameter.grad for one in parts]
            self._buckets.append(_Bucket(index, buffer, pieces, parts, gradients, total))
        self._places = {piece.name: (one, at) for one in self._buckets for at, piece in enumerate(one.pieces)}
        if self._restored is not None:
            self._go_on(self._restored)
            self._restored = None
            return
        for begun in self._buckets:
            self._take(begun, self._done)

    def _go_on(self, state: State) -> None:
        mine = [[piece.name for piece in bucket.pieces] for bucket in self._buckets]
        if mine != [saved["names"] for saved in state["buckets"]]:
            raise UserError(
                f"the checkpoint has {len(state['buckets'])} buckets that take turns, not {len(mine)} of this run; resume with "
                "the same model, sync.every and sync.bucket_bytes"
            )
        scaled = state["scaled"]
        self._done, self._scaled = state["done"], scaled if scaled is None else scaled.to(self._smallest().device)
        assert self._again is not None
        self._again.rates.extend(state["rates"])
        for bucket, saved in zip(self._buckets, state["buckets"], strict=True):
            bucket.since = saved["since"]
            bucket.total.copy_(saved["total"])
            bucket.taken = placed(saved["taken"], bucket.buffer.device)

    def _moments(self, name: str) -> Tensor | None:
        """Second moments that all replicas have: of where the bucket's period began."""
        bucket, place = self._places[name]
        return bucket.taken[place][1].get("exp_avg_sq")

    def _is_due(self, bucket: _Bucket) -> bool:
        """Whether in the step after `_done` steps. Not in the first, when it is not known yet how gradients are scaled."""
        every, number = self._schedule.period(self._done + 1)
        return self._done > 0 and (number - 1) % every == self._turns[every][bucket.index]

    def _smallest(self) -> Tensor:
        return min(self._buckets, key=lambda one: one.buffer.numel()).buffer

    def _ready(self, bucket: _Bucket, parameter: Tensor) -> None:
        """In backward, when a gradient is there."""
        bucket.missing -= 1
        self._send()

    @torch.no_grad()
    def _send(self, *, all_of_them: bool = False) -> None:
        """Those that are whole, in one order on all ranks."""
        tail = f" every {self._schedule.period(self._done + 1)[0]}" * (self._done < self._schedule.first_steps)
        while self._due and (all_of_them or self._due[0].missing <= 0):
            bucket = self._due.pop(0)
            newest = bucket.buffer.to(bucket.total.dtype)
            newest = newest * self._scaled.to(newest.dtype) if self._scaled is not None else newest
            label = f"bucket {bucket.index}{tail}"
            self._start(bucket, newest.add(bucket.total), self._done + 1, label, last=not self._due)

    def _start(self, bucket: _Bucket, total: Tensor, done: int, label: str, *, last: bool) -> None:
        mean = (total / (done - bucket.since)).to(bucket.buffer.dtype)
        bucket.under_way = self._exchange.start(mean, bucket.pieces, label, last=last)

    def _arrive(self, some: Sequence[_Bucket]) -> None:
        self._exchange.settle()
        for bucket in some:
            assert bucket.under_way is not None
            bucket.sent, bucket.under_way = bucket.under_way.wait(), None

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        """Each step of the optimizer: one alone, and the last one again of what has been averaged, after those before it."""
        assert self._again is not None
        if self._norm is not None:
            norm = self._smallest().norm()
            self._scaled = torch.where(self._norm > 0, norm / self._norm, torch.ones_like(norm))
        self._again.note()
        due = [bucket for bucket in self._buckets if bucket.sent is not None]
        for bucket in self._buckets:
            if bucket.sent is None:
                bucket.total.add_(bucket.buffer)
        if due:
            self._retrace(due, last_too=False)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self._conclude([bucket for bucket in self._buckets if bucket.sent is not None], self._done + 1)

    def _retrace(self, due: Sequence[_Bucket], *, last_too: bool) -> None:
        """Go back to where the periods of these buckets began, and take their steps with the averages; last_too: else but one."""
        assert self._again is not None
        for bucket in due:
            assert bucket.sent is not None
            bucket.buffer.copy_(bucket.sent)
            for part, gradient in zip(bucket.parts, bucket.gradients, strict=True):
                part.parameter.grad = gradient  # after the last step a caller may have dropped it
        noted = len(self._again.rates)
        ended = self._done if last_too else self._done + 1
        for since in dict.fromkeys(bucket.since for bucket in due):
            some = [bucket for bucket in due if bucket.since == since]
            parts = [part for bucket in some for part in bucket.parts]
            taken = [one for bucket in some for one in bucket.taken]
            gradients = [
                part.of(gradient) for bucket in some for part, gradient in zip(bucket.parts, bucket.gradients, strict=True)
            ]
            self._again.steps(parts, taken, gradients, noted - (ended - since), noted if last_too else noted - 1)

    def _conclude(self, due: Sequence[_Bucket], done: int) -> None:
        """A period of these is over, after so many steps of the run, and the next one begins."""
        for bucket in due:
            assert self._again is not None
            self._again.widen(bucket.parts, bucket.taken, done - bucket.since)
            bucket.sent = None
            self._take(bucket, done)

    def _take(self, bucket: _Bucket, done: int) -> None:
        """The next period of the bucket begins here."""
        assert self._again is not None
        bucket.taken, bucket.since = self._again.taken(bucket.parts), done
        bucket.total.zero_()
