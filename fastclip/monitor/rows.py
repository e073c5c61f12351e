"""Which gradient is which, which share a row of the heat map, and which are the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..host_stats import HostStats, root

TOP_NORMS = 3


class Register:
    """Gives each gradient its index among all ever seen, for as long as the run lasts, and its row, of at most `most`.

    Where the gradients first seen are few, each has a row; where they are many, those share one whose names begin
    alike, for as many parts of the name ("h.0.attn") as leave few enough; and neighbours, where no part does. Gradients
    that come later follow the same rule, or share the last row when there is no other.
    """

    RECENT = 16  # sets of names; gradients that come and go have many

    def __init__(self, most: int) -> None:
        self.most = most
        self.names: list[str] = []
        self.rows: list[str] = []
        self.row: list[int] = []  # of each name
        self._index: dict[str, int] = {}
        self._row: dict[str, int] = {}
        self._key: Callable[[str], str] | None = None
        self._recent: dict[tuple[str, ...] | range, Tensor] = {}

    def index(self, names: tuple[str, ...] | range) -> Tensor:
        """The indices, int64 [T], of gradients with these names or, where they have none, these places."""
        if names not in self._recent:
            if len(self._recent) == self.RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[names] = self._found([str(name) for name in names])
        return self._recent[names]

    def _found(self, names: list[str]) -> Tensor:
        if self._key is None and names:
            self._key = sharing(names, self.most)
        for name in names:
            if name not in self._index:
                self._index[name] = len(self.names)
                self.names.append(name)
                key = self._key(name) if self._key else name
                if key not in self._row:
                    if len(self.rows) < self.most:
                        self.rows.append(key)
                    self._row[key] = len(self.rows) - 1
                self.row.append(self._row[key])
        return torch.tensor([self._index[name] for name in names], dtype=torch.int64, device="cpu")


class Maxima:
    """The largest norm and the largest element of each gradient since they were last taken; NaN where one was.

    No tensor is changed in place: those that were made in inference mode cannot be outside of it.
    """

    def __init__(self, register: Register) -> None:
        self._register = register
        self._power = self._absmax = torch.empty(
            0, dtype=torch.float64, device="cpu"
        )  # of all ever seen; -1: not since
        self._index = torch.empty(0, dtype=torch.int64, device="cpu")
        self._lately: tuple[Tensor, Tensor] | None = None  # of those of `_index`, while they are the same

    def add(self, index: Tensor, read: HostStats) -> None:
        """Take in the gradients of one step, which have these indices."""
        if self._lately is None or index is not self._index:
            self._gather()
            self._index, self._lately = index, (read.vector("power").clone(), read.vector("absmax").clone())
        else:
            power, absmax = self._lately
            self._lately = (torch.maximum(power, read.vector("power")), torch.maximum(absmax, read.vector("absmax")))

    def take(self, norm_type: float) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and largest element of each row, float64 [rows], and whether it had no gradient; then begin anew."""
        self._gather()
        has_gradient = self._absmax != -1
        row = torch.tensor(self._register.row, dtype=torch.int64, device="cpu")[has_gradient]
        zeros = torch.zeros(len(self._register.rows), dtype=torch.float64, device="cpu")
        absmax = norms = zeros.scatter_reduce(0, row, self._absmax[has_gradient], "amax")
        if not math.isinf(norm_type):
            norms = root(zeros.index_add(0, row, self._power[has_gradient]), norm_type)
        self._power, self._absmax = torch.full_like(self._power, -1), torch.full_like(self._absmax, -1)
        return norms, absmax, torch.ones(len(zeros), dtype=torch.bool, device="cpu").index_fill(0, row, False)

    def _gather(self) -> None:
        if self._lately is None:
            return
        missing = len(self._register.names) - len(self._power)
        if missing:
            new = self._power.new_full((missing,), -1.0)
            self._power, self._absmax = torch.cat([self._power, new]), torch.cat([self._absmax, new])
        self._power, self._absmax = (
            most.index_copy(0, self._index, torch.maximum(most[self._index], values))
            for most, values in zip((self._power, self._absmax), self._lately)
        )
        self._lately = None


def sharing(names: Iterable[str], most: int) -> Callable[[str], str]:
    """A function from a name to what its row is called, so that these names have at most `most` rows."""
    names = list(names)
    deepest = max((name.count(".") + 1 for name in names), default=1)
    for depth in range(deepest, 0, -1):
        if len({_prefix(name, depth) for name in names}) <= most:
            return partial(_prefix, depth=depth)
    width = -(-len(names) // most)
    runs = [names[i : i + width] for i in range(0, len(names), width)]
    called = {name: f"{run[0]} … {run[-1]}" if len(run) > 1 else run[0] for run in runs for name in run}
    return partial(_called, called)


def _called(called: dict[str, str], name: str) -> str:
    return called.get(name, "others")


def _prefix(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def top_norms(read: HostStats) -> dict[str, float]:
    """The largest norms; of gradients that are not finite before all."""
    p = read.layout.norm_type
    powers = [math.inf if math.isnan(power) else power for power in read.power] if read.nonfinite else read.power[:]
    largest: dict[str, float] = {}
    for _ in range(min(TOP_NORMS, read.count)):
        at = powers.index(max(powers))
        power = read.power[at]
        largest[str(read.keys[at])] = math.sqrt(power) if p == 2 else _root(power, p)
        powers[at] = -1.0
    return largest


def _root(power: float, p: float) -> float:
    return power if math.isinf(p) else root(torch.tensor(power, dtype=torch.float64, device="cpu"), p).item()
