"""The ledger against the network cards' own counters: all-reduces at 2, 4 and 8 hosts in the lab.

The cards count what the ledger does not: frame headers (4.7 % on full segments), acknowledgements, the rendezvous, and what TCP
sends once more, which on busy cores may be a tenth. The kernel counts those segments, and each is taken as a full frame. Bar: on
every host the card has sent at most 8 % more than the ledger without them, and with them not less.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from thinwire.bench.registry import Rows, take
from thinwire.cluster import Cluster, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch

DEFAULTS = {"hosts": [2, 4, 8], "message_bytes": 4 * 2**20, "calls": 5, "link_bps": 100e6}
BAR = 0.08
FRAME_BYTES = 1514


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """Rows as of `measure`. With a cluster: that one instead of equal hosts."""
    told = take(options or {}, DEFAULTS)
    clusters = [load_cluster(cluster_name)] if cluster_name else [equal_hosts(count, told["link_bps"]) for count in told["hosts"]]
    return [row for cluster in clusters for row in measure(cluster, told["message_bytes"], told["calls"])]


def measure(cluster: Cluster, message_bytes: int, calls: int) -> Rows:
    """A row a host: case, host, ledger_bytes, card_bytes, retransmitted_bytes, ratio, bar, held. UserError if a rank failed."""
    command = [sys.executable, "-m", "thinwire.bench.peers.all_reduces", RESULTS, str(message_bytes), str(calls)]
    lab = launch(cluster, processes_for(cluster, command), LabOptions(delay=False, paced=False))
    if lab.failure:
        raise UserError(lab.failure)
    ledger_bytes: dict[str, int] = {}
    for rank in range(cluster.world_size):
        host = cluster.host_of(rank).name
        sent = json.loads(lab.results[f"ledger-{rank}.json"])["sent_bytes"]
        ledger_bytes[host] = ledger_bytes.get(host, 0) + sent
    rows = []
    for host, ledger in ledger_bytes.items():
        card = sum(count.sent_bytes for count in lab.cards if count.host == host)
        again = FRAME_BYTES * lab.retransmitted[host]
        rows.append(
            {
                "case": f"all_reduce, {len(cluster.hosts)} hosts",
                "host": host,
                "ledger_bytes": ledger,
                "card_bytes": card,
                "retransmitted_bytes": again,
                "ratio": (card - again) / ledger,
                "bar": 1 + BAR,
                "held": ledger <= card <= again + ledger * (1 + BAR),
            }
        )
    return rows
