"""The pictures of docs/benchmarks.md: ratios to torch, shares of what the memory can do, and how cost grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .method import ROOT
from .providers import BASELINE
from .runs import MODES, Run, curve, label, ours, pairs, times

FOLDER = ROOT / "docs"
# One colour for each provider, in every picture: ours in colour, the others in grey.
COLOURS = {
    "fastclip cpu": "#d1495b", "fastclip triton": "#d1495b", "fastclip cuda": "#edae49", "fastclip.Clipper": "#e8919c",
    "torch foreach": "#4a4e69", "torch loop": "#9a9db3", "torch.compile": "#c9ada7",
}  # fmt: skip
MARKS = {"not triggered": "o", "triggered": "D"}
STYLE = {
    "svg.hashsalt": "fastclip", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "xtick.color": "#555555", "ytick.color": "#222222", "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def draw(runs: dict[tuple[str, str], Run]) -> dict[str, Figure]:
    """The pictures that docs/benchmarks.md refers to, by name."""
    figures = {}
    for device in ("cpu", "cuda"):
        if clip := runs.get(("clip", device)):
            figures[f"{device}-ratio"] = draw_ratios(clip)
            figures["cpu-floor" if device == "cpu" else "cuda-bandwidth"] = draw_ceiling(clip)
        if (growth := runs.get(("growth", device))) and clip:
            figures[f"{device}-growth"] = draw_growth(growth)
    return figures


def draw_ratios(run: Run) -> Figure:
    rows, provider = run["rows"], ours(run["rows"])
    lines = []
    for first, modes in pairs(rows):
        values = {m: modes[m][provider]["vs_torch"] for m in MODES if provider in modes.get(m, {})}
        if any(values.values()):
            lines.append((label(first), values))
    lines.sort(key=lambda line: max(v["median"] for v in line[1].values() if v))
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(lines)), layout="constrained")
    axes = figure.subplots()
    colour = COLOURS[provider]
    for y, (_, values) in enumerate(lines):
        both = [v["median"] for v in values.values() if v]
        axes.plot([1, max(both)], [y, y], color=colour, alpha=0.25, linewidth=5, solid_capstyle="butt", zorder=1)
        for mode, v in values.items():
            if v:
                full = mode == "triggered"
                axes.plot(v["median"], y, MARKS[mode], color=colour, markerfacecolor=colour if full else "white",
                          markersize=7, markeredgewidth=1.8, zorder=3)  # fmt: skip
        axes.annotate(times(max(both)), (max(both), y), (9, 0), textcoords="offset points", va="center", weight="bold",
                      color=colour)  # fmt: skip
    for mode, words in MODES.items():
        axes.plot([], [], MARKS[mode], color=colour, markerfacecolor=colour if mode == "triggered" else "white",
                  markersize=7, markeredgewidth=1.8, label=words)  # fmt: skip
    axes.axvline(1, color=COLOURS["torch foreach"], linewidth=2)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    most = max(v["median"] for _, values in lines for v in values.values() if v)
    least = min(v["median"] for _, values in lines for v in values.values() if v)
    ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500) if min(1, least) / 1.3 < t < most * 1.6]
    log_axis(axes.xaxis, ticks, lambda value, _: "torch" if value == 1 else f"{value:g}×")
    axes.set_xlim(min(1, least) / 1.12, most * 1.7)
    axes.set_title("fastclip: how many times faster than torch.nn.utils.clip_grad_norm_")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    return figure


def draw_ceiling(run: Run) -> Figure:
    """Share of the floor on a CPU; on a GPU, bandwidth beside a copy's."""
    copy = run["copy_bytes_per_s"]
    groups = [
        (label(first), mode, modes[mode])
        for first, modes in pairs(run["rows"])
        for mode in MODES
        if first["elements"] > 10_000_000 and any(r.get("of_floor") for r in modes.get(mode, {}).values())
    ]
    shown = [p for p in COLOURS if p != "fastclip.Clipper" and p != "torch loop"]
    shown = [p for p in shown if any(p in group for _, _, group in groups)]
    figure = Figure(figsize=(8, 1.0 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    scale = copy / 1e9 if copy else 100.0
    height = 0.8 / len(shown)
    for y, (_, _, providers) in enumerate(reversed(groups)):
        for i, p in enumerate(shown):
            if (r := providers.get(p)) and r["of_floor"]:
                place = y + 0.4 - (i + 0.5) * height
                axes.barh(place, r["of_floor"] * scale, height * 0.92, color=COLOURS[p])
                text = f"{r['gb_per_s']:,.0f}" if copy else f"{r['of_floor']:.0%}"
                inside = r["of_floor"] > 0.08  # else beside its bar; never across the floor's line
                axes.annotate(
                    text, (min(r["of_floor"], 1.0) * scale, place), (-4 if inside else 4, 0), fontsize=8, va="center",
                    textcoords="offset points", ha="right" if inside else "left",
                    color="white" if inside else COLOURS[p],
                )  # fmt: skip
    for p in shown:
        axes.barh(0, 0, color=COLOURS[p], label=p)
    axes.axvline(scale, color="black", linewidth=1.5, linestyle=(0, (4, 2)))
    words = f"a copy: {scale:,.0f} GB/s" if copy else "the floor: plain passes over the same bytes"
    axes.annotate(words, (scale, len(groups) - 0.4), (-5, 2), textcoords="offset points", ha="right", va="bottom")
    axes.set_yticks(range(len(groups)), [f"{name}: {MODES[mode]}" for name, mode, _ in reversed(groups)])
    axes.set_ylim(-0.5, len(groups) + 0.1)
    title = "GB/s of the traffic that the clip needs" if copy else "Speed as a share of the memory's floor, %"
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=len(shown), frameon=False)
    axes.tick_params(axis="y", length=0)
    return figure


def draw_growth(run: Run) -> Figure:
    rows = run["rows"]
    on_cpu = run["device"] == "cpu"
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    unit = 1e-6
    if on_cpu:  # in units of torch's cheapest call
        unit = min(curve(rows, BASELINE, by)[1].min() for by in ("tensors", "elements"))
    for axes, by in zip(panels, ("tensors", "elements")):
        lowest = math.inf
        for p in (p for p in COLOURS if any(r["provider"] == p for r in rows)):
            x, seconds = curve(rows, p, by)
            if not len(x):
                continue
            y = seconds / unit
            lowest = min(lowest, y.min())
            axes.plot(
                x, y, "o-", color=COLOURS[p], markersize=4, linewidth=2, label=p.replace("torch foreach", "torch")
            )
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.25)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
    powers = [2**k for k in range(0, 31, 10)]
    log_axis(
        panels[1].xaxis, powers, lambda value, _: {1: "1", 2**10: "1k", 2**20: "1M", 2**30: "1G"}.get(int(value), "")
    )
    log_axis(panels[0].xaxis, [1, 10, 100, 1000, 10000], lambda value, _: f"{value:,.0f}")
    panels[0].set(
        xlabel="tensors of 16 elements",
        ylabel="time of a call" + (", torch's on one tensor = 1" if on_cpu else ", µs"),
    )
    panels[1].set(xlabel="elements of one tensor")
    panels[0].set_title("More tensors" if on_cpu else "More tensors: host time")
    panels[1].set_title("More elements" if on_cpu else "More elements: wall time")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panels[0].legend(frameon=False, loc="upper left")
    return figure


def log_axis(axis: Any, ticks: list[float], words: Any) -> None:
    axis.axes.set_xscale("log")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(words))


def save(figure: Figure, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None})


def save_all(runs: dict[tuple[str, str], Run]) -> None:
    with mpl.rc_context(STYLE):
        for name, figure in draw(runs).items():
            save(figure, FOLDER / f"bench-{name}.svg")
