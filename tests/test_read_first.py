"""Gradients that a Clipper reads before it packs them: on a CPU, where a rule needs nothing but the statistics."""

import copy
import math
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from cases import gradients, parameter
from hypothesis import given, settings
from hypothesis import strategies as st

import fastclip
from fastclip import packers
from fastclip.gradients.table import ReadTable
from fastclip.rules import AdaGC, AutoClip, BlockRMS, Except, GlobalNorm, Mask, Needs, Rule, TensorNorm, Value, ZClip

compiled = pytest.mark.skipif(
    packers.get().packer.measure_gradients is None, reason="the packer in Python holds what it reads"
)
RULES = {
    "ZClip": lambda: ZClip(warmup=1, z_max=0.5),
    "AutoClip": lambda: AutoClip(window=3),
    "AdaGC": lambda: AdaGC(warmup=1),
    "TensorNorm": lambda: TensorNorm(1.5),
    "TensorNorm, inf": lambda: TensorNorm(1.5, norm_type=math.inf),
    "Mask": lambda: Mask(0.5),
    "schedule": lambda: GlobalNorm(lambda step: 10.0 / (1 + step)),
    "the number of gradients": lambda: GlobalNorm(2.0, norm_type=0),
    "a list": lambda: [Mask(0.5), ZClip(warmup=1), GlobalNorm(3.0)],
    "all but one": lambda: Except(TensorNorm(1.5), ["p0"]),
}


class Meanwhile(Rule):
    """Something happens while it decides on `coef`."""

    norm_type = 2.0
    needs = Needs.TOTAL_NORM

    def __init__(self, happens, coef=0.5):
        self.happens, self.coef = happens, coef

    def decide(self, stats, context):
        self.happens()
        return torch.full((), self.coef, dtype=torch.float64)


def models(dtypes, counts=(3, 5)):
    torch.manual_seed(0)
    return {f"p{i}": parameter(torch.randn(counts).to(dtype)) for i, dtype in enumerate(dtypes)}


@compiled
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_it_changes_no_bit(name, nonfinite, data):
    """Of results or statistics, over several steps, with whatever gradients."""
    count = data.draw(st.integers(1, 6))
    mine = {f"p{i}": parameter(torch.zeros(4)) for i in range(count)}
    theirs = copy.deepcopy(mine)
    first, packs = (fastclip.Clipper(ps.items(), RULES[name](), nonfinite=nonfinite) for ps in (mine, theirs))
    packs._read_first = False
    for step in range(4):
        dtypes = data.draw(st.sampled_from([[torch.float32], [torch.float64], [torch.float32, torch.float64]]))
        for i, (p, q) in enumerate(zip(mine.values(), theirs.values())):
            scale = data.draw(st.sampled_from([0.0, 0.1, 1.0, 1.0, 1e20, math.nan]))
            gradient = (torch.randn(2, 2) * scale).to(dtypes[i % len(dtypes)])
            for each in (p, q):
                each.data = each.data.to(gradient.dtype).reshape(2, 2)
                each.grad = None if data.draw(st.booleans()) and i else gradient.clone()
            q.grad = None if p.grad is None else p.grad.clone()
        results = []
        for clipper in (first, packs):
            try:
                results.append(numbers_of(clipper.clip_()))
            except RuntimeError as error:
                results.append(str(error))
            results.append(str([rule.state_dict() for rule in clipper.rules]))
        assert results[:2] == results[2:]
        for p, q in zip(mine.values(), theirs.values()):
            assert (p.grad is None) == (q.grad is None), step
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
                assert p.grad._version == q.grad._version


def numbers_of(stats):
    tensors = stats.total_norm, stats.coef, stats.tensor_norms, stats.nonfinite, stats.limit, stats.skipped
    return str([None if t is None else t.tolist() for t in tensors])  # in which two NaN are equal


@compiled
@pytest.mark.parametrize(
    ("rule", "nonfinite", "expected"),
    [
        (TensorNorm(1.0), "propagate", True),
        ([Mask(0.1), ZClip(), GlobalNorm(1.0)], "skip", True),
        (Except(TensorNorm(1.0), ["p0"]), "propagate", True),
        (TensorNorm(1.0), "zero", False),  # which repairs what it reads
        (Value(1.0), "propagate", False),
        (BlockRMS(1.0), "propagate", False),  # which needs sizes, too
        (lambda stats: stats.coef, "propagate", False),  # which may look at anything
    ],
)
def test_where_it_is_read_first(rule, nonfinite, expected):
    ps = models([torch.float32] * 3)
    clipper = fastclip.Clipper(ps.items(), rule, nonfinite=nonfinite)
    table = clipper.read()
    assert isinstance(table, ReadTable) == expected
    assert len(table) == 3 and len(table.groups[0]) == 3
    for others in ([torch.float32, torch.float64], []):
        clipper = fastclip.Clipper(models(others).items(), TensorNorm(1.0))
        assert not isinstance(clipper.read(), ReadTable) and len(clipper.read()) == len(others)


@compiled
def test_what_is_clipped_in_every_step_is_packed_at_once():
    ps = list(models([torch.float32] * 3).values())
    rule = Meanwhile(lambda: None, 1.0)
    clipper = fastclip.Clipper(ps, rule)
    for coef, reads_next in [(1.0, True), (0.5, False), (0.5, False), (1.0, True)]:
        rule.coef = coef
        clipper.clip_()
        assert isinstance(clipper.read(), ReadTable) == reads_next


@compiled
@pytest.mark.parametrize("rule", [GlobalNorm(1.0), TensorNorm(1.0)])
def test_after_a_clip_it_reads_first_again(rule):
    ps = list(models([torch.float32] * 3).values())
    clipper = fastclip.Clipper(ps, rule, nonfinite="skip")
    read_first = []
    for scale in (0.01, 100.0, 0.01, 0.01, None, 100.0, 0.01):
        for p in ps:
            p.grad = None if scale is None else torch.full((3, 5), scale)
        clipper.clip_()
        read_first.append(isinstance(clipper.read(), ReadTable))
    assert read_first == [True, False, True, True, False, False, True]


@compiled
@pytest.mark.parametrize("how", ["others", "none", "memory", "one more", "smaller"])
@pytest.mark.parametrize("coef", [0.5, 1.0, 0.0])
def test_gradients_that_are_replaced_meanwhile_are_refused(how, coef):
    """Before anything is written; memory that was a gradient's, and is something else's now, least of all."""
    ps = [*models([torch.float32] * 20).values(), torch.nn.Parameter(torch.zeros(3, 5))]
    arrays = [np.ones((3, 5), dtype=np.float32) for _ in ps[:20:3]]
    for p, array in zip(ps[:20:3], arrays):
        p.grad = torch.from_numpy(array)
    freed, foreign = [weakref.ref(array) for array in arrays], []
    del array, arrays

    def replace():
        for p in ps[:20:3]:
            if how == "others":
                p.grad = torch.ones(3, 5)
            elif how == "none":
                p.grad = None
            elif how == "memory":
                p.grad.data = torch.ones(3, 5)
            elif how == "smaller":
                p.grad.data = p.grad.data[:2]
        if how == "one more":
            ps[20].grad = torch.ones(3, 5)
        if how in ("others", "none", "memory"):
            assert all(array() is None for array in freed)  # nothing holds them
        foreign.extend(torch.full((3, 5), 7.0) for _ in range(40))

    clipper = fastclip.Clipper(ps, Meanwhile(replace, coef))
    before = [g.clone() for g in gradients(ps[:20])]
    if coef == 1:
        clipper.clip_()
    else:
        with pytest.raises(RuntimeError, match="while they were being clipped; no gradient was changed"):
            clipper.clip_()
    assert all((f == 7).all() for f in foreign)
    kept = [i for i in range(20) if i % 3 or how == "one more"]
    assert all(torch.equal(ps[i].grad, before[i]) for i in kept)


@compiled
def test_other_threads_replace_gradients_meanwhile():
    """Whenever they do: what is written is either a gradient's memory, or nothing."""
    ps = [parameter(torch.full((500,), 3.0)) for _ in range(100)]
    stop, outcomes, foreign = threading.Event(), set(), []
    clipper = fastclip.Clipper(ps, TensorNorm(1e-3))

    def clip():
        while not stop.is_set():
            clipper._wrote = False
            try:
                outcomes.add(bool(clipper.clip_().clipped))
            except RuntimeError as error:
                outcomes.add(str(error)[:26])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=clip)
    thread.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end or not outcomes >= {True, "gradients were replaced by"}:
            assert time.monotonic() < end + 60, outcomes
            for p in ps[::7]:
                p.grad.data = torch.full((500,), 5.0)
                other = torch.full((500,), 7.0)
                foreign += [other] if not (other == 7).all() else []
            time.sleep(0.0001)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not foreign


@pytest.mark.parametrize("name", [n for n in packers.PACKERS if n != "abi3" or packers.torch_library() is not None])
def test_a_fingerprint_is_of_places_and_sizes(name):
    packer = packers.named(name).packer
    memory = torch.zeros(4000)
    views = [memory[i * 8 : i * 8 + 4] for i in range(500)]
    seen = {packer.pack(views, False)[0].fingerprint() for _ in range(2)}
    assert len(seen) == 1
    for other in (views[1:], views[:-1], views[::-1], [*views[:-1], memory[3992:3995]], [memory[1:4], *views[1:]]):
        seen.add(packer.pack(other, False)[0].fingerprint())
    assert len(seen) == 6
    for i in range(499):
        views[i], views[i + 1] = views[i + 1], views[i]
        seen.add(packer.pack(views, False)[0].fingerprint())
    assert len(seen) == 6 + 499
