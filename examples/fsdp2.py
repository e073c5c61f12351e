"""FSDP2 with the clip inside the optimizer's step, saved on these ranks and loaded on as many as you like.

A small network learns handwritten digits, its parameters cut over all ranks. Half way, model, optimizer and what the
clipping rule remembers go through a checkpoint of torch.distributed.checkpoint. The losses are those of one process.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    python examples/fsdp2.py                            # the same in one process
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import fastclip


def make(mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose parameters are cut over the ranks of `mesh`, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))
    model.to(mesh.device_type)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # A rule that remembers: the spikes that stand out from the norms so far are clipped, after ten steps of warm-up.
    optimizer = fastclip.optim.AdamW(model.named_parameters(), lr=3e-3, max_norm=fastclip.rules.ZClip(warmup=10))
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    rank, size = dist.get_rank(), dist.get_world_size()
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.chunk(size)[rank]), labels.chunk(size)[rank])  # each rank its part
        loss.backward()  # FSDP takes the mean of the gradients
        optimizer.step()  # clips by the norm of the whole model: one message of a few numbers
        dist.all_reduce(mean := loss.detach() / size)
        losses.append(mean.item())
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", help="where the checkpoint goes; by default a temporary folder")
    args = parser.parse_args(argv)

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp",))
    images, labels = (torch.from_numpy(a).to(kind) for a in load_digits(return_X_y=True))
    torch.manual_seed(1)
    picks = torch.randint(len(images), (args.steps, 64))
    batches = [(images[rows].float() / 16, labels[rows]) for rows in picks]

    model, optimizer = make(mesh)
    losses = train(model, optimizer, batches[: args.steps // 2])
    with tempfile.TemporaryDirectory() as temporary:
        folder = [args.folder or temporary]
        dist.broadcast_object_list(folder)  # that of rank 0
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.save(states, checkpoint_id=folder[0])

        model, optimizer = make(mesh)  # as a later job, on other machines, would
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(states, checkpoint_id=folder[0])
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        dist.barrier()
    losses += train(model, optimizer, batches[args.steps // 2 :])
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} rank(s): loss {losses[0]:.6f} -> {losses[-1]:.6f}, {optimizer.stats}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not under torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    main()
    dist.destroy_process_group()
