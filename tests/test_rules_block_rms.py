"""BlockRMS, against a plain oracle and optax."""

import math

import numpy as np
import pytest
import torch
from cases import assert_agrees, assert_scaled, clipping, parameter, wide
from rule_cases import agc_parameters, installed

import fastclip
from fastclip.rules import BlockRMS, Except, Only

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, math.inf])
def test_block_rms(backend, threshold):
    ps = [
        parameter(t)
        for t in (torch.randn(30, 7), torch.zeros(4), torch.full((5,), 1e19), torch.randn(0), torch.ones(()))
    ]
    expected = []
    for p in ps:
        g = p.grad.double()
        rms = g.square().mean().sqrt() if g.numel() else torch.zeros(())
        expected.append(g.clone() if rms <= threshold else g * (threshold / rms))
    fastclip.Clipper(ps, BlockRMS(threshold)).clip_()
    assert_scaled([p.grad for p in ps], expected, [1.0] * len(ps))


def test_block_rms_when_parameters_grow():
    """Parameters whose memory is replaced by more of it, as densification does."""
    ps = [parameter(torch.full((4,), 2.0)), parameter(torch.full((2, 3), 2.0))]
    clipper = fastclip.Clipper(ps, [Only(BlockRMS(1.0), ps[:1]), Except(BlockRMS(0.5), ps[:1])])
    for size, dtype in ((4, torch.float32), (9, torch.float32), (2, torch.float64), (70_000, torch.float32)):
        for p, shape in zip(ps, ((size,), (size, 3))):
            p.grad = None
            p.data = torch.zeros(shape, dtype=dtype)
            p.grad = torch.full(shape, 2.0, dtype=dtype)
        clipper.clip_()
        for p, limit in zip(ps, (1.0, 0.5)):
            torch.testing.assert_close(p.grad, torch.full_like(p, limit), rtol=1e-6, atol=0)


def test_block_rms_counts_what_a_sparse_gradient_leaves_out():
    p, q, z = torch.nn.Parameter(torch.zeros(4, 2)), parameter(torch.ones(3)), parameter(torch.full((5,), 2j))
    p.grad = torch.sparse_coo_tensor([[1, 1]], torch.full((2, 2), 2.0), (4, 2), check_invariants=True)
    rms = math.sqrt(2 * 16 / 8)
    fastclip.Clipper([p, q, z], BlockRMS(0.5)).clip_()
    torch.testing.assert_close(p.grad.to_dense()[1], torch.full((2,), 4 * 0.5 / rms), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.grad, torch.full((3,), 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(z.grad, torch.full((5,), 0.5j), rtol=1e-6, atol=0)


@pytest.mark.skipif(not installed("optax"), reason="needs optax: pip install '.[oracles]'")
def test_block_rms_as_optax_has_it():
    import optax

    ps = [p for p in agc_parameters() if p.numel()]
    transform = optax.clip_by_block_rms(0.03)
    before = wide(p.grad for p in ps)
    exact = [g / max(1.0, g.square().mean().sqrt().item() / 0.03) for g in before]
    theirs, _ = transform.update([p.grad.numpy().copy() for p in ps], transform.init(None))
    fastclip.Clipper(ps, BlockRMS(0.03)).clip_()
    for p, q, e in zip(ps, theirs, exact):
        assert_agrees(p.grad, torch.from_numpy(np.array(q)), e, clipping(torch.float32))
