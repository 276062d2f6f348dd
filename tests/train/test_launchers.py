"""Launchers that start ranks again: torchrun after kill -9, Slurm after SIGTERM and a requeue; and mpiexec."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_options

import launched
from command import TINY_RUN, nothing_left, one_line, ranks_of, started, thinwire
from pool import LOOPBACK
from warm import COMMAND

RUN = TINY_RUN + 'steps = 100000\ncheckpoint_every = 2\nrun = "run"\n'
AGAIN = ["train", "run.toml", "--resume", "auto"]
KILLS = 10
ROOT = Path(__file__).parents[2]


def prepare(folder: Path, more: str = "") -> None:
    (folder / "text.txt").write_text("thin wires carry small numbers slowly " * 400)
    (folder / "run.toml").write_text(RUN + more)


def newest(folder: Path) -> int:
    """Step of the last whole checkpoint; -1: there is none."""
    return max((int(path.parent.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*/checksums.json")), default=-1)


def wait_for_step(folder: Path, step: int, process: Any, patience_s: float = 100) -> int:
    end = time.monotonic() + patience_s
    while (found := newest(folder)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no checkpoint of step {step} came"
        time.sleep(0.05)
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ten_kills_under_torchrun_lose_nothing_past_the_last_checkpoint(tmp_path: Path) -> None:
    prepare(tmp_path)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1:1",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
    ]
    options = ["--rdzv-endpoint", "localhost:0", "--max-restarts", str(KILLS), "--monitor-interval", "0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    process = subprocess.Popen(
        [*torchrun, *options, "-m", "thinwire", *AGAIN],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        saved = [wait_for_step(tmp_path, 2, process)]
        for kill in range(KILLS):
            time.sleep(0.1 * kill % 0.3)
            os.kill(ranks_of(tmp_path)[kill % 2], signal.SIGKILL)
            saved.append(wait_for_step(tmp_path, newest(tmp_path) + 4, process))
        for pid in ranks_of(tmp_path).values():
            os.kill(pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    resumed = [int(step) for step in re.findall(r"resumed \S+ at step (\d+)", out)]
    assert len(resumed) == KILLS, (out, err)
    assert all(step >= before for step, before in zip(resumed, saved, strict=False))  # nothing lost past a whole checkpoint
    said = [line for line in err.splitlines() if "thinwire: error" in line]
    assert len(said) <= KILLS and nothing_left(tmp_path), said


def slurm_step(folder: Path, rank: int, port: int) -> Any:
    """One task of an srun step on this machine, as Slurm 23 sets its variables."""
    variables = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0"}
    variables |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": str(port)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": LOOPBACK, "OMP_NUM_THREADS": "1"}
    return started(*AGAIN, cwd=folder, **variables)


@pytest.mark.long
def test_slurm_ends_a_step_by_sigterm_and_requeues_it(tmp_path: Path) -> None:
    prepare(tmp_path)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        free_port = sock.getsockname()[1]
    with slurm_step(tmp_path, 0, free_port) as first, slurm_step(tmp_path, 1, free_port) as second:
        wait_for_step(tmp_path, 2, first)
        for process in (first, second):  # as scancel and a time limit do, to each task
            process.send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=50) for process in (first, second)]
    codes = [first.returncode, second.returncode]
    last, (step,) = newest(tmp_path), re.findall(r"step (\d+): checkpoint", told[0][0])[-1:]
    assert int(step) == last and codes == [0, 0], (codes, told)
    with slurm_step(tmp_path, 0, free_port) as first, slurm_step(tmp_path, 1, free_port) as second:
        wait_for_step(tmp_path, last + 2, first)
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
        again, _ = first.communicate(timeout=50)
        second.communicate(timeout=50)
    assert f"resumed {tmp_path / 'run'} at step {last}" in again


@pytest.mark.parametrize("kind", ["JobSet", "PyTorchJob"])
def test_manifests_start_torchrun_as_it_understands_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, options and volumes of the page hang together; that fields exist was checked against the schemas that it names."""
    yaml = pytest.importorskip("yaml")
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "launchers.md").read_text(encoding="utf-8"), re.M | re.S)
    (job,) = [made for made in map(yaml.safe_load, blocks) if made["kind"] == kind]
    name, spec = job["metadata"]["name"], job["spec"]
    if kind == "JobSet":
        (hosts,) = spec["replicatedJobs"]
        hosts_number, pod = hosts["template"]["spec"]["completions"], hosts["template"]["spec"]["template"]["spec"]
        where = f"{name}-{hosts['name']}-0-0.{name}:29500"  # as JobSet calls the first pod
    else:
        workers, elastic, where = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"], f"{name}-worker-0:23456"
        hosts_number, pod = workers["replicas"], workers["template"]["spec"]
        given = {"NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}", "NPROC_PER_NODE": spec["nprocPerNode"]}
        given |= {"RDZV_BACKEND": elastic["rdzvBackend"], "RDZV_ENDPOINT": where, "MAX_RESTARTS": str(elastic["maxRestarts"])}
        for variable, value in given.items():  # as the operator sets them
            monkeypatch.setenv(f"PET_{variable}", value)
    (container,) = pod["containers"]
    program, *options = [*container["command"], *container.get("args", [])]
    found = torchrun_options().parse_args(options)
    assert (program, found.module, found.training_script) == ("torchrun", True, "thinwire")
    assert (found.nnodes.split(":")[-1], found.nproc_per_node, found.rdzv_endpoint) == (str(hosts_number), "1", where)
    assert (found.rdzv_backend, found.max_restarts) == ("c10d", 10)
    command, run, *keys = found.training_script_args
    assert command == "train" and keys == ["--set", "train.run=/data/run", "--resume", "auto"]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and run.startswith(f"{mount['mountPath']}/")


def test_auto_wants_a_folder_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TINY_RUN)
    assert "set it, for example --set train.run=runs/mine" in one_line(thinwire(*AGAIN, cwd=tmp_path).stderr)


@pytest.mark.long
def test_what_died_before_its_first_checkpoint_is_put_aside(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text("{}")
    done = thinwire(*AGAIN, "--set", "train.steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path) == 2 and (tmp_path / "run.1" / "record.json").exists()


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_worker_function_of_ray_sends_codes() -> None:
    command = [sys.executable, "examples/ray_worker.py"]
    environment = os.environ | {"PYTHONPATH": "src", "GLOO_SOCKET_IFNAME": LOOPBACK}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    found = re.search(r"loss (\S+), sent by a worker: (\S+) MB", done.stdout)
    assert found, done.stderr
    assert float(found[1]) < 0.1 and 0.5 < float(found[2]) < 0.2 * 100 * 4 * 19_210 / 1e6  # of float32's bytes, and some more


@pytest.mark.long
@pytest.mark.skipif(bool(launched.MISSING), reason=launched.MISSING)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_mpiexec_hands_on_a_signal_and_the_run_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    prepare(tmp_path)
    command = [launched.mpiexec(), "-n", "2", *COMMAND, *AGAIN]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=launched.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_step(tmp_path, 2, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=50)
    finally:
        process.kill()
        process.wait()
    assert "checkpoint checkpoints/step-" in out and process.returncode == 0, (process.returncode, out, err)
