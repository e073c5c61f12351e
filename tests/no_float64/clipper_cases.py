"""Clipper, Stats, the optimizers and GradMonitor on the device, against the same in float64 on the CPU. Run by
tests/test_no_float64.py."""

import copy
import io
import math

import pytest
import torch
from test_conformance import RULES

import fastclip
import no_float64
from fastclip.rules import AGC, Except, GlobalNorm, Mask, Only, TensorNorm, Value, ZClip
from no_float64.twins import (
    DEVICE,
    RELATIVE,
    assert_alike,
    assert_stats_alike,
    check_number,
    give_gradients,
    host,
    twins,
)

MORE = {  # besides one of each rule
    "norm 1": lambda: GlobalNorm(5.0, 1),
    "norm inf": lambda: GlobalNorm(0.5, math.inf),
    "norm 0": lambda: GlobalNorm(2.0, 0),
    "norm 3": lambda: TensorNorm(0.5, 3),
    "a number": lambda: 1.0,
    "a limit of 0": lambda: 0.0,
    "no limit": lambda: math.inf,
    "a tensor": lambda: GlobalNorm(torch.tensor(1.5)),
    "a float64 tensor": lambda: GlobalNorm(torch.tensor(1.5, dtype=torch.float64)),
    "a function of one number": lambda: lambda stats: (1.5 / stats.total_norm).clamp(max=1.0),
    "a function of each norm": lambda: lambda stats: (0.5 / stats.tensor_norms).clamp(max=1.0),
    "two limits": lambda: Value(-0.1, 0.3),
    "AGC but for some": lambda: AGC(0.1, exclude="p[01]"),
    "a mask that freezes": lambda: Mask(0.7, freeze=True),
    "two rules": lambda: [GlobalNorm(2.0), TensorNorm(0.5)],
    "a pass between": lambda: [TensorNorm(3.0), Value(0.4), GlobalNorm(1.0), Mask(0.1)],
    "two passes and statistics": lambda: [AGC(0.5), Value(1.0), ZClip(warmup=3)],
    "some and the others": lambda: [Only(GlobalNorm(0.5), ["p1", "p3"]), Except(ZClip(warmup=2), "p[13]")],
    "some in place": lambda: [Only(Value(0.2), "p1"), Only(AGC(0.1), "p3"), 1.0],
}
ALL = {**RULES, **MORE}


def pair(rule, **options):
    """Clippers of the twins: (CPU, device), and the twins."""
    models = twins()
    return [fastclip.Clipper(model.items(), rule(), **options) for model in models], models


@pytest.mark.parametrize("name", ALL)
def test_rules(name):
    clippers, (theirs, ours) = pair(ALL[name])
    for step in range(10):
        give_gradients(step, theirs, ours)
        expected, actual = (clipper.clip_() for clipper in clippers)
        assert_stats_alike(actual, expected)
        assert_alike(ours, theirs)


@pytest.mark.parametrize("gradients_at", ["cpu", DEVICE], ids=str)
@pytest.mark.parametrize("limit_at", ["cpu", DEVICE], ids=str)
def test_a_limit_that_changes_where_it_is(limit_at, gradients_at):
    """Of which each step takes the present value, wherever limit and gradients are."""
    theirs, ours = twins()
    model = theirs if gradients_at == "cpu" else ours
    limit = torch.tensor(1.5, device=limit_at)
    clipper = fastclip.Clipper(model.items(), GlobalNorm(limit))
    for step in range(4):
        limit.fill_(1.5 - 0.2 * step)
        give_gradients(step, model)
        stats = clipper.clip_()
        limit.fill_(7.0)
        after = sum(host(p.grad).double().square().sum() for p in model.values()).sqrt()
        assert after.item() == pytest.approx(1.5 - 0.2 * step, rel=2e-6)
        assert stats.limit.item() == pytest.approx(1.5 - 0.2 * step, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_goes_on(name):
    """On the device from the device's and from the CPU's, and on the CPU from the device's."""
    clippers, (theirs, ours) = pair(ALL[name])
    for step in range(6):
        give_gradients(step, theirs, ours)
        for clipper in clippers:
            clipper.clip_()
    file = io.BytesIO()
    states = [clipper.state_dict() for clipper in clippers]
    torch.save(states[1], file)
    file.seek(0)
    for state, of in (
        (states[0], ours),
        (states[1], ours),
        (states[1], theirs),
        (torch.load(file, map_location="cpu"), ours),
    ):
        expected = copy.deepcopy(clippers[0])  # its parameters too
        resumed = fastclip.Clipper(of.items(), ALL[name]())
        resumed.load_state_dict(state)
        assert resumed.steps == 6
        for step in range(6, 9):
            reference = dict(zip(theirs, expected.parameters))
            give_gradients(step, reference, of)
            expected.clip_(), resumed.clip_()
            for key, p in reference.items():
                torch.testing.assert_close(host(of[key].grad).double(), p.grad, rtol=RELATIVE, atol=1e-30)


# ---- what is not finite, and steps that are skipped ----


@pytest.mark.parametrize(
    "rule", ["GlobalNorm", "TensorNorm", "Value", "AGC", "ZClip", "AutoClip", "AdaGC", "two rules"]
)
@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_what_is_not_finite(nonfinite, broken, rule):
    clippers, (theirs, ours) = pair(ALL[rule], nonfinite=nonfinite)
    for step in range(6):
        give_gradients(step, theirs, ours)
        if step in (2, 4):
            for model in (theirs, ours):
                model["p1"].grad[1, 2] = broken
                model["p3"].grad[:3] = -broken
        expected, actual = (clipper.clip_() for clipper in clippers)
        assert_stats_alike(actual, expected)
        assert_alike(ours, theirs)
    for count, exact in ((clippers[1].skips, clippers[0].skips), (clippers[1].zeroed, clippers[0].zeroed)):
        assert (count is None) == (exact is None)
        if count is not None:
            assert count.device.type == "cpu" and count.dtype == torch.int64 and count.item() == exact.item()


def test_raising_changes_nothing():
    model = twins()[1]
    clipper = fastclip.Clipper(model.items(), 0.5, nonfinite="raise")
    give_gradients(0, model)
    clipper.clip_()
    model["p1"].grad[1, 2] = math.inf
    before = [host(p.grad) for p in model.values()]
    with pytest.raises(RuntimeError, match=r"not finite: p1 \(1 of 15\)"):
        clipper.clip_()
    assert all(torch.equal(host(p.grad), b) for p, b in zip(model.values(), before))


def flags(value):
    return {
        "bool": value,
        "here": torch.tensor(value, device=DEVICE),
        "there": torch.tensor(value),
    }


OPTIMIZERS = {
    "SGD": lambda ps, **kw: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.01, **kw),
    "plain SGD": lambda ps, **kw: torch.optim.SGD(ps, 0.1, **kw),
    "AdamW": lambda ps, **kw: torch.optim.AdamW(ps, 0.01, **kw),
    "Adam": lambda ps, **kw: torch.optim.Adam(ps, 0.01, amsgrad=True, **kw),
}
OWN = {
    "SGD": lambda ps, **kw: fastclip.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.01, **kw),
    "SGD with dampening": lambda ps, **kw: fastclip.optim.SGD(ps, 0.1, momentum=0.9, dampening=0.1, **kw),
    "AdamW": lambda ps, **kw: fastclip.optim.AdamW(ps, 0.01, **kw),
    "AdamW with amsgrad": lambda ps, **kw: fastclip.optim.AdamW(ps, 0.01, amsgrad=True, **kw),
    "AdamW with a tensor as lr": lambda ps, **kw: fastclip.optim.AdamW(ps, torch.tensor(0.01), **kw),
}


@pytest.mark.parametrize("place", ["bool", "here", "there"])
@pytest.mark.parametrize("make", ["SGD", "AdamW", "own AdamW"])
def test_when(make, place):
    clippers, (theirs, ours) = pair(lambda: ZClip(warmup=2))
    make = OWN["AdamW"] if make == "own AdamW" else OPTIMIZERS[make]
    optimizers = [make(model.values()) for model in (theirs, ours)]
    for step in range(5):
        give_gradients(step, theirs, ours)
        before = host(list(ours.values()))
        expected = clippers[0].step(optimizers[0], when=step != 2)
        actual = clippers[1].step(optimizers[1], when=flags(step != 2)[place])
        assert_stats_alike(actual, expected)
        assert_alike(ours, theirs, "value")
        assert step != 2 or all(torch.equal(a, b) for a, b in zip(host(list(ours.values())), before))
    assert clippers[1].skips.item() == 1


@pytest.mark.parametrize(
    "divisor",
    [4, torch.tensor(4.0), torch.tensor(4), torch.tensor(4.0, device=DEVICE), torch.tensor(4, device=DEVICE)],
    ids=["number", "there", "int there", "here", "int here"],
)
@pytest.mark.parametrize("make", ["SGD", "AdamW", "own AdamW"])
def test_divide_by(make, divisor):
    clippers, (theirs, ours) = pair(lambda: 1.0)
    make = OWN["AdamW"] if make == "own AdamW" else OPTIMIZERS[make]
    optimizers = [make(model.values()) for model in (theirs, ours)]
    for step in range(4):
        give_gradients(step, theirs, ours)
        expected = clippers[0].step(optimizers[0], divide_by=4)
        assert_stats_alike(clippers[1].step(optimizers[1], divide_by=divisor), expected)
        assert_alike(ours, theirs, "value")


@pytest.mark.parametrize("rule", ["GlobalNorm", "TensorNorm", "a mask that freezes", "a pass between", "ZClip"])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {}], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_steps_of_torchs_optimizers(make, options, rule):
    """Fused ones too, which on this device, as on MPS, do not take a coefficient."""
    clippers, (theirs, ours) = pair(ALL[rule], nonfinite="skip")
    optimizers = [OPTIMIZERS[make](model.values(), **extra) for model, extra in ((theirs, {}), (ours, options))]
    for step in range(5):
        give_gradients(step, theirs, ours)
        if step == 2:
            ours["p0"].grad[0] = theirs["p0"].grad[0] = math.inf
        expected, actual = (clipper.step(optimizer) for clipper, optimizer in zip(clippers, optimizers))
        assert_stats_alike(actual, expected)
        assert_alike(ours, theirs, "value")


@pytest.mark.parametrize("rule", [None, "GlobalNorm", "TensorNorm", "a mask that freezes", "a pass between", "ZClip"])
@pytest.mark.parametrize("make", OWN)
def test_steps_of_our_optimizers(make, rule):
    theirs, ours = twins()
    rules = [ALL[rule]() if rule else None for _ in range(2)]
    policy = {"nonfinite": "skip"} if rule else {}
    optimizers = [OWN[make](model.items(), max_norm=r, **policy) for model, r in zip((theirs, ours), rules)]
    for step in range(5):
        give_gradients(step, theirs, ours)
        if rule and step == 2:
            ours["p0"].grad[0] = theirs["p0"].grad[0] = math.inf
        for optimizer in optimizers:
            optimizer.step(zero_grad=step % 2 == 0)
        if rule:
            assert_stats_alike(optimizers[1].stats, optimizers[0].stats)
        assert_alike(ours, theirs, "value")
    state = copy.deepcopy(optimizers[1].state_dict())
    resumed = OWN[make](ours.items(), max_norm=ALL[rule]() if rule else None, **policy)
    resumed.load_state_dict(state)
    give_gradients(5, theirs, ours)
    optimizers[0].step(), resumed.step()
    assert_alike(ours, theirs, "value")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", OWN)
def test_our_optimizers_with_half_the_bits(make, dtype):
    """As on the CPU with the same dtype, a few roundings apart."""
    if dtype == torch.float16 and "AdamW" in make:
        pytest.skip("torch's own step, which is taken here, has squares of gradients beyond float16")
    if "SGD" in make:
        pytest.skip("torch's fused SGD steps wrongly in 16 bits on a CPU, whose kernels the device has")
    theirs, ours = ({n: torch.nn.Parameter(p.to(dtype)) for n, p in m.items()} for m in twins())
    optimizers = [OWN[make](model.items(), max_norm=1.0) for model in (theirs, ours)]
    for step in range(3):
        give_gradients(step, theirs, ours)
        for optimizer in optimizers:
            optimizer.step()
        for name, p in theirs.items():
            bound = 4 * torch.finfo(dtype).eps  # a rounding a step, and one more
            torch.testing.assert_close(host(ours[name]), p.detach(), rtol=bound, atol=bound)


def test_stochastic_rounding_needs_kernels():
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    with pytest.raises(NotImplementedError, match="stochastic_rounding needs a backend with kernels"):
        fastclip.optim.SGD([p], 1e-3, stochastic_rounding=1, max_norm=math.inf).step()


def test_a_grad_scaler():
    theirs, ours = twins()
    clippers = [fastclip.Clipper(model.items(), 1.0) for model in (theirs, ours)]
    optimizers = [torch.optim.SGD(model.values(), 0.1) for model in (theirs, ours)]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=16.0, growth_interval=100)
    scaler.scale(torch.ones((), device=DEVICE))
    for step in range(4):
        give_gradients(step, theirs, ours)
        for p in ours.values():
            p.grad *= scaler.get_scale()
        if step == 2:
            ours["p1"].grad[0] = math.inf
        actual = clippers[1].step(optimizers[1], scaler)
        scaler.update()
        if step == 2:
            assert bool(actual.skipped)
        else:
            expected = clippers[0].step(optimizers[0])
            check_number(actual.total_norm, expected.total_norm, device=torch.device("cpu"))
        assert_alike(ours, theirs, "value")
    assert scaler.get_scale() == 8 and clippers[1].skips.item() == 1


def test_gradients_of_several_devices():
    """Half of the twin's parameters are on the CPU."""
    for first in ("cpu", "device"):
        theirs, ours = twins()
        for name in ("p0", "p2", "p4") if first == "cpu" else ("p1", "p3"):
            ours[name] = torch.nn.Parameter(ours[name].detach().cpu())
        for rule in ("GlobalNorm", "TensorNorm", "a pass between", "ZClip", "AdaGC", "AGC", "Only", "Mask"):
            clippers = [fastclip.Clipper(model.items(), ALL[rule]()) for model in (theirs, ours)]
            for step in range(5):
                give_gradients(step, theirs, ours)
                expected, actual = (clipper.clip_() for clipper in clippers)
                assert actual.total_norm.device.type == "cpu"
                torch.testing.assert_close(host(actual.total_norm), expected.total_norm.float(), rtol=1e-6, atol=0)
                for name, p in theirs.items():
                    torch.testing.assert_close(host(ours[name].grad).double(), p.grad, rtol=RELATIVE, atol=1e-30)


def test_clip_with_a_norm_from_elsewhere():
    for norm in (5.0, torch.tensor(5.0), torch.tensor(5.0, device=DEVICE), torch.tensor(5.0, dtype=torch.float64)):
        clippers, (theirs, ours) = pair(lambda: 1.0)
        give_gradients(0, theirs, ours)
        clippers[0].clip_with_norm_(5.0), clippers[1].clip_with_norm_(norm)
        assert_alike(ours, theirs)


def test_parameters_come_and_go():
    clippers, (theirs, ours) = pair(ALL["AdaGC"])
    for step in range(9):
        give_gradients(step, theirs, ours)
        if 3 <= step < 6:
            theirs["p1"].grad = ours["p1"].grad = None
        if step == 7:
            for clipper, model in zip(clippers, (theirs, ours)):
                kept = {name: p for name, p in model.items() if name != "p0"}
                clipper.set_parameters(list(kept.values()), tuple(kept))
        expected, actual = (clipper.clip_() for clipper in clippers)
        assert_stats_alike(actual, expected)


def test_statistics_are_read_by_one_copy():
    model = twins()[1]
    give_gradients(0, model)
    stats = fastclip.Clipper(model.items(), [Value(5.0), ZClip(warmup=1)], nonfinite="zero").clip_()
    before = no_float64.sync_count()
    stats.log(tensors=True)
    assert no_float64.sync_count() - before <= 1
    assert "total_norm" in repr(stats)


def test_a_monitor(tmp_path):
    clippers, (theirs, ours) = pair(lambda: ZClip(warmup=3), nonfinite="zero")
    monitors = [fastclip.monitor.GradMonitor(tmp_path / f"{i}.jsonl", rows_every=2, log_every=2) for i in range(2)]
    logged = [{}, {}]
    for monitor, seen in zip(monitors, logged):
        monitor.log_to(lambda numbers, step, seen=seen: seen.update(numbers))
    for step in range(12):
        give_gradients(step, theirs, ours)
        if step == 7:
            ours["p0"].grad[0] = theirs["p0"].grad[0] = math.inf
        for clipper, monitor, device in zip(clippers, monitors, ("cpu", DEVICE)):
            monitor.update(clipper.clip_(), torch.tensor(2.0 / (step + 1), device=device))
    theirs, ours = monitors
    assert ours.last.keys() == theirs.last.keys() and ours.last["loss"] == pytest.approx(theirs.last["loss"])
    assert ours.last["total_norm"] == pytest.approx(theirs.last["total_norm"], rel=1e-6)
    assert ours.clip_rate == theirs.clip_rate and ours.skips == theirs.skips
    assert ours.top_norms == pytest.approx(theirs.top_norms, rel=1e-6)
    for monitor in monitors:
        monitor.close()
    assert logged[1].keys() == logged[0].keys()
    histories = [fastclip.monitor.load(tmp_path / f"{i}.jsonl") for i in range(2)]
    assert len(histories[1].spans) == len(histories[0].spans)


def test_parameters_whose_addresses_are_one():
    """Of those that share memory only one is stepped, and these do not."""
    kept = [torch.ones(8, device=DEVICE) for _ in range(50)]
    a, b = next((a, b) for a in kept for b in kept if a.data_ptr() + 16 == b.data_ptr())
    ps = [torch.nn.Parameter(a[4:]), torch.nn.Parameter(b[:4])]
    for p in ps:
        p.grad = torch.ones_like(p)
    fastclip.optim.SGD(ps, 0.5, max_norm=math.inf).step()
    assert all(torch.equal(host(p), torch.full((4,), 0.5)) for p in ps)
