"""Steps inside backward: the same as clip, then step, without ever holding all gradients."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from conftest import BACKENDS
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip import rules
from fastclip.optim import SGD, AdamW
from fastclip.optim import in_backward as module

pytestmark = pytest.mark.usefixtures("one_thread")


class Halve(rules.Rule):
    """One of a user's own, with a name for what it goes by."""

    norm_type = 2.0
    needs = rules.Needs.TENSOR_NORMS
    per_tensor = True

    def decide(self, stats, context):
        return torch.where(stats.norms > 0.1, 0.5, 1.0)


RULES = {
    "TensorNorm": rules.TensorNorm(0.05),
    "TensorNorm 1": rules.TensorNorm(0.2, norm_type=1.0),
    "TensorNorm inf": rules.TensorNorm(0.02, norm_type=math.inf),
    "BlockRMS": rules.BlockRMS(0.01),
    "AdaGC": rules.AdaGC(lambda_rel=0.8, beta=0.5, warmup=0),
    "AGC": rules.AGC(0.01, exclude=["4.*"]),
    "Mask": rules.Mask(0.02),
    "Mask freeze": [rules.Mask(0.02, freeze=True), rules.TensorNorm(0.05)],
    "Value": rules.Value(-0.01, 0.02),
    "Only": [rules.Only(rules.TensorNorm(0.02), "*.weight"), rules.Except(rules.AdaGC(warmup=0), "*.weight")],
    "a list": [rules.Value(0.05), rules.AGC(0.05), rules.BlockRMS(0.01)],
    "own": Halve(),
    "none": None,
}
OPTIMIZERS = {
    "AdamW": (AdamW, torch.optim.AdamW, {"lr": 1e-2}),
    "AMSGrad": (AdamW, torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "SGD": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "plain SGD": (SGD, torch.optim.SGD, {"lr": 0.05}),
}
BUCKET = 600  # bytes: a weight of the network, or several biases


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).to(dtype)


def data(step, dtype=torch.float64, rows=8):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def backward(model, step, dtype=torch.float64):
    model(data(step, dtype)).square().mean().backward()


def in_backward(model, make=AdamW, **kwargs):
    kwargs = {"max_norm": rules.TensorNorm(0.05), "bucket_bytes": BUCKET, **kwargs}
    return make(model.named_parameters(), step_in_backward=True, **kwargs)


def gradients_of(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def values_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model, other, exactly=False):
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, **({"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-9, "atol": 1e-12}))


CASES = [(rule, optimizer) for rule in RULES for optimizer in ("AdamW", "SGD")]
CASES += [(rule, optimizer) for rule in ("Mask freeze", "none") for optimizer in ("AMSGrad", "dampening", "plain SGD")]


@pytest.mark.parametrize(("rule", "optimizer"), CASES)
def test_as_clip_then_step_in_float64(rule, optimizer):
    """torch's optimizer after Clipper.clip_(), which is held to an oracle elsewhere."""
    ours, theirs, options = OPTIMIZERS[optimizer]
    freezes = rule == "Mask freeze"  # which torch's optimizer alone cannot
    model, other = network(), network()
    mine = in_backward(model, ours, max_norm=copy.deepcopy(RULES[rule]), **options)
    exact = theirs(other.parameters(), foreach=False, **options)
    clipper = fastclip.Clipper(other.named_parameters(), copy.deepcopy(RULES[rule]) or math.inf)
    clipped = 0
    for step in range(50 if optimizer in ("AdamW", "SGD") else 10):
        backward(model, step)
        assert len(gradients_of(model)) <= 2  # in a bucket that is not full
        mine.step()
        assert not gradients_of(model)
        exact.zero_grad()
        backward(other, step)
        expected = clipper.step(exact) if freezes else clipper.clip_()
        if not freezes:
            exact.step()
        assert_same(model, other)
        if rule == "none":
            assert mine.stats is None
            continue
        stats = mine.stats
        torch.testing.assert_close(stats.total_norm, expected.total_norm, rtol=1e-9, atol=0)
        torch.testing.assert_close(stats.tensor_norms, expected.tensor_norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(stats.tensor_absmax, expected.tensor_absmax, rtol=1e-9, atol=0)
        torch.testing.assert_close(stats.coef, expected.coef.expand(6), rtol=1e-9, atol=0)
        assert stats.clipped == expected.clipped and not stats.skipped and stats.step == step
        assert stats.names == expected.names and stats.log(tensors=True)["tensor_norms"].keys() == set(stats.names)
        clipped += int(stats.clipped)
    assert clipped > 0 or rule == "none"
    assert mine.clipper is None or mine.clipper.steps == step + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [AdamW, SGD])
def test_every_backend(backend, make):
    with fastclip.use_backend(backend):
        model, other = network(torch.float32), network(torch.float32)
        mine, reference = in_backward(model, make), make(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
        for step in range(2):
            backward(model, step, torch.float32)
            mine.step()
            reference.zero_grad()
            backward(other, step, torch.float32)
            reference.step()
        assert_same(model, other, exactly=True)
        assert torch.equal(mine.stats.total_norm, reference.stats.total_norm)


def test_a_bucket_of_everything_waits_for_step():
    model, other = network(), network()
    mine, reference = (
        in_backward(model, bucket_bytes=1 << 20),
        AdamW(other.parameters(), max_norm=rules.TensorNorm(0.05)),
    )
    before = values_of(model)
    backward(model, 0)
    assert len(gradients_of(model)) == 6 and all(map(torch.equal, before, model.parameters()))
    mine.step(zero_grad=True)
    backward(other, 0)
    reference.step()
    assert_same(model, other) and not gradients_of(model)


# ---- accumulation, and passes that are none ----


def test_accumulation():
    model, other = network(), network()
    mine, reference = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    for step in range(4):
        before = values_of(model)
        for part in range(3):
            with mine.accumulate(part < 2):
                backward(model, 10 * step + part)
                assert len(gradients_of(model)) == (6 if part < 2 else len(gradients_of(model)))
                assert part == 2 or all(map(torch.equal, before, model.parameters()))
        mine.step()
        mine.zero_grad()
        for part in range(3):
            backward(other, 10 * step + part)
        reference.step()
        reference.zero_grad()
        assert_same(model, other)
    with reference.accumulate():  # the same loop without step_in_backward
        backward(other, 0)


def test_all_passes_accumulated_are_stepped_in_step():
    model, other = network(), network()
    mine, reference = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    with mine.accumulate():
        backward(model, 0)
    with pytest.raises(RuntimeError, match="not within"), mine.accumulate():
        mine.step()
    mine.step()
    backward(other, 0)
    reference.step()
    assert_same(model, other)


def test_accumulating_too_late_is_an_error():
    model = network()
    mine = in_backward(model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="before the last backward pass"), mine.accumulate():
        pass
    mine.step()
    with mine.accumulate():
        backward(model, 1)


@pytest.mark.parametrize("bucket", [1, BUCKET, 1 << 20])
def test_a_gradient_that_comes_twice_is_an_error_before_it_is_used(bucket):
    model = network()
    mine = in_backward(model, bucket_bytes=bucket)
    backward(model, 0)
    after = values_of(model)
    with pytest.raises(RuntimeError, match=r"gradient of 4\.(bias|weight), .* came twice before step\(\)"):
        backward(model, 1)
    assert all(map(torch.equal, after, model.parameters()))
    if bucket == 1:
        with pytest.raises(RuntimeError, match="came twice"):
            mine.step()
        assert all(map(torch.equal, after, model.parameters()))
    mine.zero_grad()  # what is left of both passes
    mine.step()
    backward(model, 2)
    mine.step()
    assert not gradients_of(model)


def test_passes_for_other_parameters_are_one_step():
    model, other = network(), network()
    mine, reference = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    for m in (model, other):
        m[0](data(0)).square().sum().backward()
        m[2](m[0](data(0)).detach()).square().sum().backward() if m is other else None
    m = network()  # the first layer has moved by now, so its output comes from a copy
    model[2](m[0](data(0)).detach()).square().sum().backward()
    mine.step()
    reference.step()
    assert_same(model, other)
    assert mine.stats.names == reference.stats.names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_gradients_set_by_hand_are_stepped_in_step():
    model, other = network(), network()
    mine, reference = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    for m in (model, other):
        for i, p in enumerate(m.parameters()):
            p.grad = None if i == 1 else torch.full_like(p, 0.1 * (i + 1))
    mine.step()
    reference.step()
    assert_same(model, other)
    assert not gradients_of(model) and torch.equal(mine.stats.coef, reference.stats.coef)


def test_a_step_without_gradients():
    mine = in_backward(network())
    mine.step()
    assert mine.stats.total_norm == 0 and mine.stats.names == () and mine.clipper.steps == 0


def test_zero_grad_drops_what_waits():
    model = network()
    mine = in_backward(model, bucket_bytes=1 << 20)
    before = values_of(model)
    backward(model, 0)
    mine.zero_grad()
    mine.step()
    assert all(map(torch.equal, before, model.parameters()))


# ---- models ----


@pytest.mark.parametrize("bucket", [1, 10**9])
def test_zero_grad_begins_anew_where_nothing_was_stepped(bucket):
    model, other = network(), network()
    mine, reference = (
        in_backward(model, bucket_bytes=bucket),
        AdamW(other.parameters(), max_norm=rules.TensorNorm(0.05)),
    )
    backward(model, 0)
    mine.zero_grad()
    if bucket == 1:
        with pytest.raises(RuntimeError, match="came twice"):
            backward(model, 1)
        return
    backward(model, 1)
    mine.step()
    backward(other, 1)
    reference.step()
    assert_same(model, other)


class Wrapper:
    """Holds the optimizer, and is held by it."""

    def __init__(self, optimizer):
        self.optimizer, optimizer.wrapper = optimizer, self


def test_two_optimizers_over_one_parameter_are_refused():
    model = network()
    kept = in_backward(model)
    backward(model, 0)
    kept.step()
    other = AdamW(model[2].named_parameters(), step_in_backward=True)
    backward(model, 1)  # for one of them
    with pytest.raises(ValueError, match=r"weight, of shape \(16, 16\), is stepped inside backward by another"):
        other.step()
    del other
    gc.collect()
    for p in model.parameters():
        p.grad = None
    kept.step()
    Wrapper(kept)  # so that a count of references does not free it
    kept = in_backward(model)
    backward(model, 2)
    kept.step()
    thawed = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    kept.add_param_group({"params": [("thawed", thawed)]})
    other = SGD([thawed], step_in_backward=True, lr=0.1)
    thawed.requires_grad_()
    kept.step()
    other.step()
    loss = model(data(0)).sum() + thawed.sum()
    with pytest.raises(ValueError, match="thawed, of shape"):
        loss.backward()


def test_a_group_that_is_refused_is_not_added(monkeypatch):
    model, other, extra = network(), network(), nn.Parameter(torch.ones(2))
    mine, theirs = in_backward(model), in_backward(other)
    monkeypatch.setattr(module, "MARKED", [extra])
    monkeypatch.setattr(module, "marks_of", lambda ps: [] if any(p is extra for p in ps) else None)
    for bad, message in (([("taken", other[0].weight)], "taken, of shape"), ([("extra", extra)], "mark_shared")):
        with pytest.raises(ValueError, match=message):
            mine.add_param_group({"params": bad})
        assert len(mine.param_groups) == 1
        backward(model, 0)
        mine.step()
    del theirs


def test_a_checkpoint_that_is_refused_leaves_the_step_that_is_under_way():
    model, other = network(), network()
    mine, reference = in_backward(model), in_backward(other)
    for m, optimizer in ((model, mine), (other, reference)):
        backward(m, 0)
        if optimizer is mine:
            with pytest.raises(ValueError, match="group"):
                mine.load_state_dict({**(saved := mine.state_dict()), "param_groups": saved["param_groups"] * 2})
        optimizer.step()
    assert_same(model, other)
    assert torch.equal(mine.stats.norms, reference.stats.norms) and mine.stats.count == 6


def test_ranks_are_checked_once_and_declarations_every_time(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_check_parameters", lambda ps: calls.append("ranks"))
    monkeypatch.setattr(module, "MARKED", [1])
    monkeypatch.setattr(module, "marks_of", lambda ps: calls.append("marks"))
    model = network()
    mine = in_backward(model)
    for step in range(3):
        backward(model, step)
        mine.step()
    assert calls.count("ranks") == 2 and calls.count("marks") == 3


class Tied(nn.Module):
    """An embedding that is the head too, activations that are computed again, and a layer that is not used."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.unused = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(2, 2)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.embedding(x)
        if self.reentrant is None:
            x = self.hidden(x).tanh()
        else:
            x = checkpoint(lambda y: self.hidden(y).tanh(), x, use_reentrant=self.reentrant)
        return F.linear(x, self.embedding.weight)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_tied_weights_and_checkpointed_activations(reentrant):
    model, other = Tied(reentrant).double(), Tied().double()
    mine, reference = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    for step in range(3):
        x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        for m, optimizer in ((model, mine), (other, reference)):
            F.cross_entropy(m(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, other)
    assert mine.stats.names == ("embedding.weight", "hidden.weight", "hidden.bias")


def test_a_compiled_model():
    model, other = network(), network()
    compiled = torch.compile(model, backend="aot_eager")
    mine, reference = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    for step in range(3):
        for m, optimizer in ((compiled, mine), (other, reference)):
            backward(m, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, other)


def test_parameters_are_frozen_thawed_added_and_removed():
    model, other = network(), network()
    mine, reference = (
        make(m) for make, m in (
            (in_backward, model), (lambda m: AdamW(m.named_parameters(), max_norm=rules.AdaGC(warmup=0)), other),
        )
    )  # fmt: skip
    mine = in_backward(model, max_norm=rules.AdaGC(warmup=0))
    extras = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]

    def change(step, m, optimizer, extra):
        if step in (1, 3):
            m[0].requires_grad_(step == 3)
        if step == 2:
            optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.1})
        if step == 4:
            del optimizer.param_groups[0]["params"][2:4], optimizer.param_groups[0]["param_names"][2:4]

    for step in range(6):
        for m, optimizer, extra in ((model, mine, extras[0]), (other, reference, extras[1])):
            change(step, m, optimizer, extra)
            (m(data(step)).square().mean() + (extra * torch.arange(3.0)).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            m.zero_grad()
            extra.grad = None if optimizer is reference else extra.grad
            if step < 2:
                extra.grad = None
        assert_same(model, other)
        assert torch.equal(*extras) and mine.stats.names == reference.stats.names
        torch.testing.assert_close(mine.stats.coef, reference.stats.coef.expand_as(mine.stats.coef))


def test_groups_dtypes_and_layouts():
    """Of several groups, with a layout that no kernel takes, in both dtypes."""

    def make(in_backward):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4, dtype=torch.float64).t()),
              nn.Parameter(torch.randn(5, dtype=torch.float64)), nn.Parameter(torch.randn(5, 5)[:, :3])]  # fmt: skip
        kwargs = {"step_in_backward": True, "bucket_bytes": 100} if in_backward else {}
        groups = [{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "weight_decay": 0.5}]
        return ps, AdamW(groups, max_norm=rules.BlockRMS(0.1), **kwargs)

    (ps, mine), (qs, reference) = make(True), make(False)
    for _ in range(3):
        for params, optimizer in ((ps, mine), (qs, reference)):
            sum((p.double() * p.double().sin()).sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(ps, qs):
            assert torch.equal(p, q)
        torch.testing.assert_close(mine.stats.total_norm, reference.stats.total_norm, rtol=1e-12, atol=0)


# ---- what is not finite ----


def broken_backward(model, step, name, value):
    handle = dict(model.named_parameters())[name].register_hook(lambda g: torch.full_like(g, value))
    backward(model, step)
    handle.remove()


def test_a_parameter_whose_gradient_is_not_finite_is_skipped():
    model, other = network(), network()
    rule = rules.AdaGC(warmup=0)
    mine = in_backward(model, nonfinite="skip", max_norm=copy.deepcopy(rule))
    reference = AdamW(other.named_parameters(), max_norm=copy.deepcopy(rule))
    backward(model, 0)
    mine.step()
    backward(other, 0)
    reference.step()
    for value in (math.inf, math.nan):
        broken_backward(model, 1, "2.weight", value)
        mine.step()
        reference.zero_grad()
        backward(other, 1)
        other[2].weight.grad = None
        reference.step()
        assert_same(model, other)
        stats = mine.stats
        assert stats.nonfinite.tolist() == [i == 2 for i in range(6)]
        assert stats.coef[2] == 1 and not stats.skipped and not stats.total_norm.isfinite()
    torch.testing.assert_close(mine.clipper.rules[0].state["gamma"], reference.clipper.rules[0].state["gamma"])
    assert mine.clipper.skips == 0
    before = values_of(model)
    (model(data(3)).sum() * math.nan).backward()
    mine.step()
    assert mine.stats.skipped and mine.clipper.skips == 1 and all(map(torch.equal, before, model.parameters()))
    assert not gradients_of(model)


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_skipped_parameters_by_torchs_kernel(make):
    """Where no kernel of fastclip's steps."""
    with fastclip.use_backend("reference"):
        model = network()
        mine = in_backward(model, make, nonfinite="skip")
        before = values_of(model)
        broken_backward(model, 1, "2.weight", math.nan)
        mine.step()
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before)]
        assert same == [i == 2 for i in range(6)]


def test_what_is_not_finite_is_zeroed_or_propagates():
    for policy in ("zero", "propagate"):
        model, other = network(), network()
        mine = in_backward(model, nonfinite=policy)
        reference = AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05), nonfinite=policy)
        for m, optimizer in ((model, mine), (other, reference)):
            broken_backward(m, 0, "2.bias", math.inf)
            optimizer.step()
        torch.testing.assert_close(*map(values_of, (model, other)), equal_nan=True)
        assert mine.stats.nonfinite.tolist() == reference.stats.nonfinite.tolist() == [i == 3 for i in range(6)]
        if policy == "zero":
            assert torch.equal(mine.stats.zeroed, reference.stats.zeroed) and mine.clipper.zeroed == 16


# ---- stochastic rounding ----


def rounded(steps, seed=0, bucket=BUCKET, saved=None, first=0):
    model = network(torch.bfloat16)
    mine = in_backward(model, lr=1e-3, stochastic_rounding=seed, bucket_bytes=bucket)
    if saved is not None:
        model.load_state_dict(saved[0])
        mine.load_state_dict(saved[1])
    for step in range(first, steps):
        backward(model, step, torch.bfloat16)
        mine.step()
    return model, mine


def test_stochastic_rounding_repeats_and_resumes():
    model, _ = rounded(8)
    again, _ = rounded(8)
    assert_same(model, again, exactly=True)
    other, _ = rounded(8, seed=1)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    half, optimizer = rounded(4)
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed, _ = rounded(8, saved=saved, first=4)
    assert_same(model, resumed, exactly=True)


def test_stochastic_rounding_is_another_one_in_each_bucket_and_right_on_average():
    ps = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(3)]
    mine = SGD(ps, lr=2.0**-11, stochastic_rounding=0, step_in_backward=True, bucket_bytes=1)
    sum(p.sum() for p in ps).backward()
    mine.step()
    assert not torch.equal(ps[0], ps[1]) and not torch.equal(ps[1], ps[2]) and not torch.equal(ps[0], ps[2])
    mean = torch.stack([p.detach().double() for p in ps]).mean().item()
    # Each element is 1 or 1 - 2^-8, of which an eighth; 5 standard deviations.
    assert abs(mean - (1 - 2.0**-11)) < 5 * 2.0**-8 * math.sqrt(7 / 64 / (3 * 4096))


# ---- schedules, checkpoints, copies ----


def test_a_schedule_takes_effect_at_the_next_step():
    model, other = network(), network()
    optimizers = in_backward(model), AdamW(other.named_parameters(), max_norm=rules.TensorNorm(0.05))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for step in range(4):
        for m, optimizer, schedule in zip((model, other), optimizers, schedules):
            backward(m, step)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert_same(model, other)
    assert optimizers[0].param_groups[0]["lr"] == 1e-3 / 16


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_are_the_same_with_and_without(first):
    def make(inside):
        model = network()
        rule = rules.AdaGC(lambda_rel=0.95, warmup=0)
        return model, AdamW(model.named_parameters(), max_norm=rule, step_in_backward=inside, bucket_bytes=BUCKET)

    def train(model, optimizer, steps):
        for step in steps:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make(first)
    optimizer.param_groups[0]["lr"] = 0.01  # not what it was made with
    train(model, optimizer, range(3))
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    train(model, optimizer, range(3, 6))
    other, another = make(not first)
    backward(other, 7)  # of a step that is forgotten
    other.load_state_dict(saved[0])
    another.load_state_dict(saved[1])
    other.zero_grad()
    assert another.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.01
    train(other, another, range(3, 6))
    assert_same(model, other)
    assert another.clipper.steps == 6
    theirs = torch.optim.AdamW(other.parameters())
    theirs.load_state_dict(another.state_dict())
    another.load_state_dict(theirs.state_dict())


def test_adagc_warms_up_without_and_goes_on_within():
    model, other = network(), network()
    first = AdamW(model.named_parameters(), max_norm=rules.AdaGC(warmup=2))
    reference = AdamW(other.named_parameters(), max_norm=rules.AdaGC(warmup=2))
    for step in range(5):
        if step == 3:
            saved = first.state_dict()
            first = in_backward(model, max_norm=rules.AdaGC(warmup=0))
            first.load_state_dict(saved)
        for m, optimizer in ((model, first), (other, reference)):
            backward(m, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, other)
    torch.testing.assert_close(first.stats.coef, reference.stats.coef)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_steps_in_backward_from_its_first_step_on(copied):
    model = network()
    mine = in_backward(model)
    backward(model, 0)
    mine.step()
    other, another = copied((model, mine))
    assert another.steps_in_backward and not any(p._post_accumulate_grad_hooks for p in other.parameters())
    for step in range(1, 4):
        backward(model, step)
        mine.step()
        backward(other, step)
        assert len(gradients_of(other)) == (6 if step == 1 else len(gradients_of(other))) <= 6
        another.step()
        assert not gradients_of(other)
    assert all(p._post_accumulate_grad_hooks for p in other.parameters())
    assert_same(model, other, exactly=True)


def test_an_optimizer_that_is_dropped_does_nothing():
    model = network()
    mine = in_backward(model)
    backward(model, 0)
    mine.step()
    known, before = weakref.ref(mine), values_of(model)
    gc.collect()
    gc.disable()
    try:
        del mine
        assert known() is None
    finally:
        gc.enable()
    backward(model, 1)
    assert len(gradients_of(model)) == 6 and all(map(torch.equal, before, model.parameters()))


# ---- refusals ----

GLOBAL = {
    "a number": 1.0,
    "GlobalNorm": rules.GlobalNorm(1.0),
    "ZClip": rules.ZClip(),
    "AutoClip": rules.AutoClip(),
    "AdaGC with a warm-up": rules.AdaGC(),
    "Only": rules.Only(1.0, "*.weight"),
    "a list": [rules.TensorNorm(1.0), 1.0],
    "a function": lambda stats: stats.norms * 0,
}


@pytest.mark.parametrize("rule", GLOBAL)
@pytest.mark.parametrize("make", [AdamW, SGD])
def test_rules_that_need_all_gradients_are_refused(make, rule):
    with pytest.raises(ValueError, match=r"all parameters at once.*TensorNorm, BlockRMS, AdaGC\(warmup=0\)"):
        in_backward(network(), make, max_norm=GLOBAL[rule])


def test_arguments_are_refused_in_words():
    model = network()
    with pytest.raises(ValueError, match="nonfinite='raise'"):
        in_backward(model, nonfinite="raise")
    with pytest.raises(ValueError, match="bucket_bytes must be"):
        in_backward(model, bucket_bytes=0)
    mine = in_backward(model)
    with pytest.raises(ValueError, match="closure must be left out"):
        mine.step(lambda: 0.0)
    for parameters in (model.named_parameters(), model.parameters()):
        with pytest.raises(ValueError, match="steps inside backward"):
            fastclip.Clipper(parameters, 1.0).step(mine)
    assert not any(p._post_accumulate_grad_hooks for p in network().parameters())


def test_a_gradient_scaler_is_refused():
    model = network()
    mine = in_backward(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(data(0)).square().mean()).backward()
    with pytest.raises(RuntimeError, match="takes no GradScaler"):
        scaler.step(mine)


def test_a_sparse_gradient_is_refused_before_anything_of_its_bucket_is_stepped():
    embedding, linear = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 4)
    model = nn.Sequential(embedding, linear)
    mine = in_backward(model, bucket_bytes=1)
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="AdamW does not support sparse gradients"):
        model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW does not support sparse gradients"):
        mine.step()
    assert torch.equal(embedding.weight, before) and linear.weight.grad is None


def test_what_a_failing_kernel_has_begun_is_not_repeated(monkeypatch):
    model = network()
    mine = in_backward(model)
    step = AdamW._step_table

    def fails(self, *arguments):
        step(self, *arguments)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(AdamW, "_step_table", fails)
    with fastclip.use_backend("cpu"), pytest.raises(RuntimeError, match="a kernel failed"):
        backward(model, 0)
    monkeypatch.undo()
    mine.step()
    states = [int(mine.state[p]["step"]) if p in mine.state else 0 for p in model.parameters()]
    assert set(states) == {0, 1} and not gradients_of(model)
    backward(model, 1)
    mine.step()
    assert [int(mine.state[p]["step"]) for p in model.parameters()] == [n + 1 for n in states]


def test_parameters_that_share_a_gradient_are_refused():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    mine = AdamW([p, q], max_norm=rules.TensorNorm(1.0), step_in_backward=True)
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="share a gradient"):
        mine.step()
    assert torch.equal(p, torch.ones(3))
