"""Weights that stages on two ranks of a pipeline use: a tied embedding exists twice where the first and the last stage are apart.

After the backward passes each holder sends its gradient g in the code C of gradients between stages, decoded by D; without one as
it is:

    g = D(C(g_first)) + D(C(g_last))          the same to the bit, whoever adds up

Replicas of both stages then average it apart from each other, and sums of more than two, or codes, depend on what else is in a
bucket. So where `shares` is set only the last stage sends its gradient, the first one averages the sum, and both take
D(C(average)). Either way a holder sends one message a step for each weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import together
from thinwire.compress.activations.boundary import BoundaryCodec
from thinwire.parallel.cut import TIED


class TiedWeights:
    """This rank's, and their gradients. Iterates over the weights."""

    def __init__(
        self,
        held: Mapping[int, Sequence[nn.Parameter]],
        group: dist.ProcessGroup,
        ledger: Ledger,
        codec: BoundaryCodec | None,
    ) -> None:
        """held: by the rank of `group` that has them too; a lower one has the earlier stage."""
        self._held, self._group, self._ledger, self._codec = held, group, ledger, codec
        self.shares = False
        """Whether both holders take the first one's average (`share`)."""

    def __iter__(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(self._held.values())

    @torch.no_grad()
    def add_up(self) -> None:
        """After the backward passes of a step: both holders get the sum of both gradients; where `shares`, the first alone.
        Collective over the pipeline. UserError for a gradient to be coded that is not finite."""
        with self._ledger.label(TIED):
            for other, first, weight in self._each():
                gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                if not self.shares:
                    sent = self._packed(gradient)
                    received = self._swapped(sent, other)
                    if self._codec is not None:
                        gradient.copy_(self._unpacked(sent, gradient))
                    weight.grad = gradient.add_(self._unpacked(received, gradient))
                elif first:
                    weight.grad = gradient.add_(self._received(other, gradient))
                else:
                    dist.send(self._packed(gradient), group=self._group, group_dst=other)
                    weight.grad = gradient

    @torch.no_grad()
    def share(self) -> None:
        """After gradients were averaged, where `shares`: both holders take the first one's. Collective over the pipeline."""
        if not self.shares:
            return
        with self._ledger.label(TIED):
            for other, first, weight in self._each():
                assert weight.grad is not None, "it was averaged"
                if first:
                    sent = self._packed(weight.grad)
                    dist.send(sent, group=self._group, group_dst=other)
                    weight.grad.copy_(self._unpacked(sent, weight.grad))
                else:
                    weight.grad.copy_(self._received(other, weight.grad))

    def _each(self) -> Iterator[tuple[int, bool, nn.Parameter]]:
        """(the other holder, whether this one is the first, weight)."""
        for other, weights in self._held.items():
            for weight in weights:
                yield other, self._group.rank() < other, weight

    def _packed(self, gradient: Tensor) -> Tensor:
        return gradient if self._codec is None else self._codec.pack(gradient)

    def _unpacked(self, payload: Tensor, like: Tensor) -> Tensor:
        return payload if self._codec is None else self._codec.unpack(payload, like.shape, like.dtype)

    def _swapped(self, sent: Tensor, other: int) -> Tensor:
        received = torch.empty_like(sent)
        both = [
            dist.P2POp(dist.irecv, received, group=self._group, group_peer=other),
            dist.P2POp(dist.isend, sent, group=self._group, group_peer=other),
        ]
        for work in together(both):
            work.wait()
        return received

    def _received(self, other: int, like: Tensor) -> Tensor:
        """What the other has sent, which this rank has the like of."""
        if self._codec is None:
            payload = torch.empty_like(like)
        else:
            payload = torch.empty(self._codec.payload_bytes(like.shape), dtype=torch.uint8, device=like.device)
        dist.recv(payload, group=self._group, group_src=other)
        return self._unpacked(payload, like)
