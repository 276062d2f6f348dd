"""Whatever a user gets wrong: one line, exit code not 0, nothing left running."""

import socket
from pathlib import Path

import pytest

from command import nothing_left, one_line, thinwire
from thinwire.cli.main import app
from thinwire.errors import UserError

TOML = '[train]\nsteps = 4\nrun = "run"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nstepz = 4", r"bad.toml: unknown key train.stepz; allowed: steps, "),
        ("[train]\nsteps = -1", r"bad.toml: train.steps = -1: input should be greater than or equal to 1"),
        ('[sync]\nbucket_bytes = "5 ms"', r"bad.toml: sync.bucket_bytes: '5 ms' has a wrong unit; allowed: B, kB"),
        ('[sync]\nkind = "gossip"', r"bad.toml: sync.kind = 'gossip'"),
        ("[model]\nwidth = 100\nheads = 3\nlayers = 1", r"bad.toml: model: width 100 is not a multiple of heads 3"),
        ("[train]\nsteps = ", r"bad.toml: not valid TOML"),
        ("[layout]\ndata = 3\n[train]\nranks = 2", r"layout data 3 needs 3 ranks, but there are 2"),
        (
            "[layout]\nseq = 2\n[train]\nsequence = 66",
            r"66 tokens are no multiple of 4; the nearest degree that can be taken is 1",
        ),
        ('[train]\nbackend = "mpi"\nranks = 3', r"are started by mpiexec -n 3 thinwire train ..."),
        ('[cluster]\nfile = "nowhere"', r"there is no cluster 'nowhere'; give a .toml file or one of: "),
    ],
)
def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError) as error:
        app(["train", "bad.toml"], standalone_mode=False)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.long
def test_missing_files(tmp_path: Path) -> None:
    for arguments, expected in (
        (("train", "gone.toml"), "gone.toml: there is no such file"),
        (("train", "--resume", "gone"), "this is not a run folder"),
        (("report", "gone"), "gone does not exist"),
        (("lab", "run", "--cluster", "gone.toml", "--", "true"), "gone.toml: there is no such file"),
        (("bench", "nothing"), "there is no benchmark 'nothing'"),
    ):
        done = thinwire(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and expected in one_line(done.stderr)


def test_a_broken_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('name = "c"\n[[host]]\nname = "a"\ncard = { bandwidth_bps = "100 ms" }\n')
    done = thinwire("lab", "run", "--cluster", "c.toml", "--", "true", cwd=tmp_path, cold=True)
    assert done.returncode == 2
    assert "c.toml: host.0.card.bandwidth_bps: '100 ms' has a wrong unit; allowed: bit/s kbit/s" in one_line(done.stderr)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    """Found by a rank when all are up: rank 0 says why, the others do not hang."""
    (tmp_path / "run.toml").write_text(TOML + '[data]\nsource = "no-such-text"\ncache = "cache"\n')
    done = thinwire("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-text" in one_line(done.stderr)
    assert nothing_left(tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """As under srun or mpiexec, where the rank itself opens the port."""
    (tmp_path / "run.toml").write_text(TOML)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = thinwire("train", "run.toml", cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert f"rank 0 cannot open the store at 127.0.0.1:{port}: Address already in use" in one_line(done.stderr)


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML + 'timeout_s = "1 s"\n')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = thinwire("train", "run.toml", cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert "cannot join 2 ranks" in one_line(done.stderr)


@pytest.mark.long
def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run.toml").write_text('[train]\nsteps = 4\nrun = "file/run"\n')
    done = thinwire("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "file/run" in one_line(done.stderr)
    assert nothing_left(tmp_path)
