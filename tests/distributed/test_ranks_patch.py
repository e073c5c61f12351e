"""torch's own functions, patched, over several ranks."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import worlds
from models import full, local, mesh_of, on_mesh, raised
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

import fastclip

pytestmark = pytest.mark.slow


def _patched():
    """A model of DTensors, some gradients of which only one rank cannot clip in the end."""
    mesh = mesh_of((2,), ("dp",))
    results = []
    for options in ({}, {"rule": 0.25}):
        with fastclip.patch_torch(**options) as patch:
            parameters = on_mesh(mesh)
            norm = clip_grad_norm_(iter(parameters), 0.5)
            results.append((norm.item(), type(norm) is torch.Tensor, [full(p.grad).tolist() for p in parameters]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                errors = raised(partial(clip_grad_norm_, parameters, 0.5, "x"))
            assert not any(errors) if options else all(errors)  # torch's own, unless a rule is what clips
            before = [local(p.grad).clone() for p in parameters]
            if dist.get_rank() == 1:
                local(parameters[4].grad).untyped_storage().resize_(4)
            assert all(raised(partial(clip_grad_norm_, parameters, 0.5)))  # and not left to torch by one of them
            assert len(patch.counts()["torch"]) == (0 if options else 1)
            for i, (p, b) in enumerate(zip(parameters, before)):
                assert i == 4 or torch.equal(local(p.grad), b)
            errors = raised(partial(clip_grads_with_norm_, parameters, 0.5, norm))  # which sends nothing
            assert errors[0] is None and "has no memory" in errors[1]
    return results


def test_patched_over_ranks():
    (one, other) = worlds.run(2, _patched)
    assert one == other
    for (norm, plain, grads), limit in zip(one, (0.5, 0.25)):
        assert plain
        clipped = torch.cat([torch.tensor(g).flatten() for g in grads]).double().norm().item()
        assert norm > 0.5 and clipped == pytest.approx(limit, rel=1e-5)
