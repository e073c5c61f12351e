"""What an installation without a compiler is worth: each packer, and the way without kernels, beside torch on a CPU.

    python -m bench.platform                    # two minutes; torch >= 2.14 for the packer abi3

Rows, checks and times are those of bench.clip. Which packer runs by itself is what `python -m fastclip info` says.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import fastclip
from fastclip import packers
from fastclip.packers.python import PythonPacker

from . import method
from .clip import Case, Machine, measure
from .providers import BASELINE, CLIPS, Call, Torch
from .runs import MODES, label, pairs, times

CASES = [("1x16", "fp32"), ("2000x256", "fp32"), ("gpt2-124m", "fp32"), ("gpt2-124m", "bf16"), ("gpt2-124m", "fp16")]


class Packed:
    """``clip_norm_`` by a packer of its own."""

    exact, backend = True, "auto"

    def __init__(self, name: str, chosen: packers.Chosen) -> None:
        self.name, self.chosen = name, chosen

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        def call(limit: float) -> Any:
            packers.chosen = self.chosen
            return fastclip.clip_norm_(parameters, limit)

        return call


def rivals() -> list[Any]:
    """torch, and all packers that run here."""
    names = [name for name in packers.PACKERS if name != "abi3" or packers.torch_library() is not None]
    found = [Packed(f"packer {name}", packers.named(name)) for name in names]
    without = packers.Chosen("python", PythonPacker(None), None, "to be measured")
    return [*found, Packed("no kernels", without), Torch(BASELINE, None)]


def table(rows: list[dict[str, Any]], form: str = "simple") -> str:
    """Times as fast as torch, a column for each packer."""
    names = list(dict.fromkeys(r["provider"] for r in rows if r["provider"] != BASELINE))

    def cell(r: dict[str, Any]) -> str:
        return times(r["vs_torch"]["median"]) if r["status"] == "ok" else f"{r['status']}: {r['reason']}"

    lines = [
        [f"{label(first)}, {MODES[mode]}", *(cell(by[name]) for name in names)]
        for first, modes in pairs(rows)
        for mode, by in modes.items()
    ]
    alignment = ("left", *["right"] * len(names))
    return tabulate(lines, ["", *names], tablefmt=form, disable_numparse=True, colalign=alignment)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    deadline = time.perf_counter() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = method.Results(options.json, "platform", "cpu", options.threads, argv)
    before, everyone = packers.get(), rivals()
    machine = Machine("cpu", options.threads, None)
    try:
        for i, (model, dtype) in enumerate(tqdm(CASES, leave=False)):
            seconds = (deadline - time.perf_counter()) / (len(CASES) - i)
            results.add(measure(Case(model, dtype, CLIPS), machine, seconds, everyone))
    finally:
        packers.chosen = before
        print(f"times as fast as torch {torch.__version__}'s clip_grad_norm_, {options.threads} threads\n")
        print(table(results.rows))
        results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
