import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.data.corpus import Part
from thinwire.data.loader import IGNORED, TrainBatches, held_out_batches, key_of, permute
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


def windows_of(batches: TrainBatches, epochs: int) -> list[np.ndarray]:
    """How often each window of each part is drawn, by a batch of one sequence."""
    ends = np.cumsum([part.tokens for part in batches.parts])
    counts = [np.zeros(max(0, part.tokens - batches.sequence) // batches.sequence, dtype=int) for part in batches.parts]
    for step in range(epochs * batches.steps_per_epoch):
        (start,) = batches.window_starts(step)
        part = int(np.searchsorted(ends, start, side="right"))
        assert start + batches.sequence < ends[part], "a window ends in its own part"
        counts[part][(start - ends[part] + batches.parts[part].tokens) // batches.sequence] += 1
    return counts


@settings(max_examples=30, deadline=None)
@given(
    given_parts=st.lists(st.tuples(st.integers(20, 200), st.floats(0.3, 3.5)), min_size=2, max_size=4),
    sequence=st.integers(2, 6), epochs=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.long
def test_a_weight_is_how_often_an_epoch_shows_a_source(
    given_parts: list[tuple[int, float]], sequence: int, epochs: int, seed: int
) -> None:
    parts = tuple(Part("text", length, weight) for length, weight in given_parts)
    batches = TrainBatches(numbered(sum(part.tokens for part in parts)), sequence, 1, seed, parts)
    for part, counts in zip(parts, windows_of(batches, epochs), strict=True):
        assert counts.sum() == epochs * round(part.weight * len(counts)) and counts.max() - counts.min() <= 1


def test_a_whole_weight_shows_each_window_that_often_in_each_epoch() -> None:
    parts = (Part("thrice", 100, 3.0), Part("once", 300, 1.0))
    thrice, once = windows_of(TrainBatches(numbered(400), 7, 1, 5, parts), 1)
    assert set(thrice) == {3} and set(once) == {1}


def test_half_a_weight_shows_other_windows_in_the_next_epoch() -> None:
    parts = (Part("half", 1010, 0.5), Part("once", 500, 1.0))
    batches = TrainBatches(numbered(1510), 10, 1, 5, parts)
    first, both = windows_of(batches, 1)[0], windows_of(batches, 2)[0]
    assert first.sum() == 50 and set(both) == {1}
    assert 15 < first[:50].sum() < 35, "not simply the first half"


@given(weight=st.floats(0.1, 5), sequence=st.integers(1, 20), seed=st.integers(0, 99), step=st.integers(0, 500))
def test_one_source_is_drawn_in_one_order_whatever_its_weight(weight: float, sequence: int, seed: int, step: int) -> None:
    batches = TrainBatches(numbered(700), sequence, 3, seed, (Part("one", 700, weight),))
    epoch, place = divmod(step, batches.steps_per_epoch)
    key = key_of(seed, epoch)
    drawn = permute(np.arange(3 * place, 3 * place + 3), (700 - sequence) // sequence, key)
    assert np.array_equal(batches.window_starts(step), drawn * sequence + key_of(key, 1) % sequence)


def test_a_source_that_gives_nothing_is_named() -> None:
    parts = (Part("long.txt", 1000, 1.0), Part("short.txt", 40, 0.2))
    with pytest.raises(UserError, match=r"'short\.txt' has 40 training tokens, of which an epoch shows no sequence of 16"):
        TrainBatches(numbered(1040), 16, 8, parts=parts)


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


@settings(max_examples=20)
@given(each=st.integers(1, 5), batch=st.sampled_from([1, 2, 4, 6]), sequence=st.integers(1, 20), seed=st.integers(0, 99))
def test_windows_return_once_an_epoch_at_the_same_place_of_the_batch(each: int, batch: int, sequence: int, seed: int) -> None:
    """So a replica sees the same ones again, whatever the layout; they are disjoint, and what is told of a row is what it is."""
    count = each * batch
    batches = TrainBatches(numbered(count * sequence + 3 * sequence), sequence, batch, seed, windows=count)
    assert batches.steps_per_epoch == each
    by_place: list[set[tuple[int, ...]]] = []
    for epoch in range(3):
        steps = range(epoch * each, (epoch + 1) * each)
        shown = np.stack([batches.samples(step) for step in steps])
        assert sorted(shown.ravel()) == list(range(count))
        by_place.append({tuple(sorted(column)) for column in shown.T})
        rows = torch.cat([global_batch(batches, step, 1) for step in steps])
        assert len(rows.unique()) == count * sequence
        first = dict(zip(shown.ravel().tolist(), rows[:, 0].tolist(), strict=True))
        assert [first[number] for number in sorted(first)] == sorted(first.values())
    assert by_place[0] == by_place[1] == by_place[2]


def test_windows_come_together_in_other_batches_in_each_epoch() -> None:
    batches = TrainBatches(numbered(2000), 10, 8, seed=3, windows=160)
    epochs = [{frozenset(batches.samples(epoch * 20 + step).tolist()) for step in range(20)} for epoch in range(2)]
    assert len(epochs[0] & epochs[1]) <= 2


def test_windows_that_are_too_many_or_would_not_return_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.windows = 64 sequences of 16 tokens, and 1000 training tokens have 62"):
        TrainBatches(numbered(1000), 16, 8, windows=64)
    with pytest.raises(UserError, match=r"data\.windows = 60 is no multiple of the 8 sequences of a step.*take 56"):
        TrainBatches(numbered(1000), 16, 8, windows=60)
