"""Rules on a GPU: the same results as on the CPU, few launches, no waiting, and memories that CUDA graphs carry on."""

import math

import pytest
import torch
from cases import parameter
from test_gpu import captured, launches, make

import fastclip
from fastclip.rules import AGC, AdaGC, AutoClip, BlockRMS, Except, GlobalNorm, Mask, Only, TensorNorm, Value, ZClip

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def gpu_backend(request):
    with fastclip.use_backend(request.param):
        yield request.param


RULES = {
    "ZClip": lambda: ZClip(warmup=3),
    "AutoClip": lambda: AutoClip(40, window=8),
    "AdaGC": lambda: AdaGC(warmup=3),
    "BlockRMS": lambda: BlockRMS(0.5),
    "AGC": lambda: AGC(0.1),
    "Value": lambda: Value(-0.5, 1.0),
    "a schedule": lambda: GlobalNorm(lambda step: 1.0 + step),
    "some": lambda: [Only(GlobalNorm(1.0), "a"), Except(TensorNorm(0.5), ["a", "b"])],
    "several": lambda: [Mask(1e-3), ZClip(warmup=2), AGC(0.3, exclude="c"), AutoClip(60), GlobalNorm(5.0)],
}
SHAPES = {"a": (300, 70), "b": (40_000,), "c": (8, 4, 3, 3), "d": ()}


def pair():
    """The same parameters on the host and on the device."""
    torch.manual_seed(0)
    host = {name: parameter(torch.zeros(s), torch.randn(s)) for name, s in SHAPES.items()}
    return host, {name: parameter(torch.zeros(s, device="cuda"), p.detach().cuda()) for (name, s), p in
                  zip(SHAPES.items(), host.values())}  # fmt: skip


def give(parameters, step, broken=False):
    generator = torch.Generator().manual_seed(step)
    for p in parameters.values():
        p.grad = (torch.randn(p.shape, generator=generator) * (30.0 if step % 4 == 3 else 1.0)).to(p.device)
    if broken:
        parameters["b"].grad[7] = math.nan


@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("rule", RULES)
def test_as_on_the_cpu(rule, policy):
    host, device = pair()
    expected = fastclip.Clipper(host.items(), RULES[rule](), nonfinite=policy)
    clipper = fastclip.Clipper(device.items(), RULES[rule](), nonfinite=policy)
    for step in range(10):
        for parameters in (host, device):
            give(parameters, step, broken=policy != "propagate" and step in (0, 5))
        with fastclip.use_backend("auto"):
            a = expected.clip_()
        b = clipper.clip_()
        torch.testing.assert_close(b.total_norm.cpu(), a.total_norm, rtol=1e-6, atol=0, equal_nan=True)
        assert b.skipped.item() == a.skipped.item()
        for p, q in zip(host.values(), device.values()):
            torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=2e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(
        clipper.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-12, check_device=False, equal_nan=True
    )


@pytest.mark.parametrize("value", [-1.0, math.nan, 0.0, 2.0])
def test_a_limit_on_the_device_turns_no_gradient_round(value):
    """It is not read, so it is not checked: a negative one counts as 0."""
    limit = torch.tensor(value, device="cuda")
    calls = (
        lambda p: fastclip.clip_norm_([p], limit),
        lambda p: fastclip.clip_with_norm_([p], limit, 5.0),
        lambda p: fastclip.Clipper([p], limit).clip_(),
        lambda p: fastclip.Clipper([p], [Mask(0.0), Only(GlobalNorm(limit), [p])]).clip_(),
    )
    for call in calls:
        p = parameter(torch.tensor([3.0, 4.0], device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(p)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = max(value, 0.0) / (5 + 1e-6) if value == value else value
        torch.testing.assert_close(p.grad.cpu(), torch.tensor([3.0, 4.0]) * wanted, rtol=1e-6, atol=0, equal_nan=True)


def test_block_rms_when_parameters_grow():
    p = parameter(torch.full((4,), 2.0, device="cuda"))
    clipper = fastclip.Clipper([p], BlockRMS(1.0))
    for size in (4, 9, 4, 70_000):
        p.grad = None
        p.data = torch.zeros(size, device="cuda")
        p.grad = torch.full((size,), 2.0, device="cuda")
        clipper.clip_()
        torch.testing.assert_close(p.grad, torch.ones(size, device="cuda"), rtol=1e-6, atol=0)


def test_a_state_moves_between_devices():
    host, device = pair()
    clipper, other = (fastclip.Clipper(ps.items(), RULES["several"]()) for ps in (host, device))
    for step in range(4):
        give(host, step)
        with fastclip.use_backend("auto"):
            clipper.clip_()
    other.load_state_dict(clipper.state_dict())
    for ps in (host, device):
        give(ps, 5)
    with fastclip.use_backend("auto"):
        expected = clipper.clip_()
    torch.testing.assert_close(other.clip_().coef.cpu(), expected.coef, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC"])
def test_at_most_twelve_launches_more_than_the_global_norm(rule):
    parameters = make(70_000, 9, 500)
    plain, clipper = fastclip.Clipper(parameters, 1e9), fastclip.Clipper(parameters, RULES[rule]())
    for _ in range(3):
        plain.clip_(), clipper.clip_()
    more = len(launches(clipper.clip_)) - len(launches(plain.clip_))
    assert more <= 12, more


@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "Value"])
def test_no_rule_waits_for_the_device(rule, policy):
    _, device = pair()
    clipper = fastclip.Clipper(device.items(), RULES[rule](), nonfinite=policy)
    optimizer = fastclip.optim.AdamW(device.values())
    for step in range(3):
        give(device, step)
        clipper.step(optimizer)
    give(device, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clipper.clip_()
        clipper.step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["ZClip", "AutoClip", "AdaGC"])
def test_a_replay_remembers(rule):
    """Replays go on from where the last one was, as calls do."""
    host, device = pair()
    clipper, expected = (fastclip.Clipper(ps.items(), RULES[rule](), nonfinite="skip") for ps in (device, host))
    give(device, 0)
    graph, stats = captured(clipper.clip_)
    expected.load_state_dict(clipper.state_dict())
    for step in range(1, 12):
        give(host, step, broken=step in (4, 7))
        for name, p in device.items():
            p.grad.copy_(host[name].grad)
        with fastclip.use_backend("auto"):
            wanted = expected.clip_()
        graph.replay()
        assert stats.skipped.item() == wanted.skipped.item()
        torch.testing.assert_close(stats.coef.cpu(), wanted.coef, rtol=1e-5, atol=0)
        for name, p in device.items():
            torch.testing.assert_close(p.grad.cpu(), host[name].grad, rtol=2e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(clipper.state_dict()["rules"], expected.state_dict()["rules"], check_device=False)
    assert clipper.skips.item() == expected.skips.item() == 2
