"""Value, between two limits."""

import math

import pytest
import torch
from cases import parameter

import fastclip
from fastclip.rules import Value

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "limits", [(-0.5, 1.0), (0.25, 0.5), (-2.0, -1.0), (-math.inf, 0.0), (-0.1, math.inf), (0.0, 0.0)]
)
def test_value_between_two_limits(backend, limits, dtype):
    torch.manual_seed(0)
    gradient = torch.cat([torch.randn(1003), torch.tensor([math.nan, math.inf, -math.inf, 0.0])]).to(dtype)
    p, quiet = (
        parameter(gradient.clone()),
        parameter(torch.full((9,), max(limits[0], min(limits[1], 0.0)), dtype=dtype)),
    )
    stats = fastclip.Clipper([p, quiet], Value(*limits)).clip_()
    assert torch.equal(p.grad.nan_to_num(7), gradient.clamp(*limits).nan_to_num(7))
    assert stats.clipped
    assert not fastclip.Clipper([quiet], Value(*limits)).clip_().clipped


def test_complex_gradients_have_no_low_and_high():
    p = parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        fastclip.Clipper([p], Value(-0.5, 1.0)).clip_()
