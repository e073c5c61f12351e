"""1,024 ranks, simulated one after the other on torch's fake process group."""

import math

import pytest
import torch
import torch.distributed as dist
import worlds
from models import whole
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastclip.distributed.plan import plan_of
from fastclip.distributed.unwrap import specs_of

pytestmark = pytest.mark.slow

PP, DP, TP = 4, 32, 8


def _become(rank, size):
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())


def _mesh(ranks):
    """Without groups for its dimensions, hundreds in such a world, which nothing here is sent to."""
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple("abc"[: ranks.dim()]), _init_backend=False)


def _stage(dp, tp, expert, stage):
    """(what a tensor of this stage is, its parts on its mesh) of uneven, strided, replicated and small ones."""
    return [
        (whole((70, 9), 10 * stage), tp, [Shard(0), Shard(1)]),
        (whole((300, 4), 10 * stage + 1), tp, [_StridedShard(0, split_factor=TP), Shard(0)]),
        (whole((33, 2), 10 * stage + 2), dp, [Shard(0)]),  # 33 rows on 32 ranks: empty on some
        (whole((5,), 10 * stage + 3), dp, [Shard(0)]),
        (whole((16,), 10 * stage + 4), tp, [Shard(0), Replicate()]),
        (whole((7, 2), 10 * stage + 5), tp, [Replicate(), Replicate()]),
        (whole((6,), 10 * stage + 6), None, None),  # plain: a copy on every rank
        (whole((64, 3), 10 * stage + 7), expert, [Shard(1), Shard(0)]),
    ]


def _part(value, mesh, placements):
    """The part of this rank, cut dimension by dimension as torch does it."""
    if mesh is None:
        return torch.nn.Parameter(value.clone())
    order = list(enumerate(placements))
    if any(type(p) is _StridedShard for p in placements):  # the later dimension cuts first
        order = order[::-1]
    local = value
    for dim, placement in order:
        if placement.is_replicate():
            continue
        chunks = local.chunk(mesh.size(dim), placement.dim)
        rank = (mesh.mesh == dist.get_rank()).nonzero()[0, dim].item()
        local = chunks[rank] if rank < len(chunks) else local.narrow(placement.dim, 0, 0)
    return torch.nn.Parameter(
        DTensor.from_local(
            local.contiguous(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    )


def _thousand_ranks():
    """Sum plan x local statistics over all ranks, as the one all-reduce would."""
    size = PP * DP * TP
    total, exact = 0.0, 0.0
    for rank in range(size):
        _become(rank, size)
        ranks = torch.arange(size).reshape(PP, DP, TP)
        stage, row, column = (ranks == rank).nonzero()[0].tolist()
        own = ranks[stage]
        tensors = _stage(_mesh(own[:, column]), _mesh(own), _mesh(own.reshape(DP // 4, 4 * TP)), stage)
        parameters = [_part(*tensor) for tensor in tensors]
        plan = plan_of(specs_of(parameters), None, _mesh(ranks[:, row, column]))
        assert plan.is_everybody()
        powers = [p.detach()._local_tensor if isinstance(p, DTensor) else p.detach() for p in parameters]
        powers = torch.tensor([t.double().square().sum().item() for t in powers], dtype=torch.float64)
        total += (plan.weights * powers).sum().item()
        if rank % (DP * TP) == 0:
            exact += sum(value.double().square().sum().item() for value, _, _ in tensors)
    return total, exact


def test_a_thousand_ranks():
    """PP 4 x DP 32 x TP 8: each element counts once."""
    ((total, exact),) = worlds.run(1, _thousand_ranks)
    assert math.isclose(total, exact, rel_tol=1e-12)
