"""torch.compile keeps a step that clips in one graph."""

import math

import pytest
import torch
from cases import clip_factor, clipping, gradients, parameter, tensor_norm
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastclip
from fastclip import ops


def grads(*dtypes):
    return [torch.randn(3, 5).to(d) for d in dtypes or (torch.float32, torch.bfloat16)]


SAMPLES = {
    "clip_norm_": (ops.clip_norm_, lambda: (grads(), 1.0, 2.0, False)),
    "clip_norm_ float64": (ops.clip_norm_, lambda: (grads(torch.float64), 1.0, math.inf, False)),
    "total_norm": (ops.total_norm, lambda: (grads(), 2.0, False)),
    "clip_with_norm_": (ops.clip_with_norm_, lambda: (grads(), 1.0, torch.tensor(5.0))),
    "clip_value_": (ops.clip_value_, lambda: (grads(), 0.1)),
    "clip_tensor_norm_": (ops.clip_tensor_norm_, lambda: (grads(), 1.0, 2.0)),
    "mask_small_": (ops.mask_small_, lambda: (grads(), 2.0)),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    op, make = SAMPLES[sample]
    torch.library.opcheck(op, make())


CALLS = {
    "clip_norm_": lambda ps: fastclip.clip_norm_(ps, 1.0),
    "clip_norm_ inf": lambda ps: fastclip.clip_norm_(ps, 0.5, "inf"),
    "total_norm": lambda ps: fastclip.total_norm([p.grad for p in ps]),
    "clip_with_norm_": lambda ps: fastclip.clip_with_norm_(ps, 1.0, fastclip.total_norm([p.grad for p in ps])),
    "clip_value_": lambda ps: fastclip.clip_value_(ps, 0.1),
    "clip_tensor_norm_": lambda ps: fastclip.clip_tensor_norm_(ps, 1.0),
    "mask_small_": lambda ps: fastclip.mask_small_(ps, 2.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_fullgraph_equals_eager(call):
    function = CALLS[call]
    make = lambda: [parameter(g) for g in (torch.linspace(-3, 3, 50), torch.ones(7, 2), torch.full((3,), 0.01))]  # noqa: E731
    eager, compiled = make(), make()
    expected = function(eager)
    torch._dynamo.reset()
    actual = torch.compile(lambda: function(compiled), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for a, b in zip(gradients(compiled), gradients(eager)):
        assert torch.equal(a, b)


def test_a_whole_step():
    """Clip and update in one compiled graph, three times, as in eager. (torch.optim itself breaks the graph.)"""

    def train(compile_it):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 3, dtype=torch.float64)

        @torch.no_grad()
        def update():
            norm = fastclip.clip_norm_(net.parameters(), 0.1)
            for p in net.parameters():
                p.sub_(p.grad, alpha=0.5)
            return norm

        step = torch.compile(update, fullgraph=True, backend="aot_eager") if compile_it else update
        norms = []
        for k in range(3):
            net.zero_grad(set_to_none=False)
            net(torch.full((2, 6), 1.0 + k, dtype=torch.float64)).square().sum().backward()
            norms.append(step())
        return norms, [p.detach().clone() for p in net.parameters()]

    torch._dynamo.reset()
    # In float64 a compiler's other order of operations is 7 digits below this, also after three steps.
    torch.testing.assert_close(train(True), train(False), rtol=1e-9, atol=1e-9)


def test_no_gradients_in_a_graph():
    p = torch.nn.Parameter(torch.zeros(3))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: fastclip.clip_norm_([p], 1.0), fullgraph=True, backend="aot_eager")
    assert compiled().item() == 0


def test_inductor():
    """With the default compiler too, where a C++ compiler is at hand."""
    p = parameter(torch.full((16,), 2.0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: fastclip.clip_norm_([p], 1.0) * 2, fullgraph=True)
    assert compiled().item() == pytest.approx(16)
    assert tensor_norm(p.grad) == pytest.approx(8 * clip_factor(8, 1.0), rel=clipping(torch.float32))


def test_a_gradient_twice_in_a_graph():
    a, b = parameter(torch.ones(4)), parameter(torch.ones(9))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: fastclip.clip_tensor_norm_([a, a, b], 1.0), fullgraph=True, backend="aot_eager")
    assert compiled().tolist() == [2, 3]


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")  # it breaks the graph
def test_gradients_passed_as_parameters_are_refused_in_a_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: fastclip.clip_norm_([g], 1.0), backend="aot_eager")
    with pytest.raises(TypeError, match=r"whose \.grad is clipped"):
        compiled(torch.ones(3))


def test_gradients_of_a_graph_of_their_own():
    """Made with create_graph=True: as in eager, the clip is no part of it."""

    def make():
        p = torch.nn.Parameter(torch.full((3,), 2.0))
        (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
        return p

    eager, compiled = make(), make()
    expected = fastclip.clip_norm_([eager], 1.0)
    torch._dynamo.reset()
    actual = torch.compile(lambda: fastclip.clip_norm_([compiled], 1.0), fullgraph=True, backend="aot_eager")()
    assert torch.equal(actual, expected) and not actual.requires_grad
    assert torch.equal(compiled.grad, eager.grad)


# ---- other things that look at every operation ----

VALUES = (torch.linspace(-3, 3, 50), torch.ones(7, 2), torch.full((3,), 0.01))
TRACERS = {
    **{mode: {"tracing_mode": mode} for mode in ("real", "fake", "symbolic")},
    "before autograd": {"pre_dispatch": True},
    "before autograd, fake": {"pre_dispatch": True, "tracing_mode": "fake"},
}


def run(call, *values):
    """What a call returns, and the gradients that it leaves."""
    parameters = [torch.nn.Parameter(torch.zeros(v.shape)) for v in values]
    for p, value in zip(parameters, values):
        p.grad = value * 2
    return CALLS[call](parameters), [p.grad for p in parameters]


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("call", CALLS)
def test_make_fx_records_the_call(call, tracer):
    """The graph does to other values what it did to those it was traced with: nothing measured is a constant in it."""
    graph = make_fx(lambda *values: run(call, *values), **TRACERS[tracer])(*VALUES)
    others = [v.flip(0) * 3 for v in VALUES]
    torch.testing.assert_close(graph(*others), run(call, *others), rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors(call):
    expected, left = run(call, *VALUES)
    with FakeTensorMode() as mode:
        actual, grads = run(call, *map(mode.from_tensor, VALUES))
    assert [g.shape for g in grads] == [g.shape for g in left]
    if expected is not None:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("call", CALLS)
def test_real_gradients_under_a_fake_mode_are_not_touched(call):
    parameters = [parameter(v.clone()) for v in VALUES]
    with FakeTensorMode(allow_non_fake_inputs=True):
        returned = CALLS[call](parameters)
    assert returned is None or type(returned) is not torch.Tensor
    assert all(torch.equal(p.grad, v) for p, v in zip(parameters, VALUES))


STEPS = {
    "clip_": lambda ps: fastclip.Clipper(ps, 0.1).clip_(),
    "clip_, two rules": lambda ps: fastclip.Clipper(ps, [fastclip.rules.Value(0.1), 0.1]).clip_(),
    "step": lambda ps: fastclip.Clipper(ps, 0.1).step(torch.optim.SGD(ps, 0.1)),
    "SGD": lambda ps: fastclip.optim.SGD(ps, 0.1).step(),
    "AdamW": lambda ps: fastclip.optim.AdamW(ps, 0.1, max_norm=0.1).step(),
}


def under_a_fake_mode(function):
    with FakeTensorMode(allow_non_fake_inputs=True):
        function()


WATCHERS = {
    "fake mode": under_a_fake_mode,
    **{
        f"make_fx, {name}": lambda function, how=how: make_fx(lambda x: (x + 1, function())[0], **how)(torch.ones(2))
        for name, how in TRACERS.items()
    },
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("step", STEPS)
def test_what_cannot_be_traced_says_so_and_changes_nothing(step, watcher):
    parameters = [parameter(v.clone(), v.clone()) for v in VALUES]
    with pytest.raises(NotImplementedError, match="cannot be traced by make_fx or run under FakeTensorMode"):
        WATCHERS[watcher](lambda: STEPS[step](parameters))
    assert all(torch.equal(p.grad, v) and torch.equal(p, v) for p, v in zip(parameters, VALUES))


def test_a_mode_that_only_looks():
    for call in CALLS:
        with FlopCounterMode(display=False):
            actual = run(call, *VALUES)
        torch.testing.assert_close(actual, run(call, *VALUES), rtol=0, atol=0)
    p = parameter(torch.full((4,), 3.0))
    with FlopCounterMode(display=False), pytest.raises(TypeError, match=r"parameters\[1\] must be a tensor, got int 3"):
        fastclip.clip_norm_([p, 3], 1.0)
    with FlopCounterMode(display=False), pytest.raises(TypeError, match=r"tensors\[0\] must be a tensor, got int 3"):
        fastclip.total_norm([3])
    with FlopCounterMode(display=False):
        assert fastclip.Clipper([p], 1.0).clip_().total_norm == 6
