"""torch.compile keeps a step that clips in one graph."""

import math

import pytest
import torch
from cases import gradients, parameter

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
        net = torch.nn.Linear(6, 3)

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
            net(torch.full((2, 6), 1.0 + k)).square().sum().backward()
            norms.append(step())
        return norms, [p.detach().clone() for p in net.parameters()]

    torch._dynamo.reset()
    torch.testing.assert_close(train(True), train(False))


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
    assert p.grad.norm().item() == pytest.approx(1, rel=1e-5)


def test_a_gradient_twice_in_a_graph():
    a, b = parameter(torch.ones(4)), parameter(torch.ones(9))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: fastclip.clip_tensor_norm_([a, a, b], 1.0), fullgraph=True, backend="aot_eager")
    assert compiled().tolist() == [2, 3]


def test_gradients_passed_as_parameters_are_refused_in_a_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: fastclip.clip_norm_([g], 1.0), backend="aot_eager")
    with pytest.raises(TypeError, match=r"whose \.grad is clipped"):
        compiled(torch.ones(3))
