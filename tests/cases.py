"""The shared cases: layouts and sizes of gradients, each as a function from (dtype, device) to parameters."""

import math

import torch

from fastclip.backends.base import AdamWOptions, SGDOptions

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parameter(gradient, value=None):
    p = torch.nn.Parameter(torch.zeros_like(gradient) if value is None else value)
    p.grad = gradient
    return p


def _random(*shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def plain(*shapes):
    return lambda **kw: [parameter(_random(*shape, **kw)) for shape in shapes]


def misaligned(**kw):
    """Views that start 1, 2, 3, 5 and 7 elements into their storage."""
    return [parameter(_random(size + offset, **kw)[offset:]) for size, offset in
            ((1, 1), (15, 1), (64, 2), (1000, 3), (4097, 1), (20_011, 5), (9, 7))]  # fmt: skip


def channels_last(**kw):
    return [parameter(_random(8, 16, 3, 3, **kw).to(memory_format=torch.channels_last)), parameter(_random(7, **kw))]


def transposed(**kw):
    return [parameter(_random(30, 70, **kw).t()), parameter(_random(3, 4, 5, **kw).permute(2, 0, 1))]


def gaps(**kw):
    """Strided views with holes: not dense, so the reference backend takes them."""
    return [parameter(_random(10, 9, **kw)[:, ::2]), parameter(_random(40, **kw)[::3]), parameter(_random(5, **kw))]


def columns(**kw):
    """Views that interleave in one storage without sharing an element."""
    whole = _random(20, 9, **kw)
    return [parameter(whole[:, :4]), parameter(whole[:, 4:])]


def zeros(**kw):
    return [parameter(torch.zeros(33, **kw)), parameter(torch.zeros(5, 5, **kw))]


CASES = {
    "one element": plain((1,)),
    "scalar": plain(()),
    "sixteen": plain((16,)),
    "odd sizes": plain(*[(n,) for n in (1, 2, 3, 5, 7, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1023, 1025)]),
    "matrices": plain((3, 5), (64, 64), (129, 33), (2, 3, 4, 5)),
    "with empty": plain((0,), (5,), (0, 3), (7, 2)),
    "only empty": plain((0,), (2, 0)),
    "many chunks": plain((100_003,), (32_768,), (65_537,), (3,)),
    "many tensors": plain(*[(k % 7,) for k in range(300)]),
    "misaligned": misaligned,
    "channels last": channels_last,
    "transposed": transposed,
    "gaps": gaps,
    "columns": columns,
    "zeros": zeros,
}

# values whose squares leave float32
EXTREMES = {
    "huge": lambda dtype: torch.full((3000,), 1e20 if dtype != torch.float16 else 6e4, dtype=dtype),
    "tiny": lambda dtype: torch.full((3000,), 1e-25 if dtype != torch.float16 else 6e-8, dtype=dtype),
    "subnormal": lambda dtype: torch.full((70_000,), 1e-41 if dtype != torch.float16 else 6e-8, dtype=dtype),
    "one huge among small": lambda dtype: torch.cat(
        [
            torch.full((40_000,), 1e-3, dtype=dtype),
            torch.full((1,), 3e38 if dtype != torch.float16 else 6e4, dtype=dtype),
        ]
    ),
}


def wide(tensors):
    return [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).clone() for t in tensors]


def gradients(parameters):
    return [p.grad for p in parameters]


def tensor_norm(t, p=2.0):
    """The p-norm of one tensor in float64; 0-element tensors included."""
    magnitude = t.to(torch.complex128 if t.is_complex() else torch.float64).abs().flatten()
    if math.isinf(p):
        return magnitude.max().item() if magnitude.numel() else 0.0
    if p == 0:
        return float((magnitude != 0).sum())
    if p == 2:  # scaled: a float64 square overflows only beyond 1e154
        return magnitude.square().sum().sqrt().item()
    return magnitude.pow(p).sum().pow(1 / p).item()


def total_norm(tensors, p=2.0):
    """torch's definition: the p-norm of the norms."""
    return tensor_norm(torch.tensor([tensor_norm(t, p) for t in tensors], dtype=torch.float64), p)


def clip_factor(norm, limit):
    """torch's coefficient."""
    return min(1.0, limit / (norm + 1e-6))


# ---- how far from float64 a result may be ----

NORM_ERROR = 1e-6  # relative: what the README promises of every norm; pytest.approx allows the same by itself


def unit(dtype):
    """The unit roundoff: one rounding to `dtype` is off by at most this part of the result."""
    return torch.finfo(dtype).eps / 2


def tiny(dtype):
    """The smallest number of `dtype` above zero: below its normal range a rounding is off by half of this."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def compute_dtype(dtype):
    """What kernels multiply and add in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def rounding(dtype):
    """The relative error of a gradient times a known coefficient.

    Three roundings: the coefficient's and the product's to the compute type, the result's to `dtype`; and 16 in
    float64, where the coefficient and the oracle are calculated.
    """
    return 2 * unit(compute_dtype(dtype)) + unit(dtype) + 16 * unit(torch.float64)


def clipping(dtype):
    """The relative error of a clipped gradient, whose coefficient has the error of a norm.

    Among nothing but float64 that is the error of float64 sums: in no backend, nor in the oracle, does an element go
    through more than 256 additions one after the other, and a square root halves what they add up to.
    """
    return rounding(dtype) + (128 * unit(dtype) if compute_dtype(dtype) == torch.float64 else NORM_ERROR)


def assert_scaled(actual, before, factors, dtype=None, relative=None):
    """Every gradient is its old value times its factor; `relative` error: that of clipping by a norm, or another."""
    for a, b, factor in zip(actual, before, factors):
        kind = dtype or a.dtype
        (old,) = wide([b])
        absolute = tiny(kind)
        if abs(factor) < torch.finfo(compute_dtype(kind)).smallest_normal and old.numel():
            magnitudes = old.abs()  # a coefficient that small is itself rounded to a multiple of the smallest number
            absolute += tiny(compute_dtype(kind)) * magnitudes.nan_to_num(0, 0, 0).max().item()
        tolerance = {"rtol": clipping(kind) if relative is None else relative, "atol": absolute}
        torch.testing.assert_close(*wide([a]), old * factor, **tolerance, equal_nan=True)


def assert_within(actual, exact, error):
    """|actual - exact| <= error, element by element; what is not finite must be the same."""
    actual, exact = actual.detach().double(), exact.detach()
    finite = exact.isfinite()
    torch.testing.assert_close(actual.where(~finite, 0.0), exact.where(~finite, 0.0), rtol=0, atol=0, equal_nan=True)
    error = torch.as_tensor(error, dtype=torch.float64).expand_as(exact)
    wrong = finite & ~((actual - exact).abs() <= error)
    assert not wrong.any(), f"{actual[wrong]} for {exact[wrong]}, which may be off by {error[wrong]}"


def assert_agrees(ours, theirs, exact, relative, absolute=0.0):
    """`ours` is what torch has, `theirs`, as far as torch itself is right.

    `exact` is torch's result in float64 from the same numbers. Ours is off by at most relative * |exact| + absolute
    (the budget), theirs by |theirs - exact|, which is measured here and differs from CPU to CPU; so the two differ by
    at most the sum. What is not finite must be the same.
    """
    theirs, exact = theirs.detach().double(), exact.detach()
    assert torch.equal(theirs.isfinite(), exact.isfinite())
    assert_within(ours, theirs, relative * exact.abs() + absolute + (theirs - exact).abs())


def adamw_options(group):
    """What a backend's ``adamw_`` takes, from a parameter group of torch.optim.AdamW."""
    beta1, beta2 = group["betas"]
    return AdamWOptions(
        group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["amsgrad"], group["maximize"]
    )


def sgd_options(group, one_minus_dampening=None):
    """What a backend's ``sgd_`` takes, from a parameter group of torch.optim.SGD."""
    if one_minus_dampening is None:
        one_minus_dampening = 1 - group.get("dampening", 0)
    return SGDOptions(
        group["lr"], group["momentum"], one_minus_dampening, group["weight_decay"], group["nesterov"], group["maximize"]
    )
