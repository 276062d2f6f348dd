"""A few all-reduces through the metered backend; each rank leaves what its ledger says it sent.

python -m thinwire.bench.peers.all_reduces RESULTS MESSAGE_BYTES CALLS
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.train.runtime import process_group, read_environment


def main(results: str, message_bytes: str, calls: str) -> None:
    """One rank."""
    place = read_environment().place
    assert place is not None
    torch.set_num_threads(1)
    ledger = Ledger()
    backend.register(ledger)
    with process_group(place, backend.NAME, 120):
        for _ in range(int(calls)):
            dist.all_reduce(torch.ones(int(message_bytes) // 4))
        dist.barrier()
    (Path(results) / f"ledger-{place.rank}.json").write_text(json.dumps({"sent_bytes": ledger.sent_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
