"""The packer in Python, for where no native one was built. What it packs, :mod:`cpu_kernels` works on through ctypes.

As everywhere, what is not plain (dense real memory of a dtype that the kernels know, in a Tensor or Parameter) is left
to the general packer of :mod:`fastclip.gradients.pack`.
"""

from __future__ import annotations

import ctypes
import math
import operator
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, UntypedStorage
from torch.nn import Parameter

from ..modes import is_watched
from . import foreach
from .base import NativeGroup
from .cpu_interface import DTYPES, ClipOptions, Segment, StepSegment, Table
from .cpu_kernels import CpuKernels, scalar
from .devices import ADDRESSED, place_of

PLAIN_TYPES = frozenset((Tensor, Parameter))
IS_CPU, IS_NESTED = operator.attrgetter("is_cpu"), operator.attrgetter("is_nested")


class Memory(NamedTuple):
    """Where tensors are: one entry for each."""

    storages: list[UntypedStorage]  # which keep it alive, also if a tensor is given another (`p.data = x`)
    addresses: list[int]  # where the device has addresses, else any numbers
    numels: list[int]
    nbytes: list[int]
    on_host: bool  # whether all are on the CPU
    kind: tuple[torch.device, torch.dtype] | None  # of all, if they are alike

    def at(self, positions: list[int]) -> Memory:
        def chosen(column: list[Any]) -> list[Any]:
            return [column[i] for i in positions]

        columns = chosen(self.storages), chosen(self.addresses), chosen(self.numels), chosen(self.nbytes)
        return Memory(*columns, self.on_host, self.kind)


def memory_of(tensors: list[Tensor]) -> Memory | None:
    """The memory of plain tensors; None if one is not plain. There is at least one."""
    if not PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    dtypes = {t.dtype for t in tensors}
    if not dtypes <= DTYPES.keys():
        return None
    try:
        if any(map(Tensor.is_neg, tensors)) or any(map(IS_NESTED, tensors)):
            return None
        dense = torch.ops.aten.is_non_overlapping_and_dense.default
        if not all(map(Tensor.is_contiguous, tensors)) and not all(map(dense, tensors)):
            return None
        storages = list(map(Tensor.untyped_storage, tensors))
        numels = list(map(Tensor.numel, tensors))
        offsets = list(map(Tensor.storage_offset, tensors))
        # The addresses are those of the storages that are held here, whatever another thread does to a tensor.
        addresses = list(map(UntypedStorage.data_ptr, storages))
        ends = list(map(UntypedStorage.nbytes, storages))
    except (RuntimeError, NotImplementedError):  # sparse, or a wrapper of torch.func: without a storage
        return None
    on_host = all(map(IS_CPU, tensors))
    if not on_host and any(t.is_meta for t in tensors):
        return None
    devices = {tensors[0].device} if on_host else {t.device for t in tensors}
    alike = len(dtypes) == len(devices) == 1
    if alike:
        itemsize = tensors[0].itemsize
        nbytes = [numel * itemsize for numel in numels]
    else:
        nbytes = [t.nbytes for t in tensors]
    if any(offsets):
        starts = [offset * t.itemsize for offset, t in zip(offsets, tensors)]
        addresses = list(map(operator.add, addresses, starts))
        ends = list(map(operator.sub, ends, starts))
    if any(map(operator.gt, nbytes, ends)):  # freed or shrunk
        return None
    kind = (devices.pop(), dtypes.pop()) if alike else None
    return Memory(storages, addresses, numels, nbytes, on_host, kind)


def are_apart(memory: Memory, tensors: list[Tensor]) -> bool:
    """Whether no two of the tensors share memory, for certain."""
    if len(tensors) == 1:
        return True
    if not memory.on_host and any(t.device.type not in ADDRESSED for t in tensors):
        owners = [storage._cdata for storage, numel in zip(memory.storages, memory.numels) if numel]
        return len(set(owners)) == len(owners)
    begins, ends = memory.addresses, list(map(operator.add, memory.addresses, memory.nbytes))
    if 0 in memory.numels:
        begins, ends = ([x for x, n in zip(column, memory.numels) if n] for column in (begins, ends))
    # Spans that do not overlap have their ends in the order of their beginnings, and each ends before the next begins;
    # where two do overlap, some end is larger than the beginning that follows it in this order.
    begins, ends = sorted(begins), sorted(ends)
    return not any(map(operator.gt, ends, begins[1:]))


class Group:
    """Gradients of one device and dtype: a :class:`NativeGroup`."""

    def __init__(
        self,
        gradients: list[Tensor],
        storages: list[UntypedStorage],
        addresses: list[int] | bytes,
        numels: list[int] | bytes,
        positions: list[int],
    ) -> None:
        self.device, self.dtype = gradients[0].device, gradients[0].dtype
        self.positions = positions
        self.gradients = gradients
        self.addresses, self.numels = array("q", addresses), array("q", numels)
        self._storages = storages
        self.table: tuple[Table, ctypes.Array[Segment], ctypes.Array[ctypes.c_char]] | None = None  # for the kernels

    def __len__(self) -> int:
        return len(self.gradients)

    @property
    def tensors(self) -> list[Tensor]:
        """The memory of the gradients: with their shapes, or flat where they have been given other memory since."""
        return [
            gradient.detach() if self._has_its_memory(i) else self._flat(i) for i, gradient in enumerate(self.gradients)
        ]

    def _has_its_memory(self, i: int) -> bool:
        gradient = self.gradients[i]
        storage = gradient.untyped_storage()
        address = storage.data_ptr() + gradient.storage_offset() * gradient.itemsize
        return (
            storage._cdata == self._storages[i]._cdata
            and address == self.addresses[i]
            and gradient.numel() == self.numels[i]
        )

    def _flat(self, i: int) -> Tensor:
        storage, numel, itemsize = self._storages[i], self.numels[i], self.dtype.itemsize
        offset = self.addresses[i] - storage.data_ptr()
        if offset < 0 or offset + numel * itemsize > storage.nbytes():
            raise RuntimeError(f"the storage of gradient {i} was freed or shrunk while it was being clipped")
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, offset // itemsize, (numel,), (1,))

    def addresses_and_sizes(self) -> Tensor:
        return torch.tensor([self.addresses, self.numels], dtype=torch.int64, device="cpu")

    def units(self) -> Group | None:
        gradients: list[Tensor] = []
        storages: list[UntypedStorage] = []
        addresses: list[int] = []
        numels: list[int] = []
        for i, gradient in enumerate(self.gradients):
            if not self._has_its_memory(i):
                raise RuntimeError(
                    f"gradient {i} of {len(self)} was given other memory (its .data) while it was being clipped"
                )
            rows = gradient.shape[0] if gradient.dim() > 1 and self.numels[i] else 1
            size = self.numels[i] // rows
            if rows > 1 and gradient.stride(0) != size:
                return None
            addresses += [self.addresses[i] + row * size * gradient.itemsize for row in range(rows)]
            storages += [self._storages[i]] * rows
            numels += [size] * rows
            gradients += [gradient] * rows
        return Group(gradients, storages, addresses, numels, [])

    def bump_version(self, positions: list[int] | None = None) -> None:
        bump_versions(self.gradients if positions is None else [self.gradients[i] for i in positions])


class StepGroup:
    """What an optimizer steps: a :class:`NativeStepGroup`."""

    def __init__(self, group: Group, tensors: list[list[Tensor]], columns: list[Memory | None]) -> None:
        self.group, self._columns = group, columns  # parameter, three states, step count
        self._tensors = tensors  # which are kept alive

    def __len__(self) -> int:
        return len(self.group)

    def segments(self) -> ctypes.Array[StepSegment]:
        """[T], for the CPU kernels."""
        rows = zip(*self._addresses())
        each = (StepSegment(param, (ctypes.c_void_p * 3)(*states), step) for param, *states, step in rows)
        return (StepSegment * len(self))(*each)

    def _addresses(self) -> list[list[int]]:
        return [[0] * len(self) if column is None else column.addresses for column in self._columns]

    def addresses(self) -> Tensor:
        gradients, numels = self.group.addresses_and_sizes()
        others = torch.tensor(self._addresses(), dtype=torch.int64, device="cpu")
        return torch.cat([gradients[None], others, numels[None]])

    def bump_version(self, gradients: bool) -> None:
        bump_versions(self._tensors[0])
        if gradients:
            self.group.bump_version()


class PythonPacker:
    """See :class:`fastclip.backends.packers.Packer`."""

    name = "python"
    unwrap = None  # fastclip.distributed.unwrap does the same in Python

    def __init__(self, kernels: CpuKernels | None) -> None:
        self.kernels = kernels

    def pack(self, items: list[Any], gradients_of: bool, /) -> list[NativeGroup] | None:
        return cast("list[NativeGroup] | None", self._groups(items, gradients_of))

    def _groups(self, items: list[Any], gradients_of: bool) -> list[Group] | None:
        if type(items) is not list or not all(issubclass(kind, Tensor) for kind in set(map(type, items))):
            return None
        if gradients_of:
            if is_flattened(items):
                return None
            items = [gradient for item in items if (gradient := item.grad) is not None]
        if not items:
            return []
        memory = memory_of(items)
        if memory is None:
            return None
        if not are_apart(memory, items):
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

    def pack_step(
        self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor], /
    ) -> StepGroup | None:
        packed = self._groups(grads, False)
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
        if not are_apart(*_together([*arrays, steps], columns)):
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

    def clip_norm_fused(
        self, items: list[Any], of_parameters: bool, max_norm: Any, norm_type: Any, error_if_nonfinite: bool,
        per_tensor: bool, /,
    ) -> Any:  # fmt: skip
        limit, p = (_number(max_norm) if of_parameters else 0.0), _number(norm_type)
        if not (limit >= 0 and p > 0) or is_watched():
            return None
        groups = self._groups(items, of_parameters)
        if not groups:
            return None
        if any(group.device.type != "cpu" for group in groups) or (per_tensor and len(groups) > 1):
            return groups
        wide = any(group.dtype == torch.float64 for group in groups)
        if self.kernels is None:
            norm = None if per_tensor else foreach.clip(groups, p, limit, of_parameters, bool(error_if_nonfinite))
            return groups if norm is None else scalar(norm, torch.float64 if wide else torch.float32)
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


def _number(value: Any) -> float:
    """A Python float or int; NaN for anything else."""
    return float(value) if type(value) is float or type(value) is int else math.nan


def _together(lists: list[list[Tensor]], memories: list[Memory | None]) -> tuple[Memory, list[Tensor]]:
    """The memory of the tensors of several lists."""
    known = [memory for memory in memories if memory is not None]
    together = Memory(
        [x for memory in known for x in memory.storages],
        [x for memory in known for x in memory.addresses],
        [x for memory in known for x in memory.numels],
        [x for memory in known for x in memory.nbytes],
        all(memory.on_host for memory in known),
        None,
    )
    return together, [t for column in lists for t in column]


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


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that tensors were written."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
