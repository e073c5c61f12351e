"""Tensor parallelism and FSDP2 on one 2-D mesh: some parameters are cut both ways, some one way, and all count once.

The linear layers of each block are cut over "tp", and everything over "dp"; the layer norms are whole on each rank of
"tp". torch.nn.utils.clip_grad_norm_ refuses such a mixture; here it is the usual line. The losses are those of one
process.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py     # dp 1 x tp 2; with 4 processes dp 2 x tp 2
    python examples/tensor_parallel.py                          # the same in one process
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import fastclip


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)

    kind, size = "cuda" if torch.cuda.is_available() else "cpu", dist.get_world_size()
    tp = 2 if size % 2 == 0 else 1
    mesh = init_device_mesh(kind, (size // tp, tp), mesh_dim_names=("dp", "tp"))
    dp_rank, dp_size = mesh.get_local_rank("dp"), size // tp
    images, labels = (torch.from_numpy(a).to(kind) for a in load_digits(return_X_y=True))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), Block(48), Block(48), nn.LayerNorm(48), nn.Linear(48, 10)).to(kind)
    for block in (model[1], model[2]):
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    torch.manual_seed(1)
    losses = []
    for rows in torch.randint(len(images), (args.steps, 64)):
        x, y = (part.chunk(dp_size)[dp_rank] for part in (images[rows].float() / 16, labels[rows]))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm = fastclip.clip_norm_(model.parameters(), 1.0)  # one number, the same on all ranks
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / size)
        losses.append(mean.item())
    if dist.get_rank() == 0:
        shape = "x".join(map(str, mesh.shape))
        print(f"mesh {shape}: loss {losses[0]:.6f} -> {losses[-1]:.6f}, norm {norm.item():.4f}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not under torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    main()
    dist.destroy_process_group()
