"""torch.distributed over MPI, on four ranks that a real mpiexec has started.

One launch runs every short case of mpi_cases.py, another the long ones.
"""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixed_schedules import digests, fixed, group_of
from launched import MISSING, environment, mpiexec
from pool import Pool, Rank

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.timeout(300)]
PROGRAM = Path(__file__).parent / "mpi_cases.py"
SOURCES = [PROGRAM, PROGRAM.with_name("mpi_scheduled.py")]
FOUND = [name for source in SOURCES for name in re.findall(r"^def (\w+)", source.read_text(encoding="utf-8"), re.M)]
CASES = [name for name in FOUND if name.startswith("case_")]
LONG_CASES = [name for name in FOUND if name.startswith("long_case_")]

Outcomes = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """A case's name -> what it returned on each rank; fails where it raised."""
    return launched(tmp_path_factory.mktemp("mpi"), "case", CASES)


@pytest.fixture(scope="module")
def long_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The same for long cases."""
    return launched(tmp_path_factory.mktemp("mpi"), "long_case", LONG_CASES)


def launched(folder: Path, kind: str, names: list[str], *more: str) -> Outcomes:
    command = [mpiexec(), "-n", "4", sys.executable, str(PROGRAM), str(folder), kind, *more]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    print(done.stdout)
    files = [folder / f"outcomes-{rank}" for rank in range(4)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    by_rank: list[dict[str, tuple[bool, Any]]] = [pickle.loads(file.read_bytes()) for file in files]

    def of(case: str) -> list[Any]:
        for rank, cases in enumerate(by_rank):
            good, value = cases.get(case, (False, f"was not reached: {list(cases)[-1]} failed\n{done.stderr}"))
            assert good, f"rank {rank}: {value}"
        return [cases[case][1] for cases in by_rank]

    of(names[-1])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return of


@pytest.mark.parametrize("case", CASES)
def test_case(outcomes: Outcomes, case: str) -> None:
    outcomes(case)


def test_every_case_through_memory_of_the_host(tmp_path: Path) -> None:
    """As tensors of a device go: copied there, and what comes copied back. Not yet run on a GPU."""
    launched(tmp_path, "case", CASES, "staged")


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_CASES)
def test_long_case(long_outcomes: Outcomes, case: str) -> None:
    long_outcomes(case)


def test_all_ranks_say_who_differs(outcomes: Outcomes) -> None:
    by_rank = outcomes("case_a_mismatch_is_named_and_breaks_nothing")
    assert len(set(map(tuple, by_rank))) == 1
    sizes, types, reductions, roots, calls, splits, future = by_rank[0]
    assert sizes.startswith("UserError: the ranks of group ")
    assert "its rank 0 calls all_reduce of 5 values of float32 with SUM, its rank 2 calls all_reduce of 6 values" in sizes
    assert "rank 2 calls all_reduce of 5 values of float64" in types
    assert "rank 2 calls all_reduce of 5 values of float32 with MAX" in reductions
    assert "with root 0, its rank 2 calls broadcast of 5 values of float32 with root 1" in roots
    assert "rank 2 calls barrier;" in calls
    assert "its rank 2 sends 8 B to its rank 3, which expects 4 B" in splits
    assert "its rank 2 calls all_reduce of 2 values" in future


def test_a_receiver_says_what_came(outcomes: Outcomes) -> None:
    short, long = outcomes("case_a_message_of_another_size_is_named")[1]
    assert "16 B came where 20 B were expected" in short and "a larger message came where 20 B were expected" in long


def test_refusals_say_what_to_do(outcomes: Outcomes) -> None:
    for lines in outcomes("case_what_cannot_be_done_is_refused_at_once"):
        assert all(line.startswith("UserError: ") for line in lines)
        assert (
            "SUM of float8_e4m3fn does not exist over MPI" in lines[0]
            and "AVG of int32" in lines[1]
            and "BXOR of float32" in lines[2]
        )
        assert "3 tensors for 4 ranks" in lines[3] and "7 values" in lines[4] and "no 4 equal parts" in lines[5]
        assert "tag -5" in lines[6]


def test_a_group_in_which_somebody_was_missed_takes_no_more(outcomes: Outcomes) -> None:
    for first, second in outcomes("case_a_rank_that_does_not_come_is_waited_for_in_vain")[:3]:
        assert re.search(
            r"^UserError: barrier \d+ of this group failed .* timeout of 1 s: 1 of its 4 ranks have not come: rank 3;", first
        )
        assert re.search(r"^RuntimeError: barrier in group .* over MPI: timed out after 1 s", second)


def call_them(context: Rank, what: str, *args: Any) -> Any:
    import mpi_calls

    return getattr(mpi_calls, what)(context.ledger, *args)


def test_the_ledger_is_that_of_gloo(outcomes: Outcomes, ranks4: Pool) -> None:
    over_mpi = outcomes("case_the_ledger_enters_every_call")
    assert over_mpi == ranks4.run(call_them, "every_call")
    assert all(len(entries) >= 9 for entries in over_mpi)


@pytest.mark.long
def test_a_training_learns_what_it_learns_over_gloo(long_outcomes: Outcomes, ranks4: Pool, tmp_path: Path) -> None:
    losses, scores = long_outcomes("long_case_a_training")[0]
    expected = ranks4.run(call_them, "train", tmp_path)[0]
    assert len(losses) == 12 and len(scores) == 3
    assert losses == pytest.approx(expected[0], abs=1e-5) and scores == pytest.approx(expected[1], abs=1e-5)


def bits_over_gloo(context: Rank) -> list[str]:
    return digests(group_of(context.ledger, fixed()))


def test_schedules_give_the_bits_that_they_give_over_gloo(outcomes: Outcomes, ranks4: Pool) -> None:
    by_rank = outcomes("case_bits_of_schedules")
    assert by_rank == ranks4.run(bits_over_gloo)
    assert all(found == by_rank[0] and found[:2] == found[2:] for found in by_rank)


def test_what_was_measured_is_chosen_by_all_and_kept(outcomes: Outcomes) -> None:
    by_rank = outcomes("case_what_is_measured_is_the_same_on_all_ranks")
    assert all(chosen == by_rank[0][0] and chosen[0] == chosen[1] for chosen, _, _ in by_rank)
    assert [(said, asked) for _, said, asked in by_rank] == [(1, 1), (0, 0), (0, 0), (0, 0)]


def test_ranks_that_part_ways_are_named_by_all(outcomes: Outcomes) -> None:
    for first, known, later, fresh, moved_on in outcomes("case_a_mismatch_of_schedules_is_named"):
        named = "UserError: ranks differ in what they call: rank "
        assert [line for line in (first, known, fresh, moved_on) if not line.startswith(named)] == []
        for line, odd in ((first, 3), (known, 4), (fresh, 12)):
            assert "all_reduce (sum) of 8 float32" in line and f"rank 1 all_reduce (sum) of {odd} float32" in line
        assert later == known
        assert "rank 2 broadcast of 8 float32 from rank 0 of the group, rank 3 broadcast of 4 float32" in moved_on


@pytest.mark.long
def test_a_rank_that_runs_no_schedule_is_missed(long_outcomes: Outcomes) -> None:
    for rank, line in enumerate(long_outcomes("long_case_a_rank_that_does_not_run_a_schedule_is_waited_for_in_vain")[:3]):
        assert line.startswith(f"UserError: rank {rank}: all_reduce (sum) of 8 float32 failed after 3.") and "timed out" in line
