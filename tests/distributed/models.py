"""Parameters that lie on meshes in every way, and what they should give: float64 over the whole tensors."""

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

NORMS = (0.0, 1.0, 2.0, 3.0, math.inf)


def whole(shape, seed, dtype=torch.float32, scale=1.0):
    """The same tensor on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def sharded(value, mesh, placements, gradient=None):
    """A DTensor parameter with this gradient, both cut as `placements` say."""
    p = torch.nn.Parameter(distribute_tensor(value, mesh, placements, src_data_rank=None))
    if gradient is not None:
        p.grad = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
        p.whole_gradient = gradient.double()
    return p


def plain(value, gradient=None):
    p = torch.nn.Parameter(value.clone())
    p.grad = None if gradient is None else gradient.clone()
    return p


def wholes_of(parameters):
    """The gradients as they were cut. (Not by ``full_tensor()``: torch 2.13's is wrong for uneven shards along two
    dimensions of a mesh that has been flattened.)"""
    return [
        p.whole_gradient if hasattr(p, "whole_gradient") else full(p.grad) for p in parameters if p.grad is not None
    ]


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole of a DTensor, float64."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def norm_of(tensors, p):
    """float64, of whole tensors as one vector; of order 0 how many are not all zero."""
    if p == 0:
        return float(sum(bool(t.any()) for t in tensors))
    flat = torch.cat([t.double().flatten() for t in tensors])
    return torch.linalg.vector_norm(flat, p).item()


def close(value, exact, tolerance=1e-6):
    """To the promised relative error, of a float32 norm one rounding more."""
    return abs(float(value) - exact) <= (tolerance + 6e-8) * abs(exact)


def same_bits(value):
    """Assert that a tensor is bitwise the same on all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value.detach().double().reshape(-1).tolist())
    assert all(repr(other) == repr(values[0]) for other in values), values


def raised(function):
    """What it raises, on all ranks: [type and text]."""
    try:
        function()
        text = None
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
        text = f"{type(error).__name__}: {error}"
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def mesh_of(shape, names):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


SHAPES = ((5, 3), (4,), (1, 2), (0, 3), (16, 8), (), (3, 3, 3))  # uneven, empty on some ranks, without elements


def on_mesh(mesh, seed=0, placements=None, dtype=torch.float32):
    """A parameter for each of SHAPES: sharded along dimension 0 on all dimensions of the mesh, where it has one."""
    made = []
    for i, shape in enumerate(SHAPES):
        cut = placements or [Shard(0) if shape else Replicate()] * mesh.ndim
        cut = cut if shape else [Replicate()] * mesh.ndim
        made.append(sharded(whole(shape, seed + i, dtype), mesh, cut, whole(shape, seed + 100 + i, dtype)))
    return made
