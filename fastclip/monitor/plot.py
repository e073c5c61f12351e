"""The picture of a run: loss, norm, coefficient, and a heat map of norms, over the same steps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..host_stats import root
from .history import History, Range, Span
from .rows import sharing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which people who see few colours can tell apart; shapes and places differ too.
BLUE, ORANGE, RED, GREEN, GRAY, SKY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#767676", "#56B4E9"
MOST_ROWS = 36  # whose names can be read
RATE_STEPS = 100  # that the clip rate looks back, or one span
FORMATS = (".png", ".pdf", ".svg")


def draw(history: History, path: str | os.PathLike[str] | None = None, title: str = "") -> Figure:
    """Draw a run.

    Where spans hold several steps, lines are means and the pale bands reach from the least to the largest.

    Args:
        history: of a monitor, or from :func:`fastclip.monitor.load`.
        path: where to save the picture: .png, .pdf or .svg.
        title: above it.

    Raises:
        ImportError: values is no matplotlib.
        ValueError: values is no step to draw, or `path` ends otherwise.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing needs matplotlib: pip install 'torch-fastclip[demo]' ({error})") from error
    if path is not None and os.path.splitext(path)[1] not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {os.fspath(path)!r}")
    if not (spans := history.spans):
        raise ValueError("values is nothing to draw: no step has been recorded yet")

    labels, cells = _drawn_rows(history)
    has_loss = any(span.loss.count for span in spans)
    heights = [2.0] * has_loss + [2.4, 1.3] + [max(1.6, 0.5 + 0.16 * len(labels))] * bool(labels)
    figure = Figure(figsize=(10, sum(heights) + 1.0), layout="constrained")
    axes = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    summary = _printable(_summary(history, title))
    figure.suptitle(summary, x=0.01, ha="left", fontsize="medium", parse_math=False)
    remaining = iter(axes)
    if has_loss:
        _draw_loss(next(remaining), spans)
    _draw_norm(next(remaining), spans)
    _draw_coefficient(next(remaining), spans)
    if labels:
        _draw_heat(next(remaining), history, labels, cells)
    for ax in axes[: 3 if has_loss else 2]:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        _legend(ax, *ax.get_legend_handles_labels())
    axes[0].set_xlim(spans[0].first - 0.5, spans[-1].last + 0.5)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _summary(history: History, title: str) -> str:
    spans = history.spans
    steps, clipped, skipped = (sum(getattr(s, name) for s in spans) for name in ("count", "clipped", "skipped"))
    parts = [f"{steps:,} steps", f"{clipped / steps:.0%} clipped"] + [f"{skipped:,} skipped"] * bool(skipped)
    kinds = dict.fromkeys(notice.kind for notice in history.warnings)
    if kinds:
        parts.append(f"warnings: {', '.join(kinds)}")
    return (f"{title}:  " if title else "") + ", ".join(parts)


def _draw_loss(ax: Axes, spans: list[Span]) -> None:
    _draw_range(ax, spans, lambda span: span.loss, BLUE, "loss")
    least = min((span.loss.low for span in spans if span.loss.count), default=0.0)
    most = max((span.loss.high for span in spans if span.loss.count), default=1.0)
    if least > 0 and most > 20 * least:
        ax.set_yscale("log")
    ax.set_ylabel("loss")


def _draw_norm(ax: Axes, spans: list[Span]) -> None:
    _draw_range(ax, spans, lambda span: span.norm, BLUE, "norm before clipping")
    ax.set_ylabel("gradient norm")
    if any(span.norm.count and span.norm.high > 0 for span in spans):
        ax.set_yscale("log")
    steps, limits = _steps(spans), [_drawable(span.limit) for span in spans]
    if not all(math.isnan(limit) for limit in limits):
        ax.plot(steps, limits, color=ORANGE, linestyle="--", linewidth=1.5, label="limit")
    clipped = [(x, _drawable(span.norm.high)) for x, span in zip(steps, spans) if span.clipped and span.norm.count]
    if clipped:
        ax.plot(*zip(*clipped), ".", color=ORANGE, markersize=4, label="clipped", rasterized=True, zorder=3)
    # At the edges, where they are seen whatever the norm is.
    _draw_marks(ax, [x for x, s in zip(steps, spans) if s.nonfinite], 0.96, "v", RED, "not finite")
    _draw_marks(ax, [x for x, s in zip(steps, spans) if s.skipped], 0.04, "x", "black", "skipped")


def _draw_marks(ax: Axes, steps: list[float], height: float, marker: str, color: str, label: str) -> None:
    if steps:
        ax.plot(
            steps, [height] * len(steps), marker, color=color, markersize=6, label=label, clip_on=False, zorder=4,
            transform=ax.get_xaxis_transform(), rasterized=True,
        )  # fmt: skip


def _draw_coefficient(ax: Axes, spans: list[Span]) -> None:
    steps, rates = _steps(spans), _clip_rates(spans)
    ax.fill_between(
        steps, rates, step="mid", color=SKY, alpha=0.35, linewidth=0, label=f"clip rate of {RATE_STEPS} steps"
    )
    _draw_range(ax, spans, lambda span: span.coef, GREEN, "coefficient (smallest)")
    ax.set_ylim(-0.04, 1.04)
    ax.set_ylabel("coefficient")


def _clip_rates(spans: list[Span]) -> list[float]:
    """At each span the share of clipped ones in the last RATE_STEPS steps, or in itself where it has as many."""
    rates, start, clipped, count = [], 0, 0, 0
    for span in spans:
        clipped, count = clipped + span.clipped, count + span.count
        while count - spans[start].count >= RATE_STEPS:
            clipped, count = clipped - spans[start].clipped, count - spans[start].count
            start += 1
        rates.append(clipped / count)
    return rates


def _draw_range(ax: Axes, spans: list[Span], chosen: Callable[[Span], Range], color: str, label: str) -> None:
    steps, ranges = _steps(spans), [chosen(span) for span in spans]
    mean, low, high = ([_drawable(getattr(r, name)) for r in ranges] for name in ("mean", "low", "high"))
    ax.plot(steps, mean, color=color, linewidth=1, label=label)
    if any(span.count > 1 for span in spans):
        ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def _drawable(value: float) -> float:
    """`value`, its size within the powers of ten that a logarithmic axis can put ticks around."""
    if value == 0 or not math.isfinite(value):
        return value  # what is not finite is left out
    return math.copysign(min(max(abs(value), 1e-120), 1e120), value)


def _steps(spans: list[Span]) -> list[float]:
    return [(span.first + span.last) / 2 for span in spans]


def _drawn_rows(history: History) -> tuple[list[str], Tensor]:
    """At most MOST_ROWS names, and the norms [rows, columns] of the gradients that they stand for together."""
    _, cells = history.cells()
    if not cells.numel():
        return [], cells
    key = sharing(history.rows, MOST_ROWS)
    labels = list(dict.fromkeys(key(row) for row in history.rows))
    if len(labels) == len(history.rows):
        return labels, cells
    row = torch.tensor([labels.index(key(name)) for name in history.rows], dtype=torch.int64, device="cpu")
    p = history.norm_type
    zeros = torch.zeros(len(labels), cells.shape[1], dtype=torch.float64, device="cpu")
    values = cells.double().nan_to_num(0.0, posinf=math.inf)
    if math.isinf(p):
        together = zeros.index_reduce(0, row, values, "amax")
    else:
        together = root(zeros.index_add(0, row, values ** (p or 1)), p)
    some = zeros.index_add(0, row, (~cells.isnan()).double())
    return labels, torch.where(some > 0, together, math.nan)


def _draw_heat(ax: Axes, history: History, labels: list[str], cells: Tensor) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    ordinary = cells[cells.isfinite() & (cells > 0)]
    low, high = (ordinary.min().item(), ordinary.max().item()) if len(ordinary) else (1.0, 1.0)
    low = max(low, high * 1e-6)  # a row of rounding errors must not take the colours from the others
    shown = torch.where(cells > 0, cells.clamp(min=low), torch.where(cells == 0, low / 10, cells))
    ends = [*history.cells()[0][:-1], history.last]  # the last column goes on to the end
    edges = [history.spans[0].first - 0.5] + [step + 0.5 for step in ends]
    extremes = {"not finite": RED, "exactly zero": "white", "no gradient": "#CCCCCC"}
    colors = colormaps["viridis"].with_extremes(over=RED, under="white", bad="#CCCCCC")
    grid = ax.pcolormesh(
        edges,
        range(len(labels) + 1),
        _masked(shown),
        norm=LogNorm(0.999 * low, 1.001 * high),
        cmap=colors,
        rasterized=True,
    )
    ax.set_yticks(
        [i + 0.5 for i in range(len(labels))], [_short(label) for label in labels], fontsize=7, parse_math=False
    )
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    bar = ax.figure.colorbar(grid, ax=ax, pad=0.01, aspect=30)
    bar.set_label("norm of each gradient")
    present = {"not finite": cells.isposinf(), "exactly zero": cells == 0, "no gradient": cells.isnan()}
    patches = [
        Patch(facecolor=extremes[name], edgecolor=GRAY, label=name) for name, where in present.items() if where.any()
    ]
    _legend(ax, patches, [patch.get_label() for patch in patches])


def _legend(ax: Axes, handles: list[Any], labels: list[Any]) -> None:
    """In a line above the axes, where it covers nothing."""
    if handles:
        ax.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False,
            fontsize="small", borderpad=0.1, borderaxespad=0.1, columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip


def _masked(values: Tensor) -> Any:
    import numpy as np

    return np.ma.masked_invalid(np.where(np.isposinf(values.numpy()), 3e38, values.numpy()))


def _printable(text: str) -> str:
    """`text` in one line, without the halves of surrogate pairs, which nothing can draw."""
    return " ".join(text.encode(errors="replace").decode().split())


def _short(label: str, most: int = 36) -> str:
    label = _printable(label)
    return label if len(label) <= most else f"{label[: most // 2 - 1]}…{label[-most // 2 :]}"
