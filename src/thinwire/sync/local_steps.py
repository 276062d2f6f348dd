"""Replicas that go alone for H steps, and how they are brought together: the engine under local SGD and the DiLoCo family.

All replicas begin a period with the same parameters x, the anchor. After H steps of its own, replica m stands at x_m:

    send       D_m = x - x_m, through any exchange (codes, error feedback)     D = mean_m D_m, bit-equal everywhere
    outer      x <- outer optimizer(x, D), the same on all replicas            (`outer`)
    apply      x_m <- alpha x_m + (1 - alpha) x, `overlap` steps after D_m was sent

With fragments (`fragments`) each of them has a period of its own, shifted against the others'. The model that counts is x: it is
what is evaluated and saved. At the end of training everything is sent once more, so that the last steps are in x.

Only what is trained is kept and sent; frozen parameters are equal everywhere. What it carries belongs to the object, not to one
stay in it: entered again it goes on with the outer momentum, and from the model as it is now, or, left by an exception, from the
anchor and from what was under way. A state that was loaded is used once, when it is entered next.

Within a replica another synchroniser may be at work, on other axes; under FSDP2 all of this is done to shards (`shards`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.exchange import Exchange
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.base import Synchroniser
from thinwire.sync.fragments import due, fragments
from thinwire.sync.nested import NestedSynchroniser
from thinwire.sync.outer import Nesterov
from thinwire.sync.shards import Shards
from thinwire.traffic import Transfer
from thinwire.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """every: H; layers_per_fragment: 0 for one fragment of everything; overlap: tau; mixing: alpha."""

    every: int
    layers_per_fragment: int = 0
    overlap: int = 0
    mixing: float = 0.0


@dataclass
class _Fragment:
    """Parameters that are sent together, as far as this rank holds values of them. anchor: flat float32, as is the outer
    optimizer's momentum (empty without one)."""

    index: int
    pieces: list[Piece]
    anchor: torch.Tensor
    momentum: torch.Tensor
    sent_at: int
    """Steps done when it was last sent, or formed; then there is nothing to send."""
    under_way: "torch.futures.Future[torch.Tensor] | None" = None
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.numel = sum(piece.numel for piece in self.pieces)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The anchor by parameter."""
        return {piece.name: piece.of(self.anchor).view(piece.shape) for piece in self.pieces}

    def go_on(self, before: "_Fragment") -> None:
        """With the momentum of parameters that were in `before`."""
        known = {piece.name: piece for piece in before.pieces}
        for piece in self.pieces:
            if piece.name in known and known[piece.name].shape == piece.shape and len(self.momentum):
                piece.of(self.momentum).copy_(known[piece.name].of(before.momentum))


class LocalStepsSync(NestedSynchroniser):
    """See the top of the file. One per rank; replicas lie along `axis`, `inner` holds together what is one replica."""

    def __init__(
        self, schedule: Schedule, outer: Nesterov, axis: str, ledger: Ledger, exchange: Exchange, inner: Synchroniser
    ) -> None:
        super().__init__(inner)
        self._schedule, self._outer, self._axis = schedule, outer, axis
        self._ledger, self._exchange = ledger, exchange
        self._shards = Shards(torch.nn.Module())
        self._fragments: list[_Fragment] = []
        self._num_fragments = 0
        self._restored: dict[str, Any] | None = None
        self._adopted = False
        self._finished = True
        self._done = 0

    @property
    def settled_after(self) -> int:
        """The inner one's, or the first period after the exchange has settled."""
        return max(self.inner.settled_after, self._exchange.settled_after * self._schedule.every)

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """The inner one's, and each fragment once in `every` steps; it may hide under the steps of the overlap."""
        found = self.inner.traffic(workload, layout)
        by_name = {parameter.name: parameter for parameter in workload.parameters}
        window = self._schedule.overlap * workload.flops_per_microbatch * self.num_micro
        for index, names in enumerate(fragments(list(by_name), self._schedule.layers_per_fragment)):
            parameters = [by_name[name] for name in names if by_name[name].numel]
            if not parameters:
                continue
            event = f"fragment {index}"
            for transfer in self._exchange.transfers(event, parameters, self._axis, getattr(layout, self._axis)):
                found.append(replace(transfer, every=self._schedule.every, event=event, window_flops=window))
        return found

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """Takes the model's parameters for the anchor, unless there is one to go on from. Collective over all ranks."""
        with self.inner.attached(model, optimizer, mesh) as module:
            self._shards = Shards(model)
            self._form(fragments(self._shards.trained(), self._schedule.layers_per_fragment))
            if self._restored is not None:
                self._restore(self._restored)
                self._restored, self._adopted = None, False
            with self._ledger.label("replica set-up"):
                known = {piece.name: piece.shape for fragment in self._fragments for piece in fragment.pieces}
                self._exchange.attach(mesh.get_group(self._axis), self._axis, known)
            self._finished = False
            try:
                yield module
            finally:
                self._exchange.detach()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Send what is due, apply what has come back. Collective in the steps where something is due."""
        self.inner.after_step(step)
        self._done = step + 1
        for fragment in self._fragments:
            if fragment.under_way is not None and self._done >= fragment.sent_at + self._schedule.overlap:
                self._apply(fragment)
            if due(fragment.index, self._num_fragments, self._schedule.every, self._done):
                self._send(fragment)
                if not self._schedule.overlap:
                    self._apply(fragment)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last step: everything that was not sent in this step is sent once more, and applied. Collective."""
        self.inner.finish()
        for fragment in self._fragments:
            if fragment.under_way is not None:
                self._apply(fragment)
        late = [fragment for fragment in self._fragments if fragment.sent_at != self._done]
        for fragment in late:
            self._send(fragment, "final")
        for fragment in late:
            self._apply(fragment)
        self._finished = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the anchor, which is the same on all replicas. Local."""
        own = {name: values.clone() for name, values in self._shards.items()}
        for fragment in self._fragments:
            self._shards.write(fragment.values)
        try:
            yield
        finally:
            self._shards.write(own)

    def state_dict(self) -> dict[str, Any]:
        """Anchors, momenta, what is under way (waited for), and what the exchange carries; before `attached` what was loaded."""
        if self._restored is not None:
            return self._restored
        saved = [self._saved(fragment) for fragment in self._fragments]  # first: it waits, and until then the exchange changes
        return {
            "inner": self.inner.state_dict(),
            "exchange": self._exchange.state_dict(),
            "done": self._done,
            "fragments": saved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `attached`."""
        self.inner.load_state_dict(state["inner"])
        self._exchange.load_state_dict(state["exchange"])
        self._restored, self._adopted = state, False

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Anchors, momenta and averages under way are the same on all replicas; what the exchange carries is dealt out anew.

        All replicas begin from the anchor.
        """
        self.inner.adopt([state["inner"] for state in states])
        self._exchange.adopt([state["exchange"] for state in states])
        self._restored, self._adopted = states[0], True

    def _form(self, parts: Sequence[Sequence[str]]) -> None:
        """The fragments; where others were before, with their momentum, and if these are not finished they themselves."""
        found = [self._fragment(index, names) for index, names in enumerate(parts)]
        found = [fragment for fragment in found if fragment.numel]
        if self._restored is None and not self._finished:
            if [fragment.pieces for fragment in found] != [fragment.pieces for fragment in self._fragments]:
                raise UserError(
                    "the model's trained parameters are others than when an exception ended the last exchange; load a "
                    "checkpoint, or begin anew with another object"
                )
            return
        for fragment in found:
            for before in self._fragments:
                fragment.go_on(before)
        self._fragments, self._num_fragments = found, len(parts)

    def _fragment(self, index: int, names: Sequence[str]) -> _Fragment:
        pieces, first = [], 0
        for name in names:
            if self._shards[name].numel():
                pieces.append(Piece(name, first, tuple(self._shards[name].shape)))
                first += pieces[-1].numel
        held = [self._shards[piece.name].reshape(-1) for piece in pieces]
        anchor = torch.cat(held) if held else torch.empty(0)
        return _Fragment(index, pieces, anchor, torch.zeros(first) if self._outer.momentum else torch.empty(0), self._done)

    def _send(self, fragment: _Fragment, label: str = "fragment") -> None:
        if fragment.under_way is not None:  # of a run with a longer overlap than this one's period
            self._apply(fragment)
        self._check_trained(fragment)
        buffer = fragment.anchor.clone()
        for piece in fragment.pieces:
            piece.of(buffer).sub_(self._shards[piece.name].reshape(-1))
        fragment.sent_at = self._done
        last = fragment is self._fragments[-1]
        with self._ledger.label("fragment"):
            fragment.under_way = self._exchange.start(buffer, fragment.pieces, f"{label} {fragment.index}", last=last)

    def _apply(self, fragment: _Fragment) -> None:
        mean = self._arrived(fragment)
        fragment.under_way = None
        self._outer.step(fragment.anchor, mean, fragment.momentum)
        self._shards.write(fragment.values, keep=self._schedule.mixing)

    def _check_trained(self, fragment: _Fragment) -> None:
        """UserError if parameters were frozen, or are trained that nobody would send."""
        trained = self._shards.trained()
        held = {piece.name for other in self._fragments for piece in other.pieces}
        changed = [name for name in trained if name not in held and self._shards[name].numel()]
        changed += [piece.name for piece in fragment.pieces if piece.name not in trained]
        if changed:
            raise UserError(
                f"{changed[0]} was frozen, or is trained, since the replicas' exchange began, and {len(changed) - 1} others; "
                "leave the block, change requires_grad on all ranks, and enter it again"
            )

    def _arrived(self, fragment: _Fragment) -> torch.Tensor:
        """Waits for the average."""
        assert fragment.under_way is not None
        try:
            return fragment.under_way.wait()
        except Exception:
            self._exchange.settle()
            raise

    def _saved(self, fragment: _Fragment) -> dict[str, Any]:
        return {
            "names": [piece.name for piece in fragment.pieces],
            "anchor": fragment.anchor.clone(),
            "momentum": fragment.momentum.clone(),
            "sent_at": fragment.sent_at,
            "under_way": self._arrived(fragment).clone() if fragment.under_way is not None else None,
        }

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        mine = [([piece.name for piece in fragment.pieces], fragment.numel) for fragment in self._fragments]
        theirs = [(saved["names"], saved["anchor"].numel()) for saved in state["fragments"]]
        if mine != theirs:
            raise UserError(
                f"this rank holds {sum(numel for _, numel in mine)} values in {len(mine)} fragments, that of the checkpoint held "
                f"{sum(numel for _, numel in theirs)} in {len(theirs)}; resume with the same model, fragments and shards"
            )
        for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
            fragment.anchor.copy_(saved["anchor"])
            fragment.momentum.copy_(saved["momentum"])
            fragment.sent_at = saved["sent_at"]
            if saved["under_way"] is not None:
                fragment.under_way = torch.futures.Future()
                fragment.under_way.set_result(saved["under_way"].clone())
            if self._adopted:
                self._shards.write(fragment.values)
