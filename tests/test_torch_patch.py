"""fastclip in the place of torch.nn.utils' functions: who is reached, what goes on to torch, and what is left after."""

import contextlib
import copy
import gc
import json
import math
import subprocess
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.utils as utils
from cases import parameter
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import fastclip
from fastclip import rules
from fastclip.integrations import clippers, torch_patch

NAMES = ("clip_grad_norm_", "clip_grad_value_", "_get_total_norm", "_clip_grads_with_norm_")
ORIGINALS = {name: getattr(clip_grad, name) for name in NAMES}
INSIDE = {name: f.__closure__[f.__code__.co_freevars.index("func")].cell_contents for name, f in ORIGINALS.items()}


def is_unpatched():
    inside = {n: f.__closure__[f.__code__.co_freevars.index("func")].cell_contents for n, f in ORIGINALS.items()}
    return inside == INSIDE and all(getattr(clip_grad, name) is f for name, f in ORIGINALS.items())


@pytest.fixture(autouse=True)
def nothing_is_left():
    assert is_unpatched()
    yield
    fastclip.unpatch_torch()
    assert is_unpatched()


BACKEND = fastclip.backends.choose(torch.device("cpu")).name


def loud(dtype=torch.float32):
    """Two parameters whose gradients have the norm 1000 together."""
    return [parameter(torch.tensor([600.0], dtype=dtype)), parameter(torch.tensor([0.0, -800.0], dtype=dtype))]


def gradients(ps):
    return [p.grad.tolist() for p in ps]


@contextlib.contextmanager
def every_warning():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned


def active():
    return torch_patch._patches[-1]


# ---- who is reached ----

HOLDERS = {  # each a way to the same function
    "bound by name": lambda ps: clip_grad_norm_(ps, 0.5),
    "torch.nn.utils": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5),
    "its module": lambda ps: clip_grad.clip_grad_norm_(ps, max_norm=0.5),
    "deprecated": lambda ps: utils.clip_grad_norm(ps, 0.5),
    "a generator": lambda ps: clip_grad_norm_((p for p in ps), 0.5, norm_type=2),
    "by keyword": lambda ps: clip_grad_norm_(parameters=iter(ps), max_norm=0.5, norm_type=2.0, foreach=True),
    "in two parts": lambda ps: (
        norm := get_total_norm([p.grad for p in ps]),
        clip_grads_with_norm_(ps, 0.5, norm),
    )[0],
    "private names": lambda ps: (
        norm := clip_grad._get_total_norm([p.grad for p in ps]),
        clip_grad._clip_grads_with_norm_(ps, 0.5, norm),
    )[0],
}


@pytest.mark.parametrize("way", HOLDERS)
@pytest.mark.filterwarnings("ignore:.*clip_grad_norm. is now deprecated:FutureWarning")
def test_every_holder_is_reached(way):
    ps = [parameter(torch.tensor([601.0, 3.0], dtype=torch.bfloat16)), parameter(torch.tensor([1.0]).bfloat16())]
    exact = math.sqrt(sum(g**2 for each in gradients(ps) for g in each))
    assert HOLDERS[way]([parameter(p.grad.clone()) for p in ps]).dtype == torch.bfloat16
    with fastclip.patch_torch() as patch:
        norm = HOLDERS[way](ps)
        assert norm.dtype == torch.float32 and abs(norm.item() / exact - 1) < 1e-6
        counts = patch.counts()
        assert counts["fastclip"] == {BACKEND: 1} and not counts["torch"] and not counts["compiled"]
    assert HOLDERS[way](ps).dtype == torch.bfloat16


def test_values_too():
    ps = loud()
    with fastclip.patch_torch() as patch:
        assert clip_grad_value_(ps, 700) is None
        assert sum(patch.counts()["fastclip"].values()) == 1
    assert gradients(ps) == [[600], [0, -700]]


def test_the_functions_stay_the_objects_they_are():
    before = [getattr(utils, name) for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm")]
    fastclip.patch_torch()
    assert before == [getattr(utils, name) for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm")]
    assert clip_grad_norm_.__wrapped__ is INSIDE["clip_grad_norm_"]


@pytest.mark.parametrize("first", ["torch", "user", "fastclip"])
def test_either_order_of_imports(first, tmp_path):
    """A module that binds the name at its import, before or after the patch."""
    (tmp_path / "user.py").write_text("from torch.nn.utils import clip_grad_norm_ as bound\n")
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import {first}
import torch, fastclip
fastclip.patch_torch()
import user
p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)); p.grad = torch.ones_like(p)
print(user.bound([p], 1.0).dtype)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "torch.float32"


def test_where_torch_has_no_cell(monkeypatch):
    """The attributes, then, of whoever has them at the time."""

    def plain(inside):
        def function(*args, **kwargs):
            return inside(*args, **kwargs)

        function.__closure__[0].cell_contents  # noqa: B018 - has a cell, but not one of that name
        return function

    functions = {name: plain(INSIDE[name]) for name in NAMES}
    for module in (clip_grad, utils):
        for attribute, value in list(vars(module).items()):
            for name, function in functions.items():
                if value is ORIGINALS[name]:
                    monkeypatch.setattr(module, attribute, function)
    torch_patch.torch_functions.cache_clear()
    try:
        with fastclip.patch_torch() as patch:
            assert utils.clip_grad_norm_ is clip_grad.clip_grad_norm_ is not functions["clip_grad_norm_"]
            assert utils.get_total_norm is clip_grad._get_total_norm is not functions["_get_total_norm"]
            ps = loud()
            assert utils.clip_grad_norm_(ps, 0.5) == 1000
            utils.clip_grads_with_norm_(ps, 0.25, utils.get_total_norm([p.grad for p in ps]))
            assert sum(patch.counts()["fastclip"].values()) == 2
            torch.testing.assert_close(ps[1].grad[1].item(), -0.2, rtol=1e-5, atol=0)
        for name, function in functions.items():
            assert getattr(clip_grad, name) is function
        assert utils.get_total_norm is functions["_get_total_norm"]
    finally:
        torch_patch.torch_functions.cache_clear()


# ---- patches in patches ----


def test_a_second_patch_takes_the_place_of_the_first_and_one_call_undoes_both():
    fastclip.patch_torch()
    fastclip.patch_torch(rule=0.25)
    fastclip.patch_torch()
    fastclip.patch_torch(rule=0.5)
    assert len(torch_patch._patches) == 2  # no chain grows
    ps = loud()
    clip_grad_norm_(ps, 1e6)
    torch.testing.assert_close(ps[1].grad[1].item(), -0.4, rtol=1e-5, atol=0)
    fastclip.unpatch_torch()
    assert is_unpatched()
    fastclip.unpatch_torch()
    assert is_unpatched()


def test_blocks_restore_what_was_there():
    outer = fastclip.patch_torch()
    with fastclip.patch_torch(rule=0.5) as middle:
        with fastclip.patch_torch(rule=0.25) as inner:
            assert active() is inner
        assert active() is middle
        with pytest.raises(ZeroDivisionError), fastclip.patch_torch():
            1 / 0  # noqa: B018
        assert active() is middle
    assert active() is outer


def test_unpatching_inside_of_a_block_lasts():
    with fastclip.patch_torch():
        fastclip.unpatch_torch()
        assert is_unpatched()
    assert is_unpatched()


# ---- what goes on to torch ----


def overlapping():
    p, q = loud()
    shared = torch.arange(4.0)
    p.grad, q.grad = shared[1:2], shared[1:3]
    return [p, q]


REFUSED = {
    "max_norm of digits": lambda f: (ps := loud(), f(ps, "1.0")),
    "max_norm True": lambda f: (ps := loud(), f(ps, True)),
    "max_norm negative": lambda f: (ps := loud(), f(ps, -1)),
    "max_norm NaN": lambda f: (ps := loud(), f(ps, math.nan)),
    "norm_type of digits": lambda f: (ps := loud(), f(ps, 1.0, "2")),
    "norm_type negative": lambda f: (ps := loud(), f(ps, 1.0, norm_type=-1)),
    "norm_type -inf": lambda f: (ps := loud(), f(iter(ps), 1.0, -math.inf)),
    "gradients as parameters": lambda f: (ps := [p.grad for p in loud()], f(ps, 1.0)),
    "overlapping": lambda f: (ps := overlapping(), f(ps, 1.0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fastclip_refuses_goes_on_to_torch(name):
    expected, norm = REFUSED[name](clip_grad_norm_)
    with fastclip.patch_torch() as patch:
        with pytest.warns(RuntimeWarning, match=r"clip_grad_norm_: .*torch's own code") as warned:
            ps, found = REFUSED[name](clip_grad_norm_)
        assert [w.filename for w in warned] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again, _ = REFUSED[name](clip_grad_norm_)  # warned of once
        counts = patch.counts()
        assert counts["fastclip"] == {} and list(counts["torch"].values()) == [2]
    torch.testing.assert_close(found, norm, rtol=0, atol=0, equal_nan=True)
    for a, b, c in zip(ps, again, expected):
        g, h, e = (t.grad if t.grad is not None else t for t in (a, b, c))
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(h, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", REFUSED)
def test_without_the_fallback_it_raises(name):
    with fastclip.patch_torch(fallback=False), pytest.raises((TypeError, ValueError, RuntimeError)):
        REFUSED[name](clip_grad_norm_)


def test_the_other_functions_go_on_to_torch_too():
    expected, ps = loud(), loud()
    clip_grad_value_(expected, "700")
    norm = get_total_norm([p.grad for p in expected], "2")
    clip_grads_with_norm_(expected, "0.5", norm)
    with fastclip.patch_torch() as patch, every_warning() as warned:
        clip_grad_value_(ps, "700")
        assert get_total_norm([p.grad for p in ps], "2") == norm
        clip_grads_with_norm_(ps, "0.5", norm)
        assert len(warned) == 3 and len(patch.counts()["torch"]) == 3
    assert gradients(ps) == gradients(expected)


def test_an_argument_that_only_a_later_torch_has_goes_on_to_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch_patch.torch_functions()["clip_grad_norm_"], "original", lambda *a, **k: calls.append(k))
    with fastclip.patch_torch(), pytest.warns(RuntimeWarning, match="new_argument"):
        clip_grad_norm_(loud(), 1.0, new_argument=3)
    assert calls == [{"new_argument": 3}]


def test_limits_that_change_warn_once():
    with fastclip.patch_torch(), every_warning() as warned:
        for step in range(5):
            clip_grad_norm_(loud(), -0.5 - step)
    assert len(warned) == 1


def test_what_torch_refuses_too_is_torchs_error():
    with fastclip.patch_torch(), pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="could not convert"):
        clip_grad_norm_(loud(), "a lot")


def test_errors_that_are_no_refusals_are_not_run_again(monkeypatch):
    """A kernel that fails may have written half of the gradients."""

    def fails(*args, **kwargs):
        raise RuntimeError("the device is gone")

    monkeypatch.setitem(torch_patch.OURS, "clip_grad_norm_", types.FunctionType(fails.__code__, globals()))
    ps = loud()
    with fastclip.patch_torch(), pytest.raises(RuntimeError, match="the device is gone"):
        clip_grad_norm_(ps, 0.5)
    assert gradients(ps) == gradients(loud())


@pytest.mark.parametrize("rule", [None, rules.ZClip()])
def test_an_error_that_was_asked_for_is_raised(rule):
    ps = loud()
    ps[0].grad.fill_(math.inf)
    with fastclip.patch_torch(rule=rule), pytest.raises(RuntimeError, match=r"error_if_nonfinite|not finite"):
        clip_grad_norm_(ps, 0.5, error_if_nonfinite=True)
    assert gradients(ps) == [[math.inf], [0, -800]]


@pytest.mark.parametrize("rule", [None, 0.5])
def test_nothing_to_clip(rule):
    with fastclip.patch_torch(rule=rule, record=fastclip.monitor.GradMonitor()) as patch:
        assert clip_grad_norm_([], 1.0) == 0 and clip_grad_value_([], 1.0) is None
        assert clip_grad_norm_([torch.nn.Parameter(torch.ones(1))], 1.0) == 0
        with pytest.warns(UserWarning, match="empty generator"):
            clip_grad_norm_((p for p in ()), 1.0)
        assert patch.counts()["torch"] == {}


# ---- rules ----


@pytest.mark.parametrize(
    "rule",
    [0.5, rules.GlobalNorm(0.5), [rules.Mask(1e-3), 0.5], lambda limit: limit / 2, lambda m: [rules.GlobalNorm(m / 2)]],
    ids=["number", "rule", "list", "function", "function to a list"],
)
def test_a_rule_takes_the_limits_place(rule):
    for split in (False, True):
        ps = loud()
        with fastclip.patch_torch(rule=rule):
            if split:
                clip_grads_with_norm_(ps, 1.0, get_total_norm([p.grad for p in ps]))
            else:
                assert clip_grad_norm_(ps, 1.0) == 1000
        torch.testing.assert_close(ps[1].grad[1].item(), -0.4, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["ZClip", [], [1.0, "x"], rules.ZClip, [rules.GlobalNorm(1, 1.0), rules.ZClip()]])
def test_a_rule_that_is_none_raises_at_once(rule):
    with pytest.raises((TypeError, ValueError), match="rule"):
        fastclip.patch_torch(rule=rule)
    assert is_unpatched()


def noisy(step, ps, size=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = size * torch.randn(p.shape, generator=generator) * (50 if step == 40 else 1)


def test_each_set_of_parameters_has_a_memory_of_its_own():
    one, other = loud(), [*loud(), parameter(torch.zeros(3))]
    ours = [loud(), [*loud(), parameter(torch.zeros(3))]]
    rule = rules.ZClip(warmup=5)
    expected = [fastclip.Clipper(ps, rules.ZClip(warmup=5)) for ps in ours]
    with fastclip.patch_torch(rule=rule):
        for step in range(50):
            for ps, clipper, size in zip((one, other), expected, (1.0, 30.0)):
                noisy(step, ps, size)
                noisy(step, clipper.parameters, size)
                norm = clip_grad_norm_(iter(ps), 1.0)
                assert norm == clipper.clip_().total_norm
                assert gradients(ps) == gradients(clipper.parameters)
    assert rule.state_dict() == {}  # the rule itself is only copied


def test_a_rule_made_of_the_limit_remembers_across_limits():
    ps, ours = loud(), loud()
    clipper = fastclip.Clipper(ours, [rules.ZClip(warmup=5), rules.GlobalNorm(lambda step: 1 + step)])
    with fastclip.patch_torch(rule=lambda limit: [rules.ZClip(warmup=5), rules.GlobalNorm(limit)]):
        for step in range(50):
            noisy(step, ps)
            noisy(step, ours)
            assert clip_grad_norm_(ps, 1.0 + step) == clipper.clip_().total_norm
            assert gradients(ps) == gradients(ours)


@pytest.mark.parametrize("rule", [0.5, lambda limit: limit / 2, [0.5]])
def test_a_number_keeps_the_norm_that_is_asked_for(rule):
    ps = [parameter(torch.tensor([3.0, 4.0]))]
    with fastclip.patch_torch(rule=rule):
        assert clip_grad_norm_(ps, 1.0, norm_type=math.inf) == 4
    torch.testing.assert_close(ps[0].grad, torch.tensor([0.375, 0.5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", [rules.Only(rules.GlobalNorm(1.0), "head.*"), [rules.AGC(exclude="head"), 1.0]])
def test_rules_that_go_by_names_are_refused_at_once(rule):
    with pytest.raises(ValueError, match=r"rule: .* goes by names of parameters"):
        fastclip.patch_torch(rule=rule)
    assert is_unpatched()


def test_rules_for_parameters_themselves():
    ps = loud()
    with fastclip.patch_torch(rule=rules.Only(rules.GlobalNorm(1.0), ps[0])):
        clip_grad_norm_(ps, 5.0)
    assert gradients(ps) == [[pytest.approx(1.0, rel=1e-5)], [0, -800]]


def test_a_call_that_only_measures_is_no_step_of_the_rule():
    ps = loud()
    with fastclip.patch_torch(rule=0.5):
        assert clip_grad_norm_(ps, math.inf) == 1000
        clip_grads_with_norm_(ps, math.inf, torch.tensor(5.0))
    assert gradients(ps) == gradients(loud())


def test_an_error_in_a_function_of_the_limit_is_heard():
    with fastclip.patch_torch(rule=lambda limit: limit / 0), pytest.raises(ZeroDivisionError):
        clip_grad_norm_(loud(), 1.0)
    with fastclip.patch_torch(rule=lambda limit: None), pytest.raises(TypeError, match="rule"):
        clip_grad_norm_(loud(), 1.0)


@pytest.mark.parametrize("options", [{}, {"rule": rules.AdaGC()}, {"record": fastclip.monitor.GradMonitor()}])
def test_a_patch_keeps_no_parameters_alive(options):
    with fastclip.patch_torch(**options):
        for _ in range(3):
            ps = loud()
            for _ in range(2):
                clip_grad_norm_(ps, 1.0)
            seen = [weakref.ref(p) for p in ps]
            del ps
            gc.collect()
            assert not any(ref() is not None for ref in seen)


def test_sets_that_share_parameters():
    """With gradients they are two; one without a gradient may be left out, and new ones may come."""
    p, q = loud()
    made = clippers.Clippers(rules.ZClip())
    both, one = made.find([p, q], 1.0, 2.0), made.find([p], 1.0, 2.0)
    assert both is not one and made.find([p, q], 1.0, 2.0) is both and made.find([p], 2.0, 2.0) is one
    other = clippers.Clippers(rules.ZClip())
    first = other.find([p, q], 1.0, 2.0)
    q.grad = None
    assert other.find([p], 1.0, 2.0) is first
    r = parameter(torch.zeros(3))
    assert other.find([p, r], 1.0, 2.0) is first
    assert first.lend([p, r], 1.0, 2.0).parameters == [p, q, r]
    assert other.find([r], 1.0, 2.0) is not first  # p has a gradient


@pytest.mark.parametrize("rule", [rules.AdaGC(warmup=5), rules.ZClip(warmup=5)])
@pytest.mark.filterwarnings("ignore::fastclip.monitor.GradientWarning")
def test_a_framework_that_passes_only_parameters_with_gradients(rule, tmp_path):
    """One set, one file, and each parameter's memory stays its own."""
    ps, ours = ([parameter(torch.zeros(3)) for _ in range(6)] for _ in range(2))
    clipper = fastclip.Clipper(ours, copy.deepcopy(rule))
    with fastclip.patch_torch(rule=rule, record=tmp_path / "run.jsonl"):
        for step in range(60):
            generator = torch.Generator().manual_seed(step)
            used = torch.rand(6, generator=generator) < 0.7
            if step == 0:
                used[:] = True
            for p, q, is_used in zip(ps, ours, used):
                g = torch.randn(3, generator=generator) * (30 if step == 50 else 1)
                p.grad, q.grad = (g.clone(), g.clone()) if is_used else (None, None)
            clip_grad_norm_([p for p in ps if p.grad is not None], 1.0)
            clipper.clip_()
            for p, q in zip(ps, ours):
                assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"] and len(norms_in(tmp_path / "run.jsonl")) == 60


# ---- records ----


def norms_in(path):
    lines = map(json.loads, path.read_text().splitlines())
    return [line["total_norm"] for line in lines if "total_norm" in line]


def test_a_record_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    with fastclip.patch_torch(record=path):
        ps, other = loud(), loud()
        for step in range(3):
            for p, g in zip(ps, loud()):
                p.grad = g.grad * (step + 1)
            clip_grad_norm_(ps, 0.5)
        clip_grads_with_norm_(ps, 1e6, torch.tensor(7.0))
        clip_grad_value_(other, 700)
    assert norms_in(path) == [1000, 2000, 3000, 7]
    assert norms_in(tmp_path / "run-2.jsonl") == [1000]
    assert fastclip.monitor.load(path).spans
    with fastclip.patch_torch(record=path):  # closed above, so that it can go on
        clip_grad_norm_(loud(), 0.5)


def test_a_record_in_a_monitor_of_ones_own():
    monitor = fastclip.monitor.GradMonitor()
    with fastclip.patch_torch(rule=0.25, record=monitor):
        clip_grad_norm_(loud(), 0.5)
        clip_grad_norm_(loud(), 0.5)  # another set, which the monitor does not get
    assert monitor.last["coef"] == pytest.approx(0.25 / 1000) and monitor.last["step"] == 0
    monitor.close()


def test_records_are_closed_when_their_patch_ends(tmp_path):
    def recorded(name):
        return fastclip.patch_torch(record=tmp_path / name)

    recorded("a")
    clip_grad_norm_(loud(), 0.5)
    recorded("a")  # the same file again, as a notebook's cell that is run twice
    clip_grad_norm_(loud(), 0.5)
    fastclip.patch_torch()
    fastclip.patch_torch()
    assert norms_in(tmp_path / "a") == [1000, 1000]
    with fastclip.patch_torch():
        recorded("b")
        clip_grad_norm_(loud(), 0.5)
    assert norms_in(tmp_path / "b") == [1000]
    assert len(torch_patch._patches) == 1


def test_blocks_that_end_in_another_order():
    first = fastclip.patch_torch(rule=0.5).__enter__()
    second = fastclip.patch_torch(rule=0.25).__enter__()
    first.__exit__(None, None, None)
    ps = loud()
    clip_grad_norm_(ps, 1e6)
    torch.testing.assert_close(ps[1].grad[1].item(), -0.2, rtol=1e-5, atol=0)
    fastclip.patch_torch()
    second.__exit__(None, None, None)
    assert is_unpatched()


def test_clips_while_a_record_is_closed(tmp_path):
    """By another thread: no error, and no file is opened again."""
    errors, over = [], threading.Event()

    def clips():
        ps = loud()
        try:
            while not over.is_set():
                clip_grad_norm_(ps, 0.5)
        except BaseException as error:
            errors.append(error)
            raise

    thread = threading.Thread(target=clips)
    thread.start()
    for i in range(100):
        fastclip.patch_torch(record=tmp_path / f"{i}.jsonl")
        fastclip.unpatch_torch()
    over.set()
    thread.join()
    assert not errors and not any("-2" in path.name for path in tmp_path.iterdir())


def test_a_record_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="record"):
        fastclip.patch_torch(record=tmp_path / "none" / "run.jsonl")
    with pytest.raises(IsADirectoryError, match="record"):
        fastclip.patch_torch(record=tmp_path)
    assert is_unpatched()
    with fastclip.monitor.GradMonitor(tmp_path / "run.jsonl"), fastclip.patch_torch(record=tmp_path / "run.jsonl"):
        with pytest.warns(RuntimeWarning, match="nothing is recorded"):
            assert clip_grad_norm_(ps := loud(), 0.5) == 1000
        assert clip_grad_norm_(ps, 0.5) < 1000


# ---- torch.compile ----


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
def test_a_compiled_call_stays_one_graph_and_follows_the_patch():
    ps = [parameter(torch.tensor([3.0], dtype=torch.bfloat16)), parameter(torch.tensor([1.0]).bfloat16())]
    compiled = torch.compile(lambda limit: clip_grad_norm_(ps, limit), fullgraph=True, backend="eager")
    assert compiled(100.0).dtype == torch.bfloat16
    with fastclip.patch_torch():
        assert compiled(100.0).dtype == torch.float32
        assert compiled("100.0").dtype == torch.float32  # torch's clip, which measures by our norm
        assert torch_patch._patches[-1].counts()["compiled"]
    assert compiled(100.0).dtype == torch.bfloat16
    loose = torch.compile(lambda limit: clip_grad_norm_(ps, limit), backend="eager")
    with fastclip.patch_torch(rule=0.5):
        assert loose(100.0).dtype == torch.float32
    exact = 0.5 / math.sqrt(10)
    torch.testing.assert_close(ps[1].grad.item(), exact, rtol=2**-8, atol=0)


# ---- threads ----


def test_threads_clip_while_another_patches_and_unpatches():
    """No error, no wrong norm, whoever does a call: each thread has gradients of its own size."""
    errors, over = [], threading.Event()

    def clips(size):
        ps = [parameter(torch.full((7,), float(size))) for _ in range(3)]
        norm = size * math.sqrt(21)
        try:
            while not over.is_set():
                for p in ps:
                    p.grad.fill_(size)
                found = clip_grad_norm_(iter(ps), norm / 2)
                assert abs(found.item() / norm - 1) < 1e-6
                left = get_total_norm([p.grad for p in ps])
                assert abs(left.item() / (norm / 2) - 1) < 1e-5
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=clips, args=(size,)) for size in (1, 10, 100)]
    for thread in threads:
        thread.start()
    for i in range(1000):
        fastclip.patch_torch(rule=(lambda limit: limit) if i % 3 == 0 else None)
        if i % 2:
            fastclip.unpatch_torch()
    fastclip.unpatch_torch()
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
