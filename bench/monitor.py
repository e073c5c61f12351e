"""What watching costs: a call of GradMonitor.update beside a training step of a small GPT.

    python -m bench.monitor                     # on the GPU if there is one; half a minute

The GPT is the demo's. A step is forward, backward and `clipper.step` with AdamW, up to the moment the device has done
it. An update is what the host spends on it, a JSON line included, right after a step: caches are cold then, and an
update takes two to three times as long as in a loop of its own. On a CPU every fourth update does the work of four, so
times and shares are of four steps in a row; the share is the median over all of these.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn import functional as F

import fastclip
from examples import demo

from . import method

MONITORS: dict[str, dict[str, Any]] = {
    "GradMonitor(path)": {},
    "GradMonitor(path, rows_every=1)": {"rows_every": 1},
    "GradMonitor()": {},
}


def trainer(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A function that trains by one step, and one that gives the last step's statistics and loss."""
    text = demo.read_text(device)
    generator = torch.Generator().manual_seed(0)
    model = demo.GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    clipper = fastclip.Clipper(model.named_parameters(), 1.0)
    done: dict[str, Any] = {}

    def step() -> None:
        rows = demo.batch(text, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        done.update(stats=clipper.step(optimizer), loss=loss)
        method.synchronize(device)

    step()
    return step, lambda: (done["stats"], done["loss"])


def measure(device: str, seconds: float, folder: Path) -> list[dict[str, Any]]:
    step, last = trainer(device)
    monitors = {
        name: fastclip.monitor.GradMonitor(folder / f"{i}.jsonl" if "path" in name else None, **options)
        for i, (name, options) in enumerate(MONITORS.items())
    }
    times: dict[str, list[float]] = {name: [] for name in ("step", *monitors)}
    clock, end = time.perf_counter, time.perf_counter() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastclip.monitor.GradientWarning)
        while clock() < end:
            for name, monitor in monitors.items():
                steps = updates = 0.0
                for _ in range(monitor.TOGETHER):
                    start = clock()
                    step()
                    between = clock()
                    monitor.update(*last())
                    steps, updates = steps + between - start, updates + clock() - between
                times[name].append(updates / monitor.TOGETHER)
                times["step"].append(steps / monitor.TOGETHER)
        for monitor in monitors.values():
            monitor.close()
    each = {name: times["step"][i :: len(monitors)] for i, name in enumerate(monitors)} | {"step": times["step"]}
    return [
        {
            "provider": name,
            "wall_s": method.spread(times[name]),
            "of_step": method.spread(a / b for a, b in zip(times[name], each[name])),
            "missed": monitors[name].missed if name in monitors else None,
        }
        for name in times
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        w, share = r["wall_s"], r["of_step"]
        lines.append([
            r["provider"], f"{w['median'] * 1e6:,.0f} ({w['p20'] * 1e6:,.0f} – {w['p80'] * 1e6:,.0f})",
            f"{share['median']:.2%} ({share['p20']:.2%} – {share['p80']:.2%})",
        ])  # fmt: skip
    return tabulate(
        lines, ["call", "µs (p20 – p80)", "of a step"], disable_numparse=True, colalign=("left",) + ("right",) * 2
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = method.Results(options.json, "monitor", options.device, options.threads, argv)
    with tempfile.TemporaryDirectory() as folder:
        results.add(measure(options.device, 60 * options.minutes, Path(folder)))
    print(table(results.rows))
    results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
