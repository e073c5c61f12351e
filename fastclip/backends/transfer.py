"""From the host to a device without waiting for it, and without doing so again for what is there already; and counts
that stay there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_captured: list[Tensor] = []  # what CUDA graphs copy from the host at every replay, for as long as the process lives


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` (a list or a tensor on the host) as a tensor on `device`, without waiting for the device."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host
    if isinstance(values, Tensor) and host.data_ptr() == values.data_ptr():
        host = host.clone()  # pinned already, it would be read after its owner has changed it
    if device.type not in ("cuda", "xpu"):
        return host.to(device)
    host = host.pin_memory()
    if capturing(device):
        _captured.append(host)
    return host.to(device, non_blocking=True)


def added(total: Tensor | None, more: Tensor) -> Tensor:
    """`total` and `more`, in the memory of `total`, which a CUDA graph may know."""
    if total is None or total.device != more.device:
        if capturing(more.device):
            raise RuntimeError(
                "call the Clipper once before it is captured in a CUDA graph: it has nothing to count in yet"
            )
        with torch.inference_mode(False):  # a tensor made in inference mode could not be changed outside of it
            total = torch.zeros((), dtype=torch.int64, device=more.device) if total is None else total.to(more.device)
    return total.add_(more)


def loaded(total: Tensor | None, saved: int) -> Tensor | None:
    """`saved` in the memory of `total`; None: it was 0 and still is."""
    if total is None:
        with torch.inference_mode(False):
            return torch.tensor(saved, dtype=torch.int64, device="cpu") if saved else None
    return total.fill_(saved)


Made = TypeVar("Made")


class UploadCache(Generic[Made]):
    """What was made from the most recent tables, so that a call that finds the same addresses again uploads nothing.

    Entries are found by a key (device, dtype, stream) and by all of the table's contents, so none can be stale.
    """

    SIZE = 16

    def __init__(self) -> None:
        self.entries: list[tuple[Any, Tensor, Made]] = []  # most recently used first
        self._lock = threading.Lock()  # torch.equal lets other threads run in the middle of a search

    def get(self, device: torch.device, key: Any, host: Tensor, make: Callable[[], Made]) -> Made:
        """make(), or what it gave for the same key and contents before."""
        if capturing(device):
            return make()  # every copy must be in the graph, and memory that it captured must not serve others
        with self._lock:
            for i, entry in enumerate(self.entries):
                if entry[0] == key and torch.equal(entry[1], host):
                    self.entries.insert(0, self.entries.pop(i))
                    return entry[2]
            self.entries.insert(0, (key, host, make()))
            del self.entries[self.SIZE :]
            return self.entries[0][2]
