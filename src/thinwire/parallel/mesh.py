"""The ranks of a layout as a mesh with named axes, and its groups."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from thinwire.layout import AXES, Layout

Groups = dict[str, dist.ProcessGroup]


def make_mesh(layout: Layout, device_type: str) -> tuple[DeviceMesh, Groups]:
    """Ranks by their numbers, the slow axis first, over the default group's backends. Collective over all ranks.

    The mesh is of those who average gradients (`Layout.of_gradients`); groups are of this rank, by axis, seq's own among them.
    """
    mesh = init_device_mesh(device_type, layout.of_gradients.degrees, mesh_dim_names=AXES)
    groups = {name: mesh.get_group(name) for name in AXES}
    if layout.seq > 1:
        groups["seq"], _ = dist.new_subgroups_by_enumeration(layout.groups("seq"))  # type: ignore[arg-type]
    return mesh, groups


def make_own_mesh(layout: Layout, device_type: str, order: Sequence[int], backend: str | None) -> tuple[DeviceMesh, Groups]:
    """The same in groups of one's own: order[n] is the rank in the place of number n; backend: of the groups, None: the default
    group's. Collective over all ranks."""
    whole, gradients = dist.distributed_c10d._get_default_group(), layout.of_gradients
    backend = backend or dist.get_backend_config(whole)

    def made(of: Layout, axis: str) -> dist.ProcessGroup:
        mine = None
        for places in of.groups(axis):
            ranks = [order[place] for place in places]
            in_place = {"sort_ranks": False} if ranks != sorted(ranks) else {}
            group = dist.new_group(ranks, backend=backend, group_desc=f"mesh_{axis}", **in_place)  # type: ignore[arg-type]
            mine = group if dist.get_rank() in ranks else mine
        assert isinstance(mine, dist.ProcessGroup), "each rank is in one group of an axis"
        return mine

    groups = {axis: made(gradients, axis) for axis in AXES}
    places = torch.tensor(list(order)).view(gradients.degrees)
    mesh = DeviceMesh.from_group(list(groups.values()), device_type, mesh=places, mesh_dim_names=AXES)
    if layout.seq > 1:
        groups["seq"] = made(layout, "seq")
    return mesh, groups
