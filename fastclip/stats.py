"""What one read of the gradients tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Measurement, upload
from .host_stats import HostStats, StatsTensors
from .host_stats import root as _root


class OverRanks(NamedTuple):
    """What was summed over several ranks, and how to go on: see :mod:`fastclip.distributed`."""

    nonfinite: Tensor  # [] how many gradients hold an inf or a NaN, each part of a sharded one by itself
    zeroed: Tensor | None  # [] how many elements ``nonfinite="zero"`` set to 0
    power: bool  # whether power and absmax of each tensor are those of the whole tensor, not only of this rank's part
    absmax: bool
    shared: Tensor | None = None  # [T] 1 / how many stages hold each; None: 1
    over_stages: Callable[[Tensor, bool], Tensor] | None = None  # -> a sum (or maximum) over the pipeline stages


class Stats:
    """The gradients of one call, in numbers, as they were before clipping.

    Everything is a tensor on the first gradient's device (on the CPU where that has no float64, as Apple's MPS);
    nothing waits for the device until a value is read. T is the number of distinct gradients, in the order of the
    parameters (a parameter without a gradient has no entry). Norms and coefficients are float32, or float64 if any
    gradient is.

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

    With gradients that are sharded over several ranks, norms and coefficients are those of whole tensors and the same
    on all ranks. Reading them never communicates: `tensor_norms`, `tensor_absmax` and `nonfinite` are there only where
    a rule needs them or the Clipper was told to (``tensor_stats=True``), and raise RuntimeError elsewhere. `clipped`
    is whether a gradient on this rank was changed.
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
        norm32: Tensor | None = None,
    ) -> None:
        self.norm_type = norm_type
        self.device = device
        self.count = sum([part.power.numel() for part in parts])  # T
        self._dtype = dtype
        self._parts = parts
        self._positions = positions  # of the parts' tensors, one part after the other; None: as they come
        self._norm = norm
        self._norm32 = norm32 if dtype == torch.float32 else None  # the norm rounded, where the backend did it
        self._coef: Tensor | None = None
        self._clamped: Tensor | None = None
        self._limit: Tensor | float | None = None
        self.skip: Tensor | None = None
        self._over_ranks: OverRanks | None = None

    def zeroed_count(self) -> Tensor:
        """[] how many elements ``nonfinite="zero"`` set to 0, on all ranks."""
        assert self.zeroed is not None
        ranks = self._over_ranks
        return self.zeroed.sum() if ranks is None or ranks.zeroed is None else ranks.zeroed

    # Computed anew at every look: none of it is paid for by who does not ask, and after a replay of a CUDA graph it is
    # that replay's.

    @property
    def power(self) -> Tensor:
        """[T] float64, sum |g|^p of each gradient."""
        if self._over_ranks is not None and not self._over_ranks.power:
            raise self._unknown("The norms")
        return self.gathered([part.power for part in self._parts])

    @property
    def absmax(self) -> Tensor:
        """[T] float64; what `tensor_absmax` is rounded from."""
        if self._over_ranks is not None and not self._over_ranks.absmax:
            raise self._unknown("The largest magnitudes")
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
        return self.norm.to(self._dtype, copy=True)  # what users do to one look at it must not show at the next

    def take_total_norm(self) -> Tensor:
        """`total_norm`, for whoever looks once: without a launch, where the backend has rounded it."""
        return self.total_norm if self._norm32 is None else self._norm32

    @property
    def tensor_norms(self) -> Tensor:
        return self.norms.to(self._dtype)

    @property
    def tensor_absmax(self) -> Tensor:
        return self.absmax.to(self._dtype)

    @property
    def nonfinite(self) -> Tensor:
        if self.zeroed is not None:
            return self.zeroed > 0
        ranks = self._over_ranks
        if ranks is not None and not ranks.absmax and ranks.power and not math.isinf(self.norm_type):
            return ~self.power.isfinite()  # of which the maxima are not there
        return ~self.absmax.isfinite()

    def any_nonfinite(self) -> Tensor:
        """[] bool, whether any gradient holds, or held, an inf or a NaN, on any rank."""
        return self.nonfinite.any() if self._over_ranks is None else self._over_ranks.nonfinite > 0

    @property
    def limit(self) -> Tensor | None:
        if isinstance(self._limit, float):
            # In float64 first, of which what is too large for float32 is inf there.
            return torch.full((), self._limit, dtype=torch.float64, device=self.device).to(self._dtype)
        return None if self._limit is None else self._limit.to(self._dtype)

    @property
    def coef(self) -> Tensor:
        coef = self._decision().to(self._dtype)
        return coef if self.skip is None else torch.where(self.skip, 1.0, coef)

    @property
    def clipped(self) -> Tensor:
        changed = (self.coef != 1).any()
        changed = changed if self._clamped is None else changed | self._clamped
        if self._over_ranks is not None:
            return changed if self._over_ranks.zeroed is None else changed | (self._over_ranks.zeroed > 0)
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
        if tensors and not self._knows_tensors():
            raise self._unknown("The statistics")
        return HostStats.of(self.tensors()).log(tensors)

    def tensors(self) -> StatsTensors:
        """The tensors that all the others are computed from, and the numbers that the host knows."""
        tensors = {"norm": self.norm, "coef": self._decision()}
        ranks = self._over_ranks
        if ranks is not None:
            tensors["nonfinite_count"] = ranks.nonfinite
            if ranks.zeroed is not None:
                tensors["zeroed_count"] = ranks.zeroed
        if ranks is None or self._knows_tensors():
            tensors["absmax"] = self.absmax
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
        ranks = self._over_ranks
        # +0 writes zeros. -0 multiplies: what was not finite becomes NaN, and the rest 0, in whatever power.
        absmax = power = None
        if ranks is None or ranks.absmax:
            absmax = torch.where(is_zero(coef), 0.0, self.absmax * factor)
        if (ranks is None or ranks.power) and not math.isinf(self.norm_type):
            power = self.power
            product = torch.where(power.isfinite(), 0.0, power * 0) if absmax is None else absmax
            product = torch.where(is_zero(coef), 0.0, product)
            power = torch.where(factor == 0, product, power * factor**self.norm_type if self.norm_type else power)
        norm = None
        if ranks is not None and not coef.dim():
            norm = torch.where(is_zero(coef), 0.0, self.norm * factor if self.norm_type else self.norm)
        return self._like(power, absmax, norm, None if ranks is None else ranks.shared)

    def only(self, index: Tensor) -> Stats:
        """The statistics of the gradients at `index` ([K] int64) alone."""
        ranks = self._over_ranks
        power = self.power[index] if ranks is None or ranks.power or not ranks.absmax else None
        absmax = self.absmax[index] if ranks is None or ranks.absmax else None
        shared = None if ranks is None or ranks.shared is None else ranks.shared[index]
        return self._like(power, absmax, None, shared)

    def _like(
        self, power: Tensor | None, absmax: Tensor | None, norm: Tensor | None = None, shared: Tensor | None = None
    ) -> Stats:
        """Statistics of the same kind. What was not summed over the ranks is None."""
        known = power if absmax is None else absmax
        if known is None:
            known = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        part = Measurement(known if power is None else power, known if absmax is None else absmax)
        stats = Stats(self.norm_type, self._dtype, self.device, [part])
        stats.step, stats.skip = self.step, self.skip
        if self._over_ranks is not None:
            stats._over_ranks = self._over_ranks._replace(shared=shared)
            stats._norm = stats.norm_over_ranks() if norm is None else norm
        return stats

    def reduced(self, part: Measurement, norm: Tensor, ranks: OverRanks) -> Stats:
        """These statistics, summed over the ranks."""
        stats = Stats(self.norm_type, self._dtype, self.device, [part], None, norm)
        stats.step, stats.skip, stats.zeroed, stats.names = self.step, self.skip, self.zeroed, self.names
        stats._over_ranks = ranks
        return stats

    def norm_over_ranks(self) -> Tensor:
        """[] float64, `norm` from the statistics of whole tensors; a message to the other stages, if there are any."""
        ranks = self._over_ranks
        assert ranks is not None
        if math.isinf(self.norm_type):
            absmax = self.absmax
            most = absmax.max() if len(absmax) else absmax.sum()
            if ranks.over_stages is None:
                return most
            # A maximum of several ranks may lose a NaN on its way, which a sum does not.
            undefined = ranks.over_stages(most.isnan().double(), False) > 0
            return torch.where(undefined, math.nan, ranks.over_stages(torch.where(most.isnan(), math.inf, most), True))
        amounts = (self.power != 0).double() if self.norm_type == 0 else self.power
        amounts = amounts if ranks.shared is None else amounts * ranks.shared
        total = amounts.sum() if ranks.over_stages is None else ranks.over_stages(amounts.sum(), False)
        return _root(total, self.norm_type)

    @classmethod
    def joined(cls, parts: list[Stats], positions: list[int], device: torch.device) -> Stats:
        """The statistics of several calls, at least one, with what was decided in each, as of one call on `device`.
        `positions`: of the gradients of the parts among all of them, one part after the other."""
        over = [part._over_ranks for part in parts]
        has_power = all(ranks is None or ranks.power for ranks in over)
        has_absmax = all(ranks is None or ranks.absmax for ranks in over)
        p = parts[0].norm_type
        measured = []
        for part in parts:
            unknown = torch.zeros(part.count, dtype=torch.float64, device=part.device)
            absmax = part.absmax if has_absmax else unknown
            measured.append(Measurement(absmax if math.isinf(p) else part.power if has_power else unknown, absmax))
        dtype = torch.float64 if any(part._dtype == torch.float64 for part in parts) else torch.float32
        stats = cls(p, dtype, device, measured, positions)
        stats.step = parts[0].step
        if parts[0].zeroed is not None:
            stats.zeroed = stats.gathered([part.zeroed for part in parts if part.zeroed is not None])

        def total(numbers: list[Tensor]) -> Tensor:
            return torch.stack([number.to(device, torch.float64) for number in numbers]).sum()

        if any(ranks is not None for ranks in over):
            counts = [part.nonfinite.sum() if ranks is None else ranks.nonfinite for part, ranks in zip(parts, over)]
            zeroed = None if parts[0].zeroed is None else total([part.zeroed_count() for part in parts])
            stats._over_ranks = OverRanks(total(counts), zeroed, has_power, has_absmax)
            norms = [part.norm for part in parts]
            if math.isinf(p):
                stats._norm = torch.stack([norm.to(device) for norm in norms]).max()
            else:
                stats._norm = _root(total([norm**p for norm in norms]), p) if p else total(norms)
        coef = stats.gathered([part._decision().expand(part.count) for part in parts])
        clamped = [part._clamped for part in parts if part._clamped is not None]
        return stats.record(coef, None, total(clamped) > 0 if clamped else None)

    def as_left(self) -> Stats | None:
        """The statistics :meth:`scaled` by 1. None where they would not be these: a gradient that was repaired is
        finite now, and what is computed anew over the ranks must be so on all of them, whatever each has."""
        return self if self._over_ranks is None and self.zeroed is None else None

    def is_over_ranks(self) -> bool:
        """Whether they were summed over several ranks."""
        return self._over_ranks is not None

    def _knows_tensors(self) -> bool:
        ranks = self._over_ranks
        return ranks is None or (ranks.absmax and (ranks.power or math.isinf(self.norm_type)))

    def _unknown(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what} of each tensor were not summed over the ranks, since no rule needs them, and reading statistics "
            f"never communicates: ask for them with Clipper(..., tensor_stats=True)"
        )

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


def leaves(coef: Tensor) -> bool:
    """Whether multiplying by it changes nothing, where that can be known without waiting: on a CPU."""
    if not coef.is_cpu:
        return False
    if not coef.dim():
        return coef.item() == 1
    if not coef.numel():
        return True
    least, most = torch.aminmax(coef)
    return least.item() == 1 and most.item() == 1


def is_zero(coef: Tensor) -> Tensor:
    """Where it is +0, not -0."""
    return coef.reciprocal() == math.inf
