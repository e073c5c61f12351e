"""AGC, against a plain oracle and timm."""

import importlib.util
import math
import pathlib
import runpy

import pytest
import torch
from cases import NORM_ERROR, assert_scaled, parameter, rounding, tensor_norm, wide
from rule_cases import agc_parameters, installed

import fastclip
from fastclip.rules import AGC, Mask

pytestmark = pytest.mark.usefixtures("one_thread")


def agc(weights, gradients, clip_factor=0.01, eps=1e-3):
    """In float64, unit by unit."""
    result = []
    for w, g in zip(weights, gradients):
        units = range(w.shape[0]) if w.dim() > 1 else [...]
        g = g.double().clone()
        for u in units:
            norm, limit = g[u].norm(), clip_factor * max(w[u].double().norm().item(), eps)
            if norm > limit:
                g[u] *= limit / max(norm.item(), 1e-6)
        result.append(g)
    return result


def agc_error(dtype):
    """The factor is a quotient of two norms."""
    return 2 * NORM_ERROR + rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_agc(backend, dtype):
    ps = agc_parameters(dtype)
    before = [p.grad.clone() for p in ps]
    expected = agc([p.detach() for p in ps], before)
    stats = fastclip.Clipper(ps, AGC()).clip_()
    assert_scaled([p.grad for p in ps], expected, [1.0] * len(ps), relative=agc_error(dtype))
    assert torch.equal(ps[1].grad[:4], before[1][:4])
    assert stats.clipped


def test_agc_in_other_layouts(backend):
    """Rows that are no pieces of memory, and gradients laid out otherwise than their parameters."""
    torch.manual_seed(0)
    ps = [
        parameter(torch.randn(6, 5), torch.randn(5, 6).t()),
        parameter(torch.randn(5, 6).t(), torch.randn(6, 5)),
        parameter(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        parameter(torch.randn(40, 9)[:, ::2], torch.randn(40, 5)),
    ]
    for chosen in (ps, ps[2:3], ps[:1], ps[3:]):
        for p in chosen:
            p.grad = torch.randn(p.shape).to(memory_format=torch.preserve_format) if p is ps[2] else p.grad
        expected = agc([p.detach() for p in chosen], [p.grad for p in chosen])
        fastclip.Clipper(chosen, AGC()).clip_()
        assert_scaled([p.grad for p in chosen], expected, [1.0] * 4, relative=agc_error(torch.float32))


def test_agc_leaves_the_head_alone():
    def make():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 2)})
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model

    model = make()
    expected = agc([p.detach() for p in model["body"].parameters()], [p.grad for p in model["body"].parameters()])
    for exclude in ("head.*", ["head.weight", "head.b*"], lambda m: list(m["head"].parameters())):
        model = make()
        rule = AGC(exclude=exclude(model) if callable(exclude) else exclude)
        fastclip.Clipper(model.named_parameters(), [Mask(0.0), rule]).clip_()
        body = [p.grad for p in model["body"].parameters()]
        assert_scaled(body, expected, [1.0] * 2, relative=agc_error(torch.float32))
        for p, q in zip(model["head"].parameters(), make()["head"].parameters()):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 0.0), (math.inf, 1.0)])
def test_agc_at_its_ends(backend, factor, expected):
    ps = [parameter(torch.ones(3, 2)), parameter(torch.ones(5))]
    stats = fastclip.Clipper(ps, AGC(factor)).clip_()
    assert all((p.grad == expected).all() for p in ps) and stats.clipped.item() == (expected == 0)
    assert not fastclip.Clipper([], AGC(factor)).clip_().clipped


def test_agc_with_broken_gradients():
    w = torch.ones(3, 2)
    p = parameter(torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 1.0]]), w)
    fastclip.Clipper([p], AGC()).clip_()
    assert p.grad[0].isnan().tolist() == [True, False] and p.grad[1].isnan().tolist() == [True, False]
    assert p.grad[1, 1] == 0 and tensor_norm(p.grad[2]) == pytest.approx(
        0.01 * math.sqrt(2), rel=agc_error(torch.float32)
    )
    p = parameter(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), torch.ones(2, 2))
    stats = fastclip.Clipper([p], AGC(), nonfinite="skip").clip_()
    assert stats.skipped and p.grad[1].tolist() == [1, 1]


@pytest.mark.skipif(not installed("timm"), reason="needs timm: pip install '.[oracles]'")
def test_agc_as_timm_has_it():
    folder = pathlib.Path(importlib.util.find_spec("timm").origin).parent  # the one file, without timm's models
    theirs = runpy.run_path(str(folder / "utils" / "agc.py"))
    ps, qs = ([p for p in agc_parameters() if p.numel() and p.dim()] for _ in range(2))
    qs = [parameter(*wide([q.grad, q])) for q in qs]
    fastclip.Clipper(ps, AGC(0.02, eps=1e-2)).clip_()
    theirs["adaptive_clip_grad"](qs, clip_factor=0.02, eps=1e-2)
    assert_scaled([p.grad for p in ps], [q.grad for q in qs], [1.0] * len(ps), relative=agc_error(torch.float32))


def test_agc_with_a_sparse_gradient():
    p = torch.nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2).to_sparse(1)
    with pytest.raises(NotImplementedError, match="sparse"):
        fastclip.Clipper([p], AGC()).clip_()
