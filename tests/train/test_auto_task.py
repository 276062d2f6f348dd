"""`auto` of a task: the way of the front that is least in predicted time, and the transfers that a run of it has."""

import json
from pathlib import Path

import pytest
import tomli_w
from small_run import run_training

from pool import Pool
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.train.auto import auto
from thinwire.train.auto_sync import choices, with_way
from thinwire.train.auto_task import task_problem

CHEAP = "2x1xcpu:50Gflop/s@10 Gbit/s"
THIN = "2x1xcpu:50Gflop/s@1 Mbit/s"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run.toml of sentiment."""
    records = [{"text": f"a {word} day with number {row}", "label": word} for row in range(20) for word in ("fine", "sad")]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    content = {
        "task": {"kind": "sentiment", "source": str(tmp_path / "own.jsonl"), "width": 32, "layers": 1},
        "data": {"cache": str(tmp_path / "cache")},
        "train": {"steps": 4, "micro_batch": 4, "sequence": 16, "log_every": 1, "run": str(tmp_path / "run")},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    return tmp_path / "run.toml"


def test_thin_links_are_sent_less_and_what_else_was_asked_stays(run: Path) -> None:
    free, found = (auto(run, ["train.steps=9"], where) for where in (CHEAP, THIN))
    thin = found.config
    assert thin.sync.kind != "every_step" or thin.compress.kind != "none"
    assert (thin.train.steps, thin.train.micro_batch, thin.task) == (9, 4, free.config.task) and thin.cluster.file == THIN
    assert found.lines[0].startswith("sync: ") and "R = " in found.lines[0] and found.plain_s > 0


def test_what_was_priced_is_what_a_run_predicts(run: Path, ranks2: Pool, tmp_path: Path) -> None:
    config = RunConfig.model_validate(auto(run, [], THIN).config.model_dump(exclude={"cluster"}))
    problem = task_problem("it", config, [], THIN, tmp_path)
    assert problem.outline is not None and problem.rates is not None
    _, transfers, _ = problem.outline(config, problem.shape, config.laid_out(2), problem.cluster, problem.rates)
    folder = ranks2.run(run_training, config)[0].folder
    predicted = json.loads((folder / "predicted.json").read_text())["transfers"]
    assert [(one["label"], one["op"], one["message_bytes"]) for one in predicted] == [
        (one.label, one.op, one.message_bytes) for one in transfers
    ]


def test_the_choice_is_the_least_of_all_ways(run: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate({**auto(run, [], THIN).config.model_dump(), "sync": {}, "compress": {}})
    problem = task_problem("it", config, [], THIN, tmp_path)
    found = choices(problem)
    assert {"ddp", "int4"} <= {one.way.method for one in found} and problem.parameters == problem.passes.num_parameters
    assert [one.time_s for one in found] == sorted(one.time_s for one in found)
    assert with_way(config, found[0].way).task == config.task


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["compress.kind=int4"], "--plan auto chooses how ranks of a task exchange, and so compress.kind"),
        (["sync.kind=diloco"], "and so sync.kind; leave one of the two out"),
        (["layout.shard=2"], "wants a task's whole model on each rank; leave layout.shard = 2 out"),
    ],
)
def test_what_is_not_chosen_is_refused_in_one_line(run: Path, changes: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        auto(run, changes, THIN)
    assert said in str(refused.value) and "\n" not in str(refused.value)
