"""Replicas that go alone for H steps, and how they are brought together: the engine under local SGD and the DiLoCo family.

All replicas begin a period with the same parameters x, the anchor. After H steps of its own, replica m stands at x_m:

    send       D_m = x - x_m, through any exchange (codes, error feedback)     D = mean_m D_m, bit-equal everywhere
    outer      x <- outer optimizer(x, D), the same on all replicas            (`outer`)
    apply      x_m <- alpha x_m + (1 - alpha) x, `overlap` steps after D_m was sent; or, with `adds`,
               x_m <- x + (x_m - what x_m was when D_m was sent)

The latter keeps what the replica has moved since, and nothing of how far it stood from the others (Shen et al. 2019, CoCoD-SGD,
arXiv 1906.12043).

The model that counts is x: it is what is evaluated and saved. At the end of training everything is sent once more, so that the
last steps are in x.

With fragments, of whole layers, each has a period of its own, shifted against the others'. With n layers in a fragment there are
P = ceil(layers / n) of them; fragment j holds the layers j, j + P, j + 2 P, .. (strided, as Douillard et al. 2025, Streaming
DiLoCo, section 2.1), and what belongs to no layer (embeddings, the last norm, the head) is one more. In a period of H steps each
is sent once, at even distances; the last one at the end of the period.

H may be another one at first (`Schedule.first`). What is sent then bears a label with its H; `traffic` is of what follows.

What is common to all replicas that go alone is in `nested`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch.distributed import ProcessGroup

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange
from thinwire.compress.stages import done
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.base import Synchroniser
from thinwire.sync.host_memory import HostMemory
from thinwire.sync.nested import Anchor, NestedSynchroniser, counted, suffix
from thinwire.sync.outer import Nesterov
from thinwire.sync.shards import Shards
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, Workload, by_wide_dtype

_LAYER = re.compile(r"^((?:[^.]+\.)*?\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """every: H; layers_per_fragment: 0 for one fragment of everything; overlap: tau; mixing: alpha, where not `adds`. on_host:
    anchors and momenta lie in memory of the host, also those of parameters on a device. first: (steps, H) of whole periods that
    come before."""

    every: int
    first: tuple[tuple[int, int], ...] = ()
    layers_per_fragment: int = 0
    overlap: int = 0
    mixing: float = 0.0
    adds: bool = False
    on_host: bool = False

    @property
    def first_steps(self) -> int:
        """After which H is `every`."""
        return sum(steps for steps, _ in self.first)

    def period(self, done: int) -> tuple[int, int]:
        """(H, steps done since it is that) of the last of `done` steps."""
        for steps, every in self.first:
            if done <= steps:
                return every, done
            done -= steps
        return self.every, done


class _Fragment(Anchor):
    """Parameters of one wide dtype that are sent together; those of the other, if a model has both, have the same index."""

    index = 0
    sent_at = 0
    """Steps done when it was last sent, or formed; then there is nothing to send."""

    def __init__(self, shards: Shards, parameters: Sequence[Parameter], with_momentum: bool, host: HostMemory | None) -> None:
        super().__init__(shards, parameters, with_momentum, host)
        self.under_way: torch.futures.Future[torch.Tensor] | None = None
        self.sent_from: torch.Tensor | None = None
        """Where the replica stood then; None: what it has moved since is not added."""


class LocalStepsSync(NestedSynchroniser):
    """See the top of the file. One per rank; replicas lie along `axis`, `inner` holds together what is one replica."""

    _group: ProcessGroup

    def __init__(
        self, schedule: Schedule, outer: Nesterov, axis: str, ledger: Ledger, exchange: Exchange, inner: Synchroniser
    ) -> None:
        super().__init__(axis, ledger, inner, on_host=schedule.on_host)
        self._schedule, self._outer, self._exchange = schedule, outer, exchange
        self._fragments: list[_Fragment] = []
        self._num_fragments = 0
        self._owed: dict[str, torch.Tensor] = {}
        """By an exchange that was given up, by name: part of what is sent next."""

    @property
    def settled_after(self) -> int:
        """The inner one's, or the first period after the exchange has settled."""
        periods = self._exchange.settled_after * self._schedule.every
        return max(self.inner.settled_after, self._schedule.first_steps + periods)

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """The inner one's, and each fragment once in `every` steps; it may hide under the steps of the overlap."""
        found = self.inner.traffic(workload, layout)
        by_name = {parameter.name: parameter for parameter in workload.parameters}
        window = self._schedule.overlap * workload.flops_per_microbatch * self.num_micro
        for index, names in enumerate(fragments(list(by_name), self._schedule.layers_per_fragment)):
            event = f"fragment {index}"
            for together in by_wide_dtype(by_name[name] for name in names):
                label = event + suffix(together[0].dtype)
                for transfer in self._exchange.transfers(label, together, self._axis, getattr(layout, self._axis)):
                    found.append(replace(transfer, every=self._schedule.every, event=event, window_flops=window))
        return found

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Send what is due, apply what has come back. Collective in the steps where something is due."""
        self.inner.after_step(step)
        self._done = step + 1
        for fragment in self._fragments:
            is_due = self._is_due(fragment, self._done)
            if fragment.under_way is not None and (is_due or self._is_back(fragment, self._done)):
                self._apply(fragment)  # due before it is back: of a run with a longer overlap than this one's period
            if is_due:
                with fragment.held(changes=not self._schedule.overlap):
                    self._send(fragment)
                    if not self._schedule.overlap:
                        self._apply(fragment)
        self._exchange.flush()  # what is under way goes on while the replica trains
        for fragment in self._fragments:
            if self._is_due(fragment, self._done + 1) or self._is_back(fragment, self._done + 1):
                fragment.fetch()

    def _is_due(self, fragment: _Fragment, done: int) -> bool:
        return due(fragment.index, self._num_fragments, *self._schedule.period(done))

    def _is_back(self, fragment: _Fragment, done: int) -> bool:
        return fragment.under_way is not None and done >= fragment.sent_at + self._schedule.overlap

    def switch(self, exchange: Exchange | None, every: int) -> None:
        """See `Synchroniser`. Waits for what is under way."""
        self._schedule = replace(self._schedule, every=every)
        for fragment in self._fragments:
            if fragment.under_way is not None:
                fragment.under_way = done(self._arrived(fragment))
        if exchange is not None:
            self._owed = {**self._owed, **self._exchange.residuals()}
            self._exchange.detach()
            self._exchange = exchange
            self._connect(self._group)

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
        self._exchange.settle(all_of_them=True)
        self._finished = True

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
            "owed": dict(self._owed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `attached`."""
        super().load_state_dict(state)
        self._exchange.load_state_dict(state["exchange"])
        self._owed = dict(state.get("owed", {}))

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Anchors, momenta and averages under way are the same on all replicas; what the exchange carries is shared out anew.

        All replicas begin from the anchor.
        """
        self.inner.adopt([state["inner"] for state in states])
        self._exchange.adopt([state["exchange"] for state in states])
        self._restored, self._adopted = states[0], True
        owed = [state.get("owed", {}) for state in states]
        for name in dict.fromkeys(name for one in owed for name in one):
            self._owed[name] = torch.stack([one[name] for one in owed if name in one]).sum(0).div_(len(owed))

    def _begin(self) -> None:
        parts = fragments(list(self._held), self._schedule.layers_per_fragment)
        host, found = self._host_memory(), list[_Fragment]()
        for index, names in enumerate(parts):
            for together in by_wide_dtype(map(self._shards.described, names)):
                found.append(_Fragment(self._shards, together, bool(self._outer.momentum), host))
                found[-1].index, found[-1].sent_at = index, self._done
        for fragment in found:
            for before in self._fragments:
                fragment.take_momentum(before)
        self._fragments, self._num_fragments = found, len(parts)

    def _connect(self, group: ProcessGroup) -> None:
        self._group = group
        known = {piece.name: piece.shape for fragment in self._fragments for piece in fragment.pieces}
        with self._ledger.label("replica set-up"):
            self._exchange.attach(group, self._axis, known, self._shards.device)

    def _disconnect(self) -> None:
        self._exchange.detach()

    def _send(self, fragment: _Fragment, label: str = "fragment") -> None:
        self._check_trained()
        with fragment.held(changes=False):
            reached = fragment.reached(self._shards)
            buffer = fragment.values - reached
        fragment.sent_from = reached if self._schedule.adds else None
        for piece in fragment.pieces if self._owed else ():
            if (owed := self._owed.pop(piece.name, None)) is not None:
                piece.of(buffer).add_(owed)
        fragment.sent_at = self._done
        last = fragment is self._fragments[-1]
        label = f"{label} {fragment.index}{fragment.suffix}"
        if self._done <= self._schedule.first_steps:
            label += f" every {self._schedule.period(self._done)[0]}"
        with self._ledger.label("fragment"):
            fragment.under_way = self._exchange.start(buffer, fragment.pieces, label, last=last)

    def _apply(self, fragment: _Fragment) -> None:
        mean = self._arrived(fragment)
        sent_from, fragment.under_way, fragment.sent_from = fragment.sent_from, None, None
        with fragment.held(changes=True):
            since = None if sent_from is None else fragment.reached(self._shards).sub_(sent_from)
            self._outer.step(fragment.values, mean, fragment.momentum)
            if since is None:
                self._shards.write(fragment.by_name(), keep=self._schedule.mixing)
            else:
                since.add_(fragment.values)
                self._shards.write({piece.name: piece.of(since) for piece in fragment.pieces})

    def _write(self) -> None:
        """The anchor, which is the same on all replicas."""
        for fragment in self._fragments:
            with fragment.held(changes=False):
                self._shards.write(fragment.by_name())

    def _arrived(self, fragment: _Fragment) -> torch.Tensor:
        """Waits for the average; on a device the current stream does."""
        assert fragment.under_way is not None
        self._exchange.flush()
        if self._exchange.on_device:  # where a future always holds something
            self._exchange.settle()
        try:
            return fragment.under_way.wait()
        except Exception:
            self._exchange.settle()
            raise

    def _saved(self, fragment: _Fragment) -> dict[str, Any]:
        fragment.settle()
        return {
            "names": [piece.name for piece in fragment.pieces],
            "sizes": [piece.numel for piece in fragment.pieces],
            "anchor": fragment.values.clone(),
            "momentum": fragment.momentum.clone(),
            "sent_at": fragment.sent_at,
            "under_way": self._arrived(fragment).clone() if fragment.under_way is not None else None,
            "sent_from": fragment.sent_from.clone() if fragment.sent_from is not None else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        if self._adopted:
            state = state | {"fragments": _regrouped(state["fragments"], self._fragments)}
        mine = [([piece.name for piece in fragment.pieces], fragment.values) for fragment in self._fragments]
        theirs = [(saved["names"], saved["anchor"]) for saved in state["fragments"]]
        if [(names, counted([anchor])) for names, anchor in mine] != [(names, counted([anchor])) for names, anchor in theirs]:
            raise UserError(
                f"this rank holds {counted(anchor for _, anchor in mine)} in {len(mine)} fragments, that of the checkpoint held "
                f"{counted(anchor for _, anchor in theirs)} in {len(theirs)}; resume with the same model, fragments and shards"
            )
        for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
            fragment.settle()
            fragment.values.copy_(saved["anchor"])
            fragment.momentum.copy_(saved["momentum"])
            fragment.sent_at = saved["sent_at"]
            if saved["under_way"] is not None:
                fragment.under_way = done(saved["under_way"].to(self._shards.device, copy=True))
                stood = fragment.values if self._adopted and self._schedule.adds else saved.get("sent_from")
                fragment.sent_from = stood.to(self._shards.device, copy=True) if stood is not None else None


def _regrouped(saved: list[dict[str, Any]], fragments: Sequence[_Fragment]) -> list[dict[str, Any]]:
    """What was saved of other fragments, as of these; as it is, if it does not hold all that these do, or has no `sizes` yet."""
    keys, by_name = ("anchor", "momentum", "under_way"), dict[str, dict[str, Any]]()
    for one in saved:
        sizes = one.get("sizes", ())
        for name, first, size in zip(one["names"], accumulate(sizes, initial=0), sizes, strict=False):
            flat = {key: one[key][first : first + size] if one[key] is not None else None for key in keys}
            by_name.setdefault(name, {"sent_at": one["sent_at"], **flat})
    found = []
    for fragment in fragments:
        names = [piece.name for piece in fragment.pieces]
        if not by_name.keys() >= set(names):
            return saved
        its = [by_name[name] for name in names]
        sent_at, away = {one["sent_at"] for one in its}, [one["under_way"] is not None for one in its]
        if any(away) and (len(sent_at) > 1 or not all(away)):
            raise UserError(
                f"the checkpoint holds an average under way of {names[away.index(True)]}, but not of all {len(names)} parameters "
                "that are one fragment here; resume with the layout and the fragments that it was made with"
            )
        flat = {key: torch.cat([one[key] for one in its]) for key in keys[: 2 + all(away)]}
        found.append({"names": names, "sent_at": min(sent_at), "under_way": None} | flat)
    return found


def fragments(names: Sequence[str], layers_per_fragment: int) -> list[list[str]]:
    """Parameter names, in their order, by fragment; every name is in exactly one. 0 layers per fragment: one for all.

    A layer is what stands before the first number in a name, with the number: "blocks.3" of "blocks.3.mlp.up.weight", "0" of the
    "0.weight" of an nn.Sequential.
    """
    if not layers_per_fragment:
        return [list(names)]
    layer_of = {name: match.group(1) if (match := _LAYER.match(name)) else "" for name in names}
    layers = list(dict.fromkeys(layer for layer in layer_of.values() if layer))
    count = -(-len(layers) // layers_per_fragment)
    place = {layer: index % count for index, layer in enumerate(layers)}
    found: list[list[str]] = [[] for _ in range(count + 1)]
    for name in names:
        found[place.get(layer_of[name], count)].append(name)
    return [fragment for fragment in found if fragment]


def due(fragment: int, count: int, every: int, done: int) -> bool:
    """Whether fragment number `fragment` of `count` is sent after `done` steps, with a period of `every` steps."""
    return done % every == (fragment + 1) * every // count % every
