"""Buckets: which parameters are handed over, when, and what happens if something goes wrong on the way."""

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from fastclip.gradients.buckets import Buckets


def parameters(*sizes):
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def backward(ps):
    """A backward pass that completes the gradients of `ps` one after the other, from the last to the first."""
    total = torch.zeros(())
    for p in ps:
        total = total * 1 + p.sum()
    total.backward()


def collected(bucket_bytes, ps, **kwargs):
    batches = []
    buckets = Buckets(lambda batch: batches.append(list(batch)), bucket_bytes, **kwargs)
    buckets.watch(ps)
    return buckets, batches


def ids(batches):
    return [[id(p) for p in batch] for batch in batches]


def test_full_buckets_are_handed_over_in_the_order_of_arrival():
    ps = parameters(10, 10, 10, 10, 10)
    buckets, batches = collected(80, ps)
    backward(ps)
    assert ids(batches) == ids([[ps[4], ps[3]], [ps[2], ps[1]]])
    assert len(buckets) == 1 and all(p.grad is not None for p in ps)
    buckets.flush()
    assert ids(batches[2:]) == ids([[ps[0]]])
    buckets.flush()
    assert len(batches) == 3


def test_a_gradient_that_comes_again_while_it_waits_is_handed_over_once():
    ps = parameters(4, 4)
    again = []
    buckets, batches = collected(10**6, ps, again=again.append)
    backward(ps)
    backward(ps[:1])
    assert ids([again]) == ids([[ps[0]]])
    buckets.flush()
    assert ids(batches) == ids([[ps[1], ps[0]]])
    backward(ps[:1])
    assert len(again) == 2
    buckets.clear()
    assert len(buckets) == 0
    backward(ps[:1])
    assert len(again) == 2 and len(buckets) == 1


def test_what_comes_while_paused_is_left_alone():
    ps = parameters(4, 4)
    again = []
    buckets, batches = collected(1, ps, again=again.append)
    buckets.paused = True
    backward(ps)
    assert len(buckets) == 0 and not batches
    buckets.paused = False
    backward(ps)
    assert ids(batches) == ids([[ps[1]], [ps[0]]]) and not again


def test_parameters_come_go_and_are_thawed():
    ps = parameters(1, 1, 1)
    ps[1].requires_grad_(False)
    buckets, batches = collected(1, ps[:2])
    backward([ps[0], ps[2]])
    assert ids(batches) == ids([[ps[0]]])
    ps[1].requires_grad_(True)
    buckets.watch(ps[:2])
    backward(ps)
    assert ids(batches[1:]) == ids([[ps[1]], [ps[0]]])
    buckets.watch(ps[1:])
    backward(ps)
    assert ids(batches[3:]) == ids([[ps[2]], [ps[1]]])
    buckets.watch([ps[1], ps[1], (ps[0] * 1)])  # tied, and one that is computed
    backward(ps)
    assert ids(batches[5:]) == ids([[ps[1]]])
    buckets.remove()
    backward(ps)
    assert len(batches) == 6 and not any(p._post_accumulate_grad_hooks for p in ps)


def test_watching_the_same_parameters_again_registers_nothing():
    ps = parameters(1, 1)
    buckets, batches = collected(1, ps)
    for _ in range(3):
        buckets.watch(list(ps))
    assert [len(p._post_accumulate_grad_hooks) for p in ps] == [1, 1]
    backward(ps)
    assert len(batches) == 2


def test_tensors_that_are_swapped_keep_their_hooks():
    """As conversions of modules may do it: autograd has the hooks with what is swapped."""
    ps = parameters(1, 2)
    buckets, batches = collected(1, ps)
    for _ in range(2):
        torch.utils.swap_tensors(ps[0], nn.Parameter(torch.ones(1, dtype=torch.float64)))
        buckets.watch(ps)
        batches.clear()
        backward(ps)
        assert ids(batches) == ids([[ps[1]], [ps[0]]])
        buckets.clear()
        for p in ps:
            p.grad = None
    assert [len(p._post_accumulate_grad_hooks) for p in ps] == [1, 1]


class Owner:
    def __init__(self, ps, fails=()):
        self.ps, self.taken, self.fails = ps, [], list(fails)
        self.buckets = Buckets(self.ready, 1 << 20, again=self.again)
        self.buckets.watch(ps)

    def ready(self, batch):
        if self.fails:
            del batch[: self.fails.pop(0)]  # these were dealt with
            raise KeyError("ready")
        self.taken += map(id, batch)

    def again(self, parameter):
        raise KeyError("again")


def test_an_owner_that_is_dropped_is_freed_and_does_nothing():
    ps = parameters(3)
    owner = Owner(ps)
    backward(ps)
    known = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert known() is None  # by its count of references, without a collection
    finally:
        gc.enable()
    assert not ps[0]._post_accumulate_grad_hooks
    backward(ps)


def test_what_ready_leaves_when_it_raises_is_handed_over_again():
    ps = parameters(1, 2, 3)
    owner = Owner(ps, fails=[1, 0])
    backward(ps)
    with pytest.raises(KeyError, match="ready"):
        owner.buckets.flush()
    with pytest.raises(KeyError, match="ready"):
        owner.buckets.flush()
    with pytest.raises(KeyError, match="again"):
        backward(ps[:1])
    owner.buckets.flush()
    assert owner.taken == [id(ps[1]), id(ps[0])]


def test_an_error_goes_through_backward():
    ps = parameters(4, 4)
    owner = Owner(ps, fails=[0])
    owner.buckets.bucket_bytes = 32
    with pytest.raises(KeyError, match="ready"):
        backward(ps)
    assert len(owner.buckets) == 2
    owner.buckets.flush()
    assert owner.taken == [id(ps[1]), id(ps[0])]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_have_no_hooks_until_they_are_used(copied):
    ps = parameters(2, 2)
    owner = Owner(ps)
    p = copied(ps[0])
    assert not p._post_accumulate_grad_hooks and torch.equal(p, ps[0])
    other = copied(owner)
    assert not any(q._post_accumulate_grad_hooks for q in other.ps) and len(other.buckets) == 0
    backward(other.ps)
    other.buckets.flush()
    assert not other.taken
    other.buckets.watch(other.ps)
    backward(other.ps)
    other.buckets.flush()
    assert sorted(other.taken) == sorted(map(id, other.ps)) and not owner.taken
    backward(ps)
    owner.buckets.flush()
    assert sorted(owner.taken) == sorted(map(id, ps))


def test_threads():
    """Autograd has one for each device: no gradient is lost or handed over twice, and never two buckets at once."""
    shares = [parameters(*[1] * 50) for _ in range(4)]
    taken, busy = [], []

    def ready(batch):
        busy.append(1)
        assert len(busy) == 1
        time.sleep(1e-4)
        taken.extend(map(id, batch))
        busy.pop()

    buckets = Buckets(ready, 12)
    buckets.watch([p for share in shares for p in share])
    hooks = [[(p, *p._post_accumulate_grad_hooks.values()) for p in share] for share in shares]
    threads = [threading.Thread(target=lambda one=one: [hook(p) for p, hook in one]) for one in hooks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    buckets.flush()
    assert sorted(taken) == sorted(id(p) for share in shares for p in share)


class Stream:
    """Of a GPU, as far as Buckets look at it."""

    device_index = 0

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class OnGPU:
    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, name, log):
        self.name, self.log, self.grad = name, log, self

    def record_stream(self, stream):
        self.log.append(f"{self.name} is kept for {stream.name}")


def test_streams_are_waited_for_and_memory_is_kept_for_them(monkeypatch):
    """What came on other streams, and what earlier buckets did on theirs."""
    log = []
    main, side = Stream("main", log), Stream("side", log)
    now = [main]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    ps = parameters(1, 1, 1)
    buckets = Buckets(lambda batch: log.append(f"ready {' '.join(p.name for p in batch)}"), 1 << 20)
    buckets.watch(ps)
    hooks = [*[hook for p in ps for hook in p._post_accumulate_grad_hooks.values()]]
    a, b, c = (OnGPU(name, log) for name in "abc")
    hooks[0](a)
    buckets.flush()
    assert log == ["ready a"]
    now[0] = side
    hooks[1](b)
    now[0] = main
    hooks[2](c)
    buckets.flush()
    assert log[1:] == ["main waits for side", "b is kept for main", "c is kept for main", "ready b c"]
    now[0] = side
    hooks[0](a)
    buckets.flush()
    assert log[5:] == ["side waits for main", "a is kept for side", "ready a"]
    now[0] = main
    buckets.flush()
    assert log[8:] == ["main waits for side"]
