"""Train steadily: clipped gradients, a learning rate that warms up and decays, averaged weights, averaged networks.

A few small networks learn half of scikit-learn's handwritten digits and are tested on the other half. The weights of
each are averaged over the second half of its training; the ensemble's probabilities are the mean of its members'.

    python examples/steady_training.py
"""

import argparse
import math
import statistics
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import fastclip

BATCH, LR, MAX_NORM = 64, 2e-2, 0.5


class Member(NamedTuple):
    """A trained network, and what its S steps measured."""

    last: nn.Module  # with the weights of the last step
    averaged: nn.Module
    norms: Tensor  # [S] of the gradients before clipping
    clipped: Tensor  # [S] bool


class Scores(NamedTuple):
    """On the test images: the share named correctly, and the mean of -log p of the right digit."""

    last_accuracy: float
    last_loss: float
    averaged_accuracy: float
    averaged_loss: float


def load(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 64] and labels [N] to train on, then as many to test with."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.5, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = (torch.as_tensor(part, device=device) for part in split)
    return train_images.float(), train_labels, test_images.float(), test_labels


def train(images: Tensor, labels: Tensor, epochs: int, seed: int, bar: tqdm) -> Member:
    """Train one network; the seed makes it differ from the others."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model.to(images.device)
    averaged = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
    steps = epochs * math.ceil(len(labels) / BATCH)
    warmup = max(1, steps // 10)
    # The rate does not fall to 0: averaging gains nothing from weights that no longer move.
    phases = [LinearLR(optimizer, 0.01, total_iters=warmup), CosineAnnealingLR(optimizer, steps - warmup, 0.3 * LR)]
    scheduler = SequentialLR(optimizer, phases, [warmup])
    clipper = fastclip.Clipper(model.named_parameters(), MAX_NORM)
    stats = []
    for epoch in range(epochs):
        for chosen in torch.randperm(len(labels)).to(labels.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            stats.append(clipper.step(optimizer))
            scheduler.step()
        if epoch >= epochs // 2:
            averaged.update_parameters(model)
        bar.update()
    norms = torch.stack([s.total_norm for s in stats])
    return Member(model, averaged, norms.cpu(), torch.stack([s.clipped for s in stats]).cpu())


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """[N, 10] for images [N, 64]."""
    return model(images).double().softmax(1)


def score(last: Tensor, averaged: Tensor, labels: Tensor) -> Scores:
    """What the probabilities [N, 10] of the last and of the averaged weights are worth."""
    both = [((p.argmax(1) == labels).double().mean(), F.nll_loss(p.log(), labels)) for p in (last, averaged)]
    return Scores(*(number.item() for pair in both for number in pair))


def main(argv: list[str] | None = None) -> tuple[Scores, Scores]:
    """Train the members and compare; the mean of their scores, and the scores of the ensemble."""
    parser = argparse.ArgumentParser(description="Train an averaged ensemble on digits.")
    parser.add_argument("--epochs", type=int, default=30, help="of each member (30)")
    parser.add_argument("--members", type=int, default=5, help="of the ensemble (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the first member (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    train_images, train_labels, test_images, test_labels = load(args.seed, args.device)
    seeds = range(args.seed, args.seed + args.members)
    with tqdm(total=args.members * args.epochs, unit="epoch") as bar:
        members = [train(train_images, train_labels, args.epochs, seed, bar) for seed in seeds]

    last = torch.stack([probabilities(member.last, test_images) for member in members])
    averaged = torch.stack([probabilities(member.averaged, test_images) for member in members])
    scores = [score(*pair, test_labels) for pair in zip(last, averaged)]
    mean = Scores(*map(statistics.fmean, zip(*scores)))
    ensemble = score(last.mean(0), averaged.mean(0), test_labels)

    rows = [
        [f"seed {seed}", *numbers, member.norms.median().item(), member.clipped.double().mean().item()]
        for seed, numbers, member in zip(seeds, scores, members)
    ]
    rows += [["mean", *mean], ["ensemble", *ensemble]]
    headers = ["", "accuracy", "loss", "accuracy,\naveraged", "loss,\naveraged", "median\nnorm", "steps\nclipped"]
    print(tabulate(rows, headers, floatfmt=("", ".2%", ".4f", ".2%", ".4f", ".3f", ".0%")))
    print(f"The averaged ensemble names {ensemble.averaged_accuracy:.1%} of the test images.")
    return mean, ensemble


if __name__ == "__main__":
    main()
