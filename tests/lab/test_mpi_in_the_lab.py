"""mpiexec in a lab: it starts its ranks on the hosts, and what they send goes through the cards."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from command import TINY_RUN, thinwire
from launched import MISSING, mpiexec
from thinwire.cluster import Cluster, dump_cluster
from thinwire.lab.commands import ROOT, host_files, processes_for
from thinwire.lab.run import RESULTS, launch, run
from thinwire.record import RunFolder

pytestmark = pytest.mark.lab
MPIEXEC = mpiexec()


def test_mpiexec_is_started_once_on_the_first_host(build: Callable[..., Cluster]) -> None:
    for program in ("mpiexec", "/opt/bin/mpiexec.hydra", "mpirun"):
        (process,) = processes_for(build(devices=2), [program, "-n", "4", "thinwire", "train", "run.toml"])
        assert process.host == "host0" and process.argv[:3] == (program, "-n", "4") and process.begins == "training"
        assert process.variables["UCX_TLS"] == "tcp" and "RANK" not in process.variables
    (process,) = processes_for(build(), ["mpiexec", "hostname"])
    assert process.begins == ""


def test_the_host_files_name_every_rank(build: Callable[..., Cluster]) -> None:
    cluster = replace(build(devices=2), ranks=("host0/cpu0", "host0/cpu1", "host1/cpu0"))
    assert host_files(cluster) == {"hosts.mpich": "host0:2\nhost1:1\n", "hosts.openmpi": "host0 slots=2\nhost1 slots=1\n"}


def test_a_command_enters_another_host_as_through_ssh(build: Callable[..., Cluster]) -> None:
    script = f"""
        cd /tmp
        echo words | {ROOT}/enter -x host1 'hostname; pwd; read word; echo $word $SAID;' ip -br address show eth0 > {RESULTS}/said
        {ROOT}/enter host1 'cat $THINWIRE_LAB' > {RESULTS}/lab
        {ROOT}/enter host1 exit 7 || echo $? > {RESULTS}/code
        {ROOT}/enter host9 true 2> {RESULTS}/refused || true
    """
    result = run(build(), {"host0": ["env", "SAID=here", "sh", "-ec", script]})
    assert result.failure is None
    hostname, folder, said, card = result.results["said"].splitlines()
    assert (hostname, folder, said) == ("host1", "/tmp", "words here") and "10.77.0.2/24" in card
    assert json.loads(result.results["lab"])["host"] == "host1" and result.results["code"] == "7\n"
    assert result.results["refused"] == "the lab has no host 'host9'; known: host0, host1\n"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_rank_that_fails_ends_the_others_and_its_line_is_the_last_word(build: Callable[..., Cluster]) -> None:
    rank = """
import os, time
from thinwire.collectives.mpi.library import Library, abandon
if Library().rank == 1:
    os.write(2, b"thinwire: error: a bad rank\\n")
    abandon(9)
    os._exit(9)
time.sleep(60)
"""
    begun = time.monotonic()
    result = launch(build(), processes_for(build(), [MPIEXEC, "-n", "2", sys.executable, "-c", rank]))
    assert (result.failure, result.exit_code) == ("host0: exit code 9: a bad rank", 9)
    assert time.monotonic() - begun < 20


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.timeout(120)
def test_ranks_of_mpiexec_train_through_the_cards(tmp_path: Path, build: Callable[..., Cluster], warm: None) -> None:
    dump_cluster(build(), tmp_path / "cluster.toml")
    (tmp_path / "text.txt").write_text("one host sends to another through its card; " * 500)
    (tmp_path / "run.toml").write_text(TINY_RUN + 'steps = 4\nrun = "run"\n[collectives]\nkind = "measured"\n')
    ranks = [MPIEXEC, "-n", "2", sys.executable, "-m", "thinwire", "train", "run.toml"]
    done = thinwire("lab", "run", "--cluster", "cluster.toml", "--", *ranks, cwd=tmp_path, timeout_s=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks over " in done.stdout and "predicted transfers equal to the byte" in done.stdout
    assert "all_reduce of " in done.stderr and " among 2 ranks: " in done.stderr
    folder = RunFolder.open(tmp_path / "run")
    assert len(folder.steps()) == 4
    counted = json.loads((tmp_path / "run" / "cards.json").read_text())
    sent = {card["host"]: card["sent_bytes"] for card in counted["cards"]}
    ledger = counted["ledger_sent_bytes"]
    assert len(ledger) == 2 and min(ledger.values()) > 10_000
    assert sum(sent.values()) >= sum(ledger.values())
