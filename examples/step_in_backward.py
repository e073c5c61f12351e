"""Step inside backward: clip, use and free each gradient as soon as it is complete.

The demo's GPT learns the source of Python's standard library in bfloat16, its updates rounded stochastically, so that
there are no float32 copies, and its gradients clipped by AdaGC, which goes by each tensor alone. Once it clips and
steps after backward, once within. The losses are the same but for the rounding; within, the gradients of the whole
model are never there at the same time.

    python examples/step_in_backward.py
"""

import argparse
import pathlib
from typing import NamedTuple

import torch
from demo import GPT, batch, read_text, smooth
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

import fastclip

LR, BUCKET_BYTES = 1e-3, 64 * 1024


class Run(NamedTuple):
    """What a run measured."""

    losses: list[float]
    clipped: float  # share of the gradients
    gradient_bytes: list[int]  # in the last step, as each gradient was complete, and after the step


class LiveGradients:
    """Adds up the bytes of the gradients that are there, at each moment at which one is complete."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.series: list[int] = []
        self._parameters = parameters
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, _: Tensor | None = None) -> None:
        """Note what there is now."""
        self.series.append(sum(p.grad.nbytes for p in self._parameters if p.grad is not None))


def train(text: Tensor, args: argparse.Namespace, in_backward: bool) -> Run:
    """Train a fresh GPT."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = GPT().to(args.device, torch.bfloat16)
    live = LiveGradients(list(model.parameters()))
    optimizer = fastclip.optim.AdamW(
        model.named_parameters(),
        lr=LR,
        max_norm=fastclip.rules.AdaGC(warmup=0),
        stochastic_rounding=args.seed,
        step_in_backward=in_backward,
        bucket_bytes=BUCKET_BYTES,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    losses, clipped = [], []
    for _ in trange(args.steps, desc="within backward" if in_backward else "after backward", mininterval=0.5):
        live.series.clear()
        rows = batch(text, generator)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        live.look()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        clipped.append((optimizer.stats.coef < 1).float().mean())
    return Run(torch.stack(losses).tolist(), torch.stack(clipped).mean().item(), list(live.series))


def draw(runs: dict[str, Run], path: pathlib.Path) -> None:
    """Save the picture: the loss over the steps, and the gradients that are there during one step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = [{"linewidth": 4, "alpha": 0.35}, {"linewidth": 1.2}]
    for (name, run), style in zip(runs.items(), styles):
        left.plot(range(1, len(run.losses) + 1), smooth(run.losses), label=name, color="tab:blue", **style)
        right.plot([size / 1024 for size in run.gradient_bytes], label=name, color="tab:red", **style)
    left.set(title="Loss", xlabel="step", ylabel="nats per byte")
    right.set(title="Gradients in memory during a step", xlabel="gradients completed", ylabel="KiB", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description="Clip and step inside backward, beside clip, then step.")
    parser.add_argument("--steps", type=int, default=300, help="of each run (300)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("step_in_backward.png"), help="the picture")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and rounding (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    text = read_text(args.device)
    runs = {"clip, then step": train(text, args, False), "step in backward": train(text, args, True)}
    last = max(1, args.steps // 10)
    rows = [
        [name, f"{sum(run.losses[-last:]) / last:.3f}", f"{run.clipped:.1%}", f"{max(run.gradient_bytes) / 1024:,.0f}"]
        for name, run in runs.items()
    ]
    headers = ["run", "final loss", "gradients clipped", "most gradients in memory, KiB"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 3))
    draw(runs, args.out)
    print(f"Picture: {args.out}")
    return runs


if __name__ == "__main__":
    main()
