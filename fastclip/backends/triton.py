"""The `triton` backend: multi-tensor kernels over an address table, one launch a phase whatever the number of tensors.

The table gives each tensor as the elements [begin, end) counted from an address rounded down to 16 bytes, so that every
tile that lies fully inside a tensor, however the tensor is aligned, is read with unmasked 16-byte loads; only the edges
of a tensor carry a mask. A persistent grid walks the chunks. Sums are float32 within a chunk and float64 across chunks,
combined in chunk order by whichever program finishes a tensor last, so results are bitwise repeatable.

With TRITON_INTERPRET=1 all of this runs on CPU tensors.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import Measurement, Recent, upload
from .triton_step import adamw_, sgd_  # noqa: F401
from .triton_table import INTERPRET, MISSING, NUM_WARPS, current_stream, cut, on

if MISSING is None:
    import triton
    import triton.language as tl

    from .triton_table import DTYPES, MOST_EDGE, inside, narrow, tile

if TYPE_CHECKING:
    from ..table import Group

name = "triton"

TILE_BYTES = 32 * NUM_WARPS * 64  # four 16-byte loads a thread in flight

if MISSING is None:
    L2, L1, MAX, POWER = (tl.constexpr(i) for i in range(4))
    VANISHING = tl.constexpr(1e-24)  # a float32 power sum below this may have lost more than rounding
    COMBINE = tl.constexpr(1024)  # chunk or tensor results combined at a time

    # ---- measure ----

    @triton.jit
    def _split_chunk(begin, end, BLOCK: tl.constexpr):
        """[begin, end) as full tiles and, before and after them, edges: smaller tiles that need a mask."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin = (begin + BLOCK - 1) // BLOCK * BLOCK
        full_end = tl.maximum(end // BLOCK * BLOCK, full_begin)
        head = begin // EDGE * EDGE
        heads = (tl.minimum(full_begin, end) - head + EDGE - 1) // EDGE
        tails = (tl.maximum(end - full_end, 0) + EDGE - 1) // EDGE
        return full_begin, full_end, head, heads, tails

    @triton.jit
    def _accumulate(sums, largest, x, scale, p, NORM: tl.constexpr, SCALED: tl.constexpr):
        """sums + |x|^p, and the larger of the magnitudes as sign-stripped bits: ordered like |x|, NaN above inf."""
        if x.dtype == tl.float64:
            magnitude = tl.abs(x)
            bits = magnitude.to(tl.int64, bitcast=True)
        else:
            magnitude = tl.abs(x.to(tl.float32))
            bits = magnitude.to(tl.int32, bitcast=True)
        if SCALED:
            magnitude = magnitude * scale
        if NORM == L2:
            sums += magnitude * magnitude
        elif NORM == L1:
            sums += magnitude
        elif NORM == POWER:
            wide = magnitude.to(tl.float64)
            raised = tl.exp2(p * tl.log2(tl.where(wide == 0, 1.0, wide)))
            sums += tl.where(wide == 0, 0.0, tl.where(p == 0, 1.0, raised))
        return sums, tl.maximum(largest, bits)

    @triton.jit
    def _reduce(base, begin, end, scale, p, NORM: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
        """Power sum and largest magnitude bits of the elements [begin, end)."""
        if base.dtype.element_ty == tl.float64:
            SUM: tl.constexpr = tl.float64
            BITS: tl.constexpr = tl.int64
        else:
            SUM: tl.constexpr = tl.float64 if NORM == POWER else tl.float32
            BITS: tl.constexpr = tl.int32
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = _split_chunk(begin, end, BLOCK)
        total = tl.zeros((), SUM)
        bits = tl.zeros((), BITS)
        if full_begin < full_end:
            sums = tl.zeros([BLOCK], SUM)
            largest = tl.zeros([BLOCK], BITS)
            for offset in range(full_begin, full_end, BLOCK):
                x = tl.load(tile(base, offset, BLOCK))
                sums, largest = _accumulate(sums, largest, x, scale, p, NORM, SCALED)
            total += tl.sum(sums)
            bits = tl.max(largest)
        if heads + tails > 0:
            sums = tl.zeros([EDGE], SUM)
            largest = tl.zeros([EDGE], BITS)
            for i in range(0, heads + tails):
                offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
                x = tl.load(tile(base, offset, EDGE), mask=inside(offset, begin, end, EDGE), other=0.0)
                sums, largest = _accumulate(sums, largest, x, scale, p, NORM, SCALED)
            total += tl.sum(sums)
            bits = tl.maximum(bits, tl.max(largest))
        return total, bits

    @triton.jit
    def _chunk(table_ptr, chunk, tensors, chunk_size, DTYPE: tl.constexpr):
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
    def _combine(power_ptr, absmax_ptr, first, count):
        """Sum and NaN-keeping maximum of `count` float64 results that other programs wrote."""
        powers = tl.zeros([COMBINE], tl.float64)
        largest = tl.zeros([COMBINE], tl.int64)
        for i in range(0, count, COMBINE):
            index = i + tl.arange(0, COMBINE)
            mask = index < count
            powers += tl.load(power_ptr + first + index, mask=mask, other=0.0, cache_modifier=".cg")
            absmax = tl.load(absmax_ptr + first + index, mask=mask, other=0.0, cache_modifier=".cg")
            largest = tl.maximum(largest, absmax.to(tl.int64, bitcast=True))
        return tl.sum(powers), tl.max(largest).to(tl.float64, bitcast=True)

    @triton.jit
    def _is_finite(x):
        return tl.abs(x) < float("inf")

    @triton.jit
    def _measure_chunk(
        partial_ptr,
        done_ptr,
        result_ptr,
        chunk,
        tensor,
        first,
        count,
        base,
        begin,
        end,
        tensors,
        chunks,
        p,
        DTYPE: tl.constexpr,
        NORM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """A chunk's results; those of its tensor, if it is the last chunk to be done."""
        total, bits = _reduce(base, begin, end, 1.0, p, NORM, False, BLOCK)
        power = total.to(tl.float64)
        if DTYPE == tl.float64:
            absmax = bits.to(tl.float64, bitcast=True)
        else:
            absmax = bits.to(tl.float32, bitcast=True).to(tl.float64)
            if NORM == L2 or NORM == L1:
                # Squares that overflowed or vanished: once more, scaled by a power of two near 1 / absmax.
                safe = (total >= VANISHING) & (total < float("inf"))
                if (not safe) & (bits > 0) & (bits < 0x7F800000):
                    scale = (tl.maximum(254 - (bits >> 23), 1) << 23).to(tl.float32, bitcast=True)
                    total, bits = _reduce(base, begin, end, scale, p, NORM, True, BLOCK)
                    unscale = 1.0 / scale.to(tl.float64)
                    power = total.to(tl.float64) * unscale
                    if NORM == L2:
                        power = power * unscale
        if count == 1:
            tl.store(result_ptr + tensor, power)
            tl.store(result_ptr + tensors + tensor, absmax)
        else:
            tl.store(partial_ptr + chunk, power)
            tl.store(partial_ptr + chunks + chunk, absmax)
            tl.debug_barrier()
            if tl.atomic_add(done_ptr + tensor, 1, sem="acq_rel", scope="gpu") == count - 1:
                power, absmax = _combine(partial_ptr, partial_ptr + chunks, first, count)
                tl.store(result_ptr + tensor, power)
                tl.store(result_ptr + tensors + tensor, absmax)
                tl.store(done_ptr + tensor, 0)

    @triton.jit(do_not_specialize=["tensors", "chunks", "chunk_size", "chained"])
    def _measure_kernel(
        table_ptr,  # int64: addresses [T], begins [T], ends [T], first chunks [T + 1], tensor of each chunk [chunks]
        partial_ptr,  # float64 [2, chunks]: power, absmax
        done_ptr,  # int32 [T + 1]: chunks done per tensor, programs done; zero between launches
        result_ptr,  # float64 [2 T + 4]: power [T], absmax [T], total [2], norm, coefficient
        earlier_ptr,  # None, or float64 [T]: tensors whose max |g| was finite there keep the results they have
        before_ptr,  # float64 [2]: the total of tensors measured before
        chained,  # whether there are any
        tensors,
        chunks,
        chunk_size,
        p: tl.float64,  # a Python float would arrive as float32
        max_norm: tl.float64,
        DTYPE: tl.constexpr,
        NORM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program, programs = tl.program_id(0), tl.num_programs(0)
        p = tl.full((), p, tl.float64)
        for chunk in range(program, chunks, programs):
            tensor, first, count, base, begin, end = _chunk(table_ptr, chunk, tensors, chunk_size, DTYPE)
            if earlier_ptr is None:
                passed_over = False
            else:
                passed_over = _is_finite(tl.load(earlier_ptr + tensor))
            if not passed_over:
                _measure_chunk(
                    partial_ptr, done_ptr, result_ptr, chunk, tensor, first, count, base, begin, end, tensors, chunks,
                    p, DTYPE, NORM, BLOCK,
                )  # fmt: skip

        tl.debug_barrier()
        if tl.atomic_add(done_ptr + tensors, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(done_ptr + tensors, 0)
            _write_empty(table_ptr, result_ptr, tensors)
            tl.debug_barrier()
            power, absmax = _combine(result_ptr, result_ptr + tensors, 0, tensors)
            if NORM == POWER:
                if p == 0:
                    power = _count_nonzero(result_ptr, tensors)
            if chained != 0:
                power += tl.load(before_ptr)
                bits = tl.maximum(absmax.to(tl.int64, bitcast=True), tl.load(before_ptr + 1).to(tl.int64, bitcast=True))
                absmax = bits.to(tl.float64, bitcast=True)
            norm = tl.sqrt(power) if NORM == L2 else absmax if NORM == MAX else power  # POWER: the root is torch's
            limit = tl.full((), max_norm, tl.float64)
            coef = limit / (norm + 1e-6)
            coef = tl.where(coef >= 1.0, 1.0, coef)
            coef = tl.where(norm == float("inf"), coef * -1.0, coef)  # -0: multiplies, where +0 would write zeros
            coef = tl.where(limit == float("inf"), 1.0, coef)
            tl.store(result_ptr + 2 * tensors, power)
            tl.store(result_ptr + 2 * tensors + 1, absmax)
            tl.store(result_ptr + 2 * tensors + 2, norm)
            tl.store(result_ptr + 2 * tensors + 3, coef)

    @triton.jit
    def _count_nonzero(power_ptr, tensors):
        """How many of the float64 results that other programs wrote are not zero."""
        count = tl.zeros([COMBINE], tl.float64)
        for i in range(0, tensors, COMBINE):
            index = i + tl.arange(0, COMBINE)
            power = tl.load(power_ptr + index, mask=index < tensors, other=0.0, cache_modifier=".cg")
            count += tl.where(power != 0, 1.0, 0.0)
        return tl.sum(count)

    @triton.jit
    def _write_empty(table_ptr, result_ptr, tensors):
        """Zeros for the tensors that have no chunk, which no program visited."""
        for i in range(0, tensors, COMBINE):
            index = i + tl.arange(0, COMBINE)
            mask = index < tensors
            first = tl.load(table_ptr + 3 * tensors + index, mask=mask, other=0)
            after = tl.load(table_ptr + 3 * tensors + index + 1, mask=mask, other=1)
            tl.store(result_ptr + index, 0.0, mask=mask & (first == after))
            tl.store(result_ptr + tensors + index, 0.0, mask=mask & (first == after))

    # ---- apply, clamp and repair ----

    @triton.jit
    def _rewrite_tile(pointers, mask, a, b, clamped_ptr, CLAMP: tl.constexpr, MASKED: tl.constexpr):
        """x * a; or x limited to [a, b], storing only what lies outside, and 1 to clamped_ptr if anything does."""
        x = tl.load(pointers, mask=mask) if MASKED else tl.load(pointers)
        wide = x.to(a.dtype)
        if CLAMP:
            outside = (wide < a) | (wide > b)
            limited = tl.where(wide < a, a, tl.where(wide > b, b, wide))
            outside = outside & mask if MASKED else outside
            tl.store(pointers, narrow(limited, x.dtype), mask=outside)
            tl.store(clamped_ptr + tl.zeros_like(outside).to(tl.int32), 1, mask=outside)
        elif MASKED:
            tl.store(pointers, narrow(wide * a, x.dtype), mask=mask)
        else:
            tl.store(pointers, narrow(wide * a, x.dtype))

    @triton.jit
    def _rewrite(base, begin, end, a, b, clamped_ptr, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
        """Rewrite the elements [begin, end)."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = _split_chunk(begin, end, BLOCK)
        for offset in range(full_begin, full_end, BLOCK):
            _rewrite_tile(tile(base, offset, BLOCK), None, a, b, clamped_ptr, CLAMP, False)
        for i in range(0, heads + tails):
            offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
            mask = inside(offset, begin, end, EDGE)
            _rewrite_tile(tile(base, offset, EDGE), mask, a, b, clamped_ptr, CLAMP, True)

    @triton.jit
    def _repair(base, begin, end, BLOCK: tl.constexpr):
        """Zeros for those of the elements [begin, end) that are inf or NaN, and how many there were."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = _split_chunk(begin, end, BLOCK)
        count = tl.zeros((), tl.int32)
        for offset in range(full_begin, full_end, BLOCK):
            pointers = tile(base, offset, BLOCK)
            x = tl.load(pointers)
            broken = ~_is_finite(x if x.dtype == tl.float64 else x.to(tl.float32))
            tl.store(pointers, tl.zeros_like(x), mask=broken)
            count += tl.sum(broken.to(tl.int32))
        for i in range(0, heads + tails):
            offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
            pointers = tile(base, offset, EDGE)
            mask = inside(offset, begin, end, EDGE)
            x = tl.load(pointers, mask=mask, other=0.0)
            broken = mask & ~_is_finite(x if x.dtype == tl.float64 else x.to(tl.float32))
            tl.store(pointers, tl.zeros_like(x), mask=broken)
            count += tl.sum(broken.to(tl.int32))
        return count

    @triton.jit
    def _zero(base, begin, end, BLOCK: tl.constexpr):
        """Zeros into the elements [begin, end), without reading them."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = _split_chunk(begin, end, BLOCK)
        for offset in range(full_begin, full_end, BLOCK):
            tl.store(tile(base, offset, BLOCK), tl.zeros([BLOCK], base.dtype.element_ty))
        for i in range(0, heads + tails):
            offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
            zeros = tl.zeros([EDGE], base.dtype.element_ty)
            tl.store(tile(base, offset, EDGE), zeros, mask=inside(offset, begin, end, EDGE))

    @triton.jit
    def _rounded(coef, DTYPE: tl.constexpr):
        """The coefficient as it will be used: float32 for all but float64 gradients."""
        return coef if DTYPE == tl.float64 else coef.to(tl.float32).to(tl.float64)

    @triton.jit(do_not_specialize=["tensors", "chunks", "chunk_size", "coef_stride"])
    def _apply_kernel(
        table_ptr,
        coef_ptr,  # float64 [] (stride 0) or [T] (stride 1)
        coef_stride,
        tensors,
        chunks,
        chunk_size,
        DTYPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if coef_stride == 0:
            if _rounded(tl.load(coef_ptr), DTYPE) == 1.0:
                chunks = 0  # nothing is clipped: the launch ends here, without a read
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            tensor, _, _, base, begin, end = _chunk(table_ptr, chunk, tensors, chunk_size, DTYPE)
            coef = _rounded(tl.load(coef_ptr + tensor * coef_stride), DTYPE)
            if coef != 1.0:
                if coef.to(tl.int64, bitcast=True) == 0:  # +0, not -0: zeros without reading
                    _zero(base, begin, end, BLOCK)
                else:
                    factor = coef if DTYPE == tl.float64 else coef.to(tl.float32)
                    _rewrite(base, begin, end, factor, factor, coef_ptr, False, BLOCK)

    @triton.jit(do_not_specialize=["tensors", "chunks", "chunk_size"])
    def _clamp_kernel(
        table_ptr,
        limits_ptr,  # float64 [2]
        clamped_ptr,  # int32 []: set to 1 if anything is changed
        tensors,
        chunks,
        chunk_size,
        DTYPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        low, high = tl.load(limits_ptr), tl.load(limits_ptr + 1)
        if DTYPE != tl.float64:
            low, high = low.to(tl.float32), high.to(tl.float32)
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            _, _, _, base, begin, end = _chunk(table_ptr, chunk, tensors, chunk_size, DTYPE)
            _rewrite(base, begin, end, low, high, clamped_ptr, True, BLOCK)

    @triton.jit(do_not_specialize=["tensors", "chunks", "chunk_size"])
    def _repair_kernel(
        table_ptr,
        absmax_ptr,  # float64 [T]: tensors whose max |g| is finite are not read
        counts_ptr,  # int64 [T], added to
        tensors,
        chunks,
        chunk_size,
        DTYPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            tensor, _, _, base, begin, end = _chunk(table_ptr, chunk, tensors, chunk_size, DTYPE)
            if not _is_finite(tl.load(absmax_ptr + tensor)):
                count = _repair(base, begin, end, BLOCK)
                tl.atomic_add(counts_ptr + tensor, count.to(tl.int64), mask=count > 0, sem="relaxed")


# ---- host ----


def why_not(device: torch.device) -> str | None:
    if MISSING:
        return MISSING
    if INTERPRET and device.type == "cpu":
        return None
    if device.type in ("cuda", "xpu"):
        return _no_driver()
    return f"its kernels run on GPUs, not on {device.type} (TRITON_INTERPRET=1 interprets them there, slowly)"


@functools.cache
def _no_driver() -> str | None:
    """Why Triton cannot launch anything here: it compiles a part of its driver on first use, with a C compiler."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 - a missing compiler, header or library: another backend runs instead
        return f"triton cannot run ({str(error).strip() or type(error).__name__})"
    return None


def describe() -> str:
    return f"triton {triton.__version__}" + (", interpreted" if INTERPRET else "")


def measure(group: Group, norm_type: float, max_norm: float | None = None, before: Tensor | None = None) -> Measurement:
    result = torch.empty(2 * len(group) + 4, dtype=torch.float64, device=group.device)
    return _measure(group, norm_type, max_norm, before, result, None)


def repair_(group: Group, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
    table, count = _table(group), len(group)
    repaired = torch.zeros(count, dtype=torch.int64, device=group.device)
    with on(group.device):
        _repair_kernel[(table.programs,)](
            table.device, measured.absmax, repaired, count, table.chunks, table.chunk_size,
            DTYPE=DTYPES[group.dtype], BLOCK=table.block, num_warps=NUM_WARPS,
        )  # fmt: skip
    group.bump_version()
    # Programs go by the old maxima while the last of a tensor writes its new one: these are copies.
    result = torch.cat([measured.power, measured.absmax, measured.power.new_empty(4)])
    return _measure(group, norm_type, None, None, result, measured.absmax), repaired


def _measure(
    group: Group,
    norm_type: float,
    max_norm: float | None,
    before: Tensor | None,
    result: Tensor,
    earlier: Tensor | None,
) -> Measurement:
    """Into `result`; where the maxima `earlier` are finite, what it holds stays."""
    table, count = _table(group), len(group)
    norm = {2.0: L2, 1.0: L1, math.inf: MAX}.get(norm_type, POWER)
    with on(group.device):
        _measure_kernel[(table.programs,)](
            table.device, table.partial, table.done, result, earlier, result if before is None else before,
            int(before is not None), count, table.chunks, table.chunk_size,
            0.0 if norm == MAX else float(norm_type), math.inf if max_norm is None else float(max_norm),
            DTYPE=DTYPES[group.dtype], NORM=norm, BLOCK=_block(table, norm), num_warps=NUM_WARPS,
        )  # fmt: skip
    power, absmax, all_of_them = result[:count], result[count : 2 * count], result[2 * count :]
    total = all_of_them[:2]
    if norm == POWER and norm_type != 0:
        return Measurement(power, absmax, total[0].pow(1 / norm_type), None, total)
    return Measurement(power, absmax, all_of_them[2], None if max_norm is None else all_of_them[3], total)


def apply_(group: Group, coef: Tensor) -> None:
    table = _table(group)
    with on(group.device):
        _apply_kernel[(table.programs,)](
            table.device, coef, coef.dim(), len(group), table.chunks, table.chunk_size,
            DTYPE=DTYPES[group.dtype], BLOCK=table.block, num_warps=NUM_WARPS,
        )  # fmt: skip
    group.bump_version()


def clamp_(group: Group, low: float, high: float) -> Tensor:
    table = _table(group)
    limits = upload([low, high], torch.float64, group.device)
    clamped = torch.zeros((), dtype=torch.int32, device=group.device)
    with on(group.device):
        _clamp_kernel[(table.programs,)](
            table.device, limits, clamped, len(group), table.chunks, table.chunk_size,
            DTYPE=DTYPES[group.dtype], BLOCK=table.block, num_warps=NUM_WARPS,
        )  # fmt: skip
    group.bump_version()
    return clamped.bool()


class _Table:
    """A group's addresses on its device, cut into chunks, with the workspace of `measure`."""

    def __init__(self, group: Group, host: Tensor) -> None:
        addresses, sizes = host
        self.block = TILE_BYTES // group.dtype.itemsize
        begins = addresses % 16 // group.dtype.itemsize
        ends = begins + sizes
        chunks = cut(torch.where(sizes > 0, ends, 0), self.block, group.device)
        self.chunk_size, self.chunks, self.programs = chunks.size, len(chunks.owners), chunks.programs
        table = torch.cat([addresses - addresses % 16, begins, ends, chunks.firsts, chunks.owners])
        self.device = upload(table, torch.int64, group.device)
        self.partial = torch.empty(2, max(1, self.chunks), dtype=torch.float64, device=group.device)
        self.done = torch.zeros(len(sizes) + 1, dtype=torch.int32, device=group.device)


_tables: Recent[_Table] = Recent()


def _table(group: Group) -> _Table:
    """The table of the group's present addresses: one made before if they are the same, so that nothing is uploaded."""
    if group.uploaded is None:
        host = group.addresses_and_sizes()
        key = (group.device, group.dtype, current_stream(group.device))
        group.uploaded = _tables.get(group.device, key, host, lambda: _Table(group, host))
    return group.uploaded


def _block(table: _Table, norm: Any) -> int:
    # A general power takes float64 logarithms: with a full tile of them the registers would spill.
    return table.block // 8 if norm == POWER else table.block
