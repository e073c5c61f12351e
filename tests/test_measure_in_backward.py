"""Clipper(measure_in_backward=True): whatever happens to a gradient between its hook and the clip, no sum is stale."""

import copy
import gc
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from test_conformance import RULES
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip.gradients import in_backward
from fastclip.rules import Mask


@pytest.fixture(autouse=True)
def _everything_in_small_buckets(monkeypatch, one_thread):
    monkeypatch.setattr(in_backward, "SMALL", 0)
    monkeypatch.setattr(in_backward, "CPU_BYTES", 300)


@pytest.fixture
def hits(monkeypatch):
    """Counts the gradients whose sums were those of the hooks, and all."""
    counts = {"hits": 0, "all": 0}
    completed = in_backward.BackwardSums._completed
    read = in_backward.BackwardSums._read

    def counting(self, group, found):
        counts["all"] += len(group)
        counts["hits"] += len(group) if group.native is not None else 0
        return completed(self, group, found)

    def again(self, group, positions):
        counts["hits"] -= len(positions)
        return read(self, group, positions)

    monkeypatch.setattr(in_backward.BackwardSums, "_completed", counting)
    monkeypatch.setattr(in_backward.BackwardSums, "_read", again)
    return counts


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(6))
        self.unused = nn.Parameter(torch.ones(5))
        self.how = None  # None, or whether the checkpoint is reentrant

    def forward(self, x):
        x = torch.tanh(self.first(x)) * self.scale
        x = self.block(x) if self.how is None else checkpoint(self.block, x, use_reentrant=self.how)
        return self.last(self.block(x))

    def block(self, x):  # runs twice: under a checkpoint its gradients come twice
        return torch.tanh(self.third(torch.tanh(self.second(x))))


def powers(parameters):
    """Float64, of each gradient once, and the largest magnitudes."""
    gradients = {p.grad.data_ptr(): p.grad.detach().double() for p in parameters if p.grad is not None}
    return [g.square().sum() for g in gradients.values()], [g.abs().max() for g in gradients.values()]


def check(stats, expected, factor=1.0):
    sums, maxima = expected
    assert stats.count == len(sums)
    if sums:
        torch.testing.assert_close(stats.power, torch.stack(sums) * factor**2, rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.absmax, torch.stack(maxima) * abs(factor), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.norm, (torch.stack(sums).sum() * factor**2).sqrt(), rtol=1e-6, atol=0)


# ---- what may happen in backward, and after it ----


def once(net, x, rng):
    net(x).square().sum().backward()


def accumulated(net, x, rng):
    for part in x.split(2):
        net(part).square().sum().backward()


def retained(net, x, rng):
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def checkpointed(net, x, rng):
    net.how = rng.random() < 0.5
    net(x.requires_grad_()).square().sum().backward()
    net.how = None


def autocast(net, x, rng):
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().sum()
    loss.backward()


def only_some(net, x, rng):
    some = [p for p in net.parameters() if p.requires_grad and rng.random() < 0.5]
    if some:
        torch.autograd.backward(net(x).square().sum(), inputs=some)


def with_graph(net, x, rng):
    net(x).square().sum().backward(create_graph=True)


def without_hooks(net, x, rng):
    once(net, x, rng)
    wanted = [p for p in net.parameters() if p.requires_grad and p is not net.unused]
    if wanted:
        for p, g in zip(wanted, torch.autograd.grad(net(x).sum(), wanted)):
            p.grad = g if rng.random() < 0.5 else p.grad


def functional(net, x, rng):
    once(net, x, rng)
    if net.how is None:
        values = {name: p.detach() for name, p in net.named_parameters()}
        torch.func.grad(lambda v: torch.func.functional_call(net, v, (x,)).sum())(values)


BACKWARDS = [once, once, once, accumulated, retained, checkpointed, autocast, only_some, with_graph, without_hooks,
             functional]  # fmt: skip


def rebind(p, rng):
    for _ in range(rng.randint(1, 3)):
        p.grad.data = p.grad.data * 3  # the second may get the memory of the first


def again_in_the_same_memory(p, rng):
    values = p.grad.detach() * 2
    p.grad = None
    p.grad = torch.empty_like(values)
    p.grad.data.copy_(values)


def in_inference_mode(p, rng):
    with torch.inference_mode():
        p.grad.mul_(2)


CHANGES = [
    lambda p, rng: p.grad.mul_(3),
    lambda p, rng: p.grad.view(-1)[:1].add_(5),
    lambda p, rng: p.grad.detach().mul_(2),
    lambda p, rng: torch._foreach_mul_([p.grad], 2.0),
    lambda p, rng: p.grad.zero_(),
    lambda p, rng: p.grad.set_(torch.ones_like(p.grad)),
    lambda p, rng: setattr(p, "grad", p.grad.detach() * 2),
    lambda p, rng: setattr(p, "grad", torch.full_like(p, 0.5)),
    lambda p, rng: setattr(p, "grad", None),
    lambda p, rng: torch.nn.utils.clip_grad_norm_([p], 1e-3),
    lambda p, rng: fastclip.clip_norm_([p], 1e-3),
    lambda p, rng: setattr(p, "grad", p.grad.data.mul_(2).data),
    rebind,
    again_in_the_same_memory,
    in_inference_mode,
]


class Others:
    """Hooks of others, before or after the Clipper's, that change gradients, now and then."""

    def __init__(self, net, rng):
        self.rng, self.chance = rng, 0.0
        for p in net.parameters():
            if rng.random() < 0.5:
                p.register_post_accumulate_grad_hook(self)

    def __call__(self, p):
        if p.grad is not None and self.rng.random() < self.chance:
            with torch.no_grad():
                self.rng.choice(CHANGES)(p, self.rng)


def churn(steps, seed, rule):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net = Net()
    before = Others(net, rng)
    clipper = fastclip.Clipper(net.named_parameters(), rule, measure_in_backward=True)
    others = before, Others(net, rng)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    parameters = list(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    for _ in range(steps):
        for hook in others:
            hook.chance = 0.2 if rng.random() < 0.2 else 0.0
        if rng.random() < 0.8:
            optimizer.zero_grad(set_to_none=rng.random() < 0.7)
        if rng.random() < 0.1:
            p = rng.choice(parameters)
            p.requires_grad_(not p.requires_grad)
        x = torch.randn(4, 3)
        if any(p.requires_grad for p in net.last.parameters()):
            rng.choice(BACKWARDS)(net, x, rng)
        scaled = rng.random() < 0.2
        unscaled = scaled and rng.random() < 0.5
        if scaled:
            scaler.scale(torch.ones(()))
        with torch.no_grad():
            for _ in range(rng.randint(0, 2) if rng.random() < 0.5 else 0):
                p = rng.choice(parameters)
                if p.grad is not None:
                    rng.choice(CHANGES)(p, rng)
            scaled = scaled and any(p.grad is not None for p in parameters)
            if scaled and unscaled:
                scaler.unscale_(optimizer)
            if rng.random() < 0.05:  # two parameters change their gradients, or share one
                one, other = net.second.weight, net.third.weight
                one.grad, other.grad = other.grad, one.grad if rng.random() < 0.5 else other.grad
            if rng.random() < 0.05 and net.second.weight.grad is not None:
                net.third.weight.grad = net.second.weight.grad.data  # the same memory, with a version of its own
                net.third.weight.grad.mul_(2)
            if not scaled and rng.random() < 0.1:
                continue  # this step is not clipped
            expected = powers(parameters)
            if scaled:
                factor = 1.0 if unscaled else 1 / scaler.get_scale()
                check(clipper.step(optimizer, scaler), expected, factor)
                scaler.update()
            else:
                check(clipper.clip_(), expected)
                if rng.random() < 0.2:  # at once another time
                    expected = powers(parameters)
                    check(clipper.clip_(), expected)
        for p in parameters:
            if not p.isfinite().all():
                p.data.fill_(0.1)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("rule", [1e3, [Mask(1e-9), 1.0]], ids=["unclipped", "clipped"])
def test_no_sum_is_stale(rule, hits):
    churn(400, 0, rule)
    assert 0.4 * hits["all"] < hits["hits"] < 0.9 * hits["all"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("seed", range(4))
def test_no_sum_is_stale_in_10000_steps(seed, hits):
    churn(2500, seed + 1, 1.0)
    assert hits["hits"] > 0.4 * hits["all"]


def test_another_storage_at_the_same_address_is_another_gradient(monkeypatch):
    p, array = nn.Parameter(torch.ones(50)), np.zeros(50, dtype=np.float32)
    p.grad = torch.from_numpy(array)
    clipper = fastclip.Clipper([p], 1e9, measure_in_backward=True)
    monkeypatch.setattr(clipper._sums._buckets, "bucket_bytes", 1)
    (p * 3).sum().backward()
    (p * 3).sum().backward()
    assert len(clipper._sums) == 1
    gradient, address, version = p.grad, p.grad.data_ptr(), p.grad._version
    array *= 2
    p.grad.data = torch.from_numpy(array)
    assert p.grad is gradient and (p.grad.data_ptr(), p.grad._version) == (address, version)
    assert clipper.clip_().norm == 12 * 50**0.5


# ---- the same numbers, whatever decides and whatever measures ----


def small_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3))


def backward(net, step, scale=1.0):
    torch.manual_seed(100 + step)
    net.zero_grad()
    (scale * net(torch.randn(6, 4)).square().sum()).backward()


def same_gradients(net, twin, rtol=0.0):
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_decides_as_after_a_read(rule, hits):
    net, twin = small_net(), small_net()
    names = [(f"p{i}", p) for i, p in enumerate(net.parameters())]
    clipper = fastclip.Clipper(names, RULES[rule](), measure_in_backward=True)
    other = fastclip.Clipper([(f"p{i}", p) for i, p in enumerate(twin.parameters())], RULES[rule]())
    for step in range(6):
        backward(net, step, 1 + step)
        backward(twin, step, 1 + step)
        stats, expected = clipper.clip_(), other.clip_()
        assert torch.equal(stats.power, expected.power) and torch.equal(stats.absmax, expected.absmax)
        assert stats.total_norm == expected.total_norm and stats.names == expected.names
        same_gradients(net, twin, 2e-7)
    assert hits["hits"] >= 6 * 4  # all but those that waited for a bucket to be full


@pytest.mark.parametrize("norm_type", [0.0, 1.0, 2.0, 3.0, float("inf")])
def test_on_every_backend(backend, norm_type, hits):
    net, twin = small_net(), small_net()
    rule = fastclip.rules.GlobalNorm(0.1, norm_type)
    clipper = fastclip.Clipper(net.parameters(), rule, measure_in_backward=True)
    other = fastclip.Clipper(twin.parameters(), rule)
    backward(net, 0)
    backward(twin, 0)
    net[0].weight.grad.mul_(3)
    twin[0].weight.grad.mul_(3)
    torch.testing.assert_close(clipper.clip_().norm, other.clip_().norm, rtol=1e-6, atol=0)
    same_gradients(net, twin, 1e-6)
    assert 0 < hits["hits"] < hits["all"]


@pytest.mark.parametrize("policy", ["propagate", "skip", "zero", "raise"])
def test_elements_that_are_not_finite(policy):
    net, twin = small_net(), small_net()
    clippers = [
        fastclip.Clipper(n.named_parameters(), 0.1, nonfinite=policy, measure_in_backward=n is net) for n in (net, twin)
    ]
    for step in range(4):
        told = []
        for n, clipper in zip((net, twin), clippers):
            backward(n, step)
            if step == 1:
                n[2].weight.grad[0, 0] = float("inf")  # after the hook
            if step == 2:
                backward_with_nan(n)
            try:
                told.append(clipper.clip_().log())
            except RuntimeError as error:
                told.append(str(error))
        assert repr(told[0]) == repr(told[1])
        same_gradients(net, twin, 2e-7)


def backward_with_nan(net):
    """Of which the hooks hear."""
    net.zero_grad()
    net(torch.full((1, 4), float("nan"))).sum().backward()


@pytest.mark.parametrize("make", [
    lambda ps, **kw: fastclip.optim.AdamW(ps, lr=0.1, max_norm=0.3, **kw),
    lambda ps, **kw: fastclip.optim.SGD(ps, lr=0.1, momentum=0.9, max_norm=0.3, **kw),
])  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True, "unscaled"])
def test_optimizers_step_alike(make, scaled, hits):
    net, twin = small_net(), small_net()
    optimizers = make(net.parameters(), measure_in_backward=True), make(twin.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, enabled=bool(scaled)) for _ in range(2)]
    for step in range(5):
        for n, optimizer, scaler in zip((net, twin), optimizers, scalers):
            backward(n, step, float(scaler.scale(torch.ones(()))))
            if scaled == "unscaled":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(optimizers[0].stats.power, optimizers[1].stats.power)
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert (hits["hits"] == 0) == (scaled == "unscaled")
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()
    assert optimizers[0].param_groups[0].keys() == optimizers[1].param_groups[0].keys()


def test_a_scaler_of_a_class_that_comes_later_is_seen():
    net = small_net()
    clipper = fastclip.Clipper(net.parameters(), 1e9, measure_in_backward=True)

    class Scaler(torch.amp.GradScaler):
        def unscale_(self, optimizer):
            state = self._per_optimizer_states[id(optimizer)]
            found = torch.zeros(1)
            state["found_inf_per_device"] = self._unscale_grads_(optimizer, self._scale.reciprocal(), found, True)

    scaler, optimizer = Scaler("cpu", init_scale=8.0), torch.optim.SGD(net.parameters(), lr=0.1)
    backward(net, 0, scaler.scale(torch.ones(())))
    scaler.unscale_(optimizer)
    check(clipper.clip_(), powers(net.parameters()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, fastclip.optim.AdamW])
def test_gradients_that_a_fused_step_has_scaled_are_read_again(make):
    """torch's kernels write them back, and change no version."""
    net = small_net()
    clipper = fastclip.Clipper(net.parameters(), 1e9, measure_in_backward=True)
    backward(net, 0)
    optimizer = make(net.parameters(), lr=0.1, fused=True)
    with fastclip.use_backend("foreach"):  # on which fastclip.optim steps by torch's kernel
        fastclip.Clipper(net.parameters(), 1e-3).step(optimizer)
    check(clipper.clip_(), powers(net.parameters()))


def test_gradients_that_no_kernel_reads_are_read_afterwards():
    embedding, table = nn.Embedding(20, 8, sparse=True), nn.Parameter(torch.randn(4, 8, dtype=torch.complex64))
    line = nn.Parameter(torch.randn(40))
    clipper = fastclip.Clipper([embedding.weight, line, table], 1e9, measure_in_backward=True)
    loss = embedding(torch.tensor([3, 4, 3])).square().sum() + table.abs().square().sum() + (line[:20] * 3).sum()
    loss.backward()
    line.grad = torch.randn(80)[::2]  # with gaps
    expected = [embedding.weight.grad.to_dense().double(), line.grad.double(), table.grad.abs().double()]
    torch.testing.assert_close(
        clipper.clip_().power, torch.stack([g.square().sum() for g in expected]), rtol=1e-6, atol=0
    )


def test_several_dtypes(hits):
    ps = [nn.Parameter(torch.randn(n, dtype=dtype)) for n in (300, 7) for dtype in (torch.float32, torch.bfloat16)]
    ps.append(nn.Parameter(torch.randn(50, dtype=torch.float64)))
    clipper = fastclip.Clipper(ps, 1e9, measure_in_backward=True)
    for _ in range(2):
        for p in ps:
            p.grad = None
        sum(p.double().square().sum() for p in ps).backward()
        check(clipper.clip_(), powers(ps))
    assert hits["hits"] >= 6


# ---- hooks ----


def hooks_of(net):
    return [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()]


def test_the_hooks_go_with_the_clipper_and_keep_nothing_alive():
    net = small_net()
    clipper = fastclip.Clipper(net.parameters(), 1.0, measure_in_backward=True)
    optimizer = fastclip.optim.AdamW(net.parameters(), max_norm=1.0, measure_in_backward=True)
    assert hooks_of(net) == [2] * 6
    backward(net, 0)
    gone = weakref.ref(clipper), weakref.ref(net[0].weight.grad)
    net.zero_grad()
    assert gone[1]() is None
    del clipper
    gc.collect()
    assert gone[0]() is None and hooks_of(net) == [1] * 6
    del optimizer
    gc.collect()
    assert hooks_of(net) == [0] * 6
    backward(net, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_measure_their_own_parameters(duplicate, hits):
    net = small_net()
    pair = net, fastclip.optim.AdamW(net.parameters(), max_norm=0.1, measure_in_backward=True)
    backward(net, 0)
    twin, optimizer = duplicate(pair)
    for step in range(3):  # the first step makes the hooks
        backward(net, step)
        pair[1].step()
        backward(twin, step)
        before = hits["hits"]
        optimizer.step()
        assert (hits["hits"] > before) == (step > 0)
        assert torch.equal(optimizer.stats.power, pair[1].stats.power)
    assert hooks_of(net) == hooks_of(twin) == [1] * 6


def test_parameters_that_come_go_and_thaw(hits):
    net = small_net()
    net[0].requires_grad_(False)
    optimizer = fastclip.optim.SGD(net[:3].parameters(), lr=0.1, max_norm=0.1, measure_in_backward=True)
    assert hooks_of(net) == [0, 0, 1, 1, 0, 0]
    optimizer.add_param_group({"params": net[4].parameters()})
    for step, grads in enumerate([4, 4, 6, 6]):
        net[0].requires_grad_(step > 1)
        backward(net, step)
        expected = powers(net.parameters())
        optimizer.step()
        check(optimizer.stats, expected)
        assert optimizer.stats.count == grads
    assert hooks_of(net) == [1] * 6
    clipper = fastclip.Clipper(net.parameters(), 1.0, measure_in_backward=True)
    clipper.release_parameters()
    assert hooks_of(net) == [1] * 6


def test_parameters_that_were_released_are_not_kept_alive(monkeypatch):
    monkeypatch.setattr(in_backward, "CPU_BYTES", 1 << 20)  # so that they wait
    net = small_net()
    clipper = fastclip.Clipper(net.parameters(), 1.0, measure_in_backward=True)
    backward(net, 0)
    assert len(clipper._sums._buckets) == 6
    clipper.clip_()
    assert not len(clipper._sums._buckets)
    backward(net, 1)
    known = weakref.ref(net[0].weight)
    clipper.release_parameters()
    del net
    gc.collect()
    assert known() is None


def test_small_gradients_get_no_hook(monkeypatch):
    monkeypatch.setattr(in_backward, "SMALL", 1 << 17)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1 << 13))
    clipper = fastclip.Clipper(net.parameters(), 1e9, measure_in_backward=True)
    assert hooks_of(net) == [0, 0, 1, 0]
    net(torch.randn(3, 4)).square().sum().backward()
    check(clipper.clip_(), powers(net.parameters()))


def test_what_a_cuda_graph_writes_is_never_trusted(monkeypatch, hits):
    """Its replays call no hook and change no version."""
    net = small_net()
    clipper = fastclip.Clipper(net.parameters(), 1e9, measure_in_backward=True)
    with monkeypatch.context() as patch:
        patch.setattr(in_backward, "capturing", lambda device: True)
        backward(net, 0)
    assert not len(clipper._sums)
    for _ in range(2):
        backward(net, 1)
        for p in net.parameters():
            p.grad.data.mul_(2)  # as a replay does
        check(clipper.clip_(), powers(net.parameters()))


def test_without_max_norm_there_is_nothing_to_measure():
    for make in (fastclip.optim.AdamW, fastclip.optim.SGD):
        with pytest.raises(ValueError, match="measure_in_backward=True needs a max_norm"):
            make(small_net().parameters(), measure_in_backward=True)


def test_where_operations_are_watched_nothing_is_measured(hits):
    from torch.utils.flop_counter import FlopCounterMode

    net = small_net()
    clipper = fastclip.Clipper(net.parameters(), 1e9, measure_in_backward=True)
    with FlopCounterMode(display=False):
        backward(net, 0)
    assert not len(clipper._sums)
    check(clipper.clip_(), powers(net.parameters()))
    backward(net, 1)
    with torch.device("cpu"):
        net(torch.randn(6, 4)).sum().backward()
        check(clipper.clip_(), powers(net.parameters()))
    assert hits["hits"] > 0
