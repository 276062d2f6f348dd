"""Which options of [compress] a kind uses. One that would have no effect is refused, in one line, before anything runs.

exclude, vectors, after_steps    all kinds; powersgd takes matrices only, so no vectors
exchange                         codes that are not summed, of flat vectors
feedback                         all but the casts, whose loss nobody knows, and dgc, which keeps a momentum instead
feedback_*                       where there is feedback; what is removed in part (demo) is no moving average
others                           as the codec's own signature says (`base.build`)
"""

from thinwire.compress.base import CODECS
from thinwire.compress.memory import DEMO
from thinwire.config.compress import SUMMABLE, Coded
from thinwire.errors import UserError

FEEDBACK = ("feedback_decay", "feedback_average", "feedback_reset", "feedback_removal", "feedback_storage")


def check_options(config: Coded) -> None:
    """UserError for the first option that was given and that `config.kind` would not use."""
    kind = config.kind

    def refuse(option: str, why: str) -> None:
        raise UserError(f"compress.{option} = {getattr(config, option)!r}: {why}; leave it out")

    if config.exchange != "auto" and kind not in CODECS.keys() - SUMMABLE:
        refuse("exchange", f"{kind} has one way only")
    if config.vectors and kind == "powersgd":
        refuse("vectors", "powersgd takes matrices only")
    given = [option for option in FEEDBACK if getattr(config, option) is not None]
    if kind in SUMMABLE:
        if config.feedback:
            refuse("feedback", f"what {kind} loses is summed up on the way, and nobody knows it")
        if given:
            refuse(given[0], f"{kind} has no feedback")
    elif kind != "dgc":
        if not config.feeds_back and given:
            refuse(given[0], "feedback is false")
        removal = config.feedback_removal or (DEMO.removal if kind == "demo" else 1.0)
        if config.feedback_average not in (None, 1.0) and removal != 1.0:
            refuse("feedback_average", "what was sent is removed in part (feedback_removal), which is another memory")
