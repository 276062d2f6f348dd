"""NCCL's tuner file: what was measured and nothing else, read back as it was written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.collectives.nccl_csv import FIELDS, Measured, ranges, read_measured, to_csv
from thinwire.errors import UserError

settings = st.tuples(st.sampled_from(["ring", "tree", "nvls"]), st.sampled_from(["ll", "simple"]), st.sampled_from([-1, 4]))


def row(size: int, seconds: float, algo: str = "ring", proto: str = "simple", **more: int) -> Measured:
    return Measured.model_validate(
        {"coll": "allreduce", "bytes": size, "seconds": seconds, "algo": algo, "proto": proto, "nodes": 2, "ranks": 16} | more
    )


def as_the_plugin_reads(text: str) -> list[tuple[str | int, ...]]:
    """Lines that do not begin with #, split at commas; names as they are, the rest whole numbers."""
    lines = [line.split(",") for line in text.splitlines() if line and not line.startswith("#")]
    assert all(len(line) == 10 for line in lines)
    return [(line[0], int(line[1]), int(line[2]), line[3], line[4], *map(int, line[5:])) for line in lines]


def test_the_fastest_of_each_size_and_no_size_between_winners() -> None:
    rows = [row(1024, 2e-5), row(1024, 1e-5, "tree", "ll"), row(4096, 1.5e-5, "tree", "ll"), row(4096, 2e-5)]
    rows += [row(1 << 20, 3e-4, "tree"), row(1 << 20, 2e-4, channels=8), row(1 << 24, 1e-3, channels=8)]
    assert to_csv(ranges(rows)).splitlines() == [
        "# coll,min,max,algo,proto,channels,nNodes,nRanks,numPipeOps,regBuff",
        "allreduce,1024,4096,tree,ll,-1,2,16,-1,-1",
        "allreduce,1048576,16777216,ring,simple,8,2,16,-1,-1",
    ]


@given(
    rows=st.lists(
        st.builds(
            lambda size, seconds, setting, nodes: row(size, seconds, setting[0], setting[1], channels=setting[2], nodes=nodes),
            st.integers(0, 1 << 33),
            st.floats(1e-6, 1.0),
            settings,
            st.sampled_from([1, 2]),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_every_measured_size_gets_its_fastest_setting(rows: list[Measured]) -> None:
    lines = ranges(rows)
    assert as_the_plugin_reads(to_csv(lines)) == [tuple(line[field] for field in FIELDS) for line in lines]
    for one in rows:
        fits = [line for line in lines if line["nodes"] == one.nodes and line["min"] <= one.bytes <= line["max"]]
        same = [other for other in rows if (other.bytes, other.nodes) == (one.bytes, one.nodes)]
        fastest = min(other.seconds for other in same)
        assert len(fits) == 1
        assert any(
            other.seconds == fastest
            and (other.algo, other.proto, other.channels) == (fits[0]["algo"], fits[0]["proto"], fits[0]["channels"])
            for other in same
        )
        assert {fits[0]["min"], fits[0]["max"]} <= {other.bytes for other in rows}


def test_what_is_not_understood_is_said() -> None:
    for text, message in [
        ("[]", "there are no measurements; a row has coll, algo, "),
        ('[{"coll": "allreduce"}]', "these are not measurements: 0.algo: Field required"),
        ("{", "these are not measurements: rows: "),
        (json.dumps([row(4, 1.0).model_dump() | {"seconds": 0}]), "0.seconds: Input should be greater than 0"),
    ]:
        with pytest.raises(UserError, match=message):
            read_measured(text)
