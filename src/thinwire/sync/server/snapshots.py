"""What servers keep on the disk, so that they can all go on from one version.

    snapshot    of versions 0, e, 2e, ... (e: `every`), copied in whole as that version is made, and at the end of the service
    written     before any worker goes on from such a version (`merger`). So where servers move in step, all have written v before
                any can make v + 1, and the last KEPT files of each hold a version that all have, whenever they were killed
    go on       from the newest version that all servers have; what is newer is another history from then on, and is removed
    asynchronous gradients    are counted by each server for itself; without such a version each goes on from its newest
    refused     files that one server lacks, that were kept by another number of servers, or that are of two models

Files are there in whole or not at all: server-0.pt is the newest of server 0, server-0.1.pt the one before, server-0.2.pt the one
before that. If nothing but version 0 is there, and not everywhere, nobody has trained yet, and the servers begin anew.
"""

import contextlib
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from thinwire.config.replicas import Gradients, Service
from thinwire.errors import UserError
from thinwire.files import written_aside

KEPT = 3
EVERY_MERGES, EVERY_STEPS = 1, 50
"""Versions between snapshots: of merged pushes, and of gradients."""


class Snapshots:
    """The files of server `index`. every: versions between snapshots; 0: as many as usual."""

    def __init__(self, folder: Path, index: int, service: Service, every: int = 0) -> None:
        self.every = every or (EVERY_STEPS if isinstance(service.merge, Gradients) else EVERY_MERGES)
        self._folder, self._index, self._servers = folder, index, service.servers
        self._newest: tuple[int, int] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, version: int) -> dict[str, Any]:
        """The snapshot of that version, which `choose_versions` has found."""
        for path in files(self._folder, self._index):
            if (state := _peek(path))["version"] == version:
                self._newest = version, state["model"]
                return load(path)
        raise UserError(f"{self._folder}: version {version} of server {self._index} is gone; take an older folder")

    def write(self, state: dict[str, Any]) -> None:
        """A new newest one; in place of one of this version, which a worker that died in between may have begun (`lease`)."""
        version, model = state["version"], state["model"]
        if self._newest == (version, model):
            return
        paths = _names(self._folder, self._index)
        beside = paths[0].with_suffix(".part")
        save(state | {"servers": self._servers}, beside)
        if self._newest is None or self._newest[0] != version:
            for newer, older in reversed(list(pairwise(paths))):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(newer, older)
        os.replace(beside, paths[0])
        self._newest = version, model


def files(folder: Path, index: int) -> list[Path]:
    """Of one server, the newest first."""
    return [path for path in _names(folder, index) if path.is_file()]


def choose_versions(folder: Path, service: Service) -> list[int] | None:
    """The version with which each server is to go on; None: begin anew. Removes what is newer. UserError if none is sound."""
    found = [{_peek(path)["version"]: path for path in files(folder, index)} for index in range(service.servers)]
    if not any(found):
        return None
    _check(folder, service, found)
    versions = _versions(folder, service, found)
    for server, version in zip(found, versions or [-1] * service.servers, strict=True):
        for other, path in server.items():
            if other > version:
                path.unlink()
    return versions


def _versions(folder: Path, service: Service, found: list[dict[int, Path]]) -> list[int] | None:
    lacking = [index for index, server in enumerate(found) if not server]
    if lacking:
        if not any(version for server in found for version in server):
            return None
        raise UserError(f"{folder}: nothing is kept there of server {lacking[0]} of {service.servers}; give its files back")
    common = set.intersection(*(set(server) for server in found))
    if common:
        return [max(common)] * service.servers
    if isinstance(service.merge, Gradients) and service.merge.delay:
        return [max(server) for server in found]
    listed = "; ".join(f"server {index}: {', '.join(map(str, sorted(server)))}" for index, server in enumerate(found))
    raise UserError(
        f"{folder}: no version is kept of all servers, and two would be mixed ({listed}); take an older copy of the folder"
    )


def _check(folder: Path, service: Service, found: list[dict[int, Path]]) -> None:
    """All are of one model and of this number of servers."""
    states = [_peek(path) for server in found for path in server.values()]
    more = files(folder, service.servers)
    counts = {state["servers"] for state in states} | ({service.servers + 1} if more else set())
    if counts != {service.servers}:
        raise UserError(f"{folder}: was kept by {max(counts)} servers, and there are {service.servers}; start as many")
    if len({state["model"] for state in states}) > 1:
        raise UserError(f"{folder}: its files are of two models; take those of one, or an empty folder to begin anew")


def _peek(path: Path) -> dict[str, Any]:
    """A snapshot whose tensors stay on the disk."""
    state = load(path, mapped=True)
    if not {"version", "model", "servers", "weights"} <= state.keys():
        raise UserError(f"{path}: was kept by another version of thinwire; take an empty folder to begin anew")
    return state


def _names(folder: Path, index: int) -> list[Path]:
    return [folder / f"server-{index}{f'.{age}' if age else ''}.pt" for age in range(KEPT)]


def save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    with written_aside(path) as aside:
        torch.save(state, aside)


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """UserError if it cannot be read. mapped: tensors are read from the disk where they are used."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; nothing was saved there") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0][:100]}); take an older folder") from None
    return state
