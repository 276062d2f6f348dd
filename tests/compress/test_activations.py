"""What crosses a boundary: sizes, bounds, two sides that stay equal, and sums over real ranks with their gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from error_bounds import boundary_bound
from hypothesis import given
from hypothesis import strategies as st
from vectors import ALL, codec_of, vector

from pool import Pool, Rank, RankFailure
from thinwire.compress.activations.boundary import BoundaryCodec, CodedBoundary
from thinwire.compress.activations.differences import Differences
from thinwire.compress.activations.partial_sums import coded_all_reduce, coded_gradient_sum, coded_sum, sum_transfers
from thinwire.errors import UserError

MONOTONE = ["bf16", "int8", "int4"]
"""Codecs whose error bound grows with the sizes of the values."""


def codec_or_none(kind: str) -> Any:
    return None if kind == "none" else codec_of(kind)


# -- a boundary -------------------------------------------------------------------------------------------------------


@given(st.sampled_from(ALL), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 300), st.integers(0, 99))
def test_any_shape_arrives_within_the_bound_in_exactly_the_bytes(kind: str, lead: list[int], width: int, seed: int) -> None:
    boundary = BoundaryCodec(codec_of(kind), "boundary 0-1")
    x = vector(width * int(torch.tensor(lead).prod()), seed).view(*lead, width)
    payload = boundary.pack(x)
    assert payload.dtype == torch.uint8 and payload.numel() == boundary.payload_bytes(x.shape)
    arrived = boundary.unpack(payload, x.shape)
    assert arrived.shape == x.shape and bool(((arrived - x).abs() <= boundary_bound(boundary, x)).all())


def test_bfloat16_activations_and_transposed_ones_keep_shape_and_dtype() -> None:
    boundary = BoundaryCodec(codec_of("int8"), "boundary 0-1")
    x = torch.randn(5, 64, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).transpose(1, 2)
    arrived = boundary.unpack(boundary.pack(x), x.shape, x.dtype)
    assert arrived.dtype == torch.bfloat16
    rounding = x.float().abs() * 2**-7
    assert bool(((arrived.float() - x.float()).abs() <= boundary_bound(boundary, x) + rounding).all())


@pytest.mark.parametrize(("kind", "bad"), [("int8", float("nan")), ("bf16", float("inf")), ("fp16", 1e5), ("topk", float("nan"))])
def test_what_is_not_finite_is_reported_with_the_boundary(kind: str, bad: float) -> None:
    x = torch.ones(3, 100)
    x[1, 7] = bad
    with pytest.raises(UserError, match=r"the activation of boundary 2-3 (is not finite|has values of 1e\+05, and fp16 ends at)"):
        BoundaryCodec(codec_of(kind), "the activation of boundary 2-3").pack(x)


def test_values_and_gradients_both_arrive_coded() -> None:
    forward, backward = BoundaryCodec(codec_of("int4"), "a"), BoundaryCodec(codec_of("int8"), "g")
    x = vector(600, 1).view(2, 300).requires_grad_()
    gradient = vector(600, 2).view(2, 300)
    y = CodedBoundary.apply(x, forward, backward)
    y.backward(gradient)
    assert torch.equal(y, forward.unpack(forward.pack(x), x.shape)) and not torch.equal(y, x)
    assert torch.equal(x.grad, backward.unpack(backward.pack(gradient), x.shape)) and not torch.equal(x.grad, gradient)
    plain = CodedBoundary.apply(x, None, None)
    assert torch.equal(plain, x)


# -- differences ------------------------------------------------------------------------------------------------------


def settling(sample: int, visit: int, width: int = 300) -> torch.Tensor:
    """Activations that move half as far at each visit."""
    return vector(width, sample) + vector(width, 1000 + sample) * 0.5**visit


def sides(kind: str, first: str, dtype: torch.dtype) -> tuple[Differences, Differences]:
    options = {"first": codec_or_none(first), "dtype": dtype}
    return Differences(codec_of(kind), "boundary 0-1", **options), Differences(codec_of(kind), "boundary 0-1", **options)


@given(
    st.sampled_from(("int8", "int4", "fp4", "bf16")),
    st.sampled_from(("none", "int8")),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True), min_size=1, max_size=6),
)
def test_both_sides_are_equal_at_all_times_and_the_error_is_that_of_the_difference(
    kind: str, first: str, dtype: torch.dtype, messages: list[list[int]]
) -> None:
    """Samples come in any order, new and old mixed in one message."""
    sender, receiver = sides(kind, first, dtype)
    coder = BoundaryCodec(codec_of(kind), "reference")
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-22
    for visit, ids in enumerate(messages):
        activation = torch.stack([settling(sample, visit) for sample in ids])
        before = {sample: copy.float() for sample, copy in sender.copies.items()}
        expected_bytes = sender.payload_bytes(ids, activation.shape)
        payload = sender.pack(ids, activation)
        assert payload.numel() == expected_bytes == receiver.payload_bytes(ids, activation.shape)
        arrived = receiver.unpack(payload, ids, activation.shape)
        assert sender.copies.keys() == receiver.copies.keys()
        assert all(torch.equal(sender.copies[sample], receiver.copies[sample]) for sample in sender.copies)
        assert all(torch.equal(arrived[place], receiver.copies[sample].float()) for place, sample in enumerate(ids))
        old = [place for place, sample in enumerate(ids) if sample in before]
        if old:
            difference = activation[old] - torch.stack([before[ids[place]] for place in old])
            error = (arrived[old] - activation[old]).abs()
            assert bool(
                (error <= boundary_bound(coder, difference) + rounding * (arrived[old].abs() + activation[old].abs())).all()
            )
    width = 300
    assert sender.memory_bytes == receiver.memory_bytes == len(sender.copies) * width * dtype.itemsize


def test_the_error_vanishes_as_activations_settle_where_direct_coding_keeps_it() -> None:
    """Each visit halves the movement, so it halves the error: 2^-12 of it is left after 12."""
    sender, receiver = sides("int4", "none", torch.float32)
    ids, errors = [3, 5], []
    for visit in range(14):
        activation = torch.stack([settling(sample, visit) for sample in ids])
        arrived = receiver.unpack(sender.pack(ids, activation), ids, activation.shape)
        errors.append(float((arrived - activation).norm() / activation.norm()))
    boundary = BoundaryCodec(codec_of("int4"), "direct")
    direct = float((boundary.unpack(boundary.pack(activation), activation.shape) - activation).norm() / activation.norm())
    assert errors[0] == 0 and errors[13] < errors[1] / 1000
    assert errors[13] < direct / 1000 and direct > 0.05


def test_a_side_that_resumes_goes_on_bit_for_bit(tmp_path) -> None:
    whole, _ = sides("int4", "int8", torch.bfloat16)
    for visit in range(3):
        whole.pack([1, 2], torch.stack([settling(sample, visit) for sample in (1, 2)]))
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed, _ = sides("int4", "int8", torch.bfloat16)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for visit in range(3, 6):
        activation = torch.stack([settling(sample, visit) for sample in (2, 1, 4)])
        assert torch.equal(whole.pack([2, 1, 4], activation), resumed.pack([2, 1, 4], activation))
    assert all(torch.equal(whole.copies[sample], resumed.copies[sample]) for sample in (1, 2, 4))
    with pytest.raises(UserError, match=r"copies in torch.bfloat16, and the buffer is set to torch.float32"):
        sides("int4", "int8", torch.float32)[0].load_state_dict(whole.state_dict())


def test_a_message_that_is_refused_leaves_the_copies_as_they_were() -> None:
    sender, _ = sides("int8", "none", torch.float32)
    sender.pack([1], torch.ones(1, 8))
    with pytest.raises(UserError, match=r"boundary 0-1 is not finite"):
        sender.pack([1, 2], torch.tensor([[float("nan")] * 8, [1.0] * 8]))
    with pytest.raises(UserError, match=r"boundary 0-1 is not finite"):
        sender.pack([1, 2], torch.tensor([[1.0] * 8, [float("inf")] * 8]))
    with pytest.raises(UserError, match=r"sample 1 came with shape \(9,\) and was \(8,\) before"):
        sender.pack([1], torch.ones(1, 9))
    assert list(sender.copies) == [1] and torch.equal(sender.copies[1], torch.ones(8))


def cross(context: Rank) -> tuple[list[int], list[int], dict[int, torch.Tensor]]:
    """Three visits from rank 0 to rank 1; message sizes as both sides predict them, and as the ledger has them."""
    sender, receiver = sides("int4", "none", torch.bfloat16)
    side = receiver if context.rank else sender
    predicted = []
    for visit in range(3):
        ids = [visit, visit + 1]
        activation = torch.stack([settling(sample, visit) for sample in ids])
        predicted.append(side.payload_bytes(ids, activation.shape))
        if context.rank == 0:
            dist.send(sender.pack(ids, activation), 1)
        else:
            payload = torch.empty(predicted[-1], dtype=torch.uint8)
            dist.recv(payload, 0)
            receiver.unpack(payload, ids, activation.shape)
    calls = [(call.message_bytes, total.calls) for call, total in context.recorded().items()]
    return predicted, sorted(size for size, count in calls for _ in range(count)), side.copies


def test_over_a_real_boundary_bytes_are_as_predicted_and_copies_equal(ranks2: Pool) -> None:
    (predicted, sent, ours), (theirs_predicted, received, theirs) = ranks2.run(cross)
    new, old = 300 * 2, 66 * 3  # plain bfloat16; three blocks of 128 in int4
    assert predicted == theirs_predicted == [2 * new, new + old, new + old]
    assert sent == received == sorted(predicted)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[sample], theirs[sample]) for sample in ours)


# -- sums over a group ------------------------------------------------------------------------------------------------


def partial(rank: int, shape: tuple[int, ...] = (7, 333)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def sum_bound(parts: list[torch.Tensor], kind: str) -> torch.Tensor:
    """The bound of a coded sum, with all ranks' errors counted (the owner of a shard makes one less); float64 sums."""
    if kind == "none":
        return sum(part.abs() for part in parts) * 2**-22
    boundary = BoundaryCodec(codec_of(kind), "bound")
    first = sum(boundary_bound(boundary, part) for part in parts)
    total = sum(part.double() for part in parts).float()
    return first + boundary_bound(boundary, total.abs() + first) + sum(part.abs() for part in parts) * 2**-21


def summed(context: Rank, kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[Any], list[Any]]:
    x = partial(context.rank).to(dtype)
    codec = codec_or_none(kind)
    before = x.clone()
    result = coded_sum(x, dist.group.WORLD, codec, context.ledger, "layer 0")
    assert torch.equal(x, before) and result.dtype == dtype
    sent = [(c.label, c.axis, c.op, c.message_bytes, t.calls) for c, t in context.recorded().items()]
    transfers = sum_transfers((x.numel(), dtype), codec, "world", context.world_size, "layer 0")
    return result, sorted(sent), sorted((t.label, t.axis, t.op, t.message_bytes, t.calls) for t in transfers)


@pytest.mark.parametrize("kind", ["none", *ALL])
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_sums_are_bit_equal_on_ranks_and_send_what_was_predicted(request: pytest.FixtureRequest, pool: str, kind: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(summed, kind, torch.float32)
    for result, sent, predicted in reports:
        assert torch.equal(result, reports[0][0]) and sent == predicted and len(sent) == (1 if kind == "none" else 2)


@pytest.mark.parametrize("kind", ["none", *MONOTONE])
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_the_sum_is_within_the_bound_of_the_plain_one(request: pytest.FixtureRequest, pool: str, kind: str) -> None:
    """And not by being far below it: a bound ten times smaller does not hold."""
    ranks: Pool = request.getfixturevalue(pool)
    result = ranks.run(summed, kind, torch.float32)[0][0]
    parts = [partial(rank) for rank in range(ranks.world_size)]
    error = (result.double() - sum(part.double() for part in parts)).abs()
    assert bool((error <= sum_bound(parts, kind)).all())
    assert kind == "none" or float(error.max()) > float(sum_bound(parts, kind).max()) / 10


def test_bfloat16_activations_are_summed_in_float32(ranks4: Pool) -> None:
    result = ranks4.run(summed, "bf16", torch.bfloat16)[0][0]
    parts = [partial(rank).to(torch.bfloat16).float() for rank in range(4)]
    assert torch.equal(result, (parts[0] + parts[1] + parts[2] + parts[3]).to(torch.bfloat16))


def not_finite(context: Rank, where: int) -> None:
    x = torch.ones(600)
    x[where] = float("nan")
    coded_sum(x, dist.group.WORLD, codec_of("int8"), context.ledger, "block 3 attention")


@pytest.mark.parametrize("where", [0, 599])
def test_a_sum_that_is_not_finite_is_reported_with_its_label(ranks2: Pool, where: int) -> None:
    """In whichever shard it is."""
    with pytest.raises(RankFailure, match=r"block 3 attention is not finite"):
        ranks2.run(not_finite, where)


# -- a tensor-parallel MLP --------------------------------------------------------------------------------------------

BATCH, WIDTH, HIDDEN = 12, 40, 64


def mlp_data(whole: bool) -> dict[str, torch.Tensor]:
    """whole: small whole numbers, so that every sum is exact in whatever order, in bfloat16 too."""
    generator = torch.Generator().manual_seed(5)
    if not whole:
        sizes = {"x": (BATCH, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN), "target": (BATCH, WIDTH)}
        return {name: torch.randn(size, generator=generator) / 6 for name, size in sizes.items()}
    up, down = torch.zeros(HIDDEN, WIDTH), torch.zeros(WIDTH, HIDDEN)
    for row in range(HIDDEN):  # two entries a row keep sums below 2^8
        up[row, torch.randint(WIDTH, (2,), generator=generator)] = 1.0
    for row in range(WIDTH):
        down[row, torch.randint(HIDDEN, (2,), generator=generator)] = -1.0
    x = torch.randint(-2, 3, (BATCH, WIDTH), generator=generator).float()
    return {"x": x, "up": up, "down": down, "target": torch.randint(-1, 2, (BATCH, WIDTH), generator=generator).float()}


def tensor_parallel(context: Rank, kind: str, whole: bool) -> dict[str, torch.Tensor]:
    data, codec, group = mlp_data(whole), codec_or_none(kind), dist.group.WORLD
    x = data["x"].requires_grad_()
    part = slice(context.rank * HIDDEN // context.world_size, (context.rank + 1) * HIDDEN // context.world_size)
    up = data["up"][part].clone().requires_grad_()
    down = data["down"][:, part].clone().requires_grad_()
    hidden = torch.relu(coded_gradient_sum(x, group, codec, context.ledger, "f") @ up.T)
    y = coded_all_reduce(hidden @ down.T, group, codec, context.ledger, "g")
    (0.5 * (y - data["target"]).square().sum()).backward()
    return {"y": y.detach(), "x": x.grad, "up": up.grad, "down": down.grad}


def one_process(whole: bool) -> dict[str, torch.Tensor]:
    data = {name: value.double() for name, value in mlp_data(whole).items()}
    for name in ("x", "up", "down"):
        data[name].requires_grad_()
    y = torch.relu(data["x"] @ data["up"].T) @ data["down"].T
    (0.5 * (y - data["target"]).square().sum()).backward()
    return {"y": y.detach(), "x": data["x"].grad, "up": data["up"].grad, "down": data["down"].grad}


@pytest.mark.parametrize("kind", ["none", "bf16"])
def test_gradients_of_a_split_mlp_equal_those_of_one_process_exactly(ranks2: Pool, kind: str) -> None:
    reports, wanted = ranks2.run(tensor_parallel, kind, True), one_process(True)
    assert float(wanted["x"].abs().max()) <= 256 and float(wanted["x"].abs().max()) > 0
    for name in ("y", "x"):
        assert all(torch.equal(rank[name].double(), wanted[name]) for rank in reports)
    assert torch.equal(torch.cat([rank["up"] for rank in reports]).double(), wanted["up"])
    assert torch.equal(torch.cat([rank["down"] for rank in reports], 1).double(), wanted["down"])


@pytest.mark.parametrize("kind", ["none", *MONOTONE])
def test_gradients_of_a_split_mlp_are_within_what_the_codec_may_do(ranks2: Pool, kind: str) -> None:
    """The loss is quadratic, so the gradient of y is as far off as y; from there on each product only passes bounds on."""
    reports, wanted = ranks2.run(tensor_parallel, kind, False), one_process(False)
    data, halves = mlp_data(False), (slice(0, HIDDEN // 2), slice(HIDDEN // 2, HIDDEN))
    hidden = torch.relu(data["x"] @ data["up"].T)
    off_y = sum_bound([hidden[:, half] @ data["down"][:, half].T for half in halves], kind) + 1e-6
    off_hidden = (off_y @ data["down"].abs()) * (hidden > 0) + 1e-6
    back = ((hidden @ data["down"].T - data["target"]) @ data["down"]) * (hidden > 0)
    parts = [back[:, half] @ data["up"][half] for half in halves]
    moved = [off_hidden[:, half] @ data["up"][half].abs() for half in halves]
    off_x = sum(moved) + sum_bound([part.abs() + off for part, off in zip(parts, moved, strict=True)], kind)
    bounds = {"y": off_y, "x": off_x, "up": off_hidden.T @ data["x"].abs() + 1e-5, "down": off_y.T @ hidden + 1e-5}
    got = {"y": reports[0]["y"], "x": reports[0]["x"], "up": torch.cat([rank["up"] for rank in reports])}
    got["down"] = torch.cat([rank["down"] for rank in reports], 1)
    for name, bound in bounds.items():
        assert bool(((got[name].double() - wanted[name]).abs() <= bound).all()), name
    assert torch.equal(reports[0]["y"], reports[1]["y"]) and torch.equal(reports[0]["x"], reports[1]["x"])
    assert kind == "none" or not torch.allclose(reports[0]["x"].double(), wanted["x"], atol=1e-5)


def test_complex_activations_are_refused_and_those_of_no_dims_arrive() -> None:
    codec = BoundaryCodec(codec_of("int8"), "the activation of boundary 0-1")
    with pytest.raises(UserError, match="boundary 0-1 is complex64; codes take real numbers"):
        codec.pack(torch.ones(4, dtype=torch.complex64))
    assert codec.unpack(codec.pack(torch.tensor(2.0)), ()).item() == pytest.approx(2.0, rel=0.01)
