"""The optimizer steps and the repair of csrc/cuda/, run on the CPU (see emulation/)."""

import importlib
import itertools
import math

import emulation
import pytest
import torch
from cases import CASES, NORM_ERROR, adamw_options, assert_within, gradients, parameter, sgd_options
from exact_steps import ExactSteps, step_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastclip
from fastclip import backends
from fastclip.backends.base import StepDecision
from fastclip.gradients.pack import pack, pack_step
from fastclip.optim import SGD, AdamW

cuda = importlib.import_module("fastclip.backends.cuda")
cpu = backends.get("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulated only where there is no GPU")

F32, F64, BF16, F16 = DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# name -> torch's optimizer, its options, the number of states
OPTIONS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, 2),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0, "amsgrad": True}, 3),
    "AdamW maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}, 2),
    "AdamW lr float32": (torch.optim.AdamW, {"lr": torch.tensor(0.0625)}, 2),
    "AdamW lr float64": (torch.optim.AdamW, {"lr": torch.tensor(0.05, dtype=F64)}, 2),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, 0),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}, 1),
    "SGD dampening": (torch.optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9, "dampening": 0.25}, 1),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, 1),
}
NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Arrays:
    """Random parameters, gradients and states, and the step from them."""

    def __init__(self, name, dtype, sizes, offsets=((0,),), seed=0):
        """Array k of tensor i starts offsets[i][k] elements (cyclically) into its memory."""
        self.torchs, options, states = OPTIONS[name]
        self.group = self.torchs([torch.nn.Parameter(torch.zeros(1))], **options).param_groups[0]
        generator = torch.Generator().manual_seed(seed)

        def array(i, k):
            offset = offsets[i % len(offsets)]
            offset = offset[k % len(offset)]
            whole = torch.randn(sizes[i] + offset, generator=generator, dtype=F64)
            if k > 2:  # running squares; of zero, a step would be too large for 16 bits
                whole = whole.square() + 0.01
            return whole.to(dtype)[offset:]

        columns = [[array(i, k) for i in range(len(sizes))] for k in range(2 + states)]
        self.params, self.grads, self.states = columns[0], columns[1], columns[2:]
        adam = self.torchs is torch.optim.AdamW
        self.steps = [torch.tensor(float(3 + i)) for i in range(len(sizes))] if adam else []

    def everything(self):
        return [*self.params, *itertools.chain(*self.states), *self.steps, *self.grads]

    def take(self, backend, coef=1.0, frozen=None, zero_grad=False, seed=None, one_minus_dampening=None):
        table = pack_step(self.params, self.grads, self.states, self.steps)
        assert table is not None
        coef = torch.as_tensor(coef, dtype=F64)
        decision = StepDecision(coef, None if frozen is None else torch.as_tensor(frozen), zero_grad, seed)
        if self.steps:
            backend.adamw_(table, decision, adamw_options(self.group))
        else:
            backend.sgd_(table, decision, sgd_options(self.group, one_minus_dampening))

    def expected(self, i, coef):
        """Tensor i's parameter and states one step later, by torch in float64, and how far ours may be from them."""
        p = parameter(self.grads[i].double(), self.params[i].double())
        p.grad = torch.zeros_like(p) if coef == 0 and math.copysign(1, coef) > 0 else p.grad * coef
        group = {key: value for key, value in self.group.items() if key not in ("params", "fused", "foreach")}
        group.pop("decoupled_weight_decay", None)
        optimizer = self.torchs([p], **{**group, "lr": float(group["lr"])}, foreach=False)
        mine = [column[i].double() for column in self.states]
        if self.steps:
            optimizer.state[p] = {"step": self.steps[i].clone(), **dict(zip(NAMES, mine))}
        elif mine:
            optimizer.state[p] = {"momentum_buffer": mine[0]}
        values, exact = [p.detach().clone(), p.grad.clone(), *(m.clone() for m in mine)], [torch.zeros_like(p)] * 4
        errors = step_errors(group, self.params[i].dtype, int(self.steps[i]) + 1 if self.steps else 2, values, exact)
        optimizer.step()
        return list(zip([p.detach(), *mine], errors))


@pytest.fixture
def machine():
    """Sets the number of multiprocessors and the order of the blocks of the emulated GPU."""

    def emulate(units, order):
        emulation.library.load().fastclip_emulate(units, order)
        cuda._workspaces.clear()

    yield emulate
    emulate(2, 0)


# 64 threads: a tile of float32 is 256 elements of each array, or 512 of up to three.
sizes = st.lists(st.one_of(st.integers(0, 40), st.integers(200, 5000)), min_size=1, max_size=6)
offsets = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_step_is_torchs_in_float64(machine, data):
    name, dtype = data.draw(st.sampled_from(sorted(OPTIONS))), data.draw(st.sampled_from(DTYPES))
    arrays = Arrays(name, dtype, data.draw(sizes), data.draw(offsets), data.draw(st.integers(0, 99)))
    count = len(arrays.params)
    each = lambda values: st.one_of(values, st.lists(values, min_size=count, max_size=count))  # noqa: E731
    coef = data.draw(each(st.sampled_from([1.0, 0.25, 0.0, -0.0, 3.0])))
    frozen = data.draw(st.one_of(st.none(), each(st.booleans())))
    zero_grad = data.draw(st.booleans())
    machine(data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9)))

    coefs = coef if isinstance(coef, list) else [coef] * count
    frozen_list = frozen if isinstance(frozen, list) else [bool(frozen)] * count
    expected = [arrays.expected(i, c) for i, c in enumerate(coefs)]
    before = [t.clone() for t in arrays.everything()]
    grads, steps = [g.clone() for g in arrays.grads], list(map(float, arrays.steps))
    arrays.take(cuda, coef, frozen, zero_grad)
    held = iter(before)
    for column in range(1 + len(arrays.states)):
        for i, t in enumerate((arrays.params, *arrays.states)[column]):
            was = next(held)
            if frozen_list[i]:
                assert torch.equal(t, was)
            else:
                assert_within(t, *expected[i][column])
    assert list(map(float, arrays.steps)) == [s + (not i) for s, i in zip(steps, frozen_list)]
    for g, was in zip(arrays.grads, grads):
        assert not g.any() if zero_grad else torch.equal(g, was)


@pytest.mark.parametrize("units", [1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_as_the_cpu_backend(machine, name, dtype, units):
    """Aligned and not, large and small; and bitwise the same whatever the machine."""
    results, coefs = [], [1.0, 0.5, 2.0, 0.0, 0.125]
    for order, backend in ((0, cpu), (0, cuda), (5, cuda)):
        machine(units, order)
        arrays = Arrays(name, dtype, (9000, 1, 0, 1025, 77), offsets=((0,), (1,), (0,), (3,), (0, 1, 2, 0)))
        expected = [arrays.expected(i, coef) for i, coef in enumerate(coefs)]
        arrays.take(backend, coefs, zero_grad=True)
        for i, tensors in enumerate(zip(arrays.params, *arrays.states)):
            for t, (exact, error) in zip(tensors, expected[i]):
                assert_within(t, exact, error)
        results.append(arrays.everything())
    assert all(map(torch.equal, results[1], results[2]))
    counts = slice(-len(coefs) - len(arrays.steps), None)  # steps taken, and gradients, which are zero
    assert all(map(torch.equal, results[1][counts], results[0][counts]))


def test_the_first_step_of_sgd_has_no_dampening():
    for rest in (1.0, 0.75):  # exact products
        arrays = Arrays("SGD dampening", F32, (10,))
        arrays.states[0][0].zero_()
        arrays.grads[0].copy_(torch.arange(-5, 5))
        arrays.take(cuda, one_minus_dampening=rest)
        assert torch.equal(arrays.states[0][0], arrays.grads[0] * rest)


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
def test_a_gradient_whose_coefficient_is_zero_is_not_read(name):
    for coef in (0.0, [0.0, 0.0]):
        clean, dirty = (Arrays(name, F32, (1500, 9)) for _ in range(2))
        for g, bad in zip(dirty.grads, (math.nan, math.inf)):
            g.fill_(bad)
        clean.take(cuda, coef)
        dirty.take(cuda, coef)
        for a, b in zip(clean.everything()[: -len(clean.grads)], dirty.everything()):
            assert torch.equal(a, b)
    dirty.take(cuda, -0.0)  # torch's, where the norm is infinite: inf * -0 is NaN
    assert dirty.params[1].isnan().all()


@pytest.mark.parametrize("frozen", [True, [True, True]])
def test_frozen_tensors_are_not_written(frozen):
    arrays = Arrays("AdamW amsgrad", BF16, (1500, 9))
    before = [t.clone() for t in arrays.everything()]
    arrays.take(cuda, math.nan, frozen)
    assert all(map(torch.equal, arrays.everything(), before))
    arrays.take(cuda, math.nan, frozen, zero_grad=True)
    assert all(map(torch.equal, arrays.everything()[:-2], before))
    assert not any(g.any() for g in arrays.grads)


# ---- stochastic rounding ----


@pytest.mark.parametrize("offset", [(0,), (3,), (0, 1, 2)], ids=str)
def test_rounding_by_chance_takes_the_cpus_random_numbers(offset):
    """Where the arithmetic is exact, so is the result; elsewhere a last bit of float32 seldom shows."""
    sizes = (5000, 3, 1025)

    def both(name, change=lambda arrays: None):
        found = []
        for backend in (cpu, cuda):
            arrays = Arrays(name, BF16, sizes, (offset,))
            change(arrays)
            expected = [arrays.expected(i, 1.0) for i in range(len(sizes))]
            arrays.take(backend, seed=0xFEDCBA98)
            for i, tensors in enumerate(zip(arrays.params, *arrays.states)):
                for t, (exact, error) in zip(tensors, expected[i]):
                    assert_within(t, exact, 2 * error)  # to one of the two neighbours, not to the nearest
            found.append(torch.cat([t.double() for t in (*arrays.params, *itertools.chain(*arrays.states))]))
        return found

    def exact(arrays):
        arrays.group.update(lr=2.0**-10, momentum=0.5, weight_decay=0)
        for t in arrays.everything():
            t.copy_((t * 16).round() / 16)

    ours, theirs = both("SGD momentum", exact)
    assert torch.equal(ours, theirs)
    nearest = Arrays("SGD momentum", BF16, sizes, (offset,))
    exact(nearest)
    nearest.take(cuda)
    assert not torch.equal(torch.cat(nearest.params).double(), ours[: sum(sizes)])
    for name in ("AdamW", "AdamW amsgrad", "SGD nesterov"):
        ours, theirs = both(name)
        assert (ours != theirs).double().mean() < 2e-3


def test_rounding_by_chance_is_right_on_average():
    with fastclip.use_backend("cuda"):
        p = parameter(torch.full((20_000,), -1.0).bfloat16(), torch.ones(20_000).bfloat16())
        SGD([p], lr=2.0**-9, stochastic_rounding=3).step()
    moved = p.detach().double() - 1
    assert moved.mean().item() == pytest.approx(2.0**-9, rel=0.05)
    assert set(moved.unique().tolist()) == {0.0, 2.0**-7}


def test_rounding_by_chance_keeps_what_is_not_finite():
    with fastclip.use_backend("cuda"):
        p = parameter(torch.tensor([math.inf, -math.inf, math.nan]).bfloat16())
        SGD([p], lr=0.1, stochastic_rounding=0).step()
    assert p[0] == -math.inf and p[1] == math.inf and p[2].isnan()


# ---- the table ----


@pytest.fixture
def uploads(monkeypatch):
    """What is uploaded from here on."""
    found = []

    def upload(values, *arguments):
        found.append(values)
        return backends.upload(values, *arguments)

    monkeypatch.setattr(cuda, "upload", upload)
    cuda._steps.entries.clear()
    return found


@pytest.mark.parametrize("count", [1, 60, 61, emulation.MOST_STEP_PARAMETERS, emulation.MOST_STEP_PARAMETERS + 1, 200])
def test_tables_of_every_size(count, uploads):
    """In the parameters of a kernel; beyond what fits there on the device, uploaded when an address changes."""
    uploaded = count > emulation.MOST_STEP_PARAMETERS
    with fastclip.use_backend("cuda"):
        ps = [parameter(torch.ones(k % 9), torch.ones(k % 9)) for k in range(count)]
        optimizer, exact = AdamW(ps), ExactSteps(torch.optim.AdamW, ps[:9])
        exact.give(ps)
        for step in range(4):
            for group in (optimizer.param_groups[0], exact.optimizer.param_groups[0]):
                group.update(lr=0.1 / (1 + step), betas=(0.9 - step / 10, 0.9), weight_decay=step / 10)
            optimizer.step()
            exact.step()
        assert len(uploads) == uploaded
        for first in range(0, count, 9):
            exact.check(ps[first : first + 9])
        ps[-1].grad = torch.ones_like(ps[-1])
        optimizer.step(zero_grad=True)
        assert len(uploads) == 2 * uploaded


@pytest.mark.parametrize("count", [3, emulation.MOST_STEP_PARAMETERS + 1])
def test_nothing_is_kept_of_a_captured_step(count, uploads, monkeypatch):
    """In a CUDA graph every copy must be part of it, and its memory must not serve others."""
    with fastclip.use_backend("cuda"):
        ps = [parameter(torch.ones(5)) for _ in range(count)]
        optimizer = SGD(ps, lr=0.1)
        for module in (backends, backends.transfer):
            monkeypatch.setattr(module, "capturing", lambda device: True)
        for step in (1, 2):
            optimizer.step()
            assert len(uploads) == (step if count > 3 else 0) and not cuda._steps.entries
        rounded = SGD([parameter(torch.ones(5).bfloat16())], stochastic_rounding=0)
        with pytest.raises(NotImplementedError, match="cannot be captured in a CUDA graph"):
            rounded.step()
    exact = ExactSteps(lambda ps: torch.optim.SGD(ps, lr=0.1), [torch.zeros(5)])
    exact.params[0].grad = torch.ones(5).double()
    exact.step()
    exact.step()
    for p in ps:
        exact.check([p])


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_parameters_that_come_and_go(ours, theirs):
    """Addresses are reused by tensors of other sizes: a table from before must not be."""
    generator = torch.Generator().manual_seed(1)
    options = {"lr": 0.1} if ours is AdamW else {"lr": 0.1, "momentum": 0.9}
    with fastclip.use_backend("cuda"):
        for _ in range(25):
            count = int(torch.randint(1, 5, (), generator=generator))
            lengths = torch.randint(0, 3000, (count,), generator=generator).tolist()
            a = [parameter(torch.randn(n, generator=generator), torch.randn(n, generator=generator)) for n in lengths]
            exact = ExactSteps(lambda ps: theirs(ps, **options), a)
            mine = ours(a, **options, max_norm=0.5)
            for _ in range(2):
                exact.give(a)
                mine.step()
                torch.nn.utils.clip_grad_norm_(exact.params, 0.5)
                exact.step(NORM_ERROR)
                exact.check(a)
                for p in a:
                    p.grad = p.grad.clone() * 2


# ---- repair ----


def spoil(ps):
    """inf and NaN at both ends and in the middle of every second tensor; how many of each tensor."""
    counts = []
    for i, g in enumerate(gradients(ps)):
        wanted = 0
        if i % 2 == 0 and g.numel():
            places = {0, g.numel() // 2, g.numel() - 1}
            for k, place in enumerate(sorted(places)):
                g.view(-1)[place] = (math.nan, math.inf, -math.inf)[(i + k) % 3]
            wanted = len(places)
        counts.append(wanted)
    return counts


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["many chunks", "misaligned", "with empty", "odd sizes"])
def test_repair(machine, case, dtype, p):
    """Exact counts, `measured` as it was, and bitwise what a measurement of the repaired gradients gives."""
    ps = CASES[case](dtype=dtype, device="cpu")
    counts = spoil(ps)
    spoiled = [q.grad.clone() for q in ps]
    with fastclip.use_backend("cuda"):
        (group,) = pack(ps, gradients=False, write=True).groups
        for order in range(3):
            machine(3, order)
            for q, g in zip(ps, spoiled):
                q.grad.copy_(g)
            measured = cuda.measure(group, p)
            before = measured._make(None if t is None else t.clone() for t in measured)
            again, found = cuda.repair_(group, measured, p)
            assert found.dtype == torch.int64 and found.tolist() == counts
            for q, g in zip(ps, spoiled):
                assert torch.equal(q.grad, torch.where(g.isfinite(), g, 0))
            anew = cuda.measure(group, p)
            for name in ("power", "absmax", "norm", "total"):
                torch.testing.assert_close(
                    getattr(measured, name), getattr(before, name), rtol=0, atol=0, equal_nan=True
                )
                assert torch.equal(getattr(again, name), getattr(anew, name))
            assert again.coef is None


def test_repair_leaves_finite_tensors_unread(machine):
    """What was measured says where there is anything to do: the rest is neither read nor written."""
    machine(3, 0)
    with fastclip.use_backend("cuda"):
        ps = [parameter(torch.randn(n)) for n in (5000, 9, 3000)]
        ps[0].grad[4999] = math.nan
        (group,) = pack(ps, gradients=False, write=True).groups
        measured = cuda.measure(group, 2.0)
        ps[2].grad.fill_(math.inf)  # behind its back
        again, counts = cuda.repair_(group, measured, 2.0)
    assert counts.tolist() == [1, 0, 0] and ps[2].grad.isinf().all()
    assert torch.equal(again.power[1:], measured.power[1:]) and torch.equal(again.absmax[1:], measured.absmax[1:])
    assert again.norm.isfinite() and again.power[0].item() == pytest.approx(
        ps[0].grad.double().square().sum().item(), rel=2 * NORM_ERROR
    )


def test_repair_of_nothing_costs_no_pass():
    with fastclip.use_backend("cuda"):
        ps = [parameter(torch.randn(n)) for n in (5000, 9)]
        (group,) = pack(ps, gradients=False, write=True).groups
        measured = cuda.measure(group, 2.0)
        for p in ps:
            p.grad.fill_(math.nan)
        again, counts = cuda.repair_(group, measured, 2.0)
    assert not counts.any() and all(p.grad.isnan().all() for p in ps)
    for name in ("power", "absmax", "norm", "total"):
        assert torch.equal(getattr(again, name), getattr(measured, name))


def test_repair_of_more_tensors_than_parameters_hold():
    with fastclip.use_backend("cuda"):
        ps = [parameter(torch.full((k % 5,), 0.5)) for k in range(emulation.MOST_PARAMETERS + 1)]
        ps[7].grad[1] = math.inf
        (group,) = pack(ps, gradients=False, write=True).groups
        again, counts = cuda.repair_(group, cuda.measure(group, 2.0), 2.0)
    assert counts.nonzero().tolist() == [[7]] and ps[7].grad.tolist() == [0.5, 0.0]
    assert again.norm.item() == pytest.approx(math.sqrt(sum(0.25 * (k % 5) for k in range(len(ps))) - 0.25))
