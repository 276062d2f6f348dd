"""Causal attention over sequences whose tokens lie on a ring of ranks: queries stay, keys and values travel around the ring.

A sequence is cut into 2s slices of c tokens; rank r of s has slices r and 2s-1-r, in this order. In turn t it has the keys and
values of rank j = (r - t) mod s, which come from the rank before it while it computes on those of the turn before:

    t = 0     its own tokens: causal, as on one rank
    j < r     slice j lies before both of r's, slice 2s-1-j behind both: all queries see the first half of what came
    j > r     both of j's lie before slice 2s-1-r and behind slice r: the second half of the queries sees all that came

so in every turn after the first all ranks have the same 2 c^2 pairs of a query and a key. With o_t the output of a turn by itself
and l_t the logarithm of the sum of its exponentials, turns add up to the softmax over all keys:

    l <- log(e^l + e^l_t)        o <- e^(l' - l) o + e^(l_t - l) o_t        l': the l before

Backward, with the final l, d = sum over the head's width of dy y, and scale a, of each turn:

    p = e^(a q k' - l)    dv = p' dy    ds = p (dy v' - d)    dq = a ds k    dk = a ds' q

The dk and dv of a block are added up along the ring: the rank behind its owner begins, each one adds its own and sends the sum
on, and the owner gets it at the end. Per layer and micro-batch each rank sends, s-1 times each, messages of 2 B K L D values:

    forward    keys and values
    backward   their gradients, in float32 or wider; and keys and values once more, unless what came forward was kept

Scores, sums and l are float32, or float64 of float64. Slices: Grattafiori et al. 2024 (Llama 3, arXiv 2407.21783, section 3.3.2);
ring: Liu et al. 2023 (arXiv 2310.01889); l: Milakov & Gimelshein 2018 (arXiv 1805.02867); backward: Dao et al. 2022
(arXiv 2205.14135).

Shapes: B batch, N heads of queries, K of keys and values, L tokens of this rank, D head width; T rows at once, C columns; kv is
[2, B, K, L, D], keys and values.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from thinwire.collectives.backend import MeteredGroup
from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Group, Ledger
from thinwire.collectives.metered_calls import together
from thinwire.models.transformer import causal_attention
from thinwire.parallel.waits import Waits, sleep_until
from thinwire.traffic import EVALUATION
from thinwire.workload import BACKWARD_OVER_FORWARD

AXIS = "seq"
KEYS = "keys and values"
GRADIENTS = "gradients of keys and values"
TILE = 2**20
"""Scores that exist at once: of all heads, of as many rows as that allows."""


@dataclass
class Ring:
    """The ranks of `group`, each of which sends to the next. keeps: what came in a forward pass stays for the backward pass,
    which then sends less. waits: for what was still on its way when a turn was over. turn_s: what a turn of a training pass takes
    at least, going back twice that: paced compute, under which messages travel as they would on the declared device."""

    group: dist.ProcessGroup
    ledger: Ledger
    keeps: bool = True
    waits: Waits = field(default_factory=Waits)
    turn_s: float = 0.0

    def attend(self, q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
        """y_BNLD of this rank's tokens, in place of `causal_attention`. Collective, forward and backward. Of fake tensors, where
        only shapes are wanted, nothing is sent."""
        if isinstance(q_BNLD, FakeTensor):
            return causal_attention(q_BNLD, k_BKLD, v_BKLD)
        qkv, device = [q_BNLD, k_BKLD, v_BKLD], q_BNLD.device.type
        if torch.is_autocast_enabled(device):
            qkv = [one.to(torch.get_autocast_dtype(device)) for one in qkv]
        with torch.autocast(device, enabled=False):
            y_BNLD: Tensor = _RingAttention.apply(*qkv, self, torch.is_grad_enabled())
        return y_BNLD

    def blocks(self, kv: Tensor, label: str, turn_s: float = 0.0) -> Iterator[Tensor]:
        """`kv` and those of all other ranks, by turn. Each is on its way to the next rank before it is given."""
        for turns_left in reversed(range(self.group.size())):
            begun = time.perf_counter()
            arrived = self.pass_on(kv, label) if turns_left else None
            yield kv
            sleep_until(begun + turn_s)
            if arrived is not None:
                kv = arrived()

    def pass_on(self, x: Tensor, label: str) -> Callable[[], Tensor]:
        """Begin to send x, contiguous, to the next rank, and to receive the like from the rank before; what is returned waits
        for both and gives it. Collective; x stays as it is until then."""
        size, rank, clock = self.group.size(), self.group.rank(), clock_of(x.device)
        received = torch.empty_like(x)
        both = [
            dist.P2POp(dist.isend, x, group=self.group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=(rank - 1) % size),
        ]
        with self.ledger.label(label if label == EVALUATION else self.waits.label(label)):
            issued, total = clock.now(), None
            if not isinstance(self.group, MeteredGroup):
                total = self.ledger.enter("send", x.nbytes, Group(self.group.group_name, rank, size, AXIS))
            under_way = together(both)

        def arrived() -> Tensor:
            with self.waits.wait():
                for work in under_way:
                    work.wait()
            if total is not None:
                self.ledger.completed(total, clock, issued)
            return received

        return arrived


def pairs(turn: int, rank: int, length: int) -> tuple[slice, slice]:
    """Which of the `length` queries of a rank see which keys in a turn; in turn 0 causally."""
    everything, half = slice(length), length // 2
    if turn == 0:
        return everything, everything
    return (everything, slice(half)) if turn <= rank else (slice(half, length), everything)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, ring: Ring, trains: bool) -> Tensor:
        kept: list[Tensor] = []
        label, turn_s = (KEYS, ring.turn_s) if trains else (EVALUATION, 0.0)
        blocks = ring.blocks(torch.stack((k_BKLD, v_BKLD)), label, turn_s)
        y_BNLD, l_BNL = _attend(q_BNLD, next(blocks), causal=True)
        for turn, kv in enumerate(blocks, 1):
            rows, columns = pairs(turn, ring.group.rank(), q_BNLD.shape[2])
            more_y, more_l = _attend(q_BNLD[:, :, rows], kv[..., columns, :], causal=False)
            y, before = y_BNLD[:, :, rows], l_BNL[:, :, rows]
            both = torch.logaddexp(before, more_l)
            y.mul_((before - both).exp_()[..., None]).add_(more_y.mul_((more_l - both).exp_()[..., None]))
            before.copy_(both)
            if ring.keeps and trains:
                kept.append(kv)
        # as the model's own kernel lays it out: [B, L, N, D]
        y_BNLD = y_BNLD.to(q_BNLD.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q_BNLD, k_BKLD, v_BKLD, y_BNLD, l_BNL, *kept)
        ctx.ring = ring
        return y_BNLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return *_ring_backward(ctx.ring, gradients[0], *ctx.saved_tensors), None, None


def _ring_backward(ring: Ring, dy_BNLD: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype."""
    q_BNLD, k_BKLD, v_BKLD, y_BNLD, l_BNL, *kept = saved
    wide, own = l_BNL.dtype, torch.stack((k_BKLD, v_BKLD))
    d_BNL = (dy_BNLD.to(wide) * y_BNLD).sum(dim=-1)
    dq_BNLD, of_own = torch.zeros_like(q_BNLD, dtype=wide), torch.zeros_like(own, dtype=wide)
    # what is on its way meanwhile: the last sums, or the first keys and values
    turns: Iterable[tuple[int, Tensor]] = [*enumerate(kept, 1), (0, own)] if kept else enumerate(ring.blocks(own, KEYS))
    arrived: Callable[[], Tensor] | None = None
    for turn, kv in turns:
        begun = time.perf_counter()
        rows, columns = pairs(turn, ring.group.rank(), q_BNLD.shape[2])
        q, dy, log_sum, d = (one[:, :, rows] for one in (q_BNLD, dy_BNLD, l_BNL, d_BNL))
        dq, dkv = _attend_backward(q, dy, log_sum, d, kv[..., columns, :], causal=turn == 0)
        dq_BNLD[:, :, rows] += dq
        sleep_until(begun + BACKWARD_OVER_FORWARD * ring.turn_s)
        if turn == 0:
            of_own += dkv
            continue
        sums = torch.zeros_like(of_own) if arrived is None else arrived()
        sums[..., columns, :] += dkv
        arrived = ring.pass_on(sums, GRADIENTS)
    assert arrived is not None, "a ring has two ranks or more"
    dk_BKLD, dv_BKLD = of_own.add_(arrived()).to(own.dtype)
    return dq_BNLD.to(q_BNLD.dtype), dk_BKLD, dv_BKLD


def _attend(q_BNLD: Tensor, kv: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """y_BNLD and l_BNL over these keys alone, float32 or wider."""
    ys, ls = [], []
    for tile in _tiles(q_BNLD, kv, causal):
        most_BKT = tile.scores_BKTC.amax(dim=-1)
        p_BKTC = tile.scores_BKTC.sub_(most_BKT[..., None]).exp_()
        sum_BKT = p_BKTC.sum(dim=-1)
        ys.append(tile.unfolded((p_BKTC @ tile.v_BKCD).div_(sum_BKT[..., None])))
        ls.append(tile.unfolded(sum_BKT.log_().add_(most_BKT)))
    return torch.cat(ys, dim=2), torch.cat(ls, dim=2)


def _attend_backward(
    q_BNLD: Tensor, dy_BNLD: Tensor, l_BNL: Tensor, d_BNL: Tensor, kv: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """dq_BNLD and the gradient of kv, of these pairs alone, in the dtype of l."""
    dqs, dkv = [], torch.zeros(kv.shape, dtype=l_BNL.dtype, device=kv.device)
    for tile in _tiles(q_BNLD, kv, causal):
        columns = tile.k_BKCD.shape[2]
        dk_BKCD, dv_BKCD = dkv[..., :columns, :]
        dy_BKTD = tile.folded(dy_BNLD).to(l_BNL.dtype)
        p_BKTC = tile.scores_BKTC.sub_(tile.folded(l_BNL)[..., None]).exp_()
        dv_BKCD += p_BKTC.mT @ dy_BKTD
        ds_BKTC = (dy_BKTD @ tile.v_BKCD.mT).sub_(tile.folded(d_BNL)[..., None]).mul_(p_BKTC)
        dk_BKCD += ds_BKTC.mT @ tile.q_BKTD
        dqs.append(tile.unfolded((ds_BKTC @ tile.k_BKCD).mul_(tile.scale)))
    return torch.cat(dqs, dim=2), dkv


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Some rows of all heads, against the keys that they may see. The T of a head of keys are the rows of all its queries, in
    which q is scaled."""

    rows: slice
    scale: float
    q_BKTD: Tensor
    k_BKCD: Tensor
    v_BKCD: Tensor
    scores_BKTC: Tensor

    def folded(self, x_BNL: Tensor) -> Tensor:
        """These rows of x, [B, N, L, ..], by head of keys: [B, K, T, ..]."""
        return _folded(x_BNL[:, :, self.rows], self.k_BKCD.shape[1])

    def unfolded(self, x_BKT: Tensor) -> Tensor:
        """[B, K, T, ..] -> [B, N, rows, ..]."""
        return x_BKT.unflatten(2, (-1, self.rows.stop - self.rows.start)).flatten(1, 2)


def _tiles(q_BNLD: Tensor, kv: Tensor, causal: bool) -> Iterator[_Tile]:
    batch, heads, length, head_width = q_BNLD.shape
    wide = torch.promote_types(q_BNLD.dtype, torch.float32)
    k_BKLD, v_BKLD = kv.to(wide)
    at_once = max(1, TILE // (batch * heads * k_BKLD.shape[2]))
    for begin in range(0, length, at_once):
        end = min(begin + at_once, length)
        columns = end if causal else k_BKLD.shape[2]
        scale = head_width**-0.5
        q_BKTD = _folded(q_BNLD[:, :, begin:end], k_BKLD.shape[1]).to(wide) * scale
        scores_BKTC = q_BKTD @ k_BKLD[:, :, :columns].mT
        if causal:
            hidden = torch.ones(end - begin, columns, dtype=torch.bool, device=kv.device).triu(begin + 1)
            scores_BKTC.unflatten(2, (-1, end - begin)).masked_fill_(hidden, -torch.inf)
        yield _Tile(
            rows=slice(begin, end),
            scale=scale,
            q_BKTD=q_BKTD,
            k_BKCD=k_BKLD[:, :, :columns],
            v_BKCD=v_BKLD[:, :, :columns],
            scores_BKTC=scores_BKTC,
        )


def _folded(x_BNT: Tensor, kv_heads: int) -> Tensor:
    return x_BNT.unflatten(1, (kv_heads, -1)).flatten(2, 3)
