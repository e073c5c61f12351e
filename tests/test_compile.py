"""torch.compile keeps a step that clips in one graph."""

import math

import pytest
import torch
import torch._dynamo.testing
from cases import clip_factor, clipping, gradients, parameter, tensor_norm
from torch._functorch import config as functorch_config
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastclip
from fastclip import torch_ops as ops
from fastclip.rules import AdaGC, AutoClip, Except, GlobalNorm, Mask, Only, ZClip


def grads(*dtypes):
    return [torch.randn(3, 5).to(d) for d in dtypes or (torch.float32, torch.bfloat16)]


def limit(value):
    return torch.tensor(value, dtype=torch.float64)


SAMPLES = {
    "clip_norm_": (ops.clip_norm_, lambda: (grads(), limit(1.0), 2.0, False)),
    "clip_norm_ float64": (ops.clip_norm_, lambda: (grads(torch.float64), limit(1.0), math.inf, False)),
    "total_norm": (ops.total_norm, lambda: (grads(), 2.0, False)),
    "clip_with_norm_": (ops.clip_with_norm_, lambda: (grads(), limit(1.0), limit(5.0))),
    "clip_value_": (ops.clip_value_, lambda: (grads(), limit(0.1))),
    "clip_tensor_norm_": (ops.clip_tensor_norm_, lambda: (grads(), limit(1.0), 2.0)),
    "mask_small_": (ops.mask_small_, lambda: (grads(), limit(2.0))),
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


# ---- a limit that changes from call to call ----


CHANGING = {
    "clip_norm_": lambda ps, v: fastclip.clip_norm_(ps, v),
    "clip_with_norm_ max_norm": lambda ps, v: fastclip.clip_with_norm_(ps, v, torch.tensor(4.0)),
    "clip_with_norm_ total_norm": lambda ps, v: fastclip.clip_with_norm_(ps, 1.0, v),
    "clip_value_": lambda ps, v: fastclip.clip_value_(ps, v),
    "clip_tensor_norm_": lambda ps, v: fastclip.clip_tensor_norm_(ps, v),
    "mask_small_": lambda ps, v: fastclip.mask_small_(ps, v),
}
LIMITS = {
    "float": [0.5 + 0.25 * k for k in range(12)],
    "int": list(range(1, 13)),
    "tensor": [torch.tensor(0.5 + 0.25 * k) for k in range(12)],
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("call", CHANGING)
def test_a_limit_that_changes(call, kind, dynamic):
    """One graph for all values: a graph for each would end at torch's limit of eight."""
    function = CHANGING[call]
    make = lambda: [parameter(torch.linspace(-3, 3, 50)), parameter(torch.full((3,), 1.2))]  # noqa: E731
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for value in LIMITS[kind]:
        expected, actual = make(), make()
        torch.testing.assert_close(compiled(actual, value), function(expected, value), rtol=0, atol=0)
        for a, b in zip(gradients(actual), gradients(expected)):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("call", CHANGING)
@pytest.mark.parametrize("value", [-1.0, -1, torch.tensor(-1.0)], ids=repr)
def test_a_bad_limit_is_refused_in_a_graph(call, value):
    p = parameter(torch.ones(3))
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: CHANGING[call]([p], v), fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"must be >= 0, got -1\.0"):
        compiled(value)
    assert torch.equal(p.grad, torch.ones(3))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_norm_type_that_changes(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(fastclip.total_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = [torch.ones(9), torch.full((2,), 3.0)]
    for p in (2.0, 1.0, 3, 0.5, 0, "inf"):
        assert torch.equal(compiled(tensors, p), fastclip.total_norm(tensors, p))
    with pytest.raises(ValueError, match="norm_type must be >= 0"):
        compiled(tensors, -1.0)


# ---- two gradients over one memory ----


@pytest.mark.parametrize("view", ["flat", "transposed", "detached", "part"])
@pytest.mark.parametrize("call", [call for call in CALLS if call != "clip_norm_ inf"])
@functorch_config.patch(enable_autograd_cache=False)  # it takes graphs with other views for the same
def test_gradients_that_share_memory(call, view):
    """Scaled once, as without a graph; or refused, and nothing changed."""
    function = CALLS[call]

    def make():
        g = torch.linspace(-3, 3, 50).reshape(10, 5).clone()  # torch refuses some views whose base is another tensor
        p = parameter(g)
        other = {"flat": g.view(-1), "transposed": g.t(), "detached": g.detach(), "part": g[3:]}[view]
        return [p, parameter(other), parameter(torch.ones(7))]

    eager, compiled = make(), make()
    before = [g.clone() for g in gradients(compiled)]
    torch._dynamo.reset()
    run = torch.compile(lambda: function(compiled), fullgraph=True)
    if call != "total_norm" and (view == "part" or call in ("clip_tensor_norm_", "mask_small_")):
        with pytest.raises(RuntimeError, match="overlap in memory" if view == "part" else "3 gradients share memory"):
            run()
        assert all(map(torch.equal, gradients(compiled), before))
        return
    torch.testing.assert_close(run(), function(eager), rtol=0, atol=0)
    for a, b in zip(gradients(compiled), gradients(eager)):
        assert torch.equal(a, b)


def test_views_of_one_gradient_that_a_graph_makes():
    def clip(ps, x):
        g = x * 2
        ps[0].grad, ps[1].grad = g, g.view(-1)
        return fastclip.clip_norm_(ps, 1.0)

    eager, compiled = ([torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(12))] for _ in range(2))
    x = torch.ones(3, 4)
    torch._dynamo.reset()
    norm = torch.compile(clip, fullgraph=True)(compiled, x)
    torch.testing.assert_close(norm, clip(eager, x), rtol=1e-6, atol=0)
    for a, b in zip(gradients(compiled), gradients(eager)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


# ---- a Clipper in a compiled step ----


ADAPTIVE = {
    "ZClip": lambda: ZClip(warmup=4),
    "AutoClip": lambda: AutoClip(40, window=8),
    "AdaGC": lambda: AdaGC(warmup=5),
    "Only, Except": lambda: [Only(AdaGC(warmup=3), "0"), Except(ZClip(warmup=4), "0"), Except(AutoClip(60), "1")],
    "several": lambda: [Mask(1e-9), ZClip(warmup=4), AdaGC(warmup=2), GlobalNorm(lambda step: 1.0 + step)],
}


@pytest.mark.parametrize(
    ("rule", "compiler"), [*((rule, "aot_eager") for rule in ADAPTIVE), ("AdaGC", "eager"), ("AdaGC", "inductor")]
)
@pytest.mark.parametrize("how", ["clip_", "step", "optim"])
def test_a_clipper_in_a_compiled_step(rule, how, compiler):
    """30 steps, bit by bit as without a compiler: it runs outside of the graph, which loses none of its changes."""

    def train(compile_it):
        generator = torch.Generator().manual_seed(0)
        ps = {str(i): torch.nn.Parameter(torch.randn(4 + i, generator=generator)) for i in range(3)}
        if how == "optim":
            optimizer = fastclip.optim.SGD(ps.items(), lr=0.5, max_norm=ADAPTIVE[rule]())
            clipper = optimizer.clipper
        else:
            optimizer = torch.optim.SGD(ps.values(), lr=0.5)
            clipper = fastclip.Clipper(ps.items(), ADAPTIVE[rule]())

        def step(gradients):
            for p, g in zip(ps.values(), gradients):
                p.grad = g * 2
            if how == "clip_":
                clipper.clip_()
            if how == "step":
                clipper.step(optimizer)
            else:
                optimizer.step()

        step = torch.compile(step, backend=compiler) if compile_it else step
        for k in range(30):
            step([torch.randn(p.shape, generator=generator) * (9 if k % 7 == 6 else 1) for p in ps.values()])
        return ps, clipper.state_dict()

    torch._dynamo.reset()
    torch.testing.assert_close(train(True), train(False), rtol=0, atol=0)
