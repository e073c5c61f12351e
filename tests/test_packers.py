"""All packers make the same groups, and what works on these gives the same results; and which of them runs."""

import gc
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastclip
from fastclip import packers
from fastclip.backends import foreach
from fastclip.native import libraries
from fastclip.packers.python import PythonPacker

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in packers.PACKERS if name != "abi3" or packers.torch_library() is not None]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def all_packers():
    return {name: packers.named(name) for name in NAMES}


@pytest.fixture(params=[*NAMES, "no kernels"])
def chosen(request, all_packers, monkeypatch):
    """Each packer in turn as the one that runs, and the one in Python without kernels."""
    without = packers.Chosen("python", PythonPacker(None), None, "a test")
    monkeypatch.setattr(packers, "chosen", all_packers.get(request.param, without))
    return packers.chosen


def parameter(gradient):
    p = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    p.grad = gradient
    return p


# ---- packing ----

SHAPES = st.sampled_from([(), (1,), (7,), (0,), (3, 4), (2, 0, 3), (2, 3, 4, 5), (300,)])

KINDS = ["part", "view", "channels last", "gaps", "negated", "none", "tied"]


@st.composite
def gradient_lists(draw):
    """Gradients of every kind, and the parameters that have them: several of one storage, tied, none at all."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
        kind = draw(
            st.sampled_from(["plain"] * 6 + ["part", "view", "channels last", "gaps", "negated", "none", "tied"])
        )
        gradient = torch.randn(shape).to(dtype)
        if kind == "part":
            gradient = torch.randn(gradient.numel() + 3).to(dtype)[3:].view(shape)
        elif kind == "view" and found and found[-1] is not None and found[-1].numel() and found[-1].is_contiguous():
            gradient = found[-1].view(-1)[: draw(st.integers(1, found[-1].numel()))]
        elif kind == "channels last" and len(shape) == 4:
            gradient = gradient.to(memory_format=torch.channels_last)
        elif kind == "gaps" and gradient.dim():
            gradient = torch.randn(*shape, 2).to(dtype)[..., 0]
        elif kind == "negated":
            gradient = torch._neg_view(gradient)
        elif kind == "tied" and found:
            gradient = draw(st.sampled_from(found))
        found.append(None if kind == "none" else gradient)
    return found


def items_of(gradients):
    return [torch.nn.Parameter(torch.zeros(2)) if g is None else parameter(g) for g in gradients]


def described(groups):
    """What a packer found, without the objects."""
    return groups and [
        (g.device, g.dtype, list(g.positions), g.addresses_and_sizes().tolist(), [t.shape for t in g.tensors])
        for g in groups
    ]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gradients=gradient_lists(), gradients_of=st.booleans())
def test_all_make_the_same_groups(all_packers, gradients, gradients_of):
    items = items_of(gradients) if gradients_of else [g for g in gradients if g is not None]
    found = {name: described(chosen.packer.pack(items, gradients_of)) for name, chosen in all_packers.items()}
    for name, groups in found.items():
        if groups is None or found["compiled"] is None:  # for another path, in any order of checks
            assert not groups and not found["compiled"], name
            continue
        ours = [(*g[:3], g[3][1], g[4], [a for a, n in zip(*g[3]) if n]) for g in groups]
        theirs = [(*g[:3], g[3][1], g[4], [a for a, n in zip(*g[3]) if n]) for g in found["compiled"]]
        assert ours == theirs, name


ODD = {
    "sparse": lambda: torch.randn(4, 3).to_sparse(),
    "integer": lambda: torch.ones(3, dtype=torch.int64),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "meta": lambda: torch.empty(3, device="meta"),
    "a subclass": lambda: torch.randn(3).as_subclass(type("Mine", (torch.Tensor,), {})),
    "freed": lambda: _resized(0),
    "shrunk": lambda: _resized(8),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "expanded": lambda: torch.randn(1).expand(5),
    "zero tensor": lambda: torch._efficientzerotensor((3,)),
    "no tensor": lambda: 3.0,
}


def _resized(nbytes, dtype=torch.float32):
    tensor = torch.randn(300, 3).to(dtype)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_what_is_not_plain_is_left_to_the_general_packer(all_packers, kind):
    tensors = [torch.randn(3), ODD[kind]()]
    for name, chosen in all_packers.items():
        if (name, kind) != ("compiled", "a subclass"):  # which it looks into
            assert chosen.packer.pack(tensors, False) is None, name


@pytest.mark.parametrize("items", [[], [torch.nn.Parameter(torch.ones(2))]], ids=["none", "no gradient"])
def test_nothing_to_pack(all_packers, items):
    for chosen in all_packers.values():
        assert not chosen.packer.pack(items, True)


def test_rows_are_the_same(all_packers):
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 3, 4, 5), torch.randn(2, 0), torch.randn(())]
    units = [chosen.packer.pack(tensors, False)[0].units() for chosen in all_packers.values()]
    tables = [u.addresses_and_sizes().tolist() for u in units]
    assert all(table[1] == [4] * 3 + [5] + [60] * 2 + [0, 1] for table in tables)
    assert all(table[0][:6] == tables[0][0][:6] for table in tables)
    cut = torch.randn(4, 3).t()  # of which rows are not in one piece
    assert all(chosen.packer.pack([cut], False)[0].units() is None for chosen in all_packers.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_packed_alike(all_packers, dtype):
    params, grads, m, v = ([torch.randn(n, 3).to(dtype) for n in (1, 4, 300)] for _ in range(4))
    steps = [torch.zeros(()) for _ in params]
    for states, counters in (([m, v], steps), ([], []), ([m], [])):
        packed = [chosen.packer.pack_step(params, grads, states, counters) for chosen in all_packers.values()]
        assert all(p.addresses().tolist() == packed[0].addresses().tolist() for p in packed)
    refused = {
        "another shape": ([torch.randn(3, 1).to(dtype), *params[1:]], grads, [m], []),
        "another dtype": ([p.double() if dtype != torch.float64 else p.float() for p in params], grads, [m], []),
        "one state for two": (params, grads, [[m[0], m[1], m[2]], [v[0], m[1], v[2]]], []),
        "a state in a parameter": (params, grads, [[params[2][:1], m[1], m[2]]], []),
        "one counter for two": (params, grads, [m], [steps[0], steps[0], steps[1]]),
        "a wide counter": (params, grads, [m], [s.double() for s in steps]),
        "tied gradients": (params[:2], [grads[1], grads[1]], [], []),
        "freed": (params, grads, [[m[0], m[1], _resized(0, dtype)]], []),
    }
    for reason, columns in refused.items():
        for name, chosen in all_packers.items():
            assert chosen.packer.pack_step(*columns) is None, (reason, name)


# ---- what works on the groups ----


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clips_as_float64_does(chosen, dtype, p):
    torch.manual_seed(0)
    ps = [parameter(torch.randn(shape).to(dtype)) for shape in ((40_000,), (3, 5), (), (0,), (70, 300), (1000,))]
    exact = torch.cat([q.grad.double().flatten() for q in ps])
    norms = [torch.linalg.vector_norm(q.grad.double(), p) for q in ps if q.grad.numel()]
    norm = torch.linalg.vector_norm(torch.stack(norms), p)
    got = fastclip.clip_norm_(ps, norm.item() / 2, p)
    assert abs(got.item() / norm.item() - 1) <= 1e-6 and got.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    clipped = torch.cat([q.grad.double().flatten() for q in ps])
    rounding = torch.finfo(dtype).eps if dtype.itemsize > 2 else torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal
    coef = 0.5 / (1 + 1e-6 / norm.item())
    assert ((clipped - exact * coef).abs() <= (exact * coef).abs().clamp(min=least) * (rounding + 2e-6)).all()
    before = [q.grad._version for q in ps]
    fastclip.clip_norm_(ps, math.inf, p)
    assert [q.grad._version for q in ps] == before  # nothing to clip, nothing written


def test_says_what_it_has_written(chosen):
    ps = [parameter(torch.randn(5)) for _ in range(3)]
    versions = [q.grad._version for q in ps]
    fastclip.clip_norm_(ps, 1e-3)
    assert all(q.grad._version > version for q, version in zip(ps, versions))
    with torch.inference_mode():
        q = parameter(torch.ones(4))
        assert q.grad.is_inference()
        fastclip.clip_norm_([q, parameter(torch.ones(3))], 1e-3)
        assert q.grad.norm() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [1e20, 1e-20, 3e-30])
def test_squares_beyond_float32(chosen, dtype, value):
    """And one such gradient among others, with which it is measured as one."""
    for sizes in ((5,), (5, 20_000, 300), (100_000,)):
        ps = [parameter(torch.full((n,), value).to(dtype)) for n in sizes]
        exact = math.sqrt(sum(n * q.grad.double()[0].item() ** 2 for n, q in zip(sizes, ps)))
        assert fastclip.total_norm([q.grad for q in ps]).item() == pytest.approx(exact, rel=1e-6)
        assert fastclip.clip_norm_(ps, exact / 4).item() == pytest.approx(exact, rel=1e-6)
        after = math.sqrt(sum(n * q.grad.double()[0].item() ** 2 for n, q in zip(sizes, ps)))
        assert after == pytest.approx(min(exact, exact / 4 * exact / (exact + 1e-6)), rel=1e-2)


def test_a_tensor_that_saturates_torch(chosen):
    """Equal elements: 2^26 ones, and tenths, of which a running sum in float32 drifts away."""
    ones = torch.ones(1 << 26)
    assert fastclip.total_norm([ones]).item() == pytest.approx(2**13, rel=1e-6)
    tenths = torch.full((1 << 20,), 0.1)
    exact = math.sqrt((1 << 20) * tenths[0].double().item() ** 2)
    for p, expected in ((2.0, exact), (1.0, (1 << 20) * tenths[0].double().item())):
        assert fastclip.total_norm([tenths], p).item() == pytest.approx(expected, rel=1e-6)


def test_nan_inf_and_zeros(chosen):
    for bad in (math.nan, math.inf):
        ps = [parameter(torch.tensor([1.0, bad])), parameter(torch.ones(2))]
        with pytest.raises(RuntimeError, match="cannot be"):
            fastclip.clip_norm_(ps, 1.0, error_if_nonfinite=True)
        assert ps[1].grad.tolist() == [1, 1]
        norm = fastclip.clip_norm_(ps, 1.0)
        assert norm.isnan() if math.isnan(bad) else norm.isinf()
        assert ps[1].grad.isnan().all() if math.isnan(bad) else not ps[1].grad.any()
    ps = [parameter(torch.tensor([math.nan, 1.0]))]
    fastclip.clip_norm_([parameter(torch.ones(3))], 0.0)
    fastclip.clip_with_norm_(ps, 0.0, torch.tensor(1.0))
    assert ps[0].grad.tolist() == [0, 0]  # +0 writes zeros, whatever there was


def test_changes_of_memory(chosen):
    """Gradients that are replaced, freed, resized, retied and given other memory between calls."""
    generator = torch.Generator().manual_seed(0)
    ps = [parameter(torch.randn(7, generator=generator)) for _ in range(12)]
    for step in range(800):
        q = ps[int(torch.randint(len(ps), (), generator=generator))]
        n = int(torch.randint(0, 40, (), generator=generator))
        kind = int(torch.randint(6, (), generator=generator))
        if kind == 0:
            q.grad = None
        elif kind == 1:
            q.data, q.grad = torch.zeros(n), None
            q.grad = torch.randn(n, generator=generator)
        elif kind == 2 and q.grad is not None:
            q.grad.data = torch.randn(q.grad.numel(), generator=generator)
        elif kind == 3 and ps[0].grad is not None:
            q.data, q.grad = torch.zeros(ps[0].grad.numel()), None
            q.grad = ps[0].grad
        elif kind == 4:
            place = next(i for i, other in enumerate(ps) if other is q)
            ps[place] = parameter(torch.randn(n, generator=generator))
            del q
            gc.collect(0)
        distinct = {g.data_ptr() if g.numel() else id(g): g for g in (p.grad for p in ps) if g is not None}
        exact = math.sqrt(sum(g.double().square().sum().item() for g in distinct.values()))
        limit = math.inf if step % 2 else exact / 2
        assert fastclip.clip_norm_(ps, limit).item() == pytest.approx(exact, rel=1e-6, abs=1e-30)
        if kind == 5 and exact:
            for g in distinct.values():
                g.mul_(1 + 1 / exact)


def test_a_rule_that_gives_gradients_other_memory(chosen):
    """What the call began with is clipped, and nothing else is written."""
    ps = [parameter(torch.full((4,), 3.0)) for _ in range(2)]
    first, other = [q.grad for q in ps], [torch.full((4,), 5.0) for _ in ps]
    memory = [torch.empty(0).set_(g.untyped_storage(), 0, (4,), (1,)) for g in first]

    def rule(stats):
        for q, x in zip(ps, other):
            q.grad.data = x
        return torch.full((), 0.5)

    fastclip.Clipper(ps, [rule]).clip_()
    assert all((m == 1.5).all() for m in memory) and all((x == 5).all() for x in other)


def test_other_threads_give_gradients_other_memory_meanwhile(chosen):
    """Only what had been a gradient's memory when a call began is written."""
    if chosen.kernels is None:
        pytest.skip("torch's own operations, detach() say, crash where another thread sets the .data of their tensor")
    ps = [parameter(torch.full((500,), 3.0)) for _ in range(100)]
    stop, foreign = threading.Event(), []

    def clip():
        while not stop.is_set():
            fastclip.clip_norm_(ps, 1e-3)
            fastclip.clip_value_(ps, 1e-3)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=clip)
    thread.start()
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for q in ps[::7]:
                q.grad.data = torch.full((500,), 5.0)
                other = torch.full((500,), 7.0)
                foreign += [other] if not (other == 7).all() else []
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not foreign


def test_the_garbage_collector_gives_gradients_other_memory_meanwhile(chosen):
    """It runs Python (finalizers, callbacks) where an object is made: then, too, nothing else is written."""
    ps = [parameter(torch.full((500,), 3.0, dtype=dtype)) for _ in range(10) for dtype in DTYPES[:2]]
    foreign, runs = [], 0

    def collected(phase, info):
        nonlocal runs
        runs += 1
        for p in ps:
            p.grad.data = torch.full((500,), 5.0, dtype=p.dtype)
        foreign.extend(torch.full((500,), 7.0, dtype=p.dtype) for p in ps * 2)

    gc.collect()
    for spare in range(4):
        taken = [[] for _ in range(100)]  # while Python has spare lists it makes no new ones
        del taken[:spare]
        gc.callbacks.append(collected)
        threshold = gc.get_threshold()
        gc.set_threshold(1, 1000, 1000)
        try:
            groups = chosen.packer.pack(ps, True)
        finally:
            gc.set_threshold(*threshold)
            gc.callbacks.remove(collected)
        for group in groups or []:
            if chosen.kernels:
                chosen.kernels.clamp_(group, -1e-3, 1e-3)
            else:
                torch._foreach_zero_(group.tensors)
        assert all((f == 7).all() for f in foreign), spare
    assert runs


def test_modes_that_see_functions_are_not_asked(chosen):
    """As torch.set_default_device's: each question of a tensor would go through Python, where anything may happen."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if args and isinstance(args[0], torch.Tensor) and "is_neg" in str(func):
                seen.append(func)
            return func(*args, **(kwargs or {}))

    ps = [parameter(torch.ones(4)) for _ in range(3)]
    with Mode():
        assert chosen.packer.pack(ps, True)
        assert fastclip.clip_norm_(ps, 1.0).item() == pytest.approx(12**0.5)
    assert not seen


def test_no_module_of_the_users_is_hidden(all_packers):
    assert "packer" not in sys.modules


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_torchs_own_and_change_nothing(all_packers, monkeypatch, threads):
    torch.manual_seed(0)
    tensors = [torch.randn(200_003), torch.randn(77)]
    torch.set_num_threads(threads)
    for chosen in all_packers.values():
        monkeypatch.setattr(packers, "chosen", chosen)
        torch.set_num_threads(threads)
        norm = fastclip.total_norm(tensors)
        torch.set_num_threads(1)
        assert norm.item() == fastclip.total_norm(tensors).item()


@pytest.mark.parametrize("name", NAMES)
def test_after_a_fork_one_thread_does_the_work(name):
    program = """
import os, torch, fastclip
torch.set_num_threads(2)
big = torch.ones(3_000_000)
fastclip.total_norm([big])
if os.fork() == 0:
    print(fastclip.total_norm([big]).item() == 3_000_000 ** 0.5 or fastclip.total_norm([big]).item(), flush=True)
    os._exit(0)
os.wait()
"""
    environment = {**os.environ, "FASTCLIP_PACKER": name}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert abs(float(result.stdout.replace("True", "1732.0508")) - 1732.0508) < 1e-2, result.stderr


# ---- which one runs ----


class Loads:
    """In the place of a library: what is there of it."""

    def __init__(self, built=None, prebuilt=None, made=None):
        self.built, self.prebuilt, self.made = built, prebuilt, made

    def load_built(self):
        return self.built

    def load_prebuilt(self):
        return self.prebuilt

    def load(self, warn=True):
        return self.built or self.prebuilt or self.made

    def failure(self):
        return "there is no compiler."


ORDER = [  # where the compiled one is, or that it can be made; abi3; the kernels; whether torch is 2.14; what runs
    ("cache", "wheel", "wheel", True, "compiled"),
    (None, "wheel", "wheel", True, "abi3"),
    ("made", "wheel", "wheel", True, "abi3"),
    ("made", "wheel", "wheel", False, "compiled"),
    (None, "wheel", "wheel", False, "python"),
    ("made", None, None, True, "compiled"),
    (None, None, "made", True, "python"),
    (None, None, None, True, "none"),
]


@pytest.mark.parametrize(("compiled", "abi3", "kernels", "new_torch", "expected"), ORDER)
def test_the_order(monkeypatch, compiled, abi3, kernels, new_torch, expected):
    monkeypatch.delenv("FASTCLIP_PACKER", raising=False)

    def library(kind):
        return Loads(*(kind if kind == place else None for place in ("cache", "wheel", "made")))

    monkeypatch.setattr(libraries, "cpp", library(compiled))
    monkeypatch.setattr(libraries, "abi3", library(abi3))
    monkeypatch.setattr(libraries, "kernels", library(kernels))
    monkeypatch.setattr(packers, "torch_library", lambda: object() if new_torch else None)
    monkeypatch.setattr(packers, "_compiled", lambda found: packers.Chosen("compiled", found, found))
    monkeypatch.setattr(packers, "_abi3", lambda module, found: packers.Chosen("abi3", module, found))
    monkeypatch.setattr(packers, "_cpu_kernels", lambda found: found)
    if expected == "none":
        monkeypatch.setattr(packers, "chosen", None)
        with pytest.warns(RuntimeWarning, match="no kernels for the CPU here .* plain torch.*there is no compiler"):
            packers.get()
        chosen = packers.get()  # without another warning
        assert chosen.kernels is None and chosen.why_not == "there is no compiler."
    else:
        chosen = packers._choose()
        assert chosen.name == expected and chosen.why_not is None and chosen.kernels is not None


def test_one_asked_for_by_name(monkeypatch):
    monkeypatch.setenv("FASTCLIP_PACKER", "python")
    assert packers._choose().name == "python"
    monkeypatch.setenv("FASTCLIP_PACKER", "rust")
    with pytest.raises(ValueError, match="FASTCLIP_PACKER must be one of compiled, abi3, python, got 'rust'"):
        packers._choose()
    monkeypatch.setenv("FASTCLIP_PACKER", "abi3")
    monkeypatch.setattr(packers, "torch_library", lambda: None)
    with pytest.raises(RuntimeError, match=r"the packer abi3 needs torch 2\.14, and this is"):
        packers._choose()


def test_without_kernels_the_cpu_backend_says_why(monkeypatch):
    monkeypatch.setattr(packers, "chosen", packers.Chosen("python", PythonPacker(None), None, "there is no compiler."))
    with fastclip.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run on cpu: there is no compiler"):
        fastclip.clip_norm_([parameter(torch.ones(3))], 1.0)
    assert fastclip.clip_norm_([parameter(torch.ones(4))], 1.0).item() == 2


# ---- plain torch ----


def test_gpus_measure_gradients_without_elements_too():
    """torch's norms know no largest element of none. On a CPU here: the operations are the same."""
    full, empty = [torch.randn(5), torch.randn(3, 2)], torch.empty(0)
    for p in (2.0, 1.0, math.inf, 0.0):
        found = foreach._measured_on_gpu([full[0], empty, full[1], empty], p)
        alone = foreach._measured_on_gpu(full, p)
        for a, b in zip(found[:2], alone[:2]):
            assert a.tolist() == [b[0].item(), 0, b[1].item(), 0] and a.dtype == torch.float64
        nothing = foreach._measured_on_gpu([empty], p)
        assert nothing.power.tolist() == nothing.absmax.tolist() == [0]


def test_plain_torch_bounds_its_memory(monkeypatch):
    """Small tensors are concatenated, but not all of them at a time."""
    sizes = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: sizes.append(sum(map(len, tensors))) or cat(tensors))
    tensors = [torch.randn(foreach.SMALL) for _ in range(3 * foreach.SLICE // foreach.SMALL + 5)]
    exact = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    assert foreach._norm_of_all(tensors, 2.0) == pytest.approx(exact, rel=1e-6)
    assert len(sizes) >= 3 and max(sizes) <= foreach.SLICE + foreach.SMALL


def test_plain_torch_reads_zeros_no_third_time(monkeypatch):
    monkeypatch.setattr(foreach, "magnitudes", None)  # in float64, which takes its time
    for p in (2.0, 1.0, math.inf):
        assert foreach._norm_of_all([torch.zeros(100_000), -torch.zeros(3)], p) == 0
        assert math.copysign(1, foreach._norm_of_all([torch.zeros(3)], p)) == 1


def test_plain_torch_multiplies_inference_and_other_tensors():
    with torch.inference_mode():
        made = torch.ones(3)
    normal = torch.ones(3)
    foreach._multiply([normal, made], 0.5)
    assert normal.tolist() == made.tolist() == [0.5] * 3


def test_rows_keep_six_digits_of_what_is_made_to_lose_them():
    """Each vector of 8 ones is followed by squares of half a rounding, in rows, rows of rows, and rows of these."""
    row = torch.full((256,), math.sqrt(2.0**-25))
    row[:8] = 1
    scale = row / row.norm()
    x = (row[None, None, :] * scale[None, :, None] * scale[:16, None, None]).flatten()
    exact = x.double().norm().item()
    assert fastclip.total_norm([x]).item() == pytest.approx(exact, rel=1e-6)
    assert foreach._norm_of_all([x], 2.0) == pytest.approx(exact, rel=1e-6)
