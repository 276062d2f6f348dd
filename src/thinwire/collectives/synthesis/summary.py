"""What a topology allows, in words: the optimum or bound of an op, which cut it comes from, and the trees that reach it."""

from thinwire.collectives.synthesis.bounds import bound
from thinwire.collectives.synthesis.forest import Forest, all_reduce_plan, packed
from thinwire.collectives.synthesis.graph import Graph
from thinwire.collectives.synthesis.optimum import fixed_k, optimum
from thinwire.units import show

PACKED = 32
"""Ranks up to which trees are packed."""

_FIXED = (1, 2, 4)
_SHOWN = 48
"""Nodes up to which each one's links are shown."""


def summary(graph: Graph, op: str, message_bytes: int, root: int = 0) -> list[tuple[str, str]]:
    """(what, in words). message_bytes as in `bounds`."""
    forwards = len(graph.nodes) - graph.computes
    size = f"{graph.world_size} ranks, {forwards} nodes that only forward, {len(graph.capacity)} links"
    lines = [("topology", f"{graph.name}: {size}")]
    lines += _links(graph) if len(graph.nodes) <= _SHOWN else []
    lines += [("left out", what) for what in graph.left_out]
    if op in ("all_gather", "reduce_scatter") and graph.computes > 1 and graph.balanced():
        lines += _optima(graph if op == "all_gather" else graph.reversed())
    found = bound(graph, op, message_bytes, root)
    lines.append(("bound", f"{op} of {show(message_bytes, 'B')}: {show(found.seconds, 's')}: {found.where}"))
    if graph.world_size > PACKED:
        lines.append(("left out", f"trees: {graph.world_size} ranks; packing takes too long above {PACKED}"))
    elif op != "all_to_all" and graph.computes > 1:
        lines += _trees(graph, op, root)
    return lines


def _links(graph: Graph) -> list[tuple[str, str]]:
    rates: dict[str, list[str]] = {node: [] for node in graph.nodes}
    for (source, target), capacity in graph.capacity.items():
        rates[graph.nodes[source]].append(f"{graph.nodes[target]} {float(capacity) * graph.bytes_per_s / 1e9:g}")
    return [(f"from {node}", f"to {', '.join(ends)} GB/s") for node, ends in rates.items() if ends]


def _optima(graph: Graph) -> list[tuple[str, str]]:
    best = optimum(graph)
    exact = f"{best.time}" if best.time.denominator < 10**6 else f"{float(best.time):.6g}"
    rate = f"{best.bytes_per_s(graph) / 1e9:.3f} GB/s with {best.k} trees a rank (1/x = {exact})"
    rates = ", ".join(f"{fixed_k(graph, k).bytes_per_s(graph) / 1e9:.3f} GB/s with {k}" for k in _FIXED)
    return [("optimum", rate), ("trees a rank", rates)]


def _trees(graph: Graph, op: str, root: int) -> list[tuple[str, str]]:
    if op == "all_reduce":
        plan = all_reduce_plan(graph)
        rate = f"{1e-9 / plan.seconds_per_byte:.3f} GB/s; the optimum is {1e-9 / plan.optimum_seconds_per_byte:.3f} GB/s"
        return [
            ("reduce", _forest(plan.reduce)),
            ("broadcast", _forest(plan.broadcast)),
            ("together", f"{rate}; {len(plan.parts())} parts"),
        ]
    return [("packed", _forest(packed(graph, op, root)))]


def _forest(forest: Forest) -> str:
    return f"{len(forest.trees)} trees, {forest.depth} edges deep at most, {1e-9 / forest.seconds_per_byte:.3f} GB/s"
