"""A plan in the words of who launches it: torchrun, torchtitan's TOML, Megatron-LM's flags, DeepSpeed's JSON.

What a target cannot launch is refused with its reason, never left out: all average bf16 or float32 gradients, in each step.

    degrees, batch       torchtitan [parallelism], [training]; Megatron --*-model-parallel-size, --micro- and --global-batch-size
    ZeRO 1 | 3           Megatron --use-distributed-optimizer | refused; torchtitan FSDP2, which is ZeRO-2 or 3; DeepSpeed's stage
    interleaved          two stages a rank, as thinwire has them
    sequence parallel    Megatron --sequence-parallel; torchtitan's tensor parallelism is always so

(Options: torchtitan `config/job_config.py` of 2025; Megatron-LM `megatron/training/arguments.py`; DeepSpeed configuration JSON.)
"""

import json
from collections.abc import Callable, Mapping
from shlex import join

import tomli_w

from thinwire.cluster import Cluster
from thinwire.environment import DEFAULT_PORT
from thinwire.errors import UserError
from thinwire.plan.candidates import Candidate, Problem
from thinwire.plan.price import Priced
from thinwire.plan.problem import steps_of

PLAIN_CODECS = ("none", "bf16")


def exported(target: str, plan: Priced, problem: Problem, run_file: str) -> str:
    """Text for `target`, a key of TARGETS. run_file: where the plan's run.toml is, on all hosts. UserError for what it cannot
    launch."""
    if target not in TARGETS:
        raise UserError(f"--export {target}: there are {', '.join(TARGETS)}")
    problem = problem.on_hosts(plan.hosts)
    if target != "torchrun":
        _check(target, plan.candidate)
    return TARGETS[target](plan, problem, run_file)


def _check(target: str, plan: Candidate) -> None:
    if plan.layout.outer > 1:
        raise UserError(f"{target} cannot launch {plan}: it has no {plan.sync}; keep --set sync.kind=every_step")
    if plan.codec not in PLAIN_CODECS:
        raise UserError(f"{target} cannot launch {plan}: it has no {plan.codec} gradients; keep --set compress.kind=bf16")
    if plan.collectives != "native":
        raise UserError(f"{target} cannot launch {plan}: its collectives are the library's; keep --set collectives.kind=native")
    if (plan.schedule in ("zb1p", "zbv") and target == "megatron") or (plan.layout.pipe > 1 and target == "deepspeed"):
        instead = "pipeline.schedule=1f1b" if target == "megatron" else "layout.pipe=1"
        raise UserError(f"{target} cannot launch {plan} by settings alone; keep --set {instead}")


def launcher(cluster: Cluster, program: list[str]) -> str:
    """A line for each host, to run there; the first host is where the ranks meet."""
    hosts = cluster.hosts
    meet = hosts[0].address or hosts[0].name
    lines = []
    for number, host in enumerate(hosts):
        line = ["torchrun", f"--nnodes={len(hosts)}", f"--node-rank={number}", f"--nproc-per-node={len(host.devices)}"]
        line += [f"--rdzv-endpoint={meet}:{DEFAULT_PORT}", "--rdzv-backend=c10d", *program]
        lines.append(f"# on {host.name}\n{join(line)}")
    return "\n".join(lines)


def _torchrun(priced: Priced, problem: Problem, run_file: str) -> str:
    plan = priced.candidate
    if not plan.launched:
        raise UserError(f"thinwire train cannot launch {plan}; leave --beyond out")
    return launcher(problem.cluster, ["--no-python", "thinwire", "train", run_file])


def _torchtitan(priced: Priced, problem: Problem, run_file: str) -> str:
    plan, train = priced.candidate, problem.config.train
    layout = plan.layout
    schedules = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zb1p": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble"}
    sharded = plan.zero > 0
    parallelism: dict[str, object] = {
        "data_parallel_replicate_degree": 1 if sharded else layout.data,
        "data_parallel_shard_degree": layout.data if sharded else 1,
        "fsdp_reshard_after_forward": "always" if plan.zero == 3 else "never",
        "tensor_parallel_degree": layout.tensor,
        "context_parallel_degree": layout.seq,
        "pipeline_parallel_degree": layout.pipe,
        "expert_parallel_degree": layout.expert,
    }
    if layout.pipe > 1:
        parallelism["pipeline_parallel_schedule"] = schedules[plan.schedule]
        parallelism["pipeline_parallel_microbatch_size"] = plan.micro_batch
    local = plan.micro_batch * (plan.accumulate if layout.pipe > 1 else 1)
    content: Mapping[str, Mapping[str, object]] = {
        "training": {
            "local_batch_size": local,
            "global_batch_size": plan.sequences,
            "seq_len": train.sequence,
            "steps": steps_of(priced, problem),
            "mixed_precision_reduce": "bfloat16" if plan.codec == "bf16" else "float32",
        },
        "parallelism": parallelism,
        "activation_checkpoint": {"mode": plan.recompute},
    }
    return f"# [model] name and flavor are yours\n{tomli_w.dumps(content)}"


def _megatron(priced: Priced, problem: Problem, run_file: str) -> str:
    plan, shape, train = priced.candidate, problem.shape, problem.config.train
    layout = plan.layout
    if plan.zero == 3:
        raise UserError(f"megatron cannot launch {plan}: it shards the optimizer's state, not weights; leave --beyond out")
    flags: dict[str, object] = {
        "num-layers": shape.layers,
        "hidden-size": shape.width,
        "num-attention-heads": shape.heads,
        "ffn-hidden-size": shape.hidden,
        "seq-length": train.sequence,
        "max-position-embeddings": shape.context,
        "micro-batch-size": plan.micro_batch,
        "global-batch-size": plan.sequences,
        "train-iters": steps_of(priced, problem),
        "tensor-model-parallel-size": layout.tensor,
        "pipeline-model-parallel-size": layout.pipe,
        "context-parallel-size": layout.seq,
    }
    if shape.experts:
        flags |= {"num-experts": shape.experts, "moe-router-topk": shape.experts_per_token}
        flags["expert-model-parallel-size"] = layout.expert
    if shape.kv_heads != shape.heads:
        flags["num-query-groups"] = shape.kv_heads
    if layout.pipe > 1 and plan.schedule == "interleaved":
        if shape.layers % (2 * layout.pipe):
            raise UserError(
                f"megatron cannot launch {plan}: {shape.layers} layers are not a multiple of {2 * layout.pipe} stages"
            )
        flags["num-layers-per-virtual-pipeline-stage"] = shape.layers // (2 * layout.pipe)
    elif shape.layers % layout.pipe:
        raise UserError(f"megatron cannot launch {plan}: {shape.layers} layers are not a multiple of {layout.pipe} stages")
    if plan.recompute != "none":
        flags["recompute-granularity"] = plan.recompute
    if plan.recompute == "full":
        flags |= {"recompute-method": "uniform", "recompute-num-layers": 1}
    switches = {
        "bf16": True,
        "use-distributed-optimizer": plan.zero > 0,
        "sequence-parallel": plan.sequence_parallel,
        "grad-reduce-in-bf16": plan.codec == "bf16",
        "group-query-attention": shape.kv_heads != shape.heads,
        "swiglu": shape.mlp == "swiglu",
        "untie-embeddings-and-output-weights": not shape.tied,
        "use-rotary-position-embeddings": shape.positions == "rotary",
    }
    program = ["pretrain_gpt.py", *(text for key, value in flags.items() for text in (f"--{key}", str(value)))]
    program += [f"--{key}" for key, wanted in switches.items() if wanted]
    program += ["--normalization", "RMSNorm"] if shape.norm == "rms" else []
    return launcher(problem.cluster, program)


def _deepspeed(priced: Priced, problem: Problem, run_file: str) -> str:
    plan = priced.candidate
    layout = plan.layout
    if layout.tensor * layout.seq * layout.expert > 1:
        raise UserError(f"deepspeed cannot launch {plan} by settings alone; keep --set layout.tensor=1")
    content = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulate,
        "train_batch_size": plan.sequences,
        "bf16": {"enabled": True},
        "communication_data_type": "bf16" if plan.codec == "bf16" else "fp32",
        "zero_optimization": {"stage": plan.zero, "overlap_comm": True},
        "gradient_clipping": problem.config.train.clip,
    }
    return json.dumps(content, indent=2)


TARGETS: Mapping[str, Callable[[Priced, Problem, str], str]] = {
    "torchrun": _torchrun,
    "torchtitan": _torchtitan,
    "megatron": _megatron,
    "deepspeed": _deepspeed,
}
