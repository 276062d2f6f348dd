"""`thinwire plan`: what it says and writes; `thinwire train --plan auto`: what it chooses; one line for what makes no sense."""

import json
from pathlib import Path

import pytest
from test_collectives_command import without_torch

from command import TINY_RUN, one_line, thinwire
from thinwire.cli.main import app
from thinwire.config.run import load_run
from thinwire.errors import UserError
from thinwire.train.auto import auto


def test_accelerators_are_planned_without_torch(tmp_path: Path) -> None:
    """Why, what limits it, what one host and faster links would do; and a run that can be read."""
    run, numbers = tmp_path / "run.toml", tmp_path / "n.json"
    line = "2x2xa100-80gb@1Gbit/s"
    files = ("--write", str(run), "--json", str(numbers))
    done = without_torch("plan", "--cluster", line, "--model", "124M", "--tokens", "2.5B", "--price", "2", *files)
    assert done.returncode == 0, done.stderr
    starts = [text.split(":")[0] for text in done.stdout.splitlines()]
    for expected in ("a step", "limited by", "next best", "plain DDP", "one host alone", "10 x the links of 1 Gbit/s"):
        assert expected in starts
    assert "predicted, not run" in done.stdout and "dollars" in done.stdout
    found = json.loads(numbers.read_text())
    best = found["best"]
    assert best["step_s"] == pytest.approx(sum(best["terms"].values()))
    assert best["step_s_80"][0] < best["step_s"] < best["step_s_80"][1]
    assert best["time_s"] <= 1.01 * min(one["time_s"] for one in found["front"])  # of plans as fast the one that sends least
    config = load_run(run)
    assert config.cluster.file == line and config.layout.resolve(4, rare=config.sync.rare).world_size == 4
    assert config.train.micro_batch == best["run"]["train"]["micro_batch"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "nothing to plan for: give --cluster"),
        (("--cluster", "4x8xa100-80gb"), "there is no cluster '4x8xa100-80gb'"),
        (("--cluster", "4x8xa100-80gb@1Gbit/s", "--tokens", "many"), "--tokens many: write a number of tokens"),
        (("--cluster", "4x8xa100-80gb@1Gbit/s", "--model", "5b"), "model preset '5b' does not exist"),
        (("--cluster", "1x1xt4-16gb@1Gbit/s", "--model", "70b"), "no plan of"),
        (("--cluster", "2x1xt4-16gb@1Gbit/s", "--model", "1m", "--queue"), "leave --queue out"),
        (("--cluster", "laptop"), "has no flops_per_s, and no data sheet is known"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        app(["plan", *arguments], standalone_mode=False)
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_a_written_plan_trains_and_predicts_the_same_traffic(tmp_path: Path) -> None:
    """As the planner has it: the step at the cluster's rates, and every byte."""
    (tmp_path / "text.txt").write_text("a thin wire " * 2000, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(TINY_RUN, encoding="utf-8")
    cluster = "2x1xcpu:10Gflop/s@5Mbit/s"
    files = ("--queue", "--write", "run.toml", "--json", "n.json")
    done = thinwire("plan", "--run", "tiny.toml", "--cluster", cluster, "--set", "train.steps=3", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "n.json").read_text())
    best = found["best"]
    assert len(found["queues"]) == (8 if best["hosts"] == 2 else 0) and "parameter servers instead" in done.stdout
    assert all(0 < queue["utilisation"] < 1 for queue in found["queues"])
    trained = thinwire("train", "run.toml", "--set", "train.run=out", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    predicted = json.loads((tmp_path / "out" / "predicted.json").read_text())
    tokens = predicted["tokens_per_s"] * predicted["step_s"]
    if best["hosts"] == 2:
        assert predicted["wire_bytes_per_step"] == pytest.approx(best["wire_bytes_per_token"] * tokens)
    assert tokens == pytest.approx(best["tokens_per_s"] * best["step_s"])


def test_auto_keeps_the_batch_and_says_in_three_lines_what_it_chose() -> None:
    config, lines, plain_s = auto(None, ["train.micro_batch=2", "train.sequence=64", "train.steps=100"], "two-sites")
    batch = config.train.micro_batch * config.sync.accumulate * config.layout.resolve(4, rare=config.sync.rare).replicas
    assert batch == 8 and config.train.steps >= 100 and len(lines) == 3 and plain_s > 0
    assert lines[0].startswith("plan: ") and "limited by" in lines[1] and "plain DDP would take" in lines[2]
    with pytest.raises(UserError, match="laptop has none for its 4 ranks; measure it"):
        auto(None, [], "laptop")


def test_auto_keeps_plain_data_parallelism_where_predictions_cannot_tell_more_apart() -> None:
    """Two ranks on a link that is never in the way."""
    config, lines, plain_s = auto(None, ["train.micro_batch=2", "train.sequence=64"], "1x2xcpu:10Gflop/s@100Gbit/s")
    assert (config.layout.resolve(2, rare=False).data, config.sync.kind, config.compress.kind) == (2, "every_step", "none")
    assert plain_s == 0 and lines[-1] == "  that is what plain DDP does"


def test_auto_is_refused_where_there_is_a_plan_already(tmp_path: Path) -> None:
    done = thinwire("train", "--plan", "auto", "--resume", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "a resumed run keeps its plan" in one_line(done.stderr)
