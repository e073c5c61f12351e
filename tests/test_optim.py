"""fastclip.optim: torch's results, torch's checkpoints, and the clip inside."""

import copy
import math

import pytest
import torch
from cases import NORM_ERROR, parameter
from conftest import BACKENDS
from exact_steps import ExactSteps
from torch.testing import assert_close

import fastclip
from fastclip import rules
from fastclip.gradients.table import GradTable
from fastclip.optim import SGD, AdamW

pytestmark = pytest.mark.usefixtures("one_thread")


ADAMW = {
    "default": {},
    "no decay": {"weight_decay": 0.0, "lr": 1e-2},
    "amsgrad": {"amsgrad": True, "lr": 3e-2},
    "maximize": {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
    "lr tensor": {"lr": torch.tensor(2e-2, dtype=torch.float64)},
}
SGDS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    "maximize": {"lr": 0.1, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}
PAIRS = {
    **{f"AdamW {name}": (AdamW, torch.optim.AdamW, options) for name, options in ADAMW.items()},
    **{f"SGD {name}": (SGD, torch.optim.SGD, options) for name, options in SGDS.items()},
}
SIZES = ((3, 5), (70_001,), (1,), (), (0,), (16,), (33, 2))
INTERPRETED_SIZES = ((3, 5), (2100,), (1,), (), (0,), (16,), (33, 2))


def interpreted():
    """Whether the steps are taken by Triton's interpreter, a thousand times slower than a kernel."""
    return fastclip.backends.current() == "triton"


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = INTERPRETED_SIZES if interpreted() else SIZES
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in sizes
    ]


def give_gradients(ps, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in ps:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale).to(p.dtype)


@pytest.fixture(params=BACKENDS)
def step_backend(request):
    """The kernels of each backend, and torch's fused one that stands in for them elsewhere."""
    with fastclip.use_backend(request.param):
        yield request.param


def enough(step_backend, steps):
    """`steps`, or fewer where the kernels are emulated and take their time."""
    return min(steps, {"cuda": 6, "triton": 3}.get(step_backend, steps))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_as_torch(step_backend, pair, dtype):
    ours, theirs, options = PAIRS[pair]
    a = parameters(dtype)
    mine, exact = ours(a, **options), ExactSteps(lambda ps: theirs(ps, **options, foreach=False), a)
    for step in range(enough(step_backend, 20)):
        give_gradients(a, step)
        a[step % 4].grad = None
        exact.give(a)
        mine.step()
        exact.step()
    exact.check(a)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pair", ["AdamW default", "SGD nesterov"])
def test_one_step_in_half_precision(step_backend, pair, dtype):
    """To a rounding of the exact step from the same state."""
    ours, theirs, options = PAIRS[pair]
    a = parameters(dtype)
    exact = ExactSteps(lambda ps: theirs(ps, **options), a)
    give_gradients(a, 0)
    exact.give(a)
    ours(a, **options).step()
    exact.step()
    exact.check(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta1", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_first_moment_keeps_what_is_small_after_what_was_large(step_backend, beta1, dtype):
    """It starts from the moment or from the gradient, whichever is to weigh more: small differences of large numbers
    would lose the smaller one."""
    large = 1e4 if dtype == torch.float16 else 1e10
    moments = [large, 1e-3, -large, 0.3, 1.0, -1.0]
    grads = [1e-3, large, 1e-3, 0.7, -9.0, -1.0]
    m, g = (torch.tensor(values * 50, dtype=torch.float64).to(dtype) for values in (moments, grads))
    p = parameter(g.clone(), torch.zeros_like(g))
    optimizer = AdamW([p], betas=(beta1, 0.999))
    optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": g.float().square().to(dtype)}
    optimizer.step()

    m, g = m.double(), g.double()
    exact = beta1 * m + (1 - beta1) * g
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    unit = torch.finfo(compute).eps / 2
    weight = torch.tensor(1 - beta1, dtype=torch.float64).to(compute).double().item()
    difference = (g - m).abs()
    # The rounded weight, the roundings of the difference and its product, and of the sum; then of what is stored.
    budget = abs(weight - (1 - beta1)) * difference + 2.01 * unit * min(weight, 1 - weight) * difference
    budget += (1.01 * unit + torch.finfo(dtype).eps / 2) * exact.abs()
    budget += torch.finfo(torch.float64).eps * (m.abs() * beta1 + g.abs() * (1 - beta1))  # of `exact` itself
    assert ((optimizer.state[p]["exp_avg"].double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_moment_overflows_only_where_it_is_too_large(step_backend, dtype):
    """The square of 3e19 is beyond float32, a thousandth of it is not."""
    g = torch.full((300,), 3e19, dtype=dtype)
    p = parameter(g.clone(), torch.ones_like(g))
    optimizer = AdamW([p], lr=0.125, weight_decay=0.0)
    optimizer.step()
    square = 0.001 * g.double().square()
    rounding = 5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps  # beta2, two products and the sum; stored
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), square, rtol=rounding, atol=0)
    torch.testing.assert_close(p.detach().double(), torch.full_like(square, 0.875), rtol=rounding, atol=0)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("limit", [0.5, 1e9, 0.0])
def test_clipped_steps_as_clip_then_step_in_float64(step_backend, pair, limit):
    if step_backend in ("cuda", "triton") and limit != 0.5 and pair not in ("AdamW default", "SGD momentum"):
        pytest.skip("emulated or interpreted, one limit for each of the others is enough")
    ours, theirs, options = PAIRS[pair]
    a = parameters()
    mine, exact = ours(a, **options, max_norm=limit), ExactSteps(lambda ps: theirs(ps, **options), a)
    for step in range(enough(step_backend, 50)):
        give_gradients(a, step, 10.0)
        exact.give(a)
        before = [p.grad.clone() for p in a]
        mine.step()
        expected = torch.nn.utils.clip_grad_norm_(exact.params, limit)
        exact.step(NORM_ERROR)
        assert mine.stats.total_norm.item() == pytest.approx(expected.item(), rel=NORM_ERROR)
        if step_backend not in ("foreach", "reference"):  # no gradient is written back
            assert_close([p.grad for p in a], before, rtol=0, atol=0)
    exact.check(a)


RULES = {
    "TensorNorm": lambda: rules.TensorNorm(0.5),
    "Mask": lambda: rules.Mask(2.0),
    "Mask, GlobalNorm": lambda: [rules.Mask(2.0), rules.GlobalNorm(1.0)],
    "Value, GlobalNorm": lambda: [rules.Value(0.1), rules.GlobalNorm(1.0)],
    "a function": lambda: lambda stats: torch.where(stats.tensor_norms > 1, 0.5, 1.0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", ["AdamW default", "SGD momentum"])
def test_every_rule(step_backend, pair, rule):
    ours, theirs, options = PAIRS[pair]
    a, b = parameters(), parameters()
    alone, fed = ours(a, **options, max_norm=RULES[rule]()), ours(b, **options)
    feeder = fastclip.Clipper(b, RULES[rule]())
    exact = ExactSteps(lambda ps: theirs(ps, **options), a)
    clipper = fastclip.Clipper(exact.params, RULES[rule]())
    for step in range(enough(step_backend, 10)):
        for ps in (a, b):
            give_gradients(ps, step)
        exact.give(a)
        alone.step()
        feeder.step(fed)
        with fastclip.use_backend("reference"):
            clipper.clip_()
        exact.step(NORM_ERROR)
    for p, q in zip(a, b):
        assert torch.equal(p, q)
    exact.check(a)


def test_a_masked_nan_does_not_reach_the_parameter(step_backend):
    """A coefficient of 0 means a gradient of zeros, whatever is in it."""
    p = parameter(torch.tensor([math.nan, math.inf]), torch.ones(2))
    exact = ExactSteps(lambda ps: torch.optim.AdamW(ps, weight_decay=0.5, lr=0.1), [p])
    AdamW([p], weight_decay=0.5, lr=0.1, max_norm=lambda stats: torch.zeros(())).step()
    exact.params[0].grad = torch.zeros(2, dtype=torch.float64)
    exact.step()
    exact.check([p])


@pytest.mark.parametrize("pair", ["AdamW default", "AdamW amsgrad", "SGD momentum", "SGD nesterov", "SGD plain"])
def test_hold(step_backend, pair):
    ours, _, options = PAIRS[pair]
    ps = parameters()
    optimizer = ours(ps, **{"weight_decay": 0.1, **options}, max_norm=rules.Mask(1e-3, freeze=True))
    for step in range(2):
        give_gradients(ps, step)
        optimizer.step()
    give_gradients(ps, 3)
    ps[1].grad.mul_(1e-6)
    before = copy.deepcopy([ps[1].detach(), optimizer.state.get(ps[1])])
    other = ps[0].detach().clone()
    optimizer.step(zero_grad=True)
    assert_close([ps[1].detach(), optimizer.state.get(ps[1])], before, rtol=0, atol=0)
    assert not torch.equal(ps[0], other)
    assert not any(p.grad.any() for p in ps)


@pytest.mark.parametrize("pair", ["AdamW default", "SGD dampening"])
def test_skip(step_backend, pair):
    ours, theirs, options = PAIRS[pair]
    a = parameters()
    optimizer, exact = ours(a, **options), ExactSteps(lambda ps: theirs(ps, **options), a)
    clipper = fastclip.Clipper(a, 1e9, nonfinite="skip")
    for step in range(6):
        give_gradients(a, step)
        exact.give(a)
        if step in (0, 3):
            a[0].grad[0, 0] = math.nan
        if step == 4:
            stats = clipper.step(optimizer, when=torch.tensor(False))
        else:
            stats = clipper.step(optimizer)
        assert bool(stats.skipped) == (step in (0, 3, 4))
        if step not in (0, 3, 4):
            exact.step()
    exact.check(a)


def test_own_policy_for_nonfinite_gradients():
    ps = parameters()
    optimizer = AdamW(ps, max_norm=1.0, nonfinite="skip")
    give_gradients(ps, 0)
    ps[0].grad[0, 0] = math.inf
    before = [p.detach().clone() for p in ps]
    optimizer.step()
    assert optimizer.stats.skipped
    assert_close([p.detach() for p in ps], before, rtol=0, atol=0)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradient_scaler(step_backend, max_norm):
    """scaler.step(optimizer) and clipper.step(optimizer, scaler) give what torch's three calls give."""

    def run(kind):
        ps = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(3))]
        exact = ExactSteps(lambda ps: torch.optim.AdamW(ps, lr=1e-2), ps)
        optimizer = (torch.optim.AdamW if kind == "torch" else AdamW)(
            ps, lr=1e-2, **({"max_norm": max_norm} if kind == "own" else {})
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        limit = math.inf if max_norm is None else max_norm
        clipper = fastclip.Clipper(ps, limit)
        for step in range(12):
            optimizer.zero_grad()
            slopes = [torch.randn_like(p) for p in ps]
            scaler.scale(sum((p * slope).sum() for p, slope in zip(ps, slopes))).backward()
            if step % 4 == 2:
                ps[0].grad[0, 0] = math.inf
            else:
                for p, slope in zip(exact.params, slopes):
                    p.grad = slope.double()
                torch.nn.utils.clip_grad_norm_(exact.params, limit)
                exact.step(NORM_ERROR)
            if kind == "torch":
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(ps, limit)
                scaler.step(optimizer)
            elif kind == "own":
                scaler.step(optimizer)
            else:
                clipper.step(optimizer, scaler=scaler)
            scaler.update()
        exact.check(ps)
        return scaler.get_scale()

    assert run("own") == run("fed") == run("torch")


# ---- one pass ----


def test_zero_grad_in_the_same_pass(step_backend):
    a = parameters()
    mine, exact = AdamW(a, max_norm=0.5), ExactSteps(torch.optim.AdamW, a)
    for step in range(3):
        give_gradients(a, step)
        exact.give(a)
        mine.step(zero_grad=True)
        torch.nn.utils.clip_grad_norm_(exact.params, 0.5)
        exact.step(NORM_ERROR)
        assert not any(p.grad.any() for p in a)
    exact.check(a)


def test_no_gradient_is_written(monkeypatch):
    monkeypatch.setattr(GradTable, "apply_", lambda *_: pytest.fail("the gradients were written"))
    ps = parameters()
    for optimizer in (AdamW(ps, max_norm=rules.TensorNorm(0.1)), SGD(ps, momentum=0.9, max_norm=0.1)):
        give_gradients(ps, 0)
        versions = [p.grad._version for p in ps]
        optimizer.step()
        assert [p.grad._version for p in ps] == versions


def test_parameters_are_marked_as_changed(step_backend):
    p = parameter(torch.ones(3), torch.ones(3))
    loss = (p * p).sum()
    SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_with_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    ps = parameters()
    optimizer = AdamW(ps, max_norm=0.5, stochastic_rounding=1)
    for step in range(3):
        give_gradients(ps, step)
        optimizer.step()
    torch.set_num_threads(2)
    again = parameters()
    optimizer = AdamW(again, max_norm=0.5, stochastic_rounding=1)
    for step in range(3):
        give_gradients(again, step)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, again))


# ---- layouts ----


def test_layouts_the_kernel_does_not_take(step_backend):
    """Gradients laid out otherwise than their parameters, views, misaligned and shared memory."""
    whole = torch.randn(100)
    ps = [
        torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(6, 5)),
        torch.nn.Parameter(torch.randn(41)[1:]),
        torch.nn.Parameter(torch.randn(7)),
    ]
    for p in ps[:3]:
        p.grad = torch.randn(p.shape)
    ps[1].grad = torch.randn(5, 6).t()
    ps[3].grad = whole[3:10]
    mine, exact = AdamW(ps, lr=0.1), ExactSteps(lambda ps: torch.optim.AdamW(ps, lr=0.1), ps)
    for _ in range(3):
        exact.give(ps)
        mine.step()
        exact.step()
    exact.check(ps)


def test_mixed_dtypes_and_groups(step_backend):
    ps = [torch.nn.Parameter(torch.randn(50).to(d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    groups = lambda ps: [{"params": ps[:1], "lr": 0.1}, {"params": ps[1:], "weight_decay": 0.5}]  # noqa: E731
    mine, exact = AdamW(groups(ps), max_norm=1.0), ExactSteps(lambda ps: torch.optim.AdamW(groups(ps)), ps)
    for step in range(3):
        give_gradients(ps, step)
        exact.give(ps)
        mine.step()
        torch.nn.utils.clip_grad_norm_(exact.params, 1.0)
        exact.step(NORM_ERROR)
    exact.check(ps)


def test_parameters_added_later_are_clipped_too():
    ps = parameters()
    optimizer = AdamW(ps[:2], max_norm=1.0)
    optimizer.add_param_group({"params": ps[2:]})
    give_gradients(ps, 0)
    optimizer.step()
    assert optimizer.stats.total_norm.item() == pytest.approx(fastclip.total_norm([p.grad for p in ps]).item())


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_that_share_a_gradient(step_backend, groups, zero_grad):
    """It counts once in the norm, and is multiplied once for each of them, in whichever group."""

    def make():
        ps = [torch.nn.Parameter(torch.full((6,), float(k))) for k in range(3)]
        ps[0].grad = ps[1].grad = torch.full((6,), 3.0)
        ps[2].grad = torch.full((6,), 4.0)
        return ps

    for rule in (1.0, rules.TensorNorm(1.0), [rules.Mask(3.5), 1.0]):
        a, b = make(), make()
        exact = ExactSteps(lambda ps: torch.optim.SGD(ps, 0.1, 0.9), a)
        exact.give(a)
        exact.params[1].grad = exact.params[0].grad
        with fastclip.use_backend("reference"):
            fastclip.Clipper(exact.params, rule).clip_()
        exact.step(NORM_ERROR)

        parts = [a] if groups == 1 else [a[:1], a[1:]]
        optimizer = SGD([{"params": part} for part in parts], 0.1, 0.9, max_norm=rule)
        before = [p.grad.clone() for p in a]
        optimizer.step(zero_grad=zero_grad)
        if zero_grad:
            assert not any(p.grad.any() for p in a)
        elif step_backend not in ("foreach", "reference"):  # a shared one is not written by torch's kernel either
            assert_close([p.grad for p in a[:2]], before[:2], rtol=0, atol=0)
        exact.check(a)
        fastclip.Clipper(b, rule).step(torch.optim.SGD(b, 0.1, 0.9, fused=True))
        exact.check(b)


def test_a_refusal_leaves_everything_as_it_was(step_backend):
    ps = parameters()
    give_gradients(ps, 0)
    ps[-1].grad = ps[-1].grad.to_sparse()
    optimizer = AdamW([{"params": ps[:3]}, {"params": ps[3:]}])
    before = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_close([p.detach() for p in ps], before, rtol=0, atol=0)
    with pytest.raises(TypeError, match="params must be floating-point tensors"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2) * 1j)]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("make", [AdamW, lambda ps: SGD(ps, momentum=0.9)], ids=["AdamW", "SGD"])
def test_a_state_of_another_shape_is_refused(step_backend, make):
    ps = parameters()
    give_gradients(ps, 0)
    optimizer = make([{"params": ps[:1]}, {"params": ps[1:]}])
    optimizer.step()
    name = list(optimizer.state[ps[-1]])[-1]
    optimizer.state[ps[-1]][name] = torch.zeros(7)
    before = copy.deepcopy([[p.detach() for p in ps], list(optimizer.state.values())])
    with pytest.raises(ValueError, match=rf"{name} has the shape \(7,\), and its parameter \(33, 2\)"):
        optimizer.step()
    assert_close([[p.detach() for p in ps], list(optimizer.state.values())], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["parameter", "gradient", "momentum_buffer"])
@pytest.mark.parametrize("size", [0, 8])
def test_memory_that_was_freed_is_refused(step_backend, name, size):
    p, q = (parameter(torch.ones(5), torch.ones(5)) for _ in range(2))
    optimizer = SGD([{"params": [p]}, {"params": [q]}], momentum=0.9)
    optimizer.step()
    tensors = {"parameter": q, "gradient": q.grad, "momentum_buffer": optimizer.state[q]["momentum_buffer"]}
    tensors[name].untyped_storage().resize_(size)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=rf"{name} of shape \(5,\) has no memory: its storage was freed or shrunk"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_count_of_steps_that_was_freed_is_refused(step_backend):
    p = parameter(torch.ones(5))
    optimizer = AdamW([p])
    optimizer.step()
    optimizer.state[p]["step"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"step of shape \(\) has no memory"):
        optimizer.step()


def test_a_refusal_comes_before_the_first_group_steps(step_backend):
    """The second group cannot round by chance, the gradient being laid out otherwise; nor was this a first step."""
    a = parameter(torch.ones(4, 3), torch.ones(4, 3))
    b = parameter(torch.ones(3, 4).bfloat16().t(), torch.ones(4, 3).bfloat16())
    optimizer = SGD([{"params": [a]}, {"params": [b], "stochastic_rounding": 1}], lr=1.0, momentum=0.9, dampening=0.5)
    with pytest.raises(NotImplementedError, match="stochastic_rounding needs a backend with kernels"):
        optimizer.step()
    assert (a == 1).all() and (b == 1).all()
    b.grad = None
    optimizer.step()
    assert not a.any()  # without dampening, as the first step is


def test_a_captured_step_that_would_round_by_chance_is_refused_before_it_begins(monkeypatch):
    a, b = (parameter(torch.ones(3).to(dtype), torch.ones(3).to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(fastclip.backends, "capturing", lambda device: True)
    with pytest.raises(NotImplementedError, match="cannot be captured in a CUDA graph"):
        SGD([a, b], stochastic_rounding=0).step()
    assert (a == 1).all() and (b == 1).all()


def test_steps_are_not_counted_when_torchs_kernel_raises(monkeypatch):
    p = parameter(torch.ones(3))

    def fails(*_, **__):
        raise RuntimeError("no")

    with fastclip.use_backend("reference"):
        optimizer = AdamW([p])
        optimizer.step()
        monkeypatch.setattr(torch, "_fused_adamw_", fails)
        with pytest.raises(RuntimeError, match="no"):
            optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_negative_view_as_gradient(step_backend):
    p = parameter(torch._neg_view(torch.full((3,), 2.0)), torch.ones(3))
    SGD([p], lr=0.5).step(zero_grad=True)
    assert p.tolist() == [2.0] * 3 and not p.grad.any()


@pytest.mark.parametrize("step_backend", [n for n in BACKENDS if n not in ("foreach", "reference")], indirect=True)
def test_a_coefficient_that_rounds_to_zero_stands_for_zeros(step_backend):
    """1e-60 is +0 in float32, in which all but float64 is multiplied. (torch's kernel, for `reference`, divides.)"""
    tiny = torch.tensor(1e-60, dtype=torch.float64)
    for make in (AdamW, lambda ps, **more: SGD(ps, momentum=0.9, **more)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for coef in (tiny, tiny.reshape(1)):
                p = parameter(torch.tensor([math.nan, math.inf, 1.0]).to(dtype), torch.ones(3, dtype=dtype))
                make([p], max_norm=lambda stats, coef=coef: coef).step()
                assert p.isfinite().tolist() == ([False, False, True] if dtype == torch.float64 else [True] * 3)


def test_hyperparameters_given_as_tensors_are_read_once(step_backend):
    tensors = {"betas": (torch.tensor(0.5), torch.tensor(0.75)), "weight_decay": torch.tensor(0.25)}
    numbers = {"betas": (0.5, 0.75), "weight_decay": 0.25}
    a, b = parameters(), parameters()
    mine, other = AdamW([{"params": a, "eps": torch.tensor(0.5)}], **tensors), AdamW(b, **numbers, eps=0.5)
    for step in range(2):
        for ps, optimizer in ((a, mine), (b, other)):
            give_gradients(ps, step)
            optimizer.step()
        for name in ("betas", "eps", "weight_decay"):
            value = mine.param_groups[0][name]
            assert value == other.param_groups[0][name] and not isinstance(value, torch.Tensor)
            assert not any(isinstance(v, torch.Tensor) for v in (value if name == "betas" else [value]))
        saved = mine.state_dict()
        saved["param_groups"][0] |= tensors
        mine.load_state_dict(saved)
    assert_close([p.detach() for p in a], [p.detach() for p in b], rtol=0, atol=0)
    momentum = SGD(parameters(), momentum=torch.tensor(0.5), dampening=torch.tensor(0.25))
    assert momentum.param_groups[0]["momentum"] == 0.5 and type(momentum.param_groups[0]["dampening"]) is float
    with pytest.raises(ValueError, match="weight_decay must be >= 0"):
        AdamW(parameters(), weight_decay=torch.tensor(-1.0))


def test_a_step_without_gradients_has_the_stats_of_nothing():
    ps = parameters()
    optimizer = AdamW([(f"p{i}", p) for i, p in enumerate(ps)], max_norm=1.0)
    give_gradients(ps, 0)
    optimizer.step()
    assert optimizer.stats.total_norm > 0 and len(optimizer.stats.names) == len(ps)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.stats.total_norm == 0 and not optimizer.stats.clipped and optimizer.stats.names == ()
    assert optimizer.stats.log(tensors=True)["total_norm"] == 0


def test_zero_grad_with_groups_that_have_none(step_backend):
    ps = parameters()
    give_gradients(ps[:3], 0)
    optimizer = AdamW(
        [{"params": ps[:3]}, {"params": ps[3:]}], max_norm=rules.Mask(1e-9, freeze=True), nonfinite="skip"
    )
    optimizer.step(zero_grad=True)
    assert not any(p.grad.any() for p in ps[:3])
    give_gradients(ps[:3], 1)
    ps[0].grad[0, 0] = math.nan
    optimizer.step(zero_grad=True)
    assert optimizer.stats.skipped and not any(p.grad.any() for p in ps[:3])


def test_copies_and_pickles_clip_too():
    ps = parameters()
    optimizer = AdamW(ps, max_norm=0.5)
    other = copy.deepcopy(optimizer)
    theirs = other.param_groups[0]["params"]
    assert other.clipper.parameters[0] is theirs[0] is not ps[0]
    give_gradients(theirs, 0)
    other.step()
    assert other.stats.clipped


# ---- checkpoints ----


@pytest.mark.parametrize("pair", PAIRS)
def test_checkpoints_load_both_ways(pair):
    """Half the steps by one, half by the other, through state_dict: as torch in float64 has it."""
    ours, theirs, options = PAIRS[pair]
    for first, second in ((ours, theirs), (theirs, ours), (ours, ours)):
        ps = parameters()
        optimizer, exact = first(ps, **options), ExactSteps(lambda ps: theirs(ps, **options), ps)
        for step in range(12):
            if step == 6:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = second(ps, **options)
                optimizer.load_state_dict(saved)
            give_gradients(ps, step)
            exact.give(ps)
            optimizer.step()
            exact.step()
            exact.check(ps)


def test_a_checkpoint_of_torch_leaves_the_rounding_as_it_is():
    ps = parameters()
    optimizer = AdamW([{"params": ps[:2], "stochastic_rounding": 5}, {"params": ps[2:]}])
    optimizer.load_state_dict(torch.optim.AdamW([{"params": ps[:2]}, {"params": ps[2:]}], lr=0.5).state_dict())
    assert [group["stochastic_rounding"] for group in optimizer.param_groups] == [5, None]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(torch.optim.AdamW(ps).state_dict())


def test_state_has_torchs_names():
    ps = parameters()
    give_gradients(ps, 0)
    for ours, theirs, options in (PAIRS["AdamW amsgrad"], PAIRS["SGD momentum"]):
        a, b = ours(ps, **options), theirs(ps, **options)
        a.step()
        b.step()
        mine, torchs = a.state_dict(), b.state_dict()
        assert [set(s) for s in mine["state"].values()] == [set(s) for s in torchs["state"].values()]
        assert set(torchs["param_groups"][0]) <= set(mine["param_groups"][0])


def test_schedulers_hooks_and_closures():
    ps = parameters()
    optimizer = AdamW(ps, lr=1.0, max_norm=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(True))

    def closure():
        assert torch.is_grad_enabled()
        give_gradients(ps, 0)
        return 7.0

    assert optimizer.step(closure) == 7.0
    schedule.step()
    assert seen == [True] and optimizer.param_groups[0]["lr"] == 0.5


# ---- stochastic rounding ----


def test_stochastic_rounding_is_right_on_average():
    """Updates of a hundredth of an ulp are lost to rounding to nearest, and arrive by chance."""
    p = parameter(torch.full((200_000,), -1.0).bfloat16(), torch.ones(200_000).bfloat16())
    nearest = SGD([p], lr=1e-4)
    nearest.step()
    assert (p == 1).all()
    SGD([p], lr=1e-4, stochastic_rounding=3).step()
    moved = p.detach().double() - 1
    assert moved.mean().item() == pytest.approx(1e-4, rel=0.05)
    assert set(moved.unique().tolist()) == {0.0, 2.0**-7}


def test_stochastic_rounding_repeats_and_resumes():
    def run(seed, resume):
        ps = [torch.nn.Parameter(torch.ones(5000).bfloat16()) for _ in range(2)]
        optimizer = AdamW(ps, lr=1e-4, stochastic_rounding=seed)
        for step in range(6):
            if resume and step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW(ps, lr=1e-4, stochastic_rounding=seed)
                optimizer.load_state_dict(saved)
            give_gradients(ps, step)
            optimizer.step()
        return torch.cat([p.detach() for p in ps])

    assert torch.equal(run(1, False), run(1, False))
    assert torch.equal(run(1, False), run(1, True))
    assert not torch.equal(run(1, False), run(2, False))
    both = run(1, False)
    assert not torch.equal(both[:5000], both[5000:])  # each tensor has numbers of its own


def test_stochastic_rounding_has_other_numbers_for_each_part_of_a_group():
    """Here those that take their first step of SGD with dampening, and those that took it."""
    ps = [parameter(torch.ones(5000).bfloat16(), torch.zeros(5000).bfloat16()) for _ in range(2)]
    optimizer = SGD(ps, lr=2.0**-8 + 2.0**-16, momentum=0.5, dampening=0.5, stochastic_rounding=1)
    ps[1].grad = None
    optimizer.step()
    ps[1].grad = ps[0].grad.clone()
    with torch.no_grad():
        ps[0].zero_()
    optimizer.step()
    assert len(ps[0].unique()) > 1 and not torch.equal(*ps)


def test_stochastic_rounding_trains_what_rounding_to_nearest_does_not():
    """A quadratic with small steps, in bfloat16 alone."""

    def distance(seed):
        target = torch.linspace(1, 2, 1000)
        p = torch.nn.Parameter(torch.full((1000,), 3.0).bfloat16())
        optimizer = AdamW([p], lr=5e-3, weight_decay=0.0, stochastic_rounding=seed)
        for _ in range(1500):
            p.grad = (p.detach().float() - target).bfloat16()
            optimizer.step()
        return (p.detach().float() - target).abs().mean().item()

    assert distance(0) < 0.05 < 1 < distance(None)


def test_stochastic_rounding_keeps_what_is_not_finite():
    p = parameter(torch.tensor([math.inf, -math.inf, math.nan]).bfloat16())
    SGD([p], lr=0.1, stochastic_rounding=0).step()
    assert p[0] == -math.inf and p[1] == math.inf and p[2].isnan()


def test_stochastic_rounding_is_refused_where_it_is_not_to_be_had():
    p = parameter(torch.ones(3).bfloat16(), torch.ones(3).bfloat16())
    with (
        fastclip.use_backend("reference"),
        pytest.raises(NotImplementedError, match="stochastic_rounding needs a backend with kernels"),
    ):
        SGD([p], stochastic_rounding=0).step()
    assert (p == 1).all()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: AdamW([p], lr=-1.0), ValueError, "lr must be >= 0, got -1.0"),
        (lambda p: AdamW([p], lr=torch.tensor(-1.0)), ValueError, r"lr must be >= 0, got tensor\(-1.\)"),
        (lambda p: SGD([p], lr=torch.tensor(math.nan)), ValueError, r"lr must be >= 0, got tensor\(nan\)"),
        (
            lambda p: AdamW([p], betas=(0.9, 1.0)),
            ValueError,
            r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)",
        ),
        (lambda p: AdamW([p], eps=-1e-8), ValueError, "eps must be >= 0, got -1e-08"),
        (lambda p: AdamW([p], weight_decay=math.nan), ValueError, "weight_decay must be >= 0, got nan"),
        (lambda p: AdamW([p], max_norm=-1.0), ValueError, "max_norm must be >= 0, got -1.0"),
        (lambda p: AdamW([p], max_norm="big"), TypeError, "rule must be a rule or a number, got str"),
        (lambda p: AdamW([p], nonfinite="skip"), ValueError, "nonfinite='skip' needs a max_norm"),
        (lambda p: AdamW([p], foreach=True), ValueError, "foreach=True and fused=False are not supported"),
        (lambda p: AdamW([p], differentiable=True), ValueError, "differentiable=True is not supported"),
        (lambda p: AdamW([p], stochastic_rounding=True), TypeError, "stochastic_rounding must be a seed"),
        (lambda p: SGD([p], momentum=-0.1), ValueError, "momentum must be >= 0, got -0.1"),
        (lambda p: SGD([p], nesterov=True), ValueError, "nesterov needs a momentum and no dampening"),
        (lambda p: SGD([torch.nn.Parameter(p * 1j)]), TypeError, "params must be floating-point tensors"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.nn.Parameter(torch.ones(2)))


def test_clipping_twice_is_refused():
    p = parameter(torch.ones(2))
    with pytest.raises(ValueError, match="has a max_norm of its own"):
        fastclip.Clipper([p], 1.0).step(AdamW([p], max_norm=1.0))


@pytest.mark.parametrize("given", ["pairs", "param_names"])
def test_two_parameters_of_one_name_are_refused(given):
    """Names are of all groups together; nothing is changed where a group is refused."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    group = {"params": [("weight", b)]} if given == "pairs" else {"params": [b], "param_names": ["weight"]}
    said = r"parameters\[0\] and parameters\[1\] are different parameters of one name, 'weight'"
    optimizer = fastclip.optim.SGD([("weight", a)], lr=0.1, max_norm=1.0)
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1 and len(optimizer.clipper.parameters) == 1
    assert optimizer.clipper.names == ("weight",)
    optimizer.add_param_group({"params": [("other", b)]})
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.step()
    assert list(optimizer.stats.log(tensors=True)["tensor_norms"]) == ["weight", "other"]
    fastclip.optim.SGD([{"params": [("weight", a)]}, {"params": [("weight", b)]}], lr=0.1)  # where names serve nothing
