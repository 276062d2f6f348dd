"""Plans in the words of those who launch them: the same degrees and batch, or a refusal."""

import json
import re
import tomllib

import pytest

from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.candidates import Candidate, Problem
from thinwire.plan.export import TARGETS, exported
from thinwire.plan.price import price
from thinwire.plan.problem import problem_of, steps_of


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(None, [], "2x4xa100-80gb@100Gbit/s", "350m", None)


def text(problem: Problem, target: str, **plan) -> str:
    layout = plan.pop("layout", {"data": 8})
    one = price(Candidate(layout=Layout(**layout), micro_batch=2, accumulate=4, **plan), problem)
    return exported(target, one, problem, "run.toml")


def test_torchtitan_gets_the_degrees_and_the_batch(problem: Problem) -> None:
    found = tomllib.loads(text(problem, "torchtitan", layout={"data": 2, "tensor": 2, "pipe": 2}, recompute="full"))
    degrees = {key: value for key, value in found["parallelism"].items() if key.endswith("degree") and value > 1}
    assert degrees == {"data_parallel_replicate_degree": 2, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}
    assert found["training"]["local_batch_size"] == 8 and found["training"]["global_batch_size"] == 16
    assert found["parallelism"]["pipeline_parallel_microbatch_size"] == 2
    assert found["activation_checkpoint"]["mode"] == "full"
    sharded = tomllib.loads(text(problem, "torchtitan", zero=3))["parallelism"]
    assert sharded["data_parallel_shard_degree"] == 8 and sharded["fsdp_reshard_after_forward"] == "always"


def test_megatron_gets_flags_for_each_host(problem: Problem) -> None:
    found = text(problem, "megatron", layout={"data": 2, "tensor": 4}, zero=1, sequence_parallel=True)
    lines = [line for line in found.splitlines() if not line.startswith("#")]
    assert len(lines) == 2 and all("--nnodes=2" in line and "--nproc-per-node=4" in line for line in lines)
    flags = dict(re.findall(r"--([a-z-]+) (\d+)", lines[0]))
    assert flags["tensor-model-parallel-size"] == "4" and flags["pipeline-model-parallel-size"] == "1"
    assert flags["micro-batch-size"] == "2" and flags["global-batch-size"] == "16"
    assert "--use-distributed-optimizer" in lines[0] and "--sequence-parallel" in lines[0]
    plan = price(Candidate(layout=Layout(data=2, tensor=4), micro_batch=2, accumulate=4), problem)
    assert flags["train-iters"] == str(steps_of(plan, problem))


def test_deepspeed_gets_a_stage_and_torchrun_the_run(problem: Problem) -> None:
    found = json.loads(text(problem, "deepspeed", zero=3))
    assert found["zero_optimization"]["stage"] == 3 and found["train_batch_size"] == 2 * 4 * 8
    assert text(problem, "torchrun").count("--no-python thinwire train run.toml") == 2


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "torchrun"])
@pytest.mark.parametrize(
    ("plan", "line"),
    [
        ({"codec": "int4"}, "no int4 gradients"),
        ({"layout": {"outer": 2, "data": 4}, "sync": "diloco", "every": 30}, "it has no diloco"),
    ],
)
def test_what_a_target_cannot_launch_is_refused(problem: Problem, target: str, plan: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        text(problem, target, **plan)


def test_refusals_of_one_target(problem: Problem) -> None:
    for target, plan, line in (
        ("megatron", {"zero": 3}, "not weights"),
        ("megatron", {"layout": {"pipe": 2, "data": 4}, "schedule": "zbv"}, "by settings alone"),
        ("deepspeed", {"layout": {"pipe": 2, "data": 4}}, "layout.pipe=1"),
        ("torchrun", {"zero": 1}, "thinwire train cannot launch"),
        ("make", {}, "there are torchrun, torchtitan"),
    ):
        with pytest.raises(UserError, match=line):
            text(problem, target, **plan)
