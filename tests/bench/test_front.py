"""`thinwire bench front`: what it makes of curves, and that a row of its table is the method that bears its name."""

import csv
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from thinwire.bench import front, sync
from thinwire.bench.registry import find
from thinwire.bench.sync_methods import keep, key_of, make_method
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.sync.front import COLUMNS, ways
from thinwire.train.auto_sync import with_way

DDP = [[20, 5.0], [40, 4.0], [80, 2.0], [100, 1.0]]


def learned(path: Path, options: dict[str, Any], losses: dict[str, list[list[float]]], sent: float, seed: int = 0) -> None:
    """As if `options["methods"]` had learned so."""
    for method in sync.make_methods(options):
        key = key_of(method, seed, options["ranks"], sync._curve(options))
        curve = losses[method.name]
        made = {"method": method.name, "seed": seed, "heldout_loss": curve[-1][1], "wire_bytes_per_step": sent, "curve": curve}
        keep(path, key, {**made, "weights_apart": 0.0, "torn": 0.0})


def test_rows_table_and_picture_of_what_was_learned(tmp_path: Path) -> None:
    """The target is DDP's loss after 80 of 100 steps; who is slower trains for 200, and is on the front by what it sends."""
    path, table, picture = (tmp_path / name for name in ("learned", "front.csv", "front.svg"))
    given = {"steps": 100, "ranks": 2, "methods": ["ddp", "int4", "diloco10"], "learned": str(path), "commit": "abc"}
    options: dict[str, Any] = {**{key: sync.DEFAULTS[key] for key in front.TIMED}, **front.DEFAULTS, **given}
    learned(path, {**options, "methods": ["ddp"]}, {"ddp": DDP}, 400.0)
    learned(path, {**options, "methods": ["int4"]}, {"int4": [[60, 3.0], [100, 1.0]]}, 100.0)
    learned(path, {**options, "methods": ["diloco10"]}, {"diloco10": [[60, 5.0], [100, 3.0]]}, 40.0)
    longer = {**options, "methods": ["diloco10"], "steps": 200, "target": 0.4}
    learned(path, longer, {"diloco10": [[100, 4.0], [140, 2.0], [200, 0.5]]}, 30.0)
    rows = {row["method"]: row for row in find("front")(None, given | {"table": str(table), "picture": str(picture)})}
    assert {name: row["steps_over_ddp"] for name, row in rows.items()} == {
        "ddp": 1.0,
        "int4": pytest.approx(1.0),
        "diloco10": pytest.approx(140 / 80),
    }
    tokens = 2 * options["micro_batch"] * options["sequence"]
    assert [row["wire_bytes_per_token"] * tokens for row in rows.values()] == pytest.approx([400, 100, 30])
    assert rows["diloco10"]["final_loss_ratio"] == 3.0 and rows["int4"]["final_loss_ratio"] == 1.0
    assert [row["on_front"] for row in rows.values()] == [False, True, True]
    written = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["method"] for row in written] == list(rows) and tuple(written[0]) == COLUMNS and written[0]["commit"] == "abc"
    names = [element.text for element in ElementTree.parse(picture).iter() if element.tag.endswith("text")]
    assert {"ddp", "int4", "diloco10"} <= set(names)


def test_a_seed_that_is_too_slow_trains_once_more_and_the_others_count_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "learned"
    given = {"steps": 100, "ranks": 2, "methods": ["ddp", "diloco10"], "learned": str(path), "longer": [2], "seeds": 2}
    options: dict[str, Any] = {**{key: sync.DEFAULTS[key] for key in front.TIMED}, **front.DEFAULTS, **given}
    curves = {"ddp": DDP, "diloco10": [[60, 3.0], [100, 1.0]]}, {"ddp": DDP, "diloco10": [[60, 5.0], [100, 3.0]]}
    for seed, of_seed in enumerate(curves):
        learned(path, options, of_seed, 40.0, seed)
        longer = {**options, "methods": ["diloco10"], "steps": 200, "target": 0.4}
        learned(path, longer, {"diloco10": [[100, 4.0], [140, 2.0], [200, 0.5]]}, 30.0, seed)
    rows = {row["method"]: row for row in find("front")(None, given)}
    assert rows["diloco10"]["steps_over_ddp"] == pytest.approx((80 + 140) / 2 / 80)
    assert rows["diloco10"]["wire_bytes_per_token"] * 2 * options["micro_batch"] * options["sequence"] == pytest.approx(35)


def test_what_cannot_be_compared_is_refused() -> None:
    for options, message in (
        ({"methods": ["int4"]}, "compares with ddp"),
        ({"target": 1.5}, "between 0 and 1, not 1.5"),
        ({"methods": ["ddp", "diloco10-first25x2"]}, "first = 25 steps every 2"),
    ):
        with pytest.raises(UserError, match=message):
            find("front")(None, options)
    with pytest.raises(UserError, match="leave --cluster out"):
        find("front")("four-hosts-100mbit", {})


def test_a_row_of_the_shipped_front_is_the_method_of_its_name() -> None:
    """The very sections of run.toml, so the same bytes and the same losses."""
    base = {"model": {"layers": 2}, "train": {"learning_rate": 2e-3}}
    assert len(ways()) > 5 and ways()[0].method == "ddp" and all(way.steps_over_ddp > 0.9 for way in ways())
    for way in ways():
        named = make_method(way.method, base).config
        given = RunConfig.model_validate({**base, "train": {**base["train"], "optimizer": {"kind": way.optimizer or "adamw"}}})
        chosen = with_way(given, way)
        assert (chosen.sync, chosen.compress) == (named.sync, named.compress), way.method
        assert chosen.train == named.train and chosen == named, way.method
