"""`sync.kind = "auto"`: of the measured front (`sync.front`) the way to exchange that gets soonest to a loss on these links.

    least of   seconds of a step * steps over those of data parallelism        of ways in each step, in two sizes of buckets

The seconds are the cost model's on the cluster (`plan.cost`), a mean over the run where H rises; the steps are the front's,
carried to this model, its replicas and its number of steps (`Way.times`). No model's steps are known to better than `ALIKE`: of
ways that are as soon as the best but for this, the one that sends most is taken, since what it leaves out is least. Ways that the
layout or the optimizer of the run cannot have do not count. R, which is said beside the choice:

    R = seconds of the exchange of data parallelism in float32 / seconds of computing
"""

from dataclasses import dataclass, replace

from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.plan.candidates import Problem
from thinwire.plan.cost import Prediction, predict
from thinwire.sync.front import Way, ways
from thinwire.tomlfile import validate
from thinwire.traffic import EVALUATION
from thinwire.units import show

BUCKETS_BYTES = (0, 2**17)
"""That ways of each step are tried with: PyTorch's, and small ones, of which more hides under the backward pass."""

ALIKE = 1.03
"""Times that differ by less are as good: seeds move the steps of a row by as much."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """config: of the run; step_s: predicted; times: as many steps as data parallelism to the same loss."""

    way: Way
    config: RunConfig
    step_s: float
    times: float

    @property
    def time_s(self) -> float:
        """For a step of data parallelism."""
        return self.step_s * self.times


def choices(problem: Problem) -> list[Choice]:
    """All ways that the run may have: those about as soon as the best by the bytes that they send, the most first; then by time.

    UserError if there is none."""
    found, config, reason = list[Choice](), problem.config, ""
    tokens = config.train.micro_batch * config.train.sequence * config.sync.accumulate
    for way in ways():
        if way.optimizer not in ("", config.train.optimizer.kind):
            continue
        if not way.feeds_back and not config.task.is_language_model:  # how noisy gradients are there was not measured
            continue
        for bucket_bytes in (0,) if way.every else BUCKETS_BYTES:
            try:
                changed = with_way(config, way, bucket_bytes)
                replicas = changed.laid_out(problem.cluster.world_size).of_gradients.replicas
                step_s = _mean_step_s(changed, problem)
            except UserError as error:
                reason = reason or str(error)
                continue
            times = way.times(problem.parameters, replicas, config.train.steps, tokens=tokens)
            found.append(Choice(way=way, config=changed, step_s=step_s, times=times))
    if not found:
        raise UserError(f"sync.kind = 'auto': this run can have no way of the measured front; {reason}")
    found.sort(key=lambda one: one.time_s)
    near = [one for one in found if one.time_s <= ALIKE * found[0].time_s]
    return sorted(near, key=lambda one: -one.way.wire_bytes_per_token) + found[len(near) :]


def with_way(config: RunConfig, way: Way, bucket_bytes: int = 0) -> RunConfig:
    """The run with what a row of the front has for it, in buckets of this size (0: PyTorch's); micro-batches, layout, steps and
    optimizer stay. UserError if that cannot be."""
    content = config.model_dump(mode="json", exclude_none=True)
    sync = {"accumulate": config.sync.accumulate, **way.run["sync"]} | ({"bucket_bytes": bucket_bytes} if bucket_bytes else {})
    content |= {"sync": sync, "compress": way.run["compress"]}
    content["train"]["learning_rate"] = config.train.learning_rate * way.learning_rate_percent / 100
    return validate(RunConfig, content, f"sync.kind = 'auto', {way.method}")


def about(found: list[Choice], problem: Problem) -> str:
    """What was chosen and why, in one line."""
    best, plain = found[0], next((one for one in found if one.way.method == "ddp"), None)
    buckets = f" in buckets of {show(best.config.sync.bucket_bytes, 'B')}" if best.config.sync.bucket_bytes else ""
    way, seconds = f"{best.way.method}{buckets}", show(best.step_s, "s")
    chosen = f"sync: {way}, {seconds} a step and {best.times:.2f} times the steps of data parallelism"
    if plain is None:  # replicas of a layout that may only exchange rarely
        return f"{chosen}, predicted"
    prediction = _predicted(plain.config, problem)
    exchange_s = sum(
        one.seconds
        for one in prediction.transfers
        if one.transfer.axis != "pipe" and not one.transfer.in_passes and one.transfer.label != EVALUATION
    )
    computing_s = prediction.compute_s + prediction.waiting_s
    return (
        f"{chosen}, whose step is {show(plain.step_s, 's')}: R = {exchange_s / computing_s:.3g}, an exchange of "
        f"{show(exchange_s, 's')} beside {show(computing_s, 's')} of computing, predicted"
    )


def _mean_step_s(config: RunConfig, problem: Problem) -> float:
    phases = [(steps, sync) for steps, sync in config.sync.phases(config.train.steps) if steps]
    each = [(steps, _predicted(config.model_copy(update={"sync": sync}), problem).step_s) for steps, sync in phases]
    return sum(steps * seconds for steps, seconds in each) / config.train.steps


def _predicted(config: RunConfig, problem: Problem) -> Prediction:
    assert problem.rates is not None and problem.outline is not None, "`auto` has seen to it"
    layout = config.laid_out(problem.cluster.world_size)
    setting, transfers, carrier = problem.outline(config, problem.shape, layout, problem.cluster, problem.rates)
    return predict(replace(setting, ranks_per_core=problem.ranks_per_core), transfers, carrier=carrier, routes=problem.routes)
