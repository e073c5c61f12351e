"""Measure: one launch whatever the number of tensors.

Sums are float32 within STRETCH tiles and float64 across them, of the tensor's part in each program's run, and combined
in the order of the programs by whichever finishes a tensor last, so results are bitwise repeatable.

How far a float32 sum of squares can be off, in units of its roundoff 2^-24: 1 for the square, 3 for the four that a
thread adds up at once, STRETCH - 1 for those in a row, 11 for the tree over the block: 30 · 2^-24 = 1.8e-6 at worst,
and half of that, 0.9e-6, for the norm.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..base import GradGroup, Measurement
from .launch import Launcher, depends, on
from .table import table_of
from .tiles import MISSING, MOST_REGISTERS

if MISSING is None:
    import triton
    import triton.language as tl

    from .table import WALKED, is_finite, piece_of, program_of, run_of, split_piece, tiles_of
    from .tiles import DTYPES, MOST_EDGE, gdc_launch_dependents, inside, tile

NORMS = {2.0: 0, 1.0: 1, math.inf: 2}
GENERAL = 3  # any other power

if MISSING is None:
    L2, L1, MAX, POWER = (tl.constexpr(i) for i in range(4))
    VANISHING = tl.constexpr(1e-24)  # a power sum below this may have lost more than rounding
    COMBINE = tl.constexpr(1024)  # results of programs or tensors combined at a time
    FOLD = tl.constexpr(4)  # pieces of 16 bytes that a thread loads of a tile
    STRETCH = tl.constexpr(16)  # tiles whose float32 sums are added to the float64 one together

    @triton.jit
    def _accumulate(sums, largest, x, p, NORM: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
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
    def _reduce(base, begin, end, p, NORM: tl.constexpr, BLOCK: tl.constexpr):
        """Power sum, in float64, and largest magnitude bits of the elements [begin, end)."""
        if base.dtype.element_ty == tl.float64:
            SUM: tl.constexpr = tl.float64
            BITS: tl.constexpr = tl.int64
        else:
            SUM: tl.constexpr = tl.float64 if NORM == POWER else tl.float32
            BITS: tl.constexpr = tl.int32
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        PIECES: tl.constexpr = 1 if NORM == POWER else FOLD
        full_begin, full_end, head, heads, tails = split_piece(begin, end, BLOCK)
        total = tl.zeros((), tl.float64)
        bits = tl.zeros((), BITS)
        if full_begin < full_end:
            largest = tl.zeros([BLOCK // PIECES], BITS)
            for stretch in range(full_begin, full_end, STRETCH * BLOCK):
                sums = tl.zeros([BLOCK // PIECES], SUM)
                for offset in range(stretch, tl.minimum(stretch + STRETCH * BLOCK, full_end), BLOCK):
                    x = tl.load(tile(base, offset, BLOCK))
                    sums, largest = _accumulate(sums, largest, x, p, NORM, PIECES, BLOCK)
                if NORM != MAX:
                    total += tl.sum(sums).to(tl.float64)
            bits = tl.max(largest)
        if heads + tails > 0:
            sums = tl.zeros([EDGE], SUM)
            largest = tl.zeros([EDGE], BITS)
            for i in range(0, heads + tails):
                offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
                x = tl.load(tile(base, offset, EDGE), mask=inside(offset, begin, end, EDGE), other=0.0)
                sums, largest = _accumulate(sums, largest, x, p, NORM, 1, EDGE)
            total += tl.sum(sums).to(tl.float64)
            bits = tl.maximum(bits, tl.max(largest))
        return total, bits

    @triton.jit
    def _wide_power(base, begin, end, NORM: tl.constexpr, EDGE: tl.constexpr):
        """The power sum of the elements [begin, end) with every square in float64."""
        sums = tl.zeros([EDGE], tl.float64)
        for offset in range(begin // EDGE * EDGE, end, EDGE):
            x = tl.load(tile(base, offset, EDGE), mask=inside(offset, begin, end, EDGE), other=0.0)
            wide = tl.abs(x.to(tl.float32).to(tl.float64))
            sums += wide * wide if NORM == L2 else wide
        return tl.sum(sums)

    @triton.jit
    def _combine(power_ptr, absmax_ptr, head, step, count):
        """Sum and NaN-keeping maximum of `count` float64 results that other programs wrote: the first lies at `head`,
        the others at multiples of `step`."""
        powers = tl.zeros([COMBINE], tl.float64)
        largest = tl.zeros([COMBINE], tl.int64)
        for i in range(0, count, COMBINE):
            index = i + tl.arange(0, COMBINE)
            place = tl.where(index == 0, head, index * step)
            powers += tl.load(power_ptr + place, mask=index < count, other=0.0, cache_modifier=".cg")
            absmax = tl.load(absmax_ptr + place, mask=index < count, other=0.0, cache_modifier=".cg")
            largest = tl.maximum(largest, absmax.to(tl.int64, bitcast=True))
        return tl.sum(powers), tl.max(largest).to(tl.float64, bitcast=True)

    @triton.jit
    def _measure_piece(base, begin, end, p, DTYPE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
        """Power sum and max |x| of the elements [begin, end), in float64."""
        power, bits = _reduce(base, begin, end, p, NORM, BLOCK)
        if DTYPE == tl.float64:
            absmax = bits.to(tl.float64, bitcast=True)
        else:
            absmax = bits.to(tl.float32, bitcast=True).to(tl.float64)
            if NORM == L2 or NORM == L1:
                # Squares that overflowed or vanished: once more, in float64.
                safe = (power >= VANISHING) & (power < float("inf"))
                if (not safe) & (bits > 0) & (bits < 0x7F800000):
                    power = _wide_power(base, begin, end, NORM, MOST_EDGE)
        return power, absmax

    @triton.jit
    def _publish(partial_ptr, done_ptr, result_ptr, tensor, tensors, tiles, first, after, power, absmax):
        """The results of this program's part of a tensor; those of the tensor, if it is the last part to be done."""
        program, programs = tl.program_id(0), tl.num_programs(0)
        head, tail = program_of(first, tiles), program_of(after - 1, tiles)  # the programs that share it
        count = (tail - head + 1).to(tl.int32)
        if count > 1:
            # Two places a program: for the tensor that its run begins in, and for the one that it ends in.
            place_ptr = partial_ptr + 2 * program + tl.where(program == head, 1, 0)
            tl.store(place_ptr, power)
            tl.store(place_ptr + 2 * programs, absmax)
            tl.debug_barrier()
            if tl.atomic_add(done_ptr + head, 1, sem="acq_rel", scope="gpu") == count - 1:
                head_ptr = partial_ptr + 2 * head
                power, absmax = _combine(head_ptr, head_ptr + 2 * programs, 1, 2, count)
                tl.store(result_ptr + tensor, power)
                tl.store(result_ptr + tensors + tensor, absmax)
                tl.store(done_ptr + head, 0)
        else:
            tl.store(result_ptr + tensor, power)
            tl.store(result_ptr + tensors + tensor, absmax)

    @triton.jit(
        do_not_specialize=["chained", "tensors", "tiles"],
        do_not_specialize_on_alignment=[*WALKED, "partial_ptr", "done_ptr", "result_ptr", "norm32_ptr", "earlier_ptr",
                                        "before_ptr"],
    )  # fmt: skip
    def _measure_kernel(
        addresses_ptr,  # int64 [T], multiples of 16
        layout_ptr,  # see table.py
        partial_ptr,  # float64 [2, P, 2]: power, absmax of up to two tensors a program
        done_ptr,  # int32 [P + 1]: parts done of the tensor that each run ends in, runs done; zero between launches
        result_ptr,  # float64 [2 T + 4]: power [T], absmax [T], total [2], norm, coefficient
        norm32_ptr,  # float32 []: the norm rounded
        earlier_ptr,  # float64 [T], where REPAIRED: tensors whose max |g| was finite there keep the results they have
        before_ptr,  # float64 [2]: the total of tensors measured before
        chained,  # whether there are any
        tensors,
        tiles,
        p: tl.float64,  # a Python float would arrive as float32
        max_norm: tl.float64,
        DTYPE: tl.constexpr,
        NORM: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK: tl.constexpr,
        REPAIRED: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        p = tl.full((), p, tl.float64)
        run_begin, run_end, tensor_begin, tensor_last = run_of(layout_ptr, tensors, tiles)
        # What one piece needs is not kept in registers while the others' elements are on their way: `disable_licm`.
        for tensor in tl.range(tensor_begin, tensor_last + 1, disable_licm=True):
            first, after = tiles_of(layout_ptr, tensor, tensors)
            read = first < after
            if REPAIRED:
                read = read & (not is_finite(tl.load(earlier_ptr + tensor)))
            if read:
                base, begin, end = piece_of(addresses_ptr, layout_ptr, tensor, tensors, run_begin, run_end, DTYPE, TILE)
                power, absmax = _measure_piece(base, begin, end, p, DTYPE, NORM, BLOCK)
                _publish(partial_ptr, done_ptr, result_ptr, tensor, tensors, tiles, first, after, power, absmax)

        if DEPENDENT:
            gdc_launch_dependents()  # which wait, all the same, until this launch has ended
        tl.debug_barrier()
        programs = tl.num_programs(0)
        if tl.atomic_add(done_ptr + programs, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(done_ptr + programs, 0)
            _write_empty(layout_ptr, result_ptr, tensors)
            tl.debug_barrier()
            power, absmax = _combine(result_ptr, result_ptr + tensors, 0, 1, tensors)
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
            tl.store(norm32_ptr, norm.to(tl.float32))

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
    def _write_empty(layout_ptr, result_ptr, tensors):
        """Zeros for the tensors that have no tile, which no program measured."""
        for i in range(0, tensors, COMBINE):
            index = i + tl.arange(0, COMBINE)
            mask = index < tensors
            first = tl.load(layout_ptr + 2 * tensors + index, mask=mask, other=0)
            after = tl.load(layout_ptr + 2 * tensors + index + 1, mask=mask, other=1)
            tl.store(result_ptr + index, 0.0, mask=mask & (first == after))
            tl.store(result_ptr + tensors + index, 0.0, mask=mask & (first == after))

    _launch = Launcher(_measure_kernel)


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
    table = table_of(group)
    layout, norm = table.layout, NORMS.get(norm_type, GENERAL)
    count = layout.tensors
    norm32 = torch.empty((), dtype=torch.float32, device=group.device)
    with on(group.device):
        _launch(
            layout.programs,
            (
                table.addresses, layout.device, layout.partial, layout.done, result, norm32,
                result if earlier is None else earlier, result if before is None else before, int(before is not None),
                count, layout.tiles, 0.0 if norm == 2 else float(norm_type),
                math.inf if max_norm is None else float(max_norm),
            ),
            constants(group.dtype, layout.tile, norm, earlier is not None, depends()),
            most_registers(norm),
        )  # fmt: skip
    power, absmax, total, last = result.split_with_sizes((count, count, 2, 2))
    if norm == GENERAL and norm_type != 0:
        return Measurement(power, absmax, total[0].pow(1 / norm_type), None, total)
    last_norm, coef = last.unbind()
    return Measurement(power, absmax, last_norm, None if max_norm is None else coef, total, norm32)


@functools.cache
def constants(dtype: torch.dtype, tile: int, norm: int, repaired: bool, dependent: bool) -> tuple[Any, ...]:
    """The kernel's constants. A general power takes float64 logarithms: with a full tile of them registers would
    spill."""
    return DTYPES[dtype], norm, tile, tile // 8 if norm == GENERAL else tile, repaired, dependent


def most_registers(norm: int) -> int | None:
    """With MOST_REGISTERS a thread, PROGRAMS_PER_SM programs fit on one of NVIDIA's multiprocessors, with 16 KiB on
    their way to each. (Unbounded, bfloat16 takes 112. General powers wait for logarithms, not for memory.)"""
    return None if norm == GENERAL else MOST_REGISTERS
