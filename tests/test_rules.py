"""Rules together: lists, shared parameters, broken gradients, counts, refusals, and compiled."""

import copy
import gc
import itertools
import math
import pickle
import types
import weakref

import pytest
import torch
from cases import assert_scaled, clip_factor, parameter
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import CLOSE, named

import fastclip
from fastclip.rules import AGC, AdaGC, AutoClip, BlockRMS, Except, GlobalNorm, Mask, Only, TensorNorm, Value, ZClip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("between", [Value(1.0), AGC(1e9), TensorNorm(1.0)], ids=str)
@pytest.mark.parametrize("make", [fastclip.optim.SGD, torch.optim.SGD])
def test_what_is_held_stays_so_whatever_comes_after(make, between):
    ps = [parameter(torch.full((2,), scale), torch.ones(2)) for scale in (1e-6, 1.0)]
    optimizer = make(ps, lr=0.1, weight_decay=0.5)
    fastclip.Clipper(ps, [Mask(1e-3, freeze=True), between, GlobalNorm(9.0)]).step(optimizer)
    assert ps[0].tolist() == [1, 1] and ps[1].max() < 0.9


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


def test_repr():
    assert repr(AGC(exclude="head.*")) == "AGC(0.01, eps=0.001, exclude=['head.*'])"
    assert repr(Only(1.0, ["a", torch.ones(2, 3)])) == "Only(GlobalNorm(1.0, norm_type=2.0), ['a', (2, 3)])"
    assert repr(ZClip()) == "ZClip(z_max=2.5, alpha=0.97, warmup=25, eps=1e-06)"
    assert repr(Value(-1, 2)) == "Value(-1.0, 2.0)" and repr(BlockRMS(1)) == "BlockRMS(1.0)"


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
