"""torchft and hivemind in `thinwire bench sync`, their codecs in `bench compress`: names, refusals, and how ranks of others end.

The packages are optional: where one is not installed, its test holds the bench to refuse it in one line.
"""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.bench.codec_peers import find_peers
from thinwire.bench.ranks import run_local
from thinwire.bench.registry import find
from thinwire.bench.sync_methods import check_packages, launches, make_method
from thinwire.errors import UserError

OUTSIDE = "from thinwire.bench.peers.outside import alone, helpers_s, within\n"
SMALL = {
    "ranks": 2,
    "model": {"layers": 1, "width": 32, "heads": 2},
    "sequence": 16,
    "steps": 4,
    "eval_tokens": 64,
    "turns": 1,
    "turn_s": 0,
}


def program(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", OUTSIDE + text], capture_output=True, text=True, timeout=50)


def test_names_of_other_packages() -> None:
    torchft = make_method("torchft-diloco30", {"train": {"steps": 60}})
    assert (torchft.package, torchft.hook, torchft.config.sync.kind, torchft.config.sync.every) == ("torchft", None, "diloco", 30)
    for code in ("fp32", "fp16", "u8", "q8"):
        hivemind = make_method(f"hivemind-{code}", {})
        assert (hivemind.package, hivemind.code, hivemind.config.sync.kind) == ("hivemind", code, "every_step")
    assert not make_method("diloco30", {}).package and not make_method("ddp", {}).package


@pytest.mark.parametrize("name", ["torchft-diloco", "torchft-diloco0", "torchft-local_sgd3", "hivemind", "hivemind-int4"])
def test_unknown_names_of_other_packages_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"method '{name}': of others there are torchft-dilocoN and hivemind-") as refused:
        make_method(name, {})
    assert "\n" not in str(refused.value)


def test_what_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("torchft-diloco2", "hivemind-u8"):
        package = name.partition("-")[0]
        with pytest.raises(UserError, match=rf"'{name}': {package} is not installed; pip install 'thinwire\[peers\]'$"):
            find("sync")(None, {"methods": ["ddp", name]})


def test_torchft_trains_whole_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_packages([make_method("torchft-diloco30", {"train": {"steps": 60}}), make_method("diloco30", {"train": {"steps": 50}})])
    with pytest.raises(UserError, match="whole periods of 30 steps: steps = 50 is no multiple"):
        check_packages([make_method("torchft-diloco30", {"train": {"steps": 50}})])


@given(st.lists(st.sampled_from(["ddp", "none", "int4", "torchft-diloco2", "hivemind-u8", "hivemind-fp16"]), unique=True))
def test_each_other_package_starts_alone_and_nothing_is_lost(names: list[str]) -> None:
    found = launches([make_method(name, {}) for name in names])
    assert sorted(method.name for launch in found for method in launch) == sorted(names)
    for launch in found:
        assert launch and (len(launch) == 1 or not any(method.package for method in launch))
    assert sum(not launch[0].package for launch in found) <= 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name, ours", [("torchft-diloco2", "diloco2"), ("hivemind-fp32", "none")])
def test_a_peer_learns_what_ours_learns_or_is_refused(name: str, ours: str) -> None:
    """The same mean of the same gradients, summed in another order."""
    package = name.partition("-")[0]
    options = SMALL | {"methods": [ours, name]}
    if importlib.util.find_spec(package) is None:
        with pytest.raises(UserError, match=f"{package} is not installed"):
            find("sync")(None, options)
        return
    mine, theirs = (row for row in find("sync")(None, options) if row["case"] == "measured")
    assert (mine["method"], theirs["method"]) == (ours, name)
    assert theirs["heldout_loss"] == pytest.approx(mine["heldout_loss"], rel=1e-5)
    assert mine["weights_apart"] == 0.0 and theirs["weights_apart"] < 1e-5
    assert theirs["wire_bytes_per_step"] is None and theirs["step_s"] > 0 and theirs["no_exchange_step_s"] > 0
    assert mine.keys() == theirs.keys()  # or they would not be in one table


@pytest.mark.long
def test_a_wait_that_does_not_end_ends_the_process_with_its_name() -> None:
    started = time.monotonic()
    done = program("import time\nwith within(0.2, 'exchange 3 on rank 1'): time.sleep(40)")
    assert (done.returncode, done.stderr) == (1, "thinwire: error: exchange 3 on rank 1 took more than 0 s\n")
    assert time.monotonic() - started < 30
    done = program("import time\nwith within(0.2, 'x'): pass\ntime.sleep(0.5); print('over')")
    assert (done.returncode, done.stdout) == (0, "over\n")


@pytest.mark.parametrize(
    "fails, message",
    [("raise ValueError('a\\nb')", "hivemind-u8: ValueError: a"), ("raise SystemExit('exchange 2 failed')", "exchange 2 failed")],
)
def test_a_rank_ends_with_one_line_whatever_its_threads_do(fails: str, message: str) -> None:
    stuck = "import threading, time\nthreading.Thread(target=time.sleep, args=(40,)).start()\ndef main():\n    "
    done = program(f"{stuck}{fails}\nalone(main, 'hivemind-u8')")
    assert (done.returncode, done.stderr) == (1, f"thinwire: error: {message}\n")
    assert program(f"{stuck}print('trained')\nalone(main, 'x')").stdout == "trained\n"


def test_the_work_of_helpers_and_of_theirs_counts() -> None:
    busy = (
        "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass\nprint(flush=True); time.sleep(40)"
    )
    text = (
        "import subprocess, sys\n"
        "assert helpers_s() == 0.0\n"
        f"shell = subprocess.Popen(['sh', '-c', 'exec 3>&1; \"$0\" -c \"$1\" & wait', sys.executable, {busy!r}],\n"
        "    stdout=subprocess.PIPE, start_new_session=True)\n"
        "shell.stdout.readline()\n"
        "print(helpers_s())\n"
        "import os; os.killpg(shell.pid, 9)\n"
    )
    done = program(text)
    assert done.returncode == 0, done.stderr
    assert 0.3 <= float(done.stdout) < 10  # the system counts in ticks, and each of its two counts is rounded


def test_a_rank_may_say_much_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """More than a pipe holds; and what a failed rank has started ends with it."""
    run_local([["sh", "-c", "yes complaint | head -c 300000 >&2"]], 2, 30)
    both = f"until [ -s {tmp_path}/0 ] && [ -s {tmp_path}/1 ]; do sleep 0.01; done"  # or the other is ended before it has written
    text = f'sleep 40 & echo $! > {tmp_path}/$RANK; {both}; echo "thinwire: error: rank $RANK failed" >&2; exit 4'
    with pytest.raises(UserError, match=r"^a rank ended with 4: rank [01] failed$"):
        run_local([["sh", "-c", text]], 2, 30)
    for file in tmp_path.iterdir():
        assert ended(int(file.read_text()))


def ended(process: int) -> bool:
    """Gone, or dead and not yet collected by the system's first process."""
    for _ in range(400):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_coder_that_is_missing_or_cannot_read_its_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = importlib.util.find_spec
    only_torch = {"torchao": None, "bitsandbytes": None, "hivemind": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: only_torch.get(name, real("torch", *rest)))
    peers, reasons = find_peers()
    assert reasons == ["torchao, not installed", "bitsandbytes, not installed", "hivemind, not installed"]
    values = torch.linspace(-1, 1, 1024)
    for peer in peers:
        assert peer.decode(peer.encode(values)).flatten() == pytest.approx(values, abs=1.01 / 254)

    def broken(*_: Any) -> Any:
        raise TypeError("only 0-dimensional arrays\ncan be converted")

    monkeypatch.setattr(torch, "dequantize", broken)
    peers, reasons = find_peers()
    assert not peers
    assert reasons[0] == "torch quantize_per_tensor, broken here: TypeError: only 0-dimensional arrays"
