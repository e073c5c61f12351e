"""GradScaler: what it asks of a step, and the books that it keeps of one."""

from __future__ import annotations

import functools
import numbers
import sys
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from ..arguments import is_bool
from ..backends import upload, widened
from ..stats import Stats


class GradScalerState:
    """What a GradScaler and a divisor ask of a step, and the scaler's books: as after ``scaler.step(optimizer)``."""

    def __init__(self, scaler: GradScaler | None, optimizers: list[Any], device: torch.device) -> None:
        optimizer = optimizers[-1]
        self.device = device
        self.active = scaler is not None and scaler.is_enabled()
        self.by_wrapper = False  # whether a GradScaler outside calls the optimizer's step, and keeps its own books
        self.found_inf: Tensor | None = None
        self.unscaled = False  # whether unscale_() was called before
        self._scale: Tensor | None = None
        self._state: dict[str, Any] = {}
        scale, found_inf = given_by_scaler(optimizer)
        if self.active and scale is not None:
            raise ValueError("scaler must be left out: the optimizer's wrapper steps with a GradScaler of its own")
        if scale is not None or found_inf is not None:
            self.by_wrapper = True
            self._scale = None if scale is None else widened(scale, device)
            self.found_inf = None if found_inf is None else found_inf.to(device) > 0
        if scaler is None or not self.active:
            return
        if scaler._scale is None:
            raise RuntimeError("scaler has not scaled a loss yet: call scaler.scale(loss).backward() before the step")
        books = scaler._per_optimizer_states
        used = [one for one in optimizers if id(one) in books and books[id(one)]["stage"] is not OptState.READY]
        self._state = books[id(used[0] if used else optimizer)]  # unscale_() may have been given the wrapper
        if self._state["stage"] is OptState.STEPPED:
            raise RuntimeError("this optimizer has already stepped with scaler since its last update()")
        if self._state["stage"] is OptState.UNSCALED:
            flags = [
                f.to(device, non_blocking=device.type != "cpu") for f in self._state["found_inf_per_device"].values()
            ]
            self.found_inf = torch.stack(flags).sum() > 0 if flags else None
            self.unscaled = True
        else:
            self._scale = widened(scaler._scale, device)

    @classmethod
    def of(cls, scaler: Any, optimizers: list[Any], device: torch.device) -> GradScalerState:
        """For a step of the first of `optimizers`, which wraps the others, see :func:`~.step.unwrapped`."""
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__} {scaler!r}")
        return cls(scaler, optimizers, device)

    def inv_scale(self, divide_by: Any) -> Tensor | None:
        """[] float64: what the gradients are to be multiplied by first; None if that is 1."""
        divisor = self._scale
        if isinstance(divide_by, Tensor):
            if divide_by.numel() != 1 or divide_by.is_complex() or divide_by.dtype == torch.bool:
                shape = tuple(divide_by.shape)
                raise ValueError(f"divide_by must be one number, got a {divide_by.dtype} tensor of shape {shape}")
            count = divide_by.detach().reshape(())
            on_host = count.device.type == "cpu"
            if on_host and not 0 < count.item() < float("inf"):
                raise ValueError(f"divide_by must be > 0 and finite, got {count.item()}")
            count = upload(count, torch.float64, self.device) if on_host else widened(count, self.device)
            divisor = count if divisor is None else divisor * count
        else:
            if is_bool(divide_by) or not isinstance(divide_by, numbers.Real):
                raise TypeError(f"divide_by must be a number, got {type(divide_by).__name__} {divide_by!r}")
            if not 0 < float(divide_by) < float("inf"):
                raise ValueError(f"divide_by must be > 0 and finite, got {divide_by!r}")
            if divide_by != 1:
                given = torch.full((), float(divide_by), dtype=torch.float64, device=self.device)
                divisor = given if divisor is None else divisor * given
        return None if divisor is None else divisor.reciprocal()

    def record(self, stats: Stats, found_inf: Tensor | None) -> None:
        """Tell the scaler whether there was a non-finite gradient; with several ranks on any of them, so that their
        scales stay the same. `found_inf`: what it had found itself."""
        if self.active and (found_inf is None or stats.is_over_ranks()):
            found = stats.any_nonfinite() if found_inf is None else found_inf
            self._state["found_inf_per_device"] = {self.device: found.float()}

    def done(self, kind: type[BaseException] | None, *_: object) -> None:
        """Note that the optimizer has stepped, unless it raised: for :meth:`contextlib.ExitStack.push`."""
        if self.active and kind is None:
            self._state["stage"] = OptState.STEPPED


def count_unscaling() -> None:
    """From now on ``unscale_()`` of every GradScaler counts as the write of the gradients that it is: torch's kernel
    for it leaves their versions as they are, so that nobody could tell. What calls the kernel is wrapped as well, where
    this torch has it by that name: a class that comes later may have an ``unscale_`` of its own."""
    kinds: list[type] = [GradScaler]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for name in ("unscale_", "_unscale_grads_"):
            unscale = vars(kind).get(name)
            if unscale is not None and not hasattr(unscale, "counts"):
                setattr(kind, name, _counting(unscale))


def _counting(unscale: Any) -> Any:
    @functools.wraps(unscale)
    def unscale_(self: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return unscale(self, optimizer, *args, **kwargs)
        finally:
            if sys._getframe(1).f_code.co_name != "_check_inf_per_device":  # which multiplies by 1, for fused steps
                groups = getattr(optimizer, "param_groups", ())
                gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
                torch.autograd.graph.increment_version([g for g in gradients if not g.is_inference()])

    unscale_.counts = True  # type: ignore[attr-defined]
    return unscale_


def given_by_scaler(optimizer: torch.optim.Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler whose ``step`` calls this optimizer's has set: its scale, and whether it found an inf (> 0)."""
    found_inf = getattr(optimizer, "found_inf", None)  # without gradients a sum of nothing, an int
    found_inf = found_inf if found_inf is None or isinstance(found_inf, Tensor) else torch.tensor(float(found_inf))
    return getattr(optimizer, "grad_scale", None), found_inf


def flag(when: Any, device: torch.device) -> Tensor:
    """The argument `when` of a step as a [] bool on `device`."""
    if is_bool(when):
        when = bool(when)
    if not (isinstance(when, bool) or (isinstance(when, Tensor) and when.dtype == torch.bool and when.numel() == 1)):
        got = f"a {when.dtype} tensor of shape {tuple(when.shape)}" if isinstance(when, Tensor) else repr(when)
        raise TypeError(f"when must be a bool or a bool tensor of one element, got {got}")
    if isinstance(when, bool) or when.device.type == "cpu":
        return upload(when, torch.bool, device).reshape(())
    return when.detach().reshape(()).to(device)
