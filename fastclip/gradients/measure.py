"""Measure: one read of the gradients of a table."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Measurement
from ..distributed.groups import all_reduce, device_for
from ..distributed.unwrap import reduction_of
from ..stats import Stats
from .pack import from_native, pack
from .table import GradTable, ReadTable

PIECE = 1 << 22  # elements of a gradient that are summed over the ranks at a time


def measure(
    table: GradTable,
    norm_type: float,
    max_norm: float | None = None,
    repair: bool = False,
) -> tuple[Stats, Tensor | None]:
    """One read of the table's gradients, unless it is known what that would give; also the clip coefficient of
    `max_norm` where the backends fuse that.

    `repair`: elements that are inf or NaN are set to 0 first, which is another read of the gradients that hold some.
    Of parts of larger tensors the statistics are those of the parts: see :func:`fastclip.distributed.reduce.reduce`.
    """
    counts: list[Tensor] = []
    shards = table.shards
    known, table.known = table.known, None  # used once: who measures again has written
    if known is None:
        parts, chained = _read(table, norm_type, max_norm, chain=not repair and shards is None)
    else:
        parts, chained = known, len(known) == 1 and not repair and shards is None
    if repair:
        for i, group in enumerate(table.groups):
            parts[i], zeroed = group.backend.repair_(group, parts[i], norm_type)
            counts.append(zeroed)
    positions = [p for group in table.groups for p in group.positions] if len(parts) > 1 else None
    last = parts[-1] if chained else None  # which has the norm of all
    norm, norm32, coef = (None, None, None) if last is None else (last.norm, last.norm32, last.coef)
    stats = Stats(norm_type, table.dtype, table.device, parts, positions, norm, norm32)
    if repair:
        stats.zeroed = stats.gathered(counts) if counts else torch.zeros(0, dtype=torch.int64, device=table.device)
    if shards is not None and shards.partial:
        power, absmax = stats.power.clone(), stats.absmax.clone()
        _measure_partial(table, norm_type, power, absmax)
        zeroed_counts, stats = stats.zeroed, Stats(norm_type, table.dtype, table.device, [Measurement(power, absmax)])
        stats.zeroed = zeroed_counts
    return stats, coef


def _read(table: GradTable, norm_type: float, max_norm: float | None, chain: bool) -> tuple[list[Measurement], bool]:
    """One read of each group; and whether the last measurement has the norm of all, which it may have if `chain`."""
    parts: list[Measurement] = []
    chained = chain and len({(group.backend, group.device) for group in table.groups}) == 1
    before: Tensor | None = None
    for group in table.groups:
        parts.append(group.backend.measure(group, norm_type, max_norm if chained else None, before))
        before = parts[-1].total if chained else None
    return parts, chained


def read(parameters: list[Any], norm_type: float) -> GradTable | None:
    """The table of the gradients of plain parameters, if it takes less time to read them now than to pack them first.
    Decide at once: the statistics are those of this moment."""
    fused = backends.choose_fused()
    if fused is None or fused.measure_gradients is None:
        return None
    found = fused.measure_gradients(parameters, norm_type)
    if not isinstance(found, tuple):
        return from_native(found) if found else None
    power, absmax, norm, wide, fingerprint = found
    again = functools.partial(pack, parameters, gradients=False, write=True)
    return ReadTable(len(power), Measurement(power, absmax, norm), wide, fingerprint, again)


def _measure_partial(table: GradTable, norm_type: float, power: Tensor, absmax: Tensor) -> None:
    """Set the statistics of gradients that are yet to be summed over ranks, among those of all, to what they will be.

    Summed PIECE elements at a time, small gradients together, so that no large sum is ever held.
    """
    assert table.shards is not None
    tensors = table.tensors
    pieces: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)  # by what they are summed over
    for i, spec in sorted(table.shards.partial.items()):
        power[i] = absmax[i] = 0
        groups, share = reduction_of(spec)
        key = tuple(groups), share, tensors[i].dtype
        pieces[key] += [(i, piece) for piece in torch.split(tensors[i].reshape(-1), PIECE) if len(piece)]
    for (groups, share, dtype), listed in pieces.items():
        while listed:
            taken = [listed.pop(0)]
            while listed and sum(len(piece) for _, piece in taken) + len(listed[0][1]) <= PIECE:
                taken.append(listed.pop(0))
            flat = torch.cat([piece for _, piece in taken]).to(torch.promote_types(dtype, torch.float32))
            flat = all_reduce(flat, list(groups), None, device_for(list(groups), flat.device)) * share
            sums = torch.split_with_sizes(flat, [len(piece) for _, piece in taken])
            (group,) = pack(list(sums), gradients=True, write=False).groups
            measured = group.backend.measure(group, norm_type)
            index = torch.tensor([i for i, _ in taken], device=power.device)
            power.index_add_(0, index, measured.power.to(power.device))
            absmax.index_copy_(0, index, torch.maximum(absmax[index], measured.absmax.to(absmax.device)))
