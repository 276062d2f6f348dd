"""A checkpoint on one disk: a folder `step-000120` that is whole once it has that name.

    .metadata, __0_0.distcp    model and optimizer, by torch.distributed.checkpoint: what is alike on all ranks
    part-00-of-02.pt           instead, where ranks hold parts of the model: {"model", "optimizer"} of one part, by `torch.save`;
                               with "shards", which parts of single parameters these are, where tensor ranks have them
    rank-00003.pt              what is rank 3's own (random state, synchroniser; where replicas differ, model and optimizer)
    progress.json              the step, and who trained
    checksums.json             SHA-256 of all the others

It is written aside as `.step-000120.tmp`; files and folder are synced before it is renamed, so that a power cut leaves either all
of it or what was there before. Where hosts share no disk each holds such a folder, with what is alike (of parts those of its own
ranks) and its own ranks' files.
Which disks hold enough together is found by `restore`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from thinwire.errors import UserError
from thinwire.train.assign import Assignment
from thinwire.train.failure import symptom

PROGRESS, CHECKSUMS = "progress.json", "checksums.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: the next step to train, tokens seen, world size, micro-batches by replica.

    num_parts, cut: into how many parts the model is divided among the ranks, and a checksum of how (`division`); layout: of the
    ranks, in words; `Saver` knows. replanned: keys of run.toml that have changed since.
    """

    step: int
    tokens: int
    world_size: int
    assignment: Assignment
    num_parts: int = 1
    cut: str = ""
    layout: str = ""
    replanned: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"step-{self.step:06d}"


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a disk holds of one checkpoint: checksums and sizes of whole files, and a line for each that is not whole."""

    sums: Mapping[str, str]
    sizes: Mapping[str, int]
    damage: tuple[str, ...]
    progress: Progress | None

    @property
    def alike(self) -> bool:
        """Whether all is here that is alike on all ranks, or on those of each part."""
        if self.num_parts > 1:
            return not self.absent
        lost = any(not line.startswith("rank-") for line in self.damage)
        return self.progress is not None and not lost and any(not is_own(name) for name in self.sums if name != PROGRESS)

    @property
    def absent(self) -> list[str]:
        """Files of parts that are not here, or not whole."""
        return [name for name in part_files(self.num_parts) if name not in self.sums]

    @property
    def num_parts(self) -> int:
        """Of the model; 1 also where nothing is whole."""
        return 1 if self.progress is None else self.progress.num_parts


def part_files(num_parts: int) -> list[str]:
    """The names of what is alike on the ranks of each part, by part; none if there is but one."""
    return [f"part-{part:02d}-of-{num_parts:02d}.pt" for part in range(num_parts)] if num_parts > 1 else []


def rank_file(rank: int) -> str:
    """The name of what is one rank's own."""
    return f"rank-{rank:05d}.pt"


def is_own(name: str) -> bool:
    """Whether a file is one rank's own."""
    return name.startswith("rank-")


def names(folder: Path) -> list[str]:
    """Of the checkpoints below `folder`, the newest first."""
    return sorted((path.name for path in folder.glob("step-*")), reverse=True)


def aside_of(folder: Path, progress: Progress) -> Path:
    """Where a checkpoint is written before it is whole, empty."""
    aside = folder / f".{progress.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def finish(aside: Path, progress: Progress, sums: Mapping[str, str]) -> Path:
    """Sync the folder and give it its name, which is returned. sums: of files that have been summed already."""
    final = aside.with_name(progress.name)
    content = asdict(progress)
    if progress.num_parts == 1:  # as before there were parts
        del content["num_parts"], content["cut"]
    _write_synced(aside / PROGRESS, json.dumps(content))
    everything = {path.name: sums.get(path.name) or sha256(path) for path in sorted(aside.iterdir())}
    _write_synced(aside / CHECKSUMS, json.dumps(everything, indent=1))
    sync(aside)
    if final.exists():  # a resumed run saves the same step again: the old one stays until the new one is whole
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=final.parent))
        final.rename(old / final.name)
        aside.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(final)
    sync(final.parent)
    return final


def prune(folder: Path, keep: int) -> None:
    """All but the newest `keep` go, and what runs that were killed have left half written."""
    for name in names(folder)[keep:]:
        gone = folder / f".{name}.gone"  # first its name, so that no half of it passes for a checkpoint
        (folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    for pattern in (".step-*.tmp", ".step-*.gone", ".old-*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def examine(path: Path) -> Held:
    """What is whole in a checkpoint's folder; nothing, if there is no such folder."""
    sums, sizes, damage = dict[str, str](), dict[str, int](), []
    try:
        expected: dict[str, str] = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lost = (f"{CHECKSUMS} is not readable",) if path.exists() else ()
        return Held(sums={}, sizes={}, damage=lost, progress=None)
    for name, wanted in expected.items():
        file = path / name
        try:
            if sha256(file) == wanted:
                sums[name], sizes[name] = wanted, file.stat().st_size
            else:
                damage.append(f"{name} ({file.stat().st_size} bytes) does not have its checksum")
        except OSError:
            damage.append(f"{name} is missing" if not file.exists() else f"{name} is not readable")
    progress = None
    if PROGRESS in sums:
        progress = read_progress(path)
    return Held(sums=sums, sizes=sizes, damage=tuple(damage), progress=progress)


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint of which this disk holds all that is alike; those passed over are named. UserError without any."""
    passed: list[str] = []
    for name in names(folder):
        held = examine(folder / name)
        if held.alike:
            for line in passed:
                print(f"{line}; going on with {name}", flush=True)
            return folder / name
        lost = [*held.damage, *(f"{part} is not on this disk; copy it from the host that has it" for part in held.absent)]
        passed.append(f"checkpoint {folder / name} is {'damaged' if held.damage else 'not whole'}: {lost[0]}")
    raise UserError(
        f"{passed[0]}; there is no other" if passed else f"{folder} holds no checkpoint; a run writes one when it ends"
    )


def read_progress(path: Path) -> Progress:
    """The content of a checkpoint's `progress.json`. UserError if it is not readable."""
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        assignment = content.pop("deal", None) or content["assignment"]  # older checkpoints say "deal"
        return Progress(**content | {"assignment": tuple(assignment)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged: {PROGRESS} is not readable ({type(error).__name__})") from None


def sync(path: Path) -> None:
    """A file or a folder is on the disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def one_line(what: str, done: str) -> Iterator[None]:
    """Errors of the disk become a UserError."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise UserError(f"{what} cannot be {done}: {error.strerror or error}; check the disk and its rights") from None
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if symptom(first):  # the disk is all right: another rank has gone
            raise first from None
        raise UserError(f"{what} cannot be {done}: {first}") from None


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
