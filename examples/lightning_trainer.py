"""Lightning's Trainer, three times from the same start: with its own clip, and with fastclip inside the step.

A small convolutional network learns scikit-learn's handwritten digits. `ClipCallback(0.5)` takes the place of
`Trainer(gradient_clip_val=0.5)`: the losses are the same. The third run, in bfloat16 with a fused optimizer (which
Lightning's own clip refuses), clips by a rule that finds its own limit, and a monitor records its losses and norms.

    pip install '.[demo]' lightning
    python examples/lightning_trainer.py
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastclip
from fastclip.integrations.lightning import ClipCallback

MAX_NORM = 0.5


class Digits(lightning.LightningModule):
    """Learns 8 × 8 images of digits; keeps the loss of each step."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip
        self.fused = fused
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.body(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=self.fused)


def train(args: argparse.Namespace, fused: bool = False, **options: object) -> Digits:
    """Train a fresh model, which is the same each time."""
    lightning.seed_everything(args.seed, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))
    module = Digits(fused)
    trainer = lightning.Trainer(
        max_steps=args.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    return module


def main(argv: list[str] | None = None) -> dict[str, Digits]:
    """Train, compare, and return the trained modules."""
    parser = argparse.ArgumentParser(description="fastclip in Lightning's Trainer.")
    parser.add_argument("--steps", type=int, default=80, help="of each run (80)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument(
        "--record", type=Path, default=Path("lightning.jsonl"), help="of the third run (lightning.jsonl)"
    )
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    args.record.unlink(missing_ok=True)
    with fastclip.monitor.GradMonitor(args.record) as monitor:
        modules = {
            f"Trainer(gradient_clip_val={MAX_NORM})": train(args, gradient_clip_val=MAX_NORM),
            f"ClipCallback({MAX_NORM})": train(args, callbacks=[ClipCallback(MAX_NORM)]),
            "ClipCallback(ZClip()), bf16-mixed, fused": train(
                args, fused=True, precision="bf16-mixed", callbacks=[ClipCallback(fastclip.rules.ZClip(), monitor)]
            ),
        }
        clip_rate = monitor.clip_rate

    rows = [[name, sum(module.losses[-20:]) / len(module.losses[-20:])] for name, module in modules.items()]
    print(tabulate(rows, ["run", "final loss"], floatfmt=".4f"))
    own, ours = (torch.tensor(module.losses) for module in list(modules.values())[:2])
    print(f"\nLargest difference of the losses with and without fastclip: {(ours - own).abs().max():.0e}")
    print(f"ZClip clipped {clip_rate:.0%} of the steps. To see them: python -m fastclip plot {args.record}")
    return modules


if __name__ == "__main__":
    main()
