"""Which checkpoint a resumed run goes on with, found over all disks, and what each disk lacks of it, brought there.

    whole     some disk holds all that is alike, or each part is on some disk, and every rank's own file is on some disk, all with
              their checksums
    usable    the same, but files of some ranks are gone with their disks, or damaged

The newest that is whole is taken; those passed over are named. Where none is whole, the newest that is usable: what the lost
ranks had of their own (residuals, random state) begins anew, and that is said. Files on another disk are sent from there: of
parts those of a disk's own ranks where the ranks hold what the ranks held that wrote them, else all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from thinwire.errors import UserError
from thinwire.measure.gather import gather
from thinwire.train.checkpoint.disks import Disks
from thinwire.train.checkpoint.division import Division, find_division
from thinwire.train.checkpoint.files import (
    PROGRESS,
    Held,
    Progress,
    aside_of,
    examine,
    finish,
    is_own,
    names,
    one_line,
    part_files,
    rank_file,
    sha256,
)
from thinwire.train.checkpoint.state import Parts
from thinwire.train.checkpoint.transfer import receive_file, send_file

SAID_BYTES = 1 << 24
"""So much to send is said beforehand."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that lies on this rank's disk now. with_own: every rank goes on with a file of its own."""

    path: Path
    progress: Progress
    with_own: bool


@dataclass(frozen=True)
class _Candidate:
    name: str
    held: Sequence[Held]
    """By rank; of leaders."""

    @property
    def progress(self) -> Progress | None:
        """None if it is not usable."""
        return next((one for held in self.held if (one := held.progress) and self.alike(one.num_parts)), None)

    def alike(self, num_parts: int) -> dict[str, int]:
        """Files of what is alike, and the lowest rank on whose disk each is whole; none if not all are somewhere."""
        if num_parts > 1:
            holders = {name: [rank for rank, held in enumerate(self.held) if name in held.sums] for name in part_files(num_parts)}
            return {name: ranks[0] for name, ranks in holders.items()} if all(holders.values()) else {}
        holders_of_all = (rank for rank, held in enumerate(self.held) if held.alike and not part_files(held.num_parts))
        source = next(holders_of_all, None)
        if source is None:
            return {}
        return {name: source for name in sorted(self.held[source].sums) if not is_own(name) and name != PROGRESS}

    def agrees(self, name: str) -> bool:
        """Whether the file is the same on all disks that hold it."""
        return len({held.sums[name] for held in self.held if name in held.sums}) == 1

    @property
    def own(self) -> dict[str, int]:
        """Files of ranks, and the lowest rank on whose disk each is whole."""
        found: dict[str, int] = {}
        for rank, held in enumerate(self.held):
            for name in held.sums:
                if is_own(name):
                    found.setdefault(name, rank)
        return found

    @property
    def lost(self) -> list[int]:
        """Ranks whose own files are nowhere."""
        assert self.progress is not None
        own = self.own
        return [rank for rank in range(self.progress.world_size) if rank_file(rank) not in own]

    @property
    def damage(self) -> str:
        """In a few words."""
        lines = [f"{line} (disk of rank {rank})" for rank, held in enumerate(self.held) for line in held.damage]
        if not lines and self.progress is not None:
            lines = [f"{rank_file(rank)} is on none of the disks" for rank in self.lost]
        if not lines and (absent := [set(held.absent) for held in self.held if held.progress is not None]):
            lines = [f"{name} is on none of the disks" for name in sorted(set.intersection(*absent))]
        return lines[0] if lines else "no disk holds what is alike on all ranks"


def find_checkpoint(folder: Path, disks: Disks, parts: Parts | None = None) -> Found:
    """The one to go on with below `folder`, on this rank's disk when this returns. Collective over the default group.

    parts: what will be loaded; None: the whole model on each rank. UserError on all ranks if there is none.
    """
    chosen, division = _choose(folder, disks), find_division(parts)
    progress = chosen.progress
    assert progress is not None
    alike = progress.world_size == dist.get_world_size() and progress.cut == division.cut
    layout = parts.layout if parts else ""
    with_own = alike and not chosen.lost and (not progress.layout or progress.layout == layout)
    lacking = partial(_lacking, disks, chosen, division=division if alike else None, with_own=with_own)
    sends = [send for leader in disks.leaders for send in lacking(leader)]
    errors = gather(_bring(folder, disks, chosen, sends))
    if bad := [error for error in errors if error]:
        raise UserError(bad[0])
    return Found(path=folder / chosen.name, progress=progress, with_own=with_own)


def _choose(folder: Path, disks: Disks) -> _Candidate:
    everywhere: list[list[str]] = gather(names(folder) if disks.leads else [])
    candidates = sorted({name for there in everywhere for name in there}, reverse=True)
    if not candidates:
        raise UserError(f"{folder} holds no checkpoint to resume from; start without --resume")
    usable: _Candidate | None = None
    passed: list[str] = []
    nothing = Held(sums={}, sizes={}, damage=(), progress=None)
    for name in candidates:
        one = _Candidate(name, gather(examine(folder / name) if disks.leads else nothing))
        if one.progress is not None and not one.lost:
            _say(disks, *(f"checkpoint {line}; going on with {name}" for line in passed))
            return one
        passed.append(f"{folder / name} is not whole: {one.damage}")
        if one.progress is not None and usable is None:
            usable = one
    if usable is None:
        raise UserError(f"checkpoint {passed[0]}; there is no other to resume from, start without --resume")
    lost = ", ".join(map(str, usable.lost))
    _say(
        disks,
        f"checkpoint {folder / usable.name}: the files of ranks {lost} are on none of the disks, so what they had of their own "
        "(random state, residuals) begins anew; the model and the optimizer are whole",
    )
    return usable


def _bring(folder: Path, disks: Disks, chosen: _Candidate, sends: Sequence[tuple[str, int, int]]) -> str:
    """Send and take what disks lack, and leave out what is damaged. Returns what went wrong here, "" if nothing did.

    sends: file, rank that sends it, leader that takes it; the same on all ranks.
    """
    total = sum(chosen.held[source].sizes[name] for name, source, _ in sends)
    if total >= SAID_BYTES:
        _say(disks, f"checkpoint {chosen.name}: sending {total / 1e6:,.0f} MB of it to disks that lack it")
    mine = [name for name, _, target in sends if target == disks.rank]
    progress, anew = chosen.progress, bool(mine or chosen.held[disks.rank].damage)
    assert progress is not None
    try:
        with one_line(f"checkpoint {folder / chosen.name}", "completed"):
            aside = aside_of(folder, progress) if anew else folder
            for name, source, target in sends:
                size = chosen.held[source].sizes[name]
                if source == disks.rank:
                    send_file(folder / chosen.name / name, size, target)
                elif target == disks.rank:
                    receive_file(aside / name, size, source)
                    if sha256(aside / name) != chosen.held[source].sums[name]:
                        raise UserError(
                            f"checkpoint {folder / chosen.name}: {name} arrived damaged from rank {source}; try again"
                        )
            if anew:
                kept = [name for name in chosen.held[disks.rank].sums if name not in mine and name != PROGRESS]
                for name in kept:
                    (aside / name).hardlink_to(folder / chosen.name / name)
                finish(aside, progress, {name: chosen.held[disks.rank].sums[name] for name in kept})
    except UserError as error:
        return str(error)
    return ""


def _lacking(
    disks: Disks, chosen: _Candidate, leader: int, division: Division | None, with_own: bool
) -> list[tuple[str, int, int]]:
    """(file, rank that sends it, `leader`) of what its disk lacks. division: if it is the one that wrote the parts, else None."""
    assert chosen.progress is not None
    here, alike, own, ranks = chosen.held[leader], chosen.alike(chosen.progress.num_parts), chosen.own, disks.ranks_of(leader)
    # Disks that were written apart may differ in what only the average and the first replica's optimizer decide: one is taken.
    if parts := part_files(chosen.progress.num_parts):
        if division is not None and (with_own or all(map(chosen.agrees, parts))):  # else tied weights might come from two
            alike = {name: alike[name] for name in sorted({parts[division.part_of[rank]] for rank in ranks})}
        sums = {name: chosen.held[source].sums[name] for name, source in alike.items()}
        alike = {
            name: alike[name] for name in alike if here.sums.get(name) != sums[name] and not (with_own and name in here.sums)
        }
    elif here.alike and alike.keys() <= here.sums.keys():
        source = chosen.held[next(iter(alike.values()))]
        alike = {} if with_own or _data(here) == _data(source) else alike
    wanted = [rank_file(rank) for rank in ranks] if with_own else sorted(own)
    return [(name, source, leader) for name, source in alike.items()] + [
        (name, own[name], leader) for name in wanted if name not in here.sums
    ]


def _data(held: Held) -> list[str]:
    """Checksums of the tensors that are alike; their index has a name of its own on each disk."""
    return [sum_ for name, sum_ in sorted(held.sums.items()) if name.endswith(".distcp")]


def _say(disks: Disks, *lines: str) -> None:
    for line in lines if disks.rank == 0 else ():
        print(line, flush=True)
