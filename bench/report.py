"""docs/benchmarks.md and its pictures, and what README.md says of speed, from the runs in bench/results/.

    python -m bench.report

Of each kind of run and device the newest counts. CPU results are shown as ratios only: they were measured side by side,
while a shared machine's times mean little by themselves. The same results give the same text and the same pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tabulate import tabulate

from . import pictures
from .backward import CLIPPED, HOOKED
from .backward import table as backward_table
from .goals import goals
from .isas import table as isas_table
from .memory import IN_BACKWARD
from .memory import table as memory_table
from .method import ROOT
from .models import find
from .platform import table as platform_table
from .providers import BASELINE
from .runs import MODES, NAMES, Row, Run, curve, label, newest, ours, pairs, times

README, INDEX, PAGE = ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin, written by bench.report -->", "<!-- bench:end -->"
HEADLINE = "<!-- bench:headline, written by bench.report -->"
HEADLINE_OF = ("gpt2-124m", "bf16")
IN_BRIEF = (("gpt2-124m", "fp32"), ("gpt2-124m", "bf16"), ("resnet50", "fp32"), ("llama-3.2-1b", "bf16"),
            ("2000x256", "fp32"))  # fmt: skip

GPU_COMPARED = ("fastclip triton", "fastclip cuda", "torch foreach", "torch.compile", "apex", "transformer engine")
MEMORY_INTRO = (
    "The peak memory of a training step, in bytes of all gradients (G), with one sequence of 16 tokens: parameters, "
    "AdamW's two states and gradients are nearly all of it. *At most* leaves out the largest gradient, that of the "
    "tied embedding, which is complete only when backward ends:"
)
RULES_INTRO = (
    "What a rule costs: `Clipper.clip_()` with each where it has nothing to clip (`AGC` also reads the parameters, "
    "and the gradients once more)"
)


def texts(runs: dict[tuple[str, str], Run]) -> dict[Path, list[str]]:
    """What is generated of each document: each text from its marker to the next END."""
    return {README: [headline(runs), brief(runs)], INDEX: [headline(runs)], PAGE: [block(runs)]}


def headline(runs: dict[tuple[str, str], Run]) -> str:
    """The first sentence of all, with one number."""
    rows = runs["clip", "cpu"]["rows"]
    row = next(modes for first, modes in pairs(rows) if (first["model"], first["dtype"]) == HEADLINE_OF)
    ratio = row["not triggered"]["fastclip cpu"]["vs_torch"]["median"]
    return (
        f"{HEADLINE}\n"
        f"Gradient clipping for PyTorch by changing one line: **{times(ratio)}** as fast as torch's `clip_grad_norm_` "
        f"on\nthe bfloat16 gradients of GPT-2 (on a CPU, nothing to clip), and with an exact norm.\n"
        f"{END}"
    )


def brief(runs: dict[tuple[str, str], Run]) -> str:
    """README's table: a few models, for each device that was measured."""
    parts = [f"{BEGIN}\n<!-- Do not edit: see docs/benchmarks.md. -->"]
    for device in ("cpu", "cuda"):
        if clip := runs.get(("clip", device)):
            step = runs.get(("step", device), {"rows": []})
            on = f"{clip['machine']['name']}, {clip['threads']} threads" if device == "cpu" else clip["machine"]["name"]
            parts += [
                f"Times as fast as torch {clip['versions']['torch']}, on the same gradients ({on}). The last column: "
                f"beside torch's clip and its fused AdamW."
            ]
            parts += [brief_table(clip["rows"], step["rows"]), *inside_backward(runs, device)]
    if ("clip", "cuda") not in runs:
        parts += ["GPUs have not been measured yet."]
    return "\n\n".join([*parts, END])


def inside_backward(runs: dict[tuple[str, str], Run], device: str) -> list[str]:
    """A sentence on what is done while backward runs, if it was measured."""
    words = []
    if backward := runs.get(("backward", device)):
        steps = {r["provider"]: r["step_vs_torch"]["median"] for r in backward["rows"]}
        words.append(
            f"the clip and AdamW after a backward pass that has [measured the norm](docs/optimizer.md) take "
            f"{steps[HOOKED]:.2f}× the time of torch's fused AdamW alone ({steps[CLIPPED]:.2f}× with torch's clip)"
        )
    if memory := runs.get(("memory", device)):
        saved = {
            r["model"]: r["saved_of_gradients"]
            for r in memory["rows"]
            if r["provider"] == IN_BACKWARD and r["status"] == "ok"
        }
        words.append(
            f"stepping inside backward takes {saved['gpt2-124m']:.0%} of the gradients' bytes less memory "
            f"({saved['gpt2-774m']:.0%} of those of GPT-2 774M in bfloat16)"
        )
    return [f"GPT-2 124M in fp32: {'; '.join(words)}."] if words else []


def brief_table(rows: list[Row], steps: list[Row]) -> str:
    lines = []
    fused = {
        (r["model"], r["dtype"]): times(r["vs_torch"]["median"])
        for r in steps
        if (r["provider"], r["optimizer"], r["mode"]) == ("fastclip.optim", "AdamW", "triggered") and r["vs_torch"]
    }
    for first, modes in pairs(rows):
        key = first["model"], first["dtype"]
        if key in IN_BRIEF and first["input_sets"] == 1 and set(MODES) <= set(modes):
            measured = [modes[mode].get(ours(rows)) for mode in MODES]
            cells = [f"**{times(r['vs_torch']['median'])}**" if r and r["vs_torch"] else "" for r in measured]
            lines.append([label(first), *cells, fused.get(key, "")])
    headers = ["gradients", *MODES.values(), "clip and step, `fastclip.optim.AdamW`"]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 3))


def block(runs: dict[tuple[str, str], Run]) -> str:
    """What stands between the markers of docs/benchmarks.md."""
    parts = [BEGIN, "<!-- Do not edit: `make bench` measures anew, `python -m bench.report` writes it again. -->"]
    if clip := runs.get(("clip", "cpu")):
        parts += ["## CPU", cpu_intro(clip), picture("cpu-ratio", "how many times faster than torch, by model")]
        parts += [cpu_table(clip["rows"])]
        parts += [picture("cpu-floor", "share of the machine's own speed of memory that fastclip and torch reach")]
    if growth := runs.get(("growth", "cpu")):
        parts += [picture("cpu-growth", "how the time of a call grows with tensors and with elements")]
        parts += [growth_words(growth["rows"])]
    if step := runs.get(("step", "cpu")):
        parts += ["Clip and optimizer step together, beside torch's clip and torch's fused optimizer:"]
        parts += [step_table(step["rows"])]
    if backward := runs.get(("backward", "cpu")):
        parts += [backward_words(backward), backward_table(backward["rows"], "pipe")]
    if memory := runs.get(("memory", "cpu")):
        parts += [MEMORY_INTRO, memory_table(memory["rows"], "pipe")]
    if rules := runs.get(("rules", "cpu")):
        parts += [f"{RULES_INTRO}:", rules_table(rules["rows"])]
    if monitor := runs.get(("monitor", "cpu")):
        parts += [monitor_words(monitor["rows"])]
    if platform := runs.get(("platform", "cpu")):
        parts += ["## Without a compiler", platform_words(platform), platform_table(platform["rows"], "pipe")]
    if isas := runs.get(("isas", "cpu")):
        parts += ["## Instruction sets", ISAS_INTRO, isas_table(isas["rows"], "pipe")]
    if distributed := runs.get(("distributed", "cpu")):
        parts += ["## Ranks", distributed_words(distributed), distributed_table(distributed["rows"])]
        parts += [message_table(distributed["rows"])]
    parts += ["## GPU"]
    if clip := runs.get(("clip", "cuda")):
        parts += [gpu_intro(clip), picture("cuda-ratio", "how many times faster than torch, by model")]
        parts += [gpu_table(clip["rows"]), picture("cuda-bandwidth", "bandwidth against that of a copy")]
        if growth := runs.get(("growth", "cuda")):
            parts += [picture("cuda-growth", "how the host's time grows with tensors, and the call's with elements")]
            parts += [growth_words(growth["rows"])]
        if step := runs.get(("step", "cuda")):
            parts += ["Clip and optimizer step together, beside torch's clip and torch's fused optimizer:"]
            parts += [step_table(step["rows"])]
        if memory := runs.get(("memory", "cuda")):
            parts += [MEMORY_INTRO, memory_table(memory["rows"], "pipe")]
        if rules := runs.get(("rules", "cuda")):
            parts += [f"{RULES_INTRO}:", rules_table(rules["rows"])]
        if monitor := runs.get(("monitor", "cuda")):
            parts += [monitor_words(monitor["rows"])]
    else:
        parts += ["Not measured yet: `make gpu` on a machine with one."]
    return "\n\n".join([*parts, END]).replace(f"{BEGIN}\n\n", f"{BEGIN}\n")


def picture(name: str, words: str) -> str:
    return f"![{words[0].upper()}{words[1:]}](bench-{name}.svg)"


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


ISAS_INTRO = (
    "The kernels of each instruction set, on GPT-2 124M's gradients, as a share of the floor: plain passes of torch "
    "over the same bytes, taken in turns with them."
)


def backward_words(run: Run) -> str:
    first = run["rows"][0]
    return (
        f"Backward, and what comes after it, of {NAMES[first['model']]} with a sequence of {first['tokens']} tokens: "
        f"times as long as torch's fused AdamW takes without any clip, and the hooks of `measure_in_backward=True` as "
        f"part of backward (medians of {first['rounds']} rounds in turns, 20th and 80th percentile):"
    )


def platform_words(run: Run) -> str:
    return (
        f"Each packer, and the way without kernels, as times as fast as torch {run['versions']['torch']}'s "
        f"`clip_grad_norm_` on a CPU ({run['threads']} threads). [Backends and platforms](backends.md) says which runs "
        f"where."
    )


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


def distributed_words(run: Run) -> str:
    truths = [r for r in run["rows"] if r["case"] == "truth" and r["provider"] == "fastclip"]
    ratios = " and ".join(f"{r['vs_torch']['median']:.1f}× torch on {r['model']}" for r in truths)
    return (
        f"What a call costs the host on one of eight ranks, as times faster than torch {run['versions']['torch']} (its "
        f"fake process group, one thread; DTensors of 2 × 16 elements a rank), and how many messages it sends. On "
        f"real ranks (gloo, processes of one machine, 60 DTensors) `clip_norm_` is {ratios}. *Per mesh* "
        f"and *per sharding* are other frameworks' algorithms, written anew (`bench/distributed.py`)."
    )


def distributed_table(rows: list[Row]) -> str:
    """A line for each provider; a call's nanoseconds per DTensor relative to torch, and what the first call takes."""
    rows = [r for r in rows if r["case"] == "host"]
    counts = list(dict.fromkeys(r["tensors"] for r in rows))
    fastest = {r["tensors"]: r["first_s"] for r in rows if r["provider"] == "fastclip"}
    lines = []
    for name in dict.fromkeys(r["provider"] for r in rows):
        cells = {r["tensors"]: r for r in rows if r["provider"] == name and r["status"] == "ok"}
        line = [name]
        for count in counts:
            r = cells.get(count)
            line.append(f"{r['vs_torch']['median']:.1f}×" if r and r["vs_torch"] else "–")
        for count in counts:
            r = cells.get(count)
            line.append(f"{r['first_s'] / fastest[count]:,.1f}" if r else "–")
        lines.append(line)
    headers = [""] + [f"{count:,} DTensors" for count in counts]
    headers += [f"first call, {count:,} (fastclip = 1)" for count in counts]
    alignment = ("left", *["right"] * (2 * len(counts)))
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def message_table(rows: list[Row]) -> str:
    rows = [r for r in rows if r["case"] == "messages"]
    kinds = list(dict.fromkeys(r["model"] for r in rows))
    lines = []
    for name in dict.fromkeys(r["provider"] for r in rows):
        cells = {r["model"]: r for r in rows if r["provider"] == name}
        lines.append([name, *(str(cells[k]["messages"]) if cells[k]["status"] == "ok" else "raises" for k in kinds)])
    headers = ["messages of a call", *kinds]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * len(kinds)))


# ---- growth ----


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


def main() -> int:
    runs = newest()
    pictures.save_all(runs)
    for path, written in texts(runs).items():
        text = path.read_text()
        for each in written:
            begin = each.splitlines()[0]
            before, found, rest = text.partition(begin)
            _, ended, after = rest.partition(END)
            if not (found and ended):
                sys.exit(f"{path.name} does not have the markers {begin} and {END}")
            text = before + each + after
        path.write_text(text)
    print(goals(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
