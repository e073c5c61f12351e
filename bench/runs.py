"""The runs that the benchmarks wrote down: the newest of each kind and device, and what is read from their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .method import ROOT

RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]
Run = dict[str, Any]

NAMES = {
    "gpt2-124m": "GPT-2 124M", "gpt2-774m": "GPT-2 774M", "gpt2-1.5b": "GPT-2 1.5B",
    "llama-3.2-1b": "Llama 3.2 1B", "llama-3-8b": "Llama 3 8B",
    "mixtral-8x7b": "Mixtral 8x7B", "olmoe-1b-7b": "OLMoE 1B-7B", "bert-base": "BERT base", "vit-b16": "ViT-B/16",
    "resnet50": "ResNet-50", "small-cnn": "small CNN", "one-1.5b": "one tensor of 1.5B", "misaligned": "misaligned",
    "1x16": "one tensor of 16",
}  # fmt: skip
MODES = {"not triggered": "nothing to clip", "triggered": "something to clip"}


def newest(folder: Path = RESULTS) -> dict[tuple[str, str], Run]:
    """The newest run of each kind and device."""
    runs: dict[tuple[str, str], Run] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if "rows" not in run or "kind" not in run:
            continue
        key = run["kind"], run["device"]
        if key not in runs or run["date"] >= runs[key]["date"]:
            runs[key] = run
    return runs


def ours(rows: list[Row]) -> str | None:
    """fastclip's functions on its fastest backend here."""
    for name in ("fastclip cuda", "fastclip triton", "fastclip cpu"):
        if any(r["provider"] == name and r["status"] == "ok" for r in rows):
            return name
    return None


def pairs(rows: list[Row]) -> list[tuple[Row, dict[str, dict[str, Row]]]]:
    """Each gradients' rows that were measured: mode -> provider -> row; with one row to name them by."""
    found: dict[Any, dict[str, dict[str, Row]]] = {}
    first: dict[Any, Row] = {}
    for r in rows:
        key = r["model"], r["dtype"], r["input_sets"]
        first.setdefault(key, r)
        found.setdefault(key, {}).setdefault(r["mode"], {})[r["provider"]] = r
    return [(first[key], modes) for key, modes in found.items()]


def label(r: Row) -> str:
    name = NAMES.get(r["model"]) or "{:,} × {:,}".format(r["tensors"], r["elements"] // r["tensors"])
    return f"{name}, {r['dtype']}" + (", cold" if r["input_sets"] > 1 else "")


def times(value: float) -> str:
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×"


def curve(rows: list[Row], provider: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Tensors of 16 and the host's median seconds for a call, or elements of one tensor and the whole call's, where
    nothing is clipped."""
    mine = [r for r in rows if r["provider"] == provider and r["status"] == "ok" and r["mode"] == "not triggered"]
    if by == "tensors":
        mine = [r for r in mine if r["elements"] == 16 * r["tensors"]]
    else:
        mine = [r for r in mine if r["tensors"] == 1 and r["elements"] != 16]
    mine.sort(key=lambda r: r[by])
    clock = "host_s" if by == "tensors" else "wall_s"
    return np.array([r[by] for r in mine], float), np.array([r[clock]["median"] for r in mine])
