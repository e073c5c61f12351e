"""What goes wrong on one rank: all of them end the same way, and none writes anything."""

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import worlds
from models import local, mesh_of, on_mesh, plain, raised, sharded, whole
from torch.distributed.tensor import Shard

import fastclip

pytestmark = pytest.mark.slow


def _one_rank_refuses(first):
    """A gradient without memory on rank 1, in the first call or a later one."""
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    clippers = {
        "clip_norm_": partial(fastclip.clip_norm_, parameters, 0.5),
        "clip_tensor_norm_": partial(fastclip.clip_tensor_norm_, parameters, 0.5),
        "Clipper.clip_": fastclip.Clipper(parameters, 0.5).clip_,
        "Clipper.step": partial(fastclip.Clipper(parameters, 0.5).step, torch.optim.SGD(parameters, lr=0.1)),
        "AdamW.step": fastclip.optim.AdamW(parameters, max_norm=0.5).step,
    }
    for name, call in clippers.items():
        if not first:
            call()
        before = [local(p.grad).clone() for p in parameters]
        values = [local(p.detach()).clone() for p in parameters]
        storage = local(parameters[4].grad).untyped_storage()
        size = storage.nbytes()
        if dist.get_rank() == 1:
            storage.resize_(4)
        texts = raised(call)
        if dist.get_rank() == 1:
            storage.resize_(size)
            local(parameters[4].grad).copy_(before[4])
        assert all("parameters[4] has no memory" in text for text in texts), (name, texts)
        assert "rank 1: " in texts[0], (name, texts)
        assert all(torch.equal(local(p.grad), b) for p, b in zip(parameters, before))
        assert all(torch.equal(local(p.detach()), v) for p, v in zip(parameters, values))
        assert fastclip.total_norm([p.grad for p in parameters]) > 0  # and the ranks are still in step


@pytest.mark.parametrize("first", [True, False])
def test_a_refusal_of_one_rank_reaches_all(first):
    worlds.run(2, _one_rank_refuses, first)


def _different_calls():
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    rank = dist.get_rank()
    texts = raised(lambda: fastclip.clip_norm_(parameters, 1.0, 2.0 if rank else 1.0))
    assert all("the ranks do not make the same call" in text for text in texts), texts
    fewer = parameters if rank else parameters[:-1]
    texts = raised(lambda: fastclip.clip_norm_(fewer, 1.0))
    assert all("the ranks do not make the same call" in text for text in texts), texts


def test_ranks_that_do_not_make_the_same_call():
    worlds.run(2, _different_calls)


def _copies_that_differ():
    mesh = mesh_of((2,), ("dp",))
    copy = plain(whole((3,), 1), whole((3,), 2 + dist.get_rank()))
    parameters = [*on_mesh(mesh), copy]
    before = [local(p.grad).clone() for p in parameters]
    texts = raised(lambda: fastclip.clip_norm_(parameters, 0.1))
    assert all("parameters[7]: its gradient should be the same on all ranks" in text for text in texts), texts
    assert all(torch.equal(local(p.grad), b) for p, b in zip(parameters, before))


def test_copies_that_differ_are_named():
    worlds.run(2, _copies_that_differ)


def _arguments():
    mesh = mesh_of((2,), ("dp",))
    p = sharded(whole((4,), 0), mesh, [Shard(0)], whole((4,), 1))
    for call in (
        lambda: fastclip.clip_norm_([p], 1.0, process_group="pp"),
        lambda: fastclip.Clipper([p], 1.0, process_group=3),
        lambda: fastclip.clip_tensor_norm_([p], 1.0, process_group=[0, 1]),
        lambda: fastclip.distributed.mark_sharded([p], None),
    ):
        with pytest.raises(TypeError, match="process_group must be a ProcessGroup or a DeviceMesh, got"):
            call()
    with pytest.raises(TypeError, match=r"parameters\[0\] is a DTensor, whose placements say"):
        fastclip.distributed.mark_sharded([p], dist.group.WORLD)
    with pytest.raises(TypeError, match=r"parameters\[0\] must be a tensor"):
        fastclip.distributed.mark_shared([1], dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group needs a max_norm"):
        fastclip.optim.AdamW([p], process_group=dist.group.WORLD)


def test_arguments():
    worlds.run(2, _arguments)


def _killed(path):
    """Rank 1 dies before its third clip: rank 0 must end with torch's error, soon, and with no norm."""
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    for step in range(3):
        if step == 2 and dist.get_rank() == 1:
            os._exit(0)
        try:
            fastclip.clip_norm_(parameters, 1.0)
        except RuntimeError as error:
            with open(path, "w") as file:
                file.write(f"{step} {error}")
            os._exit(0)


def test_a_rank_that_is_killed(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match="ended with exit code 0"):
        worlds.run(2, _killed, str(tmp_path / "error"))
    assert time.monotonic() - start < worlds.TIMEOUT
    step, error = (tmp_path / "error").read_text().split(" ", 1)
    assert step == "2" and error
