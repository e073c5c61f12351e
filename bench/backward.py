"""What is left of a clip that is measured in backward: backward, and clip and step after it, of GPT-2 124M.

    python -m bench.backward                    # on the GPU if there is one; a minute and a half

A real backward pass of one sequence, then clip and step with AdamW: torch's fused one without any clip, and after
torch's clip; `fastclip.optim`'s, which reads the gradients for their norm first, and with `measure_in_backward=True`,
which has read them by then. The rivals take turns, and only the last one's hooks are there in its turn. A ratio is the
median over the rounds: of a step, to torch's without a clip; of backward, to the mean of the others in the same round.
Where backward's time varies by more than the hooks take, the time within them says more: on a CPU all that they add.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

import fastclip

from . import method
from .memory import CONFIGS, GPT2, VOCABULARY, Config

BASELINE = "torch fused, no clip"
CLIPPED = "torch clip + fused"
HOOKED = "fastclip.optim, measure_in_backward"
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}


def rivals(parameters: list[Tensor]) -> dict[str, Any]:
    """Optimizers, each with its states."""
    ours = fastclip.optim.AdamW
    return {
        BASELINE: torch.optim.AdamW(parameters, fused=True, **OPTIONS),
        CLIPPED: torch.optim.AdamW(parameters, fused=True, **OPTIONS),
        "fastclip.optim": ours(parameters, max_norm=1.0, **OPTIONS),
        HOOKED: ours(parameters, max_norm=1.0, measure_in_backward=True, **OPTIONS),
    }


def measure(model: GPT2, device: str, tokens: int, seconds: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    optimizers = rivals(parameters)
    hooked = optimizers[HOOKED].clipper
    rows = torch.randint(VOCABULARY, (1, tokens + 1), device=device)

    def loss() -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def taken(call: Callable[[], Any]) -> float:
        method.synchronize(device)
        start = time.perf_counter()
        call()
        method.synchronize(device)
        return time.perf_counter() - start

    hooks: list[float] = []  # seconds within them, of each backward
    arrived = hooked._sums._buckets._arrived

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        arrived(*arguments)
        hooks[-1] += time.perf_counter() - start

    hooked._sums._buckets._arrived = timed
    backwards: dict[str, list[float]] = {name: [] for name in optimizers}
    steps: dict[str, list[float]] = {name: [] for name in optimizers}
    names, end = list(optimizers), time.perf_counter() + seconds
    rounds = -1  # the first one makes the states
    while rounds < 3 or time.perf_counter() < end:
        for name in names:
            hooked.set_parameters(parameters if name == HOOKED else [], None)
            model.zero_grad()
            hooks += [0.0] if name == HOOKED else []
            backward = taken(loss().backward)

            def step(name: str = name) -> None:
                if name == CLIPPED:
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizers[name].step()

            stepped = taken(step)
            if rounds >= 0:
                backwards[name].append(backward)
                steps[name].append(stepped)
        names.append(names.pop(0))
        rounds += 1
    others = [sum(each) / len(each) for each in zip(*(t for name, t in backwards.items() if name != HOOKED))]
    common = {"model": "gpt2-124m", "tokens": tokens, "tensors": len(parameters), "rounds": rounds}
    return [
        {
            **common,
            "provider": name,
            "backward_s": method.spread(backwards[name]),
            "backward_vs_others": method.spread(a / b for a, b in zip(backwards[name], others)),
            "step_s": method.spread(steps[name]),
            "step_vs_torch": method.spread(a / b for a, b in zip(steps[name], steps[BASELINE])),
            "hooks_s": method.spread(hooks[1:]) if name == HOOKED else None,
        }
        for name in optimizers
    ]


def table(rows: list[dict[str, Any]], form: str = "simple") -> str:
    def milliseconds(spread: dict[str, float]) -> str:
        return f"{spread['median'] * 1e3:,.1f} ({spread['p20'] * 1e3:,.1f} – {spread['p80'] * 1e3:,.1f})"

    headers = ["", "backward, ms", "to the others'", "in hooks, ms", "clip and step, ms", f"to {BASELINE}"]
    lines = [
        [
            *(r["provider"], milliseconds(r["backward_s"]), f"{r['backward_vs_others']['median']:.2f}×"),
            milliseconds(r["hooks_s"]) if r["hooks_s"] else "",
            *(milliseconds(r["step_s"]), f"{r['step_vs_torch']['median']:.2f}×"),
        ]
        for r in rows
    ]
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=("left",) + ("right",) * 5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=256, help="of the sequence; backward takes as much longer")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a second")
    parser.add_argument("--minutes", type=float, default=1.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = GPT2(Config(2, 4, 64, "fp32") if options.quick else CONFIGS["gpt2-124m"])
    minutes = 0.01 if options.quick else options.minutes
    results = method.Results(options.json, "backward", options.device, options.threads, argv)
    results.add(measure(model.to(options.device), options.device, options.tokens, 60 * minutes))
    print(table(results.rows))
    results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
