"""The cluster: who is wired to whom, how fast, and how that is known."""

from thinwire.cluster.file import dump_cluster, load_cluster, shipped_clusters
from thinwire.cluster.model import FRAME_OVERHEAD, Cluster, Device, Host, Link, Quantity, Switch

__all__ = [
    "FRAME_OVERHEAD",
    "Cluster",
    "Device",
    "Host",
    "Link",
    "Quantity",
    "Switch",
    "dump_cluster",
    "load_cluster",
    "shipped_clusters",
]
