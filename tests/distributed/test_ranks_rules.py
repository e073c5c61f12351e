"""Rules, policies and statistics over ranks: as one process with the whole tensors has them."""

import math
from functools import partial

import models
import pytest
import torch
import torch.distributed as dist
import worlds
from models import local, mesh_of, plain, raised, same_bits, sharded, whole
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastclip
from fastclip import rules

pytestmark = pytest.mark.slow

RULES = {
    "GlobalNorm": lambda: rules.GlobalNorm(lambda step: 1.0 + step),
    "TensorNorm": lambda: rules.TensorNorm(0.5),
    "TensorNorm, largest": lambda: rules.TensorNorm(0.5, math.inf),
    "BlockRMS": lambda: rules.BlockRMS(0.3),
    "Mask": lambda: rules.Mask(2.0),
    "Value": lambda: rules.Value(0.4),
    "AGC": lambda: rules.AGC(0.1, exclude=["p1", "p3"]),
    "AutoClip": lambda: rules.AutoClip(20, window=5),
    "ZClip": lambda: rules.ZClip(warmup=3),
    "AdaGC": lambda: rules.AdaGC(warmup=3),
    "Only": lambda: rules.Only(rules.GlobalNorm(0.5), "p[12]"),
    "Except": lambda: rules.Except(rules.TensorNorm(0.5), "p[01]"),
    "a list": lambda: [rules.Mask(1.5), rules.Value(1.0), rules.ZClip(warmup=3), rules.GlobalNorm(2.0)],
    "a function": lambda: lambda stats: (1 / (1 + stats.norms)).clamp(max=1.0),
}
SHAPES = ((5, 3), (7,), (4, 4), ())
PLACEMENTS = {
    "1-D": ((4,), ("dp",), [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]),
    "2-D": (
        *((2, 2), ("dp", "tp")),
        [[Shard(0), Replicate()], [Shard(0), Shard(0)], [Replicate(), Shard(0)], [Replicate(), Replicate()]],
    ),
}


def gradient(step, i):
    """Every fifth step much larger."""
    return whole(SHAPES[i], 100 * step + i, torch.float64, 20.0 if step % 5 == 4 else 1.0)


def pair(mesh, placements):
    """Parameters on a mesh, and the same in one process."""
    values = [whole(shape, i, torch.float64) for i, shape in enumerate(SHAPES)]
    cut = {f"p{i}": sharded(value, mesh, placements[i]) for i, value in enumerate(values)}
    return cut, {f"p{i}": plain(value) for i, value in enumerate(values)}


def set_gradients(cut, alone, mesh, placements, step):
    for i, (p, q) in enumerate(zip(cut.values(), alone.values())):
        p.grad = distribute_tensor(gradient(step, i), mesh, placements[i], src_data_rank=None)
        q.grad = gradient(step, i)


def assert_same(cut, alone, mesh, placements, what="grad"):
    for i, (p, q) in enumerate(zip(cut.values(), alone.values())):
        a, b = (p.grad, q.grad) if what == "grad" else (p.detach(), q.detach())
        expected = distribute_tensor(b, mesh, placements[i], src_data_rank=None)
        torch.testing.assert_close(local(a), local(expected), rtol=1e-12, atol=1e-14, equal_nan=True)


def _rule(name, placement):
    shape, names, placements = PLACEMENTS[placement]
    mesh = mesh_of(shape, names)
    cut, alone = pair(mesh, placements)
    ours, theirs = fastclip.Clipper(cut.items(), RULES[name]()), fastclip.Clipper(alone.items(), RULES[name]())
    for step in range(20):
        set_gradients(cut, alone, mesh, placements, step)
        stats, expected = ours.clip_(), theirs.clip_()
        torch.testing.assert_close(stats.total_norm, expected.total_norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.coef, expected.coef, rtol=1e-12, atol=0)
        same_bits(stats.total_norm)
        same_bits(stats.coef)
        assert_same(cut, alone, mesh, placements)
    for a, b in zip(ours.rules, theirs.rules):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-11, atol=0)
        for value in a.state_dict().values():
            same_bits(value)


def _rules(names, placement):
    for name in names:
        _rule(name, placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_rule_as_in_one_process(placement):
    """20 steps on 4 ranks."""
    names = [name for name in RULES if placement == "1-D" or name != "AGC"]
    worlds.run(4, _rules, names, placement)


def _split_rows():
    mesh = mesh_of((2,), ("dp",))
    for placements in ([Shard(1)], [Shard(0)]):
        shape = (4, 6) if placements == [Shard(1)] else (6,)
        p = sharded(whole(shape, 0), mesh, placements, whole(shape, 1))
        before = local(p.grad).clone()
        texts = raised(fastclip.Clipper([("w", p)], rules.AGC()).clip_)
        assert all("NotImplementedError" in text and "rows" in text and "w" in text for text in texts), texts
        assert torch.equal(local(p.grad), before)


def test_agc_refuses_rows_that_are_split():
    worlds.run(2, _split_rows)


# ---- pipeline stages ----


def _stages():
    """Rules of one norm, of parts of it, and of a norm after other rules, over stages of different parameters."""
    stage = dist.get_rank()
    names = [["a", "b"], ["c", "d", "e"]]
    for rule in (
        lambda: 2.0,
        lambda: rules.GlobalNorm(2.0, math.inf),
        lambda: rules.GlobalNorm(1.0, 0.0),
        lambda: rules.TensorNorm(0.7),
        lambda: rules.Only(rules.GlobalNorm(0.5), ["[ac]"]),
        lambda: rules.Except(rules.ZClip(warmup=2), ["[ade]"]),
        lambda: [rules.Mask(1.5), rules.GlobalNorm(0.5)],
        lambda: [rules.TensorNorm(0.5, math.inf), rules.GlobalNorm(0.6, math.inf)],
        lambda: rules.AdaGC(warmup=2),
        lambda: rules.AutoClip(20, window=3),
    ):
        everything = {name: plain(whole((3, i + 1), i, torch.float64)) for i, name in enumerate("abcde")}
        own = {name: plain(everything[name].detach()) for name in names[stage]}
        ours = fastclip.Clipper(own.items(), _lenient(rule()), process_group=dist.group.WORLD)
        theirs = fastclip.Clipper(everything.items(), _lenient(rule()))
        for step in range(6):
            for i, name in enumerate("abcde"):
                everything[name].grad = whole((3, i + 1), 10 * step + i, torch.float64, 9.0 if step == 4 else 1.0)
                if name in own:
                    own[name].grad = everything[name].grad.clone()
            stats, expected = ours.clip_(), theirs.clip_()
            torch.testing.assert_close(stats.total_norm, expected.total_norm, rtol=1e-12, atol=0)
            for name, p in own.items():
                torch.testing.assert_close(p.grad, everything[name].grad, rtol=1e-12, atol=0)


def _lenient(rule):
    """A stage need not have a parameter of every pattern."""
    if isinstance(rule, rules.Only):
        rule.check = lambda parameters, names: None
    return rule


def test_pipeline_stages():
    worlds.run(2, _stages)


# ---- 11: what is not finite, on each rank in turn ----


def _nonfinite(value):
    mesh = mesh_of((2,), ("dp",))
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    for where in range(2):
        for policy in ("propagate", "skip", "zero", "raise"):
            cut, alone = pair(mesh, placements)
            set_gradients(cut, alone, mesh, placements, 0)
            if dist.get_rank() == where:
                local(cut["p1"].grad)[0] = value
            alone["p1"].grad[4 * where] = value
            before = [local(p.grad).clone() for p in cut.values()]
            ours = fastclip.Clipper(cut.items(), 0.5, nonfinite=policy)
            theirs = fastclip.Clipper(alone.items(), 0.5, nonfinite=policy)
            if policy == "raise":
                texts = raised(ours.clip_)
                assert all(f"rank {where}: p1 (1 of " in text for text in texts), texts
                assert all(
                    torch.equal(local(p.grad).nan_to_num(), b.nan_to_num()) for p, b in zip(cut.values(), before)
                )
                continue
            stats, expected = ours.clip_(), theirs.clip_()
            assert_same(cut, alone, mesh, placements)
            ours_log, theirs_log = stats.log(), expected.log()
            for name in theirs_log:
                torch.testing.assert_close(ours_log[name], theirs_log[name], rtol=1e-12, atol=0, equal_nan=True)
            assert int(ours.skips or 0) == int(theirs.skips or 0) and int(ours.zeroed or 0) == int(theirs.zeroed or 0)
        cut, alone = pair(mesh, placements)
        set_gradients(cut, alone, mesh, placements, 0)
        if dist.get_rank() == where:
            local(cut["p1"].grad)[0] = value
        texts = raised(partial(fastclip.clip_norm_, list(cut.values()), 1.0, error_if_nonfinite=True))
        assert all("cannot be clipped" in text for text in texts), texts


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_on_one_rank(value):
    worlds.run(2, _nonfinite, value)


def _infinite_norms():
    mesh = mesh_of((2,), ("dp",))
    p = sharded(whole((4,), 0), mesh, [Shard(0)], whole((4,), 1))
    local(p.grad)[0] = math.nan if dist.get_rank() == 1 else 1.0
    assert fastclip.total_norm([p.grad], math.inf).isnan()
    assert fastclip.clip_tensor_norm_([p], 1.0, math.inf).isnan().all()
    assert not fastclip.mask_small_([p], 100.0).any()  # a NaN is left alone


def test_a_nan_reaches_all_ranks_through_a_maximum():
    worlds.run(2, _infinite_norms)


# ---- 14: skips ----


def _skips():
    mesh = mesh_of((2,), ("dp",))
    rank = dist.get_rank()
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    cut, alone = pair(mesh, placements)
    set_gradients(cut, alone, mesh, placements, 0)
    clipper = fastclip.Clipper(cut.values(), 0.5)
    optimizer = torch.optim.SGD(cut.values(), lr=0.1)
    before = [local(p.detach()).clone() for p in cut.values()]
    stats = clipper.step(optimizer, when=torch.tensor(rank == 0))  # False on one rank only
    assert stats.skipped and all(torch.equal(local(p.detach()), b) for p, b in zip(cut.values(), before))
    stats = clipper.step(optimizer, when=torch.tensor(True))
    assert not stats.skipped and not torch.equal(local(cut["p0"].detach()), before[0])


def _scaler(unscaled):
    mesh = mesh_of((2,), ("dp",))
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    for broken in (False, True):
        cut, alone = pair(mesh, placements)
        optimizer = torch.optim.AdamW(cut.values(), lr=0.1, fused=True)
        other = torch.optim.AdamW(alone.values(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        set_gradients(cut, alone, mesh, placements, 0)
        for p in cut.values():
            local(p.grad).mul_(8.0)
        if broken and dist.get_rank() == 1:
            local(cut["p1"].grad)[0] = math.inf
        if unscaled:
            scaler.unscale_(optimizer)
        stats = fastclip.Clipper(cut.values(), 0.5).step(optimizer, scaler)
        scaler.update()
        same_bits(torch.tensor(scaler.get_scale()))
        assert bool(stats.skipped) == broken and scaler.get_scale() == (4.0 if broken else 8.0)
        if not broken:
            fastclip.Clipper(alone.values(), 0.5).step(other)
        assert_same(cut, alone, mesh, placements, "parameters")


@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(unscaled):
    worlds.run(2, _scaler, unscaled)


def test_a_when_that_differs_by_rank_skips_all():
    worlds.run(2, _skips)


# ---- statistics ----


def _statistics():
    mesh = mesh_of((2,), ("dp",))
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    cut, alone = pair(mesh, placements)
    set_gradients(cut, alone, mesh, placements, 0)
    stats = fastclip.Clipper(cut.items(), 0.5).clip_()
    for name in ("tensor_norms", "tensor_absmax", "nonfinite"):
        with pytest.raises(RuntimeError, match="tensor_stats=True"):
            getattr(stats, name)
    with pytest.raises(RuntimeError, match="tensor_stats=True"):
        stats.log(tensors=True)
    assert stats.clipped and stats.log()["nonfinite"] == 0

    set_gradients(cut, alone, mesh, placements, 0)
    stats = fastclip.Clipper(cut.items(), 0.5, tensor_stats=True).clip_()
    expected = fastclip.Clipper(alone.items(), 0.5).clip_()
    if dist.get_rank() == 0:  # reading never communicates
        for name in ("tensor_norms", "tensor_absmax", "nonfinite", "total_norm", "coef", "clipped", "limit"):
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.log(tensors=True), expected.log(tensors=True), rtol=1e-12, atol=0)


def test_statistics():
    worlds.run(2, _statistics)


def _monitor(path):
    from fastclip.monitor import GradMonitor

    mesh = mesh_of((2,), ("dp",))
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    cut, alone = pair(mesh, placements)
    clipper = fastclip.Clipper(cut.items(), 0.5, tensor_stats=True)
    with GradMonitor(path=path) as monitor:
        for step in range(6):
            set_gradients(cut, alone, mesh, placements, step)
            monitor.update(clipper.clip_())
    return monitor.history.rows


def test_the_monitor_has_global_numbers(tmp_path):
    """Written by rank 0 alone."""
    import json

    path = tmp_path / "grads.jsonl"
    rows = worlds.run(2, _monitor, str(path))
    assert rows[0] == ["p0", "p1", "p2", "p3"]
    steps = [line for line in map(json.loads, path.read_text().splitlines()) if "total_norm" in line]
    for line in steps:
        exact = models.norm_of([gradient(line["step"], i) for i in range(len(SHAPES))], 2.0)
        assert math.isclose(line["total_norm"], exact, rel_tol=1e-6)
    assert len(steps) == 6


# ---- the functions ----


def _functions():
    mesh = mesh_of((2,), ("dp",))
    placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]
    for call in (
        lambda ps: fastclip.clip_value_(ps, 0.3),
        lambda ps: fastclip.clip_with_norm_(ps, 0.5, torch.tensor(2.0)),
        lambda ps: fastclip.clip_tensor_norm_(ps, 0.5),
        lambda ps: fastclip.clip_tensor_norm_(ps, 0.5, math.inf),
        lambda ps: fastclip.mask_small_(ps, 1.5),
        lambda ps: fastclip.clip_norm_([{"params": ps}], 0.5),
        lambda ps: fastclip.clip_norm_(iter(ps), 0.5),
        lambda ps: fastclip.clip_norm_([*ps[:2], {"params": ps[2:]}], 0.5),
    ):
        cut, alone = pair(mesh, placements)
        set_gradients(cut, alone, mesh, placements, 0)
        ours, theirs = call(list(cut.values())), call(list(alone.values()))
        assert_same(cut, alone, mesh, placements)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_functions():
    worlds.run(2, _functions)


def test_messages_go_where_the_group_can_take_them(monkeypatch):
    """Gradients on the CPU whose group is NCCL's: the message is sent from the GPU."""
    from types import SimpleNamespace

    from fastclip.distributed.groups import device_for

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    nccl = SimpleNamespace(_device_types=[torch.device("cuda")])
    both = SimpleNamespace(_device_types=[torch.device("cpu"), torch.device("cuda")])
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert device_for([nccl], cpu) == torch.device("cuda", 3) and device_for([both, nccl], cuda) == cuda
    assert device_for([both], cpu) == cpu and device_for([], cpu) == cpu
