"""Measure: one read of the gradients of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Measurement
from ..stats import Stats
from .table import GradTable


def measure(
    table: GradTable, norm_type: float, max_norm: float | None = None, repair: bool = False
) -> tuple[Stats, Tensor | None]:
    """One read of the table's gradients; also the clip coefficient of `max_norm` where the backends fuse that.

    `repair`: elements that are inf or NaN are set to 0 first, which is another read of the gradients that hold some.
    """
    parts: list[Measurement] = []
    counts: list[Tensor] = []
    chained = len({(group.backend, group.device) for group in table.groups}) == 1 and not repair
    before: Tensor | None = None
    for group in table.groups:
        parts.append(group.backend.measure(group, norm_type, max_norm, before))
        before = parts[-1].total if chained else None
        if repair:
            parts[-1], zeroed = group.backend.repair_(group, parts[-1], norm_type)
            counts.append(zeroed)
    positions = [p for group in table.groups for p in group.positions] if len(parts) > 1 else None
    norm, coef = (parts[-1].norm, parts[-1].coef) if chained else (None, None)
    stats = Stats(norm_type, table.dtype, table.device, parts, positions, norm)
    if repair:
        stats.zeroed = stats.gathered(counts) if counts else torch.zeros(0, dtype=torch.int64, device=table.device)
    return stats, coef
