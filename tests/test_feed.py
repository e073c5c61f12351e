"""Clipper.step: the same as clip, then step, for every optimizer, rule and reason to skip."""

import copy
import functools
import math

import pytest
import torch
from cases import NORM_ERROR, assert_scaled, clip_factor, parameter, total_norm, unit, wide
from exact_steps import ExactSteps
from torch.testing import assert_close

import fastclip
from fastclip import rules
from fastclip.pipeline.step import FUSED

pytestmark = [pytest.mark.isa, pytest.mark.usefixtures("one_thread")]


OPTIMIZERS = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "fused Adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True, fused=True),
    "fused SGD": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "fused Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, fused=True),
    "foreach AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=True),
    "loop SGD": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, foreach=False),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
}


def loud_half(stats):
    return torch.where(stats.tensor_norms > stats.tensor_norms.median(), 0.5, 1.0)


RULES = {
    "GlobalNorm": lambda: rules.GlobalNorm(0.3),
    "GlobalNorm, L1": lambda: rules.GlobalNorm(1.0, 1.0),
    "nothing to clip": lambda: rules.GlobalNorm(1e9),
    "TensorNorm": lambda: rules.TensorNorm(0.1),
    "Mask": lambda: rules.Mask(0.05),
    "Value": lambda: rules.Value(0.02),
    "Mask, GlobalNorm": lambda: [rules.Mask(0.05), rules.GlobalNorm(0.3)],
    "GlobalNorm, Value, a function": lambda: [rules.GlobalNorm(0.5), rules.Value(0.05), loud_half],
    "zero": lambda: rules.GlobalNorm(0.0),
}


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def loss_of(model, step):
    """Linear in the parameters: the gradients do not depend on them, so no error of a step grows in the next."""
    generator = torch.Generator().manual_seed(step)
    spreads = [0.2 / (1, 3, 10, 30)[(step + i) % 4] for i in range(4)]
    return sum(
        (p * torch.randn(p.shape, generator=generator) * spread).sum() for p, spread in zip(model.parameters(), spreads)
    )


def backward(model, step, scale=1.0):
    (loss_of(model, step) * scale).backward()


def optimizer_of(name, model):
    return OPTIMIZERS[name](list(model.parameters()))


def is_clean(optimizer):
    return not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def state_of(model, optimizer):
    return copy.deepcopy([list(model.parameters()), optimizer.state_dict()["state"]])


def exact_step(name, model, step, change=lambda parameters: None):
    """Gives `model` the gradients of a step; torch's step in float64 on them, changed, then clipped to 0.3."""
    exact = ExactSteps(OPTIMIZERS[name], list(model.parameters()))
    backward(model, step)
    exact.give(model.parameters())
    change(exact.params)
    torch.nn.utils.clip_grad_norm_(exact.params, 0.3)
    exact.step(NORM_ERROR)
    return exact


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_as_clip_then_step_in_float64(name, rule):
    model = net()
    parameters = list(model.parameters())
    optimizer, exact = optimizer_of(name, model), ExactSteps(OPTIMIZERS[name], parameters)
    fed = fastclip.Clipper(model.named_parameters(), RULES[rule]())
    clipped = fastclip.Clipper(exact.params, RULES[rule]())
    for step in range(50):
        optimizer.zero_grad()
        backward(model, step)
        exact.give(parameters)
        stats = fed.step(optimizer)
        with fastclip.use_backend("reference"):
            expected = clipped.clip_()
        exact.step(NORM_ERROR)
        assert is_clean(optimizer) and not stats.skipped
        assert stats.total_norm.item() == pytest.approx(expected.total_norm.item(), rel=NORM_ERROR)
    exact.check(parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_to_rounding(name):
    """From the same state, gradients scaled by 1 / grad_scale or by the coefficient differ by an ulp."""
    model = net()
    exact = exact_step(name, model, 0)
    fastclip.Clipper(model.parameters(), 0.3).step(optimizer_of(name, model))
    exact.check(model.parameters())


@pytest.mark.parametrize("when", [False, torch.tensor(False), torch.tensor([False])])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_when_false_leaves_everything(name, when):
    model = net()
    optimizer = optimizer_of(name, model)
    clipper = fastclip.Clipper(model.parameters(), 0.3)
    backward(model, 0)
    clipper.step(optimizer)
    model.zero_grad()
    backward(model, 1)
    before = state_of(model, optimizer)
    stats = clipper.step(optimizer, when=when)
    assert stats.skipped and not stats.clipped and stats.coef == 1 and stats.total_norm > 0
    assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
    assert not clipper.step(optimizer, when=torch.tensor(True)).skipped
    assert not torch.equal(next(model.parameters()), before[0][0])
    assert is_clean(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step(name):
    """The fused SGD of torch would keep buffers of momentum that were never filled."""
    model = net()
    optimizer = optimizer_of(name, model)
    clipper = fastclip.Clipper(model.parameters(), 0.3)
    backward(model, 0)
    clipper.step(optimizer, when=torch.tensor(False))
    model.zero_grad()
    exact = exact_step(name, model, 1)
    clipper.step(optimizer, when=torch.tensor(True))
    exact.check(model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_policies(name, value):
    def broken(policy):
        model = net()
        optimizer = optimizer_of(name, model)
        backward(model, 0)
        model[0].weight.grad[1, 2] = value
        return model, optimizer, fastclip.Clipper(model.named_parameters(), 0.3, nonfinite=policy)

    model, optimizer, clipper = broken("propagate")
    assert not clipper.step(optimizer).skipped
    assert model[0].weight.isnan().any()

    model, optimizer, clipper = broken("skip")
    before = state_of(model, optimizer)[0]
    gradients = [p.grad.clone() for p in model.parameters()]
    stats = clipper.step(optimizer)
    assert stats.skipped and stats.nonfinite.tolist() == [True, False, False, False]
    assert_close(list(model.parameters()), before, rtol=0, atol=0)
    if "fused" not in name:  # torch's fused steps may write what they do not use
        assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0, equal_nan=True)

    model, optimizer, clipper = broken("raise")
    before = state_of(model, optimizer)
    with pytest.raises(RuntimeError, match=r"not finite: 0\.weight \(1 of 80\); nothing was changed"):
        clipper.step(optimizer)
    assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
    assert is_clean(optimizer)

    model, optimizer, clipper = broken("zero")
    exact = exact_step(name, net(), 0, lambda parameters: parameters[0].grad[1, 2].zero_())
    stats = clipper.step(optimizer)
    assert stats.zeroed.tolist() == [1, 0, 0, 0] and stats.nonfinite.tolist() == [True, False, False, False]
    exact.check(model.parameters())


def test_nonfinite_policies_of_clip(backend):
    def broken():
        return [parameter(torch.tensor([3.0, math.nan, 4.0])), parameter(torch.tensor([12.0]))]

    parameters = broken()
    stats = fastclip.Clipper(parameters, 1.0, nonfinite="skip").clip_()
    assert stats.skipped and not stats.clipped
    assert parameters[0].grad[0] == 3 and parameters[1].grad[0] == 12
    parameters = broken()
    stats = fastclip.Clipper(parameters, 1.3, nonfinite="zero").clip_()
    assert stats.total_norm.item() == 13 and not stats.skipped
    assert_scaled([parameters[0].grad], [torch.tensor([3.0, 0.0, 4.0])], [clip_factor(13, 1.3)])
    parameters = broken()
    with pytest.raises(RuntimeError, match=r"gradient 0 \(1 of 3\); nothing was changed"):
        fastclip.Clipper(parameters, 1.0, nonfinite="raise").clip_()
    assert parameters[1].grad[0] == 12
    with pytest.raises(ValueError, match="nonfinite must be one of propagate, skip, zero, raise, got 'ignore'"):
        fastclip.Clipper(parameters, 1.0, nonfinite="ignore")


def test_value_with_a_skip_writes_nothing(backend):
    parameters = [parameter(torch.tensor([3.0, math.nan])), parameter(torch.tensor([12.0]))]
    stats = fastclip.Clipper(parameters, [rules.Value(1.0), 0.5], nonfinite="skip").clip_()
    assert stats.skipped and parameters[0].grad[0] == 3 and parameters[1].grad[0] == 12


# ---- hold ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_freeze_leaves_masked_parameters_alone(name):
    model = net()
    optimizer = optimizer_of(name, model)
    backward(model, 0)
    fastclip.Clipper(model.parameters(), 1e9).step(optimizer)
    model.zero_grad()
    backward(model, 1)
    for p in model[0].parameters():
        p.grad.mul_(1e-6)
    before = state_of(model, optimizer)
    stats = fastclip.Clipper(model.parameters(), rules.Mask(1e-3, freeze=True)).step(optimizer)
    assert stats.coef.tolist() == [0, 0, 1, 1]
    after = state_of(model, optimizer)
    assert_close(after[0][:2], before[0][:2], rtol=0, atol=0)
    assert_close([after[1][k] for k in (0, 1)], [before[1][k] for k in (0, 1)], rtol=0, atol=0)
    assert not torch.equal(after[0][2], before[0][2])
    assert all(p.grad is not None for p in model.parameters())
    model[0].weight.grad.fill_(1.0)
    model[2].weight.grad.fill_(1e-9)
    fastclip.Clipper(model.parameters(), rules.Mask(1e-3)).step(optimizer)  # without hold, momentum goes on
    assert not torch.equal(model[0].weight, before[0][0])


def test_freeze_from_the_first_step_on():
    """torch's fused SGD by itself fails where some parameters have momentum and others have none."""

    def run(fused):
        a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([a, b], 0.1, 0.9, fused=fused)
        exact = ExactSteps(lambda ps: torch.optim.SGD(ps, 0.1, 0.9), [a, b])
        clipper = fastclip.Clipper([a, b], rules.Mask(1e-2, freeze=True))
        for size in (1e-3, 1.0, 1.0):
            a.grad, b.grad = torch.full((3,), size), torch.ones(3)
            exact.give([a, b])
            clipper.step(optimizer)
            if size < 1e-2:
                exact.params[0].grad = None
            exact.step()
        exact.check([a, b])

    run(fused=True)
    run(fused=False)


def test_freeze_gives_gradients_back_when_the_step_fails():
    model = net()
    optimizer = optimizer_of("fused AdamW", model)
    backward(model, 0)
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fastclip.Clipper(model.parameters(), rules.Mask(1e9, freeze=True)).step(optimizer)
    assert all(p.grad is not None for p in model.parameters()) and is_clean(optimizer)


# ---- mixed precision ----


def scaled_run(name, feeds, unscale_first=False, steps=30):
    """Losses scaled by a GradScaler, one batch in five overflowing; through step() or in torch's own three calls.

    The scales, after the steps were compared with torch's in float64.
    """
    model = net()
    optimizer, exact = optimizer_of(name, model), ExactSteps(OPTIMIZERS[name], list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    clipper = fastclip.Clipper(model.parameters(), 0.3)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        if step % 5 != 3:
            backward(model, step)
            exact.give(model.parameters())
            torch.nn.utils.clip_grad_norm_(exact.params, 0.3)
            exact.step(NORM_ERROR)
            optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step % 5 == 3:
            model[0].weight.grad[0, 0] = math.inf
        if feeds:
            if unscale_first:
                scaler.unscale_(optimizer)
            stats = clipper.step(optimizer, scaler=scaler)
            assert stats.skipped == (step % 5 == 3)
            assert is_clean(optimizer)
        else:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    exact.check(model.parameters())
    return scales


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("name", ["fused AdamW", "fused SGD", "foreach AdamW", "RMSprop"])
def test_scaler_as_torch(name, unscale_first):
    ours, theirs = scaled_run(name, True, unscale_first), scaled_run(name, False)
    assert ours == theirs and set(ours) == {2.0**10, 2.0**11}


def test_scaler_reports_true_norms():
    model, plain = net(), net()
    optimizer = optimizer_of("fused AdamW", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss_of(model, 0)).backward()
    backward(plain, 0)
    stats = fastclip.Clipper(model.parameters(), 0.3).step(optimizer, scaler=scaler)
    with fastclip.use_backend("reference"):
        expected = fastclip.Clipper([parameter(g) for g in wide(p.grad for p in plain.parameters())], 0.3).clip_()
    for name in ("total_norm", "tensor_norms", "tensor_absmax", "coef"):  # to the norm's error and two roundings
        relative = NORM_ERROR + 2 * unit(torch.float32)
        assert_close(getattr(stats, name).double(), getattr(expected, name), rtol=relative, atol=0)
    assert stats.clipped and expected.clipped


def test_two_optimizers_under_one_scaler():
    a, b = net(), net()
    optimizers = [optimizer_of("fused AdamW", a), optimizer_of("fused SGD", b)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for model in (a, b):
        scaler.scale(loss_of(model, 0)).backward()
    b[0].weight.grad[0, 0] = math.nan
    stats = [fastclip.Clipper(m.parameters(), 1.0).step(o, scaler=scaler) for m, o in zip((a, b), optimizers)]
    assert [bool(s.skipped) for s in stats] == [False, True]
    with pytest.raises(RuntimeError, match="already stepped with scaler since its last update"):
        fastclip.Clipper(a.parameters(), 1.0).step(optimizers[0], scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9


def test_scaler_that_is_disabled_or_unused():
    model = net()
    optimizer = optimizer_of("fused AdamW", model)
    backward(model, 0)
    clipper = fastclip.Clipper(model.parameters(), 0.3)
    clipper.step(optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(RuntimeError, match="scaler has not scaled a loss yet"):
        clipper.step(optimizer, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp.GradScaler, got float 2.0"):
        clipper.step(optimizer, scaler=2.0)


# ---- accumulation ----


@pytest.mark.parametrize("name", ["fused AdamW", "foreach AdamW"])
@pytest.mark.parametrize("divisor", [4, 4.0, torch.tensor(4), torch.tensor([4.0])])
def test_accumulation(name, divisor):
    """n backward passes and one step is the step on the mean of the losses."""
    model = net()
    exact = ExactSteps(OPTIMIZERS[name], list(model.parameters()))
    for step in range(4):
        backward(model, step)
    exact.give(model.parameters())
    for p in exact.params:
        p.grad /= 4
    stats = fastclip.Clipper(model.parameters(), 0.3).step(optimizer_of(name, model), divide_by=divisor)
    expected = torch.nn.utils.clip_grad_norm_(exact.params, 0.3)
    exact.step(NORM_ERROR)
    assert stats.total_norm.item() == pytest.approx(expected.item(), rel=NORM_ERROR)
    exact.check(model.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_accumulation_with_every_rule(rule):
    model = net()
    exact = ExactSteps(OPTIMIZERS["fused SGD"], list(model.parameters()))
    for step in range(2):
        backward(model, step, scale=2.0)
    exact.give(model.parameters())
    for p in exact.params:
        p.grad /= 2
    fastclip.Clipper(model.parameters(), RULES[rule]()).step(optimizer_of("fused SGD", model), divide_by=2)
    with fastclip.use_backend("reference"):
        fastclip.Clipper(exact.params, RULES[rule]()).clip_()
    exact.step(NORM_ERROR)
    exact.check(model.parameters())


# ---- which parameters ----


def test_optimizer_with_other_parameters_is_clipped_in_place():
    """The gradients that are not the Clipper's must not be scaled with it."""
    model = net()
    optimizer = optimizer_of("fused SGD", model)
    backward(model, 0)
    grads = [p.grad.clone() for p in model.parameters()]
    clipper = fastclip.Clipper(model[0].parameters(), 0.01)
    factor = clip_factor(total_norm(grads[:2]), 0.01)
    clipper.step(optimizer)
    assert_scaled([p.grad for p in model[0].parameters()], grads, [factor] * 2)
    assert torch.equal(model[2].weight.grad, grads[2])
    with pytest.raises(ValueError, match="optimizer must hold exactly the parameters of this Clipper"):
        clipper.step(optimizer, divide_by=2)


def test_parameters_without_gradients_and_in_another_order():
    model = net()
    optimizer = torch.optim.AdamW(list(model.parameters())[::-1], fused=True)
    backward(model, 0)
    model[0].bias.grad = None
    before = model[0].bias.clone()
    stats = fastclip.Clipper(model.named_parameters(), 0.3).step(optimizer)
    assert stats.names == ("0.weight", "2.weight", "2.bias")
    assert torch.equal(model[0].bias, before) and is_clean(optimizer)
    model.zero_grad()
    assert fastclip.Clipper(model.parameters(), 0.3).step(optimizer).total_norm == 0


def test_nothing_is_left_after_a_failed_step():
    model = net()
    optimizer = optimizer_of("fused AdamW", model)
    backward(model, 0)
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fastclip.Clipper(model.parameters(), 0.3).step(optimizer)
    assert is_clean(optimizer)


def test_learning_rate_schedulers_and_hooks_see_the_step():
    model = net()
    optimizer = optimizer_of("fused AdamW", model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(True))
    backward(model, 0)
    fastclip.Clipper(model.parameters(), 0.3).step(optimizer)
    schedule.step()
    assert seen == [True] and optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"when": 1}, TypeError, "when must be a bool or a bool tensor of one element, got 1"),
        ({"when": torch.ones(2, dtype=torch.bool)}, TypeError, r"got a torch.bool tensor of shape \(2,\)"),
        ({"divide_by": 0}, ValueError, "divide_by must be > 0 and finite, got 0"),
        ({"divide_by": -2.0}, ValueError, "divide_by must be > 0 and finite, got -2.0"),
        ({"divide_by": torch.tensor(0)}, ValueError, "divide_by must be > 0 and finite, got 0"),
        ({"divide_by": torch.tensor(-2.0)}, ValueError, "divide_by must be > 0 and finite, got -2.0"),
        ({"divide_by": torch.tensor(math.nan)}, ValueError, "divide_by must be > 0 and finite, got nan"),
        ({"divide_by": "4"}, TypeError, "divide_by must be a number, got str '4'"),
        ({"divide_by": torch.ones(3)}, ValueError, r"divide_by must be one number, got a torch.float32 tensor"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = net()
    optimizer = optimizer_of("fused AdamW", model)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        fastclip.Clipper(model.parameters(), 0.3).step(optimizer, **arguments)
    assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


def test_optimizers_that_cannot_be_stepped():
    model = net()
    backward(model, 0)
    clipper = fastclip.Clipper(model.parameters(), 0.3)
    with pytest.raises(TypeError, match="must step without a closure; LBFGS evaluates one several times"):
        clipper.step(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Sequential"):
        clipper.step(model)


def test_fused_optimizers_are_fed_not_clipped(monkeypatch):
    """With one coefficient for all, no gradient is written by the clip."""
    from fastclip.gradients.table import GradTable

    monkeypatch.setattr(GradTable, "apply_", lambda *_: pytest.fail("the gradients were written"))
    for kind in FUSED:
        model = net()
        backward(model, 0)
        fastclip.Clipper(model.parameters(), 0.3).step(kind(model.parameters(), lr=1e-3, fused=True))


# ---- float64, whose coefficient a float32 grad_scale would round ----


@pytest.mark.parametrize("max_norm", [1.0, 1e-40, 1e-300])
@pytest.mark.parametrize("make", ["fused SGD of torch", "fastclip SGD", "fastclip SGD, another layout"])
def test_float64_gradients_are_clipped_in_float64(make, max_norm):
    values = torch.linspace(1, 9, 15, dtype=torch.float64).view(3, 5)
    gradient = values.clone() if "layout" not in make else values.t().contiguous().t()
    p = parameter(gradient)
    optimizer = torch.optim.SGD([p], lr=1.0, fused=True) if "torch" in make else fastclip.optim.SGD([p], lr=1.0)
    fastclip.Clipper([p], max_norm).step(optimizer)
    expected = -values * (max_norm / (values.norm() + 1e-6))
    torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("layout", ["as its parameter", "transposed"])
@pytest.mark.parametrize("optimizer", [functools.partial(torch.optim.SGD, fused=True), fastclip.optim.SGD])
def test_a_coefficient_whose_reciprocal_float32_does_not_hold(optimizer, layout):
    """torch's fused steps divide by it, and divided by inf no gradient would move anything."""
    gradient = torch.full((2, 2), 1e38)
    p = parameter(gradient if layout == "as its parameter" else gradient.t(), torch.zeros(2, 2))
    fastclip.Clipper([p], 1e-2).step(optimizer([p], lr=1.0))
    subnormal = 2**-150 / 5e-41  # the rounding of the coefficient, 1e-2 / 2e38, to float32
    rtol = NORM_ERROR + subnormal + 4 * unit(torch.float32)
    torch.testing.assert_close(p.detach(), torch.full((2, 2), -5e-3), rtol=rtol, atol=0)
