"""Parameters of which each rank has a part: refused, since their norm on one rank is not the model's."""

import pytest
import torch
import torch.distributed as dist
from cases import parameter
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import fastclip

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`"),  # of one rank there is nothing to shard
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),  # from ZeroRedundancyOptimizer
    pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*:FutureWarning"),
]

CALLS = {
    "clip_norm_": lambda ps: fastclip.clip_norm_(ps, 1.0),
    "clip_value_": lambda ps: fastclip.clip_value_(ps, 1.0),
    "clip_with_norm_": lambda ps: fastclip.clip_with_norm_(ps, 1.0, 3.0),
    "clip_tensor_norm_": lambda ps: fastclip.clip_tensor_norm_(ps, 1.0),
    "mask_small_": lambda ps: fastclip.mask_small_(ps, 1e-3),
    "Clipper.clip_": lambda ps: fastclip.Clipper(ps, 1.0).clip_(),
    "Clipper.step": lambda ps: fastclip.Clipper(ps, 1.0).step(torch.optim.AdamW(ps, fused=True)),
    "AdamW": lambda ps: fastclip.optim.AdamW(ps, max_norm=1.0).step(),
}


@pytest.fixture
def group(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def marked(gradient):
    """A view of a flat parameter as FSDP1 gives it to its users: a parameter with a mark, its gradient a view."""
    p = parameter(gradient)
    p._fsdp_flattened = True
    return p


@pytest.mark.parametrize("call", CALLS)
def test_views_of_flat_parameters_are_refused(call, backend, group):
    flat = torch.full((10,), 5.0)
    ps = [parameter(torch.full((3,), 5.0)), marked(flat[2:6]), marked(flat[6:])]
    before = [p.detach().clone() for p in ps]
    with pytest.raises(NotImplementedError, match=r"parameters\[1\] is flattened by FullyShardedDataParallel"):
        CALLS[call](ps)
    assert all((p.grad == 5).all() for p in ps)
    assert all(torch.equal(p, b) for p, b in zip(ps, before))


def test_other_views_are_not(group):
    """Buckets of DistributedDataParallel, where FSDP1 is loaded too."""
    flat = torch.full((10,), 5.0)
    ps = [parameter(flat[2:6]), parameter(flat[6:])]
    torch.testing.assert_close(fastclip.clip_norm_(ps, 1.0).item(), 200**0.5, rtol=2e-7, atol=0)


def test_an_optimizer_that_does_not_clip_steps_them():
    ps = [marked(torch.ones(10)[2:6])]
    fastclip.optim.SGD(ps, lr=1.0).step()
    assert (ps[0] == -1).all()


def test_the_flattened_are_found_whatever_their_gradients_are(group):
    """A gradient that someone replaced, which is no view any more."""
    ps = [parameter(torch.full((3, 2), 5.0)), marked(torch.full((4,), 5.0))]
    with pytest.raises(NotImplementedError, match=r"parameters\[1\] is flattened by FullyShardedDataParallel"):
        fastclip.clip_norm_(ps, 1.0)


def test_one_process_does_not_look_for_them():
    """torch.compile loads FSDP1 where it is never used, and a look at every parameter made a clip 1.4 times slower."""
    looked_up = []

    class Watched(torch.nn.Parameter):
        def __getattr__(self, name):
            looked_up.append(name)
            raise AttributeError(name)

    p = Watched(torch.zeros(4))
    p.grad = torch.full((4,), 5.0)
    fastclip.clip_norm_([p], 1.0)
    assert "_fsdp_flattened" not in looked_up
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_fsdp1_is_refused(call, use_orig_params, group):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    wrapped = FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_id=torch.device("cpu"),
    )
    wrapped(torch.ones(3, 4)).square().sum().backward()
    with pytest.raises(NotImplementedError, match="FullyShardedDataParallel"):
        CALLS[call](list(wrapped.parameters()))


def test_zero_redundancy_optimizer(group):
    """Its optimizer of a rank has a part of the parameters; the whole is clipped outside."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ps = [parameter(torch.full((5,), 1000.0))]
    with pytest.raises(ValueError, match="max_norm must be left out inside ZeroRedundancyOptimizer"):
        ZeroRedundancyOptimizer(ps, optimizer_class=fastclip.optim.SGD, lr=1.0, max_norm=1.0)
    zero = ZeroRedundancyOptimizer(ps, optimizer_class=fastclip.optim.SGD, lr=1.0)
    fastclip.Clipper(ps, 1.0).step(zero)
    torch.testing.assert_close(ps[0].detach(), torch.full((5,), -(0.2**0.5)), rtol=1e-6, atol=0)
