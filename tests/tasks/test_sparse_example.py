"""Embeddings whose gradients are rows: what is sent follows from the batches, to the byte."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_texts import write

from pool import Pool, Rank
from thinwire.compress.sparse import average_sparse, rows_bytes

EXAMPLE = Path(__file__).parents[2] / "examples" / "sparse_recommendation.py"
TABLE = torch.Size((40, 6))


def rows_of(rank: int) -> torch.Tensor:
    return torch.randint(0, TABLE[0], (5 + 3 * rank,), generator=torch.Generator().manual_seed(rank))


def averaged(context: Rank, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
    """Bytes that this rank sent, and the mean."""
    before = context.ledger.sent_bytes
    seen = rows_of(context.rank)
    values = torch.full((len(seen), TABLE[1]), 1.0 + context.rank, dtype=dtype)
    gradient = torch.sparse_coo_tensor(seen[None], values, TABLE, check_invariants=False)
    mean = average_sparse(gradient, torch.distributed.group.WORLD, context.ledger, "it")
    return context.ledger.sent_bytes - before, mean.to_dense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_follow_from_the_rows_of_the_rank_with_most(ranks3: Pool, dtype: torch.dtype) -> None:
    most = max(len(rows_of(rank).unique()) for rank in range(3))
    wanted = torch.zeros(TABLE, dtype=dtype)
    for rank in range(3):
        wanted.index_add_(0, rows_of(rank), torch.full((5 + 3 * rank, TABLE[1]), (1.0 + rank) / 3, dtype=dtype))
    for sent, mean in ranks3.run(averaged, dtype):
        assert sent == rows_bytes(3, most, TABLE, dtype.itemsize)
        assert torch.allclose(mean, wanted)


@pytest.mark.long
@pytest.mark.timeout(170)
def test_the_example_sends_what_it_predicts(tmp_path: Path) -> None:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    given = ["--source", str(write(tmp_path / "own.jsonl", "recommendation")), "--steps", "50", "--batch", "8"]
    done = subprocess.run([sys.executable, *start, *given], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    sent, predicted, dense = re.findall(r"[\d,]+(?= bytes sent)|[\d,]+(?= predicted)|[\d,]+$", done.stdout.splitlines()[1])
    assert sent == predicted and int(sent.replace(",", "")) < int(dense.replace(",", ""))
