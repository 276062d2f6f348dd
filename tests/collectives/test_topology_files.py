"""Topologies from files: matrices as JSON and CSV, NCCL's XML; what is printed about them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from known_networks import a100, torus

from thinwire.collectives.synthesis.bounds import bound
from thinwire.collectives.synthesis.file import read_topology
from thinwire.collectives.synthesis.graph import Graph
from thinwire.collectives.synthesis.optimum import optimum
from thinwire.collectives.synthesis.summary import summary
from thinwire.errors import UserError


def rows_of(graph: Graph) -> list[list[float]]:
    size = range(len(graph.nodes))
    return [[float(graph.capacity.get((a, b), 0)) for b in size] for a in size]


def as_json(graph: Graph, path: Path) -> Path:
    switches = list(range(graph.computes, len(graph.nodes)))
    path.write_text(json.dumps({"capacity": rows_of(graph), "switches": switches, "names": list(graph.nodes)}))
    return path


def as_csv(graph: Graph, path: Path) -> Path:
    switches = ", ".join(map(str, range(graph.computes, len(graph.nodes))))
    lines = ["# what a person wrote", f"# switches: {switches}"] + [",".join(map(str, row)) for row in rows_of(graph)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.mark.parametrize(("write", "name"), [(as_json, "t.json"), (as_csv, "t.csv")])
def test_a_matrix_is_read_as_it_is(write: Callable[[Graph, Path], Path], name: str, tmp_path: Path) -> None:
    graph = a100(2)
    found = read_topology(write(graph, tmp_path / name))
    assert (found.capacity, found.ranks) == (graph.capacity, graph.ranks)
    assert optimum(found).bytes_per_s(found) / 1e9 == pytest.approx(346.667, abs=5e-4)


@pytest.mark.long
def test_an_all_gather_has_its_optimum_and_trees() -> None:
    lines = dict(summary(a100(2), "all_gather", 1 << 20))
    assert lines["optimum"] == "346.667 GB/s with 13 trees a rank (1/x = 3/65)"
    assert lines["trees a rank"].startswith("342.857 GB/s with 1, ")
    assert lines["packed"].endswith("346.667 GB/s") and " trees, " in lines["packed"]
    assert lines["bound"].startswith("all_gather of 1 MiB: 48.4 us: ")


def test_other_ops_have_their_bound() -> None:
    graph = torus(2, 4)
    for op in ("all_reduce", "reduce_scatter", "broadcast", "reduce", "all_to_all"):
        lines = dict(summary(graph, op, 1 << 20))
        seconds = bound(graph, op, 1 << 20).seconds
        assert f"{1e3 * seconds:.3g} ms" in lines["bound"] or f"{1e6 * seconds:.0f} us" in lines["bound"]
        assert ("packed" in lines or "together" in lines) == (op != "all_to_all")
    assert "the optimum is 2.133 GB/s" not in dict(summary(graph, "all_reduce", 1 << 20))["bound"]
    assert "the optimum is " in dict(summary(graph, "all_reduce", 1 << 20))["together"]


def test_what_is_wrong_in_a_file_is_said(tmp_path: Path) -> None:
    for name, text, message in [
        ("t.txt", "", "a topology is one of .json, .csv, .xml"),
        ("t.json", "{", "Invalid JSON"),
        ("t.json", '{"capacity": [[0, 1]]}', "a topology matrix is square"),
        ("t.json", '{"capacity": [[0, 0], [1, 0]]}', "no path from 'node0' to 'node1'"),
        ("t.json", '{"capacity": [[0, -1], [1, 0]]}', "a capacity is 0 or more"),
        ("t.json", '{"capacity": [[0]], "switch": [1]}', "switch: Extra inputs"),
        ("t.json", '{"capacity": [[0, 1], [1, 0]], "switches": [2]}', "there is no node 2 to be a switch"),
        ("t.csv", "0,1\n1,x\n", "line 2: '1,x' is not a row of numbers"),
        ("t.csv", "", "0 rows"),
        ("t.xml", "<a/>", "NCCL's topology begins with <system>"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_topology(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_topology(tmp_path / "none.json")
