"""Watch how rules take a bad day: the same training, with one broken batch and one batch of NaN, under each of them.

A network learns scikit-learn's handwritten digits by SGD with momentum. One batch comes with its images 30 times too
bright and its labels shuffled, as after a bug in the loader; a later one holds a NaN. Every run is watched by a
GradMonitor, which writes a record while it trains and warns of what it sees; the picture puts the runs side by side.

    python examples/watch_training.py --folder watch
    python -m fastclip plot watch/ZClip.jsonl
"""

import argparse
import math
import pathlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastclip
from fastclip import rules

BATCH, LR, MOMENTUM = 64, 0.1, 0.9
RUNS = {  # what is done to the gradients, and about those that are not finite
    "unclipped": (lambda: rules.GlobalNorm(math.inf), "propagate"),
    "GlobalNorm": (lambda: rules.GlobalNorm(1.0), "skip"),
    "AGC": (lambda: rules.AGC(0.05), "zero"),
    "AutoClip": (lambda: rules.AutoClip(50), "skip"),
    "ZClip": (lambda: rules.ZClip(), "skip"),
    "AdaGC": (lambda: rules.AdaGC(warmup=50), "zero"),
}


class Run(NamedTuple):
    """What S steps were like."""

    validation: list[float]  # loss on the test images after each step
    norms: list[float]  # of the gradients as they came
    clipped: list[float]  # and as they were used
    skips: int
    accuracy: float  # on the test images, in the end
    warnings: list[str]


def load(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 64] and labels [N] to train on, then as many to test with."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.5, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = (torch.as_tensor(part, device=device) for part in split)
    return train_images.float(), train_labels, test_images.float(), test_labels


def batches(
    images: Tensor, labels: Tensor, steps: int, spike: int, nan: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, of which number `spike` is broken and number `nan` holds a NaN."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator).to(labels.device)
        x, y = images[chosen], labels[chosen]
        if step == spike:
            x, y = 30 * x, y.roll(1)
        if step == nan:
            x[0, 0] = math.nan
        yield x, y


def train(name: str, steps: int, spike: int, nan: int, seed: int, device: str, record: pathlib.Path) -> Run:
    """One run under the rule of that name, watched and written down."""
    train_images, train_labels, test_images, test_labels = load(seed, device)
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    rule, policy = RUNS[name]
    clipper = fastclip.Clipper(model.named_parameters(), rule(), nonfinite=policy)
    validation, norms, clipped = [], [], []
    record.unlink(missing_ok=True)
    with warnings.catch_warnings(), fastclip.monitor.GradMonitor(record, adam_eps=None) as monitor:
        warnings.simplefilter("ignore", fastclip.monitor.GradientWarning)  # all of them are in the table below
        given = batches(train_images, train_labels, steps, spike, nan, seed)
        for x, y in tqdm(given, total=steps, desc=name, unit="step", leave=False):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            stats = clipper.step(optimizer)
            monitor.update(stats, loss)
            norms.append(stats.total_norm)
            used = fastclip.total_norm([p.grad for p in model.parameters()])
            clipped.append(torch.where(stats.skipped, math.nan, used))
            with torch.no_grad():
                validation.append(F.cross_entropy(model(test_images), test_labels))
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).double().mean().item()
    said = [f"step {step}: {message}" for step, _, message in monitor.warnings]
    numbers = (torch.stack(column).tolist() for column in (validation, norms, clipped))
    return Run(*numbers, monitor.skips, accuracy, said)


def draw(runs: dict[str, Run], spike: int, nan: int, path: pathlib.Path) -> None:
    """Save the picture: the loss of all runs, and the norms of each before and after."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[1.3, 1, 1])
    top = figure.add_subplot(grid[0, :])
    for name, run in runs.items():
        style = {"color": "gray", "linestyle": ":"} if name == "unclipped" else {}
        top.plot(run.validation, label=f"{name}, {run.accuracy:.1%}", **style)
    top.set(title="Loss on the test images, and accuracy in the end", xlabel="step", yscale="log")
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    shared = None
    for i, (name, run) in enumerate(runs.items()):
        axes = figure.add_subplot(grid[1 + i // 3, i % 3], sharex=shared, sharey=shared)
        shared = axes
        axes.plot(run.norms, color="#edae49", linewidth=1, label="as it came")
        axes.plot(run.clipped, color="#00798c", linewidth=1.2, label="as it was used")
        axes.set(title=f"{name}: {run.skips} skipped", yscale="log")
        if i % 3 == 0:
            axes.set_ylabel("gradient norm")
    axes.legend(loc="lower left")
    for axes in figure.axes:
        for step, label in ((spike, "broken"), (nan, "NaN")):
            axes.axvline(step, color="#d1495b", linewidth=1, linestyle="--", zorder=0)
            axes.annotate(
                label, (step, 1), (2, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                va="top", color="#d1495b", fontsize=8,
            )  # fmt: skip
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """Train under each rule, print what the monitors said, draw."""
    parser = argparse.ArgumentParser(description="Train on digits with a broken batch and a NaN, under several rules.")
    parser.add_argument("--steps", type=int, default=300, help="of each run (300)")
    parser.add_argument("--spike", type=int, help="the step of the broken batch (in the middle)")
    parser.add_argument("--nan", type=int, help="the step of the batch with a NaN (after three quarters)")
    parser.add_argument("--rules", nargs="+", choices=RUNS, default=list(RUNS), help="which runs (all)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("watch"), help="for what is written (watch)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    spike = args.steps // 2 if args.spike is None else args.spike
    nan = args.steps * 3 // 4 if args.nan is None else args.nan
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = {
        name: train(name, args.steps, spike, nan, args.seed, args.device, args.folder / f"{name}.jsonl")
        for name in args.rules
    }
    rows = [[name, f"{r.accuracy:.1%}", f"{r.validation[spike]:.2f}", r.skips] for name, r in runs.items()]
    print(tabulate(rows, ["rule", "accuracy", "loss after the broken batch", "steps skipped"]), end="\n\n")
    for name, run in runs.items():
        for said in run.warnings:
            print(f"{name}, {said}")
    picture = args.folder / "watch.png"
    draw(runs, spike, nan, picture)
    print(f"\nPicture: {picture}; of one run: python -m fastclip plot {args.folder / args.rules[-1]}.jsonl")
    return runs


if __name__ == "__main__":
    main()
