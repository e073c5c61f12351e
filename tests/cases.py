"""The shared cases: layouts and sizes of gradients, each as a function from (dtype, device) to parameters."""

import math

import torch

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


def rounding(dtype):
    return {torch.float32: 2e-7, torch.float64: 1e-14, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]


def assert_scaled(actual, before, factors, dtype):
    """Every gradient is its old value times its factor, to one rounding of `dtype`."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype != torch.float64 else 0.0
    for a, b, factor in zip(actual, before, factors):
        torch.testing.assert_close(a.double(), b * factor, rtol=rounding(dtype), atol=smallest, equal_nan=True)
