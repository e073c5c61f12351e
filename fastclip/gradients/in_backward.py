"""Sums that are taken while backward runs: each gradient is read as it comes, on a CPU while it is still in the cache,
on a GPU on a stream of its own. After backward only those are read again that have changed since.

What a hook saw of a gradient is held against what is there when the sums are wanted: the tensor itself, its version
(autograd counts whatever is written), its storage, address, element count and dtype. Nothing is kept alive for that.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.nn.parameter import is_lazy

from .. import backends, packers
from ..backends import Backend, GradGroup, Measurement, capturing, upload
from ..distributed.unwrap import specs_of
from ..modes import is_watched
from .buckets import Buckets
from .table import GradTable

# Of a bucket: little enough to be in a cache still, much enough that its bookkeeping does not count.
CPU_BYTES = 1 << 24
SMALL = 1 << 17  # bytes; to read a smaller gradient after backward takes less time than to remember it
GPU_BYTES = 1 << 26  # much enough for a launch; or an eighth of all, so that few tables of addresses are uploaded
GPU_BUCKETS = 8
GPU_PENDING = 4  # buckets that may be on their way on a GPU

GRAD, VERSION = operator.attrgetter("grad"), operator.attrgetter("_version")


class Seen(NamedTuple):
    """A gradient as it was when it was measured. None of it keeps the gradient, or its memory, alive."""

    gradient: weakref.ref[Tensor]
    version: int
    storage: weakref.ref[UntypedStorage]
    address: int
    numel: int
    dtype: torch.dtype
    measured: Measurement  # of the bucket
    row: int  # in it

    def is_still(self, gradient: Tensor, address: int, numel: int, dtype: torch.dtype) -> bool:
        """Whether that gradient, of which the last three were packed, is as it was. The memory is dense."""
        return (
            self.gradient() is gradient
            and self.version == gradient._version
            and self.storage() is gradient.untyped_storage()
            and self.address == address
            and self.numel == numel
            and self.dtype == dtype
        )


class BackwardSums:
    """Takes the sums of parameters' gradients while backward runs, bucket by bucket.

    Nothing is measured in a CUDA graph, nor once torch.distributed is initialized: what sums plain gradients over the
    ranks writes them after the hooks, and does not tell autograd; and what foreach operations write of DTensors changes
    the version neither of these nor of their parts.
    """

    def __init__(self, norm_type: float) -> None:
        self._norm_type = norm_type
        self._buckets = Buckets(self._take, CPU_BYTES)
        self._parameters: list[Tensor] | None = None
        self._large: list[Tensor] = []  # those of them that are worth it
        self._seen: dict[int, Seen] = {}  # by the id of the parameter; the gradient itself is what is compared
        self._backends: dict[torch.device, Backend] = {}  # of this backward
        self._captured: set[int] = set()  # ids of parameters whose gradients a CUDA graph writes, and tells nobody
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pending: dict[torch.device, deque[tuple[torch.cuda.Event, list[Tensor]]]] = {}
        self._orders: dict[Any, tuple[list[int], Tensor]] = {}

    def __reduce__(self) -> Any:
        return BackwardSums, (self._norm_type,)  # a copy has other parameters: its hooks come with watch()

    def __len__(self) -> int:
        """Of how many gradients there are sums."""
        return len(self._seen)

    def watch(self, parameters: list[Tensor]) -> None:
        """Measure the gradients of these parameters, as far as they require one, and of no others any more."""
        if parameters is not self._parameters:
            self._parameters = parameters
            plain = [p for p, spec in zip(parameters, specs_of(parameters)) if spec is None and not is_lazy(p)]
            sizes = [p.numel() * p.itemsize for p in plain]
            on_gpu = any(p.device.type != "cpu" for p in plain)
            self._buckets.bucket_bytes = max(GPU_BYTES, sum(sizes) // GPU_BUCKETS) if on_gpu else CPU_BYTES
            self._large = [p for p, size in zip(plain, sizes) if size >= SMALL]
            self._seen.clear()
            self._captured.clear()
            self._buckets.clear()  # which holds those that wait
        self._buckets.watch([] if _is_distributed() else self._large)

    def forget_waiting(self) -> None:
        """Hold no parameters whose gradients are yet to be measured: they were read otherwise."""
        self._buckets.clear()

    def _take(self, parameters: list[Tensor]) -> None:
        """Measure gradients that have come."""
        for key in map(id, parameters):
            self._seen.pop(key, None)
        if any(map(capturing, {p.device for p in parameters})):
            self._captured.update(map(id, parameters))
            return
        if is_watched() or _is_distributed():
            return
        measurable = [p for p in parameters if _tells_writes(p.grad)]
        if measurable:
            self._measure(list(map(id, measurable)), list(map(GRAD, measurable)))

    def _measure(self, owners: list[int], gradients: list[Tensor]) -> None:
        packed = packers.get().packer.pack(gradients, False)
        if not packed or sum(map(len, packed)) < len(gradients):  # one is not plain, or they share memory
            if len(gradients) > 1:
                for owner, gradient in zip(owners, gradients):
                    self._measure([owner], [gradient])
            return
        for native in packed:
            if native.device not in self._backends:
                self._backends[native.device] = backends.choose(native.device)
            group = GradGroup(self._backends[native.device], native.positions, None, native)
            places = native.positions or range(len(gradients))
            self._note(group, [owners[i] for i in places], [gradients[i] for i in places])

    def _note(self, group: GradGroup, owners: list[int], gradients: list[Tensor]) -> None:
        """Measure a group, and note what its gradients are now."""
        versions, refs = list(map(VERSION, gradients)), list(map(weakref.ref, gradients))
        storages = list(map(weakref.ref, map(Tensor.untyped_storage, gradients)))
        addresses, numels = group.addresses_and_sizes().tolist()
        measured = self._measured(group, gradients)
        rows = zip(
            *(refs, versions, storages, addresses, numels),
            *(itertools.repeat(group.dtype), itertools.repeat(measured), itertools.count()),
        )
        self._seen.update(zip(owners, map(Seen._make, rows)))

    def _measured(self, group: GradGroup, gradients: list[Tensor]) -> Measurement:
        """One read, on a GPU on a stream of its own behind what wrote the gradients. These are held until the stream
        that backward runs on waits for that read, so that their memory is not given to others before."""
        device = group.device
        if device.type != "cuda":
            return group.backend.measure(group, self._norm_type)
        current = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device], self._pending[device] = torch.cuda.Stream(device), deque()  # type: ignore[no-untyped-call]
        side, pending = self._streams[device], self._pending[device]
        while len(pending) >= GPU_PENDING:
            current.wait_event(pending[0][0])
            pending.popleft()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            measured = group.backend.measure(group, self._norm_type)
            event = side.record_event()
        pending.append((event, gradients))
        return measured

    def of(self, table: GradTable, owners: list[list[Tensor]]) -> list[Measurement] | None:
        """What one read of each group of the table would give; None: nothing is known, read it all.

        `owners`: the parameters that have each gradient of the table. What has changed since it was measured is read
        again, all of a group together. The sums count once: whoever asks another time reads.
        """
        self._buckets.clear()  # what has not been handed over yet is read here, with the rest
        seen, self._seen = self._seen, {}
        self._backends.clear()
        if capturing(table.device):
            return None
        self._wait()
        if not seen or not table.groups or is_watched() or _is_distributed():
            return None
        found = [self._found(seen, each) for each in owners]
        return [
            self._completed(group, [found[i] for i in group.positions or range(len(group))]) for group in table.groups
        ]

    def _found(self, seen: dict[int, Seen], owners: list[Tensor]) -> tuple[Seen, Tensor] | None:
        """What was seen of a gradient that one parameter has alone: what another writes to it, this one's version may
        not tell."""
        if len(owners) > 1 or id(owners[0]) in self._captured:
            return None
        one = seen.get(id(owners[0]))
        return None if one is None else (one, owners[0])

    def _completed(self, group: GradGroup, found: list[tuple[Seen, Tensor] | None]) -> Measurement:
        """The measurement of a group, from those of the buckets and one of what has changed."""
        if group.native is None:
            return group.backend.measure(group, self._norm_type)
        sources: dict[int, tuple[Measurement, int]] = {}  # with the place of its first row among those of all
        total, order, changed = 0, [], []
        for i, (each, address, numel) in enumerate(zip(found, *group.addresses_and_sizes().tolist())):
            if each is not None and (gradient := each[1].grad) is not None:
                one = each[0]
                if one.is_still(gradient, address, numel, group.dtype):
                    source = sources.get(id(one.measured))
                    if source is None:
                        source = sources[id(one.measured)] = one.measured, total
                        total += len(one.measured.power)
                    order.append(source[1] + one.row)
                    continue
            changed.append(i)
            order.append(-1)
        measurements = [measured for measured, _ in sources.values()]
        if changed:
            again = self._read(group, changed)
            if len(changed) == len(order) or again is None:
                return group.backend.measure(group, self._norm_type) if again is None else again
            measurements.append(again)
            for row, i in enumerate(changed):
                order[i] = total + row
        return self._gathered(group, measurements, order)

    def _read(self, group: GradGroup, positions: list[int]) -> Measurement | None:
        """One read of some of a group's gradients; None where they cannot be packed by themselves."""
        if len(positions) == len(group):
            return group.backend.measure(group, self._norm_type)
        tensors = group.tensors
        packed = packers.get().packer.pack([tensors[i] for i in positions], False)
        if not packed or len(packed[0]) != len(positions):
            return None
        return group.backend.measure(GradGroup(group.backend, [], None, packed[0]), self._norm_type)

    def _gathered(self, group: GradGroup, measurements: list[Measurement], order: list[int]) -> Measurement:
        if group.device.type == "cuda":
            for measured in measurements:  # of another stream, which must not give their memory to its next ones yet
                measured.power.record_stream(torch.cuda.current_stream(group.device))
        powers = [measured.power for measured in measurements]
        maxima = [measured.absmax for measured in measurements]
        if len(measurements) > 1:
            powers, maxima = [torch.cat(powers)], [torch.cat(maxima)]
        if order != list(range(len(powers[0]))):
            device = powers[0].device
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            key = group.device, group.dtype, stream
            kept = self._orders.get(key)
            if kept is None or kept[0] != order:
                kept = self._orders[key] = order, upload(order, torch.int64, device)
            powers, maxima = [powers[0][kept[1]]], [maxima[0][kept[1]]]
        return Measurement(powers[0], maxima[0])

    def _wait(self) -> None:
        """Let the current streams wait for all that was launched beside them."""
        for device, side in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(side)
            self._pending[device].clear()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _tells_writes(gradient: Tensor | None) -> bool:
    """Whether there is a gradient whose version all writes change that autograd hears of."""
    return type(gradient) is Tensor and not gradient.is_inference()
