"""The ranks of this job as a torch `DeviceMesh`, and what they say to each other outside of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """Groups of ranks by what they share.

    Attributes:
        device_mesh: of all ranks, with `Layout`'s dimensions; None for one rank, and for ranks that are not there.
        dp, cfg, ring, ulysses, tp: along each dimension.
        sp: of ring and Ulysses, who share a sequence.
        branch: of ring, Ulysses and tensor parallelism, who compute one branch of guidance together.
        world: all ranks.
    """

    layout: Layout
    device_mesh: DeviceMesh | None
    dp: Group
    cfg: Group
    ring: Group
    ulysses: Group
    tp: Group
    sp: Group
    branch: Group
    world: Group

    @classmethod
    def join(cls, layout: Layout, device: torch.device, timeout_s: float) -> Mesh:
        """With the other ranks of the process group there is, as many as the layout has; all of them call this.

        Args:
            timeout_s: a collective that some rank does not come to within this time is an error on all others.
        """
        sizes = asdict(layout)
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        groups = {name: _group(name, mesh[name]) for name in sizes}
        groups["sp"] = _group("sp", mesh["ring", "ulysses"]._flatten("sp"))
        groups["branch"] = _group("branch", mesh["ring", "ulysses", "tp"]._flatten("branch"))
        groups["world"] = Group("world", layout.ranks, dist.get_rank(), dist.group.WORLD)
        for group in groups.values():
            if group.process_group is not None:  # a mesh makes its groups with a default of its own
                _set_pg_timeout(timedelta(seconds=timeout_s), group.process_group)
        return cls(layout, mesh, **groups)

    @classmethod
    def stand_in(cls, layout: Layout) -> Mesh:
        """As its first rank sees it, of ranks that are not there."""
        groups = {name: Group(name, size) for name, size in asdict(layout).items()}
        sp, branch = Group("sp", layout.sp), Group("branch", layout.sp * layout.tp)
        return cls(layout, None, sp=sp, branch=branch, world=Group("world", layout.ranks), **groups)

    def report(self) -> dict[str, Any]:
        """Degrees, and what this rank has sent since the last report, by group and collective."""
        groups = (self.dp, self.cfg, self.ring, self.ulysses, self.tp, self.sp, self.branch, self.world)
        sent = {g.name: {name: asdict(t) for name, t in g.traffic.items()} for g in groups if g.traffic}
        for group in groups:
            group.traffic.clear()
        return {"ranks": self.layout.ranks, **asdict(self.layout), "sent": sent}


ONE = Mesh.stand_in(Layout())


def _group(name: str, mesh: DeviceMesh) -> Group:
    return Group(name, mesh.size(), mesh.get_local_rank(), mesh.get_group() if mesh.size() > 1 else None)


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Joins the processes that were started together: NCCL among GPUs, gloo among CPUs. A program that has done so
    itself keeps the group it has.

    Args:
        timeout_s: a collective that some rank does not come to within this time is an error on all others.
    """
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=bound)
    try:
        yield
    finally:
        dist.destroy_process_group()
