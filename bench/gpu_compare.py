"""Triton beside CUDA, case by case, and which of them `auto` should take on this GPU.

    python3 -m bench.gpu_compare                # of the newest run in bench/results/
    python3 -m bench.gpu_compare $OUT           # of the newest in another folder

A ratio is CUDA's median time over Triton's: above 1, Triton is faster. The device's time is that of the kernels alone,
the host's that until a call returns, the wall's that of calls in a row. `auto` should take the one whose wall times are
shorter in the geometric mean over all cases; where they are within 3 % of each other, it may stay as it is.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from .runs import RESULTS, Row, label, newest, pairs

CLOCKS = {"device": "device_s", "host": "host_s", "wall": "wall_s"}
CLOSE = 1.03


class Comparison(NamedTuple):
    what: str
    ratios: dict[str, float]  # of each clock, CUDA's time over Triton's


def compared(rows: list[Row]) -> list[Comparison]:
    """The cases in which both were right."""
    found = []
    for first, modes in pairs(rows):
        for mode, providers in modes.items():
            triton, cuda = (providers.get(f"fastclip {name}", {}) for name in ("triton", "cuda"))
            if triton.get("status") == cuda.get("status") == "ok":
                ratios = {name: cuda[clock]["median"] / triton[clock]["median"] for name, clock in CLOCKS.items()}
                found.append(Comparison(f"{label(first)}, {mode}", ratios))
    return found


def verdict(comparisons: list[Comparison]) -> str:
    mean = statistics.geometric_mean(each.ratios["wall"] for each in comparisons)
    if 1 / CLOSE <= mean <= CLOSE:
        return f"they are within {CLOSE - 1:.0%} of each other ({mean:.2f}): auto may stay as it is"
    return f"auto should take {'triton' if mean > 1 else 'cuda'}: CUDA takes {mean:.2f} times Triton's wall time"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="the folder of JSON (bench/results)")
    run = newest(parser.parse_args(argv).results).get(("clip", "cuda"))
    comparisons = compared(run["rows"]) if run else []
    if not comparisons:
        print("there is no run on a GPU that has both: make gpu")
        return 1
    lines = [[each.what, *(f"{ratio:.2f}" for ratio in each.ratios.values())] for each in comparisons]
    print(tabulate(lines, ["CUDA's time / Triton's", *CLOCKS], disable_numparse=True))
    print(f"\non {run['machine']['name']}: {verdict(comparisons)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
