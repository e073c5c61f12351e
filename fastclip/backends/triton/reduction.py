"""Measure: one launch whatever the number of tensors.

Sums are float32 within a chunk and float64 across chunks, combined in chunk order by whichever program finishes a
tensor last, so results are bitwise repeatable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..base import GradGroup, Measurement
from .table import Table, table_of
from .tiles import MISSING, MOST_REGISTERS, NUM_WARPS, on

if MISSING is None:
    import triton
    import triton.language as tl

    from .table import chunk_of, is_finite, split_chunk
    from .tiles import DTYPES, MOST_EDGE, inside, tile

if MISSING is None:
    L2, L1, MAX, POWER = (tl.constexpr(i) for i in range(4))
    VANISHING = tl.constexpr(1e-24)  # a float32 power sum below this may have lost more than rounding
    COMBINE = tl.constexpr(1024)  # chunk or tensor results combined at a time
    FOLD = tl.constexpr(4)  # pieces of 16 bytes that a thread loads of a tile

    @triton.jit
    def _accumulate(
        sums, largest, x, scale, p, NORM: tl.constexpr, SCALED: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr
    ):
        """sums + |x|^p, and the larger of the magnitudes as sign-stripped bits: ordered like |x|, NaN above inf.

        `x` has BLOCK elements, the others BLOCK / PIECES: what one thread has loaded is added up first, so that few of
        its registers hold sums and the more hold elements on their way.
        """
        if x.dtype == tl.float64:
            magnitude = tl.abs(x)
            bits = magnitude.to(tl.int64, bitcast=True)
        else:
            magnitude = tl.abs(x.to(tl.float32))
            bits = magnitude.to(tl.int32, bitcast=True)
        if SCALED:
            magnitude = magnitude * scale
        if PIECES > 1:
            bits = tl.max(tl.reshape(bits, [PIECES, BLOCK // PIECES]), 0)
        largest = tl.maximum(largest, bits)
        if NORM != MAX:
            if NORM == L2:
                amount = magnitude * magnitude
            elif NORM == L1:
                amount = magnitude
            else:
                wide = magnitude.to(tl.float64)
                raised = tl.exp2(p * tl.log2(tl.where(wide == 0, 1.0, wide)))
                amount = tl.where(wide == 0, 0.0, tl.where(p == 0, 1.0, raised))
            if PIECES > 1:
                amount = tl.sum(tl.reshape(amount, [PIECES, BLOCK // PIECES]), 0)
            sums += amount
        return sums, largest

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
        PIECES: tl.constexpr = 1 if NORM == POWER else FOLD
        full_begin, full_end, head, heads, tails = split_chunk(begin, end, BLOCK)
        total = tl.zeros((), SUM)
        bits = tl.zeros((), BITS)
        if full_begin < full_end:
            sums = tl.zeros([BLOCK // PIECES], SUM)
            largest = tl.zeros([BLOCK // PIECES], BITS)
            for offset in range(full_begin, full_end, BLOCK):
                x = tl.load(tile(base, offset, BLOCK))
                sums, largest = _accumulate(sums, largest, x, scale, p, NORM, SCALED, PIECES, BLOCK)
            total += tl.sum(sums)
            bits = tl.max(largest)
        if heads + tails > 0:
            sums = tl.zeros([EDGE], SUM)
            largest = tl.zeros([EDGE], BITS)
            for i in range(0, heads + tails):
                offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
                x = tl.load(tile(base, offset, EDGE), mask=inside(offset, begin, end, EDGE), other=0.0)
                sums, largest = _accumulate(sums, largest, x, scale, p, NORM, SCALED, 1, EDGE)
            total += tl.sum(sums)
            bits = tl.maximum(bits, tl.max(largest))
        return total, bits

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
            tensor, first, count, base, begin, end = chunk_of(table_ptr, chunk, tensors, chunk_size, DTYPE)
            if earlier_ptr is None:
                passed_over = False
            else:
                passed_over = is_finite(tl.load(earlier_ptr + tensor))
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


# ---- host ----


def measure(
    group: GradGroup, norm_type: float, max_norm: float | None = None, before: Tensor | None = None
) -> Measurement:
    result = torch.empty(2 * len(group) + 4, dtype=torch.float64, device=group.device)
    return measure_into(group, norm_type, max_norm, before, result, None)


def measure_into(
    group: GradGroup,
    norm_type: float,
    max_norm: float | None,
    before: Tensor | None,
    result: Tensor,
    earlier: Tensor | None,
) -> Measurement:
    """Into `result`; where the maxima `earlier` are finite, what it holds stays."""
    table, count = table_of(group), len(group)
    norm = {2.0: L2, 1.0: L1, math.inf: MAX}.get(norm_type, POWER)
    with on(group.device):
        _measure_kernel[(table.programs,)](
            table.device, table.partial, table.done, result, earlier, result if before is None else before,
            int(before is not None), count, table.chunks, table.chunk_size,
            0.0 if norm == MAX else float(norm_type), math.inf if max_norm is None else float(max_norm),
            DTYPE=DTYPES[group.dtype], NORM=norm, BLOCK=_block(table, norm), **_launch_options(group, norm, earlier),
        )  # fmt: skip
    power, absmax, all_of_them = result[:count], result[count : 2 * count], result[2 * count :]
    total = all_of_them[:2]
    if norm == POWER and norm_type != 0:
        return Measurement(power, absmax, total[0].pow(1 / norm_type), None, total)
    return Measurement(power, absmax, all_of_them[2], None if max_norm is None else all_of_them[3], total)


def _launch_options(group: GradGroup, norm: Any, earlier: Tensor | None) -> dict[str, Any]:
    """With MOST_REGISTERS a thread, PROGRAMS_PER_SM programs fit on one of NVIDIA's multiprocessors, with 16 KiB on
    their way to each. (Unbounded, bfloat16 takes 112. Float64 keeps about within it by itself, general powers wait for
    logarithms, and repairs are rare.)"""
    bounded = norm != POWER and group.dtype != torch.float64 and earlier is None
    if group.device.type != "cuda" or torch.version.hip is not None or not bounded:
        return {"num_warps": NUM_WARPS}
    return {"num_warps": NUM_WARPS, "maxnreg": MOST_REGISTERS}


def _block(table: Table, norm: Any) -> int:
    # A general power takes float64 logarithms: with a full tile of them the registers would spill.
    return table.block // 8 if norm == POWER else table.block
