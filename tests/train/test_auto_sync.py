"""sync.kind = "auto": the way of the measured front that is least in predicted time, and nothing but that way."""

from pathlib import Path

import pytest

from command import TINY_RUN, thinwire
from thinwire.collectives.ledger import Ledger
from thinwire.config.compress import NoCompression
from thinwire.config.run import RunConfig, load_run
from thinwire.config.sync import Auto
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.candidates import Problem
from thinwire.plan.cost import predict
from thinwire.plan.problem import problem_of
from thinwire.record import RunFolder
from thinwire.sync.front import ways
from thinwire.sync.make import make_synchroniser
from thinwire.train.auto import auto_sync
from thinwire.train.auto_sync import ALIKE, choices
from thinwire.train.outline import outline

SMALL = ["model.layers=1", "model.width=32", "model.heads=2", "train.sequence=32", "sync.kind=auto"]


def problem(rate: str, *changes: str) -> Problem:
    return problem_of(None, [*SMALL, *changes], f"4x1xcpu:100Mflop/s@{rate}", "", outline)


@pytest.mark.parametrize(
    "rate", ["5 Mbit/s", *(pytest.param(rate, marks=pytest.mark.long) for rate in ("10 Gbit/s", "20 kbit/s"))]
)
def test_the_least_time_to_the_loss_is_chosen(rate: str) -> None:
    """Beside seconds and steps that the test works out itself; of those about as soon, the one that sends most."""
    one = problem(rate)
    found, times = choices(one), dict[str, float]()
    best = found[0]
    config = load_run(None, [change for change in SMALL if "auto" not in change])
    for way in ways():
        if way.optimizer or "first" in way.run["sync"] or way.method == "powersgd4":  # which is timed anew by each
            continue
        layout, steps_s = Layout(outer=4) if way.every else Layout(data=4), []
        for buckets in [{}] if way.every else [{}, {"bucket_bytes": 2**17}]:
            sections = {"sync": way.run["sync"] | buckets, "compress": way.run["compress"]}
            named = RunConfig.model_validate(config.model_dump() | sections)
            setting, transfers, carrier = outline(named, one.shape, layout, one.cluster, (1e8,) * 4)
            steps_s.append(predict(setting, transfers, carrier=carrier).step_s)
        tokens = config.train.micro_batch * config.train.sequence * config.sync.accumulate
        times[way.method] = min(steps_s) * way.times(one.parameters, 4, config.train.steps, tokens=tokens)
    least = min(*times.values(), *(other.time_s for other in found))
    sent = {way.method: way.wire_bytes_per_token for way in ways()}
    assert best.time_s <= 1.001 * ALIKE * min(times.values())
    assert all(sent[name] <= best.way.wire_bytes_per_token for name, time in times.items() if time < 0.999 * ALIKE * least)


@pytest.mark.long
def test_thinner_links_are_sent_less() -> None:
    sent = [choices(problem(rate))[0].way for rate in ("10 Gbit/s", "5 Mbit/s", "20 kbit/s")]
    assert [one.wire_bytes_per_token for one in sent] == sorted((one.wire_bytes_per_token for one in sent), reverse=True)
    assert sent[0].every == 0 and sent[-1].every > 0


def test_what_is_not_known_or_not_chosen_is_refused_in_one_line(tmp_path: Path) -> None:
    bare = tmp_path / "cluster.toml"
    bare.write_text(
        'name = "bare"\n[[host]]\nname = "host{i}"\ncount = 2\ndevice = { kind = "cpu" }\ncard = { bandwidth_bps = "1 Gbit/s" }\n'
    )
    for changes, message in (
        (SMALL, r"links between the ranks, which are not known; measure them \(thinwire probe"),
        ([*SMALL, f"cluster.file={bare}"], r"sync.kind = 'auto' prices .* has none .*thinwire probe"),
        ([*SMALL, "compress.kind=int4"], "chooses codes too"),
        ([*SMALL, "sync.bucket_bytes=1024"], "chooses buckets too"),
        ([*SMALL, "sync.every=3"], "unknown key sync.every"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            auto_sync(None, changes, "")
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="name a kind"):
        make_synchroniser(Auto(), NoCompression(), Layout(data=2), Ledger())


def test_replicas_of_a_layout_that_may_only_exchange_rarely_do() -> None:
    found = choices(problem("10 Gbit/s", "layout.outer=4"))
    assert found and all(one.way.every for one in found)


@pytest.mark.long
def test_a_run_that_chooses_is_the_run_that_names_what_was_chosen(tmp_path: Path) -> None:
    """The same losses, the same bytes."""
    (tmp_path / "text.txt").write_text("a thin wire between the ranks " * 400)
    (tmp_path / "run.toml").write_text(TINY_RUN + "steps = 8\n")
    (tmp_path / "thin.toml").write_text(
        'name = "thin"\n[[host]]\nname = "host{i}"\ncount = 2\ndevice = { kind = "cpu", flops_per_s = "1 Gflop/s" }\n'
        'card = { bandwidth_bps = "100 kbit/s" }\n'
    )
    where = ("--set", "cluster.file=thin.toml", "--set", "train.run=auto")
    done = thinwire("train", "run.toml", "--set", "sync.kind=auto", *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("sync: "))
    way = next(way for way in ways() if line.startswith((f"sync: {way.method},", f"sync: {way.method} in buckets of")))
    kept = load_run(tmp_path / "auto" / "run.toml")
    assert kept.sync.kind == way.run["sync"]["kind"] and "R = " in line
    done = thinwire("train", "auto/run.toml", "--set", "train.run=named", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = [RunFolder.open(tmp_path / name) for name in ("auto", "named")]
    losses, bytes_sent = zip(*((list(run.evals()), [step.wire_bytes for step in run.steps()]) for run in runs), strict=True)
    assert [one.loss for one in losses[0]] == [one.loss for one in losses[1]] and bytes_sent[0] == bytes_sent[1]
