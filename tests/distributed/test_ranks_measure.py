"""Clipper(measure_in_backward=True) over ranks: the clip reads the gradients, since not all writes of them are seen."""

import pytest
import torch
import torch.distributed as dist
import worlds
from models import full, mesh_of, norm_of, whole
from test_ranks_steps import Model

import fastclip
from fastclip.gradients import in_backward

pytestmark = pytest.mark.slow


def _everything_in_small_buckets():
    in_backward.SMALL, in_backward.CPU_BYTES = 0, 60


def _counted():
    """Counts gradients whose sums are those of the hooks, here."""
    counts = [0]
    is_still = in_backward.Seen.is_still

    def counting(self, *arguments):
        still = is_still(self, *arguments)
        counts[0] += still
        return still

    in_backward.Seen.is_still = counting
    return counts


def _fsdp2():
    from torch.distributed.fsdp import fully_shard

    _everything_in_small_buckets()
    counts = _counted()
    torch.manual_seed(3)
    model = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    parameters = list(model.parameters())
    clipper = fastclip.Clipper(model.named_parameters(), 1e9, tensor_stats=True, measure_in_backward=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for step in range(12):
        if step % 3 == 0:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        for rank in range(2):  # other data on every rank
            model(whole((8, 5), 10 * step + rank + dist.get_rank())).square().mean().backward()
        changed = step % 6
        with torch.no_grad():
            if changed == 1:
                parameters[0].grad.mul_(2)
            elif changed == 2:
                parameters[2].grad = parameters[2].grad * 3
            elif changed == 3:
                scaler.scale(torch.ones(()))
                scaler.unscale_(optimizer)
                scaler.update()
            elif changed == 4:  # which bumps no version of a DTensor, nor of its part
                torch._foreach_mul_([p.grad for p in parameters], 0.5)
            elif changed == 5:
                torch.nn.utils.clip_grad_norm_(parameters, 1e-2)
        expected = [full(p.grad) for p in parameters]
        stats = clipper.clip_()
        torch.testing.assert_close(stats.norm.item(), norm_of(expected, 2.0), rtol=1e-6, atol=0)
        norms = torch.stack([g.norm() for g in expected])
        torch.testing.assert_close(stats.norms, norms, rtol=1e-6, atol=0)
    assert counts == [0]


def test_whatever_is_written_to_gradients_of_fsdp2_counts():
    worlds.run(2, _fsdp2)


def _ddp(bucket_views):
    _everything_in_small_buckets()
    counts = _counted()
    torch.manual_seed(0)
    model = Model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    optimizer = fastclip.optim.AdamW(wrapped.parameters(), max_norm=0.05, measure_in_backward=True)
    for step in range(4):
        optimizer.zero_grad(set_to_none=not bucket_views)
        wrapped(whole((4, 5), 10 * step + dist.get_rank())).square().mean().backward()
        expected = norm_of([p.grad for p in model.parameters()], 2.0)
        optimizer.step()
        torch.testing.assert_close(optimizer.stats.norm.item(), expected, rtol=1e-6, atol=0)
    assert counts == [0]


@pytest.mark.parametrize("bucket_views", [False, True])
def test_gradients_that_ddp_reduces_are_read_afterwards(bucket_views):
    worlds.run(2, _ddp, bucket_views)
