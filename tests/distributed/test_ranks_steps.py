"""Optimizer steps over ranks, their checkpoints, and the wrappers that shard parameters: as one process steps."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import worlds
from models import full, local, mesh_of, norm_of, raised, sharded, whole
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastclip

pytestmark = pytest.mark.slow

SHAPES = ((5, 3), (1, 2), (4, 4), ())  # of the second, all ranks but one have an empty part
PLACEMENTS = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]


def pair(mesh):
    values = [whole(shape, i) for i, shape in enumerate(SHAPES)]
    cut = [sharded(value, mesh, place) for value, place in zip(values, PLACEMENTS)]
    return cut, [torch.nn.Parameter(value.clone()) for value in values]


def set_gradients(cut, alone, mesh, step):
    for i, (p, q) in enumerate(zip(cut, alone)):
        gradient = whole(SHAPES[i], 100 * step + i)
        p.grad, q.grad = distribute_tensor(gradient, mesh, PLACEMENTS[i], src_data_rank=None), gradient.clone()


def assert_same(cut, alone, mesh):
    """To the rounding of float32, of the norm and of three steps."""
    for p, q, place in zip(cut, alone, PLACEMENTS):
        torch.testing.assert_close(
            local(p.detach()),
            local(distribute_tensor(q.detach(), mesh, place, src_data_rank=None)),
            rtol=2e-6,
            atol=2e-7,
        )


STEPS = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "fused Adam": lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
}
OURS = {
    "AdamW": (lambda ps, **kw: fastclip.optim.AdamW(ps, lr=0.1, **kw), lambda ps: torch.optim.AdamW(ps, lr=0.1)),
    "AMSGrad": (
        lambda ps, **kw: fastclip.optim.AdamW(ps, lr=0.1, amsgrad=True, **kw),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, amsgrad=True),
    ),
    "SGD": (
        lambda ps, **kw: fastclip.optim.SGD(ps, lr=0.1, momentum=0.9, **kw),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    ),
    "SGD with dampening": (
        lambda ps, **kw: fastclip.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5, **kw),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    ),
}


def _clipper_steps():
    mesh = mesh_of((2,), ("dp",))
    for make in STEPS.values():
        cut, alone = pair(mesh)
        ours, theirs = make(cut), make(alone)
        clipper = fastclip.Clipper(cut, 0.5)
        for step in range(3):
            set_gradients(cut, alone, mesh, step)
            torch.nn.utils.clip_grad_norm_(alone, 0.5)
            theirs.step()
            stats = clipper.step(ours)
            assert stats.clipped
            assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")
            assert_same(cut, alone, mesh)


def test_clipper_step_with_torch_optimizers():
    worlds.run(2, _clipper_steps)


def _our_steps():
    mesh = mesh_of((2,), ("dp",))
    for make, make_other in OURS.values():
        for inside in (True, False):
            cut, alone = pair(mesh)
            ours = make(cut, max_norm=0.5) if inside else make(cut)
            theirs = make_other(alone)
            clipper = None if inside else fastclip.Clipper(cut, 0.5)
            for step in range(3):
                set_gradients(cut, alone, mesh, step)
                torch.nn.utils.clip_grad_norm_(alone, 0.5)
                theirs.step()
                versions = [p._version for p in cut]
                ours.step() if inside else clipper.step(ours)
                assert all(p._version > version for p, version in zip(cut, versions))
                assert_same(cut, alone, mesh)
            for p in cut:  # on every rank, in the layout of the parameter
                for state in (
                    ours.state[p].get(name) for name in ("exp_avg", "momentum_buffer") if name in ours.state[p]
                ):
                    assert isinstance(state, DTensor) and state.placements == p.placements


def test_our_optimizers():
    worlds.run(2, _our_steps)


def _initial_step():
    """A first step with a learning rate of 0 and gradients of zeros only makes the states, on all ranks or on none."""
    mesh = mesh_of((2,), ("dp",))
    cut, alone = pair(mesh)
    optimizer = fastclip.optim.AdamW(cut, lr=0.0, max_norm=fastclip.rules.ZClip(warmup=2))
    set_gradients(cut, alone, mesh, 0)
    for p in cut[:3]:
        if dist.get_rank() == 1:
            local(p.grad).zero_()
    for p in cut[3:]:
        p.grad = None
    optimizer.step()  # rank 1 has zeros only, but the model has not
    assert optimizer.stats is not None and optimizer.state[cut[0]]["step"] == 1
    cut, alone = pair(mesh)
    optimizer = fastclip.optim.AdamW(cut, lr=0.0, max_norm=fastclip.rules.ZClip(warmup=2))
    for p in cut:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.stats is None and all(optimizer.state[p]["step"] == 0 for p in cut)


def test_the_step_that_makes_the_states():
    worlds.run(2, _initial_step)


def _partial_steps():
    """Gradients that are yet to be summed, as tensor parallelism leaves those of norms."""
    mesh = mesh_of((2,), ("tp",))
    for make, make_other in OURS.values():
        ours_p, theirs_p = sharded(whole((4, 3), 0), mesh, [Replicate()]), torch.nn.Parameter(whole((4, 3), 0))
        ours, theirs = make([ours_p], max_norm=0.5), make_other([theirs_p])
        for step in range(3):
            parts = [whole((4, 3), 10 * step + rank) for rank in range(2)]
            ours_p.grad = DTensor.from_local(parts[dist.get_rank()], mesh, [Partial()], run_check=False)
            theirs_p.grad = sum(parts)
            torch.nn.utils.clip_grad_norm_([theirs_p], 0.5)
            theirs.step()
            ours.step(zero_grad=True)
            assert not local(ours_p.grad).any()
            torch.testing.assert_close(local(ours_p.detach()), theirs_p.detach(), rtol=2e-6, atol=2e-7)


def test_a_step_sums_what_is_partial():
    worlds.run(2, _partial_steps)


def _frozen_stage():
    """A stage without states takes part in what the other asks, also where the learning rate is 0."""
    stage = dist.get_rank()
    p = torch.nn.Parameter(whole((3,), 0), requires_grad=stage == 0)
    optimizer = fastclip.optim.AdamW([p], lr=0.1, max_norm=1.0, process_group=dist.group.WORLD)
    for step, lr in enumerate((0.1, 0.0, 0.1)):
        optimizer.param_groups[0]["lr"] = lr
        if stage == 0:
            p.grad = whole((3,), step)
        optimizer.step()
        assert math.isclose(optimizer.stats.total_norm.item(), norm_of([whole((3,), step)], 2.0), rel_tol=1e-6)


def test_a_stage_without_states():
    worlds.run(2, _frozen_stage)


def _scaler_without_gradients():
    stage = dist.get_rank()
    p = torch.nn.Parameter(whole((3,), 0))
    optimizer = torch.optim.SGD([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    clipper = fastclip.Clipper([p], 0.5, process_group=dist.group.WORLD)
    for broken in (False, True):
        if stage == 0:
            p.grad = whole((3,), 1) * 8.0
            p.grad[0] = math.inf if broken else 8.0
        scaler.unscale_(optimizer)
        stats = clipper.step(optimizer, scaler)
        scaler.update()
        assert bool(stats.skipped) == broken and scaler.get_scale() == (4.0 if broken else 8.0)


def test_a_scaler_on_a_rank_without_gradients():
    worlds.run(2, _scaler_without_gradients)


# ---- 15: checkpoints ----


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def _sharded_model():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    model = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    return model


def _train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(whole((8, 5), step)).square().mean().backward()  # the same data on every rank
        optimizer.step()


def _make(kind, parameters):
    if kind == "torch":
        return torch.optim.AdamW(parameters, lr=0.05)
    return fastclip.optim.AdamW(
        parameters, lr=0.05, max_norm=fastclip.rules.AdaGC(warmup=2) if kind == "AdaGC" else 0.05
    )


def _save(path, kind):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = _sharded_model()
    optimizer = _make(kind, model.parameters())
    _train(model, optimizer, range(4))
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(states, checkpoint_id=path)
    _train(model, optimizer, range(4, 7))
    return [full(p).tolist() for p in model.parameters()]


def _load(path, kind):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = _sharded_model()
    optimizer = _make(kind, model.parameters())
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    _train(model, optimizer, range(4, 7))
    return [full(p).tolist() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["ours", "AdaGC"])
def test_a_checkpoint_saved_on_two_ranks_and_loaded_on_four(kind, tmp_path):
    saved = worlds.run(2, _save, str(tmp_path), kind)
    loaded = worlds.run(4, _load, str(tmp_path), kind)
    assert all(values == loaded[0] for values in loaded)
    for a, b in zip(saved[0], loaded[0]):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)


def _exchange():
    """To and from torch.optim, by state_dict()."""
    model, other = _sharded_model(), _sharded_model()
    ours, theirs = fastclip.optim.AdamW(model.parameters(), lr=0.05), torch.optim.AdamW(other.parameters(), lr=0.05)
    for first, second, a, b in ((model, other, ours, theirs), (other, model, theirs, ours)):
        _train(first, a, range(2))
        second.load_state_dict(first.state_dict())
        b.load_state_dict(copy.deepcopy(a.state_dict()))  # torch takes the tensors over
        _train(first, a, range(2, 4))
        _train(second, b, range(2, 4))
        for p, q in zip(first.parameters(), second.parameters()):
            torch.testing.assert_close(local(p.detach()), local(q.detach()), rtol=2e-6, atol=2e-7)


def test_states_to_and_from_torch():
    worlds.run(2, _exchange)


# ---- FSDP1, ZeRO-like flat shards, DDP ----


def _flat_shards():
    """A flat gradient of which each rank has a part, as ZeRO and Megatron's distributed optimizer keep them."""
    rank = dist.get_rank()
    everything = whole((10,), 5)
    p = torch.nn.Parameter(whole((10,), 4)[5 * rank : 5 * rank + 5].clone())
    p.grad = everything[5 * rank : 5 * rank + 5].clone()
    fastclip.distributed.mark_sharded([p], dist.group.WORLD)
    assert math.isclose(fastclip.clip_norm_([p], 0.5).item(), norm_of([everything], 2.0), rel_tol=1e-6)
    torch.testing.assert_close(p.grad, everything[5 * rank : 5 * rank + 5] * (0.5 / norm_of([everything], 2.0)))
    optimizer = fastclip.optim.AdamW([p], lr=0.1, max_norm=0.25)
    optimizer.step()
    assert math.isclose(optimizer.stats.total_norm.item(), 0.5, rel_tol=1e-5)
    stats = fastclip.Clipper([p], fastclip.rules.TensorNorm(1.0)).clip_()
    assert math.isclose(stats.tensor_norms.item(), 0.5, rel_tol=1e-5)
    texts = raised(partial(fastclip.Clipper([p], fastclip.rules.AGC()).clip_))
    assert all("AGC needs the norms of whole rows" in text for text in texts)


def test_declared_flat_shards():
    worlds.run(2, _flat_shards)


def _fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.manual_seed(0)
    model = Model()
    alone = Model()
    alone.load_state_dict(model.state_dict())
    wrapped = FullyShardedDataParallel(
        model,
        use_orig_params=False,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_id=torch.device("cpu"),
    )
    x = whole((4, 5), 1)
    wrapped(x).square().sum().backward()
    alone(x).square().sum().backward()
    parameters = list(wrapped.parameters())
    texts = raised(lambda: fastclip.clip_norm_(parameters, 1.0))
    assert all("FullyShardedDataParallel (FSDP1)" in text and "mark_sharded" in text for text in texts), texts
    fastclip.distributed.mark_sharded(parameters, dist.group.WORLD)
    norm = fastclip.clip_norm_(parameters, 1.0)
    exact = norm_of([p.grad for p in alone.parameters()], 2.0)
    assert math.isclose(norm.item(), exact, rel_tol=1e-5)
    assert math.isclose(fastclip.clip_norm_(parameters, 1.0).item(), 1.0, rel_tol=1e-4)


@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*:FutureWarning")
def test_fsdp1_is_refused_until_it_is_declared():
    worlds.run(2, _fsdp1)


def _ddp(bucket_views):
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    model, alone = Model(), Model()
    alone.load_state_dict(model.state_dict())
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    ours, theirs = torch.optim.AdamW(model.parameters(), fused=True), torch.optim.AdamW(alone.parameters())
    clipper = fastclip.Clipper(wrapped.parameters(), 0.05)
    data = [whole((4, 5), rank) for rank in range(2)]
    for _ in range(3):
        for one in (ours, theirs):
            one.zero_grad(set_to_none=not bucket_views)
        wrapped(data[dist.get_rank()]).square().mean().backward()
        (sum(alone(x).square().mean() for x in data) / 2).backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        theirs.step()
        clipper.step(ours)
        for p, q in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    with CommDebugMode() as comm:
        clipper.clip_()
    assert comm.get_total_counts() == 0


@pytest.mark.parametrize("bucket_views", [False, True])
def test_ddp_needs_no_communication(bucket_views):
    worlds.run(2, _ddp, bucket_views)
