"""The ledger against the network cards' own counters: all-reduces at 2, 4 and 8 hosts in the lab.

The cards count what the ledger does not: frame headers (4.7 % on full segments), acknowledgements, the rendezvous, and what TCP
sends once more, which on busy cores may be a tenth. The kernel counts those segments, and each is taken as a full frame. Bar: on
every host the card has sent at most 8 % more than the ledger without them, and with them not less.
"""

from collections.abc import Mapping
from typing import Any

from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.lab.run import LabOptions

DEFAULTS = {"hosts": [2, 4, 8], "message_bytes": 4 * 2**20, "calls": 5, "link_bps": 100e6}
BAR = 0.08
FRAME_BYTES = 1514


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, host, ledger_bytes, card_bytes, ratio, bar, held. With a cluster: that one instead of equal hosts."""
    equal = [] if cluster_name else [equal_hosts(count, options["link_bps"]) for count in options["hosts"]]
    clusters = [load_cluster(cluster_name)] if cluster_name else equal
    return [row for cluster in clusters for row in measure(cluster, options["message_bytes"], options["calls"])]


def measure(cluster: Cluster, message_bytes: int, calls: int) -> Rows:
    """A row a host: case, host, ledger_bytes, card_bytes, retransmitted_bytes, ratio, bar, held. UserError if a rank failed."""
    settings = {"message_bytes": message_bytes, "calls": calls}
    lab = run_script(cluster, "all_reduces", settings, LabOptions(delay=False, paced=False))
    ledgers: dict[str, int] = {}
    for rank in range(cluster.world_size):
        host = cluster.host_of(rank).name
        ledgers[host] = ledgers.get(host, 0) + lab.results[f"ledger-{rank}"]
    rows = []
    for host, ledger in ledgers.items():
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
