"""The threads of a rank: what is asked for goes to rank 0, and what rank 0 announces is run, in its order.

    caller        submit(request, tensors) -> Handle; returns at once
    sender        takes what has been asked for meanwhile and sends it as one message
    runner        takes announcements and runs them, one after another, each on the group of its process set
    controller    on rank 0: takes the messages of all ranks, announces (`controller`)

Messages go through queues of the store in which the ranks have met, each thread with a connection of its own; they are pickled,
as those of torch's own collectives of objects are. Tensors go over the groups. Those of devices are copied to the host when they
are handed in, and back by whoever takes the result, on the streams that are current there.
"""

import pickle
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from thinwire.adapters.horovod.codes import Codes
from thinwire.adapters.horovod.collectives import empty_of, run
from thinwire.adapters.horovod.controller import Announcement, Controller, Leaving, Waiting
from thinwire.adapters.horovod.request import HorovodInternalError, Key, Request
from thinwire.adapters.horovod.timeline import Timeline
from thinwire.collectives.groups import private_copy, release, timeout_of
from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError

CYCLE_S = 0.001
"""What is asked for within such a time is sent as one message, and travels together if it is alike."""
PATIENCE_S = 1.0
"""After so long a wait a rank says that it waits."""
END_S = 60.0
FOR_EVER = timedelta(days=365)
Tensors = list[torch.Tensor]


class Handle:
    """Of one request: results, or why there are none."""

    def __init__(self, request: Request, tensors: Tensors, in_place: bool, told: Callable[[Waiting], None]) -> None:
        """tensors: of any device, the caller's. told: hears that somebody waits."""
        self.request, self.result = request, -1
        self.given = [tensor.detach().cpu() for tensor in tensors]
        self._targets = tensors if in_place else []
        self._devices = [tensor.device for tensor in tensors]
        self._told, self._over = told, threading.Event()
        self._results: Tensors = []
        self._error = ""
        self.finish: Callable[[Tensors], Any] = list
        """Makes the value of the results."""

    def done(self) -> bool:
        """Whether `value` would not wait."""
        return self._over.is_set()

    @torch.no_grad()
    def value(self) -> Any:
        """Waits; the results on the devices of what was given. HorovodInternalError where it has failed."""
        while not self._over.wait(PATIENCE_S):
            self._told(Waiting(self.request.key))
        if self._error:
            raise HorovodInternalError(self._error)
        for number, result in enumerate(self._results):
            if self._targets and result is not self._targets[number]:
                self._results[number] = self._targets[number].copy_(result)
            elif not self._targets:
                self._results[number] = result.to(self._devices[min(number, len(self._devices) - 1)])
        return self.finish(self._results)

    def set(self, results: Tensors) -> None:
        """They are there. Those in place on the host are in their places when `done` says so."""
        for number, target in enumerate(self._targets):
            if target.device.type == "cpu":
                results[number] = target.copy_(results[number])
        self._results = results if self._targets else [result.clone() for result in results]
        self._over.set()

    def fail(self, error: str) -> None:
        """There are none."""
        self._error = error
        self._over.set()


class Engine:
    """Of one process, from `hvd.init` to `hvd.shutdown`. Collective: all ranks make it, with the same `name`."""

    def __init__(self, name: str, ledger: Ledger, backend: str | None = None) -> None:
        """ledger: of the groups' backend. backend: by name, of the groups' calls; None: the default group's."""
        world = dist.group.WORLD
        assert world is not None, "there is a default group"
        self.rank, self.size, self.ledger = world.rank(), world.size(), ledger
        self.timeline = Timeline(self.rank == 0)
        self._world = private_copy(world, "mesh_data", backend)
        self._backend = backend or dist.get_backend_config(world)
        self.groups: dict[int, Any] = {0: self._world}
        """By process set, of those that this rank is in."""
        self.names: Counter[tuple[str, int]] = Counter()
        """How many calls without a name there were, by kind and process set."""
        self.owners = count()
        """Numbers of optimizers with codes, which all ranks make in the same order."""
        self._asked: dict[Key, Handle] = {}
        self._lock, self._ended = threading.Lock(), ""
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._codes = Codes(self._world, ledger)
        self._name, self._store = name, dist.distributed_c10d._get_default_store()
        works = [self._run, self._send, *([self._control] if self.rank == 0 else [])]
        self._threads = [threading.Thread(target=work, daemon=True, name=f"{name} {work.__name__}") for work in works]
        self._queues = [self._connection() for _ in works]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request, tensors: Sequence[torch.Tensor] = (), in_place: bool = False) -> Handle:
        """Ask for it. ValueError if this rank has asked for one of its name, and it is not over."""
        handle = Handle(request, list(tensors), in_place, self._outgoing.put)
        with self._lock:
            if self._ended:
                raise HorovodInternalError(self._ended)
            if request.key in self._asked:
                raise ValueError(f"{request.kind} of {request.name!r}: one is under way already; give it another name=")
            self._asked[request.key] = handle
        self._outgoing.put(request)
        return handle

    def unnamed(self, kind: str, members: int) -> str:
        """A name for a call that has none: those of a kind and a process set are counted."""
        self.names[kind, members] += 1
        return f"{kind}.noname.{self.names[kind, members]}"

    def close(self) -> None:
        """End on all ranks: whatever is not over fails everywhere. Waits for the end of this rank's threads."""
        self._outgoing.put(Leaving("has shut Horovod down"))
        for thread in self._threads:
            thread.join(END_S)  # rank 0 may be gone, and with it whoever would tell them
        self._codes.close()
        for group in self.groups.values():
            release(group, self.ledger)
        self.groups = {}

    def _connection(self) -> Any:
        """To the queues. UserError for a store that has none."""
        try:
            named: Any = dist.PrefixStore(self._name, self._store)
            store = named.clone()
            store.set_timeout(FOR_EVER)
            store.queue_len("up")
        except (RuntimeError, NotImplementedError):
            raise UserError("hvd.init: the ranks have met in a store without queues (a file?); let them meet by tcp://") from None
        return store

    def _send(self) -> None:
        """The sender's thread; it ends with this rank."""
        store = self._queues[1]
        while True:
            messages = [self._outgoing.get()]
            time.sleep(CYCLE_S)
            while not self._outgoing.empty():
                messages.append(self._outgoing.get())
            if None in messages:
                return None
            try:
                store.queue_push("up", pickle.dumps((self.rank, messages)))
            except RuntimeError as error:
                return self._end(f"the store of the ranks is gone: {_line(error)}")
            if any(isinstance(message, Leaving) for message in messages):
                return None

    def _control(self) -> None:
        """Rank 0's other thread: ends when any rank does."""
        store = self._queues[2]
        controller = Controller(self.size, timeout_of(self._world).total_seconds())
        controller.noted = self.timeline.asked
        while True:
            rank, messages = pickle.loads(store.queue_pop("up"))
            found = controller.receive(rank, messages)
            for one in range(self.size - 1, -1, -1) if found else ():  # this rank last: then the others have it
                own = [announcement for announcement in found if one in announcement.ranks]
                if own:
                    store.queue_push(f"to {one}", pickle.dumps(own))
            if found and found[-1].end:
                return

    @torch.no_grad()
    def _run(self) -> None:
        """The runner's thread."""
        store = self._queues[0]
        while not self._ended:
            try:
                announcements = pickle.loads(store.queue_pop(f"to {self.rank}"))
            except RuntimeError as error:
                return self._end(f"the store of the ranks is gone: {_line(error)}")
            for announcement in announcements:
                if announcement.end:
                    return self._end(announcement.error)
                handles = [self._taken(part.request) for part in announcement.parts]
                try:
                    self._answer(announcement, handles)
                except Exception as error:
                    line = f"rank {self.rank}: {announcement.parts[0].request.kind} failed: {_line(error)}"
                    for handle in handles:
                        handle.fail(line)
                    self._outgoing.put(Leaving(f"failed: {_line(error)}"))
                    return self._end(line)
        return None

    def _taken(self, request: Request) -> Handle:
        """What this rank has asked for; zeros where it has joined."""
        with self._lock:
            handle = self._asked.pop(request.key, None)
        return handle or Handle(request, empty_of(request), False, self._outgoing.put)

    def _answer(self, announcement: Announcement, handles: Sequence[Handle]) -> None:
        request = announcement.parts[0].request
        if announcement.error:
            for handle in handles:
                handle.fail(announcement.error)
            return
        self.timeline.begun(announcement)
        if request.coding:
            self._codes.run(announcement.parts, handles)
        elif request.kind in ("add_process_set", "remove_process_set"):
            self._change_sets(request, announcement.result)
            handles[0].result = announcement.result
            handles[0].set([])
        elif request.kind == "join":
            handles[0].result = announcement.result
            handles[0].set([])
        else:
            given = [handle.given for handle in handles]
            results = run(announcement.parts, given, self.groups[request.members], self.ledger)
            for handle, result in zip(handles, results, strict=True):
                handle.set(result)
        self.timeline.ended(announcement)

    def _change_sets(self, request: Request, number: int) -> None:
        if request.kind == "remove_process_set":
            group = self.groups.pop(request.root, None)
            if group is not None:
                release(group, self.ledger)
            return
        ranks, timeout = list(request.splits), timeout_of(self._world)
        made = dist.new_group(ranks, timeout=timeout, backend=self._backend, group_desc="mesh_data")
        if self.rank in ranks:
            self.groups[number] = made

    def _end(self, reason: str) -> None:
        """Whatever this rank has asked for, or will, fails."""
        with self._lock:
            self._ended = self._ended or reason
            asked, self._asked = list(self._asked.values()), {}
        for handle in asked:
            handle.fail(self._ended)
        self._outgoing.put(None)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
