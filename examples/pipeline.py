"""Pipeline parallelism: two stages hold different layers and share an embedding, and the norm is that of all of it.

A byte-level language model reads the source of Python's standard library. The first stage embeds the bytes; the last
one scores them with the same matrix, of which each stage has a copy: its gradients are summed over the two, and
`mark_shared` says that it counts once. Other parameters differ from stage to stage, so the clip is given the group of
the stages. With one process the same model is trained without a schedule; the losses are the same.

    torchrun --nproc-per-node 2 examples/pipeline.py
    python examples/pipeline.py                         # the same in one process
"""

import argparse
import os
import pathlib
import sysconfig

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional as F

import fastclip

WIDTH, CONTEXT, ROWS, PARTS = 48, 24, 16, 4


class Embed(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight)


class Score(Embed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Mix(nn.Module):
    """Each position with a running mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(2 * WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        y = self.norm(x)
        return x + self.down(F.gelu(self.up(torch.cat([y, y.cumsum(1) / count], -1))))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)

    stage, stages = dist.get_rank(), dist.get_world_size()
    if stages > 2:
        raise SystemExit("this example has two stages: run it with 1 or 2 processes")
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    weight = nn.Parameter(0.1 * torch.randn(256, WIDTH))
    layers = [Embed(weight), Mix(), Mix(), Score(weight)]
    own = layers if stages == 1 else layers[:2] if stage == 0 else layers[2:]
    model = nn.Sequential(*own).to(device)
    weight = (model[0] if stage == 0 else model[-1]).weight

    group = None
    if stages > 1:
        group = dist.group.WORLD  # of the ranks that hold the other stages
        fastclip.distributed.mark_shared([weight], group)
        pipe = PipelineStage(model, stage, stages, device)
        schedule = ScheduleGPipe(pipe, PARTS, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    clipper = fastclip.Clipper(model.parameters(), 0.5, process_group=group)

    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    torch.manual_seed(1)
    starts = torch.randint(len(text) - CONTEXT, (args.steps, ROWS, 1))
    losses = []
    for rows in text[starts + torch.arange(CONTEXT + 1)].long().to(device):
        x, targets = rows[:, :-1], rows[:, 1:]
        optimizer.zero_grad()
        if stages == 1:
            loss = loss_of(model(x), targets)
            loss.backward()
        else:
            parts: list[Tensor] = []
            schedule.step(x) if stage == 0 else schedule.step(target=targets, losses=parts)
            loss = torch.stack(parts).mean() if parts else torch.zeros((), device=device)
            dist.all_reduce(weight.grad)  # the copies of the embedding take the same step
            dist.all_reduce(loss)
        stats = clipper.step(optimizer)
        losses.append(loss.item())
    if stage == 0:
        print(f"{stages} stage(s): loss {losses[0]:.6f} -> {losses[-1]:.6f}, norm {stats.total_norm.item():.4f}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not under torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29513"}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    main()
    dist.destroy_process_group()
