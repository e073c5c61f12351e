"""What a run was like, in bounded memory: the longer the run, the coarser its record, and no spike falls out of it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(slots=True)
class Range:
    """Some numbers in three: mean, least and largest of those that are finite; NaN if none is."""

    count: int  # of the finite ones
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float | None) -> Range:
        """One number, or none."""
        if value is None or not math.isfinite(value):
            return cls(0, math.nan, math.nan, math.nan)
        return cls(1, value, value, value)

    def add(self, other: Range) -> None:
        """Take the numbers of `other` in."""
        if other.count and self.count:
            self.count += other.count
            self.mean += (other.mean - self.mean) * other.count / self.count
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        elif other.count:
            self.count, self.mean, self.low, self.high = other.count, other.mean, other.low, other.high


@dataclass(slots=True)
class Span:
    """Consecutive records as one.

    Attributes:
        first, last: the steps where it begins and ends.
        count: how many records it is made of.
        loss, norm, coef: of those, leaving out what is not finite; a coefficient is the smallest of its step.
        limit: the last one; NaN without.
        clipped, skipped, nonfinite: in how many of them gradients were changed, the update was skipped, the loss or a
            gradient was not finite.
    """

    first: int
    last: int
    count: int
    loss: Range
    norm: Range
    coef: Range
    limit: float
    clipped: int
    skipped: int
    nonfinite: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> Span:
        """One record, of numbers as in the dict of :meth:`fastclip.Stats.log`, with a step and maybe a loss."""
        step, loss = record["step"], record.get("loss")
        broken = record["nonfinite"] > 0 or not math.isfinite(record["total_norm"])
        return cls(
            step, step, 1, Range.of(loss), Range.of(record["total_norm"]), Range.of(record["coef"]),
            record.get("limit", math.nan), int(record["clipped"]), int(record["skipped"]),
            int(broken or (loss is not None and not math.isfinite(loss))),
        )  # fmt: skip

    def add(self, other: Span) -> None:
        """Take in the records of `other`, which follow."""
        self.last, self.count = other.last, self.count + other.count
        self.loss.add(other.loss)
        self.norm.add(other.norm)
        self.coef.add(other.coef)
        self.limit = self.limit if math.isnan(other.limit) else other.limit
        self.clipped += other.clipped
        self.skipped += other.skipped
        self.nonfinite += other.nonfinite


class Spans:
    """At most `size` spans (an even number), all but the last of `stride` records. Once full, neighbours become one."""

    def __init__(self, size: int) -> None:
        self.size, self.stride = size, 1
        self.spans: list[Span] = []

    def add(self, span: Span) -> None:
        """Take in one record."""
        if self.spans and self.spans[-1].count < self.stride:
            self.spans[-1].add(span)
            return
        if len(self.spans) == self.size:
            for even, odd in zip(self.spans[::2], self.spans[1::2]):
                even.add(odd)
            self.spans = self.spans[::2]
            self.stride *= 2
        self.spans.append(span)

    def rewind(self, step: int) -> None:
        """Forget `step` and all after it, and with them the rest of their spans."""
        while self.spans and self.spans[-1].last >= step:
            self.spans.pop()


class Columns:
    """The heat map: at most `size` columns (an even number) of a norm for each row, all but the last the largest of
    `stride` readings.

    A norm is NaN where there was no gradient, and inf where the gradient held an inf or a NaN.
    """

    def __init__(self, size: int) -> None:
        self.size, self.stride = size, 1
        self.columns: list[Tensor] = []  # float32 [rows], of as many rows as there were then
        self.ends: list[int] = []  # the last step of each
        self._last = 0  # how many readings the last column has

    def add(self, step: int, norms: Tensor) -> None:
        """Take in one reading, [rows]."""
        if self.columns and self._last < self.stride:
            self.columns[-1] = _louder(self.columns[-1], norms.float())
            self.ends[-1] = step
            self._last += 1
            return
        if len(self.columns) == self.size:
            self.columns = [_louder(even, odd) for even, odd in zip(self.columns[::2], self.columns[1::2])]
            self.ends = self.ends[1::2]
            self.stride *= 2
        self.columns.append(norms.float())
        self.ends.append(step)
        self._last = 1

    def rewind(self, step: int) -> None:
        """Forget the columns that hold `step` or later ones."""
        while self.columns and self.ends[-1] >= step:
            self.columns.pop()
            self.ends.pop()
            self._last = self.stride

    def matrix(self, rows: int) -> Tensor:
        """[rows, columns] float32."""
        if not self.columns:
            return torch.empty(rows, 0, dtype=torch.float32, device="cpu")
        return torch.stack([_padded(column, rows) for column in self.columns], 1)


def _louder(a: Tensor, b: Tensor) -> Tensor:
    rows = max(len(a), len(b))
    return torch.fmax(_padded(a, rows), _padded(b, rows))


def _padded(column: Tensor, rows: int) -> Tensor:
    missing = rows - len(column)
    return torch.cat([column, column.new_full((missing,), math.nan)]) if missing else column


def heat(norms: Tensor, missing: Tensor) -> Tensor:
    """Norms of the heat map's rows as its cells: what is not finite as inf, what is missing as NaN."""
    finite = norms.clamp(max=torch.finfo(torch.float32).max)  # as which they are kept
    return torch.where(missing, math.nan, torch.where(norms.isfinite(), finite, math.inf)).float()


class Notice(NamedTuple):
    """A warning: when, of what kind, in which words."""

    step: int
    kind: str
    message: str


class History:
    """All that a picture of a run is drawn from.

    Attributes:
        spans: the run in time, at most `size` :class:`Span`.
        rows: what the heat map's rows are called.
        norm_type: of the norms.
        warnings: the last hundred :class:`Notice`.
    """

    COLUMNS, WARNINGS = 512, 100

    def __init__(self, size: int) -> None:
        self._spans = Spans(size + size % 2)
        self._columns = Columns(self.COLUMNS)
        self.rows: list[str] = []
        self.norm_type = 2.0
        self.warnings: deque[Notice] = deque(maxlen=self.WARNINGS)

    @property
    def spans(self) -> list[Span]:
        """In order; none overlaps another."""
        return self._spans.spans

    @property
    def last(self) -> int:
        """The last step; -1 before the first."""
        return self.spans[-1].last if self.spans else -1

    def add(self, record: dict[str, Any], row_norms: Tensor | None = None) -> None:
        """Take in one step. One that is not after the last replaces it and all that follows: a run was resumed."""
        step = record["step"]
        if step <= self.last:
            self._spans.rewind(step)
            self._columns.rewind(self.last + 1)  # a span of several steps, some of them earlier, is forgotten whole
            self.warnings = deque((w for w in self.warnings if w.step < step), maxlen=self.WARNINGS)
        self._spans.add(Span.of(record))
        if row_norms is not None:
            self._columns.add(step, row_norms)

    def cells(self) -> tuple[list[int], Tensor]:
        """The last step of each column of the heat map, and its norms, float32 [rows, columns]: the largest of the
        column's steps, NaN where there was no gradient, inf where it was not finite."""
        return self._columns.ends, self._columns.matrix(len(self.rows))

    def forget_rows(self, unless: list[int]) -> None:
        """Forget the rows that no column has a norm of, except those at the indices `unless`."""
        cells = self._columns.matrix(len(self.rows))
        kept = ~cells.isnan().all(1)
        kept[unless] = True
        self.rows = [row for row, keep in zip(self.rows, kept.tolist()) if keep]
        self._columns.columns = list(cells[kept].unbind(1))
