"""Whole runs that compute activations again give the losses of those that keep them, to the bit, and send what was predicted."""

from pathlib import Path
from typing import Any

import pytest
from small_run import config_of, losses, run_training, scores

from pool import Pool
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json

pytestmark = pytest.mark.long  # the first pass that is computed again loads the compiler; tests/parallel has the law

MODEL = {"layers": 3, "width": 20, "heads": 5, "vocabulary": 257, "hidden": 41}
EXPERTS = {**MODEL, "experts": 4, "dtype": "float32"}
CASES: list[tuple[str, dict[str, int], str, dict[str, Any]]] = [
    ("ranks2", {"data": 2}, "selective", {}),
    ("ranks2", {"tensor": 2}, "selective", {}),
    ("ranks2", {"pipe": 2}, "full", {"pipeline": {"schedule": "interleaved"}}),
    ("ranks2", {"outer": 2}, "full", {"sync": {"kind": "diloco", "every": 3}}),
    ("ranks2", {"data": 2}, "full", {"compress": {"kind": "int4"}}),
    ("ranks4", {"tensor": 2, "pipe": 2}, "full", {}),
    ("ranks2", {"tensor": 2}, "full", {"tensor": {"sums": "int8"}, "model": {**MODEL, "dtype": "float32"}}),
    ("ranks2", {"seq": 2}, "selective", {}),
    ("ranks4", {"seq": 2, "pipe": 2}, "full", {}),
    ("ranks2", {"shard": 2}, "full", {}),
    ("ranks2", {"shard": 2}, "selective", {"sharded": {"reshard": "never"}}),
    ("ranks2", {"expert": 2}, "full", {"model": EXPERTS}),
    ("ranks2", {"expert": 2}, "selective", {"model": EXPERTS, "experts": {"slots": "int8"}}),
]
AGAIN = {"tensor": "activation", "seq": "keys and values", "expert": "experts' slots"}
"""What of these axes travels again: of tensor ranks only where blocks are computed again in full."""


@pytest.mark.parametrize(("pool", "layout", "kind", "sections"), CASES, ids=lambda value: str(value))
def test_losses_are_the_same_bits_and_traffic_is_predicted(
    request: pytest.FixtureRequest, tmp_path: Path, pool: str, layout: dict[str, int], kind: str, sections: dict[str, Any]
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    folders = []
    for setting in ("none", kind):
        config = config_of(tmp_path / setting, layout, train={"recompute": setting}, **{"model": MODEL, **sections})
        folders.append(ranks.run(run_training, config)[0].folder)
    plain, again = folders
    assert losses(again) == losses(plain) and scores(again) == scores(plain) and len(losses(again)) == 12
    facts, before = (as_json(Facts(RunFolder.open(folder))) for folder in (again, plain))
    rows = [row for row in facts["transfers"] if row["predicted_bytes"] is not None]
    assert rows and not [row for row in rows if not row["equal"]]
    for axis, label in AGAIN.items():
        sent, sent_before = (
            sum(row["ledger_bytes_high"] for row in one["transfers"] if row["label"].startswith(label)) for one in (facts, before)
        )
        assert sent > sent_before if axis in layout and (kind == "full" or axis != "tensor") else sent == sent_before
