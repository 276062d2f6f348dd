"""Writes checkpoints on a thread of its own while training goes on.

    rank's main thread    takes a copy of its state between two steps (`snapshot`), and goes on
    this thread           own file; if there are parts, its own, which the lowest rank with it on a disk writes ->
                          leader of the disk: what is alike on all ranks, progress, checksums, name -> whole on every disk ->
                          older ones go

Threads agree through the store by which the ranks met, never by a collective: those are the training's. A checkpoint counts when
it is whole on every disk; what goes wrong on one rank, all learn, and the run ends in one line at the next report.

With copies = 2 each disk's leader also sends the files of its ranks to the next disk, but for parts that this one has, so that
any one of them may be lost; that goes over the links that training uses.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError
from thinwire.train.checkpoint.disks import Disks
from thinwire.train.checkpoint.division import find_division
from thinwire.train.checkpoint.files import Progress, aside_of, finish, one_line, part_files, prune, sha256
from thinwire.train.checkpoint.state import Parts, Snapshot, quiet, snapshot, write_alike, write_own, write_part
from thinwire.train.checkpoint.transfer import receive_file, send_file

POLL_S = 0.02
NICENESS = 5
"""Of the thread, so that training goes first where both want a core."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is whole on every disk. blocked_s: for how long training stood still, of `save_s` in all."""

    progress: Progress
    save_s: float
    blocked_s: float


@dataclass(kw_only=True)
class _Job:
    progress: Progress
    ledger: Ledger
    key: str
    """Of what its threads say in the store."""
    blocked_s: float
    part: str
    """The file of this rank's part, if there are several; "" if not."""
    ended: threading.Event = field(default_factory=threading.Event)
    save_s: float = 0.0
    error: str = ""


class Saver:
    """Of one rank, one for each Disks. folder: `checkpoints` of the run, on this rank's disk. keep: how many checkpoints stay.

    copies: on how many disks each rank's own file is kept, 1 or 2. parts: those that will be saved; None: one.
    """

    def __init__(self, folder: Path, disks: Disks, keep: int, copies: int = 1, parts: Parts | None = None) -> None:
        """Collective."""
        self._leaders = dist.new_group(disks.leaders) if copies > 1 and len(disks.leaders) > 1 else None
        self._folder, self._disks, self._keep = folder, disks, keep
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"checkpoint-{disks.token}", store.clone())  # one client answers one thread at a time
        self._job: _Job | None = None
        self._division = find_division(parts)
        self._begun = 0
        quiet()

    def begin(self, parts: Parts, progress: Progress) -> None:
        """Take a copy of `parts` and begin to write it. On every rank between the same two steps, when none is being written."""
        assert self._job is None, "a checkpoint is being written"
        assert parts.num_parts == len(set(self._division.part_of)), "parts as at the beginning"
        began = time.perf_counter()
        taken = snapshot(parts, alike=self._division.writes(self._disks))
        key, self._begun = str(self._begun), self._begun + 1
        self._job = _Job(
            progress=replace(
                progress,
                world_size=len(self._disks.leader_of),
                num_parts=parts.num_parts,
                cut=self._division.cut,
                layout=parts.layout,
            ),
            ledger=parts.ledger,
            key=key,
            blocked_s=time.perf_counter() - began,
            part=part_files(parts.num_parts)[parts.part] if parts.num_parts > 1 else "",
        )
        threading.Thread(target=self._run, args=(self._job, taken), name="checkpoint", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether the thread is still at work."""
        return self._job is not None and not self._job.ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint cannot be written; `reason` says why."""
        return self._job is not None and self._job.ended.is_set() and bool(self._job.error)

    def reason(self) -> str:
        """Why, in a line. On any rank, once `failed` is true on one."""
        return self._store.get(f"{self._begun - 1}/failed").decode()

    def take(self) -> Saved | None:
        """The checkpoint that was begun last, once it is whole; None before, and afterwards."""
        job = self._job
        if job is None or not job.ended.is_set() or job.error:
            return None
        self._job = None
        return Saved(progress=job.progress, save_s=job.save_s, blocked_s=job.blocked_s)

    def _run(self, job: _Job, taken: Snapshot) -> None:
        began = time.perf_counter() - job.blocked_s
        try:
            if hasattr(os, "setpriority") and os.uname().sysname == "Linux":  # elsewhere it would be the whole process
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            with one_line(f"checkpoint {self._folder / job.progress.name}", "written"):
                self._write(job, taken)
        except _FailedElsewhere as error:
            job.error = str(error)
        except Exception as error:
            job.error = " ".join(str(error).split())
            self._tell(f"{job.key}/failed", job.error)
        job.save_s = time.perf_counter() - began
        job.ended.set()

    def _write(self, job: _Job, taken: Snapshot) -> None:
        disks, rank, progress, key = self._disks, self._disks.rank, job.progress, job.key
        if disks.leads:
            aside = aside_of(self._folder, progress)
            self._store.set(f"{key}/begun/{rank}", "")
        else:
            aside = self._folder / f".{progress.name}.tmp"
            self._wait([f"{key}/begun/{disks.leader}"], key)
        written = [write_own(aside, rank, taken)]
        if job.part and taken.alike is not None:
            written.append(write_part(aside / job.part, taken))
        self._store.set(f"{key}/own/{rank}", json.dumps({file.name: [sha256(file), file.stat().st_size] for file in written}))
        if disks.leads:
            if not job.part:
                write_alike(aside, taken)
            mine = self._files_of(rank, key)
            if missing := [name for name in mine if not (aside / name).exists()]:
                raise UserError(f"checkpoint {aside}: {missing[0]}, which its rank has written, is not there; look at the disk")
            copied = self._copy(aside, job) if self._leaders is not None else {}
            finish(aside, progress, {name: sum_ for name, (sum_, _) in (mine | copied).items()})
            self._store.set(f"{key}/whole/{rank}", "")
        self._wait([f"{key}/whole/{leader}" for leader in disks.leaders], key)
        if disks.leads:
            prune(self._folder, self._keep)

    def _files_of(self, leader: int, key: str) -> dict[str, tuple[str, int]]:
        """Checksums and sizes of what the ranks on one disk have written, when they have."""
        keys = [f"{key}/own/{rank}" for rank in self._disks.ranks_of(leader)]
        self._wait(keys, key)
        return {name: tuple(about) for one in keys for name, about in json.loads(self._store.get(one)).items()}

    def _copy(self, aside: Path, job: _Job) -> dict[str, tuple[str, int]]:
        """Send this disk's files to the next one, and take those of the one before. In a ring, in which every second begins by
        taking; returns what has come."""
        leaders = self._disks.leaders
        index = leaders.index(self._disks.rank)
        after, before = leaders[(index + 1) % len(leaders)], leaders[index - 1]
        there, mine, theirs = (self._files_of(leader, job.key) for leader in (after, leaders[index], before))
        taken = {name: about for name, about in theirs.items() if name not in mine}

        def send() -> None:
            for name, (_, size) in mine.items():
                if name not in there:
                    send_file(aside / name, size, after, self._leaders)

        def take() -> None:
            for name, (_, size) in taken.items():
                receive_file(aside / name, size, before, self._leaders)

        with job.ledger.label("checkpoint copies"):
            for one in (send, take) if index % 2 == 0 else (take, send):
                one()
        return taken

    def _wait(self, keys: Sequence[str], key: str) -> None:
        """Until all are in the store. By asking again and again: a client that waits in the store serves nobody else."""
        while not self._store.check(list(keys)):
            if self._store.check([f"{key}/failed"]):
                raise _FailedElsewhere(self._store.get(f"{key}/failed").decode())
            time.sleep(POLL_S)

    def _tell(self, key: str, text: str) -> None:
        with suppress(RuntimeError):  # the store is gone with rank 0, of which the main thread will hear
            self._store.compare_set(key, "", text)


class _FailedElsewhere(Exception):
    pass
