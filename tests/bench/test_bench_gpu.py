"""The benchmark of devices, on CPUs: rows are whole, and replicas end equal where they exchange."""

import pytest

from thinwire.bench.gpu import DEFAULTS, run

SMALL = {"preset": "1m", "micro_batch": 1, "sequence": 16, "steps": 2, "numel": 1 << 16, "turns": 1}


@pytest.mark.long
@pytest.mark.timeout(120)
def test_rows_are_whole() -> None:
    rows = run(None, {**DEFAULTS, **SMALL, "methods": ["none", "ddp", "int4"], "kinds": ["int4", "sign"]})
    codecs, steps = ([row for row in rows if row["case"] == case] for case in ("codec", "step"))
    assert [row["codec"] for row in codecs] == ["int4", "sign"] and all(row["bits_equal"] for row in codecs)
    assert [row["method"] for row in steps] == ["none", "ddp", "int4"]
    assert steps[0]["weights_apart"] > 0 == steps[1]["weights_apart"] == steps[2]["weights_apart"]
    assert steps[2]["ratio"] == steps[1]["step_s"] / steps[2]["step_s"]
    assert not any("held" in row for row in rows), "there is no bar for CPUs"
