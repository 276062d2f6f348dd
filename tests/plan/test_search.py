"""The search: it finds what pricing everything finds, and its answers keep the laws that any planner must keep."""

from dataclasses import replace
from math import prod

import pytest

from thinwire.cluster import Cluster, load_cluster
from thinwire.cluster.order import some_hosts
from thinwire.config.run import load_run
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan import penalties
from thinwire.plan.candidates import CODECS, Candidate, Problem, drafts, variants
from thinwire.plan.cost import predict
from thinwire.plan.explain import explain, faster, more_hosts
from thinwire.plan.price import Least, Priced, Unfit, least_s, least_with_exchange_s, price
from thinwire.plan.problem import planned_run, problem_of
from thinwire.plan.search import FAR, TIE, _fits, search
from thinwire.sync.front import ways
from thinwire.train.outline import outline

NEEDED = ["train.sequence=64", "train.micro_batch=4", "model.layers=4"]


def of_rates(cluster: Cluster | str, *kept: str, batch: int = 16) -> Problem:
    """A 1M model on devices with rates, whose links are thin."""
    config = load_run(None, [*NEEDED, *kept])
    found = load_cluster(cluster) if isinstance(cluster, str) else cluster
    keys = frozenset(one.partition("=")[0] for one in kept)
    return Problem(cluster=found, config=config, shape=config.model.shape(), batch=batch, tokens=1e6, kept=keys, outline=outline)


def by_name(line: str, model: str = "1b", batch: int = 256, **more: bool) -> Problem:
    config = load_run(None, [f"model.preset={model}", "train.sequence=2048"])
    shape = config.model.shape()
    return Problem(cluster=load_cluster(line), config=config, shape=shape, batch=batch, tokens=20e9, **more)


def everything(problem: Problem) -> list[Priced]:
    """All candidates that fit, priced, but what computes again without need."""
    found = []
    for draft in drafts(problem):
        if draft.recompute != "none" and _fits(replace(draft, recompute="none"), problem):
            continue
        for one in variants(problem, draft):
            try:
                priced = price(one, problem)
            except UserError:
                continue
            assert priced.step_s >= least_s(draft, problem) * (1 - 1e-9), one
            assert priced.step_s >= least_with_exchange_s(one, problem) * (1 - 1e-9), one
            found.append(priced)
    return found


@pytest.mark.parametrize(
    "problem",
    [
        of_rates("2x1xcpu:10Gflop/s@20Mbit/s"),
        pytest.param(of_rates("four-hosts-100mbit", "pipeline.schedule=1f1b"), marks=pytest.mark.long),
        pytest.param(of_rates("one-slow-host", "sync.kind=diloco", "layout.pipe=1"), marks=pytest.mark.long),
        by_name("2x2xa100-80gb@10Gbit/s"),
        pytest.param(by_name("2x1x4xh100-80gb@100Gbit/s@1Gbit/s", beyond=True), marks=pytest.mark.long),
    ],
    ids=["thin", "four", "slow", "a100", "sites"],
)
def test_the_search_finds_what_pricing_everything_finds(problem: Problem) -> None:
    """And no bound is above a price. What chosen collectives may add comes after the search, so here without them."""
    found, all_of_them = search(problem, refined=0), everything(problem)
    fastest_s = min(one.time_s for one in all_of_them)
    assert found.ranking[0].time_s == pytest.approx(fastest_s, rel=0.005)  # coding is timed
    near = [one for one in all_of_them if one.time_s <= (1 + TIE) * fastest_s]
    assert found.best.candidate == min(near, key=lambda one: one.wire_bytes / one.tokens_per_step).candidate
    assert len(found.ranking) < len(all_of_them)
    for one in all_of_them:
        if one.time_s < FAR * fastest_s:
            assert any(kept.time_s <= one.time_s * 1.005 and kept.memory_bytes <= one.memory_bytes for kept in found.front), one


@pytest.mark.long
def test_no_chosen_collectives_are_priced_below_what_any_can_be() -> None:
    problem = of_rates("two-racks-half-uplink", "layout.map=ranks")
    for codec in ("none", "int8"):
        native = Candidate(layout=Layout(data=8), micro_batch=2, codec=codec)
        chosen, least = price(replace(native, collectives="priced"), problem), price(native, problem, Least(problem.numbered))
        assert least.step_s <= chosen.step_s <= price(native, problem).step_s * 1.005  # coding is timed


@pytest.mark.long
@pytest.mark.parametrize(
    "problem", [of_rates("2x1xcpu:10Gflop/s@5Mbit/s"), by_name("2x2xa100-80gb@1Gbit/s")], ids=["rates", "name"]
)
def test_faster_links_never_make_the_best_plan_slower(problem: Problem) -> None:
    rate = problem.cluster.links[0].bandwidth_bps.value
    before = search(problem).ranking[0].time_s
    for times in (3, 30, 300):
        after = search(replace(problem, cluster=faster(problem.cluster, rate, times))).ranking[0].time_s
        assert after <= before * 1.005
        before = after


def test_thin_links_want_rare_exchanges_and_fat_ones_none() -> None:
    """On 1 Gbit/s four hosts exchange rarely, and gain; on 400 Gbit/s a device they average in each step."""
    problem = by_name("4x8xa100-80gb@1Gbit/s")
    thin = explain(problem, search(problem), asks=False)
    assert thin.best.candidate.layout.outer == 4 and thin.plain is not None and thin.plain.time_s > 20 * thin.best.time_s
    assert 2 < search(problem.on_hosts(1)).best.time_s / thin.best.time_s < 4
    fat = search(by_name("4x8xa100-80gb@1.6Tbit/s")).best
    assert fat.candidate.sync == "every_step" and fat.time_s < thin.best.time_s


@pytest.mark.long
def test_without_penalties_rarely_is_free_and_they_are_shown_otherwise() -> None:
    problem = by_name("4x8xa100-80gb@1Gbit/s")
    free, counted = search(replace(problem, penalties=False)).best, search(problem).best
    assert not free.penalties and free.candidate.every > counted.candidate.every
    assert counted.time_s == pytest.approx(
        problem.tokens / counted.tokens_per_step * prod(counted.penalties.values()) * counted.step_s
    )
    assert counted.penalties["rarely"] > 1


def test_penalties_are_those_of_their_sources() -> None:
    """Of codes the front's rows, which may be below 1; the planner's words for rare exchanges have rows too."""
    measured = {way.method: way.steps_over_ddp for way in ways()}
    assert {kind: penalties.of_codec(kind) for kind in CODECS} == {kind: max(1.0, measured.get(kind, 1.0)) for kind in CODECS}
    assert set(CODECS) <= measured.keys() | {"none"}
    assert penalties.of_batch(1) == 1 and penalties.of_batch(2) == pytest.approx(4 / 3)


def test_what_the_user_keeps_is_kept() -> None:
    problem = of_rates("2x1xcpu:10Gflop/s@5Mbit/s", "sync.kind=diloco", "sync.every=20", "sync.outer_learning_rate=0.5")
    best = search(problem).best.candidate
    assert (best.sync, best.every) == ("diloco", 20)
    assert best.config(problem).sync.outer_learning_rate == 0.5  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"no plan of \d+ fits"):
        search(of_rates("2x1xcpu:10Gflop/s@5Mbit/s", "layout.pipe=3"))


def test_what_fits_nowhere_is_refused_with_what_comes_nearest() -> None:
    with pytest.raises(UserError, match=r"no plan of \d+ fits; nearest is .* a rank needs .* GiB, and l4-24gb has") as error:
        search(by_name("2x1xl4-24gb@10Gbit/s", model="70b"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'abacus' has no flops_per_s, and no data sheet is known"):
        search(by_name("2x1xabacus@10Gbit/s"))
    with pytest.raises(Unfit):
        price(next(drafts(by_name("1x1xl4-24gb@1Gbit/s", model="8b"))), by_name("1x1xl4-24gb@1Gbit/s", model="8b"))


@pytest.mark.parametrize("kept", [(), ("layout.map=ranks",)], ids=["links", "ranks"])
def test_ranks_have_the_numbers_of_a_run_wherever_a_plan_is_priced(kept: tuple[str, ...]) -> None:
    """Those of two-racks alternate between the racks."""
    problem, seconds = of_rates("two-racks", *kept), []
    for layout in (Layout(data=4, tensor=2), Layout(pipe=4, data=2)):
        one = Candidate(layout=layout, micro_batch=1, accumulate=4)
        setting, transfers, carrier = outline(one.config(problem), problem.shape, layout, problem.cluster, problem.rates or ())
        seconds.append(price(one, problem).step_s)
        assert seconds[-1] == predict(setting, transfers, carrier=carrier).step_s
    others = of_rates("two-racks", *(() if kept else ("layout.map=ranks",)))
    assert price(one, others).step_s != seconds[-1]


def test_hosts_are_added_and_taken_away_with_their_links() -> None:
    cluster = load_cluster("two-racks")
    assert more_hosts(cluster).world_size == 10 and len(more_hosts(cluster).links) == len(cluster.links) + 4
    one = some_hosts(load_cluster("four-hosts-of-two-100mbit"), 1)
    assert one.world_size == 2 and len(one.links) == 2
    with pytest.raises(UserError, match="has 4 hosts, not 5"):
        some_hosts(load_cluster("four-hosts-100mbit"), 5)


def test_a_line_says_what_a_cluster_is() -> None:
    cluster = load_cluster("2x3x4xh100-80gb@100 Gbit/s@1Gbit/s~20ms")
    assert (len(cluster.hosts), cluster.world_size) == (6, 24)
    assert {link.bandwidth_bps.value for link in cluster.links} == {100e9, 1e9}
    assert {link.latency_s.value for link in cluster.links} == {5e-6, 0.02}
    for line in ("4x8@1Gbit/s", "2x4x8xa100@1Gbit/s", "4x8xa100@fast", "x@y"):
        with pytest.raises(UserError):
            load_cluster(line)


@pytest.mark.long
def test_ten_thousand_devices_and_a_trillion_parameters_are_planned() -> None:
    """In a few thousand prices of a hundred thousand candidates; seconds are for the bench."""
    found = search(by_name("1250x8xh100-80gb@3.2Tbit/s", model="1t", batch=2048, beyond=True))
    assert found.best.candidate.layout.world_size == 10_000 and len(found.ranking) < 5000
    assert 0.2 < 6e12 * found.best.tokens_per_step / found.best.step_s / 10_000 / 989e12 < 0.7


def test_a_plan_is_written_for_as_many_tokens_as_it_needs(tmp_path) -> None:
    problem = problem_of(None, ["train.steps=100", *NEEDED], "four-hosts-100mbit", "", outline)
    assert problem.tokens == 100 * 4 * 4 * 64 and problem.batch == 16
    found = search(replace(problem, cluster=faster(problem.cluster, 100e6, 1e-3)))
    run = planned_run(found.best, problem, "four-hosts-100mbit")
    assert run.train.steps * found.best.tokens_per_step == pytest.approx(
        problem.tokens * prod(found.best.penalties.values()), abs=found.best.tokens_per_step
    )
    assert run.layout.resolve(4, rare=run.sync.rare) == found.best.candidate.layout
    sharded = replace(found.best, candidate=replace(found.best.candidate, zero=1))
    with pytest.raises(UserError, match="thinwire train cannot launch this"):
        planned_run(sharded, problem, "")


@pytest.mark.long
def test_interleaved_racks_want_collectives_that_fit() -> None:
    """Where ranks keep the numbers that they were started with."""
    problem = of_rates("two-racks", "sync.kind=every_step", "layout.pipe=1", "layout.map=ranks", batch=8)
    found = search(problem)
    native = search(replace(problem, kept=problem.kept | {"collectives.kind"}))
    assert found.best.candidate.collectives == "priced" and found.best.time_s < 0.9 * native.best.time_s
    assert found.best.candidate.config(problem).collectives.kind == "priced"
