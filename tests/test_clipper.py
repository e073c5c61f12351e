"""Clipper, rules and Stats."""

import copy
import math

import pytest
import torch
from cases import (
    NORM_ERROR,
    assert_scaled,
    clip_factor,
    gradients,
    parameter,
    rounding,
    tensor_norm,
    total_norm,
    unit,
    wide,
)

import fastclip
from fastclip import rules
from fastclip.rules import GlobalNorm, Mask, TensorNorm, Value

pytestmark = pytest.mark.isa


def model(scale=1.0):
    return [parameter(torch.randn(n) * s * scale) for n, s in ((5, 1.0), (70_000, 1e-3), (33, 10.0), (4, 1e-8))]


def test_a_number_is_a_global_norm(backend):
    parameters = model()
    before = wide(gradients(parameters))
    stats = fastclip.Clipper(parameters, 1.0).clip_()
    expected = total_norm(before)
    assert stats.total_norm.dtype == stats.coef.dtype == torch.float32
    assert stats.total_norm.item() == pytest.approx(expected, rel=NORM_ERROR)
    assert stats.coef.item() == pytest.approx(1 / (expected + 1e-6), rel=NORM_ERROR + unit(torch.float32))
    assert stats.clipped.item() is True
    assert stats.tensor_norms.tolist() == pytest.approx([tensor_norm(t) for t in before], rel=NORM_ERROR)
    assert stats.tensor_absmax.tolist() == [tensor_norm(t, math.inf) for t in before]
    assert stats.nonfinite.tolist() == [False] * 4
    assert stats.names is None
    assert "total_norm=" in repr(stats)
    assert_scaled(gradients(parameters), before, [stats.coef.double().item()] * 4, relative=rounding(torch.float32))


def test_not_clipped(backend):
    stats = fastclip.Clipper(model(), GlobalNorm(1e9)).clip_()
    assert stats.coef.item() == 1 and stats.clipped.item() is False


def test_stats_stay_as_they_were(backend):
    """Stats of one step must not change when the next step runs."""
    parameters = model()
    clipper = fastclip.Clipper(parameters, 1.0)
    first = clipper.clip_()
    values = first.total_norm.item(), first.tensor_norms.tolist()
    for p in parameters:
        p.grad.mul_(3)
    clipper.clip_()
    assert values == (first.total_norm.item(), first.tensor_norms.tolist())


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 3.0])
def test_tensor_norm(backend, norm_type):
    parameters = model()
    before = wide(gradients(parameters))
    norms = [tensor_norm(t, norm_type) for t in before]
    stats = fastclip.Clipper(parameters, TensorNorm(0.5, norm_type)).clip_()
    factors = [clip_factor(n, 0.5) for n in norms]
    assert stats.tensor_norms.tolist() == pytest.approx(norms, rel=NORM_ERROR)
    assert stats.coef.tolist() == pytest.approx(factors, rel=NORM_ERROR + unit(torch.float32))
    assert_scaled(gradients(parameters), before, factors)


def test_mask(backend):
    parameters = [*model(), parameter(torch.tensor([1e-9, math.nan]))]
    before = wide(gradients(parameters))
    stats = fastclip.Clipper(parameters, Mask(1e-3)).clip_()
    assert stats.coef.tolist() == [1, 1, 1, 0, 1]  # the one with a NaN is left alone
    assert stats.nonfinite.tolist() == [False] * 4 + [True]
    assert_scaled(gradients(parameters), before, [1, 1, 1, 0, 1], relative=0.0)


def test_value(backend):
    parameters = model()
    before = [g.clone() for g in gradients(parameters)]
    stats = fastclip.Clipper(parameters, Value(0.5)).clip_()
    assert stats.clipped.item() is True
    assert stats.total_norm.item() == pytest.approx(total_norm(before), rel=NORM_ERROR)  # before clipping
    for after, old in zip(gradients(parameters), before):
        assert torch.equal(after, old.clamp(-0.5, 0.5))
    assert fastclip.Clipper(parameters, Value(0.5)).clip_().clipped.item() is False


def one_by_one(values, rules):
    """The oracle of composition: every rule on its own, one after another, in float64."""
    for rule in rules:
        norms = [tensor_norm(v) for v in values]
        if isinstance(rule, GlobalNorm):
            factors = [clip_factor(math.hypot(*norms), rule.max_norm)] * len(values)
        elif isinstance(rule, TensorNorm):
            factors = [clip_factor(n, rule.max_norm) for n in norms]
        elif isinstance(rule, Mask):
            factors = [float(tensor_norm(v, math.inf) >= rule.threshold) for v in values]
        else:
            values = [v.clamp(rule.low, rule.high) for v in values]
            continue
        values = [v * f for v, f in zip(values, factors)]
    return values


@pytest.mark.parametrize(
    "rules",
    [
        [Mask(1e-3), GlobalNorm(1.0)],
        [GlobalNorm(1.0), Mask(1e-3)],
        [TensorNorm(0.2), GlobalNorm(0.3)],
        [Value(0.1), GlobalNorm(1.0)],
        [GlobalNorm(1.0), Value(0.1)],
        [Mask(1e-3), Value(0.5), TensorNorm(0.1), Value(0.01), GlobalNorm(0.05)],
    ],
    ids=str,
)
def test_rules_in_order(backend, rules):
    parameters = model()
    expected = one_by_one(wide(gradients(parameters)), rules)
    fastclip.Clipper(parameters, rules).clip_()
    # Every rule that takes a norm adds that norm's error and its roundings; each passes on those before it, once in the
    # gradient and at most once in the norm.
    norms = sum(isinstance(rule, (GlobalNorm, TensorNorm)) for rule in rules)
    relative = sum(2.0**i for i in range(norms)) * (NORM_ERROR + rounding(torch.float32))
    assert_scaled(gradients(parameters), expected, [1.0] * 4, relative=relative)


def test_rule_of_the_users_own(backend):
    def halve_the_loud(stats):
        return torch.where(stats.tensor_norms > 1, 0.5, 1.0)

    parameters = model()
    before = wide(gradients(parameters))
    stats = fastclip.Clipper(parameters, [halve_the_loud]).clip_()
    factors = [0.5 if tensor_norm(t) > 1 else 1.0 for t in before]
    assert stats.coef.tolist() == factors and 0.5 in factors and 1.0 in factors
    assert_scaled(gradients(parameters), before, factors, relative=rounding(torch.float32))


def test_zero_coefficient_kills_nan(backend):
    """A coefficient of 0 writes zeros; it does not multiply, which would keep the NaN."""
    parameters = [parameter(torch.full((5000,), math.nan)), parameter(torch.ones(3))]
    fastclip.Clipper(parameters, lambda stats: torch.where(stats.nonfinite, 0.0, 1.0)).clip_()
    assert torch.equal(parameters[0].grad, torch.zeros(5000)) and torch.equal(parameters[1].grad, torch.ones(3))


def test_names(backend):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    clipper = fastclip.Clipper(net.named_parameters(), 1.0)
    assert clipper.clip_().names == ()
    net[1](torch.ones(1, 2)).sum().backward()
    assert clipper.clip_().names == ("1.weight", "1.bias")
    net(torch.ones(1, 3)).sum().backward()
    assert clipper.clip_().names == ("0.weight", "0.bias", "1.weight", "1.bias")
    groups = [{"params": list(net[i].named_parameters(f"{i}")), "lr": i} for i in range(2)]
    assert fastclip.Clipper(groups, 1.0).clip_().names == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_two_parameters_of_one_name_are_refused():
    a, b, c = (parameter(torch.ones(2)) for _ in range(3))
    said = r"parameters\[0\] and parameters\[2\] are different parameters of one name, 'weight'"
    for given in (
        [("weight", a), ("bias", b), ("weight", c)],
        [{"params": [("weight", a), ("bias", b)]}, {"params": [("weight", c)]}],
    ):
        with pytest.raises(ValueError, match=said):
            fastclip.Clipper(given, 1.0)
    for harmless in ([("weight", a), ("bias", b), ("weight", a)], [("head", a), ("bias", b), ("embed", a)]):
        assert fastclip.Clipper(harmless, 1.0).clip_().names == (harmless[0][0], "bias")


def test_no_gradients_yet(backend):
    stats = fastclip.Clipper([torch.nn.Parameter(torch.zeros(3))], [Mask(1.0), GlobalNorm(1.0)]).clip_()
    assert stats.total_norm.item() == 0 and stats.clipped.item() is False and stats.tensor_norms.shape == (0,)


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        ("adam", TypeError, "rule must be a rule or a number, got str 'adam'"),
        ([], ValueError, "rule must not be an empty list"),
        (None, TypeError, "got NoneType None"),
        (-1.0, ValueError, "max_norm must be >= 0, got -1.0"),
        ([Mask(1.0), GlobalNorm], TypeError, "rule must be a rule"),
        ([GlobalNorm(1.0), TensorNorm(1.0, 1.0)], ValueError, "the same norm_type"),
    ],
)
def test_bad_rules(rule, kind, message):
    with pytest.raises(kind, match=message):
        fastclip.Clipper(model(), rule)


def test_rule_with_a_bad_answer(backend):
    parameters = model()
    before = wide(gradients(parameters))
    for answer in ("half", None, True, torch.ones(3)):
        with pytest.raises(TypeError, match=r"must return a number or a tensor of shape \[\] or \[4\]"):
            fastclip.Clipper(parameters, lambda stats, answer=answer: answer).clip_()
    assert_scaled(gradients(parameters), before, [1.0] * 4, relative=0.0)


@pytest.mark.parametrize("answers", [(0.5,), (1.0,), (1,), (2, 0.25), (1.0, 0.5), (0.5, 1.0), (1.0, 1.0), (0.0,)])
def test_rules_may_return_numbers(backend, answers):
    """For all gradients; a list of them, and what comes after, as if they were tensors."""
    numbers = model()
    tensors = [parameter(g.clone()) for g in gradients(numbers)]
    rules = [lambda stats, answer=answer: answer for answer in answers]
    theirs = [lambda stats, answer=answer: torch.full((), float(answer), dtype=torch.float64) for answer in answers]
    found = fastclip.Clipper(numbers, [*rules, GlobalNorm(0.1)]).clip_()
    expected = fastclip.Clipper(tensors, [*theirs, GlobalNorm(0.1)]).clip_()
    for a, b in ((found.coef, expected.coef), *zip(gradients(numbers), gradients(tensors))):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bad_parameters():
    with pytest.raises(ValueError, match=r"parameters must be all named or all unnamed; parameters\[1\] is not a pair"):
        fastclip.Clipper([("a", torch.zeros(1)), torch.zeros(1)], 1.0)
    with pytest.raises(TypeError, match=r"parameters\[0\] must be a tensor, got str 'a'"):
        fastclip.Clipper(["a"], 1.0)


def test_repr():
    assert repr(fastclip.Clipper(model(), [Mask(0.1), 1.0])) == (
        "Clipper(4 parameters, [Mask(0.1), GlobalNorm(1.0, norm_type=2.0)])"
    )
    assert repr(Value(2)) == "Value(2.0)" and repr(TensorNorm(1, "inf")) == "TensorNorm(1.0, norm_type=inf)"


def test_zeroed_stays_zero_whatever_follows(backend):
    """[zero what is not finite, then the global norm]: 0 * -0 must not bring the NaN back."""
    parameters = [parameter(torch.tensor([1.0, math.nan])), parameter(torch.tensor([2.0, math.inf]))]
    keep_infinite = lambda stats: torch.where(stats.tensor_absmax.isnan(), 0.0, 1.0)  # noqa: E731
    fastclip.Clipper(parameters, [keep_infinite, 1.0]).clip_()
    assert torch.equal(parameters[0].grad, torch.zeros(2))
    assert parameters[1].grad[0] == 0 and parameters[1].grad[1].isnan()


COEFFICIENTS = {
    "expanded": torch.tensor([0.5]).expand(2),
    "strided": torch.tensor([[0.5, 9.0], [0.25, 9.0]])[:, 0],
    "with history": torch.tensor([0.5, 0.25]).requires_grad_(),
}


@pytest.mark.parametrize("coef", COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_any_layout_of_coefficients(backend, coef):
    parameters = [parameter(torch.ones(3)), parameter(torch.ones(4))]
    fastclip.Clipper(parameters, lambda stats: coef).clip_()
    assert [g[0].item() for g in gradients(parameters)] == coef.tolist()


def test_value_reports_what_it_changed(backend):
    hidden = [parameter(torch.tensor([math.nan, 5.0]))]
    assert fastclip.Clipper(hidden, Value(1.0)).clip_().clipped.item() is True
    tenth = [parameter(torch.full((5,), 0.3))]
    assert fastclip.Clipper(tenth, Value(0.1)).clip_().clipped.item() is True
    assert fastclip.Clipper(tenth, Value(0.1)).clip_().clipped.item() is False


def test_names_where_two_parameters_share_a_gradient(backend):
    g = torch.ones(3)
    a, b, c = parameter(g), parameter(g.view(3)), parameter(torch.ones(2))
    stats = fastclip.Clipper([("a", a), ("b", b), ("c", c)], 1.0).clip_()
    assert stats.names == ("a", "c") and stats.tensor_norms.shape == (2,)


def test_numbers_of_other_libraries():
    numpy = pytest.importorskip("numpy")
    assert repr(fastclip.Clipper(model(), numpy.float32(1)).rules) == "[GlobalNorm(1.0, norm_type=2.0)]"


@pytest.mark.parametrize("flag", [True, False])
def test_flags_of_other_libraries(flag):
    numpy = pytest.importorskip("numpy")
    p = parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.5)
    stats = fastclip.Clipper([p], 100.0).step(optimizer, when=numpy.bool_(flag))
    assert bool(stats.skipped) is not flag
    assert torch.equal(p.detach(), torch.full((3,), -0.5 if flag else 0.0))
    with pytest.raises(TypeError, match="when must be a bool"):
        fastclip.Clipper([p], 100.0).step(optimizer, when=numpy.float32(1))


@pytest.mark.parametrize("name", ["steps", "skips", "zeroed"])
def test_a_count_that_is_none_is_an_error_before_rules_take_their_state(name):
    rule = fastclip.rules.AutoClip(50, window=3)
    clipper = fastclip.Clipper([parameter(torch.ones(3))], rule)
    clipper.clip_()
    saved, fresh = (
        clipper.state_dict(),
        fastclip.Clipper([parameter(torch.ones(3))], fastclip.rules.AutoClip(50, window=3)),
    )
    with pytest.raises((TypeError, ValueError)):
        fresh.load_state_dict({**saved, name: "many"})
    assert fresh.state_dict()["rules"] == [{}]


# ---- a norm measured elsewhere ----


@pytest.mark.parametrize("rule", [1.0, rules.ZClip(warmup=2), [rules.AutoClip(), 2.0]], ids=["number", "ZClip", "list"])
def test_a_clip_by_a_norm_measured_elsewhere(rule):
    """As :meth:`clip_`, where the norm given is that of these gradients; no gradient is read."""
    for seed in range(5):
        torch.manual_seed(seed)
        grads = [torch.randn(5) * 3, torch.randn(2, 3)]
        one, other = [parameter(g.clone()) for g in grads], [parameter(g.clone()) for g in grads]
        if seed == 0:
            measures, given = fastclip.Clipper(one, rule), fastclip.Clipper(other, copy.deepcopy(rule))
        measures.set_parameters(one, None)
        given.set_parameters(other, None)
        expected = measures.clip_()
        stats = given.clip_with_norm_(expected.norm)
        assert stats.total_norm == expected.total_norm and stats.coef == expected.coef
        assert stats.clipped == expected.clipped and given.steps == measures.steps
        for a, b in zip(one, other):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
        with pytest.raises(RuntimeError, match="tensor_stats"):
            stats.tensor_norms  # noqa: B018 - which nobody has measured


def test_a_norm_measured_elsewhere_is_not_measured_again():
    p = parameter(torch.tensor([3.0, 4.0]))
    stats = fastclip.Clipper([p], 1.0).clip_with_norm_(torch.tensor(10.0))
    assert stats.total_norm == 10
    torch.testing.assert_close(p.grad, torch.tensor([0.3, 0.4]), rtol=1e-6, atol=0)
    assert fastclip.Clipper([p], 1.0, nonfinite="skip").clip_with_norm_(math.nan).skipped
    torch.testing.assert_close(p.grad, torch.tensor([0.3, 0.4]), rtol=1e-6, atol=0)
    fastclip.Clipper([p], 1.0).clip_with_norm_(math.nan)
    assert p.grad.isnan().all()


@pytest.mark.parametrize("rule", [rules.TensorNorm(1.0), rules.Value(1.0), [rules.Mask(1.0), 1.0], rules.AGC()])
def test_a_rule_that_looks_at_more_than_the_norm_is_refused(rule):
    p = parameter(torch.ones(2))
    clipper = fastclip.Clipper([p], rule)
    assert not clipper.goes_by_total_norm
    with pytest.raises(ValueError, match="total norm alone"):
        clipper.clip_with_norm_(10.0)
    with pytest.raises(ValueError, match="total_norm must be >= 0"):
        fastclip.Clipper([p], 1.0).clip_with_norm_(-1.0)
    assert p.grad.tolist() == [1, 1]
