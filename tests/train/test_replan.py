"""Plans that change while a run trains: when, to what, on all ranks in one step, and as if the run had been resumed so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import losses, make_config, run_paced_on, sent_as_predicted

from command import thinwire
from pool import Pool, Rank
from thinwire.cluster import Cluster, dump_cluster, load_cluster
from thinwire.collectives.tuned.tuner import make_tuner
from thinwire.config.run import RunConfig, load_run
from thinwire.errors import UserError
from thinwire.lab.commands import Process, processes_for
from thinwire.lab.run import LabOptions, launch
from thinwire.record import Replanned, RunFolder
from thinwire.train.checkpoint.files import newest_whole, read_progress
from thinwire.train.replan import Collectives, Replanner
from thinwire.train.worker import Outcome

CLUSTER = "4x1xcpu:10Gflop/s@100Mbit/s"
DDP = ["sync.accumulate=4", "train.sequence=64", "train.micro_batch=2", "train.replan=true"]


def replanner(*changes: str, cluster: str | Cluster = CLUSTER) -> tuple[Replanner, list[float], float, tuple[int, ...]]:
    """With seconds of computing by rank, and of exchange, as predicted, and who has how many micro-batches."""
    config, found = load_run(None, [*DDP, *changes]), load_cluster(cluster) if isinstance(cluster, str) else cluster
    rates = found.declared_rates
    assert rates is not None
    made = Replanner(config, config.model.shape(), found, rates, 1.0)
    counts = (config.sync.accumulate,) * 4
    said = made.prediction(counts)
    return made, [said.compute_s] * 4, said.exposed_s, counts


def test_as_long_as_all_is_as_predicted_nothing_changes() -> None:
    made, compute_s, exchange_s, counts = replanner()
    assert [made.look(10, [1.4 * one for one in compute_s], 0.7 * exchange_s, counts) for _ in range(4)] == [0] * 4


def test_slow_links_want_codes_at_the_second_look_and_no_more_changes_then() -> None:
    made, compute_s, exchange_s, counts = replanner()
    assert made.look(10, compute_s, 8 * exchange_s, counts) == 0
    number = made.look(10, compute_s, 8 * exchange_s, counts)
    assert made.choices[number - 1].plan.codec in ("int8", "int4") and "exchange" in made.why
    assert made.prediction(counts).exposed_s == pytest.approx(8 * exchange_s, rel=0.02), "links are believed as they turned out"
    made.take(number)
    assert made.config.compress.kind == made.changes["compress"]["kind"] == made.choice.plan.codec
    now_s = made.prediction(counts).exposed_s
    assert now_s < 3 * exchange_s
    assert [made.look(10, compute_s, now_s, counts) for _ in range(3)] == [0] * 3


def test_chosen_collectives_are_chosen_anew_where_links_are_off_though_no_other_plan_is_better() -> None:
    plain, compute_s, exchange_s, counts = replanner()
    tuner = make_tuner(load_cluster(CLUSTER), "", measures=False)
    config = load_run(None, [*DDP, "collectives.kind=priced"])
    made = Replanner(config, config.model.shape(), load_cluster(CLUSTER), [1e10] * 4, 1.0, Collectives(tuner, {}))
    assert made.prediction(counts).exposed_s == pytest.approx(exchange_s), "nothing is decided: gloo's own"
    faster = exchange_s / 20
    assert [plain.look(10, compute_s, faster, counts) for _ in range(2)] == [0, 0]
    assert made.look(10, compute_s, faster, counts) == 0
    made.take(made.look(10, compute_s, faster, counts))
    assert made.choice == made.choices[0] and "collectives are chosen anew" in made.why
    made.choose()
    (rate,) = {link.bandwidth_bps.value for link in tuner.advisor.cluster.links}
    assert tuner.round == 1 and rate > 2e8, "for the links as they are believed"
    assert [made.look(10, compute_s, faster, counts) for _ in range(3)] == [0] * 3


def test_a_slow_rank_gets_fewer_micro_batches() -> None:
    made, compute_s, exchange_s, counts = replanner(cluster="4x1xcpu:1Gflop/s@1Gbit/s")
    slow = [compute_s[0], 3 * compute_s[1], *compute_s[2:]]
    assert made.look(10, slow, exchange_s, counts) == 0
    made.take(made.look(10, slow, exchange_s, counts))
    assert made.choice.by_speed
    found = made.assignment(counts, slow)
    assert found == (5, 1, 5, 5)


def test_rare_exchanges_are_looked_at_over_whole_periods() -> None:
    made, compute_s, exchange_s, counts = replanner("sync.kind=diloco", "sync.every=30", "train.steps=100000")
    for _ in range(6):
        assert made.look(10, compute_s, 0.0, counts) == made.look(10, compute_s, 0.0, counts) == 0
        assert made.look(10, compute_s, 3 * exchange_s, counts) == 0
    numbers = [made.look(10, compute_s, 40 * exchange_s, counts) for _ in range(6)]
    assert numbers[:5] == [0] * 5 and numbers[5]
    assert made.choices[numbers[5] - 1].plan.every > 30 or made.choices[numbers[5] - 1].plan.codec == "int4"


def test_what_cannot_change_is_refused() -> None:
    for changes, words in (
        (["sync.kind=local_sgd"], "train.replan = true with sync.kind = 'local_sgd'"),
        (["compress.kind=topk"], "compress.kind = 'topk'"),
        (["sync.assign=by_speed"], "without assign"),
        (["sync.kind=diloco", "sync.first=[[4, 2]]"], "all without first"),
        (["layout.pipe=2"], "replicas of one rank; leave it out with layout.pipe"),
    ):
        with pytest.raises(UserError, match=words):
            replanner(*changes)
    with pytest.raises(UserError, match=r"name the cluster in cluster\.file"):
        replanner(cluster=replace(load_cluster(CLUSTER), links=()))


def run_changed(context: Rank, config: RunConfig, cluster: Path, resume: Path | None, stop_after: int) -> Outcome:
    """A run in which rank 0 chooses int4 at the second report, and nothing when it is resumed, whatever was measured."""

    def look(made: Replanner, *_: object) -> int:
        reports.append(1)
        return 1 + [one.plan.codec for one in made.choices].index("int4") if len(reports) == 2 and not resume else 0

    reports: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replanner, "look", look)
        return run_paced_on(context, config, cluster, resume, stop_after)


@pytest.mark.parametrize(
    "sync",
    [pytest.param({"accumulate": 2, "bucket_bytes": 4096}, marks=pytest.mark.long), {"kind": "diloco", "every": 3}],
    ids=["ddp", "diloco"],
)
def test_all_ranks_change_in_one_step_and_a_resumed_run_goes_on_so(ranks2: Pool, tmp_path: Path, sync: dict) -> None:
    cluster, runs = tmp_path / "cluster.toml", {}
    dump_cluster(load_cluster("2x1xcpu:100Gflop/s@1Gbit/s"), cluster)
    for name, stop_after in (("whole", 10**9), ("cut", 7)):
        (tmp_path / name).mkdir()
        given = make_config(tmp_path / name, replan=True).model_dump() | {"sync": sync}
        config = RunConfig.model_validate(given)
        runs[name] = ranks2.run(run_changed, config, cluster, None, stop_after)[0].folder
    (event,) = [one for one in RunFolder.open(runs["whole"]).events() if isinstance(one, Replanned)]
    assert event.step == 3 and event.changes["compress"]["kind"] == "int4"
    assert any("gathered" in label for label in sent_as_predicted(runs["whole"]))
    progress = read_progress(newest_whole(runs["cut"] / "checkpoints"))
    assert progress.step == 7 and progress.replanned["compress"]["kind"] == "int4"
    assert ranks2.run(run_changed, config, cluster, runs["cut"], 10**9)[0].reason == "done"
    assert losses(runs["whole"]) == losses(runs["cut"])


STEPS, SLOW_AT = 26, 4
SLOWER = """
while [ "$(cat run/events.jsonl 2>/dev/null | grep -c '"event": "step"')" -lt {at} ]; do sleep 0.02; done
tc qdisc replace dev eth0 root tbf rate 8mbit burst 16384 latency 200ms
"""


@pytest.mark.lab
@pytest.mark.long
def test_a_link_that_becomes_slow_is_answered_by_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = make_config(tmp_path).data.source
    changes = [f"data.source={text}", "data.cache=cache", "train.run=run", f"train.steps={STEPS}", "train.eval_every=0"]
    changes += [
        "model.layers=2",
        "model.width=96",
        "model.heads=2",
        "train.log_every=2",
        "train.sequence=32",
        "train.dtype=float32",
    ]
    changes += ["train.micro_batch=1", "train.replan=true", "train.eval_tokens=64"]
    cluster = load_cluster("2x1xcpu:0.5Gflop/s@200Mbit/s")
    arguments = ["thinwire", "train", *(part for one in changes for part in ("--set", one))]
    slower = Process(cluster.hosts[1].name, ("sh", "-c", SLOWER.format(at=SLOW_AT)))
    result = launch(cluster, [*processes_for(cluster, arguments), slower], LabOptions())
    assert result.failure is None
    run = RunFolder.open(tmp_path / "run")
    changed = [one for one in run.events() if isinstance(one, Replanned)]  # on a busy machine what is not paced may be late, too
    assert changed and changed[-1].changes["compress"]["kind"] in ("int8", "int4")
    assert run.steps()[-1].wire_bytes < 0.5 * run.steps()[0].wire_bytes
    predicted = run.predicted()
    assert predicted is not None
    assert run.steps()[-1].wire_bytes == sum(row.wire_bytes_per_step for row in predicted.transfers)
    dump_cluster(cluster, tmp_path / "cluster.toml")
    further = ("--set", f"train.steps={STEPS + 4}", "--set", "cluster.file=cluster.toml")
    resumed = thinwire("train", "--resume", "run", *further, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    last = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    sent = [one["wire_bytes"] for one in last if one["event"] == "step"]
    assert sent[-1] == sent[-3], "in the codes that it had"
