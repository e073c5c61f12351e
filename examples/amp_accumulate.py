"""Accumulate the gradients of several float16 batches, then step once: unscaled, divided and clipped.

A GRU learns the source of Python's standard library, byte by byte, three times from the same start: in float16 under a
GradScaler with each batch cut into --parts, the same in float32, and in float32 with whole batches. The loss curves are
the same to within rounding. The scale doubles every few steps until a gradient overflows; then the scaler leaves that
step out and halves the scale. The float32 runs leave out the same steps, so as to be comparable.

    python examples/amp_accumulate.py
"""

import argparse
import pathlib
import sysconfig
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import fastclip

WIDTH, CONTEXT, ROWS = 64, 32, 32
LR, MAX_NORM = 1e-2, 0.25


class GRU(nn.Module):
    """Reads bytes, and after each says which comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] bytes to the [B, T, 256] logits of the bytes that follow."""
        return self.head(self.gru(self.embedding(x))[0])


class Run(NamedTuple):
    """What a run measured at each of its S steps."""

    losses: Tensor  # [S]
    norms: Tensor  # [S] of the gradients, unscaled and divided, before clipping
    clipped: Tensor  # [S] bool
    skipped: Tensor  # [S] bool
    scales: list[float]  # every few steps


def read_text() -> Tensor:
    """The bytes of the standard library's top-level source files, one after the other."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def train(text: Tensor, args: argparse.Namespace, dtype: torch.dtype, parts: int, skip: Tensor | None = None) -> Run:
    """Train a fresh GRU with each batch cut into `parts`; `skip` ([S] bool): the steps to leave out."""
    torch.manual_seed(args.seed)
    model = GRU().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    clipper = fastclip.Clipper(model.named_parameters(), MAX_NORM)
    # The scale doubles this often for show; by default it does every 2000 steps.
    scaler = torch.amp.GradScaler(args.device, growth_interval=10, enabled=dtype == torch.float16)
    starts = torch.randint(len(text) - CONTEXT, (args.steps, ROWS, 1)).to(args.device)
    text, offsets = text.to(args.device), torch.arange(CONTEXT + 1, device=args.device)

    losses, stats, scales = [], [], []
    for step in trange(args.steps, desc=f"{dtype}, {parts} part(s)", mininterval=0.5):
        optimizer.zero_grad()
        part_losses = []
        for rows in text[starts[step] + offsets].long().chunk(parts):
            with torch.autocast(args.device, dtype, enabled=dtype == torch.float16):
                logits = model(rows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            scaler.scale(loss).backward()
            part_losses.append(loss.detach())
        when = None if skip is None else ~skip[step]
        stats.append(clipper.step(optimizer, scaler=scaler, divide_by=parts, when=when))
        scaler.update()
        losses.append(torch.stack(part_losses).mean())
        if (step + 1) % args.every == 0:
            scales.append(scaler.get_scale())  # the only line of the loop that waits for the device
    series = losses, [s.total_norm for s in stats], [s.clipped for s in stats], [s.skipped for s in stats]
    return Run(*(torch.stack(values).cpu() for values in series), scales)


def difference(run: Run, reference: Run) -> float:
    """How far the losses of two runs are apart at most, relative to the loss."""
    return ((run.losses - reference.losses).abs() / reference.losses).max().item()


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """Train three times and compare."""
    parser = argparse.ArgumentParser(description="Mixed precision and gradient accumulation in one step.")
    parser.add_argument("--steps", type=int, default=200, help="of each run (200)")
    parser.add_argument("--parts", type=int, default=4, help=f"that each batch of {ROWS} rows is cut into (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.parts < 1 or ROWS % args.parts:
        parser.error(f"--parts must divide {ROWS}: divide_by weighs all parts alike")
    args.every = max(1, args.steps // 8)

    text = read_text()
    half = train(text, args, torch.float16, args.parts)
    single = train(text, args, torch.float32, args.parts, half.skipped)
    whole = train(text, args, torch.float32, 1, half.skipped)

    rows = []
    for i, scale in enumerate(half.scales):
        steps = slice(i * args.every, (i + 1) * args.every)
        norm = half.norms[steps].nanmedian()  # NaN where a gradient overflowed
        counts = half.clipped[steps].sum(), half.skipped[steps].sum()
        rows.append([steps.stop, f"{half.losses[steps].mean():.3f}", f"{norm:.3f}", *map(int, counts), int(scale)])
    print(f"float16, {args.parts} parts to a batch, clipped to {MAX_NORM}:")
    print(tabulate(rows, ["up to step", "loss", "gradient norm", "clipped", "skipped", "scale"]), end="\n\n")

    runs = {f"float16, {args.parts} parts": half, f"float32, {args.parts} parts": single, "float32, whole": whole}
    rows = [[name, f"{run.losses[-args.every :].mean():.3f}", difference(run, whole)] for name, run in runs.items()]
    print(tabulate(rows, ["run", "final loss", "largest relative difference in loss"], floatfmt=("", "", ".0e")))
    return runs


if __name__ == "__main__":
    main()
