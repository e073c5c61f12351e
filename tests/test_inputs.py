"""What may be passed, and what bad input says before anything is written."""

import math

import numpy as np
import pytest
import torch
from cases import clip_factor, clipping, gradients, parameter

import fastclip
from fastclip import rules


def ones(*sizes):
    return [parameter(torch.ones(n)) for n in sizes]


def clipped_ones(norm, limit):
    """What a 1 becomes in a clip of gradients of this norm."""
    return pytest.approx(clip_factor(norm, limit), rel=clipping(torch.float32))


FORMS = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "iterator": iter,
    "generator": lambda ps: (p for p in ps),
    "group": lambda ps: [{"params": ps}],
    "groups": lambda ps: [{"params": ps[:1]}, {"params": (p for p in ps[1:])}],
    "group of one tensor": lambda ps: [{"params": ps[0]}, *ps[1:]],
    "optimizer": lambda ps: torch.optim.SGD(ps).param_groups,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_parameters(backend, form):
    parameters = ones(3, 6, 7)
    assert fastclip.clip_norm_(form(parameters), 2.0).item() == pytest.approx(4)
    assert all(g[0].item() == clipped_ones(4, 2.0) for g in gradients(parameters))


@pytest.mark.parametrize("kind", [set, frozenset])
def test_what_remembers_parameters_refuses_a_set(kind):
    """Its order is another one in the next run; torch's optimizers refuse it in a group, and torch's clip takes it."""
    ps = ones(3, 6)
    for make in (
        lambda: fastclip.Clipper(kind(ps), 1.0),
        lambda: fastclip.Clipper([{"params": kind(ps)}], 1.0),
        lambda: fastclip.optim.SGD(kind(ps), lr=0.1),
        lambda: fastclip.optim.AdamW([{"params": kind(ps)}], max_norm=1.0),
        lambda: fastclip.optim.SGD(ps[:1], lr=0.1).add_param_group({"params": kind(ps[1:])}),
    ):
        with pytest.raises(TypeError, match=rf"param.* must be in an order .* which a {kind.__name__} has not"):
            make()


def test_single_tensor(backend):
    (p,) = ones(4)
    assert fastclip.clip_norm_(p, 1.0).item() == 2
    assert fastclip.total_norm(p.grad).item() == pytest.approx(1)
    fastclip.clip_value_(p, 0.25)
    assert torch.equal(p.grad, torch.full((4,), 0.25))
    assert fastclip.mask_small_(p, 1.0).tolist() == [True]
    assert torch.equal(p.grad, torch.zeros(4))


def test_module_parameters_with_none_gradients(backend):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[1](torch.ones(1, 4)).sum().backward()
    norm = fastclip.clip_norm_(model.parameters(), 1.0)
    assert norm.item() == pytest.approx(math.sqrt(10))
    assert model[0].weight.grad is None


def test_torch_names_are_the_same_objects():
    assert fastclip.clip_grad_norm_ is fastclip.clip_norm_
    assert fastclip.clip_grad_value_ is fastclip.clip_value_
    assert fastclip.get_total_norm is fastclip.total_norm
    assert fastclip.clip_grads_with_norm_ is fastclip.clip_with_norm_


def test_torch_signatures(backend):
    (p,) = ones(4)
    fastclip.clip_norm_(parameters=p, max_norm=1, norm_type=2, error_if_nonfinite=True, foreach=True)
    fastclip.clip_value_(parameters=p, clip_value=1, foreach=False)
    fastclip.total_norm(tensors=[p.grad], norm_type="inf", error_if_nonfinite=False, foreach=None)
    fastclip.clip_with_norm_(parameters=[p], max_norm=torch.tensor(1.0), total_norm=torch.tensor([2.0]), foreach=None)
    assert p.grad[0].item() == pytest.approx(clip_factor(2, 1.0) ** 2, rel=2 * clipping(torch.float32))


class Wrapped(torch.Tensor):
    """A wrapper subclass, as DTensor is one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return "Wrapped()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        result = func(*[a.inner if isinstance(a, Wrapped) else a for a in args], **(kwargs or {}))
        return Wrapped(result) if func is torch.ops.aten.detach.default else result


class Plain(torch.Tensor):
    """A subclass that adds nothing to the memory."""


def set_grad(p, gradient):
    p.grad = gradient
    return p


def meta_parameter():
    return set_grad(torch.nn.Parameter(torch.empty(3, device="meta")), torch.empty(3, device="meta"))


def wrapped_parameter():
    return set_grad(torch.nn.Parameter(Wrapped(torch.ones(3))), Wrapped(torch.ones(3)))


BAD_PARAMETERS = {
    "a string": (
        lambda: "weights",
        TypeError,
        "parameters must be a tensor or an iterable of tensors, got str 'weights'",
    ),
    "a number": (lambda: 3, TypeError, "got int 3"),
    "none": (lambda: None, TypeError, "got NoneType None"),
    "a string inside": (lambda: ["weights"], TypeError, r"parameters\[1\] must be a tensor, got str 'weights'"),
    "a bare dict": (lambda: {"params": []}, TypeError, "parameters must be a tensor or an iterable"),
    "a group without params": (lambda: [{"lr": 1}], ValueError, r"parameters\[1\] is a dict without the key 'params'"),
    "meta": (lambda: [meta_parameter()], ValueError, r"the gradient of parameters\[1\] is on the meta device"),
    "a wrapper": (lambda: [wrapped_parameter()], NotImplementedError, r"parameters\[1\] is a Wrapped"),
}


@pytest.mark.parametrize("bad", BAD_PARAMETERS)
def test_bad_parameters(backend, bad):
    make, kind, message = BAD_PARAMETERS[bad]
    good = ones(3)
    value = make()
    parameters = good + value if isinstance(value, list) else value
    calls = (
        lambda: fastclip.clip_norm_(parameters, 0.1),
        lambda: fastclip.clip_value_(parameters, 0.1),
        lambda: fastclip.clip_tensor_norm_(parameters, 0.1),
        lambda: fastclip.mask_small_(parameters, 10.0),
        lambda: fastclip.clip_with_norm_(parameters, 0.1, torch.tensor(5.0)),
        lambda: fastclip.Clipper(parameters, 0.1).clip_(),
    )
    for call in calls:
        with pytest.raises(kind, match=message):
            call()
    assert torch.equal(good[0].grad, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_bad_dtypes(backend, dtype):
    with pytest.raises(
        TypeError, match=rf"tensors\[0\] must be float32, float64, bfloat16, float16 or complex, got {dtype}"
    ):
        fastclip.total_norm([torch.ones(3).to(dtype)])


NUMBERS = {
    "clip_norm_ max_norm": lambda p, v: fastclip.clip_norm_(p, v),
    "clip_norm_ norm_type": lambda p, v: fastclip.clip_norm_(p, 1.0, v),
    "total_norm norm_type": lambda p, v: fastclip.total_norm([q.grad for q in p], v),
    "clip_with_norm_ max_norm": lambda p, v: fastclip.clip_with_norm_(p, v, 2.0),
    "clip_value_ clip_value": lambda p, v: fastclip.clip_value_(p, v),
    "clip_tensor_norm_ max_norm": lambda p, v: fastclip.clip_tensor_norm_(p, v),
    "mask_small_ threshold": lambda p, v: fastclip.mask_small_(p, v),
    "TensorNorm max_norm": lambda p, v: fastclip.rules.TensorNorm(v),
    "BlockRMS threshold": lambda p, v: fastclip.rules.BlockRMS(v),
    "Mask threshold": lambda p, v: fastclip.rules.Mask(v),
    "Value limit": lambda p, v: fastclip.rules.Value(v),
    "AGC clip_factor": lambda p, v: fastclip.rules.AGC(v),
}
BAD_NUMBERS = [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError), (True, TypeError),
               (torch.ones(2), ValueError), ([1.0], TypeError), (abs, TypeError),
               (torch.tensor(-1.0), ValueError), (torch.tensor(math.nan), ValueError), (torch.tensor(True), ValueError),
               (torch.tensor(1j), ValueError), (torch.ones((), device="meta"), ValueError),
               (np.ones(2), TypeError)]  # fmt: skip


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize(("value", "kind"), BAD_NUMBERS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_bad_numbers(backend, argument, value, kind):
    parameters = ones(3)
    with pytest.raises(kind, match=f"^{argument.split()[1]} must be"):
        NUMBERS[argument](parameters, value)
    assert torch.equal(parameters[0].grad, torch.ones(3))


def test_bad_total_norm(backend):
    for value in (-5.0, torch.tensor(-5.0)):
        with pytest.raises(ValueError, match=r"total_norm must be >= 0, got -5\.0"):
            fastclip.clip_with_norm_(ones(3), 1.0, value)
    with pytest.raises(ValueError, match="total_norm must be one real number"):
        fastclip.clip_with_norm_(ones(3), 1.0, torch.ones(3))
    with pytest.raises(TypeError, match="total_norm must be a number, got str '5'"):
        fastclip.clip_with_norm_(ones(3), 1.0, "5")


def test_subclass_without_dispatch_is_a_tensor(backend):
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4).as_subclass(Plain)
    assert fastclip.clip_norm_([p], 1.0).item() == 2
    assert p.grad[0].item() == clipped_ones(2, 1.0)


def test_inference_tensors(backend):
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        p.grad = torch.ones(4)
        assert fastclip.clip_norm_([p], 1.0).item() == 2
        assert p.grad[0].item() == clipped_ones(2, 1.0)


def test_number_like_limits(backend):
    numpys = (np.float32(1), np.float64(1), np.float16(1), np.int64(1))
    for limit in (1, torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(1.0, dtype=torch.float64), *numpys):
        (p,) = ones(4)
        fastclip.clip_norm_([p], limit)
        assert p.grad[0].item() == clipped_ones(2, 1.0)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64], ids=lambda kind: kind.__name__)
def test_numpys_numbers_are_numbers(kind):
    one, two = kind(1), kind(2)
    ps = ones(4, 5)
    fastclip.clip_with_norm_(ps, one, two)
    assert ps[0].grad[0].item() == pytest.approx(0.5, rel=1e-5)
    for rule in (one, rules.GlobalNorm(one, two), rules.TensorNorm(one), rules.Value(one), rules.Value(-one, one),
                 rules.Mask(one, freeze=np.bool_(False)), rules.BlockRMS(one), rules.AGC(one, one), rules.ZClip(two),
                 rules.AdaGC(two, warmup=np.int64(0)), rules.AdaGC(two, warmup=np.int64(3)),
                 rules.AutoClip(one, window=np.int32(9))):  # fmt: skip
        ps = ones(4)
        stats = fastclip.Clipper(ps, rule).step(torch.optim.SGD(ps, lr=0.1), divide_by=two)
        assert stats.total_norm.item() == 1
    for make in (
        lambda p: fastclip.optim.AdamW(p, lr=one, eps=one, weight_decay=one, betas=(kind(0), kind(0)), max_norm=one,
                                       amsgrad=np.bool_(True), maximize=np.bool_(True)),
        lambda p: fastclip.optim.SGD(p, lr=one, momentum=one, weight_decay=one, nesterov=np.bool_(True), max_norm=one,
                                     stochastic_rounding=np.int64(2**62)),
    ):  # fmt: skip
        p = parameter(torch.ones(40, dtype=torch.bfloat16))
        make([p]).step(zero_grad=np.bool_(True))
        assert p.detach().any() and not p.grad.any()


def test_numpys_bool_is_no_number():
    with pytest.raises(TypeError, match="max_norm must be a number, got bool"):
        fastclip.clip_norm_(ones(3), np.bool_(True))
    with pytest.raises(TypeError, match="warmup must be an int, got bool"):
        rules.AdaGC(warmup=np.bool_(False))


@pytest.mark.parametrize("lazy", ["conj", "neg", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128], ids=str)
def test_lazily_conjugated_and_negated_gradients(backend, dtype, lazy):
    """What every function does to a lazy gradient is what it does to the same values in memory."""
    values = torch.tensor([3 + 4j, -6 - 8j, 0.1j, 0], dtype=torch.complex128)
    memory = (values if dtype.is_complex else values.real - values.imag).to(dtype)

    def made():
        g = memory.clone()
        g = g.conj() if lazy != "neg" else g
        return torch._neg_view(g) if lazy != "conj" else g

    calls = [
        lambda ps: fastclip.clip_norm_(ps, 1.0),
        lambda ps: fastclip.clip_value_(ps, 1.0),
        lambda ps: fastclip.clip_tensor_norm_(ps, 1.0),
        lambda ps: fastclip.mask_small_(ps, 100.0),
        lambda ps: fastclip.clip_with_norm_(ps, 1.0, torch.tensor(5.0)),
        lambda ps: fastclip.total_norm(gradients(ps)),
        lambda ps: fastclip.Clipper(ps, [rules.AGC(), rules.Value(0.5)], nonfinite="zero").clip_().total_norm,
        lambda ps: fastclip.Clipper(ps, rules.TensorNorm(1.0), nonfinite="raise").clip_().total_norm,
    ]
    if not dtype.is_complex:
        calls.append(lambda ps: fastclip.Clipper(ps, rules.Value(-0.5, 2.0)).clip_().total_norm)
    for call in calls:
        p, q = parameter(made()), parameter(made().resolve_conj().resolve_neg().clone())
        assert (p.grad.is_conj(), p.grad.is_neg()) == (lazy != "neg" and dtype.is_complex, lazy != "conj")
        a, b = call([p]), call([q])
        torch.testing.assert_close(p.grad.resolve_conj().resolve_neg(), q.grad, rtol=2e-7, atol=0)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-7, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_strided_nested_tensors_are_refused(backend):
    x = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True)
    torch.nested.to_padded_tensor(x * 2, 0.0).sum().backward()
    good = ones(3)[0]
    for call in (
        lambda: fastclip.clip_norm_([good, x], 0.1),
        lambda: fastclip.clip_value_([good, x], 0.1),
        lambda: fastclip.mask_small_([good, x], 9.0),
        lambda: fastclip.Clipper([("good", good), ("x", x)], rules.Only(rules.TensorNorm(0.1), "x")).clip_(),
        lambda: fastclip.Clipper([good, x], rules.AGC()).clip_(),
        lambda: fastclip.optim.AdamW([good, x], max_norm=0.1).step(),
    ):
        with pytest.raises(NotImplementedError, match=r"the gradient of parameters\[1\] is a nested tensor"):
            call()
    with pytest.raises(NotImplementedError, match=r"tensors\[0\] is a nested tensor"):
        fastclip.total_norm([x.grad])
    with pytest.raises(NotImplementedError, match="nested tensor, which is not supported; nothing was changed"):
        fastclip.optim.SGD([good, x], lr=0.1).step()
    assert torch.equal(good.grad, torch.ones(3)) and not good.detach().any()


def test_dtensor_of_one_rank(backend):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        assert fastclip.clip_norm_([p], 1.0) == 2
        torch.testing.assert_close(p.grad.to_local(), torch.full((4,), 0.5), rtol=1e-6, atol=0)
    finally:
        destroy_process_group()


def test_truthy_error_if_nonfinite(backend):
    p = parameter(torch.tensor([1.0, math.nan]))
    with pytest.raises(RuntimeError, match="nothing was changed"):
        fastclip.clip_norm_([p], 1.0, error_if_nonfinite=1)
    assert p.grad[0] == 1


def test_the_same_gradient_seen_differently(backend):
    """Other strides, and a third gradient that takes the general packer: counted once, as without it."""
    g = torch.arange(6.0).view(2, 3)
    z = torch.ones(2, dtype=torch.complex64)
    expected = math.sqrt(55 + 2)
    assert fastclip.total_norm([g, g.t(), z]).item() == pytest.approx(expected)
    a = parameter(g)
    b = torch.nn.Parameter(torch.zeros(3, 2))
    b.grad = g.t()
    assert fastclip.clip_norm_([a, b, parameter(z)], 1.0).item() == pytest.approx(expected)
    assert g[0, 1].item() == clipped_ones(expected, 1.0)


@pytest.mark.parametrize("how", ["leaf", "history", "inference"])
def test_gradients_that_autograd_watches(backend, how):
    p = torch.nn.Parameter(torch.zeros(4))
    if how == "leaf":
        p.grad = torch.ones(4, requires_grad=True)
    elif how == "history":
        p.grad = torch.ones(4, requires_grad=True) * 1.0
    else:
        with torch.inference_mode():
            gradient = torch.ones(4)
        p.grad = gradient
    norm = fastclip.clip_norm_([p], 1.0)
    assert norm.item() == 2 and not norm.requires_grad
    assert p.grad[0].item() == clipped_ones(2, 1.0)
    fastclip.clip_value_([p], 0.25)
    assert p.grad.tolist() == [0.25] * 4
    assert not fastclip.total_norm([torch.nn.Parameter(torch.ones(4))]).requires_grad


def test_sparse_is_left_as_it_was_when_another_gradient_is_refused(backend):
    p, q = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (5,), check_invariants=True)
    q.grad = torch.ones(1).expand(3)
    with pytest.raises(RuntimeError, match="expanded"):
        fastclip.clip_norm_([p, q], 1.0)
    assert not p.grad.is_coalesced() and p.grad._nnz() == 2


def test_arrays_over_one_buffer(backend):
    numpy = pytest.importorskip("numpy")
    buffer = numpy.ones(40, dtype=numpy.float32)
    parameters = [parameter(torch.from_numpy(buffer)), parameter(torch.from_numpy(buffer[10:20]))]
    with pytest.raises(RuntimeError, match="overlap"):
        fastclip.clip_norm_(parameters, 1.0)
    assert (buffer == 1).all()


def test_vmap():
    def norm(x):
        return fastclip.total_norm([x])

    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(norm)(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda p: fastclip.clip_norm_(p, 10**400), ValueError, "max_norm must fit a float64"),
        (lambda p: fastclip.rules.Value(-1), ValueError, "limit must be >= 0, got -1"),
        (lambda p: fastclip.clip_with_norm_(p, 1.0, -5.0), ValueError, "total_norm must be >= 0, got -5.0"),
    ],
)
def test_more_bad_numbers(call, kind, message):
    parameters = ones(3)
    with pytest.raises(kind, match=message):
        call(parameters)
    assert torch.equal(parameters[0].grad, torch.ones(3))


def test_use_backend_in_every_order():
    from fastclip.backends import current, use_backend

    assert current() == "auto"
    with use_backend("reference"):
        assert current() == "reference"
        with use_backend("cpu"):
            assert current() == "cpu"
        assert current() == "reference"
    assert current() == "auto"
    later = use_backend("reference")
    use_backend("auto")
    for _ in range(2):
        with later:
            assert current() == "reference"
        assert current() == "auto"
    with pytest.raises(ValueError, match=r"name must be one of triton, cuda, .* or auto, got 'cuda9'"):
        use_backend("cuda9")
    assert current() == "auto"
