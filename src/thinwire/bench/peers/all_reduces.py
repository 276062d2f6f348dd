"""A few all-reduces through the metered backend; each rank leaves what it sent by its ledger. For `thinwire bench ledger`."""

import json

import torch
import torch.distributed as dist


def measure(rank):
    """One rank."""
    for _ in range(rank.settings["calls"]):
        dist.all_reduce(torch.ones(rank.settings["message_bytes"] // 4))
    dist.barrier()
    (rank.results / f"ledger-{rank.place.rank}.json").write_text(json.dumps(rank.ledger.sent_bytes))
