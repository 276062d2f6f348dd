"""Shrunk weights: what is lost is what the method says, bytes are those that are stored, and a file gives back the same."""

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune
from vectors import codec_of, vector

from thinwire.compress.weights.shrink import (
    Blocks,
    LowRank,
    Sparse,
    load_shrunk,
    pack_bits,
    plain,
    save_shrunk,
    shrink,
    stored_bytes,
    unpack_bits,
)
from thinwire.errors import UserError

matrices = st.builds(
    lambda rows, columns, seed: vector(rows * columns, seed).view(rows, columns),
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(0, 999),
)


@given(matrices, st.integers(1, 20))
def test_low_rank_is_the_nearest_and_its_bytes_are_the_factors(matrix: torch.Tensor, rank: int) -> None:
    """Eckart and Young: the squared error is the sum of the squared singular values that were left out."""
    rows, columns = matrix.shape
    stored = LowRank(rank)(matrix)
    if rank * (rows + columns) >= rows * columns:
        assert stored.kind == "plain" and torch.equal(stored.dense(), matrix) and stored.num_bytes == 4 * rows * columns
        return
    left_out = torch.linalg.svdvals(matrix.double())[rank:]
    error = (stored.dense().double() - matrix.double()).square().sum()
    torch.testing.assert_close(error, left_out.square().sum(), rtol=1e-4, atol=1e-8)
    assert stored.num_bytes == 4 * rank * (rows + columns)
    assert torch.linalg.matrix_rank(stored.dense()) <= rank


def test_a_fraction_of_the_rank_is_of_the_smaller_side() -> None:
    matrix = vector(40 * 100, 1).view(40, 100)
    assert LowRank(0.25)(matrix).num_bytes == LowRank(10)(matrix).num_bytes == 4 * 10 * 140


@given(matrices, st.sampled_from((0.1, 0.5, 0.9)))
def test_sparse_keeps_what_torch_prune_keeps(matrix: torch.Tensor, sparsity: float) -> None:
    stored = Sparse(sparsity)(matrix)
    if stored.kind == "plain":
        assert torch.equal(stored.dense(), matrix)
        return
    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data.copy_(matrix)
    prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(stored.dense(), layer.weight)
    kept = int(layer.weight_mask.sum())
    assert stored.num_bytes == 4 * kept + -(-matrix.numel() // 8)


def test_sparse_takes_exactly_as_many_of_equal_values() -> None:
    stored = Sparse(0.75)(torch.ones(8, 8))
    assert int(stored.dense().sum()) == 16 and stored.num_bytes == 4 * 16 + 8


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(places: list[bool]) -> None:
    mask = torch.tensor(places, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.numel() == -(-len(places) // 8) and torch.equal(unpack_bits(packed, len(places)), mask)


@given(matrices, st.sampled_from(("int8", "int4")))
def test_blocks_are_those_of_the_codec(matrix: torch.Tensor, kind: str) -> None:
    codec, flat = codec_of(kind), matrix.reshape(-1)
    whole = torch.nn.functional.pad(flat, (0, -flat.numel() % codec.block))
    stored = Blocks(kind)(matrix)
    size = codec.payload_bytes(whole.numel())
    if size >= 4 * flat.numel():
        assert stored.kind == "plain"
        return
    assert stored.num_bytes == size
    assert torch.equal(stored.dense().view(-1), codec.decode(codec.encode(whole), whole.numel())[: flat.numel()])


def model() -> dict[str, torch.Tensor]:
    shapes = {"embed.weight": (64, 48), "norm.weight": (48,), "up.weight": (100, 48)}
    return {name: vector(prod(shape), seed).view(shape) for seed, (name, shape) in enumerate(shapes.items())}


METHODS = [LowRank(4), LowRank(0.1), Sparse(0.5), Blocks("int8"), Blocks("int4")]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_file_gives_back_the_same_dense_weights(tmp_path: Path, method) -> None:
    stored = shrink(model(), method)
    assert stored["norm.weight"].kind == "plain" and all(stored[name].kind != "plain" for name in ("embed.weight", "up.weight"))
    save_shrunk(tmp_path / "s.pt", stored, "test")
    loaded = load_shrunk(tmp_path / "s.pt")
    assert list(loaded) == list(model())
    for name, one in stored.items():
        assert torch.equal(loaded[name], one.dense()) and loaded[name].shape == model()[name].shape
    overhead = (tmp_path / "s.pt").stat().st_size - stored_bytes(stored)
    assert 0 < overhead < 5000, "what is not in the parts is torch.save's own"


def test_no_part_drags_more_than_itself_into_the_file(tmp_path: Path) -> None:
    """torch.save writes a view's whole storage."""
    stored = shrink({"a": vector(10_000, 1).view(100, 100)[:10]}, plain)
    save_shrunk(tmp_path / "s.pt", stored, "test")
    assert stored_bytes(stored) == 4000 and (tmp_path / "s.pt").stat().st_size < 8000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(1.5), "rank 1.5: give a whole number"),
        (lambda: LowRank(0), "rank 0: give a whole number"),
        (lambda: Sparse(1.0), "sparsity 1: give the fraction of zeros"),
        (lambda: shrink({"up.weight": torch.tensor([[float("nan")]])}, Sparse(0.5)), "up.weight holds nan or inf"),
        (lambda: load_shrunk(Path("/nonexistent/s.pt")), "s.pt cannot be read: No such file"),
        (lambda: save_shrunk(Path("/nonexistent/s.pt"), {}, ""), "s.pt cannot be written: No such file"),
    ],
)
def test_mistakes_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    for write in (lambda: path.write_bytes(b"not torch"), lambda: path.write_bytes(b""), lambda: torch.save({"a": 1}, path)):
        write()
        with pytest.raises(UserError, match=r"s.pt is no file of shrunk weights, or is damaged"):
            load_shrunk(path)
    save_shrunk(path, shrink(model(), Sparse(0.5)), "test")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"s.pt is no file of shrunk weights, or is damaged"):
        load_shrunk(path)
