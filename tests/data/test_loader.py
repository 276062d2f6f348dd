import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.data.loader import IGNORED, TrainBatches, held_out_batches, permute
from thinwire.errors import UserError


def numbered(length: int) -> np.ndarray:
    """Tokens that are their own place, so that a window tells where it was cut."""
    return np.arange(length, dtype=np.uint32)


def global_batch(batches: TrainBatches, step: int, num_micro: int) -> torch.Tensor:
    return torch.cat([batches.micro_batch(step, index, num_micro)[0] for index in range(num_micro)])


@given(st.integers(1, 3000), st.integers(0, 1 << 63))
def test_a_permutation_hits_every_index_once(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_a_permutation_shuffles_and_depends_on_its_key() -> None:
    first, second = (permute(np.arange(10_000), 10_000, key) for key in (1, 2))
    for order in (first, second, permute(first, 10_000, 2)):
        assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (first == second).mean() < 0.01


@settings(max_examples=20)
@given(
    per_rank=st.integers(1, 3), splits=st.permutations([1, 2, 4]), step=st.integers(0, 200),
    sequence=st.integers(1, 17), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_global_batch_does_not_depend_on_how_it_is_cut(
    per_rank: int, splits: list[int], step: int, sequence: int, seed: int
) -> None:
    batches = TrainBatches(numbered(2000), sequence, global_batch=4 * per_rank, seed=seed)
    first, *others = (global_batch(batches, step, split) for split in splits)
    for other in others:
        assert torch.equal(first, other)


@settings(max_examples=15)
@given(sequence=st.integers(1, 20), batch=st.integers(1, 4), seed=st.integers(0, 99), length=st.integers(200, 900))
def test_an_epoch_shows_disjoint_windows_and_nearly_all(sequence: int, batch: int, seed: int, length: int) -> None:
    batches = TrainBatches(numbered(length), sequence, global_batch=2 * batch, seed=seed)
    seen = torch.cat([global_batch(batches, step, 2) for step in range(batches.steps_per_epoch)]).flatten()
    assert len(seen.unique()) == len(seen)
    assert len(seen) > length - (2 * batch + 2) * sequence


def test_targets_are_the_next_tokens_and_a_batch_can_be_asked_again() -> None:
    batches = TrainBatches(numbered(1000), 16, 8, seed=3)
    inputs, targets = batches.micro_batch(5, 3, 4)
    assert inputs.shape == (2, 16) and inputs.dtype == torch.int64 and torch.equal(inputs + 1, targets)
    again = TrainBatches(numbered(1000), 16, 8, seed=3).micro_batch(5, 3, 4)
    assert torch.equal(again[0], inputs)


def test_seeds_and_epochs_differ() -> None:
    one, two = TrainBatches(numbered(1000), 16, 8, seed=3), TrainBatches(numbered(1000), 16, 8, seed=4)
    assert not torch.equal(global_batch(one, 0, 1), global_batch(two, 0, 1))
    starts = [set(one.window_starts(epoch * one.steps_per_epoch).tolist()) for epoch in range(4)]
    assert len({min(start) % 16 for start in starts}) > 1


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="100 training tokens give 5"):
        TrainBatches(numbered(100), 16, 8)
    with pytest.raises(UserError, match="8 sequences does not divide over 6 micro-batches"):
        TrainBatches(numbered(1000), 16, 8).micro_batch(0, 0, 6)


@given(length=st.integers(2, 400), sequence=st.integers(1, 33), micro_batch=st.integers(1, 4), world_size=st.integers(1, 5))
def test_every_held_out_token_is_a_target_exactly_once(length: int, sequence: int, micro_batch: int, world_size: int) -> None:
    tokens = numbered(length)
    by_rank = [list(held_out_batches(tokens, sequence, micro_batch, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in by_rank}) == 1
    counted = []
    for inputs, targets in (batch for batches in by_rank for batch in batches):
        assert inputs.shape == targets.shape == (micro_batch, sequence)
        real = targets != IGNORED
        assert torch.equal(inputs[real] + 1, targets[real])
        counted += targets[real].tolist()
    assert sorted(counted) == list(range(1, length))


def test_a_held_out_part_without_a_pair_is_refused() -> None:
    with pytest.raises(UserError, match="1 tokens"):
        next(held_out_batches(numbered(1), 4, 1, 0, 1))
