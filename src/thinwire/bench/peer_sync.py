"""Other packages' ways to synchronise, torchft's and hivemind's, in `thinwire bench sync`: all that is special about them here.

They are compared on the same terms: the same first weights, batches, optimizer and clipping, compute paced alike, turns of whole
periods, and the cards counted in the turns. But each is started by itself, with steps without any exchange in turns beside it,
because it brings servers, heartbeats and processes of its own, which would work in the others' turns. So a machine whose speed
drifts is fair to utilisation, which has both sides from one start, less so to step_s. The differences that show in the rows:

    wire_bytes_per_step   not known: they send past the ledger; card_bytes_per_step has it all, with heartbeats and look-ups
    processor_s           with their processes; threads and processes of rank 0 only, which also serves the others
    wait_s                not known of torchft, which exchanges inside the optimizer's step
    torn                  not 0 where hivemind lost values and went on; torchft's exchange is whole, or the run ends
    weights_apart         not 0 for hivemind, which gives each rank what the others made of its share with errors of its own
"""

import importlib.util
from collections.abc import Sequence

from thinwire.bench.sync_methods import Method
from thinwire.errors import UserError

QUIET = ("env", "HIVEMIND_LOGLEVEL=CRITICAL", "RUST_LOG=error", "PYTHONWARNINGS=ignore")
"""hivemind reports the end of its helpers as errors, torchft each exchange; both would hide the line that says what failed."""


def check(methods: Sequence[Method]) -> None:
    """UserError for what is not installed, and for steps that end between two exchanges of torchft."""
    for method in methods:
        if method.package and importlib.util.find_spec(method.package) is None:
            raise UserError(f"method {method.name!r}: {method.package} is not installed; pip install 'thinwire[peers]'")
        steps, every = method.config.train.steps, getattr(method.config.sync, "every", 1)
        if method.package and steps % every:
            raise UserError(f"method {method.name!r} trains whole periods of {every} steps: steps = {steps} is no multiple of it")


def launches(methods: Sequence[Method]) -> list[list[Method]]:
    """The methods that share processes: each of other packages alone; then all of PyTorch's and ours, if any."""
    together = [method for method in methods if not method.package]
    return [[method] for method in methods if method.package] + ([together] if together else [])


def prefix(methods: Sequence[Method]) -> tuple[str, ...]:
    """What goes before the command of a launch."""
    return QUIET if any(method.package for method in methods) else ()
