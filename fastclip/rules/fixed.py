"""Rules with a fixed limit, of all gradients together or of each on its own."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked_limit, is_bool, nonnegative
from ..stats import Stats
from .base import FunctionRule, Needs, Rule, StepContext
from .coefficients import clip_coefficient, coefficient_for_all, within


class GlobalNorm(Rule):
    r"""Scale all gradients together so that their common norm is at most `max_norm`.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{N + 10^{-6}}\right)

    with N the p-norm of all gradients as one vector; ``torch.nn.utils.clip_grad_norm_``'s formula. A limit of 0 sets
    all gradients to zero, one of inf only measures.

    Args:
        max_norm: the limit, >= 0: a number; or a function from the number of steps taken (0 in the first) to one, for a
            limit that warms up or decays; or a tensor of one element, on any device, of which each step takes the
            present value. One on a GPU is not checked, since that would wait for the device: a negative number there
            counts as 0, and NaN makes all gradients NaN. In a CUDA graph, whose replays take steps that Python does
            not see, only a number or a tensor on the GPU.
        norm_type: p: 2, 1, ``inf``, 0 (the number of tensors that are not all zero) or any other p > 0.

    Raises:
        ValueError, TypeError: a limit or a norm type that is no such number; in the step, a function that returns none,
            or a tensor on the CPU that holds none any more.
        RuntimeError: a function, or a tensor on the host, in a CUDA graph.
    """

    needs = Needs.TOTAL_NORM
    finite_zero = True

    def __init__(self, max_norm: float | Tensor | Callable[[int], float], norm_type: float = 2.0) -> None:
        if isinstance(max_norm, Tensor):
            checked_limit(max_norm, "max_norm")
        elif not callable(max_norm):
            max_norm = nonnegative(max_norm, "max_norm")
        self.max_norm = max_norm
        self.norm_type: float = nonnegative(norm_type, "norm_type")
        self._called: tuple[Any, int, float] | None = None  # function, step and what it returned: once a step

    def limit(self, step: int) -> float | Tensor:
        """The limit after `step` steps."""
        if isinstance(self.max_norm, Tensor):
            return checked_limit(self.max_norm, "max_norm")
        if not callable(self.max_norm):
            return self.max_norm
        if self._called is None or self._called[0] is not self.max_norm or self._called[1] != step:
            value = self.max_norm(step)
            if isinstance(value, Tensor):
                raise TypeError(f"max_norm({step}) must be a number, got a tensor; give the tensor itself as max_norm")
            self._called = self.max_norm, step, nonnegative(value, f"max_norm({step})")
        return self._called[2]

    def static_limit(self, step: int) -> float | None:
        if type(self.max_norm) is float:
            return self.max_norm
        limit = self.limit(step)
        return None if isinstance(limit, Tensor) else limit

    def check_gradients(self, context: StepContext) -> None:
        """What is wrong with a limit that Python computes, before anything is written."""
        self.limit(context.step)

    def check_capture(self) -> None:
        """RuntimeError where the limit is one that Python computes."""
        if callable(self.max_norm) or (isinstance(self.max_norm, Tensor) and self.max_norm.device.type == "cpu"):
            raise RuntimeError(
                "max_norm must be a number or a tensor on the GPU in a CUDA graph, which would keep its value"
            )

    def decide(self, stats: Stats, context: StepContext) -> Tensor | float:
        limit = self.limit(context.step)
        if isinstance(limit, Tensor):  # a copy: the statistics keep it, and it changes
            to_device = stats.device.type != "cpu"  # only there what follows waits for the copy
            limit = limit.to(stats.device, non_blocking=to_device, copy=True).double()
        context.limit = limit
        return coefficient_for_all(stats.norm, limit)

    def __repr__(self) -> str:
        return f"GlobalNorm({self.max_norm}, norm_type={self.norm_type})"


class TensorNorm(Rule):
    r"""Scale each gradient on its own so that its norm is at most `max_norm`.

    .. math:: g_t \leftarrow g_t \cdot \min\left(1, \frac{max\_norm}{n_t + 10^{-6}}\right)

    with n_t the p-norm of tensor t; DINO's ``clip_gradients``, and Keras' ``clipnorm`` but for the 1e-6.

    Args:
        max_norm: the limit, >= 0.
        norm_type: as :class:`GlobalNorm`'s.

    Raises:
        ValueError, TypeError: a limit or a norm type that is no such number.
    """

    needs = Needs.TENSOR_NORMS
    per_tensor = True

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        self.max_norm = nonnegative(max_norm, "max_norm")
        self.norm_type: float = nonnegative(norm_type, "norm_type")

    def decide(self, stats: Stats, context: StepContext) -> Tensor:
        return clip_coefficient(stats.norms, self.max_norm)

    def __repr__(self) -> str:
        return f"TensorNorm({self.max_norm}, norm_type={self.norm_type})"


class BlockRMS(Rule):
    r"""Scale each gradient on its own so that the root mean square of its elements is at most `threshold`.

    .. math:: g_t \leftarrow \frac{g_t}{\max(1, \mathrm{rms}(g_t) / threshold)},
        \quad \mathrm{rms}(g_t) = \lVert g_t \rVert_2 / \sqrt{\text{elements of } g_t}

    ``optax.clip_by_block_rms``; the clipping of Adafactor (Shazeer and Stern 2018).

    Args:
        threshold: in the gradients' unit, >= 0; 0 sets all gradients to zero, inf leaves them.

    Raises:
        ValueError, TypeError: a threshold that is no such number.
    """

    norm_type = 2.0
    needs = Needs.TENSOR_NORMS | Needs.SIZES
    per_tensor = True

    def __init__(self, threshold: float) -> None:
        self.threshold = nonnegative(threshold, "threshold")

    def decide(self, stats: Stats, context: StepContext) -> Tensor:
        if math.isinf(self.threshold):
            return torch.ones((), dtype=torch.float64, device=stats.device)
        return within(stats.norms, self.threshold * context.sizes().sqrt())

    def __repr__(self) -> str:
        return f"BlockRMS({self.threshold})"


class Mask(Rule):
    r"""Zero the gradients that are small throughout.

    .. math:: g_t \leftarrow 0 \text{ where } \max|g_t| < threshold

    A gradient that holds a NaN is left alone.

    Args:
        threshold: in the gradients' unit, >= 0.
        freeze: in :meth:`Clipper.step`, also leave the masked parameters exactly as they are: no momentum, no weight
            decay, their optimizer state untouched. A gradient of zeros alone does not do that.

    Raises:
        ValueError, TypeError: a threshold that is no such number.
    """

    needs = Needs.ABSMAX
    per_tensor = True

    def __init__(self, threshold: float, freeze: bool = False) -> None:
        self.threshold = nonnegative(threshold, "threshold")
        if not is_bool(freeze):
            raise TypeError(f"freeze must be a bool, got {type(freeze).__name__} {freeze!r}")
        self.freezes = bool(freeze)

    def decide(self, stats: Stats, context: StepContext) -> Tensor:
        absmax = stats.absmax  # one pass less than by way of bool
        return torch.lt(absmax, self.threshold, out=torch.empty_like(absmax)).logical_not_()

    def __repr__(self) -> str:
        return f"Mask({self.threshold}{', freeze=True' if self.freezes else ''})"


def as_rule(rule: Any) -> Rule:
    """A rule; a function as the rule it is; a number as the GlobalNorm it means."""
    if isinstance(rule, Rule):
        return rule
    if callable(rule) and not isinstance(rule, type):
        return FunctionRule(rule)
    if isinstance(rule, (numbers.Real, Tensor)) and not is_bool(rule):
        return GlobalNorm(rule if isinstance(rule, Tensor) else float(rule))
    raise TypeError(f"rule must be a rule or a number, got {type(rule).__name__} {rule!r}")
