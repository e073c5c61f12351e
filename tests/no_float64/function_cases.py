"""The functions of fastclip on the device, against float64 on the CPU. Run by tests/test_no_float64.py."""

import itertools
import math

import pytest
import torch
from cases import (
    CASES,
    EXTREMES,
    assert_scaled,
    clip_factor,
    gradients,
    parameter,
    plain,
    rounding,
    tensor_norm,
    total_norm,
)

import fastclip
import no_float64
from no_float64.twins import DEVICE, DTYPES, check_number, host

ORDERS = (2.0, 1.0, math.inf, 0.0, 3.0)


def limits(norm):
    """One that clips to a quarter, one that just measures."""
    return {"clips": (norm + 1e-6) / 4, "leaves": (norm + 1e-6) * 2}


EVERY_ORDER = ("matrices", "with empty", "gaps", "zeros")


@pytest.mark.parametrize("kind", ["clips", "leaves"])
@pytest.mark.parametrize(("case", "p"), [(c, p) for c in CASES for p in ORDERS if p == 2 or c in EVERY_ORDER])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_norm(case, dtype, p, kind):
    ps = CASES[case](dtype=dtype, device=DEVICE)
    before = host(gradients(ps))
    norm = total_norm(before, p)
    limit = limits(norm)[kind]
    returned = fastclip.clip_norm_(ps, limit, p)
    check_number(returned, norm)
    assert all(g.device == DEVICE and g.dtype == dtype for g in gradients(ps))
    assert_scaled(host(gradients(ps)), before, [clip_factor(norm, limit)] * len(ps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_clip_norm_of_extremes(extreme, p, dtype):
    ps = [parameter(EXTREMES[extreme](dtype).to(DEVICE)) for _ in range(2)]
    before = host(gradients(ps))
    norm = total_norm(before, p)
    limit = limits(norm)["clips"]
    check_number(fastclip.total_norm(gradients(ps), p), norm)
    check_number(fastclip.clip_norm_(ps, limit, p), norm)
    assert_scaled(host(gradients(ps)), before, [clip_factor(norm, limit)] * len(ps))


@pytest.mark.parametrize("p", ORDERS)
def test_between_extremes(p):
    """Tensors so different that one scale for all would lose the small ones."""
    ps = [parameter(torch.full((7,), x, device=DEVICE)) for x in (1e30, 1.0, 1e-30, 0.0)]
    exact = [tensor_norm(g, p) for g in host(gradients(ps))]
    check_number(fastclip.clip_tensor_norm_(ps, 1e38, p), exact, shape=(4,))
    check_number(fastclip.total_norm(gradients(ps), p), total_norm(host(gradients(ps)), p))


def test_a_norm_beyond_float32():
    """The norm is inf as a float32, and the gradients are clipped by what it is."""
    ps = [parameter(torch.full((3000,), 3e38, device=DEVICE))]
    before = host(gradients(ps))
    assert fastclip.clip_norm_(ps, 1.0).item() == math.inf
    assert_scaled(host(gradients(ps)), before, [clip_factor(total_norm(before), 1.0)])


def test_many_elements():
    """A sum of a million squares one after the other would not be right to 1e-6."""
    gradient = torch.rand(1_500_001) + 0.5
    check_number(fastclip.total_norm([gradient.to(DEVICE)]), tensor_norm(gradient))
    check_number(fastclip.total_norm([gradient.to(DEVICE)], 1), tensor_norm(gradient, 1))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_as_torch_has_it(broken, p):
    ps = plain((5,), (3, 4))(dtype=torch.float32, device=DEVICE)
    ps[1].grad[1, 2] = broken
    theirs = [parameter(g) for g in host(gradients(ps))]
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5, p)
    if p != 0 or not math.isnan(broken):
        check_number(fastclip.clip_norm_(ps, 0.5, p), norm)
        torch.testing.assert_close(host(gradients(ps)), gradients(theirs), equal_nan=True)
    ps[1].grad[1, 2] = broken
    before = host(gradients(ps))
    if p != 0:
        with pytest.raises(RuntimeError, match="finite"):
            fastclip.clip_norm_(ps, 0.5, p, error_if_nonfinite=True)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(host(gradients(ps)), before))


def test_error_if_nonfinite_lets_what_is_finite_pass():
    ps = plain((5,), (3, 4))(dtype=torch.float32, device=DEVICE)
    norm = total_norm(host(gradients(ps)))
    check_number(fastclip.clip_norm_(ps, 0.5, error_if_nonfinite=True), norm)
    check_number(fastclip.total_norm(gradients(ps), error_if_nonfinite=True), 0.5 * norm / (norm + 1e-6))


def test_nothing_to_clip():
    for ps in ([], [torch.nn.Parameter(torch.zeros(3, device=DEVICE))]):
        assert fastclip.clip_norm_(ps, 1.0).item() == 0
        assert fastclip.clip_tensor_norm_(ps, 1.0).shape == (0,)
    check_number(fastclip.clip_norm_([torch.nn.Parameter(torch.zeros(3, device=DEVICE))], 1.0), 0.0)


@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_limits_at_the_ends(limit):
    ps = plain((5,), (3, 4))(dtype=torch.float32, device=DEVICE)
    before = host(gradients(ps))
    check_number(fastclip.clip_norm_(ps, limit), total_norm(before))
    assert_scaled(host(gradients(ps)), before, [0.0 if limit == 0 else 1.0] * 2)


@pytest.mark.parametrize("place", ["device", "cpu", "float64 of the cpu", "float"])
def test_a_limit_that_is_a_tensor(place):
    ps = plain((5,), (3, 4))(dtype=torch.float32, device=DEVICE)
    before = host(gradients(ps))
    check_number(fastclip.clip_norm_(ps, number_at(0.5, place)), total_norm(before))
    assert_scaled(host(gradients(ps)), before, [clip_factor(total_norm(before), 0.5)] * 2)


def number_at(x, place):
    if place == "float":
        return x
    return torch.tensor(x, dtype=torch.float64 if "float64" in place else torch.float32).to(
        DEVICE if place == "device" else "cpu"
    )


@pytest.mark.parametrize("norm", [3.0, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("place", ["device", "cpu", "float64 of the cpu", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_with_norm(dtype, place, norm):
    ps = plain((5,), (3, 4), (0,))(dtype=dtype, device=DEVICE)
    before = host(gradients(ps))
    fastclip.clip_with_norm_(ps, 1.5, number_at(norm, place))
    factor = math.nan if math.isnan(norm) else clip_factor(norm, 1.5)
    assert_scaled(host(gradients(ps)), before, [factor] * 3, relative=rounding(dtype))


@pytest.mark.parametrize("case", ["matrices", "gaps", "with empty", "transposed", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_value(dtype, case):
    ps = CASES[case](dtype=dtype, device=DEVICE)
    ps[1].grad[(0,) * ps[1].grad.dim()] = math.nan
    before = host(gradients(ps))
    assert fastclip.clip_value_(ps, 0.3) is None
    for new, old in zip(host(gradients(ps)), before):
        limit = torch.tensor(0.3, dtype=torch.float32).to(dtype).item()
        torch.testing.assert_close(new, old.clamp(-limit, limit), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_tensor_norm(dtype, p):
    ps = CASES["matrices"](dtype=dtype, device=DEVICE) + CASES["gaps"](dtype=dtype, device=DEVICE)
    before = host(gradients(ps))
    norms = [tensor_norm(g, p) for g in before]
    limit = sorted(norms)[len(norms) // 2]
    check_number(fastclip.clip_tensor_norm_(ps, limit, p), norms, shape=(len(ps),))
    assert_scaled(host(gradients(ps)), before, [clip_factor(n, limit) for n in norms])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_small(dtype):
    ps = [parameter(torch.full((n,), x, dtype=dtype, device=DEVICE)) for n, x in ((3, 0.1), (5, 2.0), (4, 1e-7))]
    ps[2].grad[1] = math.nan
    masked = fastclip.mask_small_(ps, 0.5)
    assert masked.device == DEVICE and masked.dtype == torch.bool and masked.tolist() == [True, False, False]
    assert not ps[0].grad.any() and (ps[1].grad == 2).all() and ps[2].grad.isnan().sum() == 1


# ---- what shares memory, and what only seems to ----


def test_tied_gradients_count_once():
    a = parameter(torch.full((2, 6), 3.0, device=DEVICE))
    for tied in (a.grad, a.grad.view(-1), a.grad.view(3, 4), a.grad.detach()):
        a.grad.fill_(3.0)
        b, c = parameter(tied), parameter(torch.ones(5, device=DEVICE))
        norm = math.sqrt(12 * 9 + 5)
        check_number(fastclip.clip_norm_([a, b, c], 1.0), norm)
        torch.testing.assert_close(host(a.grad), torch.full((2, 6), 3 / (norm + 1e-6)), rtol=2e-6, atol=0)


def test_gradients_that_overlap_raise():
    whole = torch.ones(10, device=DEVICE)
    pairs = [(whole[:6], whole[4:]), (whole, whole[3:5]), (whole[::2], whole[4:6]), (whole[1:7:2], whole[3:])]
    for pair in pairs:
        for clip in (fastclip.clip_norm_, fastclip.clip_value_, fastclip.clip_tensor_norm_):
            with pytest.raises(RuntimeError, match="overlap"):
                clip([parameter(g) for g in pair], 0.5)
    assert (whole == 1).all()
    check_number(fastclip.total_norm([whole[:6], whole[4:]]), math.sqrt(12))  # to be read they may


def test_an_expanded_gradient_raises():
    with pytest.raises(RuntimeError, match="expanded"):
        fastclip.clip_norm_([parameter(torch.ones(1, device=DEVICE).expand(5))], 0.5)


def test_interleaved_gradients_are_clipped():
    whole = torch.ones(20, device=DEVICE)
    ps = [parameter(whole[::2]), parameter(whole[1::2])]
    check_number(fastclip.clip_norm_(ps, 1.0), math.sqrt(20))
    torch.testing.assert_close(host(whole), torch.full((20,), 1 / (math.sqrt(20) + 1e-6)), rtol=2e-6, atol=0)


def neighbours(count, shape):
    """Tensors whose addresses lie within each other's reach."""
    tensors = [torch.ones(shape, device=DEVICE) for _ in range(count)]
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    assert any(a[0] < b[0] < a[1] for a, b in itertools.permutations(spans, 2))
    return tensors


@pytest.mark.parametrize("shape", [(64,), (8, 8), (33, 2)])
def test_unrelated_gradients_whose_addresses_seem_to_overlap(shape):
    for make in (lambda t: t, lambda t: t.t(), lambda t: t[::2], lambda t: t[1:]):
        ps = [parameter(make(t)) for t in neighbours(5, shape)]
        numel = sum(p.grad.numel() for p in ps)
        check_number(fastclip.clip_norm_(ps, 1.0), math.sqrt(numel))
        for p in ps:
            torch.testing.assert_close(host(p.grad), torch.full(p.shape, 1 / (math.sqrt(numel) + 1e-6)))


def same_address():
    """Two that have nothing in common but address and size."""
    kept = [torch.ones(8, device=DEVICE) for _ in range(50)]
    a, b = next((a, b) for a, b in itertools.permutations(kept, 2) if a.data_ptr() + 16 == b.data_ptr())
    a, b = a[4:], b[:4]
    assert a.data_ptr() == b.data_ptr() and a.untyped_storage()._cdata != b.untyped_storage()._cdata
    return a, b


def test_one_address_is_not_one_gradient():
    a, b = same_address()
    check_number(fastclip.clip_norm_([parameter(a), parameter(b)], 1.0), math.sqrt(8))
    for gradient in (a, b):
        torch.testing.assert_close(host(gradient), torch.full((4,), 1 / (math.sqrt(8) + 1e-6)))
    assert len(fastclip.clip_tensor_norm_([parameter(a), parameter(b)], 1.0)) == 2


# ---- several devices, and torch's names ----


@pytest.mark.parametrize("first", ["cpu", "device"])
@pytest.mark.parametrize("host_dtype", [torch.float32, torch.bfloat16])
def test_gradients_here_and_there(first, host_dtype):
    ps = [parameter(torch.full((5,), 2.0, dtype=host_dtype)), parameter(torch.full((6,), 3.0, device=DEVICE))]
    ps = ps if first == "cpu" else ps[::-1]
    before, norm = host(gradients(ps)), math.sqrt(5 * 4 + 6 * 9)
    returned = fastclip.clip_norm_(ps, 1.0)
    assert returned.device == ps[0].grad.device and returned.dtype == torch.float32
    assert returned.item() == pytest.approx(norm, rel=1e-6)
    assert_scaled(host(gradients(ps)), before, [clip_factor(norm, 1.0)] * 2)
    norms = fastclip.clip_tensor_norm_(ps, 0.5)
    assert norms.device == ps[0].grad.device and len(norms) == 2
    fastclip.clip_value_(ps, 0.01)
    assert all((g == torch.tensor(0.01, dtype=g.dtype)).all() for g in host(gradients(ps)))
    masked = fastclip.mask_small_(ps, 0.5)
    assert masked.device == ps[0].grad.device and masked.tolist() == [True, True]
    assert not any(g.any() for g in gradients(ps))


@pytest.mark.parametrize("first", ["cpu", "device"])
def test_float64_on_the_cpu_beside_the_device(first):
    """The norm is float64 where its device has that."""
    ps = [parameter(torch.full((5,), 2.0, dtype=torch.float64)), parameter(torch.full((6,), 3.0, device=DEVICE))]
    ps = ps if first == "cpu" else ps[::-1]
    before, norm = host(gradients(ps)), math.sqrt(5 * 4 + 6 * 9)
    returned = fastclip.clip_norm_(ps, 1.0)
    assert returned.device == ps[0].grad.device
    assert returned.dtype == (torch.float64 if first == "cpu" else torch.float32)
    assert returned.item() == pytest.approx(norm, rel=1e-6)
    assert_scaled(host(gradients(ps)), before, [clip_factor(norm, 1.0)] * 2, relative=2e-6)


def test_torchs_names_and_functions():
    ps = plain((5,), (3, 4))(dtype=torch.float32, device=DEVICE)
    before = host(gradients(ps))
    check_number(fastclip.get_total_norm(gradients(ps)), total_norm(before))
    fastclip.patch_torch()
    try:
        check_number(torch.nn.utils.clip_grad_norm_(ps, 0.5), total_norm(before))
        torch.nn.utils.clip_grad_value_(ps, 0.1)
    finally:
        fastclip.unpatch_torch()
    assert all(g.abs().max() <= 0.1 for g in gradients(ps))


def test_backends_that_cannot_run_here_say_so():
    ps = plain((5,))(dtype=torch.float32, device=DEVICE)
    with fastclip.use_backend("reference"):
        fastclip.clip_norm_(ps, 0.5)
    for name in ("cpu", "cuda"):
        with fastclip.use_backend(name), pytest.raises(RuntimeError, match="cannot run on mpslike"):
            fastclip.clip_norm_(ps, 0.5)


def test_a_clip_waits_for_the_device_only_a_few_times():
    ps = plain(*[(7,)] * 50)(dtype=torch.float32, device=DEVICE)
    fastclip.clip_norm_(ps, 0.5)
    before = no_float64.sync_count()
    fastclip.clip_norm_(ps, 0.1)
    assert no_float64.sync_count() - before <= 2


def test_in_a_mode_that_looks_the_norm_is_on_the_device():
    """There a call is an operation of torch.library, whose fake says so."""
    from torch.utils.flop_counter import FlopCounterMode

    p = parameter(torch.ones(4, device=DEVICE))
    with FlopCounterMode(display=False):
        for returned in (
            fastclip.clip_norm_([p], 1.0),
            fastclip.total_norm([p.grad]),
            fastclip.clip_tensor_norm_([p], 1.0),
            fastclip.mask_small_([p], 0.1),
        ):
            assert returned.device == DEVICE


def test_patched_torch_returns_the_norm_where_torch_does():
    p = parameter(torch.ones(4, device=DEVICE))
    with fastclip.patch_torch(rule=fastclip.rules.ZClip()):
        norm = torch.nn.utils.clip_grad_norm_([p], 1.0)
    assert norm.device == DEVICE and norm.item() == 2


def test_powers_beyond_float64_are_inf():
    huge = torch.full((3,), 3e38, device=DEVICE)
    assert fastclip.total_norm([huge], 9.0).isinf()
    tiny = torch.full((8,), 1e-39, device=DEVICE)  # subnormal: its reciprocal is beyond float32
    assert fastclip.total_norm([tiny], 3.0).item() == pytest.approx(2e-39, rel=1e-5)
