"""clip_norm_ beside torch.nn.utils.clip_grad_norm_: the same gradients, interleaved in one process.

    python bench/clip.py --device cpu

Results are checked against float64 before anything is timed. The two take turns, so that whatever else the machine does
falls on both; the table shows medians of ratios and, for the large models, the share of the floor: a plain read pass
(sum) for a call that clips nothing, plus a plain in-place pass (mul_) for one that clips, over as many bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from models import MODELS, elements
from tabulate import tabulate
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastclip

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (model, dtype): ratios to reach when nothing is clipped, and when something is
CASES = {
    ("gpt2-124m", "fp32"): (3.0, 1.7),
    ("gpt2-124m", "bf16"): (3.5, 1.6),
    ("gpt2-124m", "fp16"): (8.0, 4.0),
    ("resnet50", "fp32"): (5.0, 2.4),
    ("small-cnn", "fp32"): (15.0, 7.0),
    ("2000x256", "fp32"): (60.0, 50.0),
    ("one-16", "fp32"): (8.0, 8.0),
}
SHRINK = 0.99999


def make_parameters(model: str, dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    parameters = []
    for shape in MODELS[model]:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        p.grad = (torch.randn(shape, device=device) * 1e-2).to(dtype)
        parameters.append(p)
    return parameters


def check(parameters: list[torch.nn.Parameter]) -> None:
    """Raise unless fastclip's norm and gradients are right to the dtype's rounding."""
    before = [p.grad.double() for p in parameters]
    expected = torch.nn.utils.get_total_norm(before).item()
    norm = fastclip.clip_norm_(parameters, expected / 2).item()
    if abs(norm - expected) > 1e-6 * expected:
        raise AssertionError(f"norm {norm}, expected {expected}")
    rtol = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[parameters[0].dtype]
    for p, old in zip(parameters, before):
        torch.testing.assert_close(p.grad.double(), old * (expected / 2 / (expected + 1e-6)), rtol=rtol, atol=1e-7)


class Falling:
    """Limits for calls in a row, each a little below the norm, so that every call has something to clip."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.gradients = [p.grad for p in parameters]
        self.start()

    def start(self) -> None:
        """Begin again from the norm the gradients have now: what a call leaves depends on the dtype's rounding."""
        self.limit = fastclip.total_norm(self.gradients).item()
        self.calls, self.version = 0, self.gradients[0]._version

    def __next__(self) -> float:
        self.calls += 1
        self.limit *= SHRINK
        return self.limit

    def writes(self) -> int:
        """How often the gradients were written since the start."""
        return self.gradients[0]._version - self.version


def measure(model: str, dtype: str, device: str, threads: int, seconds: float) -> dict[str, Any]:
    """Interleaved times of both and of the floor, in seconds, with and without clipping."""
    parameters = make_parameters(model, DTYPES[dtype], device)
    check(parameters)
    size = elements(MODELS[model])
    flat = torch.randn(max(1, size * DTYPES[dtype].itemsize // 4), device=device)
    falling = Falling(parameters)
    scope = {"ps": parameters, "flat": flat, "falling": falling, "torch": torch, "fastclip": fastclip}
    wait = "; torch.cuda.synchronize()" if device == "cuda" else ""
    statements = {
        "torch, not triggered": "torch.nn.utils.clip_grad_norm_(ps, 1e9)",
        "fastclip, not triggered": "fastclip.clip_norm_(ps, 1e9)",
        "torch, triggered": "torch.nn.utils.clip_grad_norm_(ps, next(falling))",
        "fastclip, triggered": "fastclip.clip_norm_(ps, next(falling))",
        "floor, not triggered": "flat.sum()",
        "floor, triggered": "flat.mul_(1.0)",
    }
    timers = {name: Timer(code + wait, globals=scope, num_threads=threads) for name, code in statements.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    once = {name: min(timer.timeit(1).mean for _ in range(3)) for name, timer in timers.items()}
    calls = {name: max(1, min(50, int(1e-3 / t))) for name, t in once.items()}  # in a row, for the short ones
    rounds = min(200, max(7, int(seconds / sum(once[name] * calls[name] for name in timers))))
    for _ in range(rounds):
        for name, timer in timers.items():
            falling.start()
            times[name].append(timer.timeit(calls[name]).mean)
            if name == "fastclip, triggered" and device == "cpu" and falling.writes() != falling.calls:
                raise AssertionError(f"{falling.calls - falling.writes()} of {falling.calls} calls clipped nothing")
    return {"model": model, "dtype": dtype, "device": device, "threads": threads, "tensors": len(parameters),
            "elements": size, "times": times}  # fmt: skip


def ratios(row: dict[str, Any]) -> dict[str, float]:
    times = row["times"]

    def median_ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below))

    both = [a + b for a, b in zip(times["floor, not triggered"], times["floor, triggered"])]
    return {
        "not triggered": median_ratio(times["torch, not triggered"], times["fastclip, not triggered"]),
        "triggered": median_ratio(times["torch, triggered"], times["fastclip, triggered"]),
        "floor, not triggered": median_ratio(times["floor, not triggered"], times["fastclip, not triggered"]),
        "floor, triggered": median_ratio(both, times["fastclip, triggered"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        r, goal = ratios(row), CASES[row["model"], row["dtype"]]
        large = row["elements"] > 10_000_000
        lines.append([
            row["model"], row["dtype"], row["tensors"], f"{row['elements']:,}",
            f"{r['not triggered']:.1f}×", f"{goal[0]:g}×", f"{r['triggered']:.1f}×", f"{goal[1]:g}×",
            f"{r['floor, not triggered']:.0%}, {r['floor, triggered']:.0%}" if large else "",
        ])  # fmt: skip
    headers = ["model", "dtype", "tensors", "elements", "not triggered", "goal", "triggered", "goal", "of the floor"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 7))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="per row")
    parser.add_argument("--json", type=Path, help="also write every time, in seconds, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [
        measure(model, dtype, arguments.device, arguments.threads, arguments.seconds)
        for model, dtype in tqdm(CASES, desc="models", leave=False)
    ]
    print(f"fastclip {fastclip.__version__} against torch {torch.__version__} on {arguments.device}, "
          f"{arguments.threads} threads; medians of interleaved ratios\n")  # fmt: skip
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))
        print(f"\nwrote {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
