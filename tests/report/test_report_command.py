"""`thinwire report RUN`: the table, the numbers as JSON, and the page."""

import json
import math
from pathlib import Path

import typer
from run_folders import make_run
from typer.testing import CliRunner

from thinwire.cli.report import report
from thinwire.cluster import load_cluster
from thinwire.report.network import MAX_LEAVES, picture
from thinwire.report.text import Scale, percent

app = typer.Typer()
app.command()(report)


def test_the_table_and_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("four-hosts-100mbit"), steps=30)
    done = CliRunner().invoke(app, [str(folder.path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for words in ("predicted", "measured", "waiting for the wire", "held-out loss", "bigram table: 2.451"):
        assert words in done.output
    assert "3 of 3 predicted transfers equal to the byte" in done.output
    assert "paced" in done.output and "no delay" in done.output
    assert str(folder.path / "report.html") in done.output
    assert (folder.path / "report.html").read_text().startswith("<!doctype html>")


def test_json_holds_the_same_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("two-racks"), steps=30, without=("cards.json",))
    done = CliRunner().invoke(app, [str(folder.path), "--json"])
    content = json.loads(done.output)
    rows = {row["name"]: row for row in content["rows"]}
    measured, predicted = folder.measured(), folder.predicted()
    assert measured and predicted
    assert rows["step_s"]["measured"] == measured.step_s and rows["step_s"]["predicted"] == predicted.step_s
    assert math.isclose(rows["step_s"]["difference"], predicted.step_s / measured.step_s - 1)
    assert content["held_out_loss"] == folder.evals()[-1].loss and content["baseline_loss"] == 2.451
    assert content["cards"] == [] and any("cards.json" in line for line in content["missing"])


def test_a_big_cluster_is_drawn_by_kind_and_nothing_is_lost() -> None:
    for name, hosts in (("dgx-h100-x128", 128), ("32-nodes-25gbe", 32), ("two-racks", 8), ("one-node-8gpu", 8)):
        seen = picture(load_cluster(name), ())
        nodes, stack = [], list(seen.roots)
        while stack:
            nodes.append(stack.pop())
            stack += nodes[-1].children
        assert sum(root.leaves for root in seen.roots) <= MAX_LEAVES
        assert sum(len(node.members) for node in nodes if node.kind == "host") == hosts


def test_numbers_are_written_for_people() -> None:
    assert percent(0.0312, signed=True) == "+3.1 %" and percent(-0.5, signed=True) == "−50 %"
    assert percent(0.0001) == "< 0.1 %" and percent(0.0) == "0.0 %"
    scale = Scale([0.6123, 0.0004])
    assert (scale.show(0.6123), scale.show(0.0004), scale.unit) == ("612.3", "0.4", "ms")
