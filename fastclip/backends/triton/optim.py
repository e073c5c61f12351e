"""The `triton` backend's optimizer steps: one pass over gradient, parameter and states, whatever the number of tensors.

One launch for SGD; two for AdamW, of which the first counts the steps, one element for each tensor.
Every chunk has a program of its own: how many run at a time is for the registers to say, of which some variants need
more than others, and the hardware keeps them all busy. Where all arrays of a tensor lie at multiples of 16 bytes, its
tiles are read and written whole, 16 bytes at a time; what is left at its end, and a tensor with an array that lies
elsewhere, is done in smaller tiles with a mask. The math is csrc/elementwise.h's, in float32 or, for float64, in
float64; hyperparameters are float64 arguments, which compile nothing anew and upload nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import AdamWOptions, SGDOptions, StepDecision, StepTable
from ..transfer import UploadCache, upload
from .launch import current_stream, on
from .tiles import MISSING, split_chunks

if MISSING is None:
    import triton
    import triton.language as tl

    from .tiles import DTYPES, inside, narrow, tile

NUM_WARPS = 4
TILE_BYTES = 32 * NUM_WARPS * 32  # two 16-byte loads of each array a thread in flight,
MOST_TILE = 32 * NUM_WARPS * 8  # or one of 16 bits: eight elements a thread is what the registers hold
COUNTED = 256  # tensors whose steps one program counts

if MISSING is None:
    EDGE = tl.constexpr(256)  # elements of a masked tile
    TINY, LIFT, UNLIFT = tl.constexpr(1e-30), tl.constexpr(2.0**64), tl.constexpr(2.0**-32)

    # ---- one tile ----

    @triton.jit
    def _pointers(address, offset, DTYPE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
        """To a tile of the array at `address`; in whole tiles that is a multiple of 16."""
        base = address.to(tl.pointer_type(DTYPE))
        if WHOLE:
            base = tl.multiple_of(base, 16)
        return tile(base, offset, BLOCK)

    @triton.jit
    def _wide(x):
        return x if x.dtype == tl.float64 else x.to(tl.float32)

    @triton.jit
    def _random_bits(index, key):
        """csrc/elementwise.h's: 32 random bits for each index, by a key."""
        h = (index * 0x9E3779B9) ^ key
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = (h ^ (h >> 15)) * 0x846CA68B
        return h ^ (h >> 16)

    @triton.jit
    def _store(pointers, value, mask, offset, key, STOCHASTIC: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
        if STOCHASTIC and DTYPE == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True)
            noise = _random_bits((offset + tl.arange(0, BLOCK)).to(tl.uint32), key) >> 16
            quiet = tl.where(value != value, bits | 0x400000, bits)
            bits = tl.where((bits & 0x7F800000) == 0x7F800000, quiet, bits + noise)
            tl.store(pointers, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
        else:
            tl.store(pointers, narrow(value, DTYPE), mask=mask)

    @triton.jit
    def _zeros(address, begin, end, DTYPE: tl.constexpr):
        for offset in range(begin, end, EDGE):
            pointers = _pointers(address, offset, DTYPE, False, EDGE)
            tl.store(pointers, tl.zeros([EDGE], DTYPE), mask=inside(offset, begin, end, EDGE))

    # ---- one chunk ----

    @triton.jit
    def _address(table_ptr, row, tensor, tensors):
        return tl.load(table_ptr + row * tensors + tensor)

    @triton.jit
    def _part(table_ptr, tensors, chunk_tiles, BLOCK: tl.constexpr):
        """Which tensor this program's chunk is of, and which of its elements, [begin, end), it has."""
        chunk = tl.program_id(0)
        tensor = tl.load(table_ptr + 8 * tensors + 1 + chunk)
        tiles = (chunk - tl.load(table_ptr + 7 * tensors + tensor)) * chunk_tiles
        end = tl.minimum((tiles + chunk_tiles) * BLOCK, tl.load(table_ptr + 6 * tensors + tensor))
        return tensor, tiles * BLOCK, end

    @triton.jit
    def _whole_end(addresses, begin, end, BLOCK: tl.constexpr):
        """Where the whole tiles end, of arrays at `addresses` (their bits, all together)."""
        return tl.where(addresses % 16 == 0, end // BLOCK * BLOCK, begin)

    @triton.jit
    def _is_frozen(frozen_ptr, frozen_stride, tensor):
        if frozen_ptr is None:
            return False
        else:
            return tl.load(frozen_ptr + tensor * frozen_stride) != 0

    @triton.jit
    def _source(coef_ptr, coef_stride, tensor, grad, param, MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):
        """The coefficient, whether it stands for zeros (+0 once rounded; -0 multiplies), and what is read in the
        gradient's place: the parameter, which is read anyway, where the gradient is not to be read."""
        coef = tl.load(coef_ptr + tensor * coef_stride).to(COMPUTE)
        zeros = coef.to(tl.float64).to(tl.int64, bitcast=True) == 0
        return -coef if MAXIMIZE else coef, zeros, tl.where(zeros, param, grad)

    @triton.jit
    def _key(tensor, seed):
        """The first of the eight keys of a tensor's arrays: parameter, gradient, states."""
        return _random_bits(tensor.to(tl.uint32), seed.to(tl.uint32)) * 8

    @triton.jit
    def _rate(lr_ptr, lr):
        if lr_ptr is None:
            return tl.full((), lr, tl.float64)
        else:
            return tl.load(lr_ptr).to(tl.float64)

    # ---- AdamW ----

    @triton.jit(
        do_not_specialize=["frozen_stride", "tensors"], do_not_specialize_on_alignment=["frozen_ptr", "lr_ptr"]
    )  # fmt: skip
    def _count_kernel(
        table_ptr,  # int64: gradients, parameters, three states, step counts, sizes, each [T]; see _Table for the rest
        rates_ptr,  # float64 [2, T], written: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
        frozen_ptr,  # bool [] (stride 0) or [T] (stride 1), or None
        frozen_stride,
        tensors,
        lr_ptr,  # [] or None: then `lr` is the rate
        lr: tl.float64,
        log_beta1: tl.float64,
        log_beta2: tl.float64,
        BLOCK: tl.constexpr,
    ):
        """step += 1 where a tensor is not frozen, and what follows from it."""
        tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        active = tensor < tensors
        if frozen_ptr is not None:
            active = active & (tl.load(frozen_ptr + tensor * frozen_stride, mask=active, other=1) == 0)
        address = tl.load(table_ptr + 5 * tensors + tensor, mask=active, other=0)
        step_ptr = address.to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=active, other=0.0) + 1.0
        tl.store(step_ptr, step, mask=active)
        t = step.to(tl.float64)
        step_size = _rate(lr_ptr, lr) / (1.0 - tl.exp(t * log_beta1))
        inv_root_bias2 = 1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))
        tl.store(rates_ptr + tensor, step_size, mask=active)
        tl.store(rates_ptr + tensors + tensor, inv_root_bias2, mask=active)

    @triton.jit
    def _adamw_tile(
        addresses,  # of gradient, parameter and states, and of what is read in the gradient's place
        constants,
        zeros,
        offset,
        end,
        key,
        AMSGRAD: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        ZERO_GRAD: tl.constexpr,
        DTYPE: tl.constexpr,
        WHOLE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        grad, param, state0, state1, state2, source = addresses
        coef, decay, beta1_rest, beta2, beta2_rest, step_size, inv_root_bias2, eps = constants
        p_ptr = _pointers(param, offset, DTYPE, WHOLE, BLOCK)
        m_ptr = _pointers(state0, offset, DTYPE, WHOLE, BLOCK)
        v_ptr = _pointers(state1, offset, DTYPE, WHOLE, BLOCK)
        mask = None if WHOLE else inside(offset, 0, end, BLOCK)
        # Everything is on its way before anything is waited for.
        g = tl.load(_pointers(source, offset, DTYPE, WHOLE, BLOCK), mask=mask)
        p = tl.load(p_ptr, mask=mask)
        m = tl.load(m_ptr, mask=mask)
        v = tl.load(v_ptr, mask=mask)
        if AMSGRAD:
            largest_ptr = _pointers(state2, offset, DTYPE, WHOLE, BLOCK)
            largest = tl.load(largest_ptr, mask=mask)
        g = tl.where(zeros, 0.0, _wide(g) * coef)
        p, m, v = _wide(p), _wide(m), _wide(v)
        # As in csrc/elementwise.h: torch's lerp, and a square that does not overflow before v does.
        from_m = beta1_rest < 0.5
        m = tl.fma(g - m, tl.where(from_m, beta1_rest, beta1_rest - 1.0), tl.where(from_m, m, g))
        v = tl.fma(v, beta2, g * beta2_rest * g)
        square = v
        if AMSGRAD:
            largest = _wide(largest)
            square = tl.where(largest > v, largest, v)
            _store(largest_ptr, square, mask, offset, key + 4, STOCHASTIC, DTYPE, BLOCK)
        _store(m_ptr, m, mask, offset, key + 2, STOCHASTIC, DTYPE, BLOCK)
        _store(v_ptr, v, mask, offset, key + 3, STOCHASTIC, DTYPE, BLOCK)
        if DTYPE == tl.float64:
            root = tl.sqrt(square)
        else:  # float32's takes subnormal numbers for zero, and an eps of 0 would be divided by
            tiny = square < TINY
            root = tl.sqrt(tl.where(tiny, square * LIFT, square)) * tl.where(tiny, UNLIFT, 1.0)
        p = p * decay - m * step_size / (root * inv_root_bias2 + eps)
        _store(p_ptr, p, mask, offset, key, STOCHASTIC, DTYPE, BLOCK)
        if ZERO_GRAD:
            tl.store(_pointers(grad, offset, DTYPE, WHOLE, BLOCK), tl.zeros([BLOCK], DTYPE), mask=mask)

    @triton.jit(
        do_not_specialize=["coef_stride", "frozen_stride", "seed", "tensors", "chunk_tiles"],
        do_not_specialize_on_alignment=["coef_ptr", "frozen_ptr", "lr_ptr"],
    )
    def _adamw_kernel(
        table_ptr,
        rates_ptr,  # what _count_kernel wrote
        coef_ptr,  # float64 [] (stride 0) or [T] (stride 1)
        coef_stride,
        frozen_ptr,  # bool [] or [T], or None
        frozen_stride,
        seed,
        tensors,
        chunk_tiles,
        lr_ptr,
        lr: tl.float64,
        beta1: tl.float64,
        beta2: tl.float64,
        eps: tl.float64,
        weight_decay: tl.float64,
        AMSGRAD: tl.constexpr,
        MAXIMIZE: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        ZERO_GRAD: tl.constexpr,
        DTYPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
        one = tl.full((), 1.0, tl.float64)
        decay = (one - _rate(lr_ptr, lr) * weight_decay).to(COMPUTE)
        beta1_rest, beta2_rest = (one - beta1).to(COMPUTE), (one - beta2).to(COMPUTE)
        beta2_compute, eps_compute = (one * beta2).to(COMPUTE), (one * eps).to(COMPUTE)
        tensor, begin, end = _part(table_ptr, tensors, chunk_tiles, BLOCK)
        grad = _address(table_ptr, 0, tensor, tensors)
        if _is_frozen(frozen_ptr, frozen_stride, tensor):
            if ZERO_GRAD:
                _zeros(grad, begin, end, DTYPE)
        else:
            param = _address(table_ptr, 1, tensor, tensors)
            state0 = _address(table_ptr, 2, tensor, tensors)
            state1 = _address(table_ptr, 3, tensor, tensors)
            state2 = _address(table_ptr, 4, tensor, tensors)
            step_size = tl.load(rates_ptr + tensor).to(COMPUTE)
            inv_root_bias2 = tl.load(rates_ptr + tensors + tensor).to(COMPUTE)
            coef, zeros, source = _source(coef_ptr, coef_stride, tensor, grad, param, MAXIMIZE, COMPUTE)
            addresses = (grad, param, state0, state1, state2, source)
            constants = (
                coef, decay, beta1_rest, beta2_compute, beta2_rest, step_size, inv_root_bias2, eps_compute,
            )  # fmt: skip
            key = _key(tensor, seed)
            whole_end = _whole_end(grad | param | state0 | state1 | state2, begin, end, BLOCK)
            for offset in range(begin, whole_end, BLOCK):
                _adamw_tile(
                    addresses, constants, zeros, offset, end, key,
                    AMSGRAD, STOCHASTIC, ZERO_GRAD, DTYPE, True, BLOCK,
                )  # fmt: skip
            for offset in range(whole_end, end, EDGE):
                _adamw_tile(
                    addresses, constants, zeros, offset, end, key,
                    AMSGRAD, STOCHASTIC, ZERO_GRAD, DTYPE, False, EDGE,
                )  # fmt: skip


def adamw_(table: StepTable, decision: StepDecision, options: AdamWOptions) -> None:
    device_table, count = _table(table), len(table)
    coef, frozen = decision.coef, decision.frozen_mask
    lr = _learning_rate(options.lr, table.device)
    frozen_stride = 0 if frozen is None else frozen.dim()
    with on(table.device):
        _count_kernel[(triton.cdiv(count, COUNTED),)](
            device_table.device, device_table.rates, frozen, frozen_stride, count,
            *lr, _log(options.beta1), _log(options.beta2), BLOCK=COUNTED, num_warps=NUM_WARPS,
        )  # fmt: skip
        _adamw_kernel[(device_table.chunks,)](
            device_table.device, device_table.rates, coef, coef.dim(), frozen, frozen_stride, _signed(decision.seed),
            count, device_table.chunk_tiles, *lr, options.beta1, options.beta2, float(options.eps),
            float(options.weight_decay), AMSGRAD=bool(options.amsgrad), MAXIMIZE=bool(options.maximize),
            STOCHASTIC=decision.seed is not None, ZERO_GRAD=decision.zero_grad, DTYPE=DTYPES[table.dtype],
            BLOCK=device_table.block, num_warps=NUM_WARPS,
        )  # fmt: skip
    table.bump_version(decision.zero_grad)


if MISSING is None:
    # ---- SGD ----

    @triton.jit
    def _sgd_tile(
        addresses,  # of gradient, parameter and momentum, and of what is read in the gradient's place
        constants,
        zeros,
        offset,
        end,
        key,
        MOMENTUM: tl.constexpr,
        NESTEROV: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        ZERO_GRAD: tl.constexpr,
        DTYPE: tl.constexpr,
        WHOLE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        grad, param, state0, source = addresses
        coef, weight_decay, momentum, one_minus_dampening, lr = constants
        p_ptr = _pointers(param, offset, DTYPE, WHOLE, BLOCK)
        mask = None if WHOLE else inside(offset, 0, end, BLOCK)
        g = tl.load(_pointers(source, offset, DTYPE, WHOLE, BLOCK), mask=mask)
        p = tl.load(p_ptr, mask=mask)
        if MOMENTUM:
            buffer_ptr = _pointers(state0, offset, DTYPE, WHOLE, BLOCK)
            buffer = tl.load(buffer_ptr, mask=mask)
        p = _wide(p)
        g = tl.where(zeros, 0.0, _wide(g) * coef) + p * weight_decay
        if MOMENTUM:
            buffer = _wide(buffer) * momentum + g * one_minus_dampening
            _store(buffer_ptr, buffer, mask, offset, key + 2, STOCHASTIC, DTYPE, BLOCK)
            g = g + buffer * momentum if NESTEROV else buffer
        _store(p_ptr, p - g * lr, mask, offset, key, STOCHASTIC, DTYPE, BLOCK)
        if ZERO_GRAD:
            tl.store(_pointers(grad, offset, DTYPE, WHOLE, BLOCK), tl.zeros([BLOCK], DTYPE), mask=mask)

    @triton.jit(
        do_not_specialize=["coef_stride", "frozen_stride", "seed", "tensors", "chunk_tiles"],
        do_not_specialize_on_alignment=["coef_ptr", "frozen_ptr", "lr_ptr"],
    )
    def _sgd_kernel(
        table_ptr,
        coef_ptr,  # as _adamw_kernel's
        coef_stride,
        frozen_ptr,
        frozen_stride,
        seed,
        tensors,
        chunk_tiles,
        lr_ptr,
        lr: tl.float64,
        momentum: tl.float64,
        one_minus_dampening: tl.float64,
        weight_decay: tl.float64,
        MOMENTUM: tl.constexpr,
        NESTEROV: tl.constexpr,
        MAXIMIZE: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        ZERO_GRAD: tl.constexpr,
        DTYPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
        one = tl.full((), 1.0, tl.float64)
        rate = _rate(lr_ptr, lr).to(COMPUTE)
        decay, keep, take = (
            (one * weight_decay).to(COMPUTE),
            (one * momentum).to(COMPUTE),
            (one * one_minus_dampening).to(COMPUTE),
        )
        tensor, begin, end = _part(table_ptr, tensors, chunk_tiles, BLOCK)
        grad = _address(table_ptr, 0, tensor, tensors)
        if _is_frozen(frozen_ptr, frozen_stride, tensor):
            if ZERO_GRAD:
                _zeros(grad, begin, end, DTYPE)
        else:
            param = _address(table_ptr, 1, tensor, tensors)
            state0 = _address(table_ptr, 2, tensor, tensors)
            coef, zeros, source = _source(coef_ptr, coef_stride, tensor, grad, param, MAXIMIZE, COMPUTE)
            addresses = (grad, param, state0, source)
            constants = (coef, decay, keep, take, rate)
            key = _key(tensor, seed)
            whole_end = _whole_end(grad | param | state0, begin, end, BLOCK)
            for offset in range(begin, whole_end, BLOCK):
                _sgd_tile(
                    addresses, constants, zeros, offset, end, key,
                    MOMENTUM, NESTEROV, STOCHASTIC, ZERO_GRAD, DTYPE, True, BLOCK,
                )  # fmt: skip
            for offset in range(whole_end, end, EDGE):
                _sgd_tile(
                    addresses, constants, zeros, offset, end, key,
                    MOMENTUM, NESTEROV, STOCHASTIC, ZERO_GRAD, DTYPE, False, EDGE,
                )  # fmt: skip


def sgd_(table: StepTable, decision: StepDecision, options: SGDOptions) -> None:
    device_table = _table(table)
    coef, frozen = decision.coef, decision.frozen_mask
    with on(table.device):
        _sgd_kernel[(device_table.chunks,)](
            device_table.device, coef, coef.dim(), frozen, 0 if frozen is None else frozen.dim(),
            _signed(decision.seed), len(table), device_table.chunk_tiles, *_learning_rate(options.lr, table.device),
            float(options.momentum), float(options.one_minus_dampening), float(options.weight_decay),
            MOMENTUM=table.states > 0, NESTEROV=bool(options.nesterov), MAXIMIZE=bool(options.maximize),
            STOCHASTIC=decision.seed is not None, ZERO_GRAD=decision.zero_grad, DTYPE=DTYPES[table.dtype],
            BLOCK=device_table.block, num_warps=NUM_WARPS,
        )  # fmt: skip
    table.bump_version(decision.zero_grad)


# ---- host ----


class _Table:
    """A step's addresses on its device, cut into chunks, with the workspace between AdamW's two launches."""

    def __init__(self, table: StepTable, host: Tensor) -> None:
        self.block = min(MOST_TILE, TILE_BYTES // table.dtype.itemsize)
        chunks = split_chunks(host[6], self.block, table.device)
        self.chunk_tiles, self.chunks = chunks.size // self.block, len(chunks.owners)
        self.device = upload(torch.cat([host.flatten(), chunks.firsts, chunks.owners]), torch.int64, table.device)
        self.rates = torch.empty(2, host.shape[1], dtype=torch.float64, device=table.device)


_tables: UploadCache[_Table] = UploadCache()


def _table(table: StepTable) -> _Table:
    """The table of the present addresses: one made before if they are the same, so that nothing is uploaded."""
    host = table.addresses()
    key = (table.device, table.dtype, current_stream(table.device))
    return _tables.get(table.device, key, host, lambda: _Table(table, host))


def _learning_rate(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """The tensor to read it from on `device`, or None, and else the number."""
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type == "cpu"):
        return lr.to(device, non_blocking=True), 0.0
    return None, float(lr)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _signed(seed: int | None) -> int:
    """The same 32 bits as an int32: a larger number would be an int64 to the kernel, and compile it anew."""
    return 0 if seed is None else seed - 2**32 if seed >= 2**31 else seed
