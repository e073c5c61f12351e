"""Every rule against its formula, in float64; the adaptive ones on recorded norms, and saved in the middle."""

import copy
import fnmatch
import gc
import importlib.util
import io
import itertools
import math
import pathlib
import pickle
import runpy
import time
import types
import weakref

import numpy as np
import pytest
import torch
from cases import (
    NORM_ERROR,
    assert_agrees,
    assert_scaled,
    clip_factor,
    clipping,
    parameter,
    rounding,
    tensor_norm,
    total_norm,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fastclip
from fastclip.rules import AGC, AdaGC, AutoClip, BlockRMS, Except, GlobalNorm, Mask, Only, TensorNorm, Value, ZClip
from fastclip.rules.coefficients import clip_coefficient

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


# ---- the published formulas, on lists of numbers ----


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


# Gradients, rules and oracles here are float64. A hundred steps of a running mean are off by less than 1e-14; a
# z-score, the difference of numbers near 1 divided by at least 1e-6, makes that 1e-8.
CLOSE = 1e-8


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


def test_names_from_an_optimizers_groups():
    ps = named()
    groups = [{"params": list(ps.items())[:2]}, {"params": list(ps.items())[2:]}]
    optimizer = fastclip.optim.SGD(groups, lr=0.0, max_norm=Only(0.5, "head.*"))
    optimizer.step()
    norm = tensor_norm(ps["head.weight"].grad)
    assert optimizer.stats.names == tuple(ps)
    coefs = [1, 1, 1, clip_factor(norm, 0.5)]
    assert optimizer.stats.coef.tolist() == pytest.approx(coefs, rel=clipping(torch.float32))
    with pytest.raises(ValueError, match="is called 'tail'"):
        fastclip.optim.SGD(groups, lr=0.0, max_norm=Only(0.5, "tail"))


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


# ---- rules without a memory ----


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, math.inf])
def test_block_rms(backend, threshold):
    ps = [
        parameter(t)
        for t in (torch.randn(30, 7), torch.zeros(4), torch.full((5,), 1e19), torch.randn(0), torch.ones(()))
    ]
    expected = []
    for p in ps:
        g = p.grad.double()
        rms = g.square().mean().sqrt() if g.numel() else torch.zeros(())
        expected.append(g.clone() if rms <= threshold else g * (threshold / rms))
    fastclip.Clipper(ps, BlockRMS(threshold)).clip_()
    assert_scaled([p.grad for p in ps], expected, [1.0] * len(ps))


def test_block_rms_when_parameters_grow():
    """Parameters whose memory is replaced by more of it, as densification does."""
    ps = [parameter(torch.full((4,), 2.0)), parameter(torch.full((2, 3), 2.0))]
    clipper = fastclip.Clipper(ps, [Only(BlockRMS(1.0), ps[:1]), Except(BlockRMS(0.5), ps[:1])])
    for size, dtype in ((4, torch.float32), (9, torch.float32), (2, torch.float64), (70_000, torch.float32)):
        for p, shape in zip(ps, ((size,), (size, 3))):
            p.grad = None
            p.data = torch.zeros(shape, dtype=dtype)
            p.grad = torch.full(shape, 2.0, dtype=dtype)
        clipper.clip_()
        for p, limit in zip(ps, (1.0, 0.5)):
            torch.testing.assert_close(p.grad, torch.full_like(p, limit), rtol=1e-6, atol=0)


def test_block_rms_counts_what_a_sparse_gradient_leaves_out():
    p, q, z = torch.nn.Parameter(torch.zeros(4, 2)), parameter(torch.ones(3)), parameter(torch.full((5,), 2j))
    p.grad = torch.sparse_coo_tensor([[1, 1]], torch.full((2, 2), 2.0), (4, 2), check_invariants=True)
    rms = math.sqrt(2 * 16 / 8)
    fastclip.Clipper([p, q, z], BlockRMS(0.5)).clip_()
    torch.testing.assert_close(p.grad.to_dense()[1], torch.full((2,), 4 * 0.5 / rms), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.grad, torch.full((3,), 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(z.grad, torch.full((5,), 0.5j), rtol=1e-6, atol=0)


def agc(weights, gradients, clip_factor=0.01, eps=1e-3):
    """In float64, unit by unit."""
    result = []
    for w, g in zip(weights, gradients):
        units = range(w.shape[0]) if w.dim() > 1 else [...]
        g = g.double().clone()
        for u in units:
            norm, limit = g[u].norm(), clip_factor * max(w[u].double().norm().item(), eps)
            if norm > limit:
                g[u] *= limit / max(norm.item(), 1e-6)
        result.append(g)
    return result


def agc_error(dtype):
    """The factor is a quotient of two norms."""
    return 2 * NORM_ERROR + rounding(dtype)


def agc_parameters(dtype=torch.float32):
    torch.manual_seed(1)
    shapes = [(16, 9), (8, 3, 3, 3), (7,), (), (1, 5), (4, 1), (3, 0), (0, 3), (0,), (2, 70_000)]
    ps = [parameter(torch.randn(s).mul(0.05).to(dtype), torch.randn(s).to(dtype)) for s in shapes]
    with torch.no_grad():
        ps[0][3] = 0  # its limit is eps
        ps[0].grad[5] = 0
        ps[1][:4] *= 100  # unclipped
    return ps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_agc(backend, dtype):
    ps = agc_parameters(dtype)
    before = [p.grad.clone() for p in ps]
    expected = agc([p.detach() for p in ps], before)
    stats = fastclip.Clipper(ps, AGC()).clip_()
    assert_scaled([p.grad for p in ps], expected, [1.0] * len(ps), relative=agc_error(dtype))
    assert torch.equal(ps[1].grad[:4], before[1][:4])
    assert stats.clipped


def test_agc_in_other_layouts(backend):
    """Rows that are no pieces of memory, and gradients laid out otherwise than their parameters."""
    torch.manual_seed(0)
    ps = [
        parameter(torch.randn(6, 5), torch.randn(5, 6).t()),
        parameter(torch.randn(5, 6).t(), torch.randn(6, 5)),
        parameter(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        parameter(torch.randn(40, 9)[:, ::2], torch.randn(40, 5)),
    ]
    for chosen in (ps, ps[2:3], ps[:1], ps[3:]):
        for p in chosen:
            p.grad = torch.randn(p.shape).to(memory_format=torch.preserve_format) if p is ps[2] else p.grad
        expected = agc([p.detach() for p in chosen], [p.grad for p in chosen])
        fastclip.Clipper(chosen, AGC()).clip_()
        assert_scaled([p.grad for p in chosen], expected, [1.0] * 4, relative=agc_error(torch.float32))


def test_agc_leaves_the_head_alone():
    def make():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 2)})
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model

    model = make()
    expected = agc([p.detach() for p in model["body"].parameters()], [p.grad for p in model["body"].parameters()])
    for exclude in ("head.*", ["head.weight", "head.b*"], lambda m: list(m["head"].parameters())):
        model = make()
        rule = AGC(exclude=exclude(model) if callable(exclude) else exclude)
        fastclip.Clipper(model.named_parameters(), [Mask(0.0), rule]).clip_()
        body = [p.grad for p in model["body"].parameters()]
        assert_scaled(body, expected, [1.0] * 2, relative=agc_error(torch.float32))
        for p, q in zip(model["head"].parameters(), make()["head"].parameters()):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 0.0), (math.inf, 1.0)])
def test_agc_at_its_ends(backend, factor, expected):
    ps = [parameter(torch.ones(3, 2)), parameter(torch.ones(5))]
    stats = fastclip.Clipper(ps, AGC(factor)).clip_()
    assert all((p.grad == expected).all() for p in ps) and stats.clipped.item() == (expected == 0)
    assert not fastclip.Clipper([], AGC(factor)).clip_().clipped


def test_agc_with_broken_gradients():
    w = torch.ones(3, 2)
    p = parameter(torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 1.0]]), w)
    fastclip.Clipper([p], AGC()).clip_()
    assert p.grad[0].isnan().tolist() == [True, False] and p.grad[1].isnan().tolist() == [True, False]
    assert p.grad[1, 1] == 0 and tensor_norm(p.grad[2]) == pytest.approx(
        0.01 * math.sqrt(2), rel=agc_error(torch.float32)
    )
    p = parameter(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), torch.ones(2, 2))
    stats = fastclip.Clipper([p], AGC(), nonfinite="skip").clip_()
    assert stats.skipped and p.grad[1].tolist() == [1, 1]


def installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(not installed("timm"), reason="needs timm: pip install '.[oracles]'")
def test_agc_as_timm_has_it():
    folder = pathlib.Path(importlib.util.find_spec("timm").origin).parent  # the one file, without timm's models
    theirs = runpy.run_path(str(folder / "utils" / "agc.py"))
    ps, qs = ([p for p in agc_parameters() if p.numel() and p.dim()] for _ in range(2))
    qs = [parameter(*wide([q.grad, q])) for q in qs]
    fastclip.Clipper(ps, AGC(0.02, eps=1e-2)).clip_()
    theirs["adaptive_clip_grad"](qs, clip_factor=0.02, eps=1e-2)
    assert_scaled([p.grad for p in ps], [q.grad for q in qs], [1.0] * len(ps), relative=agc_error(torch.float32))


@pytest.mark.skipif(not installed("optax"), reason="needs optax: pip install '.[oracles]'")
def test_block_rms_as_optax_has_it():
    import optax

    ps = [p for p in agc_parameters() if p.numel()]
    transform = optax.clip_by_block_rms(0.03)
    before = wide(p.grad for p in ps)
    exact = [g / max(1.0, g.square().mean().sqrt().item() / 0.03) for g in before]
    theirs, _ = transform.update([p.grad.numpy().copy() for p in ps], transform.init(None))
    fastclip.Clipper(ps, BlockRMS(0.03)).clip_()
    for p, q, e in zip(ps, theirs, exact):
        assert_agrees(p.grad, torch.from_numpy(np.array(q)), e, clipping(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "limits", [(-0.5, 1.0), (0.25, 0.5), (-2.0, -1.0), (-math.inf, 0.0), (-0.1, math.inf), (0.0, 0.0)]
)
def test_value_between_two_limits(backend, limits, dtype):
    torch.manual_seed(0)
    gradient = torch.cat([torch.randn(1003), torch.tensor([math.nan, math.inf, -math.inf, 0.0])]).to(dtype)
    p, quiet = (
        parameter(gradient.clone()),
        parameter(torch.full((9,), max(limits[0], min(limits[1], 0.0)), dtype=dtype)),
    )
    stats = fastclip.Clipper([p, quiet], Value(*limits)).clip_()
    assert torch.equal(p.grad.nan_to_num(7), gradient.clamp(*limits).nan_to_num(7))
    assert stats.clipped
    assert not fastclip.Clipper([quiet], Value(*limits)).clip_().clipped


# ---- limits that change, and parameters of which only some are meant ----


def test_a_limit_that_warms_up():
    p = parameter(torch.zeros(2))
    clipper = fastclip.Clipper([p], GlobalNorm(lambda step: 1.0 + step))
    for step in range(4):
        p.grad = torch.tensor([3.0, 4.0])
        stats = clipper.clip_() if step % 2 else clipper.step(torch.optim.SGD([p], lr=0.0))
        assert stats.limit.item() == 1.0 + step
        assert tensor_norm(p.grad) == pytest.approx(5 * clip_factor(5.0, 1.0 + step), rel=clipping(torch.float32))
    with pytest.raises(ValueError, match=r"max_norm\(0\) must be >= 0, got -1"):
        fastclip.Clipper([p], GlobalNorm(lambda step: -1)).clip_()
    assert tensor_norm(p.grad) == pytest.approx(5 * clip_factor(5.0, 4.0), rel=clipping(torch.float32))


def test_a_limit_in_a_tensor():
    p, limit = parameter(torch.zeros(2)), torch.tensor(2.0)
    clipper = fastclip.Clipper([p], GlobalNorm(limit))
    for value in (2.0, 0.5, math.inf, 0.0):
        limit.fill_(value)
        p.grad = torch.tensor([3.0, 4.0])
        assert clipper.clip_().limit.item() == value
        assert tensor_norm(p.grad) == pytest.approx(5 * clip_factor(5.0, value), rel=clipping(torch.float32))
    for value in (-1.0, math.nan):
        limit.fill_(value)
        p.grad = torch.tensor([3.0, 4.0])
        for rule in (GlobalNorm(torch.tensor(2.0)), [Value(1.0), Only(GlobalNorm(torch.tensor(2.0)), [p])]):
            clipper = fastclip.Clipper([p], rule)
            inner = clipper.rules[-1].rule if isinstance(rule, list) else rule
            inner.max_norm.fill_(value)
            with pytest.raises(ValueError, match=f"max_norm must be >= 0, got {value}"):
                clipper.clip_()
            assert p.grad.tolist() == [3, 4]
        with pytest.raises(ValueError, match=f"max_norm must be >= 0, got {value}"):
            GlobalNorm(limit)


def test_a_limit_that_nobody_has_looked_at():
    """One on a GPU: whatever it is, no gradient is turned round."""
    norm = torch.tensor([0.0, 1e-9, 5.0, math.inf, math.nan, -2.0], dtype=torch.float64)  # the last, of clip_with_norm_
    for limit, expected in (
        (-1.0, [0, 0, 0, -0.0, math.nan, 1 / (2 - 1e-6)]),
        (-math.inf, [0, 0, 0, -0.0, math.nan, 1]),
        (math.nan, [math.nan] * 3 + [-0.0] + [math.nan] * 2),
        (math.inf, [1] * 6),
        (1.0, [1, 1, 1 / (5 + 1e-6), -0.0, math.nan, 0]),
    ):
        coef = clip_coefficient(norm, torch.tensor(limit, dtype=torch.float64))
        torch.testing.assert_close(coef.tolist(), [float(e) for e in expected], rtol=1e-15, atol=0, equal_nan=True)


def named():
    torch.manual_seed(0)
    shapes = {"embed.weight": (5, 4), "body.0.weight": (4, 4), "body.0.bias": (4,), "head.weight": (3, 4)}
    return {name: parameter(torch.randn(shape)) for name, shape in shapes.items()}


def test_a_limit_for_each_group(backend):
    """Each group of parameters to a limit of its own; the excluded ones neither counted nor touched."""
    ps = named()
    before = {name: p.grad.double() for name, p in ps.items()}
    muon = [ps["body.0.weight"]]
    rule = [Only(GlobalNorm(0.5), muon), Except(GlobalNorm(1.0), ["body.0.weight", "embed.*"])]
    stats = fastclip.Clipper(ps.items(), rule).clip_()
    rest = ["body.0.bias", "head.weight"]
    norm = total_norm([before[name] for name in rest])
    factors = {"body.0.weight": clip_factor(tensor_norm(before["body.0.weight"]), 0.5), "embed.weight": 1.0}
    assert torch.equal(ps["embed.weight"].grad.double(), before["embed.weight"])
    for name, p in ps.items():
        assert_scaled([p.grad], [before[name]], [factors.get(name, clip_factor(norm, 1.0))])
    assert stats.limit is None
    assert stats.total_norm.item() == pytest.approx(total_norm(before.values()), rel=NORM_ERROR)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab.*?[]!-\n", max_size=5), min_size=1, max_size=4),
    st.lists(st.text("ab.[]*!-\n", max_size=4), min_size=1, max_size=8, unique=True),
)
def test_which_names_are_meant(patterns, names):
    """As fnmatch.fnmatchcase has it; and a pattern that means none is refused."""
    ps = [(name, parameter(torch.ones(1))) for name in names]
    meant = [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in names]
    for rule, expected in ((Only(0.0, patterns), meant), (Except(0.0, patterns), [not m for m in meant])):
        if all(any(fnmatch.fnmatchcase(name, pattern) for name in names) for pattern in patterns):
            coef = fastclip.Clipper(ps, rule).clip_().coef
            assert coef.expand(len(names)).tolist() == [0.0 if m else 1.0 for m in expected]
        else:
            with pytest.raises(ValueError, match="no parameter is called"):
                fastclip.Clipper(ps, rule)


def test_long_lists_of_names_take_no_time():
    ps = [(f"layers.{i}.weight", parameter(torch.ones(1))) for i in range(3000)]
    names = [name for name, _ in ps[:1500]]
    begin = time.process_time()
    coef = fastclip.Clipper(ps, Only(0.0, names)).clip_().coef
    assert time.process_time() - begin < 1  # name by name it was three times that
    assert coef.tolist() == [0.0] * 1500 + [1.0] * 1500


@pytest.mark.parametrize(
    "rule", [TensorNorm(0.1), Value(0.1), Value(-0.1, 0.2), Mask(9.0), AGC(0.1), BlockRMS(0.1), 0.1]
)
def test_any_rule_for_some(rule):
    ps, alone = named(), named()
    before = {name: p.grad.clone() for name, p in ps.items()}
    fastclip.Clipper(ps.items(), [Except(rule, "body.*")]).clip_()
    fastclip.Clipper([alone["embed.weight"], alone["head.weight"]], rule).clip_()
    for name, p in ps.items():
        assert torch.equal(p.grad, before[name] if name.startswith("body") else alone[name].grad)


def test_some_of_them_without_a_gradient():
    ps = named()
    ps["embed.weight"].grad = None
    norm = tensor_norm(ps["head.weight"].grad)
    clipper = fastclip.Clipper(ps.items(), [Only(GlobalNorm(0.5), "embed.*"), Only(GlobalNorm(0.5), "head.*")])
    stats = clipper.clip_()
    assert stats.coef.tolist() == pytest.approx([1, 1, clip_factor(norm, 0.5)], rel=clipping(torch.float32))
    ps["embed.weight"].grad = torch.ones(5, 4)
    ps["head.weight"].grad.fill_(0.125)  # the norm is 0.433
    coefs = [clip_factor(math.sqrt(20), 0.5), 1, 1, 1]
    assert clipper.clip_().coef.tolist() == pytest.approx(coefs, rel=clipping(torch.float32))


@pytest.mark.parametrize("between", [Value(1.0), AGC(1e9), TensorNorm(1.0)], ids=str)
@pytest.mark.parametrize("make", [fastclip.optim.SGD, torch.optim.SGD])
def test_what_is_held_stays_so_whatever_comes_after(make, between):
    ps = [parameter(torch.full((2,), scale), torch.ones(2)) for scale in (1e-6, 1.0)]
    optimizer = make(ps, lr=0.1, weight_decay=0.5)
    fastclip.Clipper(ps, [Mask(1e-3, freeze=True), between, GlobalNorm(9.0)]).step(optimizer)
    assert ps[0].tolist() == [1, 1] and ps[1].max() < 0.9


def test_hold_for_some():
    ps = named()
    for p in ps.values():
        p.grad.mul_(1e-6)
    optimizer = fastclip.optim.SGD(ps.values(), lr=1.0, weight_decay=0.5)
    with torch.no_grad():
        for p in ps.values():
            p.fill_(1)
    fastclip.Clipper(ps.items(), Only(Mask(1e-3, freeze=True), "head.*")).step(optimizer)
    assert torch.equal(ps["head.weight"], torch.ones(3, 4))
    assert ps["embed.weight"].max() < 0.6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_list_of_rules_decides_as_one_after_the_other(data):
    """A list in one Clipper is what Clippers with one rule each do one after the other, for everything but Value's
    statistics."""
    makers = [
        lambda: Mask(0.5), lambda: TensorNorm(0.7), lambda: GlobalNorm(1.0), lambda: BlockRMS(0.3), lambda: AGC(0.1),
        lambda: Value(-0.4, 0.6), lambda: ZClip(warmup=1), lambda: AutoClip(50), lambda: AdaGC(warmup=1),
        lambda: Only(GlobalNorm(0.3), "1"), lambda: Except(TensorNorm(0.2), "0"),
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(makers), min_size=1, max_size=4))
    shapes = data.draw(st.lists(st.sampled_from([(3, 4), (5,), (2, 2, 2)]), min_size=2, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)

    def fresh():
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    weights = fresh()
    ps, qs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    as_named = [[(str(i), p) for i, p in enumerate(side)] for side in (ps, qs)]
    together = fastclip.Clipper(as_named[0], [make() for make in chosen])
    apart = [fastclip.Clipper(as_named[1], make()) for make in chosen]
    for _ in range(3):
        for p, q, g in zip(ps, qs, fresh()):
            p.grad, q.grad = g.clone(), g.clone()
        together.clip_()
        for clipper in apart:
            clipper.clip_()
        for p, q in zip(ps, qs):
            torch.testing.assert_close(p.grad, q.grad, rtol=CLOSE, atol=CLOSE)


PAIRED = {
    "GlobalNorm": lambda: GlobalNorm(1.0),
    "GlobalNorm, limit 0": lambda: GlobalNorm(0.0),
    "TensorNorm": lambda: TensorNorm(0.7),
    "BlockRMS": lambda: BlockRMS(0.3),
    "Mask": lambda: Mask(0.5),
    "Value": lambda: Value(-0.4, 0.6),
    "AGC": lambda: AGC(0.1),
    "ZClip": lambda: ZClip(warmup=1),
    "AutoClip": lambda: AutoClip(50),
    "AdaGC": lambda: AdaGC(warmup=1),
    "Only": lambda: Only(GlobalNorm(0.3), ["0", "2"]),
    "Except": lambda: Except(TensorNorm(0.2), "0"),
    "-0": lambda: lambda stats: torch.full((), -0.0, dtype=torch.float64),
}
FIRST_ELEMENTS = {"finite": 1.0, "inf": math.inf, "NaN": math.nan, "zeros": None, "squares overflow": 1e200}


@pytest.mark.parametrize("first", PAIRED)
def test_pairs_of_rules_with_broken_gradients(first):
    """Decided at once, a pair of rules does to inf, NaN and zeros what one does after the other."""

    def gradients(kinds):
        for i, kind in enumerate([*kinds, "finite"]):
            g = torch.linspace(0.2, 1.0, 3 + i, dtype=torch.float64)
            g[0] = FIRST_ELEMENTS[kind] or 0.0
            yield g * (kind != "zeros")

    for second in PAIRED:
        for kinds in itertools.product(FIRST_ELEMENTS, repeat=2):
            sides = [[(str(i), parameter(torch.zeros(3 + i, dtype=torch.float64))) for i in range(3)] for _ in range(2)]
            for p, q in zip(*sides):
                with torch.no_grad():
                    p[1].fill_(2.0), q[1].fill_(2.0)
            rules = [[PAIRED[name]() for name in (first, second)] for _ in range(2)]
            together = fastclip.Clipper(sides[0], rules[0])
            apart = [fastclip.Clipper(sides[1], rule) for rule in rules[1]]
            for now in (("finite", "finite"), kinds, ("finite", "finite")):
                for side in sides:
                    for (_, p), g in zip(side, gradients(now)):
                        p.grad = g
                together.clip_()
                for clipper in apart:
                    clipper.clip_()
                for (_, p), (_, q) in zip(*sides):  # three roundings on either side
                    same = torch.allclose(p.grad, q.grad, rtol=1e-14, atol=1e-300, equal_nan=True)
                    assert same, (second, kinds, p.grad, q.grad)


def test_gradients_that_are_shared_otherwise_than_before():
    a, b = parameter(torch.ones(2)), parameter(torch.zeros(2))
    b.grad = a.grad
    clipper = fastclip.Clipper([a, b], Only(TensorNorm(0.1), [b]))
    clipper.clip_()
    assert_scaled([a.grad], [torch.ones(2)], [clip_factor(math.sqrt(2), 0.1)])
    a.grad, b.grad = torch.ones(2), None
    clipper.clip_()
    assert a.grad.tolist() == [1, 1]


@pytest.mark.parametrize("rule", [1.0, TensorNorm(1.0), Value(1.0), ZClip(), AGC(), [Mask(0.0), 1.0]], ids=str)
def test_statistics_do_not_keep_gradients(rule):
    """They may live until the next step, and the gradients' memory is wanted before."""
    for step in (lambda c, o: c.clip_(), lambda c, o: c.step(o)):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        clipper = fastclip.Clipper([("p", p)], rule)
        stats = step(clipper, fastclip.optim.SGD([p], lr=0.1))
        alive = weakref.ref(p.grad.untyped_storage())
        p.grad = None
        gc.collect()
        assert alive() is None
        assert stats.total_norm.item() > 0
        pickle.loads(pickle.dumps(stats))


def test_complaints_come_before_anything_is_written():
    """In a list whose second rule works in place, what the later ones would complain about is found out first."""

    def limit(step):
        return math.nan if step else 1.0

    real, complex_ = parameter(torch.full((2,), 10.0)), parameter(torch.ones(2, dtype=torch.complex64))
    sparse = torch.nn.Parameter(torch.ones(4, 2))
    sparse.grad = torch.ones(4, 2).to_sparse(1)
    for ps, rule, error in (
        ([real, complex_], [GlobalNorm(1.0), Value(-0.5, 1.0)], TypeError),
        ([real, complex_], [GlobalNorm(1.0), Only(Value(-0.5, 1.0), [complex_])], TypeError),
        ([real, sparse], [GlobalNorm(1.0), AGC()], NotImplementedError),
        ([real], [Value(0.5), ZClip(), GlobalNorm(lambda step: math.nan)], ValueError),
        ([real], [Value(0.5), Except(GlobalNorm(lambda step: "x"), [real])], TypeError),
    ):
        clipper = fastclip.Clipper(ps, rule)
        with pytest.raises(error):
            clipper.clip_()
        assert real.grad.tolist() == [10, 10] and clipper.steps == 0
        assert not any(getattr(r, "state", None) for r in clipper.rules)
    clipper = fastclip.Clipper([real, complex_], [GlobalNorm(1.0), Only(Value(-0.5, 1.0), [real])])
    assert clipper.clip_().clipped


def test_a_limit_is_asked_for_once_a_step():
    asked = []

    def limit(step):
        asked.append(step)
        return 1.0

    p = parameter(torch.ones(2))
    for rules in (GlobalNorm(limit), [Mask(0.0), GlobalNorm(limit)], [Value(9.0), GlobalNorm(limit)]):
        asked.clear()
        clipper = fastclip.Clipper([p], rules)
        for step in range(3):
            assert clipper.clip_().step == step
        assert asked == [0, 1, 2]
    with pytest.raises(TypeError, match="must be a number, got a tensor"):
        fastclip.Clipper([p], GlobalNorm(lambda step: torch.ones(()))).clip_()


# ---- counts ----


def test_what_is_not_finite_is_counted(backend):
    p, q = parameter(torch.zeros(4)), parameter(torch.zeros(2, 2))
    skipping = fastclip.Clipper([p, q], 1.0, nonfinite="skip")
    zeroing = fastclip.Clipper([p, q], ZClip(warmup=1), nonfinite="zero")
    assert skipping.skips is None and zeroing.zeroed is None
    broken = torch.tensor([math.nan, 3.0, -math.inf, 4.0])
    for step in range(3):
        p.grad, q.grad = broken.clone(), torch.zeros(2, 2)
        assert skipping.clip_().skipped
        assert torch.equal(p.grad.nan_to_num(7), broken.nan_to_num(7))
        stats = zeroing.clip_()
        assert (
            p.grad.tolist() == [0, 3, 0, 4] and stats.zeroed.tolist() == [2, 0] and stats.nonfinite.tolist() == [1, 0]
        )
        assert stats.total_norm.item() == 5 and stats.tensor_absmax.tolist() == [4, 0]
        p.grad = torch.ones(4)
        assert not skipping.clip_().skipped and not zeroing.clip_().zeroed.any()
        assert skipping.skips.item() == step + 1 and zeroing.zeroed.item() == 2 * (step + 1)
    assert zeroing.rules[0].state["mean"].isfinite()


def test_counts_are_saved():
    p = parameter(torch.tensor([math.nan]))
    clipper = fastclip.Clipper([p], 1.0, nonfinite="zero")
    clipper.step(torch.optim.SGD([p], lr=0.1), when=torch.tensor(False))
    other = fastclip.Clipper([p], 1.0, nonfinite="zero")
    other.load_state_dict(clipper.state_dict())
    assert (other.steps, other.skips.item(), other.zeroed.item()) == (1, 1, 1)


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


# ---- nonsense ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AutoClip(300), ValueError, r"percentile must be in \[0, 100\], got 300"),
        (lambda: AutoClip(-1), ValueError, "percentile must be in"),
        (lambda: AutoClip(math.nan), ValueError, "percentile must be in"),
        (lambda: AutoClip(window=0), ValueError, "window must be >= 1, got 0"),
        (lambda: AutoClip(window=2.5), TypeError, "window must be an int, got float 2.5"),
        (lambda: ZClip(z_max=0), ValueError, "z_max must be > 0 and finite, got 0"),
        (lambda: ZClip(alpha=1.0), ValueError, r"alpha must be in \[0, 1\), got 1.0"),
        (lambda: ZClip(warmup=0), ValueError, "warmup must be >= 1, got 0"),
        (lambda: ZClip(eps=-1e-6), ValueError, "eps must be >= 0"),
        (lambda: AdaGC(lambda_rel=-1.05), ValueError, "lambda_rel must be > 0 and finite, got -1.05"),
        (lambda: AdaGC(beta="0.9"), TypeError, "beta must be a number, got str '0.9'"),
        (lambda: AdaGC(warmup=-1), ValueError, "warmup must be >= 1, got -1"),
        (lambda: AdaGC(lambda_abs=math.inf), ValueError, "lambda_abs must be > 0 and finite"),
        (lambda: AGC(-0.01), ValueError, "clip_factor must be >= 0, got -0.01"),
        (lambda: AGC(eps=math.nan), ValueError, "eps must be >= 0, got nan"),
        (lambda: AGC(exclude=3), TypeError, "exclude must be names or parameters, got int 3"),
        (lambda: BlockRMS(-1), ValueError, "threshold must be >= 0, got -1"),
        (lambda: Value(1.0, 0.5), ValueError, r"limit must be <= high, got 1.0 and 0.5"),
        (lambda: Value(math.nan, 0.5), ValueError, "limit must be <= high, got nan and 0.5"),
        (lambda: GlobalNorm(torch.ones(2)), ValueError, r"max_norm must be one real number, got a .* shape \(2,\)"),
        (lambda: GlobalNorm("1"), TypeError, "max_norm must be a number, got str '1'"),
        (lambda: Only(GlobalNorm(1.0), []), ValueError, "which must not be empty"),
        (lambda: fastclip.Clipper(named().items(), AGC(exclude="tail")), ValueError, "exclude: no parameter is called"),
        (lambda: Only(GlobalNorm(1.0), [3]), TypeError, "which must hold names or parameters, got int 3"),
        (lambda: Only("norm", "a"), TypeError, "rule must be a rule or a number, got str 'norm'"),
        (lambda: fastclip.Clipper(named().items(), Only(1.0, "tail.*")), ValueError, r"is called 'tail\.\*'"),
        (lambda: fastclip.Clipper(named().values(), Only(1.0, "head.*")), ValueError, "needs model.named_parameters"),
        (lambda: fastclip.Clipper(named().values(), AGC(exclude=[torch.ones(2)])), ValueError, "is no parameter"),
        (lambda: fastclip.Clipper(named().values(), [ZClip(), GlobalNorm(1.0, 1)]), ValueError, "same norm_type"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_complex_gradients_have_no_low_and_high():
    p = parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        fastclip.Clipper([p], Value(-0.5, 1.0)).clip_()


def test_repr():
    assert repr(AGC(exclude="head.*")) == "AGC(0.01, eps=0.001, exclude=['head.*'])"
    assert repr(Only(1.0, ["a", torch.ones(2, 3)])) == "Only(GlobalNorm(1.0, norm_type=2.0), ['a', (2, 3)])"
    assert repr(ZClip()) == "ZClip(z_max=2.5, alpha=0.97, warmup=25, eps=1e-06)"
    assert repr(Value(-1, 2)) == "Value(-1.0, 2.0)" and repr(BlockRMS(1)) == "BlockRMS(1.0)"


# ---- compiled ----


SETTINGS = {
    "ZClip": [ZClip(), ZClip(2.0, 0.9, 3, 0.0), ZClip(z_max=1)],
    "AutoClip": [AutoClip(), AutoClip(50, 4), AutoClip(99.5, 16)],
    "AdaGC": [AdaGC(), AdaGC(2.0, 0.5, 0, 3.0), AdaGC(warmup=2, lambda_abs=0.5)],
}


@pytest.mark.parametrize("rule", SETTINGS)
def test_a_compiler_follows_every_setting(rule, monkeypatch):
    from fastclip.rules import adaptive

    torch._dynamo.reset()
    compiled = {}

    def fused(function, *arguments):
        if function not in compiled:
            compiled[function] = torch.compile(function, fullgraph=True, backend="eager")
        return compiled[function](*arguments)

    monkeypatch.setattr(adaptive, "fused", fused)
    for setting in SETTINGS[rule]:
        for count in (1, 2, 5):
            ps = [parameter(torch.ones(2)) for _ in range(count)]
            clipper = fastclip.Clipper(ps, copy.deepcopy(setting), nonfinite="skip")
            for _ in range(3):
                clipper.clip_()


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    """At once or later: what was to be compiled changes nothing, so it can be run again."""
    from fastclip.rules import adaptive

    calls = []

    class Device:  # what fused takes for a GPU
        type = "cuda"

    class Number:
        device = Device()

    def plain(number):
        calls.append("plain")
        return (number,)

    def compiled(number):
        calls.append("compiled")
        if len(calls) > 2:
            raise ValueError("no more of this")
        return (number,)

    monkeypatch.setattr(adaptive, "capturing", lambda device: False)
    monkeypatch.setattr(adaptive, "choose", lambda device: types.SimpleNamespace(name="triton"))
    monkeypatch.setattr(adaptive, "get", lambda name: types.SimpleNamespace(why_not=lambda device: None))
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: compiled)
    number = Number()
    assert adaptive.fused(plain, number) == adaptive.fused(plain, number) == (number,)
    with pytest.warns(UserWarning, match="failed for a rule, which runs uncompiled: no more of this"):
        assert adaptive.fused(plain, number) == (number,)
    assert adaptive.fused(plain, number) == (number,)
    assert calls == ["compiled", "compiled", "compiled", "plain", "plain"]
    monkeypatch.setattr(adaptive, "capturing", lambda device: True)
    assert adaptive.fused(lambda number: (number, "anew"), number) == (number, "anew")


@pytest.mark.slow
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


def test_agc_with_a_sparse_gradient():
    p = torch.nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2).to_sparse(1)
    with pytest.raises(NotImplementedError, match="sparse"):
        fastclip.Clipper([p], AGC()).clip_()
