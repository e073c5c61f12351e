"""What the Triton kernels share: tensors cut into tiles or chunks of them, and how many programs walk these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    MISSING = None
except ImportError as error:  # pragma: no cover - exercised in a subprocess
    MISSING = f"triton cannot be imported ({error})"

NUM_WARPS = 8
PROGRAMS_PER_SM = 4
MOST_REGISTERS = 65536 // (32 * NUM_WARPS * PROGRAMS_PER_SM)  # a thread, for so many programs on a multiprocessor
CHUNKS_PER_PROGRAM = 8  # enough for an even end, few enough to keep the bookkeeping small
TILES_PER_CHUNK = 64  # at most
INTERPRET_PROGRAMS = 3  # more than one, so that the tests see programs share the work

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for other GPUs than NVIDIA's
    gdc_launch_dependents = gdc_wait = None

if MISSING is None:
    INTERPRET = bool(triton.knobs.runtime.interpret)
    INTERPRETED = tl.constexpr(INTERPRET)
    MOST_EDGE = tl.constexpr(1024)  # elements of a masked tile, at most
    DTYPES = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float64: tl.float64,
    }

    @triton.jit
    def tile(base, offset, BLOCK: tl.constexpr):
        """Pointers to the elements [offset, offset + BLOCK) from base."""
        return base + tl.multiple_of(offset, BLOCK) + tl.arange(0, BLOCK)

    @triton.jit
    def inside(offset, begin, end, BLOCK: tl.constexpr):
        """Which of the elements [offset, offset + BLOCK) lie in [begin, end)."""
        index = tl.arange(0, BLOCK)
        low, high = tl.maximum(begin - offset, 0).to(tl.int32), tl.minimum(end - offset, BLOCK).to(tl.int32)
        return (index >= low) & (index < high)

    @triton.jit
    def narrow(wide, DTYPE: tl.constexpr):
        """Rounded to nearest even. The interpreter cuts float32 off to bfloat16, so there it is done by hand."""
        if INTERPRETED and DTYPE == tl.bfloat16:
            bits = wide.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return tl.where(wide == wide, rounded, bits).to(tl.float32, bitcast=True).to(DTYPE)
        else:
            return wide.to(DTYPE)
else:
    INTERPRET = False


class Chunking(NamedTuple):
    """Tensors cut into chunks of one size, numbered through, as the optimizers' steps take them."""

    size: int  # elements of a chunk
    firsts: Tensor  # int64 [T + 1] on the host: each tensor's first chunk, then the number of chunks
    owners: Tensor  # int64 [chunks] on the host: the tensor a chunk is of
    programs: int


def split_chunks(ends: Tensor, block: int, device: torch.device) -> Chunking:
    """[0, end) of each tensor in chunks of whole tiles of `block` elements; ends: int64 [T] on the host."""
    most = most_programs(device)
    tiles = int(((ends + block - 1) // block).sum())
    size = block * min(TILES_PER_CHUNK, max(1, tiles // (most * CHUNKS_PER_PROGRAM)))
    counts = (ends + size - 1) // size
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owners = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    return Chunking(size, firsts, owners, max(1, min(most, len(owners))))


def most_programs(device: torch.device) -> int:
    """How many programs of `measure` run at a time."""
    if INTERPRET:
        return INTERPRET_PROGRAMS
    properties = torch.get_device_module(device.type).get_device_properties(device)
    units = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    return int(units) * PROGRAMS_PER_SM
