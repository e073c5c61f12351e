"""Gradients as the packer in Python makes groups of them, and where tensors are in memory."""

from __future__ import annotations

import ctypes
import operator
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.nn import Parameter

from ..devices import ADDRESSED
from ..native.cpu_interface import DTYPES, Segment, StepSegment, Table
from ..torch_internals import is_dense, storage_key

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
        if not all(map(Tensor.is_contiguous, tensors)) and not all(map(is_dense, tensors)):
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
    if any(map(operator.gt, nbytes, ends)) and any(b > e for n, b, e in zip(numels, nbytes, ends) if n):
        return None  # freed or shrunk
    if 0 in addresses and any(n and not a for n, a in zip(numels, addresses)):
        return None
    kind = (devices.pop(), dtypes.pop()) if alike else None
    return Memory(storages, addresses, numels, nbytes, on_host, kind)


def are_apart(memory: Memory, tensors: list[Tensor]) -> bool:
    """Whether no two of the tensors share memory, for certain."""
    if len(tensors) == 1:
        return True
    if not memory.on_host and any(t.device.type not in ADDRESSED for t in tensors):
        owners = [storage_key(storage) for storage, numel in zip(memory.storages, memory.numels) if numel]
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
        if not self.numels[i]:
            return gradient.numel() == 0
        storage = gradient.untyped_storage()
        address = storage.data_ptr() + gradient.storage_offset() * gradient.itemsize
        return (
            storage_key(storage) == storage_key(self._storages[i])
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

    def fingerprint(self) -> int:
        return hash((self.addresses.tobytes(), self.numels.tobytes(), self.dtype))

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


def together(lists: list[list[Tensor]], memories: list[Memory | None]) -> tuple[Memory, list[Tensor]]:
    """The memory of the tensors of several lists."""
    known = [memory for memory in memories if memory is not None]
    memory = Memory(
        [x for memory in known for x in memory.storages],
        [x for memory in known for x in memory.addresses],
        [x for memory in known for x in memory.numels],
        [x for memory in known for x in memory.nbytes],
        all(memory.on_host for memory in known),
        None,
    )
    return memory, [t for column in lists for t in column]


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that tensors were written."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
