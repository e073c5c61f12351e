"""The CPU kernels as a plain library, which knows neither torch nor Python: csrc/cpu/ called through ctypes."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ..native.cpu_interface import (
    DTYPES,
    AdamWOptions,
    ClipOptions,
    GlobalNorm,
    Segment,
    SgdOptions,
    StepDecision,
    Table,
    Threads,
)
from .groups import Group, StepGroup


class CpuKernels:
    """What csrc/cpu/launch.h offers, for the groups of :mod:`.groups`.

    Args:
        library: as :func:`cpu_interface.open_library` opens it.
        parallel_for: the address of torch's function of that name; 0: there is none, and one thread does the work.
    """

    def __init__(self, library: ctypes.CDLL, parallel_for: int) -> None:
        self.library, self.parallel_for = library, parallel_for
        self._alone = not parallel_for

    def isa(self) -> str:
        return str(self.library.fastclip_cpu_isa().decode())

    def work_alone(self) -> None:
        """With one thread from now on, since torch's do not survive a fork."""
        self._alone = True

    def measure(
        self, group: Group, p: float, max_norm: float | None, before: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """As ``Backend.measure``: power, absmax, norm, coef, total."""
        each, found = torch.empty(len(group), 2, dtype=torch.float64, device="cpu"), GlobalNorm()
        limit = math.inf if max_norm is None else max_norm
        earlier = None if before is None else before.data_ptr()
        self.library.fastclip_cpu_global_norm(
            self._table(group), self._threads(), p, limit, earlier, each.data_ptr(), found
        )
        power, absmax = each.t().contiguous()
        coef = None if max_norm is None else scalar(found.coef)
        total = torch.tensor((found.power, found.absmax), dtype=torch.float64, device="cpu")
        return power, absmax, scalar(found.norm), coef, total

    def clip(self, groups: list[Group], options: ClipOptions, each: Tensor | None) -> GlobalNorm | None:
        """Measure, decide and apply. `each`: [T, 2] float64, takes power and absmax. None: the norm was refused."""
        tables = self._table(groups[0]) if len(groups) == 1 else (Table * len(groups))(*map(self._table, groups))
        found = GlobalNorm()
        per_segment = None if each is None else each.data_ptr()
        refused = self.library.fastclip_cpu_clip(tables, len(groups), self._threads(), options, per_segment, found)
        if options.write and not refused and found.coef != 1:
            self._bump_written(groups)
        return None if refused else found

    def apply_(self, group: Group, coef: Tensor, /) -> None:
        """Multiply by `coef`, float64 [] or [T]."""
        if coef.dtype != torch.float64 or not coef.is_contiguous() or (coef.dim() and len(coef) != len(group)):
            raise ValueError(f"coef must be float64 of shape [] or [{len(group)}], got {coef.dtype} {list(coef.shape)}")
        self.library.fastclip_cpu_apply(self._table(group), self._threads(), coef.data_ptr(), coef.dim())
        self._bump_written([group])

    def clamp_(self, group: Group, low: float, high: float, /) -> bool:
        clamped = self.library.fastclip_cpu_clamp(self._table(group), self._threads(), low, high)
        self._bump_written([group])
        return bool(clamped)

    def adamw_(
        self, step: StepGroup, coef: Tensor, frozen: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, maximize: bool, zero_grad: bool, seed: int | None, /,
    ) -> None:  # fmt: skip
        options = AdamWOptions(lr, beta1, beta2, eps, weight_decay)
        self._step(self.library.fastclip_cpu_adamw, options, step, coef, frozen, maximize, zero_grad, seed)

    def sgd_(
        self, step: StepGroup, coef: Tensor, frozen: Tensor | None, lr: float, momentum: float,
        one_minus_dampening: float, weight_decay: float, nesterov: bool, maximize: bool, zero_grad: bool,
        seed: int | None, /,
    ) -> None:  # fmt: skip
        options = SgdOptions(lr, momentum, one_minus_dampening, weight_decay, nesterov)
        self._step(self.library.fastclip_cpu_sgd, options, step, coef, frozen, maximize, zero_grad, seed)

    def _step(
        self, function: Any, options: Any, step: StepGroup, coef: Tensor, frozen: Tensor | None, maximize: bool,
        zero_grad: bool, seed: int | None,
    ) -> None:  # fmt: skip
        decision = StepDecision(
            coef=coef.data_ptr(),
            coef_stride=coef.dim(),
            frozen=None if frozen is None else frozen.data_ptr(),
            frozen_stride=0 if frozen is None else frozen.dim(),
            seed=seed or 0,
            stochastic=seed is not None,
            maximize=maximize,
            zero_grad=zero_grad,
        )
        function(self._table(step.group), self._threads(), step.segments(), decision, options)

    def _threads(self) -> Threads:
        return Threads(1 if self._alone else torch.get_num_threads(), self.parallel_for)

    def _table(self, group: Group) -> Table:
        """The group's table, made once; what it points to lives as long as the group."""
        if group.table is None:
            count, table = len(group), Table()
            written, segments = (ctypes.c_char * count)(), (Segment * count)()
            self.library.fastclip_cpu_table(
                *(group.addresses.buffer_info()[0], group.numels.buffer_info()[0], count, DTYPES[group.dtype]),
                *(written, segments, table),
            )
            group.table = table, segments, written
        return group.table[0]

    @staticmethod
    def _bump_written(groups: list[Group]) -> None:
        """Tell autograd which gradients the kernels have written."""
        for group in groups:
            assert group.table is not None
            *_, written = group.table
            flags = written.raw
            if 1 in flags:
                group.bump_version([i for i, flag in enumerate(flags) if flag] if 0 in flags else None)
                ctypes.memset(written, 0, len(group))


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    if dtype == torch.float32:
        value = ctypes.c_float(value).value  # inf where it is beyond float32
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")
