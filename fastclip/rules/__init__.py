"""Rules: from the statistics of the gradients to their coefficients.

A rule is a function of :class:`~fastclip.stats.Stats` that returns a float64 tensor of shape [] or [T] on the
statistics' device: what the gradients are multiplied by (1: left alone, neither read nor written; 0: set to zero). It
must not read values back to the host, nor change later what it returned. Any callable will do; the classes here also
say, as ``norm_type``, which norm they need. `Value` and `AGC` do what no coefficient of a tensor can, and go over the
gradients themselves.
"""

from collections.abc import Callable

from torch import Tensor

from ..stats import Stats
from .adaptive import AdaGC, AutoClip, ZClip
from .chosen import Except, Only
from .in_place import AGC, Value
from .norms import BlockRMS, GlobalNorm, Mask, TensorNorm

Rule = Callable[[Stats], Tensor]

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "BlockRMS",
    "Except",
    "GlobalNorm",
    "Mask",
    "Only",
    "TensorNorm",
    "Value",
    "ZClip",
]
