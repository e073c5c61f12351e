"""The gradients of a call as a table: groups of one device and dtype, each with the backend that works on it.

A table owns the memory it was made of until the call is over. Where a rule or another thread sets a gradient to None or
gives it other memory (``p.grad.data = x``) meanwhile, that first memory is what is clipped. A :class:`ReadTable` owns
nothing until something is to be done to the gradients, and raises if they are elsewhere then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import GradGroup, Measurement, UploadCache, upload, wide_device
from ..distributed.reduce import Shards

_sizes: UploadCache[Tensor] = UploadCache()


class GradTable:
    """All gradients of a call, in the order of the parameters, each once."""

    shards: Shards | None = None  # where they are this rank's parts of larger ones
    known: list[Measurement] | None = None  # what the next read of each group would give, where that is known

    def __init__(self, groups: list[GradGroup], device: torch.device) -> None:
        self._groups = groups
        self.home = device  # the first gradient's, else the first parameter's
        self.device = wide_device(device)  # where statistics are gathered
        wide = any(group.dtype in (torch.float64, torch.complex128) for group in groups)
        self.dtype = torch.float64 if wide else torch.float32  # of norms and coefficients

    @property
    def groups(self) -> list[GradGroup]:
        return self._groups

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @property
    def tensors(self) -> list[Tensor]:
        """The memory of all gradients, in order."""
        by_position: dict[int, Tensor] = {}
        for group in self.groups:
            by_position.update(zip(group.positions or range(len(group)), group.tensors))
        return [by_position[position] for position in range(len(by_position))]

    def sizes(self) -> Tensor:
        """float64 [T] on the table's device, the element counts of the gradients."""
        if self.shards is not None:
            host = torch.tensor(self.shards.numels(), dtype=torch.int64, device="cpu")
        elif len(self.groups) == 1:
            host = self.groups[0].numels()
        else:
            host = torch.empty(len(self), dtype=torch.int64, device="cpu")
            for group in self.groups:
                host[group.positions] = group.numels()
        if self.device.type == "cpu":
            return host.double()
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        make = functools.partial(upload, host, torch.float64, self.device)
        return _sizes.get(self.device, (self.device, stream), host, make)

    def nonfinite_text(self, names: tuple[str, ...]) -> str:
        """Which gradients hold elements that are not finite, and how many, for a message."""
        concerned = [i for i, tensor in enumerate(self.tensors) if not tensor.isfinite().all()]
        counts = [
            f"{names[i]} ({int((~self.tensors[i].isfinite()).sum())} of {self.tensors[i].numel()})"
            for i in concerned[:5]
        ]
        more = f" and {len(concerned) - 5} more" if len(concerned) > 5 else ""
        found = f"{', '.join(counts)}{more}"
        return found if self.shards is None else "; ".join(self.shards.texts(found))

    def at_home(self, tensor: Tensor) -> Tensor:
        """`tensor`, from where statistics are gathered, on the first gradient's device."""
        if self.home == self.device:
            return tensor
        return (tensor.float() if tensor.dtype == torch.float64 else tensor).to(self.home)

    def apply_(self, coef: Tensor) -> None:
        """Multiply every gradient by its coefficient: float64, [] or [T], on the table's device."""
        for group in self.groups:
            group_coef = coef
            if len(self.groups) > 1 and coef.dim() == 1:
                group_coef = coef[upload(group.positions, torch.int64, coef.device)]
            group.backend.apply_(group, group_coef.to(wide_device(group.device)).contiguous())
        if self.shards is not None and not (coef.device.type == "cpu" and (coef == 1).all()):
            self.shards.bump_versions()

    def bump_versions(self) -> None:
        """Tell autograd that the gradients were written."""
        for group in self.groups:
            group.bump_version()
        if self.shards is not None:
            self.shards.bump_versions()

    def clamp_(self, low: float, high: float) -> Tensor:
        """Limit every element to [low, high]; [] bool on the table's device, whether anything was changed."""
        if self.shards is not None and self.shards.partial:
            raise NotImplementedError(
                "elements of gradients that are yet to be summed over ranks (Partial) cannot be limited: redistribute "
                "them first"
            )
        changed = torch.zeros((), dtype=torch.bool, device=self.device)
        for group in self.groups:
            changed = changed | group.backend.clamp_(group, low, high).to(self.device)
        if self.shards is not None:
            self.shards.bump_versions()
        return changed


class ReadTable(GradTable):
    """The gradients of one group on the CPU, which have been read and are packed only if there is more to do.

    To own thousands of small gradients takes longer than to read them, and a clip mostly leaves them as they are. If a
    gradient is written between the read and the clip, by another thread, it is clipped by what was read, as ever; also
    if it was freed meanwhile, and another one has its memory.

    Args:
        count: T.
        measured: what the read gave.
        wide: whether the gradients are float64.
        fingerprint: of the group that was read.
        pack: -> the table of the gradients that there are now.
    """

    def __init__(
        self, count: int, measured: Measurement, wide: bool, fingerprint: int, pack: Callable[[], GradTable]
    ) -> None:
        self._groups = []
        self.home = self.device = measured.power.device
        self.dtype = torch.float64 if wide else torch.float32
        self.known = [measured]
        self._count, self._fingerprint, self._pack = count, fingerprint, pack

    @property
    def groups(self) -> list[GradGroup]:
        """RuntimeError if the gradients are not where those were that have been read."""
        if not self._groups:
            found = self._pack().groups
            native = found[0].native if len(found) == 1 else None
            if native is None or native.fingerprint() != self._fingerprint:
                raise RuntimeError(
                    "gradients were replaced by others, or given other memory, while they were being clipped; no "
                    "gradient was changed"
                )
            self._groups = found
        return self._groups

    def __len__(self) -> int:
        return self._count
