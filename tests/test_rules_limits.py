"""Limits that change: functions and tensors."""

import math

import pytest
import torch
from cases import clip_factor, clipping, parameter, tensor_norm

import fastclip
from fastclip.rules import GlobalNorm, Mask, Only, Value
from fastclip.rules.coefficients import clip_coefficient

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_limit_that_warms_up():
    p = parameter(torch.zeros(2))
    clipper = fastclip.Clipper([p], GlobalNorm(lambda step: 1.0 + step))
    for step in range(4):
        p.grad = torch.tensor([3.0, 4.0])
        stats = clipper.clip_() if step % 2 else clipper.step(torch.optim.SGD([p], lr=0.0))
        assert stats.limit.item() == 1.0 + step
        assert tensor_norm(p.grad) == pytest.approx(5 * clip_factor(5.0, 1.0 + step), rel=clipping(torch.float32))
    with pytest.raises(ValueError, match=r"max_norm\(0\) must be >= 0, got -1"):
        fastclip.Clipper([p], GlobalNorm(lambda step: -1)).clip_()
    assert tensor_norm(p.grad) == pytest.approx(5 * clip_factor(5.0, 4.0), rel=clipping(torch.float32))


def test_a_limit_in_a_tensor():
    p, limit = parameter(torch.zeros(2)), torch.tensor(2.0)
    clipper = fastclip.Clipper([p], GlobalNorm(limit))
    for value in (2.0, 0.5, math.inf, 0.0):
        limit.fill_(value)
        p.grad = torch.tensor([3.0, 4.0])
        assert clipper.clip_().limit.item() == value
        assert tensor_norm(p.grad) == pytest.approx(5 * clip_factor(5.0, value), rel=clipping(torch.float32))
    for value in (-1.0, math.nan):
        limit.fill_(value)
        p.grad = torch.tensor([3.0, 4.0])
        for rule in (GlobalNorm(torch.tensor(2.0)), [Value(1.0), Only(GlobalNorm(torch.tensor(2.0)), [p])]):
            clipper = fastclip.Clipper([p], rule)
            inner = clipper.rules[-1].rule if isinstance(rule, list) else rule
            inner.max_norm.fill_(value)
            with pytest.raises(ValueError, match=f"max_norm must be >= 0, got {value}"):
                clipper.clip_()
            assert p.grad.tolist() == [3, 4]
        with pytest.raises(ValueError, match=f"max_norm must be >= 0, got {value}"):
            GlobalNorm(limit)


def test_a_limit_that_nobody_has_looked_at():
    """One on a GPU: whatever it is, no gradient is turned round."""
    norm = torch.tensor([0.0, 1e-9, 5.0, math.inf, math.nan, -2.0], dtype=torch.float64)  # the last, of clip_with_norm_
    for limit, expected in (
        (-1.0, [0, 0, 0, -0.0, math.nan, 1 / (2 - 1e-6)]),
        (-math.inf, [0, 0, 0, -0.0, math.nan, 1]),
        (math.nan, [math.nan] * 3 + [-0.0] + [math.nan] * 2),
        (math.inf, [1] * 6),
        (1.0, [1, 1, 1 / (5 + 1e-6), -0.0, math.nan, 0]),
    ):
        coef = clip_coefficient(norm, torch.tensor(limit, dtype=torch.float64))
        torch.testing.assert_close(coef.tolist(), [float(e) for e in expected], rtol=1e-15, atol=0, equal_nan=True)


def test_a_limit_is_asked_for_once_a_step():
    asked = []

    def limit(step):
        asked.append(step)
        return 1.0

    p = parameter(torch.ones(2))
    for rules in (GlobalNorm(limit), [Mask(0.0), GlobalNorm(limit)], [Value(9.0), GlobalNorm(limit)]):
        asked.clear()
        clipper = fastclip.Clipper([p], rules)
        for step in range(3):
            assert clipper.clip_().step == step
        assert asked == [0, 1, 2]
    with pytest.raises(TypeError, match="must be a number, got a tensor"):
        fastclip.Clipper([p], GlobalNorm(lambda step: torch.ones(()))).clip_()
