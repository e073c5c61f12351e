"""The CPU kernels of each instruction set that this machine has, beside plain passes over the same bytes (the floor).

    python -m bench.isas                        # two minutes

GPT-2 124M by :func:`fastclip.clip_norm_`; rows, checks and times are those of bench.clip. Every instruction set has a
process of its own, with FASTCLIP_CPU_ISA. The floor is the same for all of them: torch's `sum`, and its `mul_` where
something is clipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fastclip import packers

from . import method
from .clip import Case, Machine, measure
from .platform import Packed
from .providers import BASELINE, CLIPS, Torch
from .runs import MODES

ISAS = ("avx512", "avx2", "portable")
DTYPES = ("fp32", "bf16", "fp16")


def table(rows: list[dict[str, Any]], form: str = "simple") -> str:
    """Shares of the floor: a line for each instruction set and mode, a column for each dtype."""
    shares = {(r["isa"], r["mode"], r["dtype"]): r["of_floor"] for r in rows if r["provider"] != BASELINE}
    cells = {key: "" if share is None else f"{share:.0%}" for key, share in shares.items()}  # none for what is in cache
    lines = [
        [isa, words, *(cells[isa, mode, dtype] for dtype in DTYPES)]
        for isa in dict.fromkeys(r["isa"] for r in rows)
        for mode, words in MODES.items()
    ]
    return tabulate(lines, ["", "", *DTYPES], tablefmt=form, disable_numparse=True)


def rows_here(model: str, seconds: float, threads: int) -> list[dict[str, Any]]:
    """The rows of the instruction set that this process has."""
    chosen = packers.get()
    assert chosen.kernels is not None
    rivals = [Packed("fastclip", chosen), Torch(BASELINE, None)]
    machine = Machine("cpu", threads, None)
    cases = [Case(model, dtype, CLIPS) for dtype in DTYPES]
    isa = chosen.kernels.isa()
    return [{**row, "isa": isa} for case in cases for row in measure(case, machine, seconds / len(cases), rivals)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # where a process writes the rows of its own
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    seconds = 60 * options.minutes / len(ISAS)
    if options.one:
        options.one.write_text(json.dumps(rows_here(options.model, seconds, options.threads)))
        return 0
    results = method.Results(options.json, "isas", "cpu", options.threads, argv)
    with tempfile.TemporaryDirectory() as folder:
        for isa in ISAS:
            one = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "bench.isas", "--one", str(one), "--model", options.model,
                       "--minutes", str(options.minutes), "--threads", str(options.threads)]  # fmt: skip
            subprocess.run(command, check=True, env={**os.environ, "FASTCLIP_CPU_ISA": isa})
            rows = json.loads(one.read_text())
            if all(row["isa"] == isa for row in rows):  # else this machine has not got it
                results.add(rows)
    print(f"share of the floor, {options.model}, {options.threads} threads\n")
    print(table(results.rows))
    results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
