"""Both GPU backends on a GPU: every case, what a call costs, graphs, streams, several devices."""

import copy
import gc
import math

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EXTREMES,
    NORM_ERROR,
    assert_agrees,
    assert_scaled,
    clip_factor,
    clipping,
    gradients,
    parameter,
    rounding,
    tensor_norm,
    total_norm,
    wide,
)
from exact_steps import ExactSteps
from torch.profiler import ProfilerActivity, profile

import fastclip

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def gpu_backend(request):
    with fastclip.use_backend(request.param):
        yield request.param


def make(*sizes, dtype=torch.float32, device="cuda"):
    return [parameter(torch.randn(n, device=device).to(dtype)) for n in sizes]


def on_host(tensors):
    return [t.cpu() for t in wide(tensors)]


def factor(limit, norm):
    return clip_factor(norm, limit)


# ---- right ----


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_clip_norm(case, dtype, p):
    parameters = CASES[case](dtype=dtype, device="cuda")
    before = on_host(gradients(parameters))
    expected = total_norm(before, p)
    norm = fastclip.clip_norm_(parameters, expected / 3, p)
    assert norm.device.type == "cuda" and norm.item() == pytest.approx(expected, rel=NORM_ERROR)
    assert_scaled(on_host(gradients(parameters)), before, [factor(expected / 3, expected)] * len(before), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_other_function(case, dtype):
    make_case = lambda: CASES[case](dtype=dtype, device="cuda")  # noqa: E731
    before = on_host(gradients(make_case()))
    if not before:
        return
    norms = [tensor_norm(b) for b in before]

    torch.manual_seed(0)
    parameters = make_case()
    before = on_host(gradients(parameters))
    norms = [tensor_norm(b) for b in before]
    assert fastclip.total_norm(gradients(parameters)).item() == pytest.approx(total_norm(before), rel=NORM_ERROR)

    limit = sorted(norms)[len(norms) // 2] / 2
    actual = fastclip.clip_tensor_norm_(parameters, limit)
    torch.testing.assert_close(actual.cpu().double(), torch.tensor(norms, dtype=torch.float64), rtol=NORM_ERROR, atol=0)
    assert_scaled(on_host(gradients(parameters)), before, [factor(limit, n) for n in norms], dtype)

    parameters = make_case()
    before = on_host(gradients(parameters))
    largest = [b.abs().max().item() if b.numel() else 0.0 for b in before]
    threshold = sorted(largest)[len(largest) // 2]
    masked = fastclip.mask_small_(parameters, threshold)
    assert masked.tolist() == [a < threshold for a in largest]
    assert_scaled(on_host(gradients(parameters)), before, [float(a >= threshold) for a in largest], dtype, relative=0.0)

    parameters = make_case()
    before = on_host(gradients(parameters))
    fastclip.clip_value_(parameters, 0.5)
    for after, b in zip(on_host(gradients(parameters)), before):
        assert torch.equal(after, b.clamp(-0.5, 0.5))


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_squares_that_float32_cannot_hold(extreme, dtype):
    parameters = [parameter(EXTREMES[extreme](dtype).cuda()), parameter(torch.full((5,), 0.25).to(dtype).cuda())]
    expected = total_norm(on_host(gradients(parameters)))
    assert fastclip.total_norm(gradients(parameters)).item() == pytest.approx(expected, rel=NORM_ERROR)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_as_torch(value):
    ours, theirs = make(70_000, 9), []
    ours[0].grad[69_999] = value
    theirs = [parameter(p.grad.clone()) for p in ours]
    exact = [parameter(g) for g in wide(gradients(ours))]
    clip = torch.nn.utils.clip_grad_norm_
    assert_agrees(fastclip.clip_norm_(ours, 1.0), clip(theirs, 1.0), clip(exact, 1.0), NORM_ERROR)
    for sides in zip(gradients(ours), gradients(theirs), gradients(exact)):
        assert_agrees(*sides, clipping(torch.float32))
    with pytest.raises(RuntimeError, match="nothing was changed"):
        fastclip.clip_norm_(ours, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes_that_come_and_go(dtype):
    """Addresses are reused by gradients of other sizes: a table from before must not be."""
    generator = torch.Generator().manual_seed(1)
    parameters = make(*[1] * 12, dtype=dtype)
    for _ in range(60):
        for k in torch.randint(12, (4,), generator=generator).tolist():
            size = int(torch.randint(0, 40_000, (), generator=generator))
            parameters[k] = parameter(torch.randn(size, device="cuda").to(dtype))
        before = on_host(gradients(parameters))
        expected = total_norm(before)
        assert fastclip.clip_norm_(parameters, 1.0).item() == pytest.approx(expected, rel=NORM_ERROR)
        assert_scaled(on_host(gradients(parameters)), before, [factor(1.0, expected)] * 12, dtype)


@pytest.mark.parametrize("count", [2000, 3000])
def test_thousands_of_tensors(count):
    """3,000 are more than fit into the parameters of a kernel."""
    parameters = make(*[k % 300 for k in range(count)], dtype=torch.bfloat16)
    for _ in range(3):
        before = on_host(gradients(parameters))
        expected = total_norm(before)
        assert fastclip.clip_norm_(parameters, 1.0).item() == pytest.approx(expected, rel=NORM_ERROR)
        assert_scaled(on_host(gradients(parameters)), before, [factor(1.0, expected)] * count, torch.bfloat16)
        parameters[7] = make(250, dtype=torch.bfloat16)[0]


def test_a_tensor_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    size = 2**31 + 4097
    p = parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    assert fastclip.clip_norm_([p], 1.0).item() == pytest.approx(math.sqrt(size), rel=NORM_ERROR)
    value = torch.tensor(1 / (math.sqrt(size) + 1e-6)).bfloat16().item()
    assert p.grad[0].item() == p.grad[-1].item() == value
    assert (p.grad == value).all()
    p.grad = None
    gc.collect()
    torch.cuda.empty_cache()


def test_bitwise_repeatable():
    parameters = make(1_000_003, 77, 65_536, dtype=torch.bfloat16)
    norms = {fastclip.total_norm(gradients(parameters)).item() for _ in range(20)}
    assert len(norms) == 1


def test_mixed_dtypes_and_devices():
    """Norms are gathered on the first gradient's device; every gradient is scaled where it lies."""
    parameters = [p for d in DTYPES for p in make(7, 70_000, dtype=d)]
    for _ in range(2):
        before = on_host(gradients(parameters))
        expected = total_norm(before)
        norm = fastclip.clip_norm_(parameters, 1.0)
        assert norm.device.type == "cuda" and norm.dtype == torch.float64
        assert norm.item() == pytest.approx(expected, rel=NORM_ERROR)
        for p, b in zip(parameters, before):
            relative = NORM_ERROR + rounding(p.dtype)
            assert_scaled([p.grad.cpu()], [b], [factor(1.0, expected)], relative=relative)


def test_cpu_and_gpu_together():
    with fastclip.use_backend("auto"):
        parameters = [p for n in (7, 70_000) for d in ("cuda", "cpu") for p in make(n, device=d)]
        before = on_host(gradients(parameters))
        expected = total_norm(before)
        norm = fastclip.clip_norm_(parameters, 1.0)
    assert norm.device.type == "cuda" and norm.item() == pytest.approx(expected, rel=NORM_ERROR)
    assert_scaled(on_host(gradients(parameters)), before, [factor(1.0, expected)] * 4, torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    parameters = [p for n in (7, 70_000) for d in ("cuda:1", "cuda:0") for p in make(n, device=d)]
    before = on_host(gradients(parameters))
    expected = total_norm(before)
    norm = fastclip.clip_norm_(parameters, 1.0)
    assert norm.device == torch.device("cuda:1") and norm.item() == pytest.approx(expected, rel=NORM_ERROR)
    assert_scaled(on_host(gradients(parameters)), before, [factor(1.0, expected)] * 4, torch.float32)


# ---- what a call costs ----


def launches(call):
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith("Optimizer.")]  # the shadow of torch's range around a step


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_three_launches_and_no_copy(limit):
    parameters = make(*[1000] * 300, dtype=torch.bfloat16)
    names = launches(lambda: fastclip.clip_norm_(parameters, limit))
    assert 1 <= len(names) <= 3, names
    assert not [name for name in names if "Mem" in name], names


def test_triton_takes_two():
    parameters = make(*[1000] * 300)
    with fastclip.use_backend("triton"):
        names = launches(lambda: fastclip.clip_norm_(parameters, 1e9))
    assert len(names) == 2, names


def test_mixed_dtypes_take_as_few():
    parameters = make(1000, 5) + make(1000, dtype=torch.bfloat16)
    names = launches(lambda: fastclip.clip_norm_(parameters, 1.0))
    assert 1 <= len(names) <= 5, names


def test_no_call_waits_for_the_device():
    parameters = make(70_000, 5, 9)
    clipper = fastclip.Clipper(parameters, [fastclip.rules.Mask(1e-9), fastclip.rules.GlobalNorm(1.0)])
    calls = [
        lambda: fastclip.clip_norm_(parameters, 1.0),
        lambda: fastclip.clip_value_(parameters, 0.5),
        lambda: fastclip.clip_tensor_norm_(parameters, 1.0),
        lambda: fastclip.mask_small_(parameters, 1e-9),
        lambda: fastclip.clip_with_norm_(parameters, 1.0, torch.ones((), device="cuda")),
        lambda: clipper.clip_().clipped,
    ]
    for call in calls:  # first calls compile
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_extra_memory():
    parameters = make(30_000_000, 20_000_000, *[100] * 500, dtype=torch.bfloat16)
    fastclip.clip_norm_(parameters, 1.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastclip.clip_norm_(parameters, 0.5)
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_nothing_is_written_when_nothing_is_clipped():
    """A gradient whose coefficient is 1 is not even rewritten: its NaN payload and -0.0 stay."""
    p = parameter(torch.tensor([-0.0, 1.0, 2.0], device="cuda"))
    p.grad.view(torch.int32)[1] = 0x7FC12345
    bits = p.grad.view(torch.int32).clone()
    fastclip.clip_norm_([p], math.inf)
    assert torch.equal(p.grad.view(torch.int32), bits)


# ---- inside the optimizer's step ----

OPTIMIZERS = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "fused SGD": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, fused=True),
    "foreach AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "fastclip AdamW": lambda ps: fastclip.optim.AdamW(ps, lr=1e-2),
    "fastclip SGD": lambda ps: fastclip.optim.SGD(ps, lr=1e-1, momentum=0.9),
}
LIKE_TORCH = {"fastclip AdamW": "foreach AdamW", "fastclip SGD": "fused SGD"}


@pytest.mark.parametrize("rule", [0.5, 1e9, [fastclip.rules.Mask(2.0), 0.5]], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(name, rule):
    """Ten steps, one of them skipped by `when` and one by a NaN, as clip, then step."""
    sizes = (70_000, 5, 9)
    ours = make(*sizes)
    optimizer, exact = OPTIMIZERS[name](ours), ExactSteps(OPTIMIZERS[LIKE_TORCH.get(name, name)], ours)
    clipper = fastclip.Clipper(ours, rule, nonfinite="skip")
    clipped = fastclip.Clipper(exact.params, rule)
    for step in range(10):
        for p in ours:
            p.grad = torch.randn(p.shape, device="cuda")
        exact.give(ours)
        if step == 4:
            ours[0].grad[7] = math.nan
        stats = clipper.step(optimizer, when=torch.tensor(step != 2, device="cuda"))
        assert bool(stats.skipped) == (step in (2, 4))
        if step not in (2, 4):
            with fastclip.use_backend("reference"):
                clipped.clip_()
            exact.step(NORM_ERROR)
    exact.check(ours)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_with_a_scaler(name):
    ours, theirs = make(70_000, 9), make(70_000, 9)
    for p, q in zip(ours, theirs):
        q.data.copy_(p.data)
    like = OPTIMIZERS[LIKE_TORCH.get(name, name)]
    optimizer, expected, exact = OPTIMIZERS[name](ours), like(theirs), ExactSteps(like, ours)
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    clipper = fastclip.Clipper(ours, 0.5)
    for step in range(8):
        for ps, scaler, opt in ((ours, scalers[0], optimizer), (theirs, scalers[1], expected)):
            scale = scaler.get_scale()
            torch.manual_seed(step)
            opt.zero_grad()
            scaler.scale(sum((p * torch.randn(p.shape, device="cuda")).sum() for p in ps)).backward()
            if step == 3:
                ps[0].grad[0] = math.inf
            elif ps is ours:
                exact.give(ours)
                for p in exact.params:
                    p.grad /= scale
                torch.nn.utils.clip_grad_norm_(exact.params, 0.5)
                exact.step(NORM_ERROR)
            if ps is ours:
                clipper.step(opt, scaler=scaler)
            else:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(ps, 0.5)
                scaler.step(opt)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    exact.check(ours)
    exact.check(theirs)


def test_fed_steps_do_not_wait_for_the_device():
    parameters = make(70_000, 5, 9)
    steps = []
    for name in ("fused AdamW", "fused SGD", "fastclip AdamW", "fastclip SGD"):
        optimizer = OPTIMIZERS[name](parameters)
        clipper = fastclip.Clipper(parameters, 0.5, nonfinite="skip")
        steps.append(lambda c=clipper, o=optimizer: c.step(o, when=torch.ones((), dtype=torch.bool, device="cuda")))
    for step in steps:
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cpu_and_gpu_parameters_skip_together():
    with fastclip.use_backend("auto"):
        parameters = [*make(50), *make(50, device="cpu")]
        optimizer = fastclip.optim.AdamW(parameters, max_norm=1.0, nonfinite="skip")
        before = [p.detach().clone() for p in parameters]
        parameters[0].grad[3] = math.nan
        optimizer.step()
    for p, b in zip(parameters, before):
        assert torch.equal(p, b)


# ---- our own optimizers ----

PAIRS = {
    "AdamW": (fastclip.optim.AdamW, torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    "AdamW amsgrad": (fastclip.optim.AdamW, torch.optim.AdamW, {"lr": 0.05, "amsgrad": True, "maximize": True}),
    "SGD": (fastclip.optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD momentum": (fastclip.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "SGD nesterov": (fastclip.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
SIZES = (70_001, 1, 0, 16, 300_000, 1023)


def placed(sizes, dtype, offsets=(0,)):
    """Parameters and gradients that start so many elements into their memory."""
    found = []
    for i, size in enumerate(sizes):
        mine = [offsets[(2 * i + k) % len(offsets)] for k in range(2)]
        value, gradient = (torch.randn(size + n, device="cuda").to(dtype)[n:] for n in mine)
        found.append(parameter(gradient, value))
    return found


@pytest.mark.parametrize("offsets", [(0,), (1,), (0, 0, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_optimizer_in_float64(name, dtype, offsets):
    """Three steps, as torch takes them in float64, wherever the arrays lie."""
    ours, theirs, options = PAIRS[name]
    a = placed(SIZES, dtype, offsets)
    mine, exact = ours(a, **options), ExactSteps(lambda ps: theirs(ps, **options, foreach=False), a)
    for _ in range(3):
        for p in a:
            p.grad.normal_()
        exact.give(a)
        mine.step()
        exact.step()
        exact.check(a)


@pytest.mark.parametrize("name", PAIRS)
def test_optimizer_is_bitwise_the_same_wherever_arrays_lie(name):
    ours, _, options = PAIRS[name]
    a = placed(SIZES, torch.float32)
    results = []
    for offset in (0, 1, 3):
        ps = []
        for p in a:
            q = torch.empty(p.numel() + offset, device="cuda")[offset:].copy_(p.detach())
            ps.append(parameter(p.grad.clone(), q))
        optimizer = ours(ps, **options)
        for _ in range(3):
            optimizer.step()
        results.append([p.detach().clone() for p in ps])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("name", PAIRS)
def test_optimizer_holds_masked_parameters(name):
    ours, _, options = PAIRS[name]
    ps = placed((70_001, 5000, 9), torch.float32)
    optimizer = ours(ps, **options, max_norm=fastclip.rules.Mask(1e-3, freeze=True))
    optimizer.step()
    for p in ps:
        p.grad.normal_()
    ps[1].grad.mul_(1e-6)
    before = copy.deepcopy([ps[1].detach(), optimizer.state.get(ps[1])])
    other = ps[0].detach().clone()
    optimizer.step(zero_grad=True)
    torch.testing.assert_close([ps[1].detach(), optimizer.state.get(ps[1])], before, rtol=0, atol=0)
    assert not torch.equal(ps[0], other)
    assert not any(p.grad.any() for p in ps)


@pytest.mark.parametrize("name", PAIRS)
def test_optimizer_skips_and_masks_on_the_device(name):
    """NaN: nothing is written. A coefficient of 0: gradients of zeros, whatever is in them."""
    ours, _, options = PAIRS[name]
    ps = placed((70_001, 9), torch.float32)
    skipping = ours(ps, **options, max_norm=1.0, nonfinite="skip")
    skipping.step()
    ps[0].grad[70_000] = math.nan
    before = copy.deepcopy([[p.detach() for p in ps], list(skipping.state.values())])
    skipping.step()
    assert skipping.stats.skipped
    after = [[p.detach() for p in ps], list(skipping.state.values())]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    ours(ps, **options, max_norm=lambda stats: torch.zeros((), device="cuda")).step()
    assert all(p.isfinite().all() for p in ps)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_optimizer_by_torchs_kernel(name, zero_grad):
    """Gradients that parameters of two groups share, and one laid out otherwise than its parameter."""
    ours, theirs, options = PAIRS[name]

    def make_three():
        torch.manual_seed(0)
        a, b, c, shared, other = (torch.randn(300, 50, device="cuda") for _ in range(5))
        ps = [parameter(shared, a), parameter(shared, b), parameter(other.view(50, 300).t(), c)]
        ps[1].grad = ps[0].grad
        return ps

    a = make_three()
    kept = [p.grad.clone() for p in a]
    groups = lambda ps: [{"params": ps[:1]}, {"params": ps[1:]}]  # noqa: E731
    mine, exact = ours(groups(a), **options, max_norm=1.0), ExactSteps(lambda ps: theirs(groups(ps), **options), a)
    for _ in range(3):
        exact.give(a)
        exact.params[0].grad = exact.params[1].grad
        mine.step(zero_grad=zero_grad)
        assert not (zero_grad and any(p.grad.any() for p in a))
        torch.nn.utils.clip_grad_norm_(exact.params[1:], 1.0)
        exact.step(NORM_ERROR)
        exact.check(a)
        for p, gradient in zip(a, kept):
            p.grad.copy_(gradient)


@pytest.mark.parametrize("offsets", [(0,), (1, 2, 3)], ids=str)
def test_stochastic_rounding(offsets):
    """The random numbers are the cpu backend's: where the arithmetic is exact, so is the result."""
    a = placed((200_003, 7, 1025), torch.bfloat16, offsets)
    for p in a:
        p.data.mul_(16).round_().div_(16)
        p.grad.mul_(16).round_().div_(16)
    b = [parameter(p.grad.cpu(), p.detach().cpu()) for p in a]
    nearest = [p.detach().clone() for p in a]
    with fastclip.use_backend("auto"):
        fastclip.optim.SGD(b, lr=2.0**-10, stochastic_rounding=7).step()
    fastclip.optim.SGD(a, lr=2.0**-10, stochastic_rounding=7).step()
    for p, q in zip(a, b):
        assert torch.equal(p.cpu(), q)
    assert not torch.equal(a[0], nearest[0])

    p = parameter(
        torch.full((1_000_000,), -1.0, device="cuda").bfloat16(), torch.ones(1_000_000, device="cuda").bfloat16()
    )
    optimizer = fastclip.optim.AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=3)
    for _ in range(10):
        optimizer.step()
    assert (p.detach().double() - 1).mean().item() == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("count", [3, 1000])
def test_graph_of_a_whole_optimizer_step(count):
    """Forward, backward, clip and step, replayed; the learning rate is changed on the device in between."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64).cuda()
    extra = [torch.nn.Parameter(torch.randn(k % 50, device="cuda")) for k in range(count)]
    inputs = torch.randn(32, 64, device="cuda")
    rate = torch.tensor(1e-2, device="cuda")
    ps = [*model.parameters(), *extra]
    optimizer = fastclip.optim.AdamW(ps, lr=rate, max_norm=0.5, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        (model(inputs).square().mean() * 100 + sum(p.square().sum() for p in extra)).backward()
        optimizer.step()
        return optimizer.stats.total_norm

    graph, norm = captured(step)
    copied = copy.deepcopy([[p.detach() for p in ps], [optimizer.state[p] for p in ps]])
    found = []
    for run in (graph.replay, step):
        with torch.no_grad():
            for p, value, state in zip(ps, *copied):
                p.copy_(value)
                for key, kept in state.items():
                    optimizer.state[p][key].copy_(kept)
        for lr, scale in ((1e-2, 1.0), (1e-3, 5.0), (1e-1, 0.1)):
            rate.fill_(lr)
            torch.manual_seed(1)
            inputs.copy_(torch.randn(32, 64, device="cuda") * scale)
            result = run()
            found.append((norm if result is None else result).item())
        found.append([p.detach().clone() for p in ps])
    assert found[:3] == pytest.approx(found[4:7], rel=1e-4)
    for a, b in zip(found[3], found[7]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_an_optimizer_step_is_a_few_launches(name):
    ours, _, options = PAIRS[name]
    optimizer = ours(make(*[1000] * 300, dtype=torch.bfloat16), **options)
    optimizer.step()
    names = launches(lambda: optimizer.step(zero_grad=True))
    assert 1 <= len(names) <= 4, names
    assert not [name for name in names if "Memcpy" in name], names


def test_a_step_over_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    size = 2**31 + 4097
    p = parameter(*(torch.ones(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)))
    fastclip.optim.SGD([p], lr=3.0).step(zero_grad=True)
    assert (p.detach() == -2).all() and not p.grad.any()
    p.grad = None
    del p
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repair(gpu_backend, dtype, p):
    backend = fastclip.backends.get(gpu_backend)
    parameters = placed((300_007, 5, 0, 70_000, 1025), dtype, (0, 1))
    for i, place in enumerate((0, 150_000, 300_006)):
        parameters[0].grad[place] = (math.nan, math.inf, -math.inf)[i]
    parameters[4].grad.fill_(math.nan)
    wanted = [torch.where(g.isfinite(), g, 0) for g in gradients(parameters)]
    (group,) = fastclip.gradients.pack.pack(parameters, gradients=False, write=True).groups
    measured = backend.measure(group, p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, counts = backend.repair_(group, measured, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts.dtype == torch.int64 and counts.tolist() == [3, 0, 0, 0, 1025]
    assert all(map(torch.equal, gradients(parameters), wanted))
    anew = backend.measure(group, p)
    assert torch.equal(again.power, anew.power) and torch.equal(again.absmax, anew.absmax)
    assert not measured.absmax[0].isfinite()


# ---- graphs and streams ----


def captured(call):
    """`call` as a CUDA graph, after a warm-up on a side stream, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("count", [3, 3000])
@pytest.mark.parametrize("mixed", [False, True])
def test_graph_of_clip_norm(count, mixed):
    """Replayed three times with new values at the same addresses, while other calls go on outside the graph."""
    parameters = make(70_000, *[k % 200 for k in range(count)])
    if mixed:
        parameters += make(5000, 3, dtype=torch.bfloat16)
    others = make(50_000, 5)
    graph, norm = captured(lambda: fastclip.clip_norm_(parameters, 1.0))
    for scale in (3.0, 0.001, 40.0):
        for p in parameters:
            p.grad.copy_(torch.randn(p.shape, device="cuda") * scale)
        before = on_host(gradients(parameters))
        expected = total_norm(before)
        graph.replay()
        fastclip.clip_norm_(others, 1.0)
        assert norm.item() == pytest.approx(expected, rel=NORM_ERROR)
        for p, b in zip(parameters, before):
            assert_scaled([p.grad.cpu()], [b], [factor(1.0, expected)])


def test_graph_of_a_clipper():
    parameters = make(70_000, 9, 500)
    rules = [fastclip.rules.Mask(1e-2), fastclip.rules.Value(2.0), fastclip.rules.GlobalNorm(1.0)]
    clipper = fastclip.Clipper(parameters, rules)
    graph, stats = captured(clipper.clip_)
    for scale in (3.0, 1e-3, 1.0):
        for p in parameters:
            p.grad.copy_(torch.randn(p.shape, device="cuda") * scale)
        copies = [parameter(p.grad.clone()) for p in parameters]
        expected = fastclip.Clipper(copies, rules).clip_()
        graph.replay()
        for name in ("total_norm", "tensor_norms", "tensor_absmax", "coef", "clipped", "nonfinite"):
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name), msg=name)
        for p, q in zip(parameters, copies):
            assert torch.equal(p.grad, q.grad)


def test_graph_of_a_whole_step():
    """Gradients are allocated inside the graph, so the addresses are seen there for the first time."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
    inputs = torch.randn(32, 64, device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        model(inputs).square().mean().mul(100).backward()
        return fastclip.clip_norm_(model.parameters(), 0.5)

    graph, norm = captured(step)
    for scale in (1.0, 5.0, 0.1):
        inputs.copy_(torch.randn(32, 64, device="cuda") * scale)
        expected = step().item()
        graph.replay()
        assert norm.item() == pytest.approx(expected, rel=1e-5)


def test_graph_of_a_fed_step():
    parameters = make(70_000, 9)
    copies = [parameter(p.grad.clone(), p.detach().clone()) for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True, capturable=True)
    expected = torch.optim.AdamW(copies, lr=1e-2, fused=True)
    clipper = fastclip.Clipper(parameters, 0.5)
    graph, stats = captured(lambda: clipper.step(optimizer))
    with torch.no_grad():  # the warm-up took one step; start again from there
        for p, q in zip(parameters, copies):
            q.copy_(p)
    expected.load_state_dict(optimizer.state_dict())
    for scale in (1.0, 30.0):
        for p, q in zip(parameters, copies):
            p.grad.copy_(torch.randn(p.shape, device="cuda") * scale)
            q.grad = p.grad.clone()
        graph.replay()
        norm = fastclip.clip_norm_(copies, 0.5)
        expected.step()
        torch.testing.assert_close(stats.total_norm, norm)
        for p, q in zip(parameters, copies):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_several_graphs_and_their_end():
    """Graphs do not share workspace with each other or with calls outside, and may go while others stay."""
    models = [make(40_000, k) for k in (1, 2, 3)]
    graphs = [captured(lambda ps=ps: fastclip.clip_norm_(ps, 1e9)) for ps in models]
    for round_ in range(3):
        expected = [total_norm(on_host(gradients(ps))) for ps in models]
        streams = [torch.cuda.Stream() for _ in graphs]
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, norm), value in zip(graphs, expected):
            assert norm.item() == pytest.approx(value, rel=NORM_ERROR)
        if round_ == 1:
            del graphs[0], models[0]
            gc.collect()
            torch.cuda.empty_cache()


def test_streams_at_once():
    """Each stream has a workspace of its own."""
    models = [make(3_000_000, 9 + k) for k in range(4)]
    expected = [total_norm(on_host(gradients(ps))) for ps in models]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    norms = []
    for _ in range(10):
        for stream, parameters in zip(streams, models):
            with torch.cuda.stream(stream):
                norms.append(fastclip.clip_norm_(parameters, math.inf))
    torch.cuda.synchronize()
    for k, norm in enumerate(norms):
        assert norm.item() == pytest.approx(expected[k % 4], rel=NORM_ERROR)


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 14, 1 << 30])
def test_a_step_in_backward_whose_gradients_come_on_two_streams(bucket_bytes):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)]).cuda()

    rule = fastclip.rules.AdaGC(lambda_rel=0.9, warmup=0)
    model, other = network(), network()
    mine = fastclip.optim.AdamW(
        model.parameters(), lr=1e-2, max_norm=copy.deepcopy(rule), step_in_backward=True, bucket_bytes=bucket_bytes
    )
    reference = fastclip.optim.AdamW(other.parameters(), lr=1e-2, max_norm=copy.deepcopy(rule))
    side = torch.cuda.Stream()
    for step in range(20):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).cuda()
        for one, optimizer in ((model, mine), (other, reference)):
            half = one[:3](x)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # whose backward runs there too
                loss = one[3:](half).square().mean()
            torch.cuda.current_stream().wait_stream(side)
            loss.backward()
            optimizer.step()
            assert optimizer is reference or all(p.grad is None for p in one.parameters())
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.stats.tensor_norms, reference.stats.tensor_norms, rtol=1e-4, atol=0)


def test_compiled_step():
    """torch.compile keeps the call in one graph on a GPU too, also where it makes CUDA graphs of its own."""
    p = parameter(torch.full((16,), 2.0, device="cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: fastclip.clip_norm_([p], 1.0) * 2, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        p.grad.fill_(2.0)
        assert compiled().item() == pytest.approx(16)
        assert p.grad.norm().item() == pytest.approx(1, rel=1e-5)
