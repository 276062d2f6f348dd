"""Traces as torch.profiler writes them on GPUs, of steps whose parts are known: the same verdict as from our own marks."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from recorded import OPTIMIZER_S, Script

import command
from thinwire.cluster import dump_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.model import Cluster
from thinwire.errors import UserError
from thinwire.why.kineto import read_traces
from thinwire.why.steps import profile
from thinwire.why.trace import BACKWARD, DATA, DATA_END, FORWARD, STEP, Call, Mark, Trace, Wait

CLUSTER = equal_hosts(2, 1e8)


def written(script: Script, folder: Path, shifts_s: list[float], world_size: int = 2) -> list[Path]:
    """Each rank's trace as kernels: what computes, what computes in the backward pass, and the collectives."""
    paths = []
    for rank, trace in enumerate(script.traces(shifts_s)):
        path = folder / f"rank{rank}.json.gz"
        about = {"backend": "nccl", "rank": rank, "world_size": world_size}
        content = {"distributedInfo": about, "traceEvents": list(kernels(trace))}
        path.write_bytes(gzip.compress(json.dumps(content).encode()))
        paths.append(path)
    return paths


def kernels(trace: Trace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    number = 0

    def add(cat: str, name: str, begun: float, ended: float, **about: Any) -> None:
        span = {"ph": "X", "cat": cat, "name": name, "pid": 0, "ts": begun * 1e6, "dur": (ended - begun) * 1e6}
        found.append({**span, "tid": 2 if cat == "cuda_runtime" else 1, "args": about})

    add("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 0.0, 1e-6)
    found[-1]["tid"] = 2
    for place, event in enumerate(trace):
        if isinstance(event, Call):
            group = {"Process Group Ranks": str(list(event.group)), "Group size": len(event.group)}
            values = {"Collective name": "allreduce", "In msg nelems": event.message_bytes // 4, "dtype": "Float"}
            add("kernel", "ncclDevKernel_AllReduce", event.issued, event.ended, **values, **group)
        elif isinstance(event, Mark) and event.what == STEP:
            add("gpu_user_annotation", "Optimizer.step#SGD.step", event.at - OPTIMIZER_S, event.at)
        elif isinstance(event, Mark) and event.what == DATA:
            until = next(one.at for one in trace[place:] if isinstance(one, Mark) and one.what == DATA_END)
            add("user_annotation", "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", event.at + 2e-6, until)
        elif isinstance(event, Mark) and event.what in (FORWARD, BACKWARD):
            following = [one for one in trace[place + 1 :] if isinstance(one, Mark | Call | Wait)]
            last = next(n for n, one in enumerate(following) if isinstance(one, Mark))
            ended = (
                following[last].at if event.what == FORWARD else max(c.issued for c in following[:last] if isinstance(c, Call))
            )
            number += 1
            add("kernel", "gemm", event.at, ended, correlation=number)
            if event.what == BACKWARD:
                add("cuda_runtime", "cudaLaunchKernel", event.at, event.at + 1e-6, correlation=number)
    return found


def test_terms_and_calls_are_those_of_our_own_marks_whatever_the_clocks_show(tmp_path: Path) -> None:
    script = Script(cluster=CLUSTER, slower={1: 1.5}, buckets=(300_000,), data_s=0.01)
    known = profile(script.traces(), [0.0, 0.0])
    traces, offsets_s = read_traces(written(script, tmp_path, [0.0, 7.0]))
    assert offsets_s == pytest.approx([0.0, 7.0])
    found = profile(traces, offsets_s)
    assert found.step_s == pytest.approx(known.step_s)
    assert found.waiting_s == pytest.approx(known.waiting_s, abs=1e-5)
    assert found.exposed_s == pytest.approx(known.exposed_s, abs=1e-5)
    for made, expected in zip(found.calls.values(), known.calls.values(), strict=True):
        assert (made.op, made.message_bytes) == (expected.op, expected.message_bytes)
        assert made.service_s == pytest.approx(expected.service_s, abs=1e-5)
    for mine, theirs in zip(found.programs, known.programs, strict=True):
        for phase in ("data", "forward", "backward", "optimizer"):
            assert mine.total(phase) == pytest.approx(theirs.total(phase), abs=1e-4), phase


def test_one_rank_stands_for_all_and_the_command_names_the_link(tmp_path: Path) -> None:
    path = written(Script(cluster=CLUSTER, buckets=(1 << 20,) * 4), tmp_path, [0.0, 0.0])[0]
    dump_cluster(CLUSTER, tmp_path / "cluster.toml")
    done = command.thinwire("why", "--attach-json", str(path), "--cluster", "cluster.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "why: bandwidth" in done.stdout and "host0 -> switch" in done.stdout


def test_what_is_no_trace_of_all_ranks_is_refused(tmp_path: Path) -> None:
    def cluster(size: int) -> Cluster:
        return equal_hosts(size, 1e8)

    two = written(Script(cluster=cluster(3)), tmp_path, [0.0] * 3, world_size=3)[:2]
    with pytest.raises(UserError, match="2 traces of 2 ranks of 3"):
        read_traces(two)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    with pytest.raises(UserError, match="is no trace of torch"):
        read_traces([wrong])
