"""Known topologies for the tests of synthesis: boxes, cube meshes, tori, stars, racks, random ones. Capacities in GB/s."""

from collections.abc import Hashable, Sequence
from fractions import Fraction

from hypothesis import strategies as st

from thinwire.collectives.synthesis.graph import Graph, matrix_graph

Cable = tuple[Hashable, Hashable, int | float | Fraction]


def cables(name: str, computes: Sequence[Hashable], switches: Sequence[Hashable], both_directions: Sequence[Cable]) -> Graph:
    at = {node: place for place, node in enumerate([*computes, *switches])}
    rows: list[list[int | float | Fraction]] = [[0] * len(at) for _ in at]
    for a, b, capacity in both_directions:
        rows[at[a]][at[b]] += capacity
        rows[at[b]][at[a]] += capacity
    return matrix_graph(rows, switches=range(len(computes), len(at)), name=name, names=[str(node) for node in at])


def a100(boxes: int) -> Graph:
    """8 GPUs on an NVSwitch at 300; with more boxes a card of 25 for each GPU, even and odd ones on two switches."""
    gpus = [(box, gpu) for box in range(boxes) for gpu in range(8)]
    links: list[Cable] = [(gpu, f"nvswitch{gpu[0]}", 300) for gpu in gpus]
    switches = [f"nvswitch{box}" for box in range(boxes)]
    if boxes > 1:
        cards = {gpu: f"card{gpu}" for gpu in gpus}
        links += [(gpu, card, 25) for gpu, card in cards.items()]
        links += [(card, f"ib{gpu[1] % 2}", 25) for gpu, card in cards.items()]
        switches += [*cards.values(), "ib0", "ib1"]
    return cables(f"a100x{boxes}", gpus, switches, links)


def mi250(boxes: int) -> Graph:
    """8 packages of two GPUs joined by 4 links of 50, each GPU with 3 more links of 50 to others, doubled for some.

    The degrees are those of the machine and decide its optimum (a package is the narrowest cut: 6 links); who is joined to whom
    outside of packages is one choice of several.
    """
    gpus = [(box, gpu) for box in range(boxes) for gpu in range(16)]
    links: list[Cable] = []
    for box in range(boxes):
        links += [((box, 2 * package), (box, 2 * package + 1), 200) for package in range(8)]
        links += [((box, 2 * package + 1), (box, 2 * (package + 1) % 16), 50) for package in range(8)]
        links += [((box, a), (box, b), 100) for a, b in ((0, 5), (8, 13))]
        links += [((box, a), (box, b), 50) for a, b in ((2, 7), (2, 11), (10, 15), (10, 3), (4, 9), (4, 1), (12, 1), (12, 9))]
        links += [((box, a), (box, b), 50) for a, b in ((6, 3), (6, 15), (14, 7), (14, 11))]
    if boxes > 1:
        links += [(gpu, "ib", 16) for gpu in gpus]
    return cables(f"mi250x{boxes}", gpus, ["ib"] if boxes > 1 else [], links)


def dgx1v() -> Graph:
    """The hybrid cube mesh of 8 V100, 6 NVLinks of 25 each."""
    one = [(0, 1), (0, 2), (1, 3), (4, 5), (4, 6), (5, 7), (2, 6), (3, 7)]
    two = [(0, 3), (1, 2), (4, 7), (5, 6), (0, 4), (1, 5), (2, 3), (6, 7)]
    return cables("dgx-1v", range(8), [], [(a, b, 25) for a, b in one] + [(a, b, 50) for a, b in two])


def torus(rows: int, columns: int) -> Graph:
    """Unit links; between two rows there is one link, not two."""
    nodes = [(row, column) for row in range(rows) for column in range(columns)]
    pairs = {frozenset((node, next)) for node in nodes for next in _next(node, rows, columns)}
    return cables(f"torus-{rows}x{columns}", nodes, [], [(*sorted(pair), 1) for pair in pairs])


def _next(node: tuple[int, int], rows: int, columns: int) -> list[tuple[int, int]]:
    return [((node[0] + 1) % rows, node[1]), (node[0], (node[1] + 1) % columns)]


def star(rates: Sequence[float]) -> Graph:
    return cables("star", range(len(rates)), ["switch"], [(node, "switch", rate) for node, rate in enumerate(rates)])


def racks(count: int, hosts: int, uplink: float) -> Graph:
    nodes = [(rack, host) for rack in range(count) for host in range(hosts)]
    links: list[Cable] = [(node, f"rack{node[0]}", 1) for node in nodes]
    links += [(f"rack{rack}", "core", uplink) for rack in range(count)]
    return cables("racks", nodes, [*(f"rack{rack}" for rack in range(count)), "core"], links)


@st.composite
def small_graphs(draw: st.DrawFn, balanced: bool = True) -> Graph:
    """2 to 5 nodes that compute, up to 3 switches, joined by a random tree and cables; balanced: equal in both directions."""
    computes, switches = draw(st.integers(2, 5)), draw(st.integers(0, 3))
    size = computes + switches
    rate = st.integers(1, 6)
    rows: list[list[int | float | Fraction]] = [[0] * size for _ in range(size)]
    order = draw(st.permutations(range(size)))
    for place in range(1, size):
        a, b = order[place], order[draw(st.integers(0, place - 1))]
        rows[a][b] = draw(rate)
        rows[b][a] = rows[a][b] if balanced else draw(rate)
    for a, b in draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=6)):
        if a != b:
            rows[a][b] = draw(rate)
            rows[b][a] = rows[a][b] if balanced else draw(rate)
    return matrix_graph(rows, switches=range(computes, size), name="small")
