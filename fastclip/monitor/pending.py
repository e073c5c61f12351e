"""A step's statistics, from the launch of their copy until they are on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host_stats import HostStats, StatsLayout, flattened
from ..stats import Stats


class PendingRead(NamedTuple):
    """Statistics that are still to be taken up: on their way to the host, or there already."""

    step: int
    loss: float | None  # if that was on the host
    stats: Stats | None = None  # if they were on the host, where nothing changes them: read when they are taken up
    host: Tensor | None = None
    layout: StatsLayout | None = None
    event: Any = None  # its query() says whether `host` is complete; None: it is

    @classmethod
    def start(cls, step: int, stats: Stats, loss: float | None, loss_on_device: Tensor | None) -> PendingRead:
        """Keep statistics that are on the host; start to copy those that are not, on the current stream."""
        if stats.device.type == "cpu" and loss_on_device is None:
            return cls(step, loss, stats)
        flat, layout = flattened(stats.tensors(), loss_on_device)
        if flat.device.type != "cuda":
            return cls(step, loss, host=flat.cpu(), layout=layout)
        host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(flat.device))
        return cls(step, loss, host=host, layout=layout, event=event)

    def read(self) -> HostStats:
        """The statistics as numbers. Only once `event` is complete."""
        if self.stats is not None:
            return HostStats.of(self.stats.tensors())
        assert self.host is not None and self.layout is not None
        return HostStats(self.host, self.layout)
