"""One line for whatever goes wrong on a rank, and the file in which a launcher looks for it."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.errors import UserError
from thinwire.train.heartbeat import PeerGone, symptom
from thinwire.train.runtime import Place

KINDS = ("user", "error", "silent", "timeout", "lost")
"""A mistake of the user; anything unexpected; ranks that are known to be silent; waited too long for another rank; another rank
went away. The first explains the others: a rank that fails makes its peers wait, or lose it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank tells. kind: one of KINDS."""

    kind: str
    line: str


def explain(error: BaseException, place: Place | None) -> Failure:
    """One line for an exception on the rank at `place`."""
    if isinstance(error, UserError):
        return Failure("user", str(error))
    who = f"rank {place.rank}: " if place else ""
    if isinstance(error, PeerGone):
        return Failure(error.kind, str(error))
    text = " ".join(str(error).split())
    match symptom(error):
        case "timeout":
            advice = "if the network is only slow, raise train.timeout_s; the last whole checkpoint is kept"
            return Failure("timeout", f"{who}gave up waiting for another rank ({text[:160]}); {advice}")
        case "lost":
            return Failure("lost", f"{who}lost the connection to another rank ({text[:160]}); the last whole checkpoint is kept")
    return Failure("error", f"{who}{type(error).__name__}: {text[:300]}")


def write_error_file(path: Path, failure: Failure) -> None:
    """For the launcher, in the form that torchrun's agent reads."""
    extra = {"timestamp": str(int(time.time())), "kind": failure.kind}
    path.write_text(json.dumps({"message": {"message": failure.line, "extraInfo": extra}}), encoding="utf-8")


def read_error(data: Any) -> Failure | None:
    """What `write_error_file` wrote, from the data that the agent has read; None if a rank has left nothing of the kind."""
    try:
        return Failure(data["message"]["extraInfo"]["kind"], data["message"]["message"])
    except (KeyError, TypeError):
        return None
