"""What one read of the gradients tells."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from .backends import upload
from .table import GradTable


class Stats:
    """The gradients of one call, in numbers, as they were before clipping.

    Everything is a tensor on the first gradient's device; nothing waits for the device until a value is read. T is the
    number of distinct gradients, in the order of the parameters (a parameter without a gradient has no entry). Norms
    and coefficients are float32, or float64 if any gradient is.

    Attributes:
        total_norm: [] p-norm of all gradients as one vector, p being the rule's norm type (2 if it has none).
        coef: [] or [T] what the gradients were multiplied by; -0.0 where an infinite norm made them 0 (inf: NaN).
        clipped: [] bool, whether any gradient was changed.
        tensor_norms: [T] p-norm of each gradient.
        tensor_absmax: [T] largest magnitude of each gradient; NaN where it holds a NaN.
        nonfinite: [T] bool, whether a gradient holds an inf or a NaN.
        names: the T names, where the Clipper was given named parameters, else None.
    """

    coef: Tensor
    clipped: Tensor
    names: tuple[str, ...] | None = None

    def __init__(
        self, norm_type: float, power: Tensor, absmax: Tensor, dtype: torch.dtype, norm: Tensor | None = None
    ) -> None:
        self.norm_type = norm_type
        self.power = power  # [T] float64, sum |g|^p of each tensor
        self.absmax = absmax  # [T] float64
        self._dtype = dtype
        if norm is not None:
            self.norm = norm

    @cached_property
    def norm(self) -> Tensor:
        """[] float64; what `total_norm` is rounded from."""
        if math.isinf(self.norm_type):
            return self.absmax.max()
        if self.norm_type == 0:
            return (self.power != 0).sum().double()  # torch's: the number of tensors that are not all zero
        return _root(self.power.sum(), self.norm_type)

    @cached_property
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
        return ~self.absmax.isfinite()

    def scaled(self, coef: Tensor) -> Stats:
        """The statistics the gradients will have once multiplied by `coef` ([] or [T]): what the next rule sees."""
        factor = coef.abs()
        absmax = torch.where(factor == 0, 0.0, self.absmax * factor)
        if self.norm_type == 0:
            power = torch.where(factor == 0, 0.0, self.power)
        else:
            power = torch.where(factor == 0, 0.0, self.power * factor**self.norm_type)
        return Stats(self.norm_type, self.power if math.isinf(self.norm_type) else power, absmax, self._dtype)

    def decided(self, coef: Tensor, clamped: Tensor | None = None) -> Stats:
        """Record what was done."""
        self.coef = coef.to(self._dtype)
        scaled = (self.coef != 1).any()
        self.clipped = scaled if clamped is None else scaled | clamped
        return self

    def __repr__(self) -> str:
        return (
            f"Stats(total_norm={self.total_norm.item():.6g}, clipped={bool(self.clipped)}, tensors={len(self.power)})"
        )


def measure(table: GradTable, norm_type: float, max_norm: float | None = None) -> tuple[Stats, Tensor | None]:
    """One read of the table's gradients; also the clip coefficient of `max_norm` where a backend fuses that."""
    parts = [group.backend.measure(group, norm_type, max_norm) for group in table.groups]
    if len(parts) == 1:
        power, absmax, norm, coef = parts[0]
        return Stats(norm_type, power, absmax, table.dtype, norm), coef
    if not parts:
        nothing = torch.zeros(0, dtype=torch.float64, device=table.device)
        return Stats(norm_type, nothing, nothing, table.dtype, nothing.sum()), None
    positions = torch.tensor([p for group in table.groups for p in group.positions], device="cpu")
    order = upload(positions.argsort(), torch.int64, table.device)
    power = torch.cat([part.power.to(table.device) for part in parts])[order]
    absmax = torch.cat([part.absmax.to(table.device) for part in parts])[order]
    return Stats(norm_type, power, absmax, table.dtype), None


def _root(power: Tensor, p: float) -> Tensor:
    if p == 2:
        return power.sqrt()
    return power if p in (0, 1) else power.pow(1 / p)
