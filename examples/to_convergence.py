"""Train until nothing improves: weight decay, a learning rate that falls on plateaus, early stopping, clipping.

A small convolutional network learns scikit-learn's handwritten digits. The loss on validation images lowers the
learning rate when it stalls, ends the training when that no longer helps, and says which epoch's weights to keep. The
test images are looked at once, at the end. The picture shows losses and gradient norms together, which is where a limit
for the norm is best read off: above what most steps have, below the largest.

    python examples/to_convergence.py --output to_convergence.png
"""

import argparse
import copy
import pathlib
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

import fastclip

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.1, 0.9, 1e-3
PATIENCE, STOP_AFTER = 5, 15  # epochs without a better validation loss: until the rate falls, until training ends

Part = tuple[Tensor, Tensor]  # images [N, 1, 8, 8] and labels [N]


class Epoch(NamedTuple):
    """What an epoch measured."""

    lr: float
    loss: float  # mean over its batches
    validation: float
    norm: float  # of the gradients before clipping: the median step's
    largest: float
    clipped: float  # share of the steps


class Network(nn.Sequential):
    """Two convolutions and a linear layer: [N, 1, 8, 8] to [N, 10] logits."""

    def __init__(self) -> None:
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def load(seed: int, device: str) -> list[Part]:
    """Three fifths of the digits to train on, a fifth to validate with, a fifth to test with."""
    images, labels = load_digits(return_X_y=True)
    train, rest = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=seed)
    inputs = torch.as_tensor(images / 16, dtype=torch.float32, device=device).view(-1, 1, 8, 8)
    targets = torch.as_tensor(labels, device=device)
    return [(inputs[chosen], targets[chosen]) for chosen in (train, validation, test)]


@torch.no_grad()
def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Mean loss, and the share of images named correctly."""
    images, labels = part
    logits = model(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def train(model: nn.Module, training: Part, validation: Part, max_norm: float, max_epochs: int) -> list[Epoch]:
    """Train to convergence; leaves the model with the weights of the best epoch."""
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.3, patience=PATIENCE)
    clipper = fastclip.Clipper(model.named_parameters(), max_norm)
    images, labels = training
    history: list[Epoch] = []
    best, best_epoch, best_weights = float("inf"), 0, copy.deepcopy(model.state_dict())
    bar = tqdm(range(max_epochs), unit="epoch")
    for epoch in bar:
        losses, stats = [], []
        for chosen in torch.randperm(len(labels)).to(labels.device).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            stats.append(clipper.step(optimizer))
            losses.append(loss.detach())
        # Only here, once an epoch, does the host wait for the device.
        norms = torch.stack([s.total_norm for s in stats])
        clipped = torch.stack([s.clipped for s in stats]).double().mean()
        numbers = (torch.stack(losses).mean(), norms.median(), norms.max(), clipped)
        mean_loss, norm, largest, share = (x.item() for x in numbers)
        now, _ = evaluate(model, validation)
        history.append(Epoch(optimizer.param_groups[0]["lr"], mean_loss, now, norm, largest, share))
        bar.set_postfix_str(f"validation loss {now:.3f}", refresh=False)
        scheduler.step(now)
        if now < best:
            best, best_epoch, best_weights = now, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= STOP_AFTER:
            break
    bar.close()
    model.load_state_dict(best_weights)
    return history


def draw(history: list[Epoch], max_norm: float, path: pathlib.Path) -> None:
    """Save the picture: losses and gradient norms over the epochs."""
    lrs, losses, validation, norms, largest, _ = zip(*history)
    epochs = range(1, len(history) + 1)
    best = validation.index(min(validation)) + 1
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot(epochs, losses, label="training")
    upper.plot(epochs, validation, label="validation")
    lower.plot(epochs, norms, label="median step")
    lower.plot(epochs, largest, linewidth=1, label="largest step")
    lower.axhline(max_norm, color="gray", linestyle=":", label=f"clipped to {max_norm:g}")
    falls = [epoch for epoch, lr, before in zip(epochs[1:], lrs[1:], lrs) if lr < before]
    for axes in (upper, lower):
        axes.axvline(best, color="tab:green", label=f"best epoch, {best}")
        for i, fall in enumerate(falls):
            axes.axvline(fall, color="gray", linewidth=1, label="_" * (i > 0) + "learning rate falls")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    upper.set(title="Digits, to convergence", ylabel="loss")
    lower.set(xlabel="epoch", ylabel="gradient norm before clipping")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> float:
    """Train, print, draw; the accuracy on the test images."""
    parser = argparse.ArgumentParser(description="Train on digits to convergence.")
    parser.add_argument("--max-epochs", type=int, default=200)
    parser.add_argument("--max-norm", type=float, default=1.0, help="the norm to clip to (1)")
    parser.add_argument("--output", type=pathlib.Path, help="where to save a picture of loss and norm, such as a.png")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    training, validation, test = load(args.seed, args.device)
    torch.manual_seed(args.seed)
    model = Network().to(args.device)
    history = train(model, training, validation, args.max_norm, args.max_epochs)
    best = min(range(len(history)), key=lambda i: history[i].validation)
    every = max(1, len(history) // 8)
    shown = sorted({*range(0, len(history), every), best, len(history) - 1})
    headers = ["epoch", "learning rate", "loss", "validation loss", "median norm", "largest norm", "clipped"]
    rows = [[i + 1, *(f"{x:.3g}" for x in history[i][:-1]), f"{history[i].clipped:.0%}"] for i in shown]
    print(tabulate(rows, headers))
    loss, accuracy = evaluate(model, test)
    print(f"Kept epoch {best + 1} of {len(history)}: {accuracy:.1%} of the test images, loss {loss:.3f}")
    if args.output:
        draw(history, args.max_norm, args.output)
        print(f"Picture: {args.output}")
    return accuracy


if __name__ == "__main__":
    main()
