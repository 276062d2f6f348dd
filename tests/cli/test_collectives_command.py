"""`thinwire collectives`: what it says, draws and writes; no torch; one line for what makes no sense."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from command import one_line, thinwire
from thinwire.cli.main import app
from thinwire.errors import UserError

EXPLAIN = ("collectives", "explain")


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {list(arguments)!r}\n"
    command = [sys.executable, "-c", program + "from thinwire.cli.main import main; main()"]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


@pytest.mark.long
def test_explaining_needs_no_torch(tmp_path: Path) -> None:
    """On two racks with interleaved ranks: the order, the uplink, the bound; a picture; numbers."""
    picture, numbers = tmp_path / "p.svg", tmp_path / "n.json"
    files = ("--draw", str(picture), "--json", str(numbers))
    done = without_torch(*EXPLAIN, "--cluster", "two-racks", "--op", "all_reduce", "--bytes", "1MiB", *files)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "in the order 0 2 4 6 1 3 5 7" in lines["algorithm"]
    assert "bound" in lines and "runner-up" in lines and " x)" in lines["native"] and "rack-" in lines["native"]
    found = json.loads(numbers.read_text())
    assert found["bound_s"] <= found["predicted_s"] < found["native_s"] / 3.5
    root = ElementTree.parse(picture).getroot()
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("rack-a → switch") and "per call" in title for title in titles)
    assert sum(title.startswith("rank ") and "→" in title for title in titles) == 224
    assert "rank 1 on b0/cpu0" in titles


def test_a_table_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--cluster", "eight-hosts-100mbit", "--op", "all_reduce", "--bytes", "1k", "--ranks", "0-2,5")
    app([*EXPLAIN, *arguments, "--cores-shared", "4", "--table"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "among 4 ranks" in printed
    assert "recursive doubling: all_reduce, 4 ranks, 1 chunks, 2 steps" in printed
    assert "0     0+>1    0+>0    0+>3    0+>2" in printed


def test_a_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[0] * 8 + [300] for _ in range(8)] + [[300] * 8 + [0]]
    (tmp_path / "a100.json").write_text(json.dumps({"capacity": rows, "switches": [8]}))
    topology = str(tmp_path / "a100.json")
    app([*EXPLAIN, "--topology", topology, "--op", "all_gather", "--bytes", "1MiB"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "342.857 GB/s with 1 trees a rank" in printed and "8 trees, " in printed


CLUSTER = ("--cluster", "two-racks", "--op", "all_reduce", "--bytes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CLUSTER, "0"), "--bytes 0: that is 0 bytes; give a whole number, 1 or more"),
        ((*CLUSTER, "1.5"), "--bytes 1.5: that is 1.5 bytes"),
        ((*CLUSTER, "much"), "'muchB' is not a number with a unit"),
        ((*CLUSTER, "5 ms"), "wrong unit; allowed: B, kB"),
        ((*CLUSTER, "4", "--ranks", "0,9"), "there is no rank 9; ranks of two-racks are 0 to 7"),
        ((*CLUSTER, "4", "--ranks", "a"), "'a' is no rank; e.g. 0,2,4-7"),
        ((*CLUSTER, "4", "--ranks", "3-2"), "'3-2' is no rank; e.g. 0,2,4-7"),
        ((*CLUSTER, "4", "--root", "8"), "root = 8, but the group has ranks 0 to 7"),
        ((*CLUSTER, "4", "--draw", "nowhere/f.svg"), "nowhere/f.svg cannot be written: there is no folder"),
        ((*CLUSTER, "4", "--topology", "t.json"), "give one of --cluster and --topology"),
        (("--op", "all_reduce", "--bytes", "4"), "give one of --cluster and --topology"),
        (("--cluster", "two-racks", "--op", "scan", "--bytes", "4"), "unknown collective 'scan'; known: all_reduce, "),
        (("--cluster", "apart.toml", "--op", "all_reduce", "--bytes", "4"), "no route from 'a' to 'b'"),
        (("--cluster", "zero.toml", "--op", "all_reduce", "--bytes", "4"), "0 is not allowed; it must be above 0"),
        (("--topology", "t.json", "--op", "all_reduce", "--bytes", "4", "--table"), "--table is for a --cluster"),
        (("--topology", "t.xml", "--op", "all_reduce", "--bytes", "4"), "t.xml: 2 CPUs have GPUs, and the file does not say how"),
        (("--topology", "t.xml", "--op", "all_reduce", "--bytes", "4", "--cpu-gbytes-per-s", "-1"), "-1.0: a rate is above 0"),
        ((*CLUSTER, "4", "--pcie-gbytes-per-s", "1"), "--pcie-gbytes-per-s is for a --topology; a cluster file has all rates"),
        (
            ("--topology", "t.json", "--op", "all_reduce", "--bytes", "4", "--cpu-gbytes-per-s", "1"),
            "--cpu-gbytes-per-s is for NCCL's .xml; a matrix has all rates",
        ),
        (("--topology", "t.json", "--op", "scan", "--bytes", "4"), "'scan' has no bound; known: all_reduce"),
        (("--topology", "t.json", "--op", "broadcast", "--bytes", "4", "--root", "2"), "root = 2, but t.json has ranks 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    host = '[[host]]\nname = "{}"\ncard = {{ bandwidth_bps = "{} Mbit/s", to = "{}" }}\n'
    (tmp_path / "apart.toml").write_text('name = "c"\n' + host.format("a", 1, "s") + host.format("b", 1, "t"))
    (tmp_path / "zero.toml").write_text('name = "c"\n' + host.format("a", 0, "s") + host.format("b", 1, "s"))
    (tmp_path / "t.json").write_text('{"capacity": [[0, 1], [1, 0]]}')
    cpu = '<cpu numaid="{0}"><pci busid="0{0}" class="0x0302" link_speed="8 GT/s" link_width="16"/></cpu>'
    (tmp_path / "t.xml").write_text(f"<system>{cpu.format(0)}{cpu.format(1)}</system>")
    with pytest.raises(UserError) as error:
        app([*EXPLAIN, *arguments], standalone_mode=False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nccls_tuner_file(tmp_path: Path) -> None:
    rows = [
        {"coll": "allreduce", "bytes": size, "algo": algo, "proto": "simple", "nodes": 2, "ranks": 16, "seconds": seconds}
        for size, algo, seconds in ((1024, "tree", 1.0), (1024, "ring", 2.0), (4096, "ring", 1.0))
    ]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    done = thinwire("collectives", "nccl-csv", "m.json", "-o", "tuner.conf", cwd=tmp_path)
    assert done.returncode == 0 and "wrote tuner.conf: 2 ranges" in done.stdout
    assert (tmp_path / "tuner.conf").read_text().splitlines()[1:] == [
        "allreduce,1024,1024,tree,simple,-1,2,16,-1,-1",
        "allreduce,4096,4096,ring,simple,-1,2,16,-1,-1",
    ]
    (tmp_path / "m.json").write_text("[]")
    done = thinwire("collectives", "nccl-csv", "m.json", "-o", "tuner.conf", cwd=tmp_path)
    assert done.returncode == 2 and "m.json: there are no measurements" in one_line(done.stderr)
