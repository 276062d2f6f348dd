"""Replicas that retrace their steps together: equal to a one-process reference, to the byte as predicted, resumed the same."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from replica_loop import run
from replicas_reference import STEPS, Net, adamw, batch, flat
from torch.distributed.device_mesh import init_device_mesh

import thinwire
from pool import Pool, Rank
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.run import RunConfig
from thinwire.config.sync import Retrace
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.sync.buckets import described
from thinwire.sync.make import make_synchroniser
from thinwire.sync.parts import PER_TURN, buffers, cut, taking_turns, turns
from thinwire.tomlfile import validate
from thinwire.workload import Parameter

EVERY = 3
CONFIG = Retrace(every=EVERY, bucket_bytes=256)
"""So small that matrices are cut into rows."""
CODES = {
    "none": NoCompression(),
    "int4": Coded(kind="int4", exclude=(), vectors=True),
    "ternary": Coded(kind="ternary", exclude=(), vectors=True, feedback=False),
    "powersgd": Coded(kind="powersgd"),
}
BETAS, EPSILON, RATE, DECAY = (0.9, 0.999), 1e-8, 0.02, 0.01
"""PyTorch's AdamW as `adamw` makes it."""


class Moved:
    """One parameter of one replica, moved by AdamW as its paper has it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.m, self.v, self.t = x.double(), torch.zeros_like(x).double(), torch.zeros_like(x).double(), 0

    def step(self, g: torch.Tensor) -> None:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        m, v = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
        self.x = self.x * (1 - RATE * DECAY) - RATE * m / (v.sqrt() + EPSILON)

    def copy(self) -> "Moved":
        other = Moved(self.x)
        other.m, other.v, other.t = self.m, self.v, self.t
        return other


def reference(replicas: int, scaled: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(Each replica's parameters after STEPS, and at the end of training). scaled: gradients, after each backward pass."""
    models = [Net() for _ in range(replicas)]
    named = [dict(model.named_parameters()) for model in models]
    buckets = taking_turns(described(models[0]), CONFIG.bucket_bytes, EVERY)
    parts = [part for bucket in buckets for part in bucket]
    turn = {part.name: t for bucket, t in zip(buckets, turns(buckets, EVERY), strict=True) for part in bucket}
    begun = {part.name: Moved(part.of(named[0][part.whole]).of(named[0][part.whole].detach())) for part in parts}
    moved = [{name: one.copy() for name, one in begun.items()} for _ in models]
    sums: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in begun} for _ in models]

    def write(into: dict[str, torch.nn.Parameter], its: dict[str, Moved]) -> None:
        for part in parts:
            part.of(into[part.whole]).of(into[part.whole].detach()).copy_(its[part.name].x)

    def again(name: str) -> None:
        steps = len(sums[0][name])
        mean = torch.stack([one for its in sums for one in its[name]]).mean(0)
        one, before = begun[name], begun[name].v
        for _ in range(steps):
            one.step(mean)
        one.v = one.v + (steps - 1) * (one.v - BETAS[1] ** steps * before)
        for its, mine in zip(moved, sums, strict=True):
            its[name] = one.copy()
            mine[name].clear()

    for step in range(STEPS):
        for replica, model in enumerate(models):
            model.zero_grad()
            (model(batch(step, replica)) - 1).square().mean().backward()
            for part in parts:
                one = named[replica][part.whole]
                assert one.grad is not None
                sums[replica][part.name].append(scaled * part.of(one).of(one.grad).double())
        for name in begun:
            if step and step % EVERY == turn[name]:
                again(name)
                continue
            for its, mine in zip(moved, sums, strict=True):
                its[name].step(mine[name][-1])
        for replica, its in enumerate(moved):
            write(named[replica], its)
    local = [flat(model) for model in models]
    for name in begun:
        if sums[0][name]:
            again(name)
    write(named[0], begun)
    return local, flat(models[0])


@pytest.mark.parametrize("pool", ["ranks3", long("ranks2")])
def test_equals_the_reference_in_one_process(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    results = ranks.run(run, CONFIG, CODES["none"], 1, 0, STEPS, None)
    local, final = reference(len(results))
    for rank, one in enumerate(results):
        torch.testing.assert_close(one["local"], local[rank], rtol=0, atol=1e-5)
        torch.testing.assert_close(one["final"], final, rtol=0, atol=1e-5)
        assert torch.equal(one["final"], results[0]["final"]) and one["back"]
        assert torch.equal(one["averaged"], results[0]["averaged"]) and not torch.equal(one["averaged"], one["local"])


@pytest.mark.parametrize("code", list(CODES))
def test_sends_what_was_predicted_and_ends_bit_equal(ranks4: Pool, code: str) -> None:
    results = ranks4.run(run, CONFIG, CODES[code], 1, 0, STEPS, None)
    assert {row[4] for row in results[0]["predicted"]} == {EVERY}
    for one in results:
        measured = {row: calls for row, (calls, _) in one["sent"].items()}
        assert set(measured) == {row[:4] for row in one["predicted"]}
        assert set(measured.values()) == {STEPS // EVERY, (STEPS - 1) // EVERY} or set(measured.values()) == {STEPS // EVERY}
        assert torch.equal(one["final"], results[0]["final"])


@pytest.mark.parametrize("code", ["int4", "ternary"])
@pytest.mark.parametrize("stop", [5, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(ranks2: Pool, code: str, stop: int) -> None:
    whole = ranks2.run(run, CONFIG, CODES[code], 1, 0, STEPS, None)
    cut = ranks2.run(run, CONFIG, CODES[code], 1, 0, stop, None)
    assert any(bucket["since"] < stop for bucket in cut[0]["state"]["sync"]["buckets"])
    resumed = ranks2.run(run, CONFIG, CODES[code], 1, stop, STEPS, [one["state"] for one in cut])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("local", "final"))


RISING = CONFIG.model_copy(update={"every": 4, "first": ((2, 1), (4, 2))})


def test_sends_what_was_predicted_for_each_part(ranks2: Pool) -> None:
    """The first step sends nothing."""
    results = ranks2.run(run, RISING, CODES["int4"], 1, 0, STEPS, None)
    measured = {row: calls for row, (calls, _) in results[0]["sent"].items()}
    expected = {}
    for (steps, phase), tail in zip(RISING.phases(STEPS), (" every 1", " every 2", ""), strict=True):
        (alone, _) = ranks2.run(run, phase, CODES["int4"], 1, 0, 0, None)
        for label, op, message_bytes, axis, every in alone["predicted"]:
            name, number, *rest = label.split(" ")
            expected[" ".join([name, number + tail, *rest]), op, message_bytes, axis] = steps // every - (every == 1)
    assert measured == expected
    assert all(torch.equal(one["final"], results[0]["final"]) for one in results)


@pytest.mark.parametrize("stop", [3, long(6), 7])
def test_resumed_equals_uninterrupted_where_periods_rise(ranks2: Pool, stop: int) -> None:
    whole = ranks2.run(run, RISING, CODES["int4"], 1, 0, STEPS, None)
    cut = ranks2.run(run, RISING, CODES["int4"], 1, 0, stop, None)
    resumed = ranks2.run(run, RISING, CODES["int4"], 1, stop, STEPS, [one["state"] for one in cut])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("local", "final"))


def train(
    context: Rank, config: Retrace, after_backward: Callable[[torch.nn.Module], None], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """All steps in micro-batches of one, gradients changed before the optimizer gets them."""
    layout = Layout(outer=context.world_size)
    sync = make_synchroniser(config, NoCompression(), layout, context.ledger)
    model = Net(context.rank).to(dtype)  # the first one's values count
    optimizer = adamw(model)
    with sync.attached(model, optimizer, init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)):
        for step in range(STEPS):
            for micro in range(config.accumulate):
                with sync.microbatch(last=micro == config.accumulate - 1):
                    x = batch(step, context.rank).chunk(config.accumulate)[micro].to(dtype)
                    ((model(x) - 1).square().mean() / config.accumulate).backward()
            after_backward(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            sync.after_step(step)
        sync.finish()
    moments = torch.cat([optimizer.state[one]["exp_avg_sq"].reshape(-1) for one in model.parameters()])
    return {"final": flat(model), "moments": moments}


def halve(model: torch.nn.Module) -> None:
    for one in model.parameters():
        assert one.grad is not None
        one.grad.mul_(0.5)


def nothing(model: torch.nn.Module) -> None:
    pass


def test_a_gradient_that_is_scaled_after_its_backward_pass_counts_as_scaled(ranks2: Pool) -> None:
    """As clipping does; also the one that was sent before that was known."""
    results = ranks2.run(train, CONFIG, halve)
    _, final = reference(2, scaled=0.5)
    for one in results:
        torch.testing.assert_close(one["final"], final, rtol=0, atol=1e-5)


def test_micro_batches_count_as_one_batch(ranks2: Pool) -> None:
    together, apart = ranks2.run(train, CONFIG, nothing), ranks2.run(train, CONFIG.model_copy(update={"accumulate": 2}), nothing)
    torch.testing.assert_close(together[0]["final"], apart[0]["final"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_replicas_end_bit_equal_with_all_that_the_optimizer_knows(ranks3: Pool, dtype: torch.dtype) -> None:
    results = ranks3.run(train, CONFIG, nothing, dtype)
    for one in results:
        assert one["final"].dtype == dtype and bool(torch.isfinite(one["final"]).all())
        assert all(torch.equal(one[key], results[0][key]) for key in ("final", "moments"))


def own_loop(context: Rank) -> tuple[torch.Tensor, int]:
    """The final parameters, and how many steps a hook on the optimizer has seen."""
    model, seen = Net(), []
    target = torch.ones(1)
    shared = thinwire.apply(
        model,
        {},
        (batch(0, 0), target),
        loss=lambda output, target: (output - target).square().mean(),
        sync={"kind": "retrace", "every": EVERY, "bucket_bytes": CONFIG.bucket_bytes},
    )
    optimizer = adamw(shared.module)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    with shared.training(optimizer):
        for step in range(STEPS):
            shared.step([(batch(step, context.rank), target)])
            optimizer.step()
            optimizer.zero_grad()
    shared.close()
    return flat(shared.module), len(seen)


def test_a_loop_of_ones_own_sees_its_own_steps_only(ranks2: Pool) -> None:
    _, final = reference(2)
    for found, seen in ranks2.run(own_loop):
        torch.testing.assert_close(found, final, rtol=0, atol=1e-5)
        assert seen == STEPS


def test_parts_cover_each_parameter_and_its_gradient_once() -> None:
    """Of a complex parameter as of a real one; what is excluded by its name is so in parts."""
    model = torch.nn.ParameterDict(
        {
            "matrix": torch.zeros(10, 4),
            "waves": torch.zeros(9, 3, dtype=torch.complex64),
            "vector": torch.zeros(100),
            "one": torch.zeros(()),
            "short": torch.zeros(8, 8, dtype=torch.bfloat16),
        }
    )
    buckets = taking_turns(described(model), 48, EVERY)
    parts = [part for bucket in buckets for part in bucket]
    assert [part.name for part in parts if part.whole == "matrix"] == ["matrix rows 0:3", "matrix rows 3:6", "matrix rows 6:10"]
    assert {part.name for part in parts if part.rows is None} == {"vector", "one"}
    number = {part.name: index for index, part in enumerate(parts)}
    for buffer, pieces in buffers(buckets, model):
        assert sum(piece.numel for piece in pieces) == buffer.numel()
        for piece in pieces:
            piece.of(buffer).fill_(number[piece.name])
    for part in parts:
        grad = model[part.whole].grad
        assert grad is not None
        found = part.of(model[part.whole]).of(torch.view_as_real(grad) if grad.is_complex() else grad)
        assert found.shape == part.shape and bool((found == number[part.name]).all())
    code = Coded(kind="int4", exclude=("matrix", "vec*"))
    assert not any(code.is_coded(part.name, part.shape) for part in parts if part.whole in ("matrix", "vector"))
    assert all(code.is_coded(part.name, part.shape) for part in parts if part.whole in ("waves", "short"))
    assert {one.name for one in cut(described(model), 10**6)} == set(model)


BUCKETS = st.lists(st.integers(1, 10**6).map(lambda numel: [Parameter("x", (numel,))]), min_size=1, max_size=40)


@given(BUCKETS, st.integers(2, 40))
def test_no_step_of_a_period_sends_much_more_than_its_share(buckets: list[list[Parameter]], every: int) -> None:
    found, sizes = turns(buckets, every), [bucket[0].stored_bytes for bucket in buckets]
    loads = [sum(size for size, turn in zip(sizes, found, strict=True) if turn == one) for one in range(every)]
    assert set(found) <= set(range(every)) and max(loads) <= sum(sizes) / every + max(sizes)
    if len(buckets) <= every:
        assert len(set(found)) == len(buckets)


@pytest.mark.parametrize("every", [2, 4, 10])
def test_each_turn_has_some_of_the_whole_depth_of_a_model(every: int) -> None:
    """So that most of it goes while the backward pass runs."""
    model = [Parameter(f"layers.{index}.weight", (512, 300)) for index in range(12)]
    buckets = taking_turns(model, 0, every)
    found = turns(buckets, every)
    for turn in range(every):
        places = [index for index, one in enumerate(found) if one == turn]
        assert len(places) >= PER_TURN - 1 and places[0] < every and places[-1] >= len(buckets) - every
        assert all(after - before <= 2 * every for before, after in pairwise(places))


def test_an_optimizer_whose_steps_it_cannot_take_again_is_refused(ranks2: Pool) -> None:
    assert all("not those of SGD" in line for line in ranks2.run(refused))


def refused(context: Rank) -> str:
    layout = Layout(outer=context.world_size)
    sync, model = make_synchroniser(CONFIG, NoCompression(), layout, context.ledger), Net()
    mesh = init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)
    with pytest.raises(UserError) as error, sync.attached(model, torch.optim.SGD(model.parameters()), mesh):
        pass
    return str(error.value)


@pytest.mark.parametrize(
    ("compress", "feeds_back"),
    [
        ({"kind": "int4"}, False),
        ({"kind": "int4", "feedback": True}, True),
        ({"kind": "ternary", "feedback_decay": 0.5}, True),
        ({"kind": "topk"}, True),
    ],
)
def test_feedback_is_off_unless_asked_for_or_needed(compress: dict[str, Any], feeds_back: bool) -> None:
    """It comes back H steps late."""
    config = validate(RunConfig, {"sync": {"kind": "retrace"}, "compress": compress}, "run.toml")
    assert isinstance(config.compress, Coded) and config.compress.feeds_back is feeds_back
    each = validate(RunConfig, {"compress": compress}, "run.toml").compress
    assert isinstance(each, Coded) and each.feeds_back


@pytest.mark.parametrize(
    ("section", "options", "line"),
    [
        ("train", {"optimizer": {"kind": "muon"}}, "takes steps of train.optimizer.kind = 'adamw' again"),
        ("train", {"optimizer": {"states": "8bit"}}, "with states = 'full'"),
        ("train", {"updates": "early", "clip": 0.0}, "needs all gradients of a step"),
        ("layout", {"data": 2}, "a replica is one rank"),
        ("layout", {"tensor": 2}, "a replica is one rank"),
        ("sync", {"kind": "retrace", "outer_device": "host"}, "is used in each step"),
        ("sync", {"kind": "retrace", "assign": "by_speed"}, "only kind = 'every_step' assigns"),
    ],
)
def test_what_does_not_go_with_it_is_refused(section: str, options: dict[str, Any], line: str) -> None:
    content: dict[str, Any] = {"sync": {"kind": "retrace"}, section: options}
    with pytest.raises(UserError, match=line):
        validate(RunConfig, content, "run.toml")
