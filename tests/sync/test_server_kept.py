"""What servers keep: whenever they are killed, all go on from one version of one model, or say why not."""

import os
import shutil
import signal
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from services import serving, wait_for
from test_server_gradients import loss_of, make_model, rows, train

from command import one_line, started, thinwire
from thinwire import AsyncDiLoCo, ParameterServerWorker
from thinwire.config.replicas import DiLoCo, Gradients, ServerSGD, Service
from thinwire.errors import UserError
from thinwire.sync.server.connection import PeerLost
from thinwire.sync.server.snapshots import KEPT, Snapshots, choose_versions, files, load

SERVERS = 3
SEQUENTIAL = Service(servers=SERVERS, first_workers=2, merge=Gradients(optimizer=ServerSGD(momentum=0.9)), heartbeat_s=0.1)


def state(version: int, model: int = 1) -> dict:
    return {"model": model, "version": version, "merged": 0.0, "steps": {}, "weights": None}


def fill(folder: Path, versions: list[list[int]], servers: int | None = None, model: int = 1) -> None:
    for index, numbers in enumerate(versions):
        kept = Snapshots(folder, index, Service(servers=servers or len(versions)), 1)
        for version in numbers:
            kept.write(state(version, model))


def found(folder: Path, index: int) -> list[int]:
    return [load(path)["version"] for path in files(folder, index)]


def test_the_last_few_are_kept_the_newest_under_the_plain_name(tmp_path) -> None:
    fill(tmp_path, [[0, 1, 1, 2, 3, 7, 7]])
    assert found(tmp_path, 0) == [7, 3, 2] and KEPT == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server-0.1.pt", "server-0.2.pt", "server-0.pt"]


def test_first_weights_that_replace_others_replace_their_file(tmp_path) -> None:
    kept = Snapshots(tmp_path, 0, Service(), 1)
    for one in (state(0, 1), state(0, 2), state(0, 2)):
        kept.write(one)
    assert [load(path)["model"] for path in files(tmp_path, 0)] == [2]


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([[3, 4, 5], [3, 4], [4, 5]], [4, 4, 4]),
        ([[0], [0], [0]], [0, 0, 0]),
        ([[100, 150, 163], [100, 150, 162], [50, 100, 149]], [100, 100, 100]),
        ([[], [], []], None),
        ([[0], [0], []], None),  # killed before anybody had the first weights
    ],
)
def test_the_newest_version_that_all_have_is_taken_and_what_is_newer_removed(tmp_path, versions, expected) -> None:
    fill(tmp_path, versions)
    assert choose_versions(tmp_path, SEQUENTIAL) == expected
    left = [found(tmp_path, index) for index in range(SERVERS)]
    if expected:
        assert [server[0] for server in left] == expected
        assert left == [sorted((v for v in server if v <= expected[0]), reverse=True) for server in versions]
    else:
        assert left == [[], [], []]


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ([[3, 4], [3, 4], []], "nothing is kept there of server 2 of 3; give its files back"),
        ([[3, 4], [5, 6], [4, 5]], "no version is kept of all servers, and two would be mixed (server 0: 3, 4; server 1: 5, 6;"),
        ([[3], [3]], "was kept by 2 servers, and there are 3; start as many"),
        ([[3], [3], [3], [3]], "was kept by 4 servers, and there are 3; start as many"),
    ],
)
@pytest.mark.parametrize("merge", [Gradients(), DiLoCo()])
def test_what_would_mix_two_models_is_refused_in_one_line(tmp_path, merge, versions, words) -> None:
    fill(tmp_path, versions)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        choose_versions(tmp_path, SEQUENTIAL.model_copy(update={"merge": merge}))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_files_of_two_runs_are_refused(tmp_path) -> None:
    fill(tmp_path, [[3], [3]], servers=3)
    fill(tmp_path / "other", [[3]] * 3, model=2)
    shutil.copy(tmp_path / "other" / "server-2.pt", tmp_path)
    with pytest.raises(UserError, match="its files are of two models"):
        choose_versions(tmp_path, SEQUENTIAL)
    torch.save({"version": 1}, tmp_path / "server-2.pt")
    with pytest.raises(UserError, match="was kept by another version of thinwire"):
        choose_versions(tmp_path, SEQUENTIAL)
    (tmp_path / "server-2.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"server-2\.pt: cannot be read"):
        choose_versions(tmp_path, SEQUENTIAL)


def test_asynchronous_gradients_go_on_from_the_newest_of_each(tmp_path) -> None:
    fill(tmp_path, [[50, 100], [150, 200], [100, 150]])
    assert choose_versions(tmp_path, SEQUENTIAL.model_copy(update={"merge": Gradients(delay=-1)})) == [100, 200, 150]


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_servers_in_step_always_have_a_version_in_common(servers: int, every: int, data: st.DataObject) -> None:
    """Any run in which nobody makes v + 1 before all have written the multiples up to v, killed anywhere, has one."""
    made, written = [0] * servers, [[0] for _ in range(servers)]
    for _ in range(data.draw(st.integers(0, 30))):
        index = data.draw(st.integers(0, servers - 1))
        due = made[index] // every * every
        if written[index][-1] < due:
            if data.draw(st.booleans()):
                written[index].append(due)
        elif made[index] <= min(made) and all(written[other][-1] >= made[other] // every * every for other in range(servers)):
            made[index] += 1
        elif made[index] == min(made):
            made[index] += all(written[other][-1] >= min(made[index], made[other]) // every * every for other in range(servers))
    kept = [set(versions[-KEPT:]) for versions in written]
    assert set.intersection(*kept)
    assert max(set.intersection(*kept)) >= (min(made) // every - 1) * every


def trains(address: str, kind: str, steps: int) -> None:
    """One worker, whose result depends on the servers' weights and its step alone."""
    model = make_model()
    if kind == "gradients":
        with ParameterServerWorker(model, store=address, name="a") as worker:
            for step in range(worker.first_step, steps):
                loss_of(model, rows(step, 0)).backward()
                worker.step(learning_rate=0.05)
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with AsyncDiLoCo(model, optimizer, store=address, name="a", every=4) as replica:
        for step in range(replica.first_step, steps):
            loss_of(model, rows(step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "steps", "kills", "merge"),
    [
        ("diloco", 40, (0, 3), DiLoCo()),
        long("gradients", 170, (0, 50, 100), Gradients(optimizer=ServerSGD(momentum=0.9))),
        long("diloco", 160, (0, 7, 8, 20, 33), DiLoCo()),
    ],
)
def test_servers_killed_at_any_time_go_on_to_the_undisturbed_result(tmp_path, kind, steps, kills, merge) -> None:
    """Three servers, killed once a version of `kills` is on the disk of the first; their worker comes back by itself."""
    with serving(Service(servers=SERVERS, merge=merge)) as running:
        trains(running.address, kind, steps)
        expected, versions = running.weights(), [server.merger.version for server in running.servers]
    done, address, keep = threading.Event(), [""], tmp_path / "kept"

    def comes_back() -> None:
        while not done.is_set():
            with suppress(PeerLost):
                trains(address[0], kind, steps)
                done.set()

    def reached(version: int) -> bool:
        with suppress(UserError):  # it is being renamed
            return max(found(keep, 0), default=-1) >= version
        return False

    options = [f"servers={SERVERS}", f"merge.kind={kind}", "heartbeat_s=0.1"]
    if kind == "gradients":
        options += ["merge.optimizer.kind=sgd", "merge.optimizer.momentum=0.9", "merge.optimizer.weight_decay=0"]
    arguments = ["--keep", str(keep), *(part for option in options for part in ("--service", option))]
    port, thread = "0", threading.Thread(target=comes_back, daemon=True)
    for kill_at in (*kills, None):
        with started("serve", "--bind", f"127.0.0.1:{port}", *arguments, cwd=tmp_path) as process:
            address[0] = process.stdout.readline().removeprefix("serving at ").strip()
            port = address[0].rpartition(":")[2]
            if not thread.is_alive():
                thread.start()
            if kill_at is not None:
                wait_for(partial(reached, kill_at))
                os.kill(process.pid, signal.SIGKILL)
                continue
            assert done.wait(40)
            process.terminate()
            _, errors = process.communicate(timeout=20)
            assert process.returncode == 0, errors
    thread.join(10)
    states = [load(keep / f"server-{index}.pt") for index in range(SERVERS)]
    assert [one["version"] for one in states] == versions and len({one["model"] for one in states}) == 1
    torch.testing.assert_close(torch.cat([one["weights"]["values"] for one in states]), expected, rtol=0, atol=1e-6)


def test_serve_refuses_what_would_mix_two_models(tmp_path) -> None:
    fill(tmp_path / "kept", [[3, 4], [5, 6]])
    done = thinwire("serve", "--bind", "127.0.0.1:0", "--keep", "kept", "--service", "servers=2", cwd=tmp_path)
    assert done.returncode == 2 and "no version is kept of all servers" in one_line(done.stderr)


def test_snapshots_of_all_servers_are_multiples_and_the_end(tmp_path) -> None:
    service = SEQUENTIAL.model_copy(update={"first_workers": 1})
    with serving(service, keep=tmp_path, every=4) as running:
        train(running.address, 0, 10)
    assert [found(tmp_path, index) for index in range(SERVERS)] == [[10, 8, 4]] * SERVERS
