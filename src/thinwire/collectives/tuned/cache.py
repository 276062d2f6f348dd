"""What was measured is stored beside the cluster file, so that the next run on this cluster need not measure again.

One JSON file: the version of the format, torch's version, the networks that were measured on (`network`), and for each carrier
(gloo, or an MPI), group, op, root and class of sizes, for each network, the implementation that won ("way"), its seconds and
those of the native collective, the bytes of the call that was timed, and the date. A choice holds for the network that it was
measured on; those of other networks stand beside it, and of more than `MOST_NETWORKS` the one measured first is dropped. A file
of another version of torch or of this format, or one that cannot be read, is started anew: what it held is measured again.
"""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from thinwire.collectives.tuned.network import Network

FORMAT = 4
MOST_NETWORKS = 8
"""For each call. Hosts of a batch system or of containers may have other names in every run."""


class Cache:
    """Used by one rank of a job. path: None stores nothing on the disk. dropped: why the file is started anew, if it is."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.dropped = path, ""
        self._networks: dict[str, Network] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        """By what was called, then by the network's key."""
        if path is not None and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if (form := stored["thinwire_collectives"]) != FORMAT:
                    self.dropped = f"has format {form}, and this thinwire writes {FORMAT}"
                elif stored["torch"] != torch.__version__:
                    self.dropped = f"is of torch {stored['torch']}, and this is {torch.__version__}"
                else:
                    self._networks = {key: Network.from_plain(one) for key, one in stored["networks"].items()}
                    self._entries = {call: dict(found) for call, found in stored["entries"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._networks, self._entries = {}, {}
                self.dropped = f"cannot be read ({type(error).__name__}: {str(error)[:80]})"

    def find(self, key: str, network: Network) -> dict[str, Any] | None:
        """{"way", "bytes", "seconds", "native_s", "date"} of a call on this network, or one near it."""
        found = self._entries.get(key, {})
        own = network.key if network.key in found else self._near(key, network)
        return found.get(own) if own is not None else None

    def elsewhere(self, key: str) -> bool:
        """Whether there is a choice for the call on any network."""
        return bool(self._entries.get(key))

    def store(self, key: str, network: Network, found: dict[str, Any]) -> None:
        """found: as `find` gives it, less the date. In the place of one on a network near it. Written at once."""
        entries = self._entries.setdefault(key, {})
        if (near := self._near(key, network)) is not None:
            del entries[near]
        self._networks[network.key] = network
        entries.pop(network.key, None)
        for oldest in list(entries)[: max(0, len(entries) + 1 - MOST_NETWORKS)]:
            del entries[oldest]
        entries[network.key] = {**found, "date": datetime.now(UTC).date().isoformat()}
        used = {name for one in self._entries.values() for name in one}
        self._networks = {name: one for name, one in self._networks.items() if name in used}
        if self.path is not None:
            aside = self.path.with_suffix(f".{os.getpid()}.tmp")
            content = {
                "thinwire_collectives": FORMAT,
                "torch": torch.__version__,
                "networks": {name: asdict(one) for name, one in self._networks.items()},
                "entries": self._entries,
            }
            aside.write_text(json.dumps(content), encoding="utf-8")
            os.replace(aside, self.path)

    def _near(self, key: str, network: Network) -> str | None:
        """Of the networks that the call was measured on, the first that is near."""
        names = self._entries.get(key, {})
        return next((name for name in names if name in self._networks and self._networks[name].near(network)), None)


def beside(cluster: Path) -> Path:
    """The cache of a cluster file."""
    return cluster.with_suffix(".collectives.json")
