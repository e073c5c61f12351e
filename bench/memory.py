"""The peak memory of a training step: clip, step and zero_grad, beside steps that are taken inside backward.

    python -m bench.memory                      # on the GPU if there is one; three minutes on a CPU
    python -m bench.memory --quick              # GPT-2 124M alone, a minute

GPT-2 with its head tied to its embedding and one short sequence, so that parameters, states and gradients are nearly
all of the memory. The gradient of the embedding, 31 % of the 124M and 8 % of the 774M parameters, begins at the head
and is complete only at the very end, so that no way can do without it: at most the rest can be saved.

Each way runs in a process of its own, of which a step is measured after two others: on a GPU what torch's allocator has
given out at most; on a CPU the most that was resident (VmHWM of Linux, set back before the step), with malloc told to
give large blocks back to the system at once. Both are less what was there before the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import fastclip

from . import method
from .models import gpt2
from .runs import NAMES

VOCABULARY, CONTEXT = 50257, 1024


class Config(NamedTuple):
    layers: int
    heads: int
    width: int
    dtype: str


CONFIGS = {"gpt2-124m": Config(12, 12, 768, "fp32"), "gpt2-774m": Config(36, 20, 1280, "bf16")}
BASELINE, IN_BACKWARD = "torch clip + fused AdamW", "fastclip.optim, step_in_backward"
WARM_UP = 2  # steps, of which the first makes the states
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Block(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT2(nn.Module):
    """GPT-2's parameters, in the order of their use."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(config.heads, width) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.token(x) + self.position.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(hidden)), self.token.weight)


Step = Callable[[Tensor], None]


def provider(name: str, model: nn.Module) -> Step:
    """A training step, by name, as a function of the loss."""
    if name.startswith("torch"):
        clip = torch.nn.utils.clip_grad_norm_
        optimizer: Any = torch.optim.AdamW(model.parameters(), fused=True if "fused" in name else None)
    else:
        clip = None
        inside = "step_in_backward" in name
        rule = fastclip.rules.TensorNorm(1.0) if inside else 1.0
        optimizer = fastclip.optim.AdamW(model.parameters(), max_norm=rule, step_in_backward=inside)

    def step(loss: Tensor) -> None:
        loss.backward()
        if clip is not None:
            clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


PROVIDERS = ("torch clip + AdamW", BASELINE, "fastclip.optim", IN_BACKWARD)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_of_a_step(name: str, device: str, config: Config, tokens: int) -> dict[str, int]:
    """In this process: the peak of a step, and what all gradients take, and the largest."""
    torch.manual_seed(0)
    gc.collect()
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    with torch.device(device):
        model = GPT2(config).to(method.DTYPES[config.dtype])
        x = torch.randint(256, (1, tokens + 1))
    step = provider(name, model)
    for i in range(WARM_UP + 1):
        if i == WARM_UP:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        logits = model(x[:, :-1])
        step(F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten()))
        del logits
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    sizes = [p.numel() * p.itemsize for p in model.parameters()]
    return {"peak_bytes": peak - before, "gradient_bytes": sum(sizes), "largest_bytes": max(sizes)}


def in_a_process(name: str, device: str, model: str, tokens: int, threads: int) -> dict[str, int]:
    command = [sys.executable, "-m", "bench.memory", "--one", name, "--device", device, "--models", model]
    command += ["--tokens", str(tokens), "--threads", str(threads)]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, cwd=method.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(device: str, model: str, tokens: int, threads: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    config = CONFIGS[model]
    for name in PROVIDERS:
        row: dict[str, Any] = {"model": model, "dtype": config.dtype, "tokens": tokens, "provider": name}
        row |= {"tensors": len(gpt2(config.layers, config.width))}
        row |= {"measure": "allocated" if device == "cuda" else "resident"}
        try:
            row |= {"status": "ok", "reason": None, **in_a_process(name, device, model, tokens, threads)}
        except RuntimeError as error:
            row |= {"status": "failed", "reason": method.first_line(error)}
        rows.append(row)
    base = next((r["peak_bytes"] for r in rows if r["provider"] == BASELINE and r["status"] == "ok"), None)
    for r in rows:
        known = r["status"] == "ok" and base is not None
        r["saved_of_gradients"] = (base - r["peak_bytes"]) / r["gradient_bytes"] if known else None
    return rows


def table(rows: list[dict[str, Any]], form: str = "simple") -> str:
    lines = []
    for r in rows:
        line = [f"{NAMES.get(r['model'], r['model'])}, {r['dtype']}", r["provider"]]
        if r["status"] == "ok":
            saved, most = r["saved_of_gradients"], 1 - r["largest_bytes"] / r["gradient_bytes"]
            line += [f"{r['peak_bytes'] / 2**20:,.0f}", f"{r['peak_bytes'] / r['gradient_bytes']:.2f} G"]
            line += ["" if saved is None else f"{round(saved, 2) + 0:.2f} G", f"{most:.2f} G"]
        else:
            line += [f"{r['status']}: {r['reason']}"]
        lines.append(line)
    headers = ["model", "clip and step", "peak, MiB", "peak", f"saved beside {BASELINE}", "at most"]
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=("left", "left", *["right"] * 4))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(CONFIGS)}")
    parser.add_argument("--quick", action="store_true", help="the smallest model alone")
    parser.add_argument(
        "--tokens", type=int, default=16, help="of the one sequence that a step sees, at most 1024 (16)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=PROVIDERS, help="measure this one, in this process")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    models = options.models.split(",") if options.models else list(CONFIGS)[: 1 if options.quick else None]
    if unknown := set(models) - set(CONFIGS):
        parser.error(f"--models: there are {', '.join(CONFIGS)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(peak_of_a_step(options.one, options.device, CONFIGS[models[0]], options.tokens)))
        return 0
    results = method.Results(options.json, "memory", options.device, options.threads, argv)
    for model in models:
        results.add(measure(options.device, model, options.tokens, options.threads))
    print(table(results.rows))
    results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
