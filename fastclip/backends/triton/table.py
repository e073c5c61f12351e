"""The address table that measure, apply, clamp and repair walk.

It gives each tensor as the elements [begin, end) counted from an address rounded down to 16 bytes, so that every tile
that lies fully inside a tensor, however the tensor is aligned, is read with unmasked 16-byte loads; only the edges of a
tensor carry a mask. A persistent grid walks the chunks.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..base import GradGroup
from ..transfer import UploadCache, upload
from .tiles import MISSING, NUM_WARPS, current_stream, split_chunks

if MISSING is None:
    import triton
    import triton.language as tl

    from .tiles import MOST_EDGE

TILE_BYTES = 32 * NUM_WARPS * 64  # four 16-byte loads a thread in flight

if MISSING is None:

    @triton.jit
    def split_chunk(begin, end, BLOCK: tl.constexpr):
        """[begin, end) as full tiles and, before and after them, edges: smaller tiles that need a mask."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin = (begin + BLOCK - 1) // BLOCK * BLOCK
        full_end = tl.maximum(end // BLOCK * BLOCK, full_begin)
        head = begin // EDGE * EDGE
        heads = (tl.minimum(full_begin, end) - head + EDGE - 1) // EDGE
        tails = (tl.maximum(end - full_end, 0) + EDGE - 1) // EDGE
        return full_begin, full_end, head, heads, tails

    @triton.jit
    def chunk_of(table_ptr, chunk, tensors, chunk_size, DTYPE: tl.constexpr):
        """Which tensor a chunk is of, that tensor's first chunk and chunk count, and the chunk's elements."""
        tensor = tl.load(table_ptr + 4 * tensors + 1 + chunk)
        address = tl.load(table_ptr + tensor)
        base = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        first = tl.load(table_ptr + 3 * tensors + tensor)
        count = tl.load(table_ptr + 3 * tensors + tensor + 1) - first
        start = (chunk - first) * chunk_size
        begin = tl.maximum(start, tl.load(table_ptr + tensors + tensor))
        end = tl.minimum(start + chunk_size, tl.load(table_ptr + 2 * tensors + tensor))
        return tensor, first, count, base, begin, end

    @triton.jit
    def is_finite(x):
        return tl.abs(x) < float("inf")


# ---- host ----


class Table:
    """A group's addresses on its device, cut into chunks, with the workspace of `measure`."""

    def __init__(self, group: GradGroup, host: Tensor) -> None:
        addresses, sizes = host
        self.block = TILE_BYTES // group.dtype.itemsize
        begins = addresses % 16 // group.dtype.itemsize
        ends = begins + sizes
        chunks = split_chunks(torch.where(sizes > 0, ends, 0), self.block, group.device)
        self.chunk_size, self.chunks, self.programs = chunks.size, len(chunks.owners), chunks.programs
        table = torch.cat([addresses - addresses % 16, begins, ends, chunks.firsts, chunks.owners])
        self.device = upload(table, torch.int64, group.device)
        self.partial = torch.empty(2, max(1, self.chunks), dtype=torch.float64, device=group.device)
        self.done = torch.zeros(len(sizes) + 1, dtype=torch.int32, device=group.device)


_tables: UploadCache[Table] = UploadCache()
_groups: WeakKeyDictionary[GradGroup, Table] = WeakKeyDictionary()  # of the verbs of one call


def table_of(group: GradGroup) -> Table:
    """The table of the group's present addresses: one made before if they are the same, so that nothing is uploaded."""
    table = _groups.get(group)
    if table is None:
        host = group.addresses_and_sizes()
        key = (group.device, group.dtype, current_stream(group.device))
        table = _groups[group] = _tables.get(group.device, key, host, lambda: Table(group, host))
    return table
