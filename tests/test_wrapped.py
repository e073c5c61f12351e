"""Clipper.step on optimizers that trainers have wrapped: the clip happens in the innermost step, or not at all."""

import importlib.util
import math

import pytest
import torch
from cases import parameter
from torch.optim import optimizer as torch_optimizer

import fastclip
from fastclip import rules

# ---- wrappers as trainers make them ----


class FabricLike:
    """Lightning Fabric's: an instance of a new subclass that shares the optimizer's attributes."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step", "zero_grad")}
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step()


class AcceleratedLike(torch.optim.Optimizer):
    """Accelerate's: steps only where accumulated gradients are complete, through a GradScaler of its own."""

    def __init__(self, optimizer, scaler=None):
        self.optimizer, self.scaler, self.sync = optimizer, scaler, True

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        if not self.sync:
            return
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


class Careless(torch.optim.Optimizer):
    """Has an optimizer, but does the update without it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p -= p.grad


def fabric(optimizer):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(optimizer)


def accelerated(optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer)


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


WRAPPERS = [
    pytest.param(FabricLike, id="like Fabric"),
    pytest.param(AcceleratedLike, id="like Accelerate"),
    pytest.param(lambda optimizer: FabricLike(AcceleratedLike(optimizer)), id="both"),
    pytest.param(fabric, id="Fabric", marks=installed("lightning")),
    pytest.param(accelerated, id="Accelerate", marks=installed("accelerate")),
]
OPTIMIZERS = {
    "fastclip SGD": lambda ps: fastclip.optim.SGD(ps, lr=1.0),
    "fastclip AdamW": lambda ps: fastclip.optim.AdamW(ps, lr=0.1),
    "fused SGD": lambda ps: torch.optim.SGD(ps, lr=1.0, fused=True),
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "loop SGD": lambda ps: torch.optim.SGD(ps, lr=1.0, foreach=False),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1),
}


def loud(scale=1.0):
    """Two parameters of zeros whose gradients have the norm 1000 · scale together."""
    return [parameter(torch.tensor([600.0 * scale])), parameter(torch.tensor([0.0, -800.0 * scale]))]


def clean(optimizer):
    return not any(hasattr(optimizer, name) for name in ("grad_scale", "found_inf")) and not (
        optimizer._optimizer_step_pre_hooks or getattr(optimizer, "decision", None)
    )


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrapped_optimizers_are_clipped(name, wrap):
    plain, wrapped = loud(), loud()
    expected, inner = OPTIMIZERS[name](plain), OPTIMIZERS[name](wrapped)
    outer = wrap(inner)
    for clipper, optimizer in ((fastclip.Clipper(plain, 0.5), expected), (fastclip.Clipper(wrapped, 0.5), outer)):
        for _ in range(3):
            stats = clipper.step(optimizer)
            torch.testing.assert_close(stats.coef.item(), 0.5 / (1000 + 1e-6), rtol=2e-7, atol=0)
            for p, g in zip(clipper.parameters, loud()):
                p.grad = g.grad
    for a, b in zip(plain, wrapped):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    if "SGD" in name:  # three steps of a gradient of norm 0.5
        torch.testing.assert_close(wrapped[1][1].item(), 3 * 0.4, rtol=1e-6, atol=0)
    assert clean(inner)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_only_accumulates_does_nothing(name):
    ps = loud()
    outer = AcceleratedLike(OPTIMIZERS[name](ps))
    clipper = fastclip.Clipper(ps, [rules.ZClip(), 0.5])
    before = [p.grad.clone() for p in ps]
    outer.sync = False
    monitor = fastclip.monitor.GradMonitor()
    assert clipper.step(outer) is None
    monitor.update(None, 0.5)
    assert monitor.last == {}
    monitor.close()
    assert clipper.steps == 0 and not clipper.rules[0].state
    assert all(torch.equal(p.grad, b) and not p.any() for p, b in zip(ps, before))
    assert clean(outer.optimizer)
    outer.sync = True
    assert clipper.step(outer).clipped
    assert clipper.steps == 1 and clean(outer.optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("growth", [1, 1000])
def test_a_wrapper_with_a_grad_scaler(name, growth):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)
    plain, scaled = loud(), loud(1024.0)
    scaler.scale(torch.ones(()))
    inner = OPTIMIZERS[name](scaled)
    outer = AcceleratedLike(inner, scaler)
    expected = OPTIMIZERS[name](plain)
    stats = fastclip.Clipper(scaled, 0.5).step(outer)
    fastclip.Clipper(plain, 0.5).step(expected)
    assert stats.total_norm.item() == 1000 and clean(inner)
    for a, b in zip(plain, scaled):
        torch.testing.assert_close(a, b, rtol=4e-7, atol=0)
    assert scaler.get_scale() == (2048 if growth == 1 else 1024)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_wrapper_whose_grad_scaler_finds_an_inf(name):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ps = loud()
    ps[0].grad.fill_(torch.inf)
    scaler.scale(torch.ones(()))
    inner = OPTIMIZERS[name](ps)
    clipper = fastclip.Clipper(ps, rules.ZClip())
    stats = clipper.step(AcceleratedLike(inner, scaler))
    assert stats is None or stats.skipped
    assert not any(p.any() for p in ps) and clean(inner)
    assert scaler.get_scale() == 512
    assert all(p.grad is not None for p in ps)


def test_a_scaler_beside_the_wrappers_own_is_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ps = loud()
    scaler.scale(torch.ones(()))
    inner = torch.optim.AdamW(ps, fused=True)
    with pytest.raises(ValueError, match="scaler must be left out"):
        fastclip.Clipper(ps, 0.5).step(AcceleratedLike(inner, scaler), scaler=scaler)
    assert not any(p.any() for p in ps)
    assert ps[0].grad.item() == 600 and not inner._optimizer_step_pre_hooks


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_second_clip_is_refused_through_wrappers(wrap):
    ps = loud()
    with pytest.raises(ValueError, match="max_norm of its own"):
        fastclip.Clipper(ps, 0.5).step(wrap(fastclip.optim.SGD(ps, max_norm=1.0)))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_optimizers_that_clip_by_themselves_do_so_inside_wrappers(wrap):
    ps = loud()
    inner = fastclip.optim.SGD(ps, lr=1.0, max_norm=0.5)
    outer = wrap(inner)
    outer.step()
    torch.testing.assert_close(ps[1][1].item(), 0.4, rtol=1e-6, atol=0)
    assert inner.stats.total_norm == 1000
    assert getattr(outer, "stats", inner.stats) is inner.stats  # of a wrapper that is a subclass too


@pytest.mark.parametrize("when", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_conditional_steps_through_a_wrapper(name, when):
    ps = loud()
    inner = OPTIMIZERS[name](ps)
    stats = fastclip.Clipper(ps, 0.5).step(FabricLike(inner), when=torch.tensor(when))
    assert bool(stats.skipped) is not when
    assert all(bool(p.any()) is when for p in ps)
    assert all(p.grad is not None for p in ps) and clean(inner)


def test_an_update_without_the_inner_optimizer_is_an_error():
    ps = loud()
    with pytest.raises(RuntimeError, match=r"Careless.*not clipped"):
        fastclip.Clipper(ps, 0.5).step(Careless(torch.optim.SGD(ps)))


def test_a_step_that_fails_leaves_nothing_behind():
    ps = loud()
    inner = torch.optim.SGD(ps, fused=True)
    outer = FabricLike(inner)
    outer.step = lambda: (inner.step(), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastclip.Clipper(ps, 0.5).step(outer)
    assert clean(inner)


# ---- wrappers that do more than to step ----


class Busy:
    """Steps `times` times, and takes the gradients away after each."""

    def __init__(self, optimizer, times=1, zero_grad=False):
        self.optimizer, self.times, self.zero_grad = optimizer, times, zero_grad

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self):
        for _ in range(self.times):
            self.optimizer.step()
            if self.zero_grad:
                self.optimizer.zero_grad()


class StepsSome(torch.optim.Optimizer):
    """Steps its parameters by itself, before another optimizer steps the rest."""

    def __init__(self, params, rest):
        super().__init__(params, {"lr": 1.0})
        self.optimizer = rest

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= p.grad
        self.optimizer.step()


SGDS = {
    "loop SGD": lambda ps: torch.optim.SGD(ps, lr=1.0),
    "fused SGD": lambda ps: torch.optim.SGD(ps, lr=1.0, fused=True),
    "fastclip SGD": lambda ps: fastclip.optim.SGD(ps, lr=1.0),
}


@pytest.mark.parametrize("name", SGDS)
def test_a_wrapper_that_steps_twice_clips_once(name):
    ps = loud()  # of norm 1000
    fastclip.Clipper(ps, 0.5).step(Busy(SGDS[name](ps), times=2))
    torch.testing.assert_close(ps[0].item(), -0.6, rtol=1e-5, atol=0)
    torch.testing.assert_close(ps[1][1].item(), 0.8, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SGDS)
def test_a_second_step_that_would_divide_again_is_an_error(name):
    ps = loud()
    with pytest.raises(RuntimeError, match="divide_by: the optimizer's wrapper took a second step"):
        fastclip.Clipper(ps, 0.5).step(Busy(SGDS[name](ps), times=2), divide_by=4)
    torch.testing.assert_close(ps[0].item(), -0.3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SGDS)
def test_gradients_that_a_wrapper_takes_away_stay_away(name):
    """Given back after the wrapper's step, a NaN would be in all gradients that are accumulated from then on."""
    ps = loud()
    ps[0].grad.fill_(math.nan)
    fastclip.Clipper(ps, 0.5, nonfinite="skip").step(Busy(SGDS[name](ps), zero_grad=True))
    assert not any(p.any() for p in ps) and all(p.grad is None for p in ps)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Busy])
@pytest.mark.parametrize("name", SGDS)
def test_gradients_of_held_parameters_that_a_hook_takes_away_stay_away(name, wrap):
    ps = loud()
    ps[0].grad.fill_(1e-3)
    inner = SGDS[name](ps)
    inner.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
    fastclip.Clipper(ps, rules.Mask(0.1, freeze=True)).step(wrap(inner))
    assert not ps[0].any() and ps[1].any() and all(p.grad is None for p in ps)
    assert len(inner._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("name", SGDS)
def test_an_optimizer_that_steps_some_parameters_itself_is_no_wrapper(name):
    ps = loud()
    fastclip.Clipper(ps, 0.5).step(StepsSome(ps[:1], SGDS[name](ps[1:])))
    torch.testing.assert_close(ps[0].item(), -0.3, rtol=1e-5, atol=0)
    torch.testing.assert_close(ps[1][1].item(), 0.4, rtol=1e-5, atol=0)


def test_a_second_clip_is_refused_where_an_optimizer_leaves_some_parameters_to_another():
    ps = loud()
    with pytest.raises(ValueError, match="clipped twice"):
        fastclip.Clipper(ps, 0.5).step(StepsSome(ps[:1], fastclip.optim.SGD(ps[1:], max_norm=1.0)))


def test_a_wrapper_that_knows_parameters_of_old():
    """A subclass that copied the attributes before the inner optimizer's parameters were replaced."""
    ps = loud()
    inner = fastclip.optim.SGD(ps, lr=1.0)
    outer = FabricLike(inner)
    inner.load_state_dict(inner.state_dict())  # which makes new groups
    new = inner.param_groups[0]["params"][0] = parameter(torch.full((1,), 600.0))
    fastclip.Clipper([new, ps[1]], 0.5).step(outer)
    torch.testing.assert_close(new.item(), -0.3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SGDS)
def test_gradients_unscaled_under_the_wrappers_name_are_not_unscaled_again(name):
    ps = loud()
    outer = Busy(SGDS[name](ps))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for p in ps:
        p.grad *= 1024
    scaler.unscale_(outer)
    clipper = fastclip.Clipper(ps, 2000.0)
    assert clipper.step(outer, scaler).total_norm == 1000
    assert ps[0].item() == -600
    with pytest.raises(RuntimeError, match="already stepped with scaler"):
        clipper.step(outer, scaler)
    scaler.update()


# ---- step hooks ----


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, *WRAPPERS[:2]])
@pytest.mark.parametrize("scope", ["optimizer", "global"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_hooks_see_clipped_gradients(name, scope, wrap):
    """As after clip, then step: what a hook changes is not scaled, and what it looks at is."""
    ps, seen = loud(), []

    def before(optimizer, args, kwargs):
        seen.append([p.grad.clone() for p in ps])
        ps[0].grad.fill_(2.0)

    def after(optimizer, args, kwargs):
        seen.append([p.grad.clone() for p in ps])

    inner = OPTIMIZERS[name](ps)
    if scope == "optimizer":
        handles = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]
    else:
        handles = [
            torch_optimizer.register_optimizer_step_pre_hook(before),
            torch_optimizer.register_optimizer_step_post_hook(after),
        ]
    try:
        fastclip.Clipper(ps, 0.5).step(wrap(inner))
    finally:
        for handle in handles:
            handle.remove()
    for gradients, first in zip(seen, (0.3, 2.0)):
        torch.testing.assert_close(gradients[0].item(), first, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients[1][1].item(), -0.4, rtol=1e-6, atol=0)
    assert len(seen) == 2
    if "SGD" in name:
        assert ps[0].item() == -2.0


def test_the_private_names_of_torch_that_step_hooks_go_by():
    module = torch_optimizer
    optimizer = torch.optim.SGD(loud())
    for hooks in (
        module._global_optimizer_pre_hooks,
        module._global_optimizer_post_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    ):
        assert hasattr(hooks, "move_to_end") and not hooks
