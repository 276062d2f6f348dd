"""NoLoCo (Kolehmainen et al. 2025, arXiv 2506.10911): replicas exchange in pairs drawn at random; there is no all-reduce.

Replica i trains x_i from its slow weights y_i. After H steps of its own, with the replica j that it is paired with:

    m_i <- mu m_i + eta mean_ij(x - y) + eta (mean_ij(y) - y_i),   y_i <- y_i + m_i,   x_i <- y_i

The first mean is the pair's pseudo-gradient, the second term pulls the two together. With one eta for both, as published, the
pair's mean of y cancels, and each sends x alone, half as much:

    m_i <- mu m_i + eta (mean_ij(x) - y_i)

Here x_i is where the replica stands, with the digits of y_i that a model in 16 bits rounds off (`nested`). Sent through a cast C
(bf16, fp16), mean_ij(x) is taken as (C(x_i) + C(x_j)) / 2 + x_i - C(x_i): what the cast loses cancels in the sum over the pair,
and does not move their mean. Pairs are drawn from the number of the exchange, on all ranks alike; of an odd number of replicas
one has no partner and takes its step alone. Published: H = 50, eta = 0.7, mu = 0.5.

Slow weights differ between replicas. Until the end each replica is evaluated by its own, and the score is the mean of theirs. At
the end of training the last steps are taken in without a partner, and the slow weights are averaged once over all replicas, in
full: that mean is the model. What is common to all replicas that go alone is in `nested`.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce, swap
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import NoLoCo
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.base import Synchroniser
from thinwire.sync.nested import Anchor, NestedSynchroniser, counted, suffix
from thinwire.traffic import Transfer
from thinwire.workload import ITEM_BYTES, Workload, by_wide_dtype

SEED = 0
"""Of the pairs."""

CASTS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What may travel, by compress.kind; None: weights as they are kept, float32 or float64."""


def pairs(replicas: int, exchange: int) -> list[tuple[int, ...]]:
    """Who exchanges with whom in exchange number `exchange`: disjoint pairs of all replicas; one is alone if they are odd."""
    order = list(range(replicas))
    Random(f"{SEED} {exchange}").shuffle(order)
    return [tuple(order[first : first + 2]) for first in range(0, replicas, 2)]


class NoLoCoSync(NestedSynchroniser):
    """See the top of the file. One per rank; replicas lie along `axis`, `inner` holds together what is one replica."""

    def __init__(self, config: NoLoCo, compress: NoCompression | Coded, axis: str, ledger: Ledger, inner: Synchroniser) -> None:
        if compress.kind not in CASTS:
            raise UserError(
                f"compress.kind = {compress.kind!r}: noloco sends weights, which only {', '.join(CASTS)} keep; take one of these"
            )
        if isinstance(compress, Coded) and compress != Coded(kind=compress.kind):
            raise UserError(
                f"compress.kind = {compress.kind!r}: noloco casts whole weights, and takes no other key; leave them out"
            )
        super().__init__(axis, ledger, inner, on_host=config.outer_device == "host")
        self._config, self._wire_dtype = config, CASTS[compress.kind]
        self._group: dist.ProcessGroup | None = None
        self._slow: list[Anchor] = []
        """This replica's slow weights, by wide dtype."""
        self._stepped_at = 0

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """The inner one's, and a message of each wide dtype to the partner in `every` steps; of an odd number of replicas one
        sends nothing."""
        found = self.inner.traffic(workload, layout)
        for together in by_wide_dtype(workload.parameters) if getattr(layout, self._axis) > 1 else ():
            dtype = together[0].dtype
            size = self._wire_dtype.itemsize if self._wire_dtype else ITEM_BYTES[dtype]
            found.append(
                Transfer(
                    label=f"pair{suffix(dtype)}",
                    axis=self._axis,
                    op="send",
                    message_bytes=size * sum(parameter.numel for parameter in together),
                    every=self._config.every,
                    event="pair",
                )
            )
        return found

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Every H steps: exchange with the partner, and an outer step. Collective over the pair."""
        self.inner.after_step(step)
        self._done = step + 1
        if self._done % self._config.every == 0:
            self._check_trained()
            for slow in self._slow:
                with slow.held(changes=True):
                    self._step(slow, self._mean_of_pair(slow))
                    self._shards.write(slow.by_name())
            self._stepped_at = self._done
        if (self._done + 1) % self._config.every == 0:
            for slow in self._slow:
                slow.fetch()

    @torch.no_grad()
    def finish(self) -> None:
        """After the last step: what was not exchanged in it enters alone, then one model, the mean. Collective over all."""
        self.inner.finish()
        assert self._group is not None, "attached() comes first"
        for slow in self._slow:
            with slow.held(changes=True):
                if self._done != self._stepped_at:
                    self._step(slow, slow.reached(self._shards))
                all_reduce(slow.values.div_(self._group.size()), self._group, self._ledger, f"final{slow.suffix}").wait()
                self._shards.write(slow.by_name())
        self._stepped_at = self._done
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """This replica's slow weights and momentum; before `attached` what was loaded."""
        if self._restored is not None:
            return self._restored
        for slow in self._slow:
            slow.settle()
        return {
            "inner": self.inner.state_dict(),
            "done": self._done,
            "stepped_at": self._stepped_at,
            "names": list(self._held),
            "slow": [slow.values.clone() for slow in self._slow],
            "momentum": [slow.momentum.clone() for slow in self._slow],
        }

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """All begin from the mean of the slow weights that there were, with the mean of the momenta. Before `attached`."""
        self.inner.adopt([state["inner"] for state in states])
        by_dtype = {key: zip(*(_listed(state[key]) for state in states), strict=True) for key in ("slow", "momentum")}
        means = {key: [torch.stack(alike).mean(0) for alike in tensors] for key, tensors in by_dtype.items()}
        self._restored, self._adopted = states[0] | means, True

    def _begin(self) -> None:
        before, together = self._slow, by_wide_dtype(map(self._shards.described, self._held))
        host = self._host_memory()
        self._slow = [Anchor(self._shards, parameters, host=host) for parameters in together]
        for slow in self._slow:
            for old in before:
                slow.take_momentum(old)

    def _connect(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ledger.axes[group.group_name] = self._axis
        if self._shards.device.type != "cpu":  # where pairs may not be the first to use a group
            all_reduce(torch.zeros(1, device=self._shards.device), group, self._ledger, "replica set-up").wait()

    def _disconnect(self) -> None:
        self._group = None

    def _mean_of_pair(self, slow: Anchor) -> torch.Tensor:
        """mean_ij(x); x_i where there is no partner."""
        group, own = self._group, slow.reached(self._shards)
        assert group is not None, "attached() comes first"
        drawn = pairs(group.size(), self._done // self._config.every)
        mine = next(pair for pair in drawn if group.rank() in pair)
        if len(mine) == 1:
            return own
        sent = own.to(self._wire_dtype or own.dtype)
        theirs = swap(sent, sum(mine) - group.rank(), group, self._ledger, f"pair{slow.suffix}")
        mean = sent.to(own.dtype).add_(theirs).div_(2)
        return mean if sent is own else mean.add_(own).sub_(sent)

    def _step(self, slow: Anchor, mean: torch.Tensor) -> None:
        config = self._config
        slow.momentum.mul_(config.outer_momentum).add_(mean - slow.values, alpha=config.outer_learning_rate)
        slow.values.add_(slow.momentum)

    def _write(self) -> None:
        """This replica's slow weights; after `finish` they are the same on all."""
        for slow in self._slow:
            with slow.held(changes=False):
                self._shards.write(slow.by_name())

    def _restore(self, state: dict[str, Any]) -> None:
        theirs = _listed(state["slow"])
        mine, held = counted(slow.values for slow in self._slow), counted(theirs)
        if state["names"] != list(self._held) or mine != held:
            raise UserError(
                f"this rank holds {mine} of {len(self._held)} parameters, that of the checkpoint held {held} of "
                f"{len(state['names'])}; resume with the same model and shards"
            )
        self._done = state["done"]
        self._stepped_at = state.get("stepped_at", self._done - self._done % self._config.every)
        for slow, values, momentum in zip(self._slow, theirs, _listed(state["momentum"]), strict=True):
            slow.settle()
            slow.values.copy_(values)
            slow.momentum.copy_(momentum)


def _listed(saved: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    """By wide dtype; older states hold float32 alone."""
    return [saved] if isinstance(saved, torch.Tensor) else saved
