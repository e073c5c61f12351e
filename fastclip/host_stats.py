"""Statistics on their way to the host: all of them as one tensor, so that reading them is one copy."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import upload, wide_device

VECTORS = ("absmax", "power", "zeroed")  # whatever T is; coefficients are one for all or [T]


class StatsTensors(NamedTuple):
    """What a :class:`~fastclip.Stats` is computed from, and how it is read."""

    tensors: dict[str, Tensor]
    host_numbers: dict[str, float]  # what the host knew all along
    names: tuple[str, ...] | None
    norm_type: float
    dtype: torch.dtype  # of norms and coefficients
    device: torch.device


class StatsLayout(NamedTuple):
    """What lies where in flattened statistics: numbers first, then vectors."""

    numbers: list[str]
    vectors: dict[str, int]  # and their sizes
    host_numbers: dict[str, float]
    names: tuple[str, ...] | None
    norm_type: float
    dtype: torch.dtype


def flattened(stats: StatsTensors, loss: Tensor | None = None) -> tuple[Tensor, StatsLayout]:
    """All that `stats` tells, and the loss, in one new float64 tensor, without waiting for the device.

    It is on the statistics' device, or on the loss's if only that is no CPU and has float64. Being a copy, it keeps
    these values when the next replay of a CUDA graph writes others to where they were.
    """
    tensors = stats.tensors if loss is None else {**stats.tensors, "loss": loss.detach()}
    layout = _layout(stats, tensors)
    device = stats.device if loss is None or stats.device.type != "cpu" else wide_device(loss.device)
    return torch.cat([_flat(tensors[name], device) for name in (*layout.numbers, *layout.vectors)]), layout


def _layout(stats: StatsTensors, tensors: dict[str, Tensor]) -> StatsLayout:
    vectors = {name: t.numel() for name, t in tensors.items() if t.numel() != 1 or name in VECTORS}
    numbers = [name for name in tensors if name not in vectors]
    return StatsLayout(numbers, vectors, stats.host_numbers, stats.names, stats.norm_type, stats.dtype)


def _flat(piece: Tensor, device: torch.device) -> Tensor:
    """`piece` on `device`, with one dimension; what it is already costs no call."""
    if piece.device != device:
        on_host = piece.device.type == "cpu"
        piece = upload(piece, piece.dtype, device) if on_host else piece.to(device, non_blocking=device.type != "cpu")
    if piece.dtype != torch.float64:
        piece = piece.double()
    return piece if piece.dim() == 1 else piece.reshape(-1)


class HostStats:
    """Statistics on the host. Numbers are rounded as the tensors of Stats are.

    Lists, where Python does what is wanted in one go: right after a training step, with cold caches, that costs a third
    of a call of torch's.
    """

    def __init__(self, host: Tensor, layout: StatsLayout) -> None:
        count = len(layout.numbers)
        vectors = dict(zip(layout.vectors, torch.split_with_sizes(host[count:], list(layout.vectors.values()))))
        self._read(dict(zip(layout.numbers, host[:count].tolist())), vectors, layout)

    @classmethod
    def of(cls, stats: StatsTensors) -> HostStats:
        """What `stats` tells; read by one copy, or by none from where it is already."""
        if stats.device.type != "cpu":
            flat, layout = flattened(stats)
            return cls(flat.cpu(), layout)
        layout = _layout(stats, stats.tensors)
        read = cls.__new__(cls)
        vectors = {name: _flat(stats.tensors[name], stats.device) for name in layout.vectors}
        read._read({name: float(stats.tensors[name].item()) for name in layout.numbers}, vectors, layout)
        return read

    def _read(self, numbers: dict[str, float], vectors: dict[str, Tensor], layout: StatsLayout) -> None:
        self.layout = layout
        self._numbers, self._vectors = {**numbers, **layout.host_numbers}, vectors
        # T float64, where they are those of whole tensors; else empty
        self.absmax: list[float] = vectors["absmax"].tolist() if "absmax" in vectors else []
        # T float64, sum |g|^p; for p of inf max |g|
        self.power: list[float] = vectors["power"].tolist() if "power" in vectors else self.absmax
        self.count = max(len(self.power), len(self.absmax))  # T, or 0
        self.total_norm = self._rounded("norm")
        self.loss = self._numbers.get("loss")
        self.skipped = bool(self._numbers.get("skip"))
        self.broken: list[int] = []  # gradients that hold, or did before they were zeroed, an inf or a NaN
        if "zeroed" in self._vectors:
            self.broken = [i for i, count in enumerate(self._vectors["zeroed"].tolist()) if count]
        elif not math.isfinite(sum(self.absmax)):  # in the common case the sum tells that all are finite
            self.broken = [i for i, most in enumerate(self.absmax) if not math.isfinite(most)]
        over_ranks = self._numbers.get("nonfinite_count")  # of which this rank may know only some
        self.nonfinite = len(self.broken) if over_ranks is None or math.isnan(over_ranks) else round(over_ranks)

        self.coef: float | Tensor  # one for all, or [T] float32 or float64; 1 if skipped
        if self.skipped or "coef" in self._numbers:
            self.coef = self.least = 1.0 if self.skipped else self._rounded("coef")
            changed = self.coef != 1
        else:
            self.coef = self._vectors["coef"].to(layout.dtype)
            self.least = self.coef.min().item() if len(self.coef) else 1.0
            changed = bool((self.coef != 1).any())
        self.zeroed: int | None = None  # elements that were set to 0, where that is the policy
        if "zeroed" in vectors:
            self.zeroed = round(self._numbers.get("zeroed_count", float(vectors["zeroed"].sum())))
        self.clipped = changed or bool(self._numbers.get("clamped")) or bool(self.zeroed)

    def vector(self, name: str) -> Tensor:
        """[T] float64: "absmax", "power" or "zeroed", if there."""
        if name in self._vectors:
            return self._vectors[name]
        if "absmax" in self._vectors:
            return self._vectors["absmax"]
        return torch.zeros(0, dtype=torch.float64, device="cpu")

    @property
    def norms(self) -> Tensor:
        """[T] float64."""
        p = self.layout.norm_type
        return self.vector("absmax") if math.isinf(p) else root(self.vector("power"), p)

    @property
    def keys(self) -> tuple[str, ...] | range:
        """What gradients are called: their names, or else their indices."""
        return range(self.count) if self.layout.names is None else self.layout.names[: self.count]

    def log(self, tensors: bool = False) -> dict[str, Any]:
        """As :meth:`fastclip.Stats.log` describes."""
        numbers: dict[str, Any] = {"total_norm": self.total_norm}
        if "limit" in self._numbers:
            numbers["limit"] = self._rounded("limit")
        numbers |= {"coef": self.least, "clipped": self.clipped, "skipped": self.skipped, "nonfinite": self.nonfinite}
        if self.zeroed is not None:
            numbers["zeroed"] = self.zeroed
        if tensors:
            for name, values in (("tensor_norms", self.norms), ("tensor_absmax", self.vector("absmax"))):
                numbers[name] = dict(zip(self.keys, values.to(self.layout.dtype).tolist()))
        return numbers

    def _rounded(self, name: str) -> float:
        value = self._numbers[name]
        return value if self.layout.dtype == torch.float64 else ctypes.c_float(value).value


def root(power: Tensor, p: float) -> Tensor:
    """The p-norm whose p-th power is `power`; for p of 0 that itself."""
    if p == 2:
        return power.sqrt()
    return power if p in (0, 1) else power.pow(1 / p)
