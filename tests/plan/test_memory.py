"""What a rank needs in bytes: against what autograd keeps, against what processes were measured to take, and what is refused."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from command import one_line, ranks_of, started
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig, load_run
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.measure.memory import Free, Room, free_memory, rooms, total_memory
from thinwire.models.transformer import Transformer
from thinwire.plan.fitting import TOLERANCE, check, leaner, line
from thinwire.plan.memory import ALLOCATOR, Blocks, Need, activations_bytes, need, recomputed_blocks
from thinwire.sync.single_rank import SingleRank
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import Stepper
from thinwire.workload import Workload

SHAPES = [
    {"norm": "rms", "mlp": "swiglu", "positions": "rotary"},
    {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "kv_heads": 1},
    {"norm": "layer", "mlp": "gelu", "positions": "learned"},
    {"norm": "rms", "mlp": "gelu", "positions": "learned", "dtype": "bfloat16"},
    {"norm": "layer", "mlp": "swiglu", "positions": "rotary", "dtype": "bfloat16"},
    {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "dtype": "float64"},
    {"experts": 4, "capacity": 0.0},
    {"experts": 8, "experts_per_token": 1, "mlp": "gelu", "dtype": "bfloat16"},
]


def kept_bytes(shape: ModelConfig, batch: int, length: int, casts: bool) -> int:
    """By autograd between a forward and a backward pass, without the parameters."""
    model = Transformer(shape).to(getattr(torch, shape.dtype))
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(shape.vocabulary, (batch, length + 1))
    precision = torch.autocast("cpu", dtype=torch.bfloat16) if casts else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        model(tokens[:, :-1], tokens[:, 1:])
    return sum(found.values())


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("options", SHAPES, ids=lambda options: " ".join(map(str, options.values())))
def test_a_block_keeps_what_autograd_keeps(options: dict[str, object], casts: bool) -> None:
    """Two models that differ in their layers, so that what is at the ends falls out."""
    if casts and "dtype" in options:
        pytest.skip("only weights in float32 are cast")
    found = []
    for layers in (1, 4):
        shape = ModelConfig(layers=layers, width=64, heads=4, vocabulary=64, context=128, **options)  # type: ignore[arg-type]
        predicted = activations_bytes(shape, Workload.of_transformer(shape, 2, 128), casts=casts)
        found.append((predicted, kept_bytes(shape, 2, 128, casts)))
    (short, short_kept), (long, long_kept) = found
    assert long - short == pytest.approx(ALLOCATOR * (long_kept - short_kept), rel=0.05)


SMALL = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=256", "train.micro_batch=1", "train.sequence=16"]
LARGE = ["model.layers=6", "model.width=512", "model.heads=8", "model.context=256", "train.micro_batch=2", "train.sequence=64"]
WIDE_BATCH = ["model.layers=6", "model.width=256", "model.heads=8", "model.context=512", "train.micro_batch=8"]
LEANER = ("selective", "full")
MEASURED = {
    "adamw": LARGE,
    "sgd": [*LARGE, "train.optimizer.kind=sgd"],
    "8 bits": [*LARGE, "train.optimizer.states=8bit"],
    "early": [*LARGE, "sync.kind=diloco", "sync.every=2", "sync.accumulate=1", "train.clip=0", "train.updates=early"],
    "int4": [*LARGE, "compress.kind=int4"],
    "diloco": [*LARGE, "sync.kind=diloco", "sync.every=2"],
    "retrace": [*LARGE, "sync.kind=retrace", "sync.every=2", "compress.kind=ternary", "compress.feedback=false"],
    "tensor": [*LARGE, "model.layers=12", "layout.tensor=2"],
    "tensor activations": [*WIDE_BATCH, "train.sequence=256", "layout.tensor=2"],
    "sharded": [*LARGE, "model.layers=12", "layout.shard=2"],
    "sharded, added up": [*LARGE, "model.layers=12", "layout.shard=2", "sync.accumulate=2", "sharded.reshard=never"],
    "sequence": [*WIDE_BATCH, "train.sequence=256", "layout.seq=2"],
    "experts": [*WIDE_BATCH, "train.sequence=128", "model.experts=4", "layout.expert=2"],
    "activations": [*WIDE_BATCH, "train.sequence=256"],
    "recompute": [*WIDE_BATCH, "train.sequence=256", "train.recompute=full"],
    "vocabulary": ["model.preset=1m", "model.vocabulary=20000", "train.sequence=256", "train.micro_batch=8"],
}


def needed(*changes: str, ranks: int = 2, on_device: bool = False) -> Need:
    config = load_run(None, list(changes))
    layout = config.layout.resolve(ranks, rare=config.sync.rare)
    return need(config, config.model.shape(), layout, casts=False, on_device=on_device)


def peak_bytes(folder: Path, changes: list[str]) -> int:
    """The most that rank 0 of two had resident, in a real run, before its last step; so no checkpoint is in it."""
    folder.mkdir()
    more = [
        "train.dtype=float32",
        "train.steps=4",
        "train.log_every=1",
        "train.eval_every=0",
        "train.eval_tokens=512",
        "train.run=run",
    ]
    arguments = [part for change in [*changes, *more] for part in ("--set", change)]
    with started("train", *arguments, cwd=folder, cold=True, PYTHONUNBUFFERED="1") as process:
        assert process.stdout is not None and process.stderr is not None
        for text in process.stdout:
            if re.match(r"step +3/4", text):
                status = Path(f"/proc/{ranks_of(folder)[0]}/status").read_text()
                break
        else:
            raise AssertionError(process.stderr.read())
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found.group(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """Of a model of next to nothing: what the program itself takes."""
    return peak_bytes(tmp_path_factory.mktemp("base") / "run", SMALL), needed(*SMALL).training_bytes


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_a_run_takes_what_was_predicted(case: str, base: tuple[int, int], tmp_path: Path) -> None:
    measured = peak_bytes(tmp_path / "run", MEASURED[case]) - base[0]
    lenient = 0.35 if case == "8 bits" else 0.25  # buckets that DDP makes anew count, and are not resident before the old ones go
    assert needed(*MEASURED[case]).training_bytes - base[1] == pytest.approx(measured, rel=lenient), measured


def test_terms_follow_the_optimizer_and_what_is_exchanged() -> None:
    plain, weights = needed(), needed().weights_bytes
    assert (plain.optimizer_bytes, plain.exchange_bytes) == (2 * weights, 0)
    assert needed("train.optimizer.kind=sgd").optimizer_bytes == weights
    assert needed("model.dtype=bfloat16").weights_bytes == weights // 2
    assert needed("sync.kind=diloco").exchange_bytes == 2 * weights
    assert needed("sync.kind=local_sgd").exchange_bytes == weights
    assert needed("sync.kind=retrace").exchange_bytes == 4 * weights
    assert needed("sync.kind=diloco", ranks=1).exchange_bytes == 0
    for kind in ("diloco", "streaming", "noloco"):
        there, host = (needed(f"sync.kind={kind}", f"sync.outer_device={where}", on_device=True) for where in ("device", "host"))
        assert (there.exchange_bytes, host.exchange_bytes) == (2 * weights, 0)
        assert there.under_way_bytes < host.under_way_bytes <= there.under_way_bytes + 2 * weights
        assert needed(f"sync.kind={kind}", "sync.outer_device=host") == needed(f"sync.kind={kind}")
    coded = needed("compress.kind=topk", "compress.exclude=[]", "compress.vectors=true").exchange_bytes
    assert coded == weights and needed("compress.kind=topk", "compress.feedback=false").exchange_bytes == 0
    assert (
        needed(
            "compress.kind=topk", "compress.exclude=[]", "compress.vectors=true", "compress.feedback_storage=int8"
        ).exchange_bytes
        < coded / 3
    )
    assert needed("layout.seq=2", "compress.kind=int4") == replace(
        needed("compress.kind=int4"), activations_bytes=needed("layout.seq=2").activations_bytes
    ), "all but activations is as of two replicas"
    assert 0.5 < needed("layout.seq=2").activations_bytes / needed().activations_bytes < 0.6
    assert needed("train.micro_batch=16").activations_bytes == 2 * needed("train.micro_batch=8").activations_bytes


def test_what_cannot_fit_is_refused_and_what_may_is_not() -> None:
    one, ranks = needed(), 4
    enough = one.host_bytes(ranks) / TOLERANCE
    check(one, [Room("host0", ranks, enough), Room("host1", 1, enough)])
    with pytest.raises(
        UserError, match=r"^memory: 4 ranks on host1 would need about .* \(each weights .*\), and .* are free there; take"
    ):
        check(one, [Room("host0", ranks, 2 * enough), Room("host1", ranks, 0.99 * enough)])
    assert line(one, [Room("host0", 1, 2e9), Room("host1", 2, 1e9)]).endswith("; host1 has 954 MiB free for 2 ranks")
    assert line(one, []).endswith("; what is free is not known here")


def test_the_nearest_recompute_setting_that_fits_is_named() -> None:
    config = load_run(None, [*WIDE_BATCH, "train.sequence=512"])
    layout = config.layout.resolve(1, rare=False)
    plain, (selective, full) = (
        needed(*WIDE_BATCH, "train.sequence=512", ranks=1),
        (f"train.recompute = {one!r}" for one in LEANER),
    )
    less = leaner(config, config.model.shape(), layout, casts=False)
    eight_bit = "train.optimizer.states = '8bit'"
    assert list(less) == [selective, eight_bit, full, f"{eight_bit}, {full}"], "early updates want no clipping"
    assert plain.rank_bytes > less[selective].rank_bytes > less[full].rank_bytes
    assert less[full] == needed(*WIDE_BATCH, "train.sequence=512", "train.recompute=full", ranks=1)
    for free, said in (
        (1.01 * less[selective].rank_bytes, f"take {selective}, with which they need"),
        (1.01 * less[full].rank_bytes, f"take {full}, with which they need"),
        (0.5 * less[full].rank_bytes, "take a smaller model.preset"),
    ):
        with pytest.raises(UserError, match=said):
            check(plain, [Room("host0", 1, free)], less)


def test_states_that_are_too_large_are_coded_released_or_shared_out() -> None:
    """What is named fits, and would be taken by a run."""
    given = ["model.preset=124m", "train.micro_batch=1", "train.sequence=16", "train.clip=0"]
    for ranks, names in (
        (1, {"train.updates = 'early'", "train.optimizer.states = '8bit'"}),
        (4, {"layout.shard = 2, layout.data = 2", "layout.shard = 4, layout.data = 1"}),
    ):
        config = load_run(None, given)
        layout = config.layout.resolve(ranks, rare=False)
        less = leaner(config, config.model.shape(), layout, casts=False)
        assert names <= set(less)
        for name in names:
            changed = load_run(None, [*given, *(one.replace(" ", "").replace("'", "") for one in name.split(", "))])
            assert less[name] == need(changed, changed.model.shape(), changed.laid_out(ranks), casts=False)
            assert less[name].training_bytes < needed(*given, ranks=ranks).training_bytes
    on_device = leaner(config, config.model.shape(), layout, casts=False, on_device=True)
    assert "train.on_host = ['optimizer']" in on_device and "train.on_host = ['optimizer']" not in less


@pytest.mark.long
@pytest.mark.parametrize("changes", [(), ("train.updates=early",), ("train.optimizer.states=8bit",)], ids=str)
def test_what_is_allocated_is_predicted(changes: tuple[str, ...]) -> None:
    """Of one rank without buckets, in every tensor that PyTorch allocates; no allocator loses room in between."""
    from torch.distributed._tools.mem_tracker import MemTracker  # which loads the compiler

    config = load_run(None, [*LARGE, "model.layers=2", "train.clip=0", "train.dtype=float32", *changes])
    shape = config.model.shape()
    model = Transformer(shape)
    optimizer, tracker = make_optimizer(model, config.train), MemTracker()
    stepper = Stepper(
        model=model,
        optimizer=optimizer,
        sync=SingleRank(),
        loss=lambda model, batch: model(*batch),
        precision=nullcontext,
        train=config.train,
    )
    tokens = torch.randint(shape.vocabulary, (config.train.micro_batch, config.train.sequence))
    tracker.track_external(model, optimizer)
    with tracker:
        for step in range(2):
            stepper.run(step, [(tokens, tokens)], 1)
            tracker.reset_mod_stats()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    one = need(config, shape, Layout(), casts=False)
    lost = int(one.activations_bytes * (1 - 1 / ALLOCATOR))
    assert one.training_bytes - lost == pytest.approx(found["Total"], rel=0.05)


def test_a_budget_is_met_with_the_fewest_operations() -> None:
    """Against all choices; with stages, of which the first holds more micro-batches, and with tensor ranks that differ."""
    heads = ["model.heads=9", "model.kv_heads=3", "model.width=288", "model.layers=5", "model.context=512", "train.sequence=512"]
    for ranks, layout in ((1, []), (4, ["layout.pipe=2", "layout.tensor=2", "sync.accumulate=4"])):
        given = [*heads, *layout, "train.micro_batch=8"]
        least, most = (needed(*given, f"train.recompute={kind}", ranks=ranks).rank_bytes for kind in ("full", "none"))
        before = 0.0
        for share in (1.0, 0.7, 0.4, 0.1, 0.0):
            budget = least + share * (most - least)
            config = load_run(None, [*given, f"train.recompute={budget}"])
            shape, axes = config.model.shape(), config.layout.resolve(ranks, rare=False)
            assert need(config, shape, axes, casts=False).rank_bytes <= budget
            kinds = recomputed_blocks(config, shape, axes, casts=False)
            again = Workload.of_transformer(shape, 8, 512).recomputing(kinds).recomputed_flops_per_token
            assert again >= before and (again == 0) == (share == 1.0)
            before = again
            if ranks == 1:
                assert again == fewest(shape, config, budget)
        with pytest.raises(UserError, match=r"a rank needs about .* even when it computes its \d blocks again; give"):
            needed(*given, f"train.recompute={0.9 * least}", ranks=ranks)


def fewest(shape: ModelConfig, config: RunConfig, budget: float) -> float:
    """Of one rank, by trying all."""
    workload, bare = Workload.of_transformer(shape, 8, 512), need(config, shape, Layout(), casts=False)
    one = {kind: workload.recomputing({"blocks.0": kind}).recomputed_flops_per_token for kind in LEANER}
    found = []
    for selective, full in product(range(6), repeat=2):
        if selective + full <= 5:
            blocks = Blocks(plain=5 - selective - full, selective=selective, full=full)
            activations = activations_bytes(shape, workload, casts=False, blocks=blocks)
            if replace(bare, activations_bytes=activations).rank_bytes <= budget:
                found.append(selective * one["selective"] + full * one["full"])
    return min(found)


def test_what_cannot_be_computed_again_is_refused() -> None:
    with pytest.raises(UserError, match=r"'zb1p' goes back twice.*take '1f1b'"):
        load_run(None, ["layout.pipe=2", "pipeline.schedule=zb1p", "train.recompute=full"])
    with pytest.raises(UserError, match="recompute"):
        load_run(None, ["train.recompute=some"])
    assert load_run(None, ["train.recompute=2 GiB"]).train.recompute == 2.0**31


def test_ranks_that_share_a_machine_are_added_up() -> None:
    ranks = [("host0", Free(8e9, "a")), ("host1", Free(7e9, "a")), ("host2", Free(5e9, "b")), ("host3", None)]
    assert rooms(ranks) == [Room("the machine of host0, host1", 2, 7e9), Room("host2", 1, 5e9)]  # type: ignore[arg-type]


def linux(folder: Path, available_kib: int, groups: str, **files: str) -> Path:
    """A root with what Linux says."""
    kept = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available_kib} kB\n", "proc/self/cgroup": groups}
    kept |= {"proc/sys/kernel/random/boot_id": "id\n", **files}
    for name, text in kept.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_control_group_that_allows_less_counts(tmp_path: Path) -> None:
    assert free_memory(linux(tmp_path / "none", 1000, "0::/\n")) == Free(1024_000.0, "id")
    second = {
        "sys/fs/cgroup/a/memory.max": "5000\n",
        "sys/fs/cgroup/a/memory.current": "3000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "2000\n",
        "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0\n",
    }
    found = free_memory(linux(tmp_path / "second", 1000, "0::/a/b\n", **second))
    assert found is not None and found.bytes == 2500 and found.pool != "id"
    first = {
        f"sys/fs/cgroup/memory/{name}": text
        for name, text in {
            "memory.limit_in_bytes": "4000\n",
            "memory.usage_in_bytes": "1000\n",
            "memory.stat": "total_inactive_file 100\n",
        }.items()
    }
    root = linux(tmp_path / "first", 1000, "5:cpu,memory:/\n0::/\n", **first)
    found = free_memory(root)
    assert found is not None and found.bytes == 3100 and total_memory(root) == 4000
    assert free_memory(tmp_path / "nothing") is None
    here = free_memory()
    assert here is None or 0 < here.bytes <= total_memory()


@pytest.mark.long
def test_a_model_that_cannot_fit_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with started("train", "--set", "model.preset=1t", cwd=tmp_path, cold=True) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 2 and out == ""
    assert one_line(err).startswith("memory: 2 ranks on this machine would need about ")
    assert "starting" not in out, "no rank was begun"
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_ranks_refuse_together_what_cannot_fit(tmp_path: Path) -> None:
    """As they are started on the hosts of a lab, where no launcher has looked before."""
    (tmp_path / "text.txt").write_text("a text " * 2000)
    agent = [sys.executable, "-m", "thinwire.train.agent", "--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "2"]
    settings = ["model.preset=530b", "data.source=text.txt", "data.cache=cache", "train.run=run"]
    command = [*agent, "--rdzv-endpoint", "127.0.0.1:0", "--", *(part for one in settings for part in ("--set", one))]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2, done.stderr
    assert " would need about " in one_line(done.stderr)
