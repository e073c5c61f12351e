"""Steps inside backward over ranks: FSDP2's gradients come once they are reduced, those of DDP and FSDP1 before."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import worlds
from models import local, mesh_of, raised, same_bits, whole
from torch.distributed.tensor import Replicate, distribute_tensor

import fastclip
from fastclip import rules
from fastclip.optim import SGD, AdamW

pytestmark = pytest.mark.slow

RULES = {
    "none": None,
    "TensorNorm": rules.TensorNorm(0.02),
    "TensorNorm inf": rules.TensorNorm(0.01, norm_type=float("inf")),
    "BlockRMS": rules.BlockRMS(0.003),
    "AdaGC": rules.AdaGC(lambda_rel=0.9, warmup=0),
    "AGC": rules.AGC(0.01, exclude=["*.bias"]),
    "Mask": rules.Mask(0.02),
    "Mask freeze": [rules.Mask(0.02, freeze=True), rules.TensorNorm(0.05)],
    "Value": rules.Value(0.01),
    "Only": [rules.Only(rules.TensorNorm(0.02), "*.weight"), rules.Except(rules.BlockRMS(0.01), "*.weight")],
}
OPTIMIZERS = {
    "AdamW": lambda ps, **kw: AdamW(ps, lr=0.01, **kw),
    "SGD": lambda ps, **kw: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01, **kw),
}


def network():
    torch.manual_seed(3)
    layers = [torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)]
    return torch.nn.Sequential(*layers).double()


def sharded(mesh=None, tensor_parallel=None):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = network()
    mesh = mesh or mesh_of((dist.get_world_size(),), ("dp",))
    if tensor_parallel:
        for layer in (model[0], model[2]):  # and the last one not
            parallelize_module(layer, tensor_parallel, ColwiseParallel(output_layouts=Replicate()))
    for layer in (*model[::2], model):
        fully_shard(layer, mesh=mesh)
    return model


def loss_of(model, step, parts=1):
    """Of the same data on every rank, in equal parts."""
    return [model(x).square().mean() for x in whole((8, 5), step, torch.float64).chunk(parts)]


def assert_same(model, alone):
    for p, q in zip(model.parameters(), alone.parameters()):
        expected = distribute_tensor(q.detach(), p.device_mesh, p.placements, src_data_rank=None)
        torch.testing.assert_close(local(p.detach()), local(expected), rtol=1e-10, atol=1e-12)


def _equal_to_clip_then_step():
    for name, rule in RULES.items():
        for make in OPTIMIZERS.values():
            model, alone = sharded(), network()
            ours = make(model.named_parameters(), max_norm=copy.deepcopy(rule), step_in_backward=True, bucket_bytes=150)
            theirs = make(alone.named_parameters(), max_norm=copy.deepcopy(rule))
            for step in range(3):
                (loss,) = loss_of(model, step)
                loss.backward()
                assert sum(p.grad is not None for p in model.parameters()) <= 2, name
                ours.step()
                theirs.zero_grad()
                loss_of(alone, step)[0].backward()
                theirs.step()
                assert all(p.grad is None for p in model.parameters())
                assert_same(model, alone)
                if rule is not None:
                    same_bits(ours.stats.total_norm)
                    torch.testing.assert_close(ours.stats.total_norm, theirs.stats.total_norm, rtol=1e-9, atol=0)
                    torch.testing.assert_close(ours.stats.coef, theirs.stats.coef.expand(6), rtol=1e-9, atol=0)
                    assert ours.stats.names == theirs.stats.names
                if name in ("TensorNorm", "BlockRMS", "Only"):
                    expected = theirs.stats.tensor_norms
                    torch.testing.assert_close(ours.stats.tensor_norms, expected, rtol=1e-9, atol=0)


def test_fsdp2_as_clip_then_step_in_one_process():
    worlds.run(2, _equal_to_clip_then_step)


def _two_dimensions(of):
    mesh = mesh_of((2, 2), ("outer", "inner"))
    for name in ("none", "TensorNorm", "TensorNorm inf", "BlockRMS", "Value"):
        model = sharded(mesh) if of == "replicas" else sharded(mesh["outer"], mesh["inner"])
        alone = network()
        ours = AdamW(model.parameters(), max_norm=RULES[name], step_in_backward=True, bucket_bytes=75)
        theirs = AdamW(alone.parameters(), max_norm=RULES[name])
        for step in range(3):
            loss_of(model, step)[0].backward()
            assert sum(p.grad is not None for p in model.parameters()) <= 2, name
            ours.step()
            theirs.zero_grad()
            loss_of(alone, step)[0].backward()
            theirs.step()
            assert_same(model, alone)
            if RULES[name] is not None:
                same_bits(ours.stats.total_norm)
                torch.testing.assert_close(ours.stats.total_norm, theirs.stats.total_norm, rtol=1e-9, atol=0)


@pytest.mark.parametrize("of", ["replicas", "tensors"])
def test_hsdp_and_tensor_parallelism_as_clip_then_step_in_one_process(of):
    worlds.run(4, _two_dimensions, of)


def _accumulated():
    """Three micro-batches, of which the last steps; a NaN that is zeroed, and one for which a parameter is skipped."""
    for nonfinite in ("zero", "skip"):
        model, alone = sharded(), network()
        rule = rules.TensorNorm(0.02)
        ours = AdamW(model.parameters(), max_norm=rule, nonfinite=nonfinite, step_in_backward=True, bucket_bytes=100)
        theirs = AdamW(alone.parameters(), max_norm=rule, nonfinite="zero")
        for step in range(3):
            for i, loss in enumerate(loss_of(model, step, 3)):
                with ours.accumulate(i < 2):
                    loss.backward()
            assert not any(p.grad is not None for p in list(model.parameters())[2:])
            ours.step()
            theirs.zero_grad()
            sum(loss_of(alone, step, 3)).backward()
            theirs.step()
            assert_same(model, alone)
        before = [p.detach().clone() for p in alone.parameters()]
        with ours.accumulate():
            loss_of(model, 5)[0].backward()
        if dist.get_rank() == 1:  # in one part of one gradient
            local(model[2].weight.grad)[0] = float("nan")
        ours.step()
        theirs.zero_grad()
        loss_of(alone, 5)[0].backward()
        rows = -(-9 // 2)
        alone[2].weight.grad[rows] = float("nan")
        theirs.step()
        if nonfinite == "skip":
            alone[2].weight.data.copy_(before[2])
            assert ours.stats.nonfinite.tolist() == [i == 2 for i in range(6)] and not ours.stats.skipped
            assert ours.stats.coef[2] == 1
        else:
            assert ours.stats.zeroed_count() == 7
        assert_same(model, alone)


def test_accumulation_and_what_is_not_finite():
    worlds.run(2, _accumulated)


def _refused():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    kwargs = {"step_in_backward": True, "max_norm": rules.TensorNorm(1.0)}
    model = DistributedDataParallel(network())
    texts = raised(partial(AdamW, model.parameters(), **kwargs))
    assert all("DistributedDataParallel sums the gradients" in text for text in texts)
    del model
    plain = network()
    optimizer = AdamW(plain.parameters(), bucket_bytes=1, **kwargs)
    later = DistributedDataParallel(plain)  # wrapped only now
    before = [p.detach().clone() for p in plain.parameters()]
    texts = raised(loss_of(later, 0)[0].backward)
    assert all("DistributedDataParallel sums the gradients" in text for text in texts)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), before))
    del optimizer, later, plain

    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    texts = raised(lambda: SGD(flat.parameters(), step_in_backward=True))
    assert all("FSDP1" in text for text in texts)

    cut, beside = sharded(), torch.nn.Parameter(torch.ones(2))
    texts = raised(lambda: AdamW([beside, *cut.parameters()], **kwargs))
    assert all("a plain tensor beside DTensors" in text for text in texts)

    fastclip.distributed.mark_sharded([beside], dist.group.WORLD)
    texts = raised(lambda: AdamW([beside], **kwargs))
    assert all("declared by mark_sharded" in text for text in texts)
    texts = raised(lambda: AdamW(network().parameters(), process_group=dist.group.WORLD, **kwargs))
    assert all("process_group must be left out" in text for text in texts)


def test_gradients_that_are_not_reduced_yet_are_refused():
    worlds.run(2, _refused)


def _save_and_load(path):
    """A checkpoint of one way is one of the other."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def train(model, optimizer, steps):
        for step in steps:
            loss_of(model, step)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(in_backward):
        model = sharded()
        rule = rules.AdaGC(lambda_rel=0.9, warmup=0)
        return model, AdamW(model.parameters(), max_norm=rule, step_in_backward=in_backward, bucket_bytes=150)

    def states(model, optimizer):
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))

    for first in (True, False):
        model, optimizer = make(first)
        train(model, optimizer, range(3))
        dcp.save(states(model, optimizer), checkpoint_id=f"{path}/{first}")
        train(model, optimizer, range(3, 5))
        other, another = make(not first)
        loaded = states(other, another)
        assert all(p.grad is None for p in other.parameters()) and not another.clipper.steps
        dcp.load(loaded, checkpoint_id=f"{path}/{first}")
        set_state_dict(other, another, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        train(other, another, range(3, 5))
        for p, q in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(local(p.detach()), local(q.detach()), rtol=1e-12, atol=0)


def test_checkpoints_of_ranks_are_the_same_with_and_without(tmp_path):
    worlds.run(2, _save_and_load, str(tmp_path))
