"""How an exchange is made, by which buffers of gradients become their average over the replicas.

An option of [compress] that the kind would not use is refused, in one line, before anything runs:

exclude, vectors, after_steps    all kinds; powersgd takes matrices only, so no vectors
exchange                         codes that are not summed, of flat vectors
feedback                         all but the casts, whose error nobody knows, and dgc, which keeps a momentum instead
precondition                     codes with a scale a block, where an optimizer's second moments are known
feedback_*                       where there is feedback; what is removed in part (demo) is no moving average
others                           as the codec's own signature says (`base.build`)
"""

from collections.abc import Callable, Mapping

import torch

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Averager
from thinwire.compress.base import CODECS, TENSOR_CODECS, Flat, build, make_codec
from thinwire.compress.codecs.fused import fused_or_reason
from thinwire.compress.coded import CodedExchange
from thinwire.compress.dgc import MomentumCorrection
from thinwire.compress.gather import Gather
from thinwire.compress.memory import DEMO, ErrorFeedback, Memory, NoMemory
from thinwire.compress.plain import Cast, PlainExchange
from thinwire.compress.precondition import Preconditioned
from thinwire.compress.stages import Stages, make_stages
from thinwire.compress.twoshot import TwoShot
from thinwire.config.compress import BLOCKED, SUMMABLE, Coded, NoCompression, NonFinite
from thinwire.errors import UserError

Exchange = PlainExchange | CodedExchange
"""One per rank. Calls come in the same order on every rank; `CodedExchange` says what each does."""

AVERAGERS: Mapping[str, str] = {
    "dgc": "thinwire.compress.dgc:DGC",
    "powersgd": "thinwire.compress.powersgd:PowerSGD",
    "randomk": "thinwire.compress.randomk:RandomK",
}
"""Kinds that are more than a codec: they talk to the other ranks while they code."""
FEEDBACK = ("feedback_decay", "feedback_average", "feedback_reset", "feedback_removal", "feedback_storage")


def make_exchange(
    config: NoCompression | Coded,
    ledger: Ledger,
    nonfinite: NonFinite = "raise",
    stages: Callable[[torch.device], Stages] = make_stages,
    *,
    moments: bool = False,
) -> Exchange:
    """The exchange that [compress] asks for. UserError for options that do not fit its kind.

    nonfinite: whether a gradient that is not finite ends the run, on all ranks, or arrives so, as without compression. stages:
    what runs those of an exchange with codes on the device of the parameters. moments: whether `attach` will get the optimizer's.
    """
    if isinstance(config, NoCompression):
        return PlainExchange(ledger)
    if config.fused and (reason := fused_or_reason()):
        raise UserError(f"compress.fused = true: {reason}; leave it out, the bits are the same")
    check_options(config, moments=moments)
    memory = make_memory(config)
    if moments and config.preconditions:
        memory = Preconditioned(memory)
    return CodedExchange(make_averagers(config, memory, ledger), memory, config, ledger, nonfinite, stages)


def make_averagers(config: Coded, memory: Memory, ledger: Ledger) -> list[Averager]:
    """Those among which an exchange of this kind chooses by bytes."""
    if config.kind == "dgc":
        config = config.model_copy(update={"momentum": None})  # the memory's
    if config.finer:
        coarse = make_averagers(config.model_copy(update={"exclude": ()}), memory, ledger)
        for one in coarse:
            one.leaves = config.finer
        fine = make_averagers(Coded(kind="int8", exchange=config.exchange, fused=config.fused), memory, ledger)
        for one in fine if config.kind != "powersgd" else ():  # which leaves small matrices too
            one.only = config.finer
        return [*coarse, *fine]
    if config.kind in AVERAGERS:
        return [build(AVERAGERS[config.kind], config, memory, ledger)]
    if config.kind in TENSOR_CODECS:
        return [Gather(build(TENSOR_CODECS[config.kind], config), memory, ledger)]
    codec = make_codec(config)
    assert codec is not None, "only NoCompression has none"
    if config.kind in SUMMABLE:
        return [Cast(codec, ledger)]
    both: dict[str, Averager] = {"gather": Gather(Flat(codec), memory, ledger), "two-shot": TwoShot(codec, memory, ledger)}
    return list(both.values()) if config.exchange == "auto" else [both[config.exchange]]


def make_memory(config: Coded) -> Memory:
    """What the kind needs by itself (DeMo's momentum), or what `feedback` asks for."""
    if config.kind == "dgc":
        momentum = {} if config.momentum is None else {"momentum": config.momentum}
        return MomentumCorrection(storage=config.feedback_storage or "float32", **momentum)
    if not config.feeds_back:
        return NoMemory()
    usual = DEMO if config.kind == "demo" else ErrorFeedback()
    return ErrorFeedback(
        decay=usual.decay if config.feedback_decay is None else config.feedback_decay,
        average=config.feedback_average or 1.0,
        reset_steps=config.feedback_reset or 0,
        removal=usual.removal if config.feedback_removal is None else config.feedback_removal,
        storage=config.feedback_storage or "float32",
    )


def check_options(config: Coded, *, moments: bool = False) -> None:
    """UserError for the first option that was given and that `config.kind` would not use. moments: see `make_exchange`."""
    kind = config.kind

    def refuse(option: str, why: str) -> None:
        raise UserError(f"compress.{option} = {getattr(config, option)!r}: {why}; leave it out")

    if config.exchange != "auto" and kind not in CODECS.keys() - SUMMABLE:
        refuse("exchange", f"{kind} is averaged by one method only")
    if config.precondition and kind not in BLOCKED:
        refuse("precondition", f"{kind} has no scale for each block")
    if config.precondition and not moments:
        refuse("precondition", "no optimizer's second moments are known here; they are of gradients averaged in each step")
    if config.vectors and kind == "powersgd":
        refuse("vectors", "powersgd takes matrices only")
    given = [option for option in FEEDBACK if getattr(config, option) is not None]
    if kind in SUMMABLE:
        if config.feedback:
            refuse("feedback", f"the error of {kind} is summed up in the all-reduce, and nobody knows it")
        if given:
            refuse(given[0], f"{kind} has no feedback")
    elif kind == "dgc":
        if unused := [option for option in ("feedback", *FEEDBACK[:-1]) if getattr(config, option) is not None]:
            refuse(unused[0], "dgc keeps a momentum instead")
    else:
        if not config.feeds_back and given:
            refuse(given[0], "feedback is false")
        removal = config.feedback_removal or (DEMO.removal if kind == "demo" else 1.0)
        if config.feedback_average not in (None, 1.0) and removal != 1.0:
            refuse("feedback_average", "what was sent is removed in part (feedback_removal), which is another memory")


def at_end_of_backward(callback: Callable[[], object]) -> bool:
    """Have `callback` called when the backward pass under way is over, before `backward()` returns; False if none is."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore
    except RuntimeError:
        return False
    return True
