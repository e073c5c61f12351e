"""The packer in Python, for where no native one was built. What it packs, :mod:`.cpu_kernels` works on through ctypes.

As everywhere, what is not plain (dense real memory of a dtype that the kernels know, in a Tensor or Parameter) is left
to the general packer of :mod:`fastclip.gradients.pack`.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..devices import place_of
from ..modes import is_watched
from ..native.cpu_interface import ClipOptions
from ..torch_internals import any_function_mode, no_functions
from .base import MeasureGradients, NativeGroup
from .cpu_kernels import CpuKernels, scalar
from .groups import Group, Memory, StepGroup, are_apart, bump_versions, memory_of, together

GRAD = operator.attrgetter("grad")
Result = TypeVar("Result")


def unwatched(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, in which no TorchFunctionMode sees what is asked of tensors: torch.set_default_device is one, too."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        if not any_function_mode() or is_watched():
            return function(*arguments)
        with no_functions():
            return function(*arguments)

    return call


class PythonPacker:
    """See :class:`fastclip.packers.Packer`."""

    name = "python"
    unwrap = None  # fastclip.distributed.unwrap does the same in Python
    measure_gradients: MeasureGradients | None = None  # Python's objects hold gradients whether or not that is wanted

    def __init__(self, kernels: CpuKernels | None) -> None:
        self.kernels = kernels

    @unwatched
    def pack(self, items: list[Any], gradients_of: bool, /) -> list[NativeGroup] | None:
        return cast("list[NativeGroup] | None", self.groups(items, gradients_of))

    def groups(self, items: list[Any], gradients_of: bool) -> list[Group] | None:
        """What :meth:`pack` returns."""
        if type(items) is not list or not all(issubclass(kind, Tensor) for kind in set(map(type, items))):
            return None
        if gradients_of:
            if is_flattened(items):
                return None
            items = [gradient for gradient in map(GRAD, items) if gradient is not None]
        if not items:
            return []
        memory = memory_of(items)
        if memory is None:
            return None
        repeated = 0 in memory.numels and len(set(map(id, items))) < len(items)  # without elements, the same object
        if repeated or not are_apart(memory, items):
            distinct = _distinct(items, memory)
            if distinct is None:
                return None
            items, memory = [items[i] for i in distinct], memory.at(distinct)
            if not are_apart(memory, items):
                return None
        if memory.kind is not None:
            return [_group(items, memory, [])]
        kinds = [(t.device, t.dtype) for t in items]
        groups: list[Group] = []
        for kind in dict.fromkeys(kinds):
            positions = [i for i, other in enumerate(kinds) if other == kind]
            groups.append(_group([items[i] for i in positions], memory.at(positions), positions))
        return groups

    @unwatched
    def pack_step(
        self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor], /
    ) -> StepGroup | None:
        packed = self.groups(grads, False)
        if not packed or len(packed) > 1 or len(packed[0]) != len(grads):
            return None
        (group,) = packed
        arrays = [params, *states]
        columns = [memory_of(column) for column in (*arrays, *([steps] if steps else []))]
        if None in columns:
            return None
        if not all(_matches(array_, gradient) for column in arrays for array_, gradient in zip(column, grads)):
            return None
        if any(t.numel() != 1 or t.dtype != torch.float32 or t.device != group.device for t in steps):
            return None
        if not are_apart(*together([*arrays, steps], columns)):
            return None
        param, *others = columns[: len(arrays)]
        padded = [*others, *[None] * (3 - len(others))]
        return StepGroup(group, [*arrays, steps], [param, *padded, columns[-1] if steps else None])

    @staticmethod
    def same_items(a: list[Any], b: list[Any], /) -> bool:
        return len(a) == len(b) and all(map(operator.is_, a, b))

    @staticmethod
    def bump_versions(tensors: list[Tensor], /) -> None:
        bump_versions(tensors)

    @unwatched
    def clip_norm_fused(
        self, items: list[Any], of_parameters: bool, max_norm: Any, norm_type: Any, error_if_nonfinite: bool,
        per_tensor: bool, /,
    ) -> Any:  # fmt: skip
        limit, p = (number(max_norm) if of_parameters else 0.0), number(norm_type)
        if not (limit >= 0 and p > 0) or is_watched():
            return None
        groups = self.groups(items, of_parameters)
        if not groups:
            return None
        elsewhere = self.kernels is None or any(group.device.type != "cpu" for group in groups)
        if elsewhere or (per_tensor and len(groups) > 1):
            return groups
        wide = any(group.dtype == torch.float64 for group in groups)
        assert self.kernels is not None
        options = ClipOptions(p, limit, of_parameters, bool(error_if_nonfinite))
        each = torch.empty(len(groups[0]) if per_tensor else 0, 2, dtype=torch.float64, device="cpu")
        found = self.kernels.clip(groups, options, each if per_tensor else None)
        if found is None:
            return groups
        if not per_tensor:
            return scalar(found.norm, torch.float64 if wide else torch.float32)
        return (*each.unbind(1), scalar(found.norm), scalar(found.coef), wide)


def _group(gradients: list[Tensor], memory: Memory, positions: list[int]) -> Group:
    return Group(gradients, memory.storages, memory.addresses, memory.numels, positions)


def number(value: Any) -> float:
    """A Python float or int; NaN for anything else."""
    try:
        return float(value) if type(value) is float or type(value) is int else math.nan
    except OverflowError:
        return math.nan


def _distinct(tensors: list[Tensor], memory: Memory) -> list[int] | None:
    """The positions of the tensors, of those that are the same elements in memory the first one's. None if it cannot be
    told, since two begin at one place and are not the same."""
    key: Any
    first: dict[Any, int] = {}
    for i, (tensor, numel) in enumerate(zip(tensors, memory.numels)):
        key = place_of(tensor) if numel else id(tensor)
        j = first.setdefault(key, i)
        if i != j and (memory.numels[j], tensors[j].dtype) != (numel, tensor.dtype):
            return None
    return list(first.values())


def _matches(tensor: Tensor, gradient: Tensor) -> bool:
    """Whether an array of a parameter has its elements where the gradient has them."""
    return (
        tensor.dtype == gradient.dtype
        and tensor.device == gradient.device
        and tensor.shape == gradient.shape
        and (tensor.stride() == gradient.stride() or (tensor.is_contiguous() and gradient.is_contiguous()))
    )


def is_flattened(items: Iterable[Any]) -> bool:
    """Whether a parameter is one of FSDP1's flat ones, of which each rank has another part."""
    if "torch.distributed.fsdp._flat_param" not in sys.modules or not torch.distributed.is_initialized():
        return False
    return any(getattr(item, "_fsdp_flattened", False) for item in items)
