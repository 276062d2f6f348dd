"""`thinwire bench sync`: names of methods, links, bars; the stock peers' bytes; and one small comparison, whole."""

import json
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

from command import thinwire
from pool import Pool, Rank
from thinwire.bench import ranks
from thinwire.bench.peers.sync_contenders import check_equal
from thinwire.bench.ranks import progress_shown, report_progress
from thinwire.bench.registry import find
from thinwire.bench.stock_sync import SILENT, StockSync
from thinwire.bench.sync import DEFAULTS, Link, _curve, find_links, shaped
from thinwire.bench.sync_methods import compress_section, keep, kept, key_of, make_method
from thinwire.bench.sync_rows import (
    Bar,
    add_targets,
    bar_rows,
    loss_at,
    rate_needed,
    rate_predicted,
    rate_rows,
    steps_to,
    target_rows,
)
from thinwire.cli.main import app
from thinwire.cluster import load_cluster
from thinwire.config.sync import Streaming
from thinwire.errors import UserError
from thinwire.units import show

WIDTH, BIAS = 64, 48


@pytest.mark.parametrize("name, hook, rank", [("ddp", "", 0), ("ddp-fp16", "fp16", 0), ("ddp-powersgd16", "powersgd", 16)])
def test_stock_names(name: str, hook: str, rank: int) -> None:
    method = make_method(name, {}, fused=True)
    assert (method.hook, method.rank, method.config.compress.kind) == (hook, rank, "none")


def test_our_names() -> None:
    def compress(name: str) -> dict[str, Any]:
        method = make_method(name, {"train": {"steps": 7}})
        assert method.hook is None and method.config.train.steps == 7
        return method.config.compress.model_dump()

    assert compress("none") == {"kind": "none"}
    plain = compress("int4")
    assert plain["kind"] == "int4" and all(plain[option] is None for option in ("feedback", "vectors", "exclude"))
    assert compress("int4-nofeedback") == plain | {"feedback": False}
    assert compress("int4-all-fused") == plain | {"exclude": (), "vectors": True, "fused": True}
    sync = make_method("int8-512k", {"sync": {"accumulate": 3, "bucket_bytes": 1}}).config.sync
    assert (sync.kind, sync.accumulate, sync.bucket_bytes) == ("every_step", 3, 512 * 1024)
    assert compress("codebook2")["kind"] == "codebook2"
    assert compress_section("powersgd4") == {"kind": "powersgd", "rank": 4}
    assert make_method("demo8", {}).config.train.optimizer.kind == "signsgd"
    assert not make_method("topk", {}, fused=True).config.compress.model_dump().get("fused")


@pytest.mark.parametrize(
    "name, message",
    [
        ("int5", "method 'int5'.*compress.*'int5'"),
        ("ddp-bf16", "method 'ddp-bf16'"),
        ("int4-fast", "there is no variant 'fast'; there are all, nofeedback, noprecondition, fused, and 256k"),
        ("none-all", "method 'none-all'"),
    ],
)
def test_unknown_names_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        make_method(name, {})
    assert "\n" not in str(refused.value)


def test_a_benchmark_says_what_is_wrong_before_it_starts_anything() -> None:
    run = find("sync")
    for options, message in (
        ({"methods": ["ddp", "ddp"]}, "each once"),
        ({"methods": ["int5"]}, "int5"),
        ({"seeds": 0}, "seeds = 0"),
        ({"links": ["1 Mbit/s"]}, "--cluster"),
        ({"sequence": 10_000}, "longer than model.context"),
        ({"method": ["ddp"]}, "this benchmark has the options methods, seeds"),
    ):
        with pytest.raises(UserError, match=message):
            run(None, options)


@pytest.mark.parametrize("arguments", [("lab", "--seeds", "3"), ("ddp", "--methods", "int4"), ("probe", "--links", "1 Mbit/s")])
def test_conveniences_are_refused_by_benchmarks_that_do_not_have_them(arguments: tuple[str, ...]) -> None:
    refused = CliRunner().invoke(app, ["bench", *arguments]).exception
    assert isinstance(refused, UserError) and "this benchmark has the options" in str(refused)


def test_links_replace_cards_and_leave_cables_between_switches() -> None:
    racks = load_cluster("two-racks")
    hosts = {host.name for host in racks.hosts}
    assert find_links([], racks)[0].given and shaped(racks, find_links([], racks)[0]) is racks
    slow, free = find_links(["1 Mbit/s", "unshaped"], racks)
    assert (slow, free) == (Link(1e6), Link(None))
    with pytest.raises(UserError, match="each once"):
        find_links(["1 Mbit/s", 1e6], racks)
    with pytest.raises(UserError, match=r"name the unit, e\.g\. 10 Mbit/s"):
        find_links([10], racks)
    for link, rate in ((slow, 1e6), (free, 100e9)):
        made = shaped(racks, link)
        assert [replace(cable, bandwidth_bps=old.bandwidth_bps) for cable, old in zip(made.links, racks.links, strict=True)] == [
            *racks.links
        ]
        for cable, old in zip(made.links, racks.links, strict=True):
            assert cable.bandwidth_bps.value == (rate if hosts & {cable.source, cable.target} else old.bandwidth_bps.value)


def test_bars_compare_means_where_both_are_measured() -> None:
    def row(method: str, seed: int, step_s: float, loss: float, link_bps: float | None = 1e8) -> dict[str, Any]:
        return {"method": method, "seed": seed, "link_bps": link_bps, "step_s": step_s, "heldout_loss": loss}

    rows = [row("none", 0, 0.9, 9.0), row("ddp", 0, 1.0, 2.0), row("ddp", 1, 1.0, 3.0)]
    rows += [row("int4", 0, 0.2, 2.6), row("int4", 1, 0.2, 2.4), row("int4", 0, 1.0, 2.5, None), row("ddp", 0, 1.0, 2.5, None)]
    bars = [
        Bar("int4", ("ddp", "none"), "heldout_loss", 1.005),
        Bar("int4", ("ddp",), "step_s", 0.25, link_bps=1e8),
        Bar("int4", ("ddp",), "step_s", 0.5),
        Bar("powersgd4", ("ddp",), "step_s", 1.0),
    ]
    found = [(made["ratio"], made["bar"], made["held"]) for made in bar_rows(rows, bars)]
    assert found == [
        (pytest.approx(1.0), 1.005, True),
        (pytest.approx(0.2), 0.25, True),
        (pytest.approx(0.2), 0.5, True),
        (1.0, 0.5, False),
    ]


def test_progress_is_shown_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown(tmp_path / "progress", "learning"):
        for part in (1, 2):
            report_progress(tmp_path / "progress", part, 2, f"part {part}")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["learning: 1 of 2: part 1", "learning: 2 of 2: part 2"] and not printed.out


@pytest.mark.long
def test_what_goes_on_for_long_is_said_ever_more_rarely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start, and from each report, after 0.1 s, 0.2 s and so on."""
    monkeypatch.setattr(ranks, "QUIET_S", 0.1)
    monkeypatch.setattr(ranks, "POLL_S", 0.02)
    with progress_shown(tmp_path / "progress", "racing"):
        time.sleep(0.5)
        report_progress(tmp_path / "progress", 0, 1, "native")
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    reported = lines.index("racing: 0 of 1: native")
    for part, what in ((lines[:reported], "starting"), (lines[reported + 1 :], "native")):
        assert all(re.fullmatch(rf"racing: {what}: \d s so far", line) for line in part) and 2 <= len(part) <= 5


def _stock_bytes(context: Rank, hook: str, approximation: int) -> tuple[int, bool]:
    """What the first step after the rehearsal sends, and whether the replicas have the same gradient then."""
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.Linear(WIDTH, BIAS))
    mesh = init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("data",))
    sync = StockSync(hook, approximation, dist.group.WORLD)
    batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(context.rank))
    with ExitStack() as stack:
        replica = stack.enter_context(sync.attached(model, torch.optim.SGD(model.parameters(), 0.1), mesh))
        with sync.rehearsal():
            for _ in range(2):
                replica(batch).square().sum().backward()
        model.zero_grad(set_to_none=False)
        sent = context.ledger.sent_bytes
        for micro in range(2):
            with sync.microbatch(last=micro == 1):
                replica(batch).square().sum().backward()
        sent = context.ledger.sent_bytes - sent
    gradients: list[Any] = [None] * context.world_size
    dist.all_gather_object(gradients, [parameter.grad for parameter in model.parameters()])
    return sent, all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("hook, value_bytes", [("", 4), ("fp16", 2), (SILENT, 0)])
@pytest.mark.long
def test_stock_peers_send_every_value_once_per_step(ranks2: Pool, hook: str, value_bytes: int) -> None:
    """On two ranks an all-reduce sends as many bytes as its message has."""
    values = WIDTH * WIDTH + WIDTH * BIAS + BIAS
    assert ranks2.run(_stock_bytes, hook, 0) == [(value_bytes * values, hook != SILENT)] * 2


@pytest.mark.long
def test_stock_powersgd_compresses_the_first_step(ranks2: Pool) -> None:
    """r (n + m) values of each matrix, and the bias as it is."""
    values = 2 * (WIDTH + WIDTH) + 2 * (WIDTH + BIAS) + BIAS
    assert ranks2.run(_stock_bytes, "powersgd", 2) == [(4 * values, True)] * 2


def _checked(context: Rank, apart: bool) -> str:
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] += float(apart) * context.rank
    try:
        check_equal(model, "int4, seed 0: after training")
    except SystemExit as error:
        return str(error.code)
    return "equal"


@pytest.mark.long
def test_replicas_that_differ_are_found(ranks2: Pool) -> None:
    assert ranks2.run(_checked, False) == ["equal"] * 2
    assert all(line.startswith("int4, seed 0: after training the replicas differ") for line in ranks2.run(_checked, True))


@pytest.mark.long
def test_a_small_comparison_is_whole(tmp_path: Path) -> None:
    """On two ranks ours without compression rounds exactly as DDP does: the losses are the same number. bf16 is known before."""
    learned = tmp_path / "learned"
    small: dict[str, Any] = {
        "ranks": 2,
        "model": "{layers=1, width=32, heads=2}",
        "sequence": 16,
        "steps": 2,
        "eval_tokens": 64,
        "turns": 1,
        "turn_s": 0,
        "target": 0.5,
        "learned": str(learned),
    }
    base: dict[str, dict[str, Any]] = {"model": {"preset": DEFAULTS["preset"], "layers": 1, "width": 32, "heads": 2}}
    base["sync"] = {"accumulate": 1, "bucket_bytes": DEFAULTS["bucket_bytes"]}
    base["train"] = {key: DEFAULTS[key] for key in ("learning_rate", "warmup_steps", "micro_batch")}
    base["train"] |= {key: small[key] for key in ("sequence", "steps", "eval_tokens")} | {"dtype": "float32"}
    invented = {"method": "bf16", "seed": 0, "heldout_loss": 42.0, "wire_bytes_per_step": 7.0, "curve": [[2, 42.0]]}
    keep(learned, key_of(make_method("bf16", base), 0, 2, [1, 2]), {**invented, "weights_apart": 0.0, "torn": 0.0})
    options = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    done = thinwire("bench", "sync", "--methods", "ddp,none,int4,bf16,none-batch2", "--json", "rows.json", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = {row["method"]: row for row in rows if row["case"] == "measured"}
    assert list(measured) == ["ddp", "none", "int4", "bf16", "none-batch2"]
    assert [line["method"] for line in kept(learned).values()] == ["bf16", "ddp", "none", "int4", "none-batch2"]
    ddp, none, int4, bf16, twice = measured.values()
    assert (bf16["heldout_loss"], bf16["wire_bytes_per_step"], bf16["steps_to_target"]) == (42.0, 7.0, None)
    assert ddp["heldout_loss"] == none["heldout_loss"] != int4["heldout_loss"]
    values = 256 * 32 + (4 * 32 * 32 + 3 * 32 * preset_hidden() + 2 * 32) + 32
    assert ddp["wire_bytes_per_step"] == none["wire_bytes_per_step"] == 4 * values
    assert int4["wire_bytes_per_step"] < 4 * values
    assert twice["wire_bytes_per_step"] == 2 * values, "of as many tokens as the others' step has"
    assert [line["curve"][-1][0] for line in kept(learned).values()] == 5 * [2]
    for row in measured.values():
        assert all(row[key] > 0 for key in ("no_exchange_step_s", "step_s", "processor_s"))
        assert row["link_bps"] is None and row["seed"] == 0
        assert row["utilisation"] == row["no_exchange_step_s"] / row["step_s"]
        assert row["target_loss"] > 0 and (row is bf16 or row["steps_to_target"] is not None)
    bars = {"wire_bytes_per_step: int4 / ddp", "heldout_loss: int4 / ddp"}
    assert {row["case"] for row in rows} == {"measured", "time to target", *bars}


def preset_hidden() -> int:
    """Of the preset that the comparison changes."""
    return int(make_method("none", {"model": {"preset": DEFAULTS["preset"]}}).config.model.hidden)


def test_a_curve_tells_when_the_target_is_reached() -> None:
    curve = [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert loss_at(curve, 25) == 1.5 and loss_at(curve, 5) == 3.0 and loss_at(curve, 99) == 1.0
    assert steps_to(curve, 1.5) == 25 and steps_to(curve, 3.5) == 10 and steps_to(curve, 0.5) is None
    rows = [{"method": name, "seed": 0, "step_s": step_s} for name, step_s in (("ddp", 2.0), ("int4", 0.5))]
    learned = [{"method": "ddp", "seed": 0, "curve": curve}, {"method": "int4", "seed": 0, "curve": [(10, 3.0), (30, 0.9)]}]
    add_targets(rows, learned, 0.8, "ddp", 1.0)
    assert rows[0]["target_loss"] == pytest.approx(1.6) and rows[0]["time_ratio"] == pytest.approx(2.0)
    assert rows[1]["time_to_target_s"] == pytest.approx(0.5 * (10 + 20 * 1.4 / 2.1))


def test_the_fastest_of_ours_is_held_to_its_bar_and_set_beside_the_others() -> None:
    ratios: dict[str, list[float | None]] = {"ddp": [2.4, 2.4], "hivemind-fp16": [3.0, None], "none": [2.0, 2.0]}
    ratios |= {"int4": [1.2, 1.0], "sign": [0.5, None]}
    rows = [
        {"method": name, "link_bps": link_bps, "time_ratio": value}
        for link_bps in (1e7, 3e7, None)
        for name, values in ratios.items()
        for value in values
    ]
    first, *others = target_rows([row for row in rows if row["link_bps"] == 1e7], {"ddp", "hivemind-fp16"})
    assert (first["method"], first["time_ratio"], first["bar"], first["held"]) == ("int4", pytest.approx(1.1), 1.15, True)
    assert [(row["peer"], row["held"]) for row in others] == [("ddp", True), ("hivemind-fp16", True)]
    assert others[0]["ahead"] == pytest.approx(2.4 / 1.1) and others[1]["ahead"] is None
    assert [row["link_bps"] for row in target_rows(rows, {"ddp"}) if "bar" in row] == [1e7]
    assert not target_rows([row for row in rows if row["method"] == "ddp"], {"ddp"})
    assert not target_rows([{"method": "int4", "link_bps": 1e7}], {"ddp"})


def test_what_was_learned_is_found_by_what_it_was_made_from(tmp_path: Path) -> None:
    path = tmp_path / "learned"
    assert kept(path) == {}
    keys = [
        key_of(make_method(name, {"train": {"steps": steps, "seed": 5}}), seed, ranks, curve)
        for name, steps, seed, ranks, curve in (
            ("int4", 7, 0, 2, [1]),
            ("int4-nofeedback", 7, 0, 2, [1]),
            ("int4", 8, 0, 2, [1]),
            ("int4", 7, 1, 2, [1]),
            ("int4", 7, 0, 3, [1]),
            ("int4", 7, 0, 2, [1, 2]),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of(make_method("int4", {"train": {"steps": 7, "seed": 6}}), 0, 2, [1])
    for loss, key in enumerate(keys):
        keep(path, key, {"heldout_loss": loss})
    with path.open("a") as file:
        file.write('{"key": "cut o')
    assert kept(path) == {key: {"heldout_loss": loss} for loss, key in enumerate(keys)}


def test_the_curve_for_a_target_begins_at_half_of_its_steps() -> None:
    """Every 20th part of the run from there on, unless `curve_every` is given."""
    assert _curve({**DEFAULTS, "steps": 40, "target": 0.8}) == list(range(16, 41, 2))
    assert _curve({**DEFAULTS, "steps": 40, "target": 0.8, "curve_every": 20}) == [20, 40]
    assert _curve({**DEFAULTS, "steps": 40}) == []


def test_the_rate_of_a_method_is_from_the_median_of_its_seeds() -> None:
    found = {1e6: (0.1, 0.2, 0.9), 1e8: (0.5, 0.6, 0.99)}
    rows = [{"method": "int4", "link_bps": link, "utilisation": one} for link, seeds in found.items() for one in seeds]
    measured, predicted = rate_rows(rows, {"int4": lambda rate_bps: rate_bps / (rate_bps + 1e6)})
    assert (measured["by"], predicted["by"]) == ("measured", "predicted")
    assert measured["50%"] == show(1e6 * 100**0.75, "bit/s") and measured["80%"] is None
    assert predicted["50%"] == "1 Mbit/s" and predicted["99%"] == "99 Mbit/s"


def test_the_rate_that_a_level_needs() -> None:
    points = [(1e6, 0.2), (1e7, 0.6), (1e8, 0.99)]
    assert rate_needed(points, 0.4) == pytest.approx(10**6.5)
    assert rate_needed(points, 0.1) is None and rate_needed(points, 0.999) is None
    assert rate_predicted(lambda rate: rate / (rate + 1e6), 0.5) == pytest.approx(1e6)
    assert rate_predicted(lambda rate: 0.5, 0.9) is None


@pytest.mark.parametrize(
    ("name", "kind", "every", "code"),
    [
        ("diloco30", "diloco", 30, "none"),
        ("streaming40-overlap5-layers2-int4", "streaming", 40, "int4"),
        ("muloco30-fp4", "muloco", 30, "fp4"),
    ],
)
def test_methods_that_exchange_rarely(name: str, kind: str, every: int, code: str) -> None:
    config = make_method(name, {}).config
    assert (config.sync.kind, config.sync.every, config.compress.kind) == (kind, every, code)
    if isinstance(config.sync, Streaming):
        assert (config.sync.overlap, config.sync.layers_per_fragment) == (5, 2)


def test_methods_with_settings_of_their_own() -> None:
    shared = {"train": {"learning_rate": 2e-3}}
    config = make_method("streaming4-overlap2-outer70-momentum0-mixing25-rate150-int4", shared).config
    assert isinstance(config.sync, Streaming)
    assert (config.sync.outer_learning_rate, config.sync.outer_momentum, config.sync.mixing) == (0.7, 0.0, 0.25)
    assert config.train.learning_rate == pytest.approx(3e-3) and config.compress.kind == "int4"
    assert make_method("streaming4-overlap2-add-int4", shared).config.sync.arrival == "add"
    assert make_method("int4-rate50", shared).config.train.learning_rate == 1e-3
    assert (
        make_method("demo8-rate200", shared).config.train.learning_rate == 2 * make_method("demo8", {}).config.train.learning_rate
    )
    with pytest.raises(UserError, match="method 'int4-outer70'"):
        make_method("int4-outer70", shared)


def test_a_method_of_larger_batches_has_as_many_tokens() -> None:
    shared = {"train": {"micro_batch": 3, "steps": 12, "warmup_steps": 4}}
    method = make_method("retrace4-batch3-int4", shared)
    train = method.config.train
    assert (method.batches, train.micro_batch, train.steps, train.warmup_steps) == (3, 9, 4, 4)
    assert make_method("int4", shared).batches == 1
    with pytest.raises(UserError, match="12 steps are no whole number of steps of 5 batches"):
        make_method("int4-batch5", shared)
