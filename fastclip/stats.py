"""What one read of the gradients tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import Measurement, upload
from .reading import Numbers
from .reading import root as _root
from .table import GradTable

if TYPE_CHECKING:
    from .members import Members


class Stats:
    """The gradients of one call, in numbers, as they were before clipping.

    Everything is a tensor on the first gradient's device; nothing waits for the device until a value is read. T is the
    number of distinct gradients, in the order of the parameters (a parameter without a gradient has no entry). Norms
    and coefficients are float32, or float64 if any gradient is.

    Attributes:
        total_norm: [] p-norm of all gradients as one vector, p being the rule's norm type (2 if it has none).
        coef: [] or [T] what the gradients were multiplied by, 1 if skipped; -0.0 where an infinite norm made them 0
            (inf: NaN).
        clipped: [] bool, whether any gradient was changed.
        skipped: [] bool, whether nothing was done because of `when`, the GradScaler or ``nonfinite="skip"``.
        tensor_norms: [T] p-norm of each gradient.
        tensor_absmax: [T] largest magnitude of each gradient; NaN where it holds a NaN.
        nonfinite: [T] bool, whether a gradient holds an inf or a NaN, or did before ``nonfinite="zero"``.
        limit: [] limit of the norm of all gradients that was in force, where a rule had one, else None. Of several
            such rules, the last one's.
        zeroed: [T] int64, how many elements ``nonfinite="zero"`` set to 0; else None. The norms are those afterwards.
        names: the T names, where the Clipper was given named parameters, else None.

    For rules:
        step: how many steps the Clipper has taken before this one.
        skip: [] bool, whether nothing will be done; None: it will.
        members(): the parameters that the gradients belong to, :class:`~fastclip.members.Members`.
        sizes(): [T] float64, how many elements each gradient has.
    """

    names: tuple[str, ...] | None = None
    zeroed: Tensor | None = None
    step: int = 0
    _limit: Tensor | float | None = None
    _members: Callable[[], Members] | None = None
    _sizes: Callable[[], Tensor] | None = None

    def __init__(
        self,
        norm_type: float,
        dtype: torch.dtype,
        device: torch.device,
        parts: list[Measurement],
        positions: list[int] | None = None,
        norm: Tensor | None = None,
    ) -> None:
        self.norm_type = norm_type
        self.device = device
        self.count = sum(len(part.power) for part in parts)  # T
        self._dtype = dtype
        self._parts = parts
        self._positions = positions  # of the parts' tensors, one part after the other; None: as they come
        self._norm = norm
        self._coef: Tensor | None = None
        self._clamped: Tensor | None = None
        self.skip: Tensor | None = None

    # Computed anew at every look: none of it is paid for by who does not ask, and after a replay of a CUDA graph it is
    # that replay's.

    @property
    def power(self) -> Tensor:
        """[T] float64, sum |g|^p of each gradient."""
        return self._gathered([part.power for part in self._parts])

    @property
    def absmax(self) -> Tensor:
        """[T] float64; what `tensor_absmax` is rounded from."""
        return self._gathered([part.absmax for part in self._parts])

    @property
    def norm(self) -> Tensor:
        """[] float64; what `total_norm` is rounded from."""
        if self._norm is not None or not self.count:
            return torch.zeros((), dtype=torch.float64, device=self.device) if self._norm is None else self._norm
        if math.isinf(self.norm_type):
            return self.absmax.max()
        if self.norm_type == 0:
            return (self.power != 0).sum().double()  # torch's: the number of tensors that are not all zero
        return _root(self.power.sum(), self.norm_type)

    @property
    def norms(self) -> Tensor:
        """[T] float64; what `tensor_norms` is rounded from."""
        return self.absmax if math.isinf(self.norm_type) else _root(self.power, self.norm_type)

    @property
    def total_norm(self) -> Tensor:
        return self.norm.to(self._dtype)

    @property
    def tensor_norms(self) -> Tensor:
        return self.norms.to(self._dtype)

    @property
    def tensor_absmax(self) -> Tensor:
        return self.absmax.to(self._dtype)

    @property
    def nonfinite(self) -> Tensor:
        return ~self.absmax.isfinite() if self.zeroed is None else self.zeroed > 0

    @property
    def limit(self) -> Tensor | None:
        if isinstance(self._limit, float):
            return torch.full((), self._limit, dtype=self._dtype, device=self.device)
        return None if self._limit is None else self._limit.to(self._dtype)

    @limit.setter
    def limit(self, limit: Tensor | float) -> None:
        self._limit = limit

    def members(self) -> Members:
        """The parameters that the gradients belong to. RuntimeError where only tensors are known."""
        if self._members is None:
            raise RuntimeError("this rule needs to know the parameters: use it in a Clipper")
        return self._members()

    def sizes(self) -> Tensor:
        """[T] float64, the element counts. RuntimeError once the rules have decided."""
        if self._sizes is None:
            raise RuntimeError("sizes() is for rules, while they decide")
        return self._sizes()

    @property
    def coef(self) -> Tensor:
        coef = self._decision().to(self._dtype)
        return coef if self.skip is None else torch.where(self.skip, 1.0, coef)

    @property
    def clipped(self) -> Tensor:
        changed = (self.coef != 1).any()
        changed = changed if self._clamped is None else changed | self._clamped
        return changed if self.zeroed is None else changed | (self.zeroed > 0).any()

    @property
    def skipped(self) -> Tensor:
        if self.skip is None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        return self.skip

    def log(self, tensors: bool = False) -> dict[str, Any]:
        """The statistics as plain Python numbers, read by one copy from the device. Waits for it.

        Args:
            tensors: also ``tensor_norms`` and ``tensor_absmax``, each a dict from a gradient's name, or its index if
                it has none, to its number.

        Returns:
            ``total_norm``, ``limit`` (if there is one), ``coef`` (the smallest), ``clipped``, ``skipped``,
            ``nonfinite`` (how many gradients hold an inf or a NaN) and ``zeroed`` (how many elements
            ``nonfinite="zero"`` set to 0, if that is the policy).
        """
        return Numbers.of(self).log(tensors)

    def pieces(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The tensors that all the others are computed from, and what the host knows."""
        found = {"norm": self.norm, "coef": self._decision(), "absmax": self.absmax}
        if not math.isinf(self.norm_type):
            found["power"] = self.power
        known = {"limit": self._limit} if isinstance(self._limit, float) else {}
        limit = None if known else self._limit
        optional = {"clamped": self._clamped, "skip": self.skip, "limit": limit, "zeroed": self.zeroed}
        return found | {name: piece for name, piece in optional.items() if isinstance(piece, Tensor)}, known

    def scaled(self, coef: Tensor) -> Stats:
        """The statistics the gradients will have once multiplied by `coef` ([] or [T]): what the next rule sees."""
        factor = coef.abs()
        # +0 writes zeros. -0 multiplies: what was not finite becomes NaN, and the rest 0, in whatever power.
        absmax = torch.where(is_zero(coef), 0.0, self.absmax * factor)
        power = self.power
        if not math.isinf(self.norm_type):
            power = torch.where(factor == 0, absmax, power * factor**self.norm_type if self.norm_type else power)
        return self._like(power, absmax)

    def only(self, index: Tensor, members: Members) -> Stats:
        """The statistics of the gradients at `index` ([K] int64), those of `members`, alone."""
        stats = self._like(self.power[index], self.absmax[index])
        stats._members, stats._sizes = lambda: members, lambda: self.sizes()[index]
        return stats

    def _like(self, power: Tensor, absmax: Tensor) -> Stats:
        stats = Stats(self.norm_type, self._dtype, self.device, [Measurement(power, absmax)])
        stats.step, stats.skip, stats._members, stats._sizes = self.step, self.skip, self._members, self._sizes
        return stats

    def decided(self, coef: Tensor, clamped: Tensor | None = None, skip: Tensor | None = None) -> Stats:
        """Record what was done."""
        self._coef, self._clamped, self.skip = coef, clamped, skip
        return self

    def _decision(self) -> Tensor:
        if self._coef is None:
            raise RuntimeError("coef and clipped are known only once the rules have decided")
        return self._coef

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        order = upload(torch.tensor(self._positions, device="cpu").argsort(), torch.int64, self.device)
        return torch.cat([part.to(self.device) for part in parts])[order]

    def __repr__(self) -> str:
        return f"Stats(total_norm={self.total_norm.item():.6g}, clipped={bool(self.clipped)}, tensors={self.count})"


def is_zero(coef: Tensor) -> Tensor:
    """Where it is +0, not -0."""
    return coef.reciprocal() == math.inf


def measure(
    table: GradTable, norm_type: float, max_norm: float | None = None, repair: bool = False
) -> tuple[Stats, Tensor | None]:
    """One read of the table's gradients; also the clip coefficient of `max_norm` where the backends fuse that.

    `repair`: elements that are inf or NaN are set to 0 first, which is another read of the gradients that hold some.
    """
    parts: list[Measurement] = []
    counts: list[Tensor] = []
    chained = len({(group.backend, group.device) for group in table.groups}) == 1 and not repair
    before: Tensor | None = None
    for group in table.groups:
        parts.append(group.backend.measure(group, norm_type, max_norm, before))
        before = parts[-1].total if chained else None
        if repair:
            parts[-1], zeroed = group.backend.repair_(group, parts[-1], norm_type)
            counts.append(zeroed)
    positions = [p for group in table.groups for p in group.positions] if len(parts) > 1 else None
    norm, coef = (parts[-1].norm, parts[-1].coef) if chained else (None, None)
    stats = Stats(norm_type, table.dtype, table.device, parts, positions, norm)
    if repair:
        stats.zeroed = stats._gathered(counts) if counts else torch.zeros(0, dtype=torch.int64, device=table.device)
    return stats, coef
