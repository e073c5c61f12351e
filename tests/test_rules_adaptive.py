"""ZClip, AutoClip and AdaGC: rules that remember."""

import copy
import io
import math
import os

import numpy as np
import pytest
import torch
from cases import clipping, parameter
from rule_cases import CLOSE

import fastclip
from fastclip.rules import AdaGC, AutoClip, Except, GlobalNorm, Mask, Only, Value, ZClip

pytestmark = pytest.mark.usefixtures("one_thread")

UNIT = [torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64), torch.tensor([[0.8], [-0.6]], dtype=torch.float64)]
SHARES = (0.28, 0.96)  # of the total norm


def recorded(name):
    random = np.random.default_rng(0)
    steady = 1 + 0.1 * random.standard_normal(70)
    if name == "steady":
        return steady
    if name == "spikes":
        return np.where(np.arange(70) % 9 == 8, 30 * steady, steady)
    if name == "plateau":
        return np.concatenate([np.full(40, 0.5), np.full(20, 2.0), np.full(10, 0.5)])
    if name == "zeros":
        return np.where(np.arange(70) % 5 == 1, 0.0, steady)
    if name == "nothing but zeros":
        return np.concatenate([np.zeros(35), steady[:20]])
    if name == "extremes":
        return 10.0 ** random.uniform(-30, 30, 70)
    if name == "broken":  # NaN and inf from the first step on
        norms = steady * random.choice([1.0, 1.0, 1.0, 8.0], 70)
        norms[[0, 3, 11, 30, 50]] = math.nan
        norms[[1, 17, 29, 31, 60]] = math.inf
        return norms
    raise KeyError(name)


RECORDED = ("steady", "spikes", "plateau", "zeros", "nothing but zeros", "extremes", "broken")


def with_norm(norm, dtype=torch.float64):
    """Two parameters whose gradients together have this norm."""
    ps = []
    for unit, share in zip(UNIT, SHARES):
        gradient = unit * share * norm if math.isfinite(norm) else unit * share
        if not math.isfinite(norm) and not ps:
            gradient = gradient.clone()
            gradient.flatten()[0] = norm
        ps.append(parameter(gradient.to(dtype)))
    return ps


def run(clipper, ps, norms):
    """The norms of the two gradients after each clip, and the limits."""
    after, limits = [], []
    for norm in norms:
        for p, fresh in zip(ps, with_norm(norm)):
            p.grad = fresh.grad
        stats = clipper.clip_()
        after.append([p.grad.norm().item() for p in ps])
        limits.append(math.nan if stats.limit is None else stats.limit.item())
    return np.array(after), np.array(limits)


def clipped(norm, limit):
    """torch's formula: the norm after a clip to `limit`."""
    if math.isinf(limit):
        return norm
    return norm * min(1.0, limit / (norm + 1e-6)) if math.isfinite(norm) else math.nan


def usable(norm):
    """Whether a norm may be remembered."""
    return math.isfinite(norm) and norm > 0


def zclip(norms, z_max=2.5, alpha=0.97, warmup=25, eps=1e-6):
    seen, after = [], []
    mean = var = None
    for norm in norms:
        out = norm
        if mean is None:
            if usable(norm):
                seen.append(norm)
        else:
            z = (norm - mean) / spread if (spread := math.sqrt(var) + eps) else math.inf * float(np.sign(norm - mean))
            fed = norm
            if z > z_max:
                fed = mean + z_max * math.sqrt(var) / (z / z_max)
                out = clipped(norm, fed)
            if usable(norm):
                mean = alpha * mean + (1 - alpha) * fed
                var = alpha * var + (1 - alpha) * (fed - mean) ** 2
        if mean is None and len(seen) == warmup:
            mean, var = np.mean(seen), np.var(seen)
        after.append(out)
    return np.array(after)


def autoclip(norms, percentile=10.0, window=1000):
    history, after = [], []
    for norm in norms:
        if usable(norm):
            history = [*history, norm][-window:]
        after.append(clipped(norm, np.percentile(history, percentile)) if history else norm)
    return np.array(after)


def adagc(norms, lambda_rel=1.05, beta=0.98, warmup=100, lambda_abs=1.0):
    """For each of two tensors, of which only the first is ever broken."""
    gamma, count, after = [0.0, 0.0], 0, []
    for norm in norms:
        each = [share * norm if math.isfinite(norm) else norm if i == 0 else share for i, share in enumerate(SHARES)]
        warming = count < warmup
        out = []
        for i, n in enumerate(each):
            if warming:
                share = min(1.0, lambda_abs / (norm + 1e-6)) if math.isfinite(norm) else math.nan
                cut = n * share
            else:
                cut = clipped(n, lambda_rel * gamma[i]) if gamma[i] > 0 else n
            if math.isfinite(cut) and cut > 0:
                old = gamma[i]
                gamma[i] = cut if old == 0 else min(old, cut) if warming else beta * old + (1 - beta) * cut
            out.append(cut)
        count += usable(norm)
        after.append(out)
    return np.array(after)


ZCLIPS = {"default": {}, "slow": {"z_max": 1.0, "alpha": 0.9, "warmup": 3}, "at once": {"warmup": 1, "eps": 0.0}}
AUTOCLIPS = {
    "default": {},
    "median": {"percentile": 50, "window": 16},
    "last": {"window": 1},
    "max": {"percentile": 100},
}
ADAGCS = {"default": {}, "short": {"warmup": 5}, "no warm-up": {"warmup": 0, "lambda_rel": 2.0, "beta": 0.5}}


def assert_norms(actual, expected):
    # what an infinite norm leaves is NaN somewhere, with torch's formula: g * 0
    np.testing.assert_allclose(actual, expected, rtol=CLOSE, atol=0)


@pytest.mark.parametrize("options", ZCLIPS)
@pytest.mark.parametrize("name", RECORDED)
def test_zclip(name, options):
    norms = recorded(name)
    rule = ZClip(**ZCLIPS[options])
    ps = with_norm(0.0)
    after, limits = run(fastclip.Clipper(ps, rule), ps, norms)
    finite = np.isfinite(norms)
    expected = zclip(norms, **ZCLIPS[options])
    assert_norms(np.hypot(*after.T)[finite], expected[finite])
    hit = finite & (expected < norms * (1 - 1e-9))
    np.testing.assert_allclose(expected[hit], limits[hit] * norms[hit] / (norms[hit] + 1e-6), rtol=CLOSE)
    assert (norms[finite & ~hit] <= limits[finite & ~hit] * (1 + 1e-6)).all()


@pytest.mark.parametrize("options", AUTOCLIPS)
@pytest.mark.parametrize("name", RECORDED)
def test_autoclip(name, options):
    norms = recorded(name)
    ps = with_norm(0.0)
    after, limits = run(fastclip.Clipper(ps, AutoClip(**AUTOCLIPS[options])), ps, norms)
    finite = np.isfinite(norms)
    assert_norms(np.hypot(*after.T)[finite], autoclip(norms, **AUTOCLIPS[options])[finite])
    assert (limits[np.cumsum(finite & (norms > 0)) > 0] < math.inf).all()


@pytest.mark.parametrize("options", ADAGCS)
@pytest.mark.parametrize("name", RECORDED)
def test_adagc(name, options):
    norms = np.concatenate([recorded(name), recorded(name)])
    ps = with_norm(0.0)
    after, _ = run(fastclip.Clipper(ps, AdaGC(**ADAGCS[options])), ps, norms)
    expected = adagc(norms, **ADAGCS[options])
    finite = np.isfinite(norms)
    assert_norms(after[finite], expected[finite])
    gone_through = ~np.isfinite(norms) & np.isfinite(expected[:, 1])
    assert_norms(after[gone_through, 1], expected[gone_through, 1])  # one broken tensor is nothing to the other


ADAPTIVE = {
    "ZClip": lambda: ZClip(warmup=5),
    "AutoClip": lambda: AutoClip(30, window=12),
    "AdaGC": lambda: AdaGC(warmup=7),
    "one after the other": lambda: [Mask(1e-9), ZClip(warmup=4), AutoClip(80), GlobalNorm(1.0)],
    "only some": lambda: [Except(ZClip(warmup=4), with_names[0]), Only(AdaGC(warmup=3), with_names[1])],
    "a schedule": lambda: GlobalNorm(lambda step: 0.1 * (step + 1)),
}
with_names = ("first", "second")


@pytest.mark.parametrize("rule", ADAPTIVE)
@pytest.mark.parametrize("name", ["spikes", "broken"])
def test_saved_and_loaded_in_the_middle(rule, name):
    """30 steps are 15, a checkpoint through a file, and 15 more; bit by bit."""
    norms = recorded(name)[:30]

    def clipper(ps):
        return fastclip.Clipper(list(zip(with_names, ps)), ADAPTIVE[rule](), nonfinite="skip")

    ps = with_norm(0.0)
    straight = run(clipper(ps), ps, norms)
    first = clipper(ps)
    halves = [run(first, ps, norms[:15])]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = clipper(ps)
    run(second, ps, recorded("extremes")[:3])  # what it remembers is then replaced
    second.load_state_dict(torch.load(file))
    halves.append(run(second, ps, norms[15:]))
    for whole, parts in zip(straight, zip(*halves)):
        np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert second.steps == 30
    assert (second.skips is None or second.skips.item()) == (~np.isfinite(norms)).sum()


def test_a_state_that_does_not_fit():
    ps = with_norm(1.0)
    clipper = fastclip.Clipper(ps, [ZClip(), AutoClip(window=4)])
    run(clipper, ps, [1.0, 2.0])
    before = copy.deepcopy(clipper.state_dict())

    def of(*rules):
        other = fastclip.Clipper(ps, list(rules))
        other.clip_()
        return other.state_dict()

    for state, message in (
        (of(ZClip()), "has 1 rules, and this Clipper 2"),
        (
            of(AutoClip(window=4), ZClip()),
            r"holds count, history for ZClip\(.*remembers count, mean, var\. .* saved by AutoClip",
        ),
        (of(ZClip(), AutoClip(window=5)), "'history' must be of shape \\(5,\\) for AutoClip.*, got \\(6,\\)"),
        (of(ZClip(), ZClip()), r"for AutoClip\("),
    ):
        with pytest.raises(ValueError, match=message):
            clipper.load_state_dict(state)
        torch.testing.assert_close(clipper.state_dict(), before, rtol=0, atol=0)
    other, state = fastclip.Clipper(ps, 1.0), of(ZClip())
    with pytest.raises(ValueError, match=r"which has no state\. It was saved by ZClip: use that rule, or put {} in"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved by ZClip: use that rule"):
        fastclip.Clipper(ps, Only(AdaGC(), ps[:1])).load_state_dict(state)
    other.load_state_dict({**state, "rules": [{}]})
    assert other.steps == 1


def test_a_state_is_loaded_where_it_was():
    """A CUDA graph knows the memory that the statistics are in."""
    ps = with_norm(1.0)
    clipper = fastclip.Clipper(ps, ZClip())
    run(clipper, ps, [1.0, 2.0])
    saved = clipper.state_dict()
    places = {name: t.data_ptr() for name, t in clipper.rules[0].state.items()}
    run(clipper, ps, [3.0])
    clipper.load_state_dict(saved)
    assert {name: t.data_ptr() for name, t in clipper.rules[0].state.items()} == places
    assert clipper.rules[0].state["mean"].item() == pytest.approx(1.5)
    assert saved["rules"][0]["mean"].data_ptr() not in places.values()  # a copy


def test_adagc_when_parameters_come_and_go():
    ps = with_norm(1.0)
    rule = AdaGC(warmup=0)
    run(fastclip.Clipper(ps, rule), ps, [1.0])
    assert rule.state["gamma"].tolist() == pytest.approx(SHARES)
    ps[0].grad = None  # it keeps what it has
    stats = fastclip.Clipper(ps, rule).clip_()
    assert stats.coef.shape == (1,)
    assert rule.state["gamma"][0].item() == pytest.approx(SHARES[0])
    more = [*with_norm(1.0), parameter(torch.tensor([5.0]))]
    stats = fastclip.Clipper(more, rule).clip_()
    assert stats.coef.tolist() == [1, 1, 1]  # known norms, and a new one
    assert rule.state["gamma"].tolist() == pytest.approx([*SHARES, 5.0])
    fewer = with_norm(3.0)[:1]
    stats = fastclip.Clipper(fewer, rule).clip_()
    assert stats.coef.tolist() == pytest.approx(
        [1.05 * SHARES[0] / (3 * SHARES[0] + 1e-6)], rel=clipping(torch.float32)
    )
    assert len(rule.state["gamma"]) == 3


@pytest.mark.parametrize("rule", [ZClip, AutoClip, AdaGC])
def test_no_gradients_teach_nothing(rule):
    clipper = fastclip.Clipper([], rule())
    stats = clipper.clip_()
    assert stats.total_norm.item() == 0 and not stats.clipped
    assert clipper.rules[0].state == {}


@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC", "only some"])
def test_a_step_of_zeros_teaches_nothing(rule):
    """As torch.distributed.checkpoint takes one, before it loads and so perhaps first of all."""
    norms = recorded("steady")[:20]
    ps, qs = with_norm(0.0), with_norm(0.0)
    one, other = (fastclip.Clipper(list(zip(with_names, side)), ADAPTIVE[rule]()) for side in (ps, qs))
    for k, norm in enumerate(norms):
        if k in (0, 1, 9, 15):
            run(one, ps, [0.0])
        for found, expected in zip(run(one, ps, [norm]), run(other, qs, [norm])):
            np.testing.assert_array_equal(found, expected)
    assert one.steps == other.steps + 4
    torch.testing.assert_close(one.state_dict()["rules"], other.state_dict()["rules"], rtol=0, atol=0)


@pytest.mark.parametrize("modes", ["inference first", "inference second", "loaded in inference"])
@pytest.mark.parametrize("rule", ADAPTIVE)
def test_inference_mode_may_come_first_or_later(rule, modes):
    norms = recorded("broken")[:24]
    named_norms = lambda ps: list(zip(with_names, ps))  # noqa: E731
    ps, qs = with_norm(0.0), with_norm(0.0)
    expected = fastclip.Clipper(named_norms(qs), ADAPTIVE[rule](), nonfinite="zero")
    clipper = fastclip.Clipper(named_norms(ps), ADAPTIVE[rule](), nonfinite="zero")
    if modes == "loaded in inference":
        run(clipper, ps, norms[:3]), run(expected, qs, norms[:3])
        with torch.inference_mode():
            saved = clipper.state_dict()
            clipper = fastclip.Clipper(named_norms(ps), ADAPTIVE[rule](), nonfinite="zero")
            clipper.load_state_dict(saved)
    optimizers = [torch.optim.SGD(side, lr=0.0) for side in (ps, qs)]
    for part in range(4):
        with torch.inference_mode((part % 2 == 0) == (modes == "inference first")):
            run(clipper, ps, norms[6 * part : 6 * part + 6])
            clipper.step(optimizers[0], when=part != 1)
    for part in range(4):
        run(expected, qs, norms[6 * part : 6 * part + 6])
        expected.step(optimizers[1], when=part != 1)
    torch.testing.assert_close(clipper.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert clipper.skips.item() == 1 and not clipper.skips.is_inference() and not clipper.zeroed.is_inference()


def test_adagc_meets_more_parameters_in_inference_mode():
    ps, rule = with_norm(1.0), AdaGC(warmup=0)
    fastclip.Clipper(ps[:1], rule).clip_()
    with torch.inference_mode():
        fastclip.Clipper(ps, rule).clip_()
    fastclip.Clipper(ps, rule).clip_()
    assert rule.state["gamma"].tolist() == pytest.approx(SHARES)


@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC"])
def test_adaptive_rules_inside_a_step(rule):
    """Fed to an optimizer they give what clipping in place gives, and a skipped step is as if it had not been."""
    norms = [n for n in recorded("broken")[:40] if not math.isnan(n)]
    a, b = with_norm(0.0), with_norm(0.0)
    one, other = (fastclip.Clipper(ps, ADAPTIVE[rule](), nonfinite="skip") for ps in (a, b))
    fed, plain = fastclip.optim.AdamW(a, lr=0.1), torch.optim.AdamW(b, lr=0.1)
    for norm in norms:
        for ps in (a, b):
            for p, fresh in zip(ps, with_norm(norm)):
                p.grad = fresh.grad
        assert bool(one.step(fed).skipped) == math.isinf(norm)
        if not other.clip_().skipped:
            plain.step()
    torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)
    assert one.skips.item() == np.isinf(norms).sum()


def test_an_optimizers_checkpoint_holds_what_its_rule_remembers():
    norms = recorded("spikes")[:30]

    def optimizer(ps):
        return fastclip.optim.SGD(ps, lr=0.1, momentum=0.9, max_norm=ZClip(warmup=4))

    def take(optimizer, ps, norms):
        for norm in norms:
            for p, fresh in zip(ps, with_norm(norm)):
                p.grad = fresh.grad
            optimizer.step()

    a, b = with_norm(0.0), with_norm(0.0)
    straight, first, second = optimizer(a), optimizer(b), optimizer(b)
    take(straight, a, norms)
    take(first, b, norms[:15])
    second.load_state_dict(first.state_dict())
    take(second, b, norms[15:])
    for p, q in zip(a, b):
        assert torch.equal(p, q)
    torch.optim.SGD(b, lr=0.1, momentum=0.9).load_state_dict(first.state_dict())
    before = copy.deepcopy(second.clipper.state_dict())
    with pytest.raises(ValueError, match="param"):
        second.load_state_dict({**first.state_dict(), "param_groups": []})
    torch.testing.assert_close(second.clipper.state_dict(), before, rtol=0, atol=0)
    others = first.state_dict()
    others["param_groups"][0]["clipper"]["rules"] = [{"count": torch.ones(()), "history": torch.ones(3)}]
    with pytest.raises(ValueError, match="remembers count, mean, var"):
        second.load_state_dict(others)


@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC", "after a Value"])
def test_a_skipped_step_teaches_nothing(rule):
    make = ADAPTIVE.get(rule, lambda: [Value(1e9), ZClip(warmup=2)])
    ps, qs = with_norm(0.0), with_norm(0.0)
    one, other = fastclip.Clipper(ps, make()), fastclip.Clipper(qs, make())
    optimizers = [torch.optim.SGD(side, lr=0.0) for side in (ps, qs)]
    for step, norm in enumerate(recorded("spikes")[:30]):
        for p, q, fresh in zip(ps, qs, with_norm(norm)):
            p.grad, q.grad = fresh.grad.clone(), fresh.grad.clone()
        taken = step % 3 != 1
        one.step(optimizers[0], when=taken, divide_by=4)
        if taken:
            other.step(optimizers[1], divide_by=4)
    torch.testing.assert_close(one.state_dict()["rules"], other.state_dict()["rules"], rtol=0, atol=0)
    assert one.skips.item() == 10


def test_loading_nothing_begins_anew_where_it_was():
    ps = with_norm(1.0)
    clipper = fastclip.Clipper(ps, [ZClip(), AutoClip(window=3), AdaGC()], nonfinite="skip")
    empty = clipper.state_dict()
    run(clipper, ps, [1.0, 2.0, 3.0, math.nan])
    places = [{name: t.data_ptr() for name, t in rule.state.items()} for rule in clipper.rules]
    skips = clipper.skips.data_ptr()
    clipper.load_state_dict(empty)
    assert [{name: t.data_ptr() for name, t in rule.state.items()} for rule in clipper.rules] == places
    assert clipper.skips.data_ptr() == skips and clipper.skips.item() == 0 and clipper.steps == 0
    other = fastclip.Clipper(ps, [ZClip(), AutoClip(window=3), AdaGC()], nonfinite="skip")
    np.testing.assert_array_equal(run(clipper, ps, recorded("spikes"))[0], run(other, ps, recorded("spikes"))[0])


def test_a_state_of_another_shape_or_order():
    ps = with_norm(1.0)
    clipper = fastclip.Clipper(ps, ZClip())
    run(clipper, ps, [1.0, 2.0])
    saved = clipper.state_dict()
    backwards = dict(reversed(saved["rules"][0].items()))
    clipper.load_state_dict({**saved, "rules": [backwards]})
    assert clipper.rules[0].state["mean"].item() == pytest.approx(1.5)
    with pytest.raises(ValueError, match=r"'mean' must be of shape \(\) .* got \(3,\)"):
        clipper.load_state_dict({**saved, "rules": [{**backwards, "mean": torch.ones(3)}]})


@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_gradient_is_refused_before_anything_is_remembered(rule, value):
    ps = with_norm(1.0)
    clipper = fastclip.Clipper(zip(with_names, ps), ADAPTIVE[rule](), nonfinite="raise")
    clipper.clip_()
    before = copy.deepcopy(clipper.state_dict())
    ps[1].grad[1, 0] = value
    with pytest.raises(RuntimeError, match=r"second \(1 of 2\); nothing was changed"):
        clipper.clip_()
    torch.testing.assert_close(clipper.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ,
    reason="torch.compile goes by what the CPU has, and at::vec, which its code uses, by this: it leaves elements out",
)
@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC"])
def test_compiled_into_few_kernels(rule, monkeypatch):
    """What a GPU runs: torch.compile takes the lines whole, and they give the same."""
    from torch._inductor import metrics

    from fastclip.rules import adaptive

    norms = recorded("broken")[:30]
    ps = with_norm(0.0)
    expected = run(fastclip.Clipper(ps, ADAPTIVE[rule]()), ps, norms)
    compiled = {}

    def fused(function, *arguments):
        if function not in compiled:
            torch._dynamo.reset()
            metrics.reset()
            compiled[function] = torch.compile(function, fullgraph=True)
        return compiled[function](*arguments)

    monkeypatch.setattr(adaptive, "fused", fused)
    actual = run(fastclip.Clipper(ps, ADAPTIVE[rule]()), ps, norms)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=CLOSE)
    assert 1 <= metrics.generated_kernel_count <= 4
