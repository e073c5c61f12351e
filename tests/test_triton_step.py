"""The Triton backend's optimizer steps, interpreted, and what their kernels compile to."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import assert_no_spills, compiled
from cases import adamw_options, assert_within, sgd_options
from exact_steps import ExactSteps, step_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastclip
from fastclip.backends.base import StepDecision
from fastclip.gradients.pack import pack_step
from fastclip.optim import SGD, AdamW

backend = importlib.import_module("fastclip.backends.triton")
clip = importlib.import_module("fastclip.backends.triton.clip")
step = importlib.import_module("fastclip.backends.triton.optim")
cpu = importlib.import_module("fastclip.backends.cpu")
if clip.MISSING:
    pytest.skip(clip.MISSING, allow_module_level=True)
interpreted = pytest.mark.skipif(not clip.INTERPRET, reason="steps tensors on the CPU")

ADAMW = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
SGDS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False, "maximize": False}
ONE = torch.ones((), dtype=torch.float64)


def tensors(sizes, dtype, seed, offsets=None, positive=False):
    """Of each size, that many elements into their memory."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size, offset in zip(sizes, offsets or [0] * len(sizes)):
        values = torch.randn(size + offset, generator=generator, dtype=torch.float64)
        found.append((values.abs() if positive else values).to(dtype)[offset:])
    return found


class Model:
    """Parameters, gradients, states and step counts as a step takes them."""

    def __init__(self, sizes, dtype, states, offsets=None, count=3.0):
        rows = [tensors(sizes, dtype, seed, offsets and offsets[seed], seed >= 3) for seed in range(2 + states)]
        self.params, self.grads, *self.states = rows
        self.steps = [torch.tensor(count) for _ in sizes]

    def everything(self):
        return [*self.params, *self.grads, *(t for row in self.states for t in row), *self.steps]

    def adamw(self, backend, coef=ONE, frozen=None, zero_grad=False, seed=None, **options):
        table = pack_step(self.params, self.grads, self.states, self.steps)
        group = {**ADAMW, "amsgrad": len(self.states) == 3, **options}
        backend.adamw_(table, StepDecision(coef, frozen, zero_grad, seed), adamw_options(group))

    def sgd(self, backend, coef=ONE, frozen=None, zero_grad=False, seed=None, one_minus_dampening=1.0, **options):
        table = pack_step(self.params, self.grads, self.states, [])
        group = {**SGDS, "momentum": 0.9 if self.states else 0, **options}
        backend.sgd_(table, StepDecision(coef, frozen, zero_grad, seed), sgd_options(group, one_minus_dampening))


@interpreted
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_step_is_the_one_in_float64(data):
    """Whatever the shapes, dtypes, alignments, coefficients and frozen tensors."""
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 7, 255, 257, 1024, 1100, 2048]), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    kind, states = data.draw(st.sampled_from([("adamw", 2), ("adamw", 3), ("sgd", 0), ("sgd", 1)]))
    place = st.sampled_from([0, 0, 8, 1, 3])
    offsets = [[data.draw(place) for _ in sizes] for _ in range(2 + states)]
    coefs, frozens = st.sampled_from([1.0, 0.5, 0.0, -0.0, 3.0]), st.booleans()
    each = data.draw(st.booleans())
    coef = torch.tensor([data.draw(coefs) for _ in sizes] if each else data.draw(coefs), dtype=torch.float64)
    some = data.draw(st.sampled_from(["none", "one", "each"]))
    frozen = None
    if some != "none":
        frozen = torch.tensor([data.draw(frozens) for _ in sizes] if some == "each" else data.draw(frozens))
    options = {"maximize": data.draw(st.booleans())}
    if kind == "sgd" and states:
        options |= {"nesterov": data.draw(st.booleans()), "one_minus_dampening": data.draw(st.sampled_from([1.0, 0.5]))}
    zero_grad = data.draw(st.booleans())

    model, exact = Model(sizes, dtype, states, offsets), Model(sizes, dtype, states, offsets)
    exact.params, exact.grads, *exact.states = [
        [t.double() for t in row] for row in (exact.params, exact.grads, *exact.states)
    ]
    before = [t.clone() for t in model.everything()]
    getattr(model, kind)(backend, coef, frozen, zero_grad, **options)
    for i, g in enumerate(exact.grads):
        stays = frozen is not None and bool(frozen.expand(len(sizes))[i])
        c = coef.expand(len(sizes))[i].item() * (-1 if options["maximize"] else 1)
        rows = [row[i] for row in exact.states]
        group = {**ADAMW, "amsgrad": states == 3}
        if kind == "sgd":
            group = {
                **SGDS,
                "dampening": 1 - options.get("one_minus_dampening", 1.0),
                "nesterov": options.get("nesterov", False),
            }
        values = [exact.params[i].clone(), g * c, *(row.clone() for row in rows)]
        errors = step_errors(group, dtype, 4, values, [torch.zeros_like(g)] * 4)
        if not stays and kind == "adamw":
            adamw_by_hand(exact.params[i], g * c, rows, exact.steps[i])
        elif not stays:
            sgd_by_hand(exact.params[i], g * c, rows, options)
        elif i == 0:
            assert torch.equal(model.params[0], before[0])
        for a, b, error in zip([model.params, *model.states], [exact.params, *exact.states], errors):
            assert_within(a[i], b[i], 0.0 if stays else error)
    if kind == "adamw":
        assert model.steps == exact.steps
    for g, was in zip(model.grads, before[len(sizes) :]):
        assert torch.equal(g, torch.zeros_like(g) if zero_grad else was)


def adamw_by_hand(p, g, states, count):
    (beta1, beta2), lr = ADAMW["betas"], ADAMW["lr"]
    count += 1
    states[0].mul_(beta1).add_(g, alpha=1 - beta1)
    states[1].mul_(beta2).add_(g * g, alpha=1 - beta2)
    square = states[1]
    if len(states) == 3:
        square = states[2].copy_(torch.maximum(*states[1:]))
    root = (square / (1 - beta2 ** count.item())).sqrt() + ADAMW["eps"]
    p.mul_(1 - lr * ADAMW["weight_decay"]).sub_(lr / (1 - beta1 ** count.item()) * states[0] / root)


def sgd_by_hand(p, g, states, options):
    g = g + SGDS["weight_decay"] * p
    if states:
        states[0].mul_(0.9).add_(g, alpha=options["one_minus_dampening"])
        g = g + 0.9 * states[0] if options["nesterov"] else states[0]
    p.sub_(SGDS["lr"] * g)


@interpreted
@pytest.mark.parametrize("count", [0, 1, 10, 999, 99_999, 999_999])
def test_bias_corrections_at_any_step(count):
    model, exact = Model([3], torch.float64, 2, count=float(count)), Model([3], torch.float64, 2, count=float(count))
    values = [exact.params[0].clone(), exact.grads[0], *(row[0].clone() for row in exact.states)]
    errors = step_errors(ADAMW, torch.float64, count + 1, values, [torch.zeros(3).double()] * 3)
    model.adamw(backend)
    adamw_by_hand(exact.params[0], exact.grads[0], [row[0] for row in exact.states], exact.steps[0])
    assert_within(model.params[0], exact.params[0], errors[0])
    assert model.steps[0] == count + 1


@interpreted
@pytest.mark.parametrize("states", [2, 3])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_same_seed_rounds_as_on_the_cpu(states, offset):
    """Other results only where float32 arithmetic differs in its last bit."""
    sizes = [2100, 5, 1030]
    one, other = (Model(sizes, torch.bfloat16, states, [[offset] * 3] * 5) for _ in range(2))
    for seed in (1, 2**32 - 1):
        one.adamw(backend, seed=seed)
        other.adamw(cpu, seed=seed)
    moved = [(a != b).double().mean().item() for a, b in zip(one.everything(), other.everything())]
    assert max(moved) < 2e-3
    before = [p.clone() for p in one.params]
    one.adamw(backend, seed=7)
    assert not torch.equal(before[0], one.params[0])


@interpreted
def test_stochastic_sgd_keeps_what_is_not_finite():
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0]).bfloat16()
    for name in ("triton", "cpu"):
        with fastclip.use_backend(name):
            p = torch.nn.Parameter(torch.zeros(4).bfloat16())
            p.grad = values.clone()
            SGD([p], lr=0.5, momentum=0.9, stochastic_rounding=0).step()
        assert p[0] == -math.inf and p[1] == math.inf and p[2].isnan() and p[3] == -0.5


@interpreted
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_coefficient_of_zero_hides_nan_and_one_of_minus_zero_does_not(kind):
    for coef, hidden in ((0.0, True), (-0.0, False)):
        for maximize in (False, True):
            model = Model([1030, 3], torch.float32, 1 if kind == "sgd" else 2)
            model.grads[0][::2] = math.nan
            model.grads[1][0] = math.inf
            coefs = torch.tensor([coef, coef], dtype=torch.float64)
            getattr(model, kind)(backend, coefs, maximize=maximize)
            assert all(bool(p.isfinite().all()) == hidden for p in model.params)
            assert model.grads[0].isnan().any()


@interpreted
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("each", [False, True])
def test_frozen_tensors_are_neither_read_nor_written(kind, each):
    model = Model([1100, 3], torch.float32, 2 if kind == "adamw" else 1)
    model.grads[0].fill_(math.nan)
    before = [t.clone() for t in model.everything()]
    frozen = torch.tensor([True, False]) if each else torch.tensor(True)
    getattr(model, kind)(backend, frozen=frozen, zero_grad=True)
    for i in range(2):
        stays = not each or i == 0
        assert not model.grads[i].any()
        assert torch.equal(model.params[i], before[i]) == stays
        assert all(torch.equal(row[i], before[4 + 2 * k + i]) == stays for k, row in enumerate(model.states))
        if kind == "adamw":
            assert model.steps[i] == (3 if stays else 4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_learning_rate_on_the_device(kind, dtype):
    rate = torch.tensor(0.03, dtype=dtype)
    one, other = (Model([300], torch.float64, 2 if kind == "adamw" else 1) for _ in range(2))
    getattr(one, kind)(backend, lr=rate)
    getattr(other, kind)(backend, lr=rate.item())
    torch.testing.assert_close(one.everything(), other.everything(), rtol=0, atol=0)


@interpreted
def test_an_eps_of_zero_with_subnormal_squares():
    model = Model([4], torch.float32, 2, count=0.0)
    model.grads[0].fill_(1e-20)
    for row in model.states:
        row[0].zero_()
    before = model.params[0].double()
    model.adamw(backend, eps=0.0, weight_decay=0.0)
    zeros = torch.zeros(4).double()
    group = {**ADAMW, "eps": 0.0, "weight_decay": 0.0}
    error, *_ = step_errors(group, torch.float32, 1, [before, zeros + 1e-20, zeros, zeros], [zeros] * 3)
    assert_within(model.params[0], before - 0.1, error)
    assert (error < 1e-3).all()


@interpreted
def test_memory_that_comes_and_goes():
    """Addresses are read anew at every step: none is of memory that was freed."""
    with fastclip.use_backend("triton"):
        step._tables.entries.clear()
        torch.manual_seed(0)
        a = [torch.nn.Parameter(torch.randn(n)) for n in (5, 1030)]
        mine, exact = AdamW(a, lr=0.1), ExactSteps(lambda ps: torch.optim.AdamW(ps, lr=0.1), a)
        keep = []
        for k in range(2 * step._tables.SIZE + 2):
            for p in a:
                p.grad = torch.full(p.shape, 1.0 + k)
            if k % 3 == 0:
                keep.append(a[0].grad)
            if k % 5 == 0:
                a[0].data = a[0].data.clone()
            if k % 7 == 3:
                mine.state[a[1]]["exp_avg"] = mine.state[a[1]]["exp_avg"].clone()
            exact.give(a)
            mine.step()
            exact.step()
        assert len(step._tables.entries) <= step._tables.SIZE
        exact.check(a)


@interpreted
def test_an_unchanged_step_uploads_nothing():
    with fastclip.use_backend("triton"):
        step._tables.entries.clear()
        p = torch.nn.Parameter(torch.ones(5))
        p.grad = torch.ones(5)
        optimizer = AdamW([p])
        for lr in (0.1, 0.2, 0.3):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        assert len(step._tables.entries) == 1


# What a launch is compiled for, by Triton's own binder, without a GPU and without the interpreter.
RECOMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
import fastclip
import fastclip.backends.triton as backend
from fastclip.backends.triton import optim as step, tiles
from fastclip.optim import SGD, AdamW
tiles.most_programs = lambda device: 8
step.current_stream = lambda device: None
step.upload = lambda values, dtype, device: values.to(dtype)
backend.why_not = lambda device: None
found = set()
target = make_backend(GPUTarget("cuda", 90, 32))
for kernel in (step._count_kernel, step._adamw_kernel, step._sgd_kernel):
    binder = create_function_from_signature(kernel.signature, kernel.params, target)
    def run(*args, grid, warmup, kernel=kernel, binder=binder, **options):
        found.add((kernel.fn.__name__, str(binder(*args, **options)[1])))
    kernel.run = run
fastclip.use_backend("triton")
for sizes in ((3,), (16,), (70_001, 5), (1 << 20, 1, 32)):
    ps = [torch.nn.Parameter(torch.ones(n).bfloat16()) for n in sizes]
    for p in ps:
        p.grad = torch.ones_like(p)
    for lr, decay, seed in ((0.1, 0.0, 0), (1.0, 1.0, 1), (1e-8, 16.0, 2**40), (3, 0, 5)):
        AdamW(ps, lr, betas=(0.0, decay / 100), eps=lr, weight_decay=decay, stochastic_rounding=seed).step()
        SGD(ps, lr, 1e-3 + decay, weight_decay=decay, stochastic_rounding=seed).step()
assert {name for name, _ in found} == {"_count_kernel", "_adamw_kernel", "_sgd_kernel"}
assert len(found) == 3, found
assert all("fp64" in kinds for _, kinds in found), found
"""


def test_no_change_of_value_compiles_anew(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.chdir(Path(__file__).parent.parent)
    result = subprocess.run([sys.executable, "-c", RECOMPILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)]
)
def test_compiles_ahead_of_time(arch):
    """The main loop has 128-bit loads and stores for every array and no others; no spills."""
    rows = compiled("triton_step", arch)
    assert len(rows) == 42
    for row in rows:
        assert_no_spills(row)
        assert row["REG"] <= 96, row
        if row["kernel"] == "_count_kernel":
            continue
        vector = "v2.b64" if row["dtype"] == "fp64" else "v4.b32"
        loads = {"_adamw_kernel": 4 + row.get("AMSGRAD", 0), "_sgd_kernel": 2 + row.get("MOMENTUM", 0)}[row["kernel"]]
        wide = 1 if row["dtype"] in ("bf16", "fp16") else 2  # a thread's loads of each array
        stores = loads if row["ZERO_GRAD"] else loads - 1
        whole = [loop for loop in row["loops"] if any(vector in access for access in loop["loads"])]
        assert len(whole) == 1, row
        assert all(vector in access for access in whole[0]["loads"] + whole[0]["stores"]), row
        assert [len(whole[0]["loads"]), len(whole[0]["stores"])] == [loads * wide, stores * wide], row
