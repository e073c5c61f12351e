"""Steps inside backward with DistributedDataParallel: once its communication hook has averaged a bucket."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
import worlds
from models import raised, same_bits, whole
from test_ranks_backward import OPTIMIZERS, RULES, network
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastclip import rules
from fastclip.optim import SGD, AdamW

pytestmark = pytest.mark.slow

SMALL = 1e-4  # MiB: buckets of one or two parameters
WAYS = [
    {"bucket_cap_mb": SMALL},
    {"bucket_cap_mb": SMALL, "gradient_as_bucket_view": True},
    {"gradient_as_bucket_view": True, "static_graph": True},
]


def loss_of(model, step, part=None):
    """Of this rank's rows of what the other model is given whole."""
    rows = whole((8, 5), step, torch.float64)
    if part is None:
        return model(rows).square().mean()
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
    return model(mine[part]).square().mean() * len(mine[part]) / len(mine)


ALL = slice(None)


def assert_same(model, alone):
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def _equal_to_clip_then_step():
    for number, (name, rule) in enumerate(RULES.items()):
        for make in OPTIMIZERS.values():
            options = WAYS[number % len(WAYS)]
            model, alone = DistributedDataParallel(network(), **options), network()
            named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
            ours = make(named, max_norm=copy.deepcopy(rule), step_in_backward=model)
            theirs = make(alone.named_parameters(), max_norm=copy.deepcopy(rule))
            for step in range(4):
                loss_of(model, step, ALL).backward()
                assert all(p.grad is None for p in model.parameters()), name  # stepped and freed
                ours.step()
                theirs.zero_grad()
                loss_of(alone, step).backward()
                theirs.step()
                assert_same(model, alone)
                if rule is not None:
                    same_bits(ours.stats.total_norm)
                    torch.testing.assert_close(ours.stats.total_norm, theirs.stats.total_norm, rtol=1e-9, atol=0)
                    torch.testing.assert_close(ours.stats.coef, theirs.stats.coef.expand(6), rtol=1e-9, atol=0)
                    torch.testing.assert_close(ours.stats.tensor_norms, theirs.stats.tensor_norms, rtol=1e-9, atol=0)
                    assert ours.stats.names == theirs.stats.names


def test_as_clip_then_step_in_one_process():
    worlds.run(2, _equal_to_clip_then_step)


class Checkpointed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def _accumulated():
    """Micro-batches, of which the last steps; a NaN on one rank; activations that are computed again."""
    model, alone = DistributedDataParallel(Checkpointed(), bucket_cap_mb=SMALL), network()
    ours = AdamW(model.parameters(), max_norm=rules.TensorNorm(0.02), nonfinite="skip", step_in_backward=model)
    theirs = AdamW(alone.parameters(), max_norm=rules.TensorNorm(0.02))
    for step in range(3):
        for part, more in [(slice(0, 2), True), (slice(2, 3), True), (slice(3, 4), False)]:
            with ours.accumulate(more):
                loss_of(model, step, part).backward()
            assert all((p.grad is not None) == more for p in model.parameters())
        ours.step()
        theirs.zero_grad()
        loss_of(alone, step).backward()
        theirs.step()
        assert_same(model, alone)
    hook = model.module.body[2].weight.register_hook(lambda g: g * float("nan") if dist.get_rank() else g)
    loss_of(model, 3, ALL).backward()
    hook.remove()
    ours.step()
    assert ours.stats.nonfinite.tolist() == [i == 2 for i in range(6)] and not ours.stats.skipped
    before = alone[2].weight.clone()
    theirs.zero_grad()
    loss_of(alone, 3).backward()
    theirs.step()
    alone[2].weight.data.copy_(before)
    assert_same(model, alone)


def test_accumulation_and_what_is_not_finite():
    worlds.run(2, _accumulated)


def _in_part():
    """The optimizer has some of the parameters; another one, which steps after backward, has the others."""
    for options in WAYS[:2]:
        model, alone = DistributedDataParallel(network(), **options), network()
        pairs = []
        for net, in_backward in ((model.module, model), (alone, False)):
            first = AdamW(net[0].parameters(), max_norm=rules.TensorNorm(0.02), step_in_backward=in_backward)
            rest = [p for layer in (net[2], net[4]) for p in layer.parameters()]
            pairs.append((first, SGD(rest, lr=0.1, max_norm=0.05)))
        for step in range(3):
            for optimizers, loss in zip(pairs, (loss_of(model, step, ALL), loss_of(alone, step))):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            assert_same(model, alone)
    # An optimizer that is gone leaves averaged gradients, as if it had never been.
    del first, optimizer, optimizers, pairs
    gc.collect()
    model.zero_grad()
    loss_of(model, 7, ALL).backward()
    alone.zero_grad()
    loss_of(alone, 7).backward()
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_an_optimizer_of_some_of_the_parameters():
    worlds.run(2, _in_part)


class Odd(torch.nn.Module):
    """Parameters whose memory is not in the order of their dimensions, one that is frozen, and one outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.turned = torch.nn.Parameter(torch.randn(5, 4).t())
        self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)
        self.double()

    def forward(self, x):
        return self.conv(x.unflatten(1, (3, 4, 4))).mean((2, 3)) @ self.turned + self.frozen


def _of_every_layout():
    for options in WAYS[:2]:
        model, alone = DistributedDataParallel(Odd(), **options), Odd()
        outside, beside = (torch.nn.Linear(48, 48).double() for _ in range(2))
        beside.load_state_dict(outside.state_dict())
        rule = {"max_norm": rules.AdaGC(lambda_rel=0.9, warmup=0)}
        parameters = [*model.parameters(), *outside.parameters()]
        ours = SGD(parameters, lr=0.1, step_in_backward=torch.compile(model), bucket_bytes=1, **copy.deepcopy(rule))
        theirs = SGD([*alone.parameters(), *beside.parameters()], lr=0.1, **rule)
        for step in range(4):
            rows = whole((8, 48), step, torch.float64)
            for net, layer, optimizer in ((model, outside, ours), (alone, beside, theirs)):
                mine = rows.chunk(2)[dist.get_rank()] if net is model else rows
                loss = net(mine).square().mean() + layer(rows).square().mean()  # what is outside nobody averages
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert_same(model, alone)
            assert_same(outside, beside)
        for a, b in zip(ours.clipper.state_dict()["rules"], theirs.clipper.state_dict()["rules"]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_memory_of_every_layout_and_parameters_outside():
    worlds.run(2, _of_every_layout)


class Failing(rules.TensorNorm):
    fails = False

    def decide(self, stats, context):
        if self.fails:
            raise ValueError("told to")
        return super().decide(stats, context)


def _failures():
    """A rule that raises in one step, and parameters that leave the optimizer and come back."""
    for options in WAYS[:2]:
        model, alone = DistributedDataParallel(network(), **options), network()
        rule = Failing(0.02)
        ours = AdamW(model.parameters(), max_norm=rule, step_in_backward=model)
        theirs = AdamW(alone.parameters(), max_norm=rules.TensorNorm(0.02))

        def both_step(step, model=model, alone=alone, ours=ours, theirs=theirs):
            loss_of(model, step, ALL).backward()
            loss_of(alone, step).backward()
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
            assert_same(model, alone)

        both_step(0)
        rule.fails = True
        texts = raised(loss_of(model, 1, ALL).backward)
        assert all("told to" in text for text in texts)
        rule.fails = False
        assert_same(model, alone)  # nothing was stepped
        texts = raised(ours.step)
        assert all("was not used in backward" in text for text in texts)
        ours.zero_grad()
        ours.step()
        both_step(2)
        gone = [(o, o.param_groups[0]["params"].pop()) for o in (ours, theirs)]
        both_step(3)
        torch.testing.assert_close(*(p.grad for _, p in gone), rtol=1e-10, atol=1e-12)  # averaged, as without
        for optimizer, p in gone:
            p.grad = None
            optimizer.param_groups[0]["params"].append(p)
        both_step(4)


def test_a_step_that_fails_and_parameters_that_leave():
    worlds.run(2, _failures)


def _lives():
    """Uneven inputs; copies and checkpoints of the model; one that is dropped is freed."""
    results = []
    for inside in (False, True):
        model = DistributedDataParallel(network(), **WAYS[0])
        optimizer = AdamW(
            model.parameters(), max_norm=rules.TensorNorm(0.02), step_in_backward=model if inside else False
        )
        for epoch in range(2):
            with model.join():
                for step in range(3 if dist.get_rank() else 2):
                    loss_of(model, 10 * epoch + step, ALL).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        another = SGD(copied.parameters(), lr=0.1, step_in_backward=copied)
        loss_of(copied, 0, ALL).backward()
        assert all(p.grad is None for p in copied.parameters())
        another.step()
    torch.testing.assert_close(results[1], [p.detach() for p in model.parameters()], rtol=0, atol=0)

    alive, plain = weakref.ref(model), model.module
    del model, optimizer, copied, another
    gc.collect()
    assert alive() is None
    AdamW(plain.parameters(), step_in_backward=True)  # which nobody averages any more


def test_uneven_inputs_copies_and_the_end_of_a_model():
    worlds.run(2, _lives)


def _refused():
    kwargs = {"max_norm": rules.TensorNorm(1.0)}

    def wrapped(**options):
        return DistributedDataParallel(network(), bucket_cap_mb=SMALL, **options)

    def texts_of(model):
        return raised(lambda: AdamW(model.parameters(), step_in_backward=model, **kwargs))

    assert all("find_unused_parameters" in text for text in texts_of(wrapped(find_unused_parameters=True)))
    sparse = DistributedDataParallel(torch.nn.Embedding(3, 2, sparse=True))
    assert all("sparse gradients" in text for text in texts_of(sparse))
    model = wrapped()
    another = wrapped()
    texts = raised(lambda: AdamW([*model.parameters(), *another.parameters()], step_in_backward=model, **kwargs))
    assert all("step with those of this rank alone" in text for text in texts)
    held = AdamW(model.parameters(), step_in_backward=model, **kwargs)  # whose hook has not been taken by that
    assert all("has a communication hook already" in text for text in texts_of(model))
    texts = raised(lambda: AdamW(network().parameters(), step_in_backward=wrapped(), **kwargs))
    assert all("holds none of the parameters" in text for text in texts)
    ignoring = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["0.weight"])
    ignoring = DistributedDataParallel(ignoring)
    texts = raised(lambda: AdamW(ignoring.parameters(), step_in_backward=ignoring, **kwargs))
    assert all("step with those of this rank alone" in text for text in texts)
    with pytest.raises(TypeError, match=r"step_in_backward must be True, False or a Distributed.*, got Linear"):
        AdamW(model.parameters(), step_in_backward=torch.nn.Linear(1, 1))

    # Gradients of this rank alone, which nobody has averaged.
    before = [p.detach().clone() for p in model.parameters()]
    with model.no_sync():
        loss_of(model, 0, ALL).backward()
    texts = raised(held.step)
    assert all("was not used in backward" in text for text in texts)
    held.zero_grad()
    # A forward pass that does not know of accumulate().
    loss = loss_of(model, 0, ALL)
    with held.accumulate():
        texts = raised(loss.backward)
    assert all("and so must be around the forward pass too" in text for text in texts)
    assert all(map(torch.equal, model.parameters(), before))

    # A gradient that comes twice before step().
    model = wrapped()
    held = AdamW(model.named_parameters(), step_in_backward=model, **kwargs)
    loss_of(model, 0, ALL).backward()
    before = [p.detach().clone() for p in model.parameters()]
    texts = raised(loss_of(model, 1, ALL).backward)
    assert all("came twice before step()" in text and "module." in text for text in texts)
    assert all(map(torch.equal, model.parameters(), before))

    # A gradient that is not there, as if this rank did not use the parameter.
    model = wrapped(static_graph=True)
    held = SGD(model.parameters(), step_in_backward=model, **kwargs)
    loss_of(model, 2, ALL).backward()
    held.step()
    model.module[0].bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    texts = raised(loss_of(model, 2, ALL).backward)
    assert all("has no gradient on this rank" in text for text in texts)

    # A copy, which belongs to no DistributedDataParallel.
    copied = copy.deepcopy(held)
    copied.param_groups[0]["params"][0].grad = torch.zeros(7, 5, dtype=torch.float64)
    texts = raised(copied.step)
    assert all("is a copy of one with step_in_backward=model" in text for text in texts)


def test_what_cannot_be_done_is_refused_in_words():
    worlds.run(2, _refused)
