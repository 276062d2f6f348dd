"""`[collectives]` in a run: it learns as on gloo's own, the ledger has what was predicted, a bad setting is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command import TINY_RUN, thinwire
from pool import Pool, Rank
from thinwire.config.run import load_run
from thinwire.environment import Environment
from thinwire.record import RunFolder
from thinwire.train.runtime import StopRequest
from thinwire.train.worker import Rank as TrainingRank
from thinwire.train.worker import train_as

RANKS = 3


def ran(folder: Path, kind: str, more: str = "") -> dict[str, Any]:
    """What a run of a few steps left behind, by the names of its files. more: of its run.toml."""
    folder.mkdir()
    (folder / "text.txt").write_text("it was a dark and stormy night, and the links were slow; " * 200)
    (folder / "run.toml").write_text(f'{TINY_RUN}steps = 4\nranks = {RANKS}\nrun = "run"\n[collectives]\nkind = "{kind}"\n{more}')
    done = thinwire("train", "run.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    files = {name: json.loads((folder / "run" / f"{name}.json").read_text()) for name in ("predicted", "ledger")}
    return {**files, "losses": [event["loss"] for event in events if event["event"] == "step"], "printed": done.stderr}


def check_predicted(run: dict[str, Any]) -> None:
    """Every transfer of training, codes and reports too, has in the ledger what was predicted, to the byte."""
    entries = [entry for entry in run["ledger"]["entries"] if entry["rank"] == 0]
    for transfer in run["predicted"]["transfers"]:
        (found,) = (entry for entry in entries if entry["label"] == transfer["label"] and entry["last_step"] >= 0)
        expected = transfer["wire_bytes_per_step"] * transfer["every"] / transfer["calls"]
        assert found["wire_bytes"] == pytest.approx(found["calls"] * expected, abs=1e-6), transfer


CHOOSING = "choosing collectives"
"""The label of what ranks send to try collectives out."""


@pytest.mark.long
def test_it_learns_alike_and_sends_what_was_predicted(tmp_path: Path) -> None:
    runs = {kind: ran(tmp_path / kind, kind) for kind in ("native", "measured", "priced")}
    assert runs["measured"]["losses"] == pytest.approx(runs["native"]["losses"], rel=1e-4)
    assert runs["priced"]["losses"] == pytest.approx(runs["native"]["losses"], rel=1e-4)
    assert f"among {RANKS} ranks" in runs["measured"]["printed"] and "among" not in runs["native"]["printed"]
    for run in runs.values():
        check_predicted(run)
    assert any(entry["label"] == CHOOSING for entry in runs["measured"]["ledger"]["entries"])
    assert not any(entry["label"] == CHOOSING for entry in runs["native"]["ledger"]["entries"])


def run_on_gloo(context: Rank, folder: Path) -> tuple[list[float], set[str]]:
    """The reference: losses, and labels in the ledger, of the same run on the pool's ranks, whose collectives are gloo's own."""
    config = load_run(folder / "run.toml", ["train.run=" + str(folder / "native"), "collectives.kind=native"])
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"source": str(folder / "text.txt"), "cache": str(folder / "cache")})}
    )
    context.ledger.step = -1
    rank = TrainingRank(
        config=config,
        environment=Environment(place=None, lab=None, error_file=None, cache_folder=folder, results=None),
        layout=config.layout.resolve(context.world_size, rare=False),
        ledger=context.ledger,
        device=torch.device("cpu"),
        stop=StopRequest(),
    )
    losses = [event.loss for event in RunFolder.open(train_as(rank, None).folder).steps()]
    return losses, {call.label for call in context.recorded()}


@pytest.mark.long
def test_measured_collectives_learn_as_gloo_does_and_send_what_was_predicted(ranks3: Pool, tmp_path: Path) -> None:
    run = ran(tmp_path / "run", "measured")
    check_predicted(run)
    assert f"among {RANKS} ranks" in run["printed"]
    assert any(entry["label"] == CHOOSING for entry in run["ledger"]["entries"])
    losses, labels = ranks3.run(run_on_gloo, tmp_path / "run")[0]
    assert run["losses"] == pytest.approx(losses, rel=1e-4) and CHOOSING not in labels


@pytest.mark.long
def test_codes_are_cut_where_it_was_predicted(tmp_path: Path) -> None:
    run = ran(tmp_path / "int4", "priced", '[compress]\nkind = "int4"\n')
    assert {"all_to_all", "all_gather", "all_reduce"} == {transfer["op"] for transfer in run["predicted"]["transfers"]}
    check_predicted(run)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    done = thinwire("train", "--set", "collectives.kind=best", cwd=tmp_path)
    assert done.returncode == 2 and "collectives.kind" in done.stderr and len(done.stderr.splitlines()) == 1
