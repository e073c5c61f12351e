"""The README's block on speed and its pictures, from the runs in bench/results/.

    python bench/report.py

Of each kind of run and device the newest counts. CPU results are shown as ratios only: they were measured side by side,
while a shared machine's times mean little by themselves. The same results give the same text and the same pictures.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from models import find
from providers import BASELINE
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURES, README = ROOT / "bench" / "results", ROOT / "docs", ROOT / "README.md"
BEGIN, END = "<!-- bench:begin, written by bench/report.py -->", "<!-- bench:end -->"

Row = dict[str, Any]
Run = dict[str, Any]

NAMES = {
    "gpt2-124m": "GPT-2 124M", "gpt2-1.5b": "GPT-2 1.5B", "llama-3.2-1b": "Llama 3.2 1B", "llama-3-8b": "Llama 3 8B",
    "mixtral-8x7b": "Mixtral 8x7B", "olmoe-1b-7b": "OLMoE 1B-7B", "bert-base": "BERT base", "vit-b16": "ViT-B/16",
    "resnet50": "ResNet-50", "small-cnn": "small CNN", "one-1.5b": "one tensor of 1.5B", "misaligned": "misaligned",
    "1x16": "one tensor of 16",
}  # fmt: skip
# One colour for each provider, in every picture: ours in colour, the others in grey.
COLOURS = {
    "fastclip cpu": "#d1495b", "fastclip triton": "#d1495b", "fastclip cuda": "#edae49", "fastclip.Clipper": "#e8919c",
    "torch foreach": "#4a4e69", "torch loop": "#9a9db3", "torch.compile": "#c9ada7",
}  # fmt: skip
GPU_COMPARED = ("fastclip triton", "fastclip cuda", "torch foreach", "torch.compile", "apex", "transformer engine")
MARKS = {"not triggered": "o", "triggered": "D"}
MODES = {"not triggered": "nothing to clip", "triggered": "something to clip"}
# (model, dtype): ratios to torch to reach on a CPU, in the order of MODES
CPU_GOALS = {
    ("gpt2-124m", "fp32"): (3.0, 1.7),
    ("gpt2-124m", "bf16"): (3.5, 1.6),
    ("gpt2-124m", "fp16"): (8.0, 4.0),
    ("resnet50", "fp32"): (5.0, 2.4),
    ("small-cnn", "fp32"): (15.0, 7.0),
    ("2000x256", "fp32"): (60.0, 50.0),
    ("1x16", "fp32"): (8.0, 8.0),
}
# mode: share of a copy's bandwidth, and ratio to torch, to reach on a GPU with a model that fills it
GPU_GOALS = {"norm": (0.9, 3.0), "not triggered": (0.9, 3.0), "triggered": (0.9, 1.2)}
STYLE = {
    "svg.hashsalt": "fastclip", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "xtick.color": "#555555", "ytick.color": "#222222", "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


RULES_INTRO = (
    "What a rule costs: `Clipper.clip_()` with each where it has nothing to clip (`AGC` also reads the parameters, "
    "and the gradients once more)"
)


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


# ---- words ----


def block(runs: dict[tuple[str, str], Run]) -> str:
    """What stands between the README's markers."""
    parts = [BEGIN, "<!-- Do not edit: `make bench` measures anew, `python bench/report.py` writes it again. -->"]
    if clip := runs.get(("clip", "cpu")):
        parts += ["### CPU", cpu_intro(clip), picture("cpu-ratio", "how many times faster than torch, by model")]
        parts += [cpu_table(clip["rows"])]
        parts += [picture("cpu-floor", "share of the machine's own speed of memory that fastclip and torch reach")]
    if growth := runs.get(("growth", "cpu")):
        parts += [picture("cpu-growth", "how the time of a call grows with tensors and with elements")]
        parts += [growth_words(growth["rows"])]
    if step := runs.get(("step", "cpu")):
        parts += ["Clip and optimizer step together, beside torch's clip and torch's fused optimizer:"]
        parts += [step_table(step["rows"])]
    if rules := runs.get(("rules", "cpu")):
        parts += [f"{RULES_INTRO}:", rules_table(rules["rows"])]
    if monitor := runs.get(("monitor", "cpu")):
        parts += [monitor_words(monitor["rows"])]
    parts += ["### GPU"]
    if clip := runs.get(("clip", "cuda")):
        parts += [gpu_intro(clip), picture("cuda-ratio", "how many times faster than torch, by model")]
        parts += [gpu_table(clip["rows"]), picture("cuda-bandwidth", "bandwidth against that of a copy")]
        if growth := runs.get(("growth", "cuda")):
            parts += [picture("cuda-growth", "how the host's time grows with tensors, and the call's with elements")]
            parts += [growth_words(growth["rows"])]
        if step := runs.get(("step", "cuda")):
            parts += ["Clip and optimizer step together, beside torch's clip and torch's fused optimizer:"]
            parts += [step_table(step["rows"])]
        if rules := runs.get(("rules", "cuda")):
            parts += [f"{RULES_INTRO}:", rules_table(rules["rows"])]
        if monitor := runs.get(("monitor", "cuda")):
            parts += [monitor_words(monitor["rows"])]
    else:
        parts += ["Not measured yet: `make gpu` on a machine with one."]
    return "\n\n".join([*parts, END]).replace(f"{BEGIN}\n\n", f"{BEGIN}\n")


def picture(name: str, words: str) -> str:
    return f"![{words[0].upper()}{words[1:]}](docs/bench-{name}.svg)"


def cpu_intro(run: Run) -> str:
    machine = run["machine"]
    return (
        f"`make bench` on {machine['name']} ({machine['capability']}, {run['threads']} threads), torch "
        f"{run['versions']['torch']}, {run['date'][:10]}: how many times faster than `torch.nn.utils.clip_grad_norm_` "
        f"on the same gradients, interleaved in one process; median, 20th and 80th percentile of the ratio. The floor "
        f"is a plain read pass (`sum`), and a plain in-place pass (`mul_`) where something is clipped, over the same "
        f"bytes."
    )


def gpu_intro(run: Run) -> str:
    machine, copy = run["machine"], run["copy_bytes_per_s"]
    return (
        f"`make gpu` on {machine['name']} (driver {machine['driver']}), torch {run['versions']['torch']}, triton "
        f"{run['versions']['triton']}, {run['date'][:10]}. A device-to-device copy moved {copy / 1e9:,.0f} GB/s in the "
        f"same run; its share is of the traffic that the clip needs: one pass over the gradients where nothing is "
        f"clipped, three where something is."
    )


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


def cpu_table(rows: list[Row]) -> str:
    lines = []
    for first, modes in pairs(rows):
        if not set(MODES) <= set(modes):
            continue
        cells, floors = [], []
        for mode in MODES:
            r = modes[mode].get(ours(rows))
            cells.append(ratio_cell(r, modes[mode].get(BASELINE)))
            floors.append(f"{r['of_floor']:.0%}" if r and r["of_floor"] else "")
        size = find(first["model"]).elements
        lines.append([label(first), f"{first['tensors']:,}", count(size), *cells, ", ".join(filter(None, floors))])
    headers = ["gradients", "tensors", "elements", *MODES.values(), "of the floor"]
    text = tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 5))
    cold = any(first["input_sets"] > 1 for first, _ in pairs(rows))
    note = (
        "\n\n*cold*: so many sets of gradients in turn that none is in the cache any more; the other rows of small "
        "models find theirs there, as they do after a backward pass as small."
    )
    return text + (note if cold else "")


def ratio_cell(r: Row | None, torch: Row | None) -> str:
    if r is None:
        return ""
    if r["status"] != "ok":
        return r["status"]
    if r["vs_torch"] is None:
        return f"torch is {torch['status']}" if torch else ""
    v = r["vs_torch"]
    return f"**{times(v['median'])}** ({times(v['p20'])} – {times(v['p80'])})"


def times(value: float) -> str:
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×"


def count(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(int(number))


def gpu_table(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        if r["provider"] not in GPU_COMPARED:
            continue
        if r["status"] != "ok":
            lines.append([label(r), r["mode"], r["provider"], f"{r['status']}: {r['reason']}"])
            continue
        v = r["vs_torch"]
        lines.append([
            label(r), r["mode"], r["provider"], duration(r["device_s"]["median"]),
            f"{r['of_floor']:.0%}" if r["elements"] > 10_000_000 else "", duration(r["host_s"]["median"]),
            times(v["median"]) if v else "", r["launches"], r["syncs"], f"{r['extra_bytes'] / 1024:,.0f}",
        ])  # fmt: skip
    headers = ["gradients", "mode", "provider", "device time", "of a copy", "host time", "vs torch, wall", "launches",
               "syncs", "extra KiB"]  # fmt: skip
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) * 3 + ("right",) * 7)


def duration(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-12:.3g} ps"


def step_table(rows: list[Row]) -> str:
    """Where something is clipped: a line for each way to clip and step, a column for each optimizer and model."""
    rows = [r | {"provider": r["provider"].replace(f".{r['optimizer']}", "")} for r in rows if r["mode"] == "triggered"]
    columns = list(dict.fromkeys((r["optimizer"], r["model"], r["dtype"]) for r in rows if r["status"] == "ok"))
    cells = {(r["provider"], r["optimizer"], r["model"], r["dtype"]): r for r in rows}

    def cell(r: Row | None) -> str:
        if r is None or r["status"] != "ok":
            return r["status"] if r else ""
        return f"{r['vs_torch']['median']:.2f}×" if r["vs_torch"] else ""

    names = dict.fromkeys(r["provider"] for r in rows)
    lines = [[name, *(cell(cells.get((name, *column))) for column in columns)] for name in names]
    headers = ["", *(f"{o}, {NAMES.get(m, m.replace('x', ' × '))}, {d}" for o, m, d in columns)]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True,
                    colalign=("left", *["right"] * len(columns)))  # fmt: skip


def rules_table(rows: list[Row]) -> str:
    """A line for each rule, a column for each model: how many times what GlobalNorm takes."""
    rows = [r for r in rows if r["status"] == "ok"]
    models = list(dict.fromkeys(r["model"] for r in rows))
    cells = {(r["provider"], r["model"]): f"{1 / r['vs_torch']['median']:.2f}×" for r in rows}
    names = dict.fromkeys(r["provider"] for r in rows)
    lines = [[name, *(cells.get((name, model), "") for model in models)] for name in names]
    headers = ["rule at rest, GlobalNorm = 1", *(NAMES.get(m, m.replace("x", " × ")) for m in models)]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * len(models)))


def monitor_words(rows: list[Row]) -> str:
    share = next(r for r in rows if r["provider"] == "GradMonitor(path)")["of_step"]
    return (
        f"Watching: `GradMonitor.update` takes {share['median']:.2%} of a training step of the demo's GPT "
        f"({share['p20']:.2%} – {share['p80']:.2%})."
    )


# ---- growth ----


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


def fit(x: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """The fixed cost and the slope, least squares of relative errors."""
    slope, fixed = np.polyfit(x, seconds, 1, w=1 / seconds)
    return float(fixed), float(slope)


def growth_words(rows: list[Row]) -> str:
    fits = {
        (p, by): fit(*curve(rows, p, by))
        for p in dict.fromkeys(r["provider"] for r in rows)
        for by in ("tensors", "elements")
        if len(curve(rows, p, by)[0]) > 2
    }
    on_cpu = ours(rows) == "fastclip cpu"

    def cell(p: str, by: str, part: int) -> str:
        if (p, by) not in fits or (BASELINE, by) not in fits:
            return ""
        mine, theirs = fits[p, by][part], fits[BASELINE, by][part]
        if not on_cpu:
            return duration(max(mine, 0.0))
        return f"1/{theirs / mine:.2g}" if 0 < mine < theirs else f"{mine / theirs:.2g}"

    lines = [
        [p, cell(p, "tensors", 0), cell(p, "tensors", 1), cell(p, "elements", 1)]
        for p in dict.fromkeys(r["provider"] for r in rows)
    ]
    headers = ["fitted cost" + ", torch = 1" * on_cpu, "per call", "per tensor", "per element"]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 3))


# ---- pictures ----


def draw(runs: dict[tuple[str, str], Run]) -> dict[str, Figure]:
    """The pictures that :func:`block` refers to, by name."""
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


# ---- goals ----


def goals(runs: dict[tuple[str, str], Run]) -> str:
    """For whoever works on fastclip: its goals, reached or missed by the newest runs."""
    lines: list[tuple[str, str, float, float]] = []  # what, in which unit, measured, at least
    for first, modes in pairs(runs.get(("clip", "cpu"), {"rows": []})["rows"]):
        wanted = CPU_GOALS.get((first["model"], first["dtype"])) if first["input_sets"] == 1 else None
        for mode, goal in zip(MODES, wanted or ()):
            r = modes[mode]["fastclip cpu"]
            lines.append((f"{label(first)}, {mode}", "× torch", (r["vs_torch"] or {}).get("median", math.nan), goal))
    for r in runs.get(("growth", "cpu"), {"rows": []})["rows"]:
        if (r["model"], r["mode"], r["provider"]) == ("10000x16", "not triggered", "fastclip.Clipper"):
            rate = r["tensors"] / r["host_s"]["median"] / 1e6
            lines.append(("Clipper.clip_ on 10,000 × 16", "tensors per µs", rate, 1 / 0.040))
    for device in ("cpu", "cuda"):
        for r in runs.get(("rules", device), {"rows": []})["rows"]:
            if r["model"] == "gpt2-124m" and r["provider"] in ("ZClip", "AutoClip") and r["status"] == "ok":
                lines.append((f"{r['provider']} on {device}", "speed of GlobalNorm", r["vs_torch"]["median"], 1 / 1.15))
        for r in runs.get(("monitor", device), {"rows": []})["rows"]:
            if r["provider"] == "GradMonitor(path)":
                lines.append((f"GradMonitor on {device}", "times 1 % of a step", 0.01 / r["of_step"]["median"], 1))
    for first, modes in pairs(runs.get(("clip", "cuda"), {"rows": []})["rows"]):
        for mode, rivals in modes.items():
            torch = rivals.get(BASELINE, {})
            for name in ("fastclip triton", "fastclip cuda"):
                r = rivals.get(name)
                if mode in GPU_GOALS and r and r["status"] == torch.get("status") == "ok":
                    lines += gpu_lines(f"{label(first)}, {mode}, {name}", r, torch, mode)
    rows = [
        [what, f"{got:.2f}", f"{goal:.4g}", unit, "reached" if got >= goal else "missed"]
        for what, unit, got, goal in lines
    ]
    return tabulate(rows, ["", "measured", "goal", "unit", ""], disable_numparse=True)


def gpu_lines(what: str, r: Row, torch: Row, mode: str) -> list[tuple[str, str, float, float]]:
    def faster(clock: str) -> float:
        return torch[clock]["median"] / r[clock]["median"]

    lines = [
        (what, "of 3 launches spared", 3 - r["launches"], 0),
        (what, "host syncs, times -1", -r["syncs"], 0),
        (what, "of 1 MiB spared", 1 - r["extra_bytes"] / 2**20, 0),
    ]
    if r["model"] == "2000x256":
        return [
            (what, "× less host time", faster("host_s"), 20),
            (what, "× less wall time", faster("wall_s"), 5),
            *lines,
        ]
    if r["elements"] > 100_000_000:
        bandwidth, times_torch = GPU_GOALS[mode]
        lines = [
            (what, "of a copy", r["of_floor"], bandwidth),
            (what, "× torch", faster("device_s"), times_torch),
            *lines,
        ]
    return lines


def main() -> int:
    runs = newest()
    with mpl.rc_context(STYLE):
        for name, figure in draw(runs).items():
            save(figure, PICTURES / f"bench-{name}.svg")
    text = README.read_text()
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        sys.exit(f"{README.name} does not have the markers {BEGIN} and {END}")
    README.write_text(before + block(runs) + after)
    print(goals(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
