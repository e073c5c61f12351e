"""What a call of the cuda backend costs the host, on a machine without a GPU: python -m bench.cuda_host

`measure` and the `apply_` of what it decided: all that the host does but the driver's part. csrc/cuda/ is compiled over
tests/emulation/ with the tables that a GPU has, and launches copy their parameters, as CUDA's do, and run nothing. What
torch does on a GPU and not on a CPU (the current stream, an allocation in its cache) is not in it. Packing, which comes
before and is the same for all backends, is not timed. Of `apply_` at 2,000 tensors two thirds are the version counters
of autograd, one for each tensor.

    same       the gradients lie where they lay in the call before
    changed    they lie elsewhere in every call
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

TENSORS = (1, 10, 100, 300, 1000, 2000, 2700, 10000)
SETS = 24  # of gradients that take turns, more than are remembered


def emulated() -> None:
    """The cuda backend on the CPU, over launches that do not run."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import emulation

    from fastclip.backends import cuda
    from fastclip.native import libraries

    cuda.DEVICE, libraries.cuda = "cpu", emulation.full_size
    emulation.full_size.get().fastclip_emulate(0, 0)


def microseconds(tensors: int, changed: bool, calls: int) -> tuple[list[float], list[float]]:
    """Of measure and of apply_, each time on gradients that were just packed."""
    from fastclip.backends import cuda
    from fastclip.gradients.pack import pack

    sets = [[torch.ones(16) for _ in range(tensors)] for _ in range(SETS if changed else 1)]
    measures, applies = [], []
    for call, gradients in zip(range(calls + SETS), itertools.cycle(sets)):
        (group,) = pack(gradients, gradients=True, write=False).groups
        start = time.perf_counter()
        measured = cuda.measure(group, 2.0, 1.0)
        between = time.perf_counter()
        cuda.apply_(group, measured.coef)
        end = time.perf_counter()
        if call >= SETS:
            measures.append(1e6 * (between - start))
            applies.append(1e6 * (end - between))
    return measures, applies


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="of each case")
    parser.add_argument("--tensors", type=lambda text: [int(word) for word in text.split(",")], default=TENSORS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    emulated()
    rows = []
    for tensors in options.tensors:
        row = [f"{tensors:,}"]
        for changed in (False, True):
            for times in microseconds(tensors, changed, options.calls):
                low, *_, high = statistics.quantiles(times, n=5)
                row.append(f"{statistics.median(times):.1f} ({low:.1f} – {high:.1f})")
        rows.append(row)
    headers = ["tensors", *(f"{where}: {verb}, µs" for where in ("same", "changed") for verb in ("measure", "apply_"))]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("right",) * len(headers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
