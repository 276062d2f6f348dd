"""Bytes that a rank needs to train, beside the program itself: what it keeps from step to step, and the most that comes and goes.

    weights      of model.dtype
    gradients    as much, in the buckets of DistributedDataParallel; twice while it forms them, before the optimizer has a state;
                 of the largest parameter only where updates are "early"
    optimizer    two values a parameter for adamw, one for sgd and muon; two bytes and a little where adamw's states are "8bit"
    copies       of activations of samples that return (`pipeline.copies`), for either side of a boundary that a rank has
    exchange     residuals of codes, and of rare kinds the anchor and the outer momentum, in float32 or wider
    passing      the larger of activations, at the loss, and of what is under way in the rest of a step
    checkpoint   a copy of the state while it is written: of what differs on each rank, of what is alike on one a host and part

Activations, per token, with a bytes a value of the residual stream and c of products (2 under autocast), M width, N heads of D,
K of keys, F hidden, V vocabulary, as autograd keeps them (`models.transformer`):

    norm       a M (layer), 2 max(a, 4) M (rms), and c M for what comes out
    attention  c (N + 2 K) D + c (N + K) D if rotary + c M + 4 N
    mlp        c (2 F + 2 F) for swiglu, c (F + F) for gelu
    loss       3 max(a, 4) V, and c V if c < 4, while its gradient is formed
    experts    s mlp + c (s + k - 1) M + max(a, 4) M + (max(a, 4) + 8) E: s slots a token of all E, of which k are chosen
    block      2 norm + attention + mlp (or experts);   a M if it is computed again in full, 2 norm if selectively
               (`parallel.recompute`)

What train.on_host names is not on a device but in pieces: of the optimizer's state two of PIECE_BYTES parameters, of activations
what one block keeps.

The first blocks of a rank are computed again: going backward, what the others keep is gone by then, and in its place comes what
one of them keeps otherwise. Where train.recompute is a number of bytes, each rank of a pipeline has so many of either kind that

    sum over kinds of blocks * operations that one of them repeats        is least, and the rank needs no more than that,

found by trying all numbers; blocks are alike, so that is exact. Ranks of one stage that need different amounts choose together.

Ranks of a pipeline hold the activations of as many micro-batches as the schedule has under way (`parallel.balance.in_flight`).

One of s ranks that share the states keeps the s-th part of weights, gradients and the optimizer's. Gathered are beside them the
root and three blocks, or all (`sharded.reshard = "never"`, or of a pipeline's stages), and whole gradients of as many, or of all
where micro-batches are added up first; codes owe a byte a value; under way is the largest unit (`plan.sharded`).

One of e expert ranks has the e-th part of experts, and as many slots. A tensor rank has its heads N and K and its hidden values
F of attention and mlp, and its words V. One of s ranks that share sequences has the s-th part of tokens, and keeps of each of
them 2 c (s - 1) K D keys and values that came from the others. Under autocast a copy of all matrices in 2 bytes a value goes
along. What blocks keep comes and goes in pieces of some MiB, among which the allocator loses room.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from thinwire.config.compress import Coded, NoCompression
from thinwire.config.model import ModelConfig
from thinwire.config.optimizer import EIGHT_BIT, state_of
from thinwire.config.pipeline import PipelineSection
from thinwire.config.run import RunConfig
from thinwire.config.sync import Auto, EveryStep, NoLoCo, Retrace, SparseLoCo, Streaming
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.parallel.balance import cut, in_flight, stages_of
from thinwire.parallel.tensor_parts import local_workload
from thinwire.plan.sharded import gathered_bytes
from thinwire.units import show
from thinwire.workload import ITEM_BYTES, Workload

PIECE_BYTES = 64 * 2**20
"""Of parameters whose state is on a device at once where it lies on the host; of the next ones it is under way meanwhile."""
ALLOCATOR = 1.25
"""Room that glibc takes for what blocks keep: 1.1 to 1.4, measured."""
CODED_AT_ONCE = {"bf16": 1.0, "fp16": 1.0, "dgc": 3.5, "demo": 3.5}
USUAL_AT_ONCE = 2.5
"""Vectors of the model's size that are held while codes are under way, measured: of all buckets, for which a slow wire waits."""


SPLIT = (("attention.qkv", 0), ("attention.out", 1), ("mlp.up", 0), ("mlp.down", 1))
"""Matrices of a block, and along which dim a tensor rank has less."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """See the top of the file; in bytes. copied_bytes: of a checkpoint, on each rank; copied_once_bytes: on one rank a host for
    each of the model's `parts` there. recomputed: how many blocks are."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    exchange_bytes: int
    activations_bytes: int
    under_way_bytes: int
    copied_bytes: int
    copied_once_bytes: int
    parts: int = 1
    recomputed: str = ""
    copies_bytes: int = 0

    @property
    def training_bytes(self) -> int:
        """The most at once, without checkpoints."""
        kept = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.exchange_bytes + self.copies_bytes
        return kept + max(self.activations_bytes, self.under_way_bytes)

    @property
    def rank_bytes(self) -> int:
        """Of the rank that writes what is alike."""
        return self.training_bytes + self.copied_bytes + self.copied_once_bytes

    def host_bytes(self, ranks: int) -> int:
        """Of so many ranks on one host."""
        return ranks * (self.training_bytes + self.copied_bytes) + min(ranks, self.parts) * self.copied_once_bytes

    def terms(self) -> str:
        """ "weights 476 MiB, gradients .." """
        passing = "activations" if self.activations_bytes >= self.under_way_bytes else "exchange under way"
        named = {
            "weights": self.weights_bytes,
            "gradients": self.gradients_bytes,
            "optimizer": self.optimizer_bytes,
            "exchange": self.exchange_bytes,
            "copies": self.copies_bytes,
            passing: max(self.activations_bytes, self.under_way_bytes),
            "checkpoint": self.copied_bytes + self.copied_once_bytes,
        }
        return ", ".join(f"{name} {show(size, 'B')}" for name, size in named.items() if size)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Of a rank: how many keep all, and how many are computed again, either way. held: micro-batches whose activations it has."""

    plain: int
    selective: int = 0
    full: int = 0
    held: float = 1.0


def need(config: RunConfig, shape: ModelConfig, layout: Layout, *, casts: bool, on_device: bool = False) -> Need:
    """Of the rank of a replica that needs most. shape: of the model, with the vocabulary that it gets; casts: whether autocast
    multiplies in bfloat16.

    on_device: in memory of a device, which is not the host's.
    """
    stages = _by_stage(config, shape, layout, casts=casts, on_device=on_device)
    return max((one for _, needs in stages for one in needs), key=lambda one: one.rank_bytes)


def recomputed_blocks(
    config: RunConfig, shape: ModelConfig, layout: Layout, *, casts: bool, on_device: bool = False
) -> dict[str, str]:
    """Blocks that are computed again in the backward pass, "selective" or "full" by name, on any rank; as for `need`."""
    if isinstance(kind := config.train.recompute, str):
        return {} if kind == "none" else {f"blocks.{index}": kind for index in range(shape.layers)}
    stages = _by_stage(config, shape, layout, casts=casts, on_device=on_device)
    return {name: again for kinds, _ in stages for name, again in kinds.items()}


def _by_stage(
    config: RunConfig, shape: ModelConfig, layout: Layout, *, casts: bool, on_device: bool
) -> list[tuple[dict[str, str], list[Need]]]:
    """Of each rank of a pipeline: which blocks it computes again, and what each tensor rank needs there."""
    found, elsewhere = [], on_device and "activations" in config.train.on_host
    sizes = config.train.micro_batch, config.train.sequence, config.sync.accumulate
    windows = 0 if config.pipeline.copies == "none" else config.data.windows // layout.replicas
    copied_bytes = windows * 2 * (config.train.sequence // layout.seq) * -(-shape.width // layout.tensor)
    for pieces in _pieces(config.pipeline, shape, layout, *sizes):
        bare = [_need(config, piece, layout.of_gradients, on_device=on_device) for piece in pieces]
        names = pieces[0].mine.block_names

        def needs(
            selective: int, full: int, bare: list[Need] = bare, pieces: list[_Piece] = pieces, count: int = len(names)
        ) -> list[Need]:
            plain = count - selective - full
            blocks = Blocks(plain=min(1, plain) if elsewhere else plain, selective=selective, full=full, held=pieces[0].held)
            again = f"{full} full, {selective} selective of {count} blocks" if full or selective else ""
            return [
                replace(
                    one,
                    activations_bytes=piece.crossing_bytes
                    + activations_bytes(shape, piece.workload, casts=casts, blocks=blocks, loss=piece.loss, seq=layout.seq),
                    recomputed=again,
                    copies_bytes=piece.ends * copied_bytes,
                    copied_bytes=one.copied_bytes + piece.ends * copied_bytes,
                )
                for one, piece in zip(bare, pieces, strict=True)
            ]

        selective, full = _fewest(config.train.recompute, pieces[0].mine, needs)
        kinds = dict.fromkeys(names[:full], "full") | dict.fromkeys(names[full : full + selective], "selective")
        found.append((kinds, needs(selective, full)))
    return found


def _fewest(setting: str | float, workload: Workload, needs: Callable[[int, int], list[Need]]) -> tuple[int, int]:
    """How many blocks of a rank are computed again selectively, and in full. needs: by these numbers."""
    count = len(workload.block_names)
    if isinstance(setting, str):
        return (count if setting == "selective" else 0), (count if setting == "full" else 0)

    def most_bytes(selective: int, full: int) -> int:
        return max(one.rank_bytes for one in needs(selective, full))

    some = workload.block_names[0] if count else ""
    flops_s, flops_f = (workload.recomputing({some: kind}).recomputed_flops_per_token for kind in ("selective", "full"))
    found: list[tuple[float, int, int]] = []
    for full in range(count + 1):
        if found and full * flops_f >= min(found)[0]:
            break
        fitting = (selective for selective in range(count - full + 1) if most_bytes(selective, full) <= setting)
        if (selective := next(fitting, None)) is not None:
            found.append((selective * flops_s + full * flops_f, selective, full))
    if not found:
        least = min(most_bytes(*numbers) for numbers in ((0, count), (min(count, 1), max(0, count - 1))))
        raise UserError(
            f"train.recompute = {show(setting, 'B')}: a rank needs about {show(least, 'B')} even when it computes its {count} "
            "blocks again; give it as much, or take a smaller train.micro_batch or train.sequence"
        )
    return min(found)[1:]


def _need(config: RunConfig, piece: "_Piece", layout: Layout, *, on_device: bool) -> Need:
    """Of a rank, without activations. layout: as who averages gradients sees it."""
    if layout.shard > 1:
        return _need_sharded(config, piece, layout, on_device=on_device)
    workload = piece.mine
    weights = workload.stored_bytes
    optimizer = workload.optimizer_bytes(state_of(config.train.optimizer))
    exchange, under_way = _exchange(config, workload, layout, on_device)
    buckets = layout.data > 1 or isinstance(config.sync, EveryStep)
    largest = max(parameter.stored_bytes for parameter in workload.parameters)
    copies = 2 if state_of(config.train.optimizer) == EIGHT_BIT else 1  # of what is decoded for a checkpoint
    state = weights + copies * workload.optimizer_bytes(config.train.optimizer.kind)
    gradients = max(weights, 2 * weights - optimizer - exchange) if buckets and layout.pipe * layout.expert == 1 else weights
    if config.train.updates == "early":
        gradients = largest
    if on_device and "optimizer" in config.train.on_host:
        optimizer = min(optimizer, 2 * PIECE_BYTES * max(1, optimizer // max(1, weights)))
    return Need(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        exchange_bytes=exchange,
        activations_bytes=0,
        under_way_bytes=max(under_way, 2 * largest),
        copied_bytes=exchange + (state if config.sync.rare else 0),
        copied_once_bytes=state,
        parts=layout.pipe * layout.tensor * layout.expert,
    )


def _need_sharded(config: RunConfig, piece: "_Piece", layout: Layout, *, on_device: bool) -> Need:
    """Of a rank that has a shard of these parameters."""
    own = _need(config, replace(piece, mine=piece.shard), replace(layout, shard=1), on_device=on_device)
    workload = piece.mine
    always = config.sharded.reshard == "always" and layout.pipe == 1
    whole, (some, passing) = workload.stored_bytes, gathered_bytes(workload, on_device=on_device)
    return replace(
        own,
        weights_bytes=own.weights_bytes + (some if always else whole),
        gradients_bytes=own.weights_bytes + (some if always and config.sync.accumulate == 1 else whole),
        exchange_bytes=own.exchange_bytes + (0 if config.sharded.gradients == "none" else workload.num_parameters),
        under_way_bytes=max(own.under_way_bytes, passing),
        parts=own.parts * layout.shard,
    )


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """workload: of all blocks; mine: of what the rank has of them; shard: of its part of that, where ranks share it; held:
    micro-batches under way; loss: whether it has the head; crossing_bytes: at boundaries; ends: how many of them it has."""

    workload: Workload
    mine: Workload
    shard: Workload
    held: float = 1.0
    loss: bool = True
    crossing_bytes: int = 0
    ends: int = 0


@lru_cache(maxsize=1024)
def _pieces(
    options: PipelineSection, shape: ModelConfig, layout: Layout, micro_batch: int, sequence: int, num_micro: int
) -> list[list[_Piece]]:
    """What each rank of a pipeline has of the model, of equal ranks, when it holds most activations; of each its tensor ranks.

    A boundary has a buffer for each micro-batch, of what arrives and of the gradient that comes back.
    """
    whole = Workload.of_transformer(shape, micro_batch, sequence)
    workloads = [local_workload(whole, shape, layout.tensor, rank, layout.seq) for rank in range(layout.tensor)]
    if layout.expert > 1:
        workloads = [one.of_expert_rank(shape.experts, layout.expert, 0) for one in workloads]
    if layout.pipe == 1:
        return [[_Piece(workload=one, mine=one, shard=_shard(one, layout.shard)) for one in workloads]]
    stages = cut(whole.chain_flops_per_token, layout.pipe * options.per_rank)
    names = [
        ("embed", "positions"),
        *((f"{block}.",) for block in whole.block_names),
        ("norm", "embed" if shape.tied else "head"),
    ]
    places = [stages_of(options.schedule, layout.pipe, options.per_rank, rank) for rank in range(layout.pipe)]
    rank_of = {stage: rank for rank, mine in enumerate(places) for stage in mine}
    found = []
    for rank, own_stages in enumerate(places):
        units = [unit for stage in own_stages for unit in stages[stage]]
        ends = sum(rank_of.get(other, rank) != rank for stage in own_stages for other in (stage - 1, stage + 1))
        prefixes = tuple(prefix for unit in units for prefix in names[unit])
        held = in_flight(options.schedule, layout.pipe, options.per_rank, rank, num_micro) / options.per_rank
        pieces = []
        for one in workloads:
            own = {parameter.name for parameter in one.parameters if parameter.name.startswith(prefixes)}
            mine = one.part(own, sum(one.chain_flops_per_token[unit] for unit in units))
            crossing = one.tokens_per_microbatch * -(-shape.width // layout.tensor) * ITEM_BYTES[shape.dtype]
            pieces.append(
                _Piece(
                    workload=one,
                    mine=mine,
                    shard=_shard(mine, layout.shard),
                    held=held,
                    loss=len(names) - 1 in units,
                    crossing_bytes=2 * options.per_rank * num_micro * crossing,
                    ends=ends,
                )
            )
        found.append(pieces)
    return found


def _shard(workload: Workload, degree: int) -> Workload:
    """The largest of so many parts of the rows of each parameter."""
    if degree == 1:
        return workload
    rows = (replace(one, shape=(-(-one.shape[0] // degree), *one.shape[1:])) for one in workload.parameters)
    return replace(workload, parameters=tuple(rows))


def activations_bytes(
    shape: ModelConfig, workload: Workload, *, casts: bool, blocks: Blocks | None = None, loss: bool = True, seq: int = 1
) -> int:
    """The most of a rank with `blocks`, None: all, none computed again. shape: of the model; workload: of it, or of a rank's part
    of all blocks, one of `seq` ranks that share sequences. loss: with it."""
    blocks = blocks or Blocks(plain=shape.layers)
    kept = ITEM_BYTES[shape.dtype]
    wide, product = max(kept, 4), 2 if casts else kept
    norm = shape.width * (product + (2 * wide if shape.norm == "rms" else kept))
    names = ((name.replace("mlp.", "mlp.experts.0.") if shape.experts else name, dim) for name, dim in SPLIT)
    qkv, queries, up, hidden = (workload.parameter(f"blocks.0.{name}.weight").shape[dim] for name, dim in names)
    rotated = (qkv + queries) // 2 if shape.positions == "rotary" else 0
    arrived = (seq - 1) * (qkv - queries)
    attention = product * (qkv + rotated + queries + arrived) + 4 * queries // shape.head_width
    mlp: float = product * (up + hidden * (2 if shape.mlp == "swiglu" else 1))
    words = workload.parameter("embed.weight").shape[0]
    at_loss = norm + words * (3 * wide + (product if product < 4 else 0)) if loss else 0
    backward: float = product * (up + 2 * hidden)
    if shape.experts:
        slots = shape.experts * shape.expert_slots(shape.context) / shape.context
        mlp = slots * mlp + product * (slots + shape.experts_per_token - 1) * shape.width
        mlp += wide * shape.width + (wide + 8) * shape.experts
        backward *= slots
    plain, entering = 2 * norm + attention + mlp, kept * shape.width
    kept_bytes = blocks.held * (blocks.plain * plain + blocks.selective * 2 * norm + blocks.full * entering)
    moments: list[tuple[float, float]] = [
        (0.0, max(at_loss, norm + backward))
    ]  # what is gone of this micro-batch, and what has come
    if blocks.selective:
        moments.append((blocks.plain * plain, ALLOCATOR * max(attention, mlp) + norm + backward))
    if blocks.full:
        gone = blocks.plain * plain + blocks.selective * 2 * norm
        moments.append((gone, ALLOCATOR * (plain - entering) + norm + backward))
    most = max(ALLOCATOR * (kept_bytes - gone) + come for gone, come in moments)
    matrices = sum(parameter.numel for parameter in workload.parameters if len(parameter.shape) == 2)
    return int(workload.tokens_per_microbatch * most) + (2 * matrices if casts else 0)


def _exchange(config: RunConfig, workload: Workload, layout: Layout, on_device: bool) -> tuple[int, int]:
    """What [sync] and [compress] keep, and what is under way at once, with what a device gets of the host for that long."""
    sync, wide = config.sync, sum(ITEM_BYTES[one.wide_dtype] * one.numel for one in workload.parameters)
    if layout.replicas == 1:
        return 0, 0
    residuals = _residual_bytes(config.compress, workload)
    coding = CODED_AT_ONCE.get(config.compress.kind, USUAL_AT_ONCE) if isinstance(config.compress, Coded) else 0.0
    if isinstance(sync, EveryStep | Auto):
        return residuals, int(coding * wide)
    if isinstance(sync, Retrace):  # where periods began, with the optimizer's state, and gradients since
        begun = workload.stored_bytes + workload.optimizer_bytes(config.train.optimizer.kind)
        return begun + wide + residuals, int((2 + coding) * wide / sync.every)
    elsewhere = on_device and sync.outer_device == "host"
    if isinstance(sync, NoLoCo):
        return (0, 5 * wide) if elsewhere else (2 * wide, 3 * wide)
    part = wide
    if isinstance(sync, Streaming):
        part = wide // max(1, len(workload.block_names) // sync.layers_per_fragment)
    momentum = 0 if isinstance(sync, SparseLoCo) or not getattr(sync, "outer_momentum", 0) else wide
    if elsewhere:
        return residuals, int((2 + coding) * part) + (2 if momentum else 1) * part
    return wide + momentum + residuals, int((2 + coding) * part)


def _residual_bytes(compress: NoCompression | Coded, workload: Workload) -> int:
    if isinstance(compress, NoCompression):
        return 0
    vectors = 2 if compress.kind == "dgc" else 1 if compress.feeds_back else 0
    size = 1 if compress.feedback_storage == "int8" else 4
    coded = (one for one in workload.parameters if compress.is_coded(one.name, one.shape))
    return vectors * sum(one.numel * (8 if one.dtype == "float64" else size) for one in coded)
