"""What a device computes and how much memory a rank has of it."""

import os

import torch

from thinwire.measure.compute import memory_bytes


def test_ranks_of_a_host_share_its_memory_and_no_more_than_there_is() -> None:
    cpu = torch.device("cpu")
    alone = memory_bytes(cpu, 1)
    assert 0 < alone <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(cpu, 4) == alone / 4
