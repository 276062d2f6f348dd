"""A script run in this process as torchrun would run it, metered; after some steps, in a pause of it, the verdict."""

import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.address import address_of_default_group, plain_gloo
from thinwire.collectives.groups import release
from thinwire.errors import UserError
from thinwire.measure.compute import kind_of
from thinwire.measure.findings import RackFound, wired
from thinwire.measure.gather import gather
from thinwire.measure.network import Phases
from thinwire.measure.probe import measure_hosts
from thinwire.why.causes import Case
from thinwire.why.clocks import clock_offsets
from thinwire.why.hooks import marked
from thinwire.why.meter import OWN, Recorder, metered
from thinwire.why.steps import FEWEST_STEPS, profile
from thinwire.why.trace import PLAIN

PATIENCE = timedelta(seconds=120)
"""With ranks that have not come to the same step."""
METERED = 3
"""Calls of one in so many steps are noted, which takes time; how long a step is, the others say."""
REST_S = 0.2
"""In which gloo's threads drop what they hold (`Recorder.kept`)."""
Conclude = Callable[[Case], None]


@dataclass(frozen=True)
class Wanted:
    """warm_up, steps: left out, and metered. conclude: called on the first rank, once; stop: called on each after that."""

    warm_up: int
    steps: int
    conclude: Conclude
    stop: Callable[[], None] | None = None


def explain_script(script: Path, arguments: Sequence[str], wanted: Wanted) -> None:
    """Run `script` with `arguments`, in this process, as __main__; conclude after `wanted.steps`, else where it ends.

    On every rank that a launcher has started. Raises what the script raises; UserError for a script that is not there.
    """
    if not script.is_file():
        raise UserError(f"there is no script {script}; give the file that torchrun would run")
    session = _Session(wanted)
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    with session.watching():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        session.conclude()
        time.sleep(REST_S)


class _Session:
    """Of one rank."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted, self._recorder = wanted, Recorder()
        self._steps: Counter[int] = Counter()
        self._hooks = ExitStack()
        self._concluded = False
        self._backend = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, groups are metered, and steps and the end of the script's groups are seen."""
        self._backend = plain_gloo()
        destroy = dist.destroy_process_group

        def destroyed(group: Any = None) -> None:
            if group is None or group is dist.group.WORLD:
                self.conclude()
                time.sleep(REST_S)
            destroy(group)

        with metered(self._recorder), marked(self._recorder, self._stepped) as self._hooks:
            dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = destroyed
            try:
                yield
            finally:
                dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = destroy

    def _stepped(self, number: int) -> None:
        self._steps[number] += 1
        done = min(self._steps.values())
        if self._concluded or self._steps[number] != done:
            return
        if done == self._wanted.warm_up:
            self._recorder.events[:-1] = []
        elif done == self._wanted.warm_up + self._wanted.steps and dist.is_initialized():
            self.conclude()
            if self._wanted.stop:
                self._wanted.stop()
        if (metered := done - self._wanted.warm_up) >= 0:
            every = max(1, min(METERED, self._wanted.steps // (FEWEST_STEPS + 1)))
            self._recorder.calls = metered % every == 0
            if not self._recorder.calls:
                self._recorder.mark(PLAIN)

    def conclude(self) -> None:
        """The verdict, once. Collective. What goes wrong is a line on stderr: the script has nothing to do with it."""
        if self._concluded:
            return
        self._concluded, self._recorder.on = True, False
        self._hooks.close()
        try:
            if not dist.is_initialized() or dist.get_world_size() < 2:
                raise UserError("the script has made no process group of two ranks or more: nothing is exchanged")
            self._judge()
        except (UserError, RuntimeError) as error:
            print(f"thinwire: why: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)

    def _judge(self) -> None:
        rank = dist.get_rank()
        group = dist.new_group(backend=self._backend, timeout=PATIENCE, group_desc=OWN)
        begun = time.perf_counter()
        offsets_s = clock_offsets(group)
        traces = gather(self._recorder.trace(), group)
        accelerator = torch.accelerator.current_accelerator() if self._recorder.clock.on_device else None
        device = accelerator or torch.device("cpu")
        hosts, network = measure_hosts(address_of_default_group(), kind_of(device), Phases(lambda _: None), group)
        problem = None
        if rank == 0:
            racks: Sequence[RackFound] = network.racks if network else ()
            cluster = wired("probed", hosts, racks, date.today().isoformat())
            try:
                self._wanted.conclude(Case(profile(traces, offsets_s), cluster, time.perf_counter() - begun))
            except UserError as error:
                problem = error
        gather(None, group)  # nobody goes on while the first rank still judges
        self._recorder.kept.append(group)
        release(group)
        if problem:
            raise problem
