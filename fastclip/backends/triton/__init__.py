"""The `triton` backend: multi-tensor kernels over an address table, one launch a phase for any number of tensors."""

from .clip import apply_, clamp_, describe, repair_, why_not
from .optim import adamw_, sgd_
from .reduction import measure

name = "triton"

__all__ = ["adamw_", "apply_", "clamp_", "describe", "measure", "name", "repair_", "sgd_", "why_not"]
