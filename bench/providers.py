"""Whom clip.py measures: each backend of fastclip that runs here, torch in three ways, and peers where installed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastclip

CLIPS = ("not triggered", "triggered")
BASELINE = "torch foreach"
Call = Callable[[float], Any]  # a mode's limit to the norm or norms before, where the provider tells


class Fastclip:
    """The functions, on one backend."""

    exact = True  # held to fastclip's own promise, not to what torch's rounding allows

    def __init__(self, backend: str) -> None:
        self.name = f"fastclip {backend}"
        self.backend = backend

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        if mode == "norm":
            gradients = [p.grad for p in parameters]
            return lambda limit: fastclip.total_norm(gradients)
        function = {
            "per tensor": fastclip.clip_tensor_norm_, "mask": fastclip.mask_small_, "value": fastclip.clip_value_
        }.get(mode, fastclip.clip_norm_)  # fmt: skip
        return functools.partial(function, parameters)


class Clipper:
    """The object, on the backend that fastclip chooses itself."""

    name, exact, backend = "fastclip.Clipper", True, "auto"

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        if mode not in CLIPS:
            return None
        clipper = fastclip.Clipper(parameters, 1.0)
        rule = clipper.rules[0]

        def call(limit: float) -> Any:
            rule.max_norm = limit
            return clipper.clip_()

        return call


class Torch:
    """torch.nn.utils; what it does not have, as one would write it with torch's foreach functions, or as a loop."""

    exact, backend = False, "auto"

    def __init__(self, name: str, foreach: bool | None) -> None:
        self.name = name
        self.foreach = foreach

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        gradients = [p.grad for p in parameters]
        if mode == "norm":
            return lambda limit: torch.nn.utils.get_total_norm(gradients, foreach=self.foreach)
        if mode in CLIPS:
            return functools.partial(torch.nn.utils.clip_grad_norm_, parameters, foreach=self.foreach)
        if mode == "value":
            return functools.partial(torch.nn.utils.clip_grad_value_, parameters, foreach=self.foreach)
        function = {
            ("per tensor", False): clip_each_loop, ("per tensor", None): clip_each_foreach,
            ("mask", False): mask_loop, ("mask", None): mask_foreach,
        }[mode, self.foreach]  # fmt: skip
        return functools.partial(function, gradients)


def clip_each_foreach(gradients: list[Tensor], limit: float) -> Tensor:
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (limit / (norms + 1e-6)).clamp(max=1.0).unbind())
    return norms


def clip_each_loop(gradients: list[Tensor], limit: float) -> None:
    for gradient in gradients:
        gradient.mul_((limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0))


def mask_foreach(gradients: list[Tensor], limit: float) -> None:
    keep = torch.stack(torch._foreach_norm(gradients, math.inf)) >= limit
    torch._foreach_mul_(gradients, keep.to(gradients[0].dtype).unbind())


def mask_loop(gradients: list[Tensor], limit: float) -> None:
    for gradient in gradients:
        if gradient.abs().max() < limit:
            gradient.zero_()


class Compiled:
    """torch.compile of torch's clip."""

    name, exact, backend = "torch.compile", False, "auto"

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        if mode not in CLIPS:
            return None
        return functools.partial(torch.compile(torch.nn.utils.clip_grad_norm_), parameters)


class Apex:
    """NVIDIA Apex's drop-in."""

    name, exact, backend = "apex", False, "auto"

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        from apex.contrib.clip_grad import clip_grad_norm_

        return functools.partial(clip_grad_norm_, parameters) if mode in CLIPS else None


class TransformerEngine:
    """NVIDIA TransformerEngine's kernels, put together as Megatron-LM does: the norm is read back to the host."""

    name, exact, backend = "transformer engine", False, "auto"

    def bind(self, mode: str, parameters: list[Tensor]) -> Call | None:
        from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale

        gradients = [p.grad for p in parameters]
        overflow = torch.zeros(1, dtype=torch.int, device=gradients[0].device)

        def norm(limit: float) -> Tensor:
            return multi_tensor_applier(multi_tensor_l2norm, overflow, [gradients], False)[0]

        def clip(limit: float) -> Tensor:
            total = norm(limit)
            coef = limit / (total.item() + 1e-6)
            if coef < 1:
                multi_tensor_applier(multi_tensor_scale, overflow, [gradients, gradients], coef)
            return total

        return norm if mode == "norm" else clip if mode in CLIPS else None


def providers(device: str) -> list[Any]:
    """Everyone who can run here."""
    backends = [b for b in fastclip.backends.BACKENDS if fastclip.backends.get(b).why_not(torch.device(device)) is None]
    found = [*map(Fastclip, backends), Clipper(), Torch(BASELINE, None), Torch("torch loop", False), Compiled()]
    if device == "cuda":
        found += [
            peer for module, peer in (("apex", Apex()), ("transformer_engine", TransformerEngine())) if has(module)
        ]
    return found


def has(module: str) -> bool:
    try:
        __import__(module)
    except Exception:  # noqa: BLE001 - a broken installation is as good as none
        return False
    return True
