"""Schedules made from the network itself: exact optima, trees that reach them, lower bounds. No torch, no licensed solver."""

from thinwire.collectives.synthesis.bounds import Bound, bound
from thinwire.collectives.synthesis.forest import (
    AllReducePlan,
    all_gather_forest,
    all_reduce_plan,
    broadcast_forest,
    reduce_forest,
    reduce_scatter_forest,
)
from thinwire.collectives.synthesis.graph import Graph, graph_of, matrix_graph
from thinwire.collectives.synthesis.joint import all_reduce_time, rack_time, star_time
from thinwire.collectives.synthesis.nccl import nccl_graph
from thinwire.collectives.synthesis.optimum import Cut, Optimum, fixed_k, optimum
from thinwire.collectives.synthesis.trees import Edge, Forest, Tree

__all__ = [
    "AllReducePlan",
    "Bound",
    "Cut",
    "Edge",
    "Forest",
    "Graph",
    "Optimum",
    "Tree",
    "all_gather_forest",
    "all_reduce_plan",
    "all_reduce_time",
    "bound",
    "broadcast_forest",
    "fixed_k",
    "graph_of",
    "matrix_graph",
    "nccl_graph",
    "optimum",
    "rack_time",
    "reduce_forest",
    "reduce_scatter_forest",
    "star_time",
]
