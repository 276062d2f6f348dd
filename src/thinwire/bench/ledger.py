"""The ledger against the network cards' own counters: all-reduces at 2, 4 and 8 hosts in the lab.

The cards count what the ledger does not: frame headers (4.7 % on full segments), acknowledgements, the rendezvous. Bar: on every
host the card has sent at most 8 % more than the ledger, and not less.
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


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, host, ledger_bytes, card_bytes, ratio, bar, held. With a cluster: that one instead of equal hosts."""
    equal = [] if cluster_name else [equal_hosts(count, options["link_bps"]) for count in options["hosts"]]
    clusters = [load_cluster(cluster_name)] if cluster_name else equal
    return [row for cluster in clusters for row in measure(cluster, options["message_bytes"], options["calls"])]


def measure(cluster: Cluster, message_bytes: int, calls: int) -> Rows:
    """A row for each host of one lab. UserError if the all-reduces failed."""
    settings = {"message_bytes": message_bytes, "calls": calls}
    lab = run_script(cluster, "all_reduces", settings, LabOptions(delay=False, paced=False))
    cards: dict[str, int] = {}
    for count in lab.cards:
        cards[count.host] = cards.get(count.host, 0) + count.sent_bytes
    ledgers: dict[str, int] = {}
    for rank in range(cluster.world_size):
        host = cluster.host_of(rank).name
        ledgers[host] = ledgers.get(host, 0) + lab.results[f"ledger-{rank}"]
    rows = []
    for host, ledger_bytes in ledgers.items():
        ratio = cards[host] / ledger_bytes
        row = {"case": f"all_reduce, {len(cluster.hosts)} hosts", "host": host, "ledger_bytes": ledger_bytes}
        rows.append({**row, "card_bytes": cards[host], "ratio": ratio, "bar": 1 + BAR, "held": 1 <= ratio <= 1 + BAR})
    return rows
