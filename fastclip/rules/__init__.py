"""Rules: from the statistics of the gradients to their coefficients. What a rule is stands in :mod:`.base`.

A function of :class:`~fastclip.Stats` that returns coefficients is one too. `Value` and `AGC` do what no coefficient of
a tensor can, and go over the gradients themselves.
"""

from .adaptive import AdaGC, AutoClip, ZClip
from .agc import AGC
from .base import InPlaceRule, Needs, Rule, StepContext
from .fixed import BlockRMS, GlobalNorm, Mask, TensorNorm
from .subset import Except, Only
from .value import Value

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "BlockRMS",
    "Except",
    "GlobalNorm",
    "InPlaceRule",
    "Mask",
    "Needs",
    "Only",
    "Rule",
    "StepContext",
    "TensorNorm",
    "Value",
    "ZClip",
]
