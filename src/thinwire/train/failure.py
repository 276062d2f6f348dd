"""One line for whatever goes wrong on a rank, and the file in which a launcher looks for it."""

import json
import time
from pathlib import Path

import torch.distributed as dist

from thinwire.errors import UserError
from thinwire.train.runtime import Place


def failure_line(error: BaseException, place: Place | None) -> str:
    """One line for whatever went wrong on a rank."""
    who = f"rank {place.rank}: " if place else ""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError | RuntimeError) and any(
        word in text for word in ("Connection closed", "Connection reset", "peer")
    ):
        return f"{who}lost the connection to another rank ({text[:160]})"
    if "imed out" in text or "timeout" in text.lower():
        return f"{who}gave up waiting for another rank ({text[:160]}); raise train.timeout_s if the network is only slow"
    return f"{who}{type(error).__name__}: {text[:300]}"


def write_error_file(path: Path, line: str, user_error: bool) -> None:
    """For the launcher, in the form that torchrun's agent reads."""
    told = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time())), "user_error": user_error}}}
    path.write_text(json.dumps(told), encoding="utf-8")
