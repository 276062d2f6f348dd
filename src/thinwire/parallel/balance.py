"""Where to cut a chain of units into stages, so that the slowest stage is as fast as can be. No torch.

With c_u the cost of unit u, r_s the rate of the rank that has stage s, b_u what crosses behind unit u and l_s the seconds that
one byte takes from stage s to the next, a stage that holds the units i..j is busy for

    t_s(i, j) = max(sum of c_i..c_j / r_s, b_j l_s)

since its sends run beside its compute. In the steady state a pipeline is as fast as its slowest stage, so the largest t_s is made
smallest, exactly, by dynamic programming over (stages, units); of equal ones the cut with the least sum over what crosses:

    T(s, j) = min over i of max(T(s - 1, i - 1), t_s(i, j))

PipeDream's partition (Narayanan et al. 2019) without replication.
"""

from collections.abc import Sequence
from itertools import accumulate

from thinwire.config.compress import Coded, NoCompression
from thinwire.errors import UserError
from thinwire.layout import Layout

V_SHAPED = ("zbv", "dualpipev")
"""Schedules in which the stages run down the ranks and up again."""


def stages_of(schedule: str, ranks: int, per_rank: int, rank: int) -> list[int]:
    """The stages that a rank has, first ones first."""
    if schedule in V_SHAPED:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * turn for turn in range(per_rank)]


def in_flight(schedule: str, ranks: int, per_rank: int, rank: int, num_micro: int) -> int:
    """Passes forward of which a rank holds the activations at the most: one is of one micro-batch through one stage.

    1f1b, interleaved: Narayanan et al. 2021, section 2.2; zb1p: as 1f1b; zbv, dualpipev: two for each rank.
    """
    everything = num_micro * per_rank
    if schedule == "gpipe":
        return everything
    if schedule in V_SHAPED:
        return min(everything, 2 * ranks)
    warm = 2 * (ranks - rank - 1) + (per_rank - 1) * ranks if per_rank > 1 else ranks - rank - 1
    return min(everything, warm + 1)


def cut(
    costs: Sequence[float],
    stages: int,
    rates: Sequence[float] | None = None,
    crossing_bytes: Sequence[float] | None = None,
    seconds_per_byte: Sequence[float] | None = None,
) -> list[range]:
    """The units of each stage. rates: by stage; crossing_bytes: behind each unit; seconds_per_byte: behind all stages but one.

    UserError for more stages than units.
    """
    units = len(costs)
    if not 1 <= stages <= units:
        raise UserError(f"{stages} stages cannot be made of {units} units, of which each has at least one; take at most {units}")
    rates = rates or (1.0,) * stages
    crossing = crossing_bytes or (0.0,) * units
    per_byte = (*(seconds_per_byte or (0.0,) * (stages - 1)), 0.0)
    before = [0.0, *accumulate(costs)]
    # best[j]: (slowest stage, sum of what crosses, cuts) of the first s stages over the first j units
    best: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ())] + [None] * units
    for stage in range(stages):
        following: list[tuple[float, float, tuple[int, ...]] | None] = [None] * (units + 1)
        for end in range(stage + 1, units - (stages - stage - 1) + 1):
            crosses = crossing[end - 1] * per_byte[stage]
            found = [
                (max(so_far[0], (before[end] - before[begin]) / rates[stage], crosses), so_far[1] + crosses, (*so_far[2], end))
                for begin in range(stage, end)
                if (so_far := best[begin]) is not None
            ]
            following[end] = min(found, key=lambda one: one[:2]) if found else None
        best = following
    chosen = best[units]
    assert chosen is not None, "each stage has a unit"
    return [range(begin, end) for begin, end in zip((0, *chosen[2]), chosen[2], strict=False)]


def shares_tied(compress: NoCompression | Coded, layout: Layout) -> bool:
    """Whether the last stage takes over the first one's average of a tied embedding. UserError where it could not."""
    if _averages_apart(compress, layout.outer):
        raise UserError(
            f"model.tied = true: the first and the last stage of layout.pipe = {layout.pipe} share the embedding, which "
            f"layout.outer = {layout.outer} replicas that exchange rarely would average in two ways; set model.tied = false"
        )
    apart = _averages_apart(compress, layout.of_gradients.dense)
    if apart and layout.shard > 1:
        raise UserError(
            f"model.tied = true: the first and the last stage of layout.pipe = {layout.pipe} share the embedding, of which the "
            f"shards of layout.data = {layout.data} replicas would be averaged in two ways; set model.tied = false"
        )
    return apart


def _averages_apart(compress: NoCompression | Coded, replicas: int) -> bool:
    """Whether replicas of the first stage and those of the last may come to different averages of the embedding."""
    coded = isinstance(compress, Coded) and compress.is_coded("embed.weight", (1, 1))
    return replicas > 2 or (replicas > 1 and coded)
