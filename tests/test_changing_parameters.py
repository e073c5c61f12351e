"""fastclip.optim goes by its parameter groups at the time of the step; parameters may share memory or change dtype."""

import copy

import pytest
import torch
from cases import parameter
from conftest import BACKENDS

import fastclip
from fastclip import rules
from fastclip.optim import SGD, AdamW

# ---- parameters that come, go and are replaced, as in the densification of Gaussian splatting ----


def loud(*shape, size=100.0):
    return parameter(torch.full(shape, size))


def expected_step(before, gradients, max_norm):
    """Parameters after a step of SGD with lr 1, in float64."""
    norm = torch.cat([g.double().flatten() for g in gradients]).norm()
    return [(p.double() - g.double() * min(1.0, max_norm / (norm + 1e-6))).float() for p, g in zip(before, gradients)]


def assert_clipped_step(optimizer, parameters, max_norm=1.0):
    before = [p.detach().clone() for p in parameters]
    gradients = [p.grad.clone() for p in parameters]
    optimizer.step()
    for p, value in zip(parameters, expected_step(before, gradients, max_norm)):
        torch.testing.assert_close(p.detach(), value, rtol=3e-7, atol=0)
    assert optimizer.stats.count == len(parameters)


CHANGES = ["replaced", "appended", "removed", "grown in place", "another group", "reordered"]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_the_groups_is_clipped(change, named):
    ps = [loud(5), loud(2, 3), loud(7)]
    optimizer = SGD([(f"p{i}", p) for i, p in enumerate(ps)] if named else ps, lr=1.0, max_norm=1.0)
    assert_clipped_step(optimizer, ps)
    group = optimizer.param_groups[0]
    new = loud(11, size=1000.0)
    if change == "replaced":
        group["params"][1] = ps[1] = new
    elif change == "appended":
        group["params"].append(new)
        ps.append(new)
    elif change == "removed":
        del group["params"][0], ps[0]
        if named:
            del group["param_names"][0]
    elif change == "grown in place":
        ps[1].data = torch.zeros(9, 3)
        ps[1].grad = torch.full((9, 3), 50.0)
    elif change == "another group":
        optimizer.add_param_group({"params": [("new", new)] if named else [new], "lr": 1.0})
        ps.append(new)
    else:
        group["params"].reverse()
        ps.reverse()
    assert_clipped_step(optimizer, ps)
    assert_clipped_step(optimizer, ps)
    if change == "removed" and named:
        assert optimizer.stats.names == ("p1", "p2")


@pytest.mark.parametrize("rule", [rules.TensorNorm(1.0), [rules.Mask(1e-3), 1.0], rules.AdaGC(warmup=0)])
def test_rules_of_each_tensor_follow_the_groups(rule):
    """Coefficients of their own once raised a KeyError for parameters that were not there at construction."""
    ps = [loud(5), loud(2, 3)]
    optimizer = AdamW(ps, lr=0.1, max_norm=rule)
    optimizer.step()
    for _ in range(3):
        optimizer.param_groups[0]["params"].append(loud(4, size=1e4))
        optimizer.step()
        assert optimizer.stats.coef.numel() in (1, optimizer.stats.count)
    assert optimizer.stats.count == 5


def test_what_a_rule_remembers_stays_with_its_parameter():
    """AdaGC's running norms: after a removal those behind it are not scaled by their neighbour's."""
    ps = [loud(1, size=size) for size in (1.0, 100.0, 10_000.0)]
    rule = rules.AdaGC(warmup=0)
    optimizer = SGD(ps, lr=1.0, max_norm=rule)
    optimizer.step()
    del optimizer.param_groups[0]["params"][0]
    new = loud(1, size=7.0)
    optimizer.param_groups[0]["params"].append(new)
    optimizer.step()
    torch.testing.assert_close(optimizer.stats.coef, torch.ones(3))  # each at its own norm; the new one learns its
    torch.testing.assert_close(rule.state["gamma"], torch.tensor([100.0, 10_000.0, 7.0], dtype=torch.float64))


@pytest.mark.parametrize("changed", ["saved", "loaded"])
def test_a_checkpoint_holds_what_a_rule_remembers_in_the_order_of_the_groups(changed):
    """Also where the groups have changed and no step has looked at them yet."""
    sizes, saved_rule, rule = (1.0, 100.0, 10_000.0), rules.AdaGC(warmup=0), rules.AdaGC(warmup=0)
    saved = SGD([loud(1, size=s) for s in (sizes if changed == "saved" else sizes[1:])], lr=1.0, max_norm=saved_rule)
    loaded = SGD([loud(1, size=s) for s in (sizes if changed == "loaded" else sizes[1:])], lr=1.0, max_norm=rule)
    saved.step()
    loaded.step()
    del {"saved": saved, "loaded": loaded}[changed].param_groups[0]["params"][0]
    loaded.load_state_dict(saved.state_dict())
    loaded.step()
    torch.testing.assert_close(rule.state["gamma"], torch.tensor(sizes[1:], dtype=torch.float64))
    torch.testing.assert_close(loaded.stats.coef, torch.ones(2))


def test_a_rule_that_several_share_follows_its_parameters_once():
    ps = [loud(1, size=size) for size in (1.0, 100.0, 10_000.0)]
    rule = rules.AdaGC(warmup=0)
    optimizer = SGD(ps, lr=1.0, max_norm=[rules.Only(rule, ps[:1]), rules.Only(rules.Only(rule, ps), ps[1:])])
    optimizer.step()
    optimizer.param_groups[0]["params"][:] = [ps[1], ps[2], ps[0]]
    optimizer.step()
    torch.testing.assert_close(rule.state["gamma"], torch.tensor([100.0, 10_000.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("rule", [1.0, rules.AdaGC(warmup=0), [rules.Only(rules.AdaGC(), "*"), 1.0]])
def test_groups_may_be_empty_for_a_while(rule):
    optimizer = SGD([("p", loud(3))], lr=1.0, max_norm=rule)
    optimizer.step()
    group = optimizer.param_groups[0]
    group["params"], group["param_names"] = [], []
    if not isinstance(rule, list):
        optimizer.step()
    new = loud(2)
    group["params"], group["param_names"] = [new], ["p"]
    optimizer.step()
    assert optimizer.stats.count == 1 and new.all()


def test_a_rule_for_a_parameter_that_is_gone_is_an_error_before_anything_is_written():
    ps = [loud(3), loud(2)]
    optimizer = SGD(ps, lr=1.0, max_norm=rules.Only(1.0, [ps[0]]))
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = loud(3)
    before = copy.deepcopy([list(optimizer.param_groups[0]["params"]), optimizer.clipper.state_dict()])
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match="no parameter of this Clipper"):
            call()
    after = [list(optimizer.param_groups[0]["params"]), optimizer.clipper.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_name_that_is_there_twice_is_an_error_before_anything_is_written():
    ps = [loud(3), loud(2)]
    optimizer = SGD([("a", ps[0]), ("b", ps[1])], lr=1.0, max_norm=1.0)
    optimizer.param_groups[0]["param_names"][1] = "a"
    with pytest.raises(ValueError, match="of one name, 'a'"):
        optimizer.step()
    assert not any(p.any() for p in ps)


def test_clippers_own_parameters_stay_what_they_were_given():
    ps = [loud(3), loud(2)]
    clipper = fastclip.Clipper(ps, 1.0)
    ps.append(loud(4))
    assert len(clipper.parameters) == 2


# ---- parameters that share memory ----


def sharing(kind, size=200_000, dtype=torch.float32):
    """Two parameters over the same memory, or over halves of it, and one besides."""
    base = torch.linspace(-1, 1, size, dtype=torch.float64).to(dtype)
    views = {
        "whole": lambda: [base, base.view(-1)],
        "transposed": lambda: [base.view(-1, 100), base.view(-1, 100).t()],
        "partial": lambda: [base[: 3 * size // 4], base[size // 4 :]],
    }[kind]()
    ps = [torch.nn.Parameter(view) for view in views] + [torch.nn.Parameter(torch.ones(5, dtype=dtype))]
    for i, p in enumerate(ps):
        p.grad = torch.empty_strided(p.shape, p.stride(), dtype=dtype).fill_(i + 1.0)
    return base, ps


DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# The order is decided before a dtype matters; interpreted and emulated kernels take their time.
RUNS = [("cpu", dtype) for dtype in DTYPES] + [(name, torch.float32) for name in BACKENDS if name != "cpu"]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
@pytest.mark.parametrize(("backend", "dtype"), RUNS, indirect=["backend"])
@pytest.mark.parametrize("kind", ["whole", "transposed", "partial"])
def test_no_update_is_lost_where_parameters_share_memory(kind, dtype, options, backend):
    """They are stepped one after the other, as in torch; at the same time, each would overwrite the other's update."""
    size = 200_000 if backend == "cpu" else 600
    base, ps = sharing(kind, size, dtype)
    optimizer = SGD(ps, lr=2**-6, **options)
    steps = 10 if backend == "cpu" else 1
    for _ in range(steps):
        optimizer.step()
    slow_base, slow = sharing(kind, size, dtype)
    for p in slow:  # torch's loop, one parameter at a time
        p.grad = p.grad.clone()
    loop = torch.optim.SGD(slow, lr=2**-6, foreach=False, **options)
    for _ in range(steps):
        loop.step()
    budget = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.1}[dtype]  # steps · (some roundings of it)
    torch.testing.assert_close(base.double(), slow_base.double(), rtol=budget, atol=budget)
    torch.testing.assert_close(ps[2].double(), slow[2].double(), rtol=budget, atol=budget)


@pytest.mark.parametrize("shared", ["exp_avg", "exp_avg_sq", "step"])
def test_states_that_share_memory_are_stepped_in_order(shared):
    ps = [parameter(torch.full((50_000,), float(i + 1))) for i in range(2)]
    optimizer = AdamW(ps, lr=0.1)
    optimizer.step()
    optimizer.state[ps[1]][shared] = optimizer.state[ps[0]][shared]
    reference = copy.deepcopy(optimizer)  # which keeps what is shared
    theirs = reference.param_groups[0]["params"]
    for ours, copied in zip(ps, theirs):
        copied.grad = ours.grad.clone()
    optimizer.step()
    for p in theirs:  # one at a time
        others = [q for q in theirs if q is not p]
        kept = [q.grad for q in others]
        for q in others:
            q.grad = None
        reference.step()
        for q, gradient in zip(others, kept):
            q.grad = gradient
    torch.testing.assert_close(ps, theirs, rtol=0, atol=0)


def test_gradients_that_reach_into_another_groups_are_zeroed_after_both_steps():
    buffer = torch.arange(1.0, 7.0)
    ps = [parameter(buffer[:4].clone()), parameter(buffer[2:].clone())]
    ps[0].grad, ps[1].grad = buffer[:4], buffer[2:]
    before = [p.detach().clone() for p in ps]
    gradients = [p.grad.clone() for p in ps]
    SGD([{"params": [p]} for p in ps], lr=1.0).step(zero_grad=True)
    for p, old, gradient in zip(ps, before, gradients):
        assert torch.equal(p.detach(), old - gradient)
    assert not buffer.any()


def test_a_parameter_that_no_kernel_takes_is_an_error_before_anything_is_written():
    ps = [loud(3), loud(3)]
    optimizer = AdamW([{"params": [p]} for p in ps], lr=0.1)
    optimizer.param_groups[1]["params"][0] = parameter(torch.ones(3, dtype=torch.complex64))
    before = ps[0].detach().clone()
    with pytest.raises(TypeError, match=r"parameter must be of a floating-point dtype, got torch\.complex64"):
        optimizer.step()
    assert torch.equal(ps[0].detach(), before)


def test_tensors_apart_are_stepped_in_one_go(monkeypatch):
    """References elsewhere (an EMA, a state_dict that is kept) are no overlap."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    kept = model.state_dict()
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    plan = optimizer._plan(set())
    assert len(plan) == 1 and plan[0].table is not None and len(kept) == 4


# ---- a module that changes its dtype in mid-training ----


@pytest.mark.parametrize("optimizer_class", [AdamW, SGD])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32),
                                    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])  # fmt: skip
def test_a_module_converted_in_mid_training(optimizer_class, dtypes, backend):
    options = {"momentum": 0.9} if optimizer_class is SGD else {}
    model = torch.nn.Linear(4, 3).to(dtypes[0])
    optimizer = optimizer_class(model.parameters(), lr=2**-4, max_norm=1.0, **options)

    def step():
        optimizer.zero_grad()
        (model(torch.ones(2, 4, dtype=model.weight.dtype)) ** 2).sum().backward()
        optimizer.step()

    step()
    exact = copy.deepcopy(model).double()
    states = [{k: v.to(torch.float64, copy=True) for k, v in optimizer.state[p].items()} for p in model.parameters()]
    model.to(dtypes[1])
    exact.load_state_dict(model.state_dict())
    step()
    torch_class = torch.optim.AdamW if optimizer_class is AdamW else torch.optim.SGD
    oracle = torch_class(exact.parameters(), lr=2**-4, foreach=False, **options)
    for p, state in zip(exact.parameters(), states):
        oracle.state[p] = state
    (exact(torch.ones(2, 4, dtype=torch.float64)) ** 2).sum().backward()
    torch.nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
    oracle.step()
    coarse = max(torch.finfo(d).eps for d in dtypes)
    for p, q in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=8 * coarse)  # values below 2, some roundings
        assert optimizer.stats.total_norm.dtype == (torch.float64 if dtypes[1] == torch.float64 else torch.float32)
