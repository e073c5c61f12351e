"""A mixture of experts: dense layers on one mesh, experts on another, one norm in which each parameter counts once.

The dense layers are cut over all ranks by FSDP2. Of the experts, each rank of "ep" has its own; ranks of "edp" have
copies. Their gradients live on different meshes, which torch.nn.utils.clip_grad_norm_ does not take together; here it
is one line and one message. The losses are those of one process.

    torchrun --nproc-per-node 2 examples/experts.py     # ep 2; with 4 processes edp 2 x ep 2
    python examples/experts.py                          # the same in one process
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import fastclip

WIDTH, EXPERTS = 32, 4


class Experts(nn.Module):
    """Each token goes to all experts, weighted by a router: every rank computes its experts for everybody's tokens."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        up, down = torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / 8, torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / 8
        place = [Replicate(), Shard(0)]
        self.up = nn.Parameter(distribute_tensor(up.to(mesh.device_type), mesh, place))
        self.down = nn.Parameter(distribute_tensor(down.to(mesh.device_type), mesh, place))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """[B, WIDTH] tokens and their [B, EXPERTS] shares of each expert."""
        ep = self.mesh["ep"]
        x, shares = (DTensor.from_local(t, ep, [Shard(0)]).redistribute(ep, [Replicate()]) for t in (x, shares))
        shares = shares.redistribute(ep, [Shard(1)]).to_local()  # of this rank's experts
        x, up, down = x.to_local(grad_placements=[Partial()]), self.up.to_local(), self.down.to_local()
        outputs = torch.einsum("ebw,ewh,be->bh", F.gelu(torch.einsum("bh,ehw->ebw", x, up)), down, shares)
        return DTensor.from_local(outputs, ep, [Partial()]).redistribute(ep, [Shard(0)]).to_local()

    def average_gradients(self) -> None:
        """From the gradients of a sum of losses, each of a part of the batch, to those of their mean."""
        for p in (self.up, self.down):
            gradient = p.grad.to_local()
            gradient /= dist.get_world_size()
            dist.all_reduce(gradient, group=self.mesh.get_group("edp"))


class Model(nn.Module):
    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.enter, self.router, self.leave = nn.Linear(64, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 10)
        self.experts = Experts(mesh)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.experts(x, self.router(x).softmax(-1)))


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)

    kind, size, rank = "cuda" if torch.cuda.is_available() else "cpu", dist.get_world_size(), dist.get_rank()
    ep = 2 if size % 2 == 0 else 1
    dense = init_device_mesh(kind, (size,), mesh_dim_names=("dp",))
    expert = init_device_mesh(kind, (size // ep, ep), mesh_dim_names=("edp", "ep"))
    images, labels = (torch.from_numpy(a).to(kind) for a in load_digits(return_X_y=True))

    torch.manual_seed(0)
    model = Model(expert).to(kind)
    fully_shard(model, mesh=dense, ignored_params=set(model.experts.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    torch.manual_seed(1)
    losses = []
    for rows in torch.randint(len(images), (args.steps, 64)):
        x, y = (part.chunk(size)[rank] for part in (images[rows].float() / 16, labels[rows]))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        model.experts.average_gradients()
        norm = fastclip.clip_norm_(model.parameters(), 1.0)
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / size)
        losses.append(mean.item())
    if rank == 0:
        print(f"ep {ep} of {size} rank(s): loss {losses[0]:.6f} -> {losses[-1]:.6f}, norm {norm.item():.4f}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not under torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29514"}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    main()
    dist.destroy_process_group()
