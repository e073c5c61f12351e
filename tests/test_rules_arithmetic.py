"""A rule's formula on the host's numbers and on tensors: the same bits, but where torch rounds twice."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastclip.rules import adaptive, arithmetic
from fastclip.rules.adaptive import _adagc, _autoclip, _zclip
from fastclip.rules.coefficients import clip_coefficient

EDGES = [0.0, 1e-320, 1e-300, 1e-6, 1.0, 1e6, 1e155, 1e300, math.inf, math.nan]
NORMS = st.one_of(st.sampled_from(EDGES), st.floats(0, 1e3), st.floats(0, math.inf))
ANY = st.one_of(NORMS, NORMS.map(lambda number: -number))
LIMITS = st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1e-300, 1e300, math.inf]))
FRACTIONS = st.floats(0, 0.999)
TWICE = 1e-15  # where torch rounds twice: it divides a Python number by a tensor as number · (1 / tensor)
COUNTS = st.integers(0, 9).map(float)


def tensor(number):
    return torch.full((), number, dtype=torch.float64, device="cpu")


def same_bits(host, device, rtol=0.0):
    """Whether each of two results has the bits of the other's, or is as close; any NaN is like any other."""
    for a, b in zip(host, device, strict=True):
        a = (a if isinstance(a, torch.Tensor) else tensor(a)).expand(b.shape)
        assert b.dtype == torch.float64 and (a.dtype == torch.float64)
        torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)
        assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()), (a, b)


def check(formula, numbers, *arguments, rtol=0.0):
    """`numbers` as floats and as [] tensors; `arguments` as they are."""
    same_bits(formula(*numbers, *arguments), formula(*map(tensor, numbers), *arguments), rtol)


@settings(max_examples=150, deadline=None)
@given(NORMS, st.booleans(), COUNTS, ANY, ANY, LIMITS, FRACTIONS, LIMITS)
@example(5.0, False, 9.0, 1.0, 0.01, 2.5, 0.97, 1e-6)  # a spike
@example(1.0, False, 9.0, 1.0, 0.0, 2.5, 0.97, 0.0)  # 0 / 0
@example(2.0, False, 9.0, 1.0, 0.0, 2.5, 0.97, 0.0)  # 1 / 0
@example(1.0, False, -1.0, 0.0, 0.0, 2.5, 0.97, 0.0)  # 1 / 0, the share of a count that a checkpoint made up
def test_zclip(norm, skip, count, mean, var, z_max, alpha, eps):
    def root(number):  # torch's may be the neighbour of the right one, and what follows subtracts
        host = arithmetic.root(number.item() if isinstance(number, torch.Tensor) else number)
        return tensor(host) if isinstance(number, torch.Tensor) else host

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "root", root)
        check(_zclip, [norm, math.nan if skip else norm, count, mean, var], z_max, alpha, 5.0, eps)


@settings(max_examples=100, deadline=None)
@given(NORMS, st.booleans(), st.integers(0, 12), st.lists(st.floats(1e-300, 1e300), min_size=4, max_size=4), FRACTIONS)
def test_autoclip(norm, skip, count, history, share):
    history = [*(x if i < count else math.inf for i, x in enumerate(history)), math.inf]
    remembered = torch.tensor(history, dtype=torch.float64)

    def formula(norm, observed, count):
        return _autoclip(norm, observed, count, remembered, share)

    check(formula, [norm, math.nan if skip else norm, float(count)])
    assert remembered.tolist() == history


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NORMS, ANY), min_size=1, max_size=4), NORMS, st.booleans(), COUNTS, LIMITS, FRACTIONS, LIMITS)
def test_adagc(tensors, norm, skip, count, rel, beta, absolute):
    norms, gamma = torch.tensor(tensors, dtype=torch.float64).unbind(1)
    observed = torch.full_like(norms, math.nan) if skip else norms

    def formula(norm, count):
        return _adagc(norm, norms, observed, count, gamma, rel, beta, 5, absolute)

    check(formula, [norm, count], rtol=TWICE)


@settings(max_examples=100, deadline=None)
@given(NORMS, LIMITS, ANY)
def test_the_coefficient_of_a_norm(norm, limit, any_limit):
    """Of a limit that was checked; and of one that nobody has looked at."""
    same_bits([clip_coefficient(norm, limit)], [clip_coefficient(tensor(norm), limit)], TWICE)
    same_bits([clip_coefficient(norm, any_limit)], [clip_coefficient(tensor(norm), tensor(any_limit))])


@settings(max_examples=100, deadline=None)
@given(ANY, ANY)
def test_operations(a, b):
    """What Python refuses, IEEE 754 defines."""
    same_bits([arithmetic.divided(a, b)], [arithmetic.divided(tensor(a), tensor(b))])
    same_bits([arithmetic.root(a)], [arithmetic.root(tensor(a))], TWICE)
    same_bits([arithmetic.where(a < b, a, b)], [arithmetic.where(tensor(a) < tensor(b), tensor(a), tensor(b))])
    for low, high in ((-math.inf, 1.0), (0.0, math.inf), (-1.0, 1e300)):
        if a or math.copysign(1.0, a) > 0:  # of -0 and 0 as the limit torch says nothing
            same_bits([arithmetic.clamped(a, low, high)], [arithmetic.clamped(tensor(a), low, high)])


@pytest.mark.parametrize("number", [2.5, True, math.inf])
def test_to_the_host_and_back(number):
    host = arithmetic.on_host(torch.tensor(number))
    assert host == number and type(host) is type(number)
    assert arithmetic.as_tensor(float(number), torch.device("cpu")).dtype == torch.float64
    vector = torch.ones(1)
    assert arithmetic.on_host(vector) is vector and arithmetic.as_tensor(vector, vector.device) is vector
