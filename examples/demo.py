"""Train a small GPT three times from the same start: without clipping, with torch's clipping, with fastclip's.

The text is the source of Python's standard library, byte by byte. At this learning rate the unclipped run is thrown off
course in its first steps; the two clipped runs learn, and agree with each other. A picture and a table tell the story.
"""

import argparse
import os
import pathlib
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastclip

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 64, 8
MOMENTUM = 0.9

Clip = Callable[[list[nn.Parameter], float], Tensor]
CLIPS: dict[str, Clip | None] = {
    "unclipped": None,
    "torch": nn.utils.clip_grad_norm_,
    "fastclip": fastclip.clip_norm_,
}
# torch's line is thick and pale, so that it shows behind fastclip's.
STYLES = {
    "unclipped": {"color": "tab:red", "linewidth": 1},
    "torch": {"color": "tab:blue", "linewidth": 4, "alpha": 0.35},
    "fastclip": {"color": "tab:blue", "linewidth": 1, "linestyle": "--"},
}


class Block(nn.Module):
    """Causal attention, then an MLP, each normalised before and added after."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, WIDTH] to the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A byte-level GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        nn.init.normal_(self.token.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, CONTEXT] bytes to the [B, CONTEXT, 256] logits of the bytes that follow."""
        return self.head(self.norm(self.blocks(self.token(x) + self.position.weight)))


class Step(NamedTuple):
    """What one step of training measured."""

    loss: float
    norm: float  # of the gradients before clipping
    clip_seconds: float
    seconds: float


@dataclass
class Run:
    """One training run, as far as it got."""

    name: str
    steps: list[Step] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def norms(self) -> list[float]:
        """The gradient norm of each step, before clipping."""
        return [step.norm for step in self.steps]


def read_text(device: str) -> Tensor:
    """The bytes of the standard library's top-level source files, one after the other."""
    text = bytearray()
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            text += path.read_bytes()
        except OSError:
            continue
    if len(text) <= CONTEXT:
        sys.exit("This Python has no source files of its standard library to train on.")
    return torch.frombuffer(text, dtype=torch.uint8).to(device)


def now() -> float:
    """The time in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    """[BATCH, CONTEXT + 1] bytes from random places of the text."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    return text[(starts + torch.arange(CONTEXT + 1)).to(text.device)].long()


def backward(model: GPT, rows: Tensor) -> float:
    """Leave the gradients of the loss on these rows in the model; the loss."""
    model.zero_grad()
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    return loss.item()


def warm_up(text: Tensor) -> None:
    """Call each clip once: the first call of fastclip's ever compiles its C++ backend, which is not to be timed."""
    model = GPT().to(text.device)
    backward(model, batch(text, torch.Generator()))
    for clip in CLIPS.values():
        if clip:
            clip(list(model.parameters()), 1.0)


def train(run: Run, clip: Clip | None, text: Tensor, args: argparse.Namespace, bar: tqdm) -> None:
    """Train a fresh model, adding each step to the run as it is done."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = GPT().to(text.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=MOMENTUM)
    bar.set_description(run.name)
    for _ in range(args.steps):
        start = now()
        loss = backward(model, batch(text, generator))
        before = now()
        norm = clip(parameters, args.max_norm) if clip else None
        after = now()
        optimizer.step()
        end = now()
        if norm is None:
            norm = fastclip.total_norm([p.grad for p in parameters])
        run.steps.append(Step(loss, norm.item(), after - before, end - start))
        bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        bar.update()


def train_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Train once with each clip, adding each run to the list as it begins."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = read_text(device)
    size, amount = sum(p.numel() for p in GPT().parameters()) / 1e6, len(text) / 1e6
    print(f"A GPT of {size:.1f}M parameters learns {amount:.1f} MB of Python's own source on {device}, three times:")
    print(f"same start, same batches, SGD at learning rate {args.lr:g}, gradients clipped to norm {args.max_norm:g}.")
    sys.stdout.flush()
    warm_up(text)
    with tqdm(total=len(CLIPS) * args.steps, unit="step", mininterval=0.5) as bar:
        for name, clip in CLIPS.items():
            runs.append(Run(name))
            train(runs[-1], clip, text, args, bar)


def label(run: Run, steps: int) -> str:
    """The run's name, and how far it got if not to the end."""
    return run.name if len(run.steps) == steps else f"{run.name} ({len(run.steps)} of {steps} steps)"


def row(run: Run, steps: int) -> list[str]:
    """The run's row of the table."""
    last = run.losses[-max(1, len(run.steps) // 10) :]
    cells = [label(run, steps), f"{statistics.fmean(last):.3f}", f"{max(run.norms):.1f}"]
    if CLIPS[run.name] is None:
        return [*cells, "-", "-"]
    clip_seconds = statistics.median(step.clip_seconds for step in run.steps)
    seconds = statistics.median(step.seconds for step in run.steps)
    return [*cells, f"{clip_seconds * 1e3:.2f} ms", f"{clip_seconds / seconds:.1%}"]


def difference(runs: list[Run]) -> str | None:
    """How far the losses of torch and fastclip are apart, in words, if both ran."""
    losses = {run.name: run.losses for run in runs}
    if "fastclip" not in losses:
        return None
    pairs = list(zip(losses["torch"], losses["fastclip"]))
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    return f"Losses with torch and with fastclip differ by {worst:.1e} of their value at most, over {len(pairs)} steps."


def smooth(values: list[float]) -> list[float]:
    """At each step the mean over the last twentieth of the steps so far."""
    return [statistics.fmean(values[i - i // 20 : i + 1]) for i in range(len(values))]


def draw(runs: list[Run], args: argparse.Namespace) -> None:
    """Save the picture: loss and gradient norm over the steps."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for run in runs:
        steps = range(1, len(run.steps) + 1)
        upper.plot(steps, smooth(run.losses), label=label(run, args.steps), **STYLES[run.name])
        lower.plot(steps, smooth(run.norms), **STYLES[run.name])
    lower.axhline(args.max_norm, color="gray", linestyle=":", label=f"clipped to {args.max_norm:g}")
    # The unclipped run goes wrong within the first few of many steps, so the steps are on a log scale.
    upper.set(title=f"One GPT, same start, same batches: SGD, learning rate {args.lr:g}", ylabel="loss", xscale="log")
    upper.set_ylim(0, min(upper.get_ylim()[1], 2 * runs[0].losses[0]))  # a run that explodes leaves the frame
    lower.set(
        xlabel="step (the curves are means over the last twentieth of the steps so far)",
        ylabel="gradient norm before clipping",
        yscale="log",
    )
    for axes in (upper, lower):
        axes.legend()
        axes.grid(alpha=0.3)
    lower.xaxis.set_major_formatter("{x:.0f}")
    figure.savefig(args.out, dpi=120)


def report(runs: list[Run], args: argparse.Namespace) -> None:
    """Print the table and save the picture."""
    headers = ["run", "final loss", "largest gradient norm", "median clip time", "share of step time"]
    rows = [row(run, args.steps) for run in runs]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 4))
    if line := difference(runs):
        print(line)
    draw(runs, args)
    print(f"Picture: {args.out}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, refused now rather than after the training."""
    parser = argparse.ArgumentParser(description="Train a small GPT unclipped, clipped by torch, clipped by fastclip.")
    parser.add_argument("--steps", type=int, default=1200, help="steps of each run (1200)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo.png"), help="the picture (demo.png)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (0)")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate (0.2)")
    parser.add_argument("--max-norm", type=float, default=0.15, help="the norm to clip to (0.15)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if not args.max_norm > 0:
        parser.error("--max-norm must be above 0")
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error("--out must end in .png, .pdf or .svg")
    if not os.access(args.out.parent, os.W_OK):
        parser.error(f"--out: cannot write to the folder {args.out.parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0, or 130 if it was interrupted."""
    args, runs, code = arguments(argv), [], 0
    try:
        train_all(runs, args)
    except KeyboardInterrupt:
        code = 130
    runs = [run for run in runs if run.steps]
    if not runs:
        print("Stopped before the first step.")
        return code
    try:
        report(runs, args)
    except KeyboardInterrupt:
        print("Stopped before the picture was saved.")
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
