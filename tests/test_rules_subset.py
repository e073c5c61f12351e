"""Only and Except: rules for some parameters, and the names they are chosen by."""

import fnmatch
import math
import time

import pytest
import torch
from cases import NORM_ERROR, assert_scaled, clip_factor, clipping, parameter, tensor_norm, total_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import named

import fastclip
from fastclip.rules import AGC, BlockRMS, Except, GlobalNorm, Mask, Only, TensorNorm, Value

pytestmark = pytest.mark.usefixtures("one_thread")


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
