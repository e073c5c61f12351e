"""What one read of the gradients tells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends import Measurement, upload
from .host_stats import HostStats, StatsTensors
from .host_stats import root as _root


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
        step: how many steps the Clipper had taken before this one.
    """

    names: tuple[str, ...] | None = None
    zeroed: Tensor | None = None
    step: int = 0

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
        self._limit: Tensor | float | None = None
        self.skip: Tensor | None = None

    # Computed anew at every look: none of it is paid for by who does not ask, and after a replay of a CUDA graph it is
    # that replay's.

    @property
    def power(self) -> Tensor:
        """[T] float64, sum |g|^p of each gradient."""
        return self.gathered([part.power for part in self._parts])

    @property
    def absmax(self) -> Tensor:
        """[T] float64; what `tensor_absmax` is rounded from."""
        return self.gathered([part.absmax for part in self._parts])

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
        return HostStats.of(self.tensors()).log(tensors)

    def tensors(self) -> StatsTensors:
        """The tensors that all the others are computed from, and the numbers that the host knows."""
        tensors = {"norm": self.norm, "coef": self._decision(), "absmax": self.absmax}
        if not math.isinf(self.norm_type):
            tensors["power"] = self.power
        host_numbers = {"limit": self._limit} if isinstance(self._limit, float) else {}
        limit = None if host_numbers else self._limit
        optional = {"clamped": self._clamped, "skip": self.skip, "limit": limit, "zeroed": self.zeroed}
        tensors |= {name: t for name, t in optional.items() if isinstance(t, Tensor)}
        return StatsTensors(tensors, host_numbers, self.names, self.norm_type, self._dtype, self.device)

    def scaled(self, coef: Tensor) -> Stats:
        """The statistics the gradients will have once multiplied by `coef` ([] or [T]): what the next rule sees."""
        factor = coef.abs()
        # +0 writes zeros. -0 multiplies: what was not finite becomes NaN, and the rest 0, in whatever power.
        absmax = torch.where(is_zero(coef), 0.0, self.absmax * factor)
        power = self.power
        if not math.isinf(self.norm_type):
            power = torch.where(factor == 0, absmax, power * factor**self.norm_type if self.norm_type else power)
        return self._like(power, absmax)

    def only(self, index: Tensor) -> Stats:
        """The statistics of the gradients at `index` ([K] int64) alone."""
        return self._like(self.power[index], self.absmax[index])

    def _like(self, power: Tensor, absmax: Tensor) -> Stats:
        stats = Stats(self.norm_type, self._dtype, self.device, [Measurement(power, absmax)])
        stats.step, stats.skip = self.step, self.skip
        return stats

    def record(
        self,
        coef: Tensor,
        limit: Tensor | float | None = None,
        clamped: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Stats:
        """Take down what was decided."""
        self._coef, self._limit, self._clamped, self.skip = coef, limit, clamped, skip
        return self

    def _decision(self) -> Tensor:
        if self._coef is None:
            raise RuntimeError("coef and clipped are known only once the rules have decided")
        return self._coef

    def gathered(self, parts: list[Tensor]) -> Tensor:
        """What each part has of its tensors, [T of the part], as [T] in the order of the parameters."""
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
