"""Whole scripts with Horovod's API: the example, by every launcher that is here, and a rank that dies."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_horovod_ops import _ended  # noqa: F401 - a fixture

import launched
import thinwire  # noqa: F401 - a server that has it loaded
from pool import LOOPBACK, Rank
from warm import COMMAND, SOCKET, Warm, server

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "horovod_mnist.py")


def example(context: Rank, arguments: list[str]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        return float(runpy.run_path(EXAMPLE)["main"](arguments))


def run(command: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {SOCKET: server(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK} | variables
    process = Warm(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=55)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@pytest.mark.long
@pytest.mark.parametrize(
    ("pool", "arguments"),
    [
        ("ranks4", []),
        ("ranks4", ["--compression", "int4"]),
        ("ranks2", ["--epochs", "4", "--compression", "fp16"]),
        ("ranks2", ["--use-adasum"]),
    ],
)
def test_the_example_learns(request: pytest.FixtureRequest, pool: str, arguments: list[str]) -> None:
    found = request.getfixturevalue(pool).run(example, arguments, timeout_s=50)
    assert len(set(found)) == 1 and found[0] > 0.85


@pytest.mark.long
def test_horovodrun_starts_ranks_and_records_their_timeline(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# here\nlocalhost slots=2\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["-np", "2", "--hostfile", str(tmp_path / "hosts"), "--timeline-filename", str(tmp_path / "trace.json")]
    done = run(
        [*COMMAND, "horovodrun", *options, "--timeline-mark-cycles", sys.executable, str(tmp_path / "program.py"), "--die", "1"]
    )
    assert done.returncode == 3 and sorted(done.stdout.split()) == ["0/2", "1/2"], done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "thinwire: error: rank 1 (process" in line and line.endswith("ended with 7")
    events = json.loads((tmp_path / "trace.json").read_text())
    names = [event["name"] for event in events if event.get("tid", 0) == 1 or event["name"] == "CYCLE_START"]
    assert [names.count(name) for name in ("NEGOTIATE_ALLREDUCE", "0", "1", "ALLREDUCE")] == [3, 1, 1, 2]
    assert "CYCLE_START" in names and events[1]["args"] == {"name": "allreduce.loss"}


PROGRAM = """
import sys, torch
import thinwire.horovod.torch as hvd

hvd.init()
hvd.allreduce(torch.ones(1), name="loss")
print(f"{hvd.rank()}/{hvd.size()}", flush=True)
dies = sys.argv[1:] == ["--die", str(hvd.rank())]
hvd.shutdown()
sys.exit(7 if dies else 0)
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-np", "2", "-H", "far:2"], "far is another machine"),
        (["-np", "3", "-H", "localhost:2"], "-np 3: there is room for 2 ranks"),
        (["-np", "2", "-H", "localhost"], "names no host with its slots"),
        (["-np", "2", "--hostfile", "/nowhere"], "cannot be read"),
    ],
)
def test_horovodrun_refuses_in_one_line(options: list[str], said: str) -> None:
    done = run([*COMMAND, "horovodrun", *options, "python", "train.py"])
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


DIES_ONCE = """
import os, signal, sys, torch
import thinwire.horovod.torch as hvd

hvd.init()
model = torch.nn.Linear(2, 2)

@hvd.elastic.run
def train(state):
    print(f"rank {hvd.rank()} begins at {state.epoch}\\n", end="", flush=True)  # a line at once, of Python without buffers too
    while state.epoch < 4:
        with torch.no_grad():
            model.weight += hvd.allreduce(torch.ones(2, 2))
        state.epoch += 1
        state.commit()
        if state.epoch == 2 and hvd.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

with torch.no_grad():
    model.weight.zero_()
train(hvd.elastic.TorchState(model, epoch=0))
print(f"rank {hvd.rank()} ends with {model.weight.sum().item():g}\\n", end="", flush=True)
"""


@pytest.mark.long
@pytest.mark.timeout(180)
def test_ranks_that_torchrun_starts_again_go_on_from_the_last_commit(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(DIES_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    variables = {"TMPDIR": str(tmp_path), "GLOO_SOCKET_IFNAME": LOOPBACK, "PYTHONPATH": str(ROOT / "src")}
    command = [*torchrun, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines[0] == "rank 0 begins at 0" and lines.count("rank 0 ends with 16") == lines.count("rank 1 ends with 16") == 1
    assert any(line in lines for line in ("rank 0 begins at 1", "rank 0 begins at 2")), lines


@pytest.mark.long
@pytest.mark.skipif(bool(launched.MISSING), reason=launched.MISSING)
def test_mpiexec_starts_ranks() -> None:
    done = subprocess.run(
        [launched.mpiexec(), "-n", "2", sys.executable, EXAMPLE, "--epochs", "1"],
        env=launched.environment() | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode == 0 and done.stdout.startswith("epoch 1: loss"), done.stderr
