"""The prediction of a step: its parts, and laws that any cost model must keep."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.cluster import Device, Quantity, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.graph import Routes
from thinwire.collectives.price import price
from thinwire.config.model import preset
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.cost import Prediction, Setting, predict
from thinwire.traffic import EVALUATION, Transfer
from thinwire.workload import Workload

WORKLOAD = Workload.of_transformer(preset("1m"), 4, 64)


def setting(ranks: int = 4, rates: tuple[float, ...] = (), rate_bps: float = 100e6, micro_batches: int = 1) -> Setting:
    return Setting(
        cluster=equal_hosts(ranks, rate_bps),
        layout=Layout(data=ranks),
        workload=WORKLOAD,
        micro_batches=micro_batches,
        flops_per_s=rates or (10e9,) * ranks,
    )


def transfer(message_bytes: int, window_flops: float = 0.0, label: str = "bucket", every: int = 1) -> Transfer:
    return Transfer(
        label=label, axis="data", op="all_reduce", message_bytes=message_bytes, window_flops=window_flops, every=every
    )


def test_without_transfers_a_step_is_compute_and_optimizer() -> None:
    found = predict(setting(micro_batches=3), [])
    assert found.compute_s == pytest.approx(3 * WORKLOAD.flops_per_microbatch / 10e9)
    assert found.exposed_s == found.waiting_s == 0
    assert found.step_s == found.compute_s + found.optimizer_s


def test_micro_batches_dealt_by_speed_leave_nobody_waiting() -> None:
    uneven = setting(rates=(10e9, 10e9, 10e9, 5e9), micro_batches=7)
    assigned = replace(uneven, assignment=(8, 8, 8, 4))
    one_s = WORKLOAD.flops_per_microbatch / 10e9
    assert predict(uneven, []).compute_s + predict(uneven, []).waiting_s == pytest.approx(14 * one_s)
    for rank in range(4):
        found = predict(assigned, [], rank)
        assert (found.compute_s, found.waiting_s) == (pytest.approx(8 * one_s), pytest.approx(0, abs=1e-12))
        assert found.tokens_per_step == predict(uneven, [], rank).tokens_per_step


def test_a_bucket_is_ready_when_its_last_rank_is() -> None:
    """Rank 1 ends last, and rank 0, slower by half, has its gradients of the window earlier than that."""
    window = WORKLOAD.flops_per_microbatch / 2
    assigned = replace(setting(ranks=2, rates=(5e9, 10e9), micro_batches=2), assignment=(1, 3))
    alone, beside = predict(assigned, [transfer(2**22)]), predict(assigned, [transfer(2**22, window)])
    assert alone.exposed_s - beside.exposed_s == pytest.approx(window / 10e9)


def test_what_nobody_computes_beside_is_exposed_whole() -> None:
    found = predict(setting(), [transfer(2**20), transfer(2**19)])
    assert found.exposed_s == pytest.approx(sum(priced.seconds for priced in found.transfers))


def test_what_fits_under_the_backward_pass_is_hidden() -> None:
    alone = predict(setting(), [transfer(2**18)])
    enough = alone.exposed_s * 10e9 * (1 + 1e-9)
    assert predict(setting(), [transfer(2**18, enough)]).exposed_s == 0
    assert predict(setting(), [transfer(2**18, enough / 2)]).exposed_s == pytest.approx(alone.exposed_s / 2, rel=0.02)


def test_the_wire_serves_one_transfer_after_another() -> None:
    """Two that become ready at once take twice as long as one, hidden or not."""
    one = predict(setting(), [transfer(2**20, 1e8)])
    two = predict(setting(), [transfer(2**20, 1e8), transfer(2**20, 1e8)])
    assert two.exposed_s == pytest.approx(one.exposed_s + one.transfers[0].seconds)


def test_fast_ranks_wait_for_slow_ones() -> None:
    rates = (10e9, 10e9, 10e9, 5e9)
    fast, slow = predict(setting(rates=rates), [], rank=0), predict(setting(rates=rates), [], rank=3)
    assert fast.waiting_s == pytest.approx(fast.compute_s) and slow.waiting_s == 0
    assert fast.compute_s + fast.waiting_s == pytest.approx(slow.compute_s)


def test_rare_transfers_count_with_their_share() -> None:
    each, rare = predict(setting(), [transfer(2**20)]), predict(setting(), [transfer(2**20, every=10)])
    assert rare.exposed_s == pytest.approx(each.exposed_s / 10)
    assert rare.transfers[0].wire_bytes_per_step == pytest.approx(each.transfers[0].wire_bytes_per_step / 10)


def test_transfers_of_one_event_share_what_they_hide_under() -> None:
    rare = transfer(2**20, window_flops=0.1 * 10e9, every=10)  # 0.1 s of compute
    first, second = (replace(rare, event=event) for event in ("fragment 0", "fragment 1"))
    (priced,) = predict(setting(), [rare]).transfers
    assert 0.1 < priced.seconds < 0.2
    assert predict(setting(), [rare, rare]).exposed_s == pytest.approx(2 * (priced.seconds - 0.1) / 10)
    assert predict(setting(), [first, first]).exposed_s == pytest.approx((2 * priced.seconds - 0.1) / 10)
    assert predict(setting(), [first, second, second]).exposed_s == pytest.approx((3 * priced.seconds - 0.2) / 10)


def test_links_carry_what_the_ranks_send() -> None:
    found = predict(setting(), [transfer(2**20)])
    sent = 4 * found.transfers[0].wire_bytes_per_step
    assert sum(found.links.values()) == pytest.approx(2 * sent), "up to the switch, and down again"


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="needs 8 ranks, but there are 4"):
        predict(replace(setting(), layout=Layout(data=8)), [])
    with pytest.raises(UserError, match="3 compute rates for 4 ranks"):
        predict(setting(rates=(1e9,) * 3), [])


@given(
    sizes=st.lists(st.integers(1, 10**7), max_size=6),
    windows=st.lists(st.floats(0, 1e10), min_size=6, max_size=6),
    faster=st.floats(1, 1000),
)
def test_a_faster_wire_never_makes_a_step_slower(sizes: list[int], windows: list[float], faster: float) -> None:
    transfers = [transfer(size, window, f"bucket {i}") for i, (size, window) in enumerate(zip(sizes, windows, strict=False))]
    slow, fast = predict(setting(), transfers), predict(setting(rate_bps=100e6 * faster), transfers)
    assert fast.step_s <= slow.step_s + 1e-12
    assert slow.exposed_s <= sum(priced.seconds for priced in slow.transfers) + 1e-12


def test_racks_are_priced_by_their_uplink() -> None:
    cluster = load_cluster("two-racks")
    found: Prediction = predict(
        Setting(cluster=cluster, layout=Layout(data=8), workload=WORKLOAD, micro_batches=1, flops_per_s=(6e9,) * 8),
        [transfer(2**22)],
    )
    busiest = max(found.links, key=lambda link: found.links[link])
    assert "rack-" in busiest.source and busiest.target in ("switch", "rack-a", "rack-b")
    from thinwire.cluster.graph import Routes

    assert found.transfers[0].seconds == price(Routes(cluster), "all_reduce", 2**22, range(8))


def on_devices(rank_1: Device, kind: str = "") -> Prediction:
    """Of rank 1 of two."""
    made = setting(ranks=2)
    first, second = made.cluster.hosts
    second = replace(second, devices=(replace(rank_1, name=second.devices[0].name),))
    return predict(replace(made, cluster=replace(made.cluster, hosts=(first, second)), kind=kind), [], rank=1)


def test_the_optimizer_costs_what_it_touches_at_the_rate_of_its_own_device() -> None:
    touched = 3 * WORKLOAD.stored_bytes + 2 * WORKLOAD.optimizer_bytes("adamw")
    fast = on_devices(Device(name="", kind="h100", memory_bytes_per_s=Quantity(2e12, "measured")))
    assert fast.optimizer_s == pytest.approx(touched / 2e12) and "memory rate: measured" in fast.assumptions
    core = on_devices(Device(name="", memory_bytes_per_s=Quantity(8e9)))
    assert core.optimizer_s == pytest.approx(touched / 8e9) and "memory rate: declared" in core.assumptions


def test_a_rate_that_is_not_known_is_taken_by_kind_and_said_of_a_gpu() -> None:
    core, gpu = on_devices(Device(name="")), on_devices(Device(name="", kind="h100"))
    assert core.optimizer_s == pytest.approx(predict(setting(), []).optimizer_s)
    assert not any("memory rate" in line for line in core.assumptions)
    assert gpu.optimizer_s < core.optimizer_s / 100
    assert "memory rate: taken as 1 TB/s, the cluster file has no memory_bytes_per_s of h100" in gpu.assumptions
    rated = Device(name="", memory_bytes_per_s=Quantity(8e9))
    assert on_devices(rated, kind="h100").optimizer_s == gpu.optimizer_s, "that of a CPU says nothing of the GPU beside it"


def on_tensor_axis(message_bytes: int, calls: int, label: str = "activations", every: int = 1) -> Transfer:
    return Transfer(
        label=label, axis="tensor", op="all_reduce", message_bytes=message_bytes, calls=calls, every=every, in_passes=True
    )


def test_passes_stand_still_for_tensor_ranks_and_buckets_hide_under_compute_alone() -> None:
    """What is sent within passes is exposed whole; buckets hide as much as without it; evaluations are no part of a step."""
    split = replace(setting(), layout=Layout(data=2, tensor=2))
    window = WORKLOAD.flops_per_microbatch / 2
    buckets = [transfer(2**22, window), transfer(2**20, window / 2)]
    sums, evaluation = on_tensor_axis(2**16, 12), on_tensor_axis(2**20, 100, EVALUATION, every=10)
    plain, both = predict(split, buckets), predict(split, [sums, evaluation, *buckets])
    assert both.transfers[0].seconds == pytest.approx(12 * price(Routes(split.cluster), "all_reduce", 2**16, (0, 1)))
    assert both.exposed_s - plain.exposed_s == pytest.approx(both.transfers[0].seconds)
    assert both.compute_s == plain.compute_s and both.waiting_s == plain.waiting_s


def around(message_bytes: int, calls: int = 1, window_flops: float = 0.0) -> Transfer:
    return Transfer(
        label="keys and values",
        axis="seq",
        op="send",
        message_bytes=message_bytes,
        calls=calls,
        window_flops=window_flops,
        in_passes=True,
        around=True,
    )


def test_passes_stand_still_for_what_of_a_ring_does_not_hide_under_its_turns() -> None:
    """Each message by itself: what one turn has to spare is no use to another."""
    ring = replace(setting(), layout=Layout(seq=4))
    (priced,) = predict(ring, [around(2**16, calls=6)]).transfers
    each_s = priced.seconds / 6
    for hidden, exposed_s in ((0.0, 6 * each_s), (each_s / 3, 4 * each_s), (2 * each_s, 0.0)):
        assert predict(ring, [around(2**16, 6, hidden * 10e9)]).exposed_s == pytest.approx(exposed_s)
    found = predict(ring, [around(2**16)])
    assert sum(found.links.values()) == 8 * 2**16, "each rank sends to the next: up to the switch, and down again"
    assert found.transfers[0].even and found.transfers[0].wire_bytes_per_step == 2**16
    assert found.tokens_per_step == 4 * WORKLOAD.tokens_per_microbatch, "of which the workload is one rank's share"


def test_rings_of_replicas_share_their_hosts_links_and_gradients_are_averaged_over_all() -> None:
    """Two rings over the same two hosts take as long as one with twice the message."""
    eight = replace(setting(), cluster=load_cluster("four-hosts-of-two-100mbit"), flops_per_s=(10e9,) * 8)
    apart, together = (replace(eight, layout=Layout(data=data, seq=8 // data)) for data in (4, 2))
    assert predict(apart, [around(2**20)]).exposed_s < 0.01 * predict(together, [around(2**20)]).exposed_s, "a host's own ring"
    crossing = replace(eight, layout=Layout(seq=4, tensor=2))
    one, both = (
        predict(crossing, [around(2**20)]).exposed_s,
        predict(replace(eight, layout=Layout(seq=8)), [around(2**20)]).exposed_s,
    )
    assert one == pytest.approx(2 * both, rel=0.05), "each host sends to the next twice, and once"
    gradients = predict(together, [transfer(2**20)]).transfers[0]
    assert gradients.seconds == predict(replace(eight, layout=Layout(data=8)), [transfer(2**20)]).transfers[0].seconds


def test_tensor_ranks_with_uneven_parts_wait_for_the_one_that_has_most() -> None:
    split = replace(setting(), layout=Layout(data=2, tensor=2), tensor_flops=(3e9, 1e9))
    assert len(set(split.flops_per_s)) == 1
    most, least = (predict(split, [], rank) for rank in (0, 1))
    assert most.waiting_s == 0 and least.compute_s == pytest.approx(most.compute_s / 3)
    assert least.compute_s + least.waiting_s == pytest.approx(most.compute_s)
    even = replace(split, tensor_flops=())
    assert not predict(split, [transfer(2**16)]).transfers[0].even and predict(even, [transfer(2**16)]).transfers[0].even


def test_groups_of_replicas_of_tensor_ranks_share_their_hosts_links() -> None:
    """Two ranks of a host, each with half the model, take as long for their halves as one with all of it takes for the whole."""
    cluster = load_cluster("four-hosts-of-two-100mbit")
    whole = replace(setting(), cluster=cluster, layout=Layout(data=4, tensor=2), flops_per_s=(10e9,) * 8)
    halves, size = predict(whole, [transfer(2**22)]), 2**23
    assert halves.transfers[0].seconds == pytest.approx(price(Routes(cluster), "all_reduce", size, (0, 2, 4, 6)), rel=1e-6)
    assert predict(whole, [on_tensor_axis(2**22, 1)]).exposed_s < 0.01 * halves.exposed_s, "ranks of a host need no link"
