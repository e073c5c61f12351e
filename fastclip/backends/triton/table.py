"""The address table that measure, apply, clamp and repair walk.

It gives each tensor as the elements [begin, end) counted from an address rounded down to 16 bytes, so that every tile
that lies fully inside a tensor, however the tensor is aligned, is read with unmasked 16-byte loads; only the edges of a
tensor carry a mask. Tiles are numbered through over all tensors, and every program takes one contiguous run of them:
it meets few tensors, and shares at most two of them, the first and the last, with others.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..base import GradGroup
from ..transfer import UploadCache, upload
from .launch import current_stream
from .tiles import MISSING, NUM_WARPS, most_programs

if MISSING is None:
    import triton
    import triton.language as tl

    from .tiles import MOST_EDGE

MOST_RUN = 1 << 30  # elements of a program's run, which are counted in 32 bits
LOADS = 4  # of 16 bytes, a thread has in flight
TILE_BYTES = 32 * NUM_WARPS * 16 * LOADS

if MISSING is None:
    WALKED = ("addresses_ptr", "layout_ptr")  # `addresses_ptr`, int64: multiples of 16 [T]
    # `layout_ptr`, int32, of T tensors and P programs: where each tensor begins, in elements from its address rounded
    # down, and where it ends in its last tile [T] [T]; its first tile, and how many there are of all [T + 1]; the first
    # and the last tensor that each program meets [P] [P].

    @triton.jit
    def split_piece(begin, end, BLOCK: tl.constexpr):
        """[begin, end) as full tiles and, before and after them, edges: smaller tiles that need a mask."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin = (begin + BLOCK - 1) // BLOCK * BLOCK
        full_end = tl.maximum(end // BLOCK * BLOCK, full_begin)
        head = begin // EDGE * EDGE
        heads = (tl.minimum(full_begin, end) - head + EDGE - 1) // EDGE
        tails = (tl.maximum(end - full_end, 0) + EDGE - 1) // EDGE
        return full_begin, full_end, head, heads, tails

    @triton.jit
    def run_of(layout_ptr, tensors, tiles):
        """The run of tiles that a program takes, and the first and the last tensor that it meets."""
        program, programs = tl.program_id(0), tl.num_programs(0)
        begin = tiles.to(tl.int64) * program // programs
        end = tiles.to(tl.int64) * (program + 1) // programs
        meets_ptr = layout_ptr + 3 * tensors + 1 + program
        return begin.to(tl.int32), end.to(tl.int32), tl.load(meets_ptr), tl.load(meets_ptr + programs)

    @triton.jit
    def program_of(tile, tiles):
        """The program whose run has this tile."""
        return (((tile.to(tl.int64) + 1) * tl.num_programs(0) - 1) // tiles).to(tl.int32)

    @triton.jit
    def tiles_of(layout_ptr, tensor, tensors):
        """A tensor's first tile, and the one after its last."""
        offset_ptr = layout_ptr + 2 * tensors + tensor
        return tl.load(offset_ptr), tl.load(offset_ptr + 1)

    @triton.jit
    def piece_of(
        addresses_ptr, layout_ptr, tensor, tensors, run_begin, run_end, DTYPE: tl.constexpr, TILE: tl.constexpr
    ):
        """The part of a tensor that is in a run: the elements [begin, end) from a base."""
        first, after = tiles_of(layout_ptr, tensor, tensors)
        address = tl.load(addresses_ptr + tensor).to(tl.pointer_type(DTYPE))
        base = tl.multiple_of(address + tl.maximum(run_begin - first, 0).to(tl.int64) * TILE, 16)
        begin = tl.where(first < run_begin, 0, tl.load(layout_ptr + tensor))
        tiles = tl.minimum(run_end, after) - tl.maximum(run_begin, first)
        end = tl.where(run_end < after, tiles * TILE, (tiles - 1) * TILE + tl.load(layout_ptr + tensors + tensor))
        return base, begin, end

    @triton.jit
    def is_finite(x):
        return tl.abs(x) < float("inf")


# ---- host ----


class Layout:
    """What a table is but for the addresses themselves: it holds for gradients of the same sizes and alignments. And
    the workspace of `measure`, so that two streams, or a stream and a CUDA graph, must not share one."""

    def __init__(self, group: GradGroup, sizes: Tensor, begins: Tensor) -> None:
        device = group.device
        self.tile = TILE_BYTES // group.dtype.itemsize  # elements
        ends = torch.where(sizes > 0, begins + sizes, 0)
        counts = (ends + self.tile - 1) // self.tile
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.tensors, self.tiles = len(sizes), int(offsets[-1])
        longest = MOST_RUN // self.tile
        self.programs = max(1, min(most_programs(device), self.tiles), -(-self.tiles // longest))
        runs = torch.arange(self.programs + 1, device="cpu") * self.tiles // self.programs
        # Of tensors that begin at the same tile only the last has it, the others being empty.
        first = torch.searchsorted(offsets, runs[:-1], right=True) - 1
        last = torch.searchsorted(offsets, runs[1:] - 1, right=True) - 1  # without tiles -1: no tensor
        rows = [begins, (ends - 1) % self.tile + 1, offsets, first, last]
        self.device = upload(torch.cat(rows), torch.int32, device)
        self.partial = torch.empty(4 * self.programs, dtype=torch.float64, device=device)
        self.done = torch.zeros(self.programs + 1, dtype=torch.int32, device=device)


class Table:
    """A group's addresses on its device, and the layout that they have."""

    def __init__(self, layout: Layout, addresses: Tensor, device: torch.device) -> None:
        self.layout = layout
        self.addresses = upload(addresses, torch.int64, device)


_layouts: UploadCache[Layout] = UploadCache()
_tables: UploadCache[Table] = UploadCache()
_groups: WeakKeyDictionary[GradGroup, Table] = WeakKeyDictionary()  # of the verbs of one call


def table_of(group: GradGroup) -> Table:
    """The table of the group's present addresses: one made before if they are the same, so that nothing is uploaded."""
    table = _groups.get(group)
    if table is None:
        host = group.addresses_and_sizes()
        key = (group.device, group.dtype, current_stream(group.device))
        table = _groups[group] = _tables.get(group.device, key, host, lambda: _make_table(group, key, host))
    return table


def _make_table(group: GradGroup, key: object, host: Tensor) -> Table:
    """New addresses: with the layout of others that had the same sizes and alignments, if there were any."""
    addresses, sizes = host
    odd = addresses & 15
    begins = odd >> (group.dtype.itemsize.bit_length() - 1)
    shape = torch.stack([sizes, begins])
    layout = _layouts.get(group.device, key, shape, lambda: Layout(group, sizes, begins))
    return Table(layout, addresses - odd, group.device)
