"""Apply, clamp and repair: one launch each, whatever the number of tensors; and where Triton can run.

With TRITON_INTERPRET=1 all of this runs on CPU tensors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...devices import has_float64
from ..base import GradGroup, Measurement
from ..transfer import capturing, upload
from .launch import Launcher, depends, on
from .reduction import measure_into
from .table import table_of
from .tiles import INTERPRET, MISSING, MOST_REGISTERS

if MISSING is None:
    import triton
    import triton.language as tl

    from .table import WALKED, is_finite, piece_of, run_of, split_piece
    from .tiles import DTYPES, MOST_EDGE, gdc_wait, inside, narrow, tile

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
        """Rewrite the elements [begin, end). To multiply them, the last tile first: `measure` read it last, and of what
        it read last the L2 still has some."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = split_piece(begin, end, BLOCK)
        for i in range(0, full_end - full_begin, BLOCK):
            offset = full_begin + i if CLAMP else full_end - BLOCK - i
            _rewrite_tile(tile(base, offset, BLOCK), None, a, b, clamped_ptr, CLAMP, False)
        for i in range(0, heads + tails):
            offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
            mask = inside(offset, begin, end, EDGE)
            _rewrite_tile(tile(base, offset, EDGE), mask, a, b, clamped_ptr, CLAMP, True)

    @triton.jit
    def _repair(base, begin, end, BLOCK: tl.constexpr):
        """Zeros for those of the elements [begin, end) that are inf or NaN, and how many there were."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = split_piece(begin, end, BLOCK)
        count = tl.zeros((), tl.int32)
        for offset in range(full_begin, full_end, BLOCK):
            pointers = tile(base, offset, BLOCK)
            x = tl.load(pointers)
            broken = ~is_finite(x if x.dtype == tl.float64 else x.to(tl.float32))
            tl.store(pointers, tl.zeros_like(x), mask=broken)
            count += tl.sum(broken.to(tl.int32))
        for i in range(0, heads + tails):
            offset = tl.where(i < heads, head + i * EDGE, full_end + (i - heads) * EDGE)
            pointers = tile(base, offset, EDGE)
            mask = inside(offset, begin, end, EDGE)
            x = tl.load(pointers, mask=mask, other=0.0)
            broken = mask & ~is_finite(x if x.dtype == tl.float64 else x.to(tl.float32))
            tl.store(pointers, tl.zeros_like(x), mask=broken)
            count += tl.sum(broken.to(tl.int32))
        return count

    @triton.jit
    def _zero(base, begin, end, BLOCK: tl.constexpr):
        """Zeros into the elements [begin, end), without reading them."""
        EDGE: tl.constexpr = MOST_EDGE if BLOCK > MOST_EDGE else BLOCK
        full_begin, full_end, head, heads, tails = split_piece(begin, end, BLOCK)
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

    @triton.jit(
        do_not_specialize=["tensors", "tiles", "coef_stride"], do_not_specialize_on_alignment=[*WALKED, "coef_ptr"]
    )  # fmt: skip
    def _apply_kernel(
        addresses_ptr,
        layout_ptr,
        coef_ptr,  # float64 [] (stride 0) or [T] (stride 1)
        coef_stride,
        tensors,
        tiles,
        DTYPE: tl.constexpr,
        TILE: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):
        if DEPENDENT:
            gdc_wait()  # until all that the launch in front writes can be read
        run_begin, run_end, tensor_begin, tensor_last = run_of(layout_ptr, tensors, tiles)
        if coef_stride == 0:
            if _rounded(tl.load(coef_ptr), DTYPE) == 1.0:
                tensor_last = tensor_begin - 1  # nothing is clipped: the launch ends here, without a read
        for i in tl.range(0, tensor_last + 1 - tensor_begin, disable_licm=True):
            tensor = tensor_last - i  # backwards, as `_rewrite`
            coef = _rounded(tl.load(coef_ptr + tensor * coef_stride), DTYPE)
            if coef != 1.0:
                base, begin, end = piece_of(addresses_ptr, layout_ptr, tensor, tensors, run_begin, run_end, DTYPE, TILE)
                if coef.to(tl.int64, bitcast=True) == 0:  # +0, not -0: zeros without reading
                    _zero(base, begin, end, TILE)
                else:
                    factor = coef if DTYPE == tl.float64 else coef.to(tl.float32)
                    _rewrite(base, begin, end, factor, factor, coef_ptr, False, TILE)

    @triton.jit(
        do_not_specialize=["tensors", "tiles"], do_not_specialize_on_alignment=[*WALKED, "limits_ptr", "clamped_ptr"]
    )  # fmt: skip
    def _clamp_kernel(
        addresses_ptr,
        layout_ptr,
        limits_ptr,  # float64 [2]
        clamped_ptr,  # int32 []: set to 1 if anything is changed
        tensors,
        tiles,
        DTYPE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        low, high = tl.load(limits_ptr), tl.load(limits_ptr + 1)
        if DTYPE != tl.float64:
            low, high = low.to(tl.float32), high.to(tl.float32)
        run_begin, run_end, tensor_begin, tensor_last = run_of(layout_ptr, tensors, tiles)
        for tensor in range(tensor_begin, tensor_last + 1):
            base, begin, end = piece_of(addresses_ptr, layout_ptr, tensor, tensors, run_begin, run_end, DTYPE, TILE)
            _rewrite(base, begin, end, low, high, clamped_ptr, True, TILE)

    @triton.jit(
        do_not_specialize=["tensors", "tiles"], do_not_specialize_on_alignment=[*WALKED, "absmax_ptr", "counts_ptr"]
    )  # fmt: skip
    def _repair_kernel(
        addresses_ptr,
        layout_ptr,
        absmax_ptr,  # float64 [T]: tensors whose max |g| is finite are not read
        counts_ptr,  # int64 [T], added to
        tensors,
        tiles,
        DTYPE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        run_begin, run_end, tensor_begin, tensor_last = run_of(layout_ptr, tensors, tiles)
        for tensor in tl.range(tensor_begin, tensor_last + 1, disable_licm=True):
            if not is_finite(tl.load(absmax_ptr + tensor)):
                base, begin, end = piece_of(addresses_ptr, layout_ptr, tensor, tensors, run_begin, run_end, DTYPE, TILE)
                count = _repair(base, begin, end, TILE)
                tl.atomic_add(counts_ptr + tensor, count.to(tl.int64), mask=count > 0, sem="relaxed")

    _launch_apply, _launch_clamp, _launch_repair = map(Launcher, (_apply_kernel, _clamp_kernel, _repair_kernel))


# ---- host ----


def why_not(device: torch.device) -> str | None:
    if MISSING:
        return MISSING
    if INTERPRET and device.type == "cpu":
        return None
    if device.type in ("cuda", "xpu"):
        return _no_driver() if has_float64(device) else "its kernels compute in float64 too, which this GPU has not"
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


def repair_(group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
    table = table_of(group)
    layout = table.layout
    repaired = torch.zeros(layout.tensors, dtype=torch.int64, device=group.device)
    with on(group.device):
        _launch_repair(
            layout.programs,
            (table.addresses, layout.device, measured.absmax, repaired, layout.tensors, layout.tiles),
            (DTYPES[group.dtype], layout.tile),
            MOST_REGISTERS,
        )
    group.bump_version()
    # Programs go by the old maxima while the last of a tensor writes its new one: these are copies.
    result = torch.cat([measured.power, measured.absmax, measured.power.new_empty(4)])
    return measure_into(group, norm_type, None, None, result, measured.absmax), repaired


def apply_(group: GradGroup, coef: Tensor) -> None:
    table = table_of(group)
    layout = table.layout
    with on(group.device):
        dependent = depends() and not capturing(group.device)  # older drivers do not take such launches into graphs
        _launch_apply(
            layout.programs,
            (table.addresses, layout.device, coef, coef.dim(), layout.tensors, layout.tiles),
            (DTYPES[group.dtype], layout.tile, dependent),
            MOST_REGISTERS,
            dependent,
        )
    group.bump_version()


def clamp_(group: GradGroup, low: float, high: float) -> Tensor:
    table = table_of(group)
    layout = table.layout
    limits = upload([low, high], torch.float64, group.device)
    clamped = torch.zeros((), dtype=torch.int32, device=group.device)
    with on(group.device):
        _launch_clamp(
            layout.programs,
            (table.addresses, layout.device, limits, clamped, layout.tensors, layout.tiles),
            (DTYPES[group.dtype], layout.tile),
        )
    group.bump_version()
    return clamped.bool()
