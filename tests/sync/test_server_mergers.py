"""Mergers without a network: what a push may be, what one that weighs nothing does, who is waited for, and what is kept."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.config.replicas import Code, DiLoCo, Gradients, ServerAdamW, ServerSGD, Service
from thinwire.sync.server.coding import Mirror
from thinwire.sync.server.diloco_merger import DiLoCoMerger
from thinwire.sync.server.extent import Extent
from thinwire.sync.server.flat import Span
from thinwire.sync.server.gradient_merger import GradientMerger
from thinwire.sync.server.merger import Member, Merger, Pace, Push

NUMEL = 4
MERGES = {
    "sequential": Gradients(learning_rate=0.1, optimizer=ServerSGD(momentum=0.9)),
    "bounded": Gradients(delay=2, optimizer=ServerAdamW()),
    "eventual": Gradients(delay=-1),
    "tokens": DiLoCo(weighting="tokens"),
    "squared": DiLoCo(),
}


def push(name: str, values: torch.Tensor | None = None, life: int = 1, **others: float | None) -> Push:
    fields = {"version": 0, "weight": 1.0, "local_steps": 1, "learning_rate": None} | others
    return Push(member=Member(name, life), values=torch.ones(NUMEL) if values is None else values, **fields)


def merger_of(merge: Gradients | DiLoCo, names: str, **service: object) -> Merger:
    """Its workers have joined, and its weights are ones."""
    wanted = Service(**{"merge": merge, "first_workers": len(names)} | service)
    merger = DiLoCoMerger(wanted) if isinstance(merge, DiLoCo) else GradientMerger(wanted)
    for name in names:
        merger.begin(Member(name, 1), Pace(every=1))
    assert merger.initialise(torch.ones(NUMEL), [Span(0, NUMEL, True)]) is None
    return merger


def content(state: object) -> object:
    """Of a state, as what can be compared."""
    if isinstance(state, dict):
        return {key: content(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [content(value) for value in state]
    return state.tolist() if torch.is_tensor(state) else state


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_merge_of_pushes_that_weigh_nothing_moves_nothing_but_the_version(merge) -> None:
    merger = merger_of(merge, "a")
    assert merger.push(push("a")) is None  # there is momentum now
    before = content(merger.state_dict())
    assert merger.push(push("a", torch.full((NUMEL,), 7.0), weight=0.0)) is None
    after = content(merger.state_dict())
    assert after["weights"] == before["weights"]
    assert (after["version"], after["merged"], after["steps"]) == (2, before["merged"], {"a": 2})


def test_one_that_weighs_nothing_leaves_the_mean_to_the_others() -> None:
    for merge in (MERGES["sequential"], MERGES["squared"], MERGES["tokens"]):
        alone, both = merger_of(merge, "a"), merger_of(merge, "ab")
        alone.push(push("a"))
        both.push(push("a"))
        both.push(push("b", torch.full((NUMEL,), 7.0), weight=0.0))
        assert both.version == 1 and torch.equal(both.weights.values, alone.weights.values)


def test_weights_of_any_size_make_shares() -> None:
    merger = merger_of(DiLoCo(momentum=0.0, learning_rate=1.0), "ab")
    merger.push(push("a", weight=1e200))
    merger.push(push("b", weight=1e200))
    assert merger.weights.values.tolist() == [0.0] * NUMEL and merger.merges[-1].shares == [0.5, 0.5]


@pytest.mark.parametrize(("rate", "moved"), [(0.0, 0.0), (None, 0.1), (0.5, 0.5)])
@pytest.mark.parametrize("delay", [0, -1])
def test_a_learning_rate_of_0_is_one_and_none_is_the_servers(delay, rate, moved) -> None:
    merger = merger_of(Gradients(learning_rate=0.1, delay=delay), "a")
    merger.push(push("a", learning_rate=rate))
    torch.testing.assert_close(1 - merger.weights.values, torch.full((NUMEL,), moved))


def test_different_rates_of_one_step_are_averaged_as_the_gradients_are() -> None:
    merger = merger_of(Gradients(learning_rate=0.1), "abc")
    merger.push(push("a", weight=1.0, learning_rate=0.4))
    merger.push(push("b", weight=3.0, learning_rate=0.0))
    merger.push(push("c", weight=0.0, learning_rate=9.0))
    torch.testing.assert_close(1 - merger.weights.values, torch.full((NUMEL,), 0.1))


@pytest.mark.parametrize("delay", [2, -1])
def test_a_gradient_alone_moves_the_weights_by_its_share_of_the_live_workers(delay) -> None:
    merger = merger_of(Gradients(learning_rate=0.1, delay=delay), "ab")
    merger.push(push("a"))
    torch.testing.assert_close(1 - merger.weights.values, torch.full((NUMEL,), 0.05))
    merger.lost(Member("b", 1))
    merger.push(push("a"))
    torch.testing.assert_close(1 - merger.weights.values, torch.full((NUMEL,), 0.15))


@pytest.mark.parametrize(("weighting", "share"), [("tokens_squared_per_step", 2 / 3), ("tokens", 1 / 3), ("equal", 1 / 2)])
def test_shares_of_a_merge_are_those_of_its_weighting(weighting, share) -> None:
    """a: 2 tokens in 1 step, so 4 / 1; b: 4 tokens in 8 steps, so 16 / 8."""
    merger = merger_of(DiLoCo(weighting=weighting), "ab")
    merger.push(push("a", weight=2.0))
    merger.push(push("b", weight=4.0, local_steps=8))
    assert merger.merges[0].shares == pytest.approx([share, 1 - share])


@pytest.mark.parametrize("kind", ["int8", "int4", "topk"])
def test_what_a_code_of_pulls_loses_is_in_the_next_one(kind) -> None:
    """Both ends keep one copy, and weights that no longer move are reached."""
    server, worker = Mirror(Code(kind=kind)), Mirror(Code(kind=kind))
    extent = Extent(300)
    first, then = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(worker.decode(server.encode(first, extent), extent), first)
    errors = []
    for _ in range(40):
        payload = server.encode(then, extent)
        assert payload.numel() == worker.expected_bytes(extent)
        errors.append(float((worker.decode(payload, extent) - then).norm()))
        assert torch.equal(worker._copy, server._copy)
    assert errors[-1] < 0.1 * errors[0] or errors[-1] < 1e-5 * float(then.norm())


WRONG = [
    ({"values": torch.ones(3)}, "the server holds 4 values"),
    ({"values": torch.ones(2, 2)}, "the server holds 4 values"),
    ({"values": torch.ones(NUMEL, dtype=torch.float64)}, "torch.float64"),
    ({"values": torch.tensor([1.0, math.nan, 1.0, 1.0])}, "not finite"),
    ({"values": torch.tensor([1.0, math.inf, 1.0, 1.0])}, "not finite"),
    ({"weight": -1.0}, "-1 samples or tokens"),
    ({"weight": math.nan}, "nan samples or tokens"),
    ({"weight": math.inf}, "inf samples or tokens"),
    ({"local_steps": 0}, "0 local steps"),
    ({"learning_rate": -0.1}, "learning rate of -0.1"),
    ({"learning_rate": math.inf}, "learning rate of inf"),
    ({"learning_rate": math.nan}, "learning rate of nan"),
    ({"version": 1}, "from version 1 of the weights where the server has made 0"),
    ({"version": -1}, "from version -1"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=[words for _, words in WRONG])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_push_that_is_refused_changes_nothing_for_anybody(merge, wrong, words) -> None:
    merger, other = merger_of(merge, "ab"), merger_of(merge, "ab")
    before = content(merger.state_dict())
    reason = merger.push(push("b", **wrong))
    assert reason and words in reason and "\n" not in reason
    assert content(merger.state_dict()) == before
    for each in (merger, other):
        assert each.push(push("a")) is None and each.push(push("b")) is None
    assert content(merger.state_dict()) == content(other.state_dict()) and merger.version >= 1


@pytest.mark.parametrize(
    ("spans", "values"),
    [
        ([Span(0, 3, True)], torch.ones(NUMEL)),
        ([Span(0, 2, True), Span(3, 4, True)], torch.ones(NUMEL)),
        ([Span(0, 3, True), Span(2, 4, True)], torch.ones(NUMEL)),
        ([Span(0, NUMEL, True)], torch.tensor([1.0, math.nan, 1.0, 1.0])),
    ],
)
def test_first_weights_that_are_wrong_are_refused(spans, values) -> None:
    merger = DiLoCoMerger(Service())
    assert merger.initialise(values, spans) and merger.weights is None


def test_first_weights_replace_others_until_somebody_has_them() -> None:
    merger = merger_of(DiLoCo(), "a")
    assert merger.initialise(torch.zeros(NUMEL), [Span(0, NUMEL, True)]) is None
    assert merger.admit(Member("a", 1), 0.0).values.tolist() == [0.0] * NUMEL
    assert "in use" in merger.initialise(torch.ones(NUMEL), [Span(0, NUMEL, True)])


def test_with_a_quorum_of_all_the_dead_stand_in_for_nobody_who_lives() -> None:
    merger = merger_of(DiLoCo(momentum=0.0, learning_rate=1.0, weighting="equal"), "abc")
    merger.push(push("a"))
    merger.lost(Member("a", 1))
    merger.push(push("b", 4 * torch.ones(NUMEL)))
    assert merger.version == 0  # c lives, and is waited for
    merger.push(push("c", 7 * torch.ones(NUMEL)))
    assert merger.merges[0].workers == ["a", "b", "c"]  # what the dead one pushed counts
    torch.testing.assert_close(merger.weights.values, torch.full((NUMEL,), -3.0))


@given(st.integers(0, 4), st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12))
def test_a_merge_holds_as_many_live_pushes_as_the_quorum_asks_for(quorum: int, what: list[tuple[str, bool]]) -> None:
    """In any order of pushes (True) and deaths."""
    merger = merger_of(DiLoCo(quorum=quorum), "abcd")
    live, pushed = set("abcd"), set()
    for name, pushes in what:
        version = merger.version
        if name not in live or (pushes and name in pushed):
            continue
        if pushes:
            merger.push(push(name))
            pushed.add(name)
        else:
            live.discard(name)
            merger.lost(Member(name, 1))
        needed = min(quorum or len(live), len(live))
        assert (merger.version > version) == (0 < needed <= len(live & pushed))
        if merger.version > version:
            assert merger.merges[-1].workers == sorted(pushed)
            pushed.clear()


def test_one_that_two_servers_take_in_a_merge_apart_begins_at_one_version() -> None:
    """c comes to server 0 before a merge and to server 1 after it."""
    servers = [merger_of(DiLoCo(), "ab") for _ in range(2)]
    c = Member("c", 1)
    for name in "ab":
        servers[1].push(push(name))
    for merger in servers:
        merger.begin(c, Pace(every=1))
    assert servers[0].admit(c, 0.0) is None and servers[1].admit(c, 0.0) is None
    for name in "ab":
        servers[0].push(push(name))
    for name in "ab":
        servers[1].push(push(name, version=1))
    servers[0].push(push("a", version=1))
    assert servers[0].admit(c, 0.0).version == 1 and servers[1].admit(c, 0.0).version == 2
    servers[0].not_before(c, 2)
    assert servers[0].admit(c, 0.0) is None and servers[0].version == 1
    servers[0].push(push("b", version=1))  # without c
    assert servers[0].admit(c, 0.0).version == 2 and servers[0].merges[-1].workers == ["a", "b"]


def test_a_version_that_nobody_else_makes_is_not_waited_for() -> None:
    merger = merger_of(DiLoCo(), "ab")
    merger.lost(Member("b", 1))
    merger.not_before(Member("a", 1), 7)
    assert merger.admit(Member("a", 1), 0.0).version == 0
    merger.begin(Member("c", 1), Pace(every=1))
    merger.not_before(Member("a", 1), 7)  # c waits for a's merge, so a is still the one
    assert merger.admit(Member("a", 1), 0.0).version == 0
    two = merger_of(DiLoCo(), "ab")
    two.not_before(Member("a", 1), 7)
    assert two.admit(Member("a", 1), 0.0) is None
    two.lost(Member("b", 1))
    assert two.admit(Member("a", 1), 5.0).version == 0


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_first_worker_that_has_gone_for_good_is_not_waited_for_after_a_restart(merge) -> None:
    merger = merger_of(merge, "abcd")
    merger.lost(Member("d", 1))
    for name in "abc":
        merger.push(push(name))
    assert merger.version >= 1
    again = type(merger)(Service(merge=merge, first_workers=4))
    again.load_state_dict(merger.state_dict())
    again.begin(Member("a", 1), Pace(every=1))
    assert again.admit(Member("a", 1), 5.0) is not None


def test_first_workers_are_names_that_have_joined_or_never_will() -> None:
    merger = DiLoCoMerger(Service(first_workers=3))
    merger.begin(Member("a", 1), Pace())
    merger.begin(Member("a", 2), Pace())  # the same name
    merger.initialise(torch.ones(NUMEL), [Span(0, NUMEL, True)])
    merger.begin(Member("b", 1), Pace())
    merger.lost(Member("b", 1))
    assert merger.admit(Member("a", 2), 0.0) is None
    merger.never_comes("c")
    assert merger.admit(Member("a", 2), 5.0) is not None
    assert merger.steps == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_snapshot_is_one_version_whatever_comes_later(merge) -> None:
    merger = merger_of(merge, "a")
    merger.push(push("a"))
    state = merger.state_dict()
    before = content(state)
    merger.push(push("a", 3 * torch.ones(NUMEL)))
    assert content(state) == before and state["version"] == 1 and merger.version == 2


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_nobody_goes_on_from_a_version_that_is_to_be_kept_before_it_is_written(merge) -> None:
    merger = DiLoCoMerger(Service(merge=merge)) if isinstance(merge, DiLoCo) else GradientMerger(Service(merge=merge))
    merger.keep_every = 2
    a = Member("a", 1)
    merger.begin(a, Pace(every=1))
    merger.initialise(torch.ones(NUMEL), [Span(0, NUMEL, True)])
    for version in range(5):
        assert merger.version == version
        state = merger.snapshot()
        assert (state is not None) == (version % 2 == 0)
        if state is not None:
            assert state["version"] == version and merger.admit(a, 0.0) is None
            merger.written(state)
        began = time.monotonic()
        assert merger.admit(a, 20.0).version == version and time.monotonic() - began < 20
        merger.push(push("a", version=version))
