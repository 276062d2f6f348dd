"""The pool of ranks itself: it answers, a rank that fails in any way is reported, and nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pool import Pool, Rank, RankFailure


def add_ranks(context: Rank, start: float) -> float:
    value = torch.tensor([start + context.rank])
    dist.all_reduce(value)
    return float(value)


def raise_on(context: Rank, rank: int) -> None:
    if context.rank == rank:
        print("something odd", flush=True)
        raise ValueError(f"rank {rank} is unhappy")
    dist.barrier()


def die_on(context: Rank, rank: int) -> None:
    if context.rank == rank:
        os._exit(7)
    dist.barrier()


def hang_on(context: Rank, rank: int) -> None:
    if context.rank == rank:
        time.sleep(60)


def ledger_is_fresh(context: Rank) -> tuple[int, int]:
    before = len(context.recorded())
    context.ledger.step = 5
    with context.ledger.label("once"):
        dist.all_reduce(torch.zeros(4))
    return before, sum(total.calls for total in context.recorded().values())


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def all_gone(pids: list[int], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if all(is_gone(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_each_rank_answers_and_the_ranks_stay(ranks4: Pool) -> None:
    assert ranks4.run(add_ranks, 1.0) == [10.0] * 4
    pids = ranks4.pids
    assert ranks4.run(add_ranks, 2.0) == [14.0] * 4
    assert ranks4.pids == pids and len(set(pids)) == 4


def test_each_call_starts_from_a_fresh_ledger(ranks4: Pool) -> None:
    for _ in range(2):
        assert ranks4.run(ledger_is_fresh) == [(0, 1)] * 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (raise_on, r"rank 1 of 2 failed(.|\n)*ValueError: rank 1 is unhappy(.|\n)*something odd"),
        (die_on, "rank 1 of 2 died, exit code 7"),
        (hang_on, r"ranks \[1\] of 2 gave no answer in 2 s"),
    ],
)
def test_a_broken_rank_is_reported_and_the_pool_is_built_anew(ranks2: Pool, broken, message) -> None:
    ranks2.run(add_ranks, 0.0)
    pids = ranks2.pids
    with pytest.raises(RankFailure, match=message):
        ranks2.run(broken, 1, timeout_s=2 if broken is hang_on else 30)
    assert all_gone(pids)
    assert ranks2.run(add_ranks, 0.0) == [1.0, 1.0]


@pytest.mark.long
def test_no_rank_outlives_a_killed_parent() -> None:
    """A pool of one, whose server loads nothing beforehand: what one rank needs is less than what all tests do."""
    program = """
import pool, test_pool
pool.PRELOAD.clear()
ranks = pool.Pool(1)
ranks.run(test_pool.add_ranks, 0.0)
print(*ranks.pids, flush=True)
ranks.run(test_pool.hang_on, 0)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 1
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate(timeout=10)
    assert all_gone(pids)
