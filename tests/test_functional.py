"""Every function × backend × case × dtype, against float64."""

import math

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EXTREMES,
    NORM_ERROR,
    assert_scaled,
    clip_factor,
    gradients,
    parameter,
    rounding,
    tensor_norm,
    tiny,
    total_norm,
    wide,
)

import fastclip

pytestmark = pytest.mark.isa
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_case = pytest.mark.parametrize("case", CASES)


def build(case, dtype):
    return CASES[case](dtype=dtype, device="cpu")


def close(actual, expected):
    return actual == pytest.approx(expected, rel=NORM_ERROR, abs=0)


@each_dtype
@each_case
def test_clip_norm_(backend, case, dtype):
    parameters = build(case, dtype)
    before = wide(gradients(parameters))
    expected = total_norm(before)
    limit = expected / 3
    norm = fastclip.clip_norm_(parameters, limit)
    assert norm.shape == () and norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert close(norm.item(), expected)
    assert_scaled(gradients(parameters), before, [clip_factor(expected, limit)] * len(before), dtype)


@each_dtype
@each_case
def test_clip_norm_writes_nothing_below_the_limit(backend, case, dtype):
    parameters = build(case, dtype)
    before = [g.clone() for g in gradients(parameters)]
    versions = [g._version for g in gradients(parameters)]
    fastclip.clip_norm_(parameters, 1e30)
    assert all(torch.equal(a, b) for a, b in zip(gradients(parameters), before))
    if backend == "cpu":
        assert versions == [g._version for g in gradients(parameters)]


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 3, math.inf, "inf"])
@pytest.mark.parametrize("case", ["odd sizes", "with empty", "many chunks", "zeros", "gaps"])
def test_norm_types(backend, case, p):
    parameters = build(case, torch.float32)
    before = wide(gradients(parameters))
    expected = total_norm(before, float(p))
    assert close(fastclip.total_norm(gradients(parameters), p).item(), expected)
    per_tensor = fastclip.clip_tensor_norm_(parameters, 1.0, p)
    assert per_tensor.tolist() == pytest.approx([tensor_norm(t, float(p)) for t in before], rel=NORM_ERROR)
    factors = [clip_factor(tensor_norm(t, float(p)), 1.0) for t in before]
    assert_scaled(gradients(parameters), before, factors, torch.float32)


@each_dtype
@each_case
def test_clip_tensor_norm_(backend, case, dtype):
    parameters = build(case, dtype)
    before = wide(gradients(parameters))
    norms = [tensor_norm(t) for t in before]
    limit = sorted(norms)[len(norms) // 2] + 0.1
    returned = fastclip.clip_tensor_norm_(parameters, limit)
    assert returned.tolist() == pytest.approx(norms, rel=NORM_ERROR)
    assert_scaled(gradients(parameters), before, [clip_factor(n, limit) for n in norms], dtype)


@each_dtype
@each_case
def test_clip_value_(backend, case, dtype):
    parameters = build(case, dtype)
    before = [g.clone() for g in gradients(parameters)]
    fastclip.clip_value_(parameters, 0.3)
    for after, old in zip(gradients(parameters), before):
        torch.testing.assert_close(after, old.clamp(-0.3, 0.3), rtol=0, atol=0)


@each_dtype
@each_case
def test_mask_small_(backend, case, dtype):
    parameters = build(case, dtype)
    before = wide(gradients(parameters))
    maxima = [tensor_norm(t, math.inf) for t in before]
    threshold = sorted(maxima)[len(maxima) // 2]
    masked = fastclip.mask_small_(parameters, threshold)
    assert masked.tolist() == [m < threshold for m in maxima]
    assert_scaled(gradients(parameters), before, [float(m >= threshold) for m in maxima], dtype, relative=0.0)


@each_dtype
@pytest.mark.parametrize("case", ["odd sizes", "many chunks", "misaligned", "gaps"])
def test_clip_with_norm_(backend, case, dtype):
    parameters = build(case, dtype)
    before = wide(gradients(parameters))
    assert fastclip.clip_with_norm_(parameters, 1.0, torch.tensor(4.0)) is None
    assert_scaled(gradients(parameters), before, [1 / (4 + 1e-6)] * len(before), dtype, relative=rounding(dtype))


@each_dtype
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_squares_that_leave_float32(backend, extreme, dtype, p):
    parameters = [parameter(EXTREMES[extreme](dtype)) for _ in range(2)]
    before = wide(gradients(parameters))
    expected = total_norm(before, p)
    limit = max(2e-6, expected / 1000)
    norm = fastclip.clip_norm_(parameters, limit, p)
    if expected < torch.finfo(torch.float32).max:
        assert norm.item() == pytest.approx(expected, rel=NORM_ERROR, abs=tiny(torch.float32))
    assert_scaled(gradients(parameters), before, [clip_factor(expected, limit)] * 2, dtype)


def test_mixed_dtypes(backend):
    parameters = [parameter(torch.randn(n, dtype=torch.float64).to(d)) for n in (5, 70_000) for d in DTYPES]
    before = wide(gradients(parameters))
    expected = total_norm(before)
    norm = fastclip.clip_norm_(parameters, 1.0)
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx(expected, rel=NORM_ERROR)
    for p, old in zip(parameters, before):
        assert_scaled([p.grad], [old], [1 / (expected + 1e-6)], relative=NORM_ERROR + rounding(p.grad.dtype))
    after = wide(gradients(parameters))
    norms = fastclip.clip_tensor_norm_(parameters, 1e-3)
    assert norms.tolist() == pytest.approx(list(map(tensor_norm, after)), rel=NORM_ERROR)


def test_three_thousand_tensors(backend):
    """More than fit into a kernel's parameters; a quarter of that for Triton's interpreter, which has no such limit."""
    count = 750 if backend == "triton" else 3000
    parameters = [parameter(torch.randn(1 + k % 5)) for k in range(count)]
    before = wide(gradients(parameters))
    expected = total_norm(before)
    assert close(fastclip.clip_norm_(parameters, 1.0).item(), expected)
    assert_scaled(gradients(parameters), before, [1 / (expected + 1e-6)] * count, torch.float32)


def test_complex(backend):
    parameters = [parameter(torch.randn(40, dtype=torch.complex64)), parameter(torch.randn(3, dtype=torch.complex128))]
    before = wide(gradients(parameters))
    expected = total_norm(before)
    norm = fastclip.clip_norm_(parameters, 1.0)
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx(expected, rel=NORM_ERROR)
    for p, old in zip(parameters, before):
        assert_scaled([p.grad], [old], [1 / (expected + 1e-6)], relative=NORM_ERROR + rounding(p.grad.dtype))
    before = wide(gradients(parameters))
    fastclip.clip_value_(parameters, 0.01)
    for p, old in zip(parameters, before):
        limited = torch.where(old.abs() > 0.01, old * (0.01 / old.abs()), old)
        # the limit and each part are rounded, and the magnitude is one of float64
        assert_scaled([p.grad], [limited], [1.0], relative=rounding(p.grad.dtype))


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse(backend, coalesced):
    indices, values = torch.tensor([[1, 3, 1], [0, 2, 0]]), torch.tensor([3.0, 4.0, 5.0])
    sparse = torch.sparse_coo_tensor(indices, values, (5, 4), check_invariants=True)
    if coalesced:
        sparse = sparse.coalesce()
    p = torch.nn.Parameter(torch.zeros(5, 4))
    p.grad = sparse
    dense = sparse.to_dense().double()
    assert close(fastclip.total_norm([p.grad]).item(), dense.norm().item())
    assert close(
        fastclip.clip_norm_([p, parameter(torch.ones(4))], 1.0).item(), (dense.square().sum() + 4).sqrt().item()
    )
    factor = 1 / ((dense.square().sum() + 4).sqrt().item() + 1e-6)
    assert p.grad.is_sparse
    assert_scaled([p.grad.to_dense()], [dense], [factor])
    clipped = p.grad.to_dense()
    fastclip.clip_value_(p, 0.1)
    assert torch.equal(p.grad.to_dense(), clipped.clamp(-0.1, 0.1))


def test_lazy_negatives_and_conjugates(backend):
    z = torch.randn(30, dtype=torch.complex64)
    parameters = [parameter(z.conj()), parameter(torch.randn(30, dtype=torch.complex64).conj().imag)]
    assert parameters[1].grad.is_neg()
    before = wide(gradients(parameters))
    expected = total_norm(before)
    assert close(fastclip.clip_norm_(parameters, 1.0).item(), expected)
    assert_scaled(gradients(parameters), before, [1 / (expected + 1e-6)] * 2)


@pytest.mark.parametrize("p", [0.5, 1.0, 3.0, math.inf])
@each_dtype
def test_norm_types_of_misaligned_tensors(backend, p, dtype):
    tensors = [torch.randn(n + 1, dtype=torch.float64).to(dtype)[1:] for n in (3, 600, 1500, 5000, 20_000)]
    for t in tensors:
        assert close(fastclip.total_norm([t], p).item(), tensor_norm(t, p))


def test_complex_value_clip_at_the_ends(backend):
    inf = math.inf
    z = torch.tensor([3e38 + 3e38j, complex(inf, 0), complex(0, -inf), complex(1, inf), 3 + 4j, 0.1 + 0.1j])
    p = parameter(z)
    fastclip.clip_value_(p, 1.0)
    half = math.sqrt(0.5)
    expected = torch.tensor([complex(half, half), 1, -1j, 1j, 0.6 + 0.8j, z[-1].item()], dtype=torch.complex128)
    assert_scaled([p.grad], [expected], [1.0], relative=rounding(p.grad.dtype))
    version = p.grad._version
    fastclip.clip_value_(p, 2.0)
    assert p.grad._version == version


def test_limit_beyond_float32(backend):
    p = parameter(torch.full((4,), 1e40, dtype=torch.float64))
    assert fastclip.clip_norm_([p], 1e39).item() == pytest.approx(2e40)
    assert_scaled([p.grad], [torch.full((4,), 1e40, dtype=torch.float64)], [clip_factor(2e40, 1e39)])


def test_coefficient_that_rounds_to_one_writes_nothing(backend):
    p = parameter(torch.tensor([1000.0]))
    version = p.grad._version
    stats = fastclip.Clipper([p], 1000.0).clip_()
    assert stats.coef.item() == 1 and stats.clipped.item() is False and p.grad.item() == 1000
    if backend == "cpu":
        assert p.grad._version == version


def test_default_device_is_left_out_of_it(backend):
    """torch.set_default_device moves every tensor made without a device: ours must say theirs."""
    parameters = [
        parameter(torch.ones(40)),
        parameter(torch.ones(3, dtype=torch.float64)),
        parameter(torch.ones(9)[::2]),
    ]
    torch.set_default_device("meta")
    try:
        norm = fastclip.clip_norm_(parameters, 1.0)
        fastclip.clip_tensor_norm_(parameters, 0.1)
        fastclip.clip_value_(parameters, 0.01)
        fastclip.clip_with_norm_(parameters, 1.0, 2.0)
        fastclip.clip_with_norm_(parameters, 1.0, torch.tensor(2.0, device="cpu"))
        masked = fastclip.mask_small_(parameters, 1.0)
        stats = fastclip.Clipper(parameters[:1], [fastclip.rules.Value(1.0), 1.0]).clip_()
    finally:
        torch.set_default_device(None)
    assert norm.item() == pytest.approx(math.sqrt(48)) and masked.tolist() == [True] * 3
    assert stats.total_norm.item() == 0
