"""The device for a file of cases, and what they compare: tensors on it with float64 copies on the CPU."""

import torch

import no_float64

no_float64.register()
DEVICE = torch.device("mpslike:0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def host(tensors):
    """Copies on the CPU, of a list too."""
    return tensors.detach().cpu().clone() if isinstance(tensors, torch.Tensor) else [host(t) for t in tensors]


def check_number(tensor, exact, relative=1e-6, shape=(), device=DEVICE):
    """A statistic: float32, on `device`, right."""
    assert tensor.device == device and tensor.dtype == torch.float32 and tensor.shape == shape
    exact = torch.as_tensor(exact, dtype=torch.float64).float()  # beyond float32: inf
    torch.testing.assert_close(host(tensor), exact, rtol=relative, atol=1.5e-45, equal_nan=True)


SHAPES = {"p0": (6,), "p1": (3, 5), "p2": (), "p3": (40,), "p4": (2, 3, 4)}


def twins():
    """Named parameters of the same values: in float64 on the CPU, in float32 on the device."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(value.double()) for name, value in values.items()}
    return theirs, {name: torch.nn.Parameter(value.to(DEVICE)) for name, value in values.items()}


def give_gradients(step, *models):
    """The same gradients to each, every fourth step much larger ones; no two norms are within a tenth."""
    generator = torch.Generator().manual_seed(step)
    loud = (30.0 if step % 4 == 3 else 1.0) * (1 + 0.37 * (step * 5 % 7))
    for name, shape in SHAPES.items():
        gradient = torch.randn(shape, generator=generator) * loud
        for model in models:
            model[name].grad = gradient.to(model[name].device, model[name].dtype)


# Norms are right to 1e-6, and so are coefficients, but where running statistics take differences of norms: of these
# the least is about a tenth of the norms themselves, and a z-score divides one by another.
RELATIVE = 3e-5


def assert_alike(ours, theirs, what="grad", relative=RELATIVE):
    """Parameters or gradients of the twins."""
    for name, exact in theirs.items():
        a, b = (p.detach() if what == "value" else p.grad for p in (ours[name], exact))
        assert a.device == DEVICE and a.dtype == torch.float32
        torch.testing.assert_close(
            host(a).double(), b, rtol=relative, atol=1e-6 if what == "value" else 1e-30, equal_nan=True, msg=name
        )


def assert_stats_alike(ours, theirs):
    """All that is public of Stats, which are on the CPU."""
    cpu = torch.device("cpu")
    for name in ("total_norm", "tensor_norms", "tensor_absmax", "coef", "limit"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if b is not None:
            check_number(a, b, RELATIVE if name in ("coef", "limit") else 1e-6, b.shape, cpu)
    for name in ("clipped", "skipped", "nonfinite", "zeroed"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if b is not None:
            assert a.device == cpu and a.dtype == b.dtype and torch.equal(a, b), name
    assert (ours.names, ours.step) == (theirs.names, theirs.step)
    ours, theirs = ours.log(tensors=True), theirs.log(tensors=True)
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        for x, y in zip(*(v.values() if isinstance(v, dict) else [v] for v in (ours[name], b))):
            torch.testing.assert_close(float(x), float(y), rtol=RELATIVE, atol=1e-30, equal_nan=True, msg=name)
