"""What a device computes and how much memory a rank has of it."""

import os

import pytest
import torch

from thinwire.measure import compute
from thinwire.measure.compute import memory_bytes


def test_ranks_of_a_host_share_its_memory_and_no_more_than_there_is() -> None:
    cpu = torch.device("cpu")
    alone = memory_bytes(cpu, 1)
    assert 0 < alone <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(cpu, 4) == alone / 4


def test_a_copy_counts_what_is_read_and_written_and_the_fastest_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of copies of 2^25 float32 that take 1 s each and 0.5 s once."""
    taken, now = iter([1.0] * 3 + [0.5] + [1.0] * compute.COPIES), [0.0]

    def wait(device: torch.device) -> None:
        now[0] += next(taken)

    monkeypatch.setattr(compute, "_wait", wait)
    monkeypatch.setattr(compute.time, "perf_counter", lambda: now[0])
    assert compute.copy_bytes_per_s(torch.device("cpu")) == 2 * 4 * 2**25 / 0.5


@pytest.mark.parametrize(
    ("ranks", "gpus", "line"), [(8, 1, "8 ranks share 1 GPU"), (8, 3, "8 ranks share 3 GPUs"), (2, 2, ""), (2, 0, "")]
)
def test_ranks_take_gpus_in_turns_and_say_that_they_share_them(
    ranks: int, gpus: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert compute.shared_gpus(ranks) == line
    found = [compute.find_device(rank, alone=True) for rank in range(ranks)]
    wanted = [torch.device("cuda", rank % gpus) if gpus else torch.device("cpu") for rank in range(ranks)]
    assert found == wanted
