"""Train by thresholds: step only where the loss is high, drop negligible gradients, limit large ones.

A small network learns scikit-learn's handwritten digits, once with three thresholds and once without. At each step:

- a parameter whose largest gradient is below --mask gets a gradient of zero;
- a parameter whose gradient has a norm above --limit gets it scaled down to that;
- the optimizer steps if the loss of the batch is above --loss.

All three are decided on the device, and nothing is read before the end of an epoch. With --freeze, a parameter whose
gradient was zeroed stays exactly as it is, momentum and weight decay or not; which ones is read at each step.

    python examples/threshold_training.py
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import fastclip
from fastclip.rules import Mask, Rule, TensorNorm

BATCH, LR = 64, 2e-3


class Done(NamedTuple):
    """What was done in S steps with T gradients."""

    losses: Tensor  # [S]
    skipped: Tensor  # [S] bool
    masked: Tensor  # [S, T] bool
    clipped: Tensor  # [S, T] bool


class Learner:
    """A network, its optimizer and its clipper."""

    def __init__(self, threshold: float, rules: list[Rule], seed: int, device: str) -> None:
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, fused=True)
        self.clipper = fastclip.Clipper(self.model.named_parameters(), rules)
        self.threshold = threshold

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Done:
        """Learn from each of the batches, unless its loss is low."""
        losses, stats = [], []
        for images, labels in batches:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            stats.append(self.clipper.step(self.optimizer, when=loss > self.threshold))
            losses.append(loss.detach())
        skipped = torch.stack([s.skipped for s in stats])
        coef = torch.stack([s.coef for s in stats]).where(~skipped[:, None], 1.0)
        return Done(torch.stack(losses).cpu(), skipped.cpu(), (coef == 0).cpu(), ((coef > 0) & (coef < 1)).cpu())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of the images that the network names correctly."""
        return (self.model(images).argmax(1) == labels).double().mean().item()


def load(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 64] and labels [N] to train on, then as many to test with."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.5, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = (torch.as_tensor(part, device=device) for part in split)
    return train_images.float(), train_labels, test_images.float(), test_labels


def shuffled(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a random order."""
    for chosen in torch.randperm(len(labels)).to(labels.device).split(BATCH):
        yield images[chosen], labels[chosen]


def joined(epochs: list[Done]) -> Done:
    """What was done in all of them."""
    return Done(*map(torch.cat, zip(*epochs)))


def report(epochs: list[Done], names: tuple[str, ...]) -> None:
    """Print what was done, over time and by parameter."""
    every = max(1, len(epochs) // 8)
    rows = []
    for start in range(0, len(epochs), every):
        losses, *others = joined(epochs[start : start + every])
        rows.append([start + every, f"{losses.mean():.3f}", *(f"{x.double().mean():.0%}" for x in others)])
    print(tabulate(rows, ["up to epoch", "loss", "steps skipped", "gradients masked", "gradients clipped"]), end="\n\n")
    by_parameter = (x.double().mean(0).tolist() for x in joined(epochs)[2:])
    rows = [[name, f"{masked:.0%}", f"{clipped:.0%}"] for name, masked, clipped in zip(names, *by_parameter)]
    print(tabulate(rows, ["parameter", "masked", "clipped"]), end="\n\n")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with the thresholds and without; the accuracy of each on the test images."""
    parser = argparse.ArgumentParser(description="Train on digits by thresholds.")
    parser.add_argument("--epochs", type=int, default=40, help="of each run (40)")
    parser.add_argument("--loss", type=float, default=0.02, help="step only above this loss (0.02)")
    parser.add_argument("--mask", type=float, default=5e-3, help="zero gradients below this throughout (5e-3)")
    parser.add_argument("--limit", type=float, default=0.3, help="of the norm of each gradient (0.3)")
    parser.add_argument("--freeze", action="store_true", help="leave parameters alone whose gradients are zeroed")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    train_images, train_labels, test_images, test_labels = load(args.seed, args.device)
    rules = [Mask(args.mask, freeze=args.freeze), TensorNorm(args.limit)]
    runs = {"with thresholds": (args.loss, rules), "without": (0.0, [TensorNorm(math.inf)])}
    accuracies = {}
    for name, (threshold, rules) in runs.items():
        learner = Learner(threshold, rules, args.seed, args.device)
        bar = trange(args.epochs, desc=name, unit="epoch")
        epochs = [learner.train(shuffled(train_images, train_labels)) for _ in bar]
        if name == "with thresholds":
            report(epochs, learner.clipper.names)
        accuracies[name] = learner.accuracy(test_images, test_labels)
        skipped = joined(epochs).skipped
        print(f"{name}: {accuracies[name]:.1%} of the test images after {(~skipped).sum()} steps of {len(skipped)}")
    return accuracies


if __name__ == "__main__":
    main()
