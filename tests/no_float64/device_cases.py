"""The device itself: what it refuses, and that all else works as on a CPU. Run by tests/test_no_float64.py."""

import copy
import io

import pytest
import torch
from torch.testing import assert_close

import no_float64
from no_float64.twins import DEVICE

REFUSED = "doesn't support float64. Please use float32 instead"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def on_device(*shape):
    host = torch.randn(shape)
    return host, host.to(DEVICE)


# ---- what it has not ----

WIDE = {
    "empty": lambda x: torch.empty(3, dtype=torch.float64, device=DEVICE),
    "empty_strided": lambda x: torch.empty_strided((3,), (2,), dtype=torch.float64, device=DEVICE),
    "zeros": lambda x: torch.zeros((), dtype=torch.float64, device=DEVICE),
    "full": lambda x: torch.full((), 1.0, dtype=torch.float64, device=DEVICE),
    "tensor": lambda x: torch.tensor([1.0], dtype=torch.float64, device=DEVICE),
    "as_tensor": lambda x: torch.as_tensor([1.0], dtype=torch.float64, device=DEVICE),
    "arange": lambda x: torch.arange(3, dtype=torch.float64, device=DEVICE),
    "linspace": lambda x: torch.linspace(0, 1, 3, dtype=torch.float64, device=DEVICE),
    "randn": lambda x: torch.randn(3, dtype=torch.float64, device=DEVICE),
    "complex128": lambda x: torch.zeros(3, dtype=torch.complex128, device=DEVICE),
    "double": lambda x: x.double(),
    "type": lambda x: x.type(torch.float64),
    "to": lambda x: x.to(torch.float64),
    "to the device": lambda x: torch.zeros(3, dtype=torch.float64).to(DEVICE),
    "to the device, waiting for nothing": lambda x: torch.zeros(3, dtype=torch.float64).to(DEVICE, non_blocking=True),
    "to the CPU and back": lambda x: x.cpu().double().to(DEVICE),
    "to the CPU": lambda x: x.to("cpu", torch.float64),
    "to like one of the CPU": lambda x: x.to(torch.zeros((), dtype=torch.float64)),
    "copy_": lambda x: torch.zeros(4, dtype=torch.float64).copy_(x),
    "to complex": lambda x: x.to(torch.complex128),
    "new_zeros": lambda x: x.new_zeros(3, dtype=torch.float64),
    "new_tensor": lambda x: x.new_tensor([1.0], dtype=torch.float64),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.float64),
    "sum": lambda x: x.sum(dtype=torch.float64),
    "mean": lambda x: x.mean(dtype=torch.float64),
    "cumsum": lambda x: x.cumsum(0, dtype=torch.float64),
    "prod": lambda x: x.prod(dtype=torch.float64),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dtype=torch.float64),
    "foreach_norm": lambda x: torch._foreach_norm([x], 2, torch.float64),
    "view": lambda x: x.view(torch.float64).clone(),
    "promotion": lambda x: x + torch.zeros(4, dtype=torch.float64).to(DEVICE),
    "module": lambda x: torch.nn.Linear(2, 2).double().to(DEVICE),
}


@pytest.mark.parametrize("way", WIDE)
def test_float64_is_refused(way):
    with pytest.raises(TypeError, match=REFUSED):
        WIDE[way](torch.ones(4, device=DEVICE))


def test_a_double_of_the_host_in_an_operation_stays_float32():
    x = torch.ones(4, device=DEVICE)
    assert (x * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
    assert (x * 2.0).dtype == (torch.tensor(2.0, dtype=torch.float64) * x).dtype == torch.float32
    assert (torch.tensor(2.0, dtype=torch.float64) * x).device == DEVICE


def test_tensors_of_the_host_are_refused_unless_they_are_numbers_or_indices():
    x = torch.ones(4, device=DEVICE)
    operations = [
        lambda: x + torch.ones(4),
        lambda: torch.maximum(torch.ones(4), x),
        lambda: x.mul_(torch.ones(4)),
        lambda: torch.ones(4).mul_(x),
        lambda: torch.zeros(()).add_(x.sum()),
        lambda: torch.cat([x, torch.ones(4)]),
        lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda: torch.where(x > 0, x, torch.ones(4)),
        lambda: x.index_copy_(0, torch.tensor([1]), torch.ones(1, device=DEVICE)),
    ]
    for operation in operations:
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    assert x[torch.tensor([0, 2])].device == DEVICE
    assert_close(torch.where(x > 0, x, torch.tensor(2.0)).cpu(), torch.ones(4))


# ---- addresses ----


def test_an_address_is_no_address():
    a, b = torch.zeros(100, device=DEVICE), torch.ones(100, device=DEVICE)
    assert a.data_ptr() != b.data_ptr() and abs(a.data_ptr() - b.data_ptr()) < a.nbytes
    assert a[10:].data_ptr() == a.data_ptr() + 40 and a[10:].storage_offset() == 10
    assert a.view(10, 10)[3, ::2].data_ptr() == a.data_ptr() + 120
    assert a.data_ptr() == a.untyped_storage().data_ptr()
    reached = a[(b.data_ptr() - a.data_ptr()) // 4 :] if b.data_ptr() > a.data_ptr() else None
    if reached is not None:
        assert reached.data_ptr() == b.data_ptr()  # of two tensors that have nothing in common


def test_an_address_is_given_anew():
    a = torch.zeros(100, device=DEVICE)
    address = a.data_ptr()
    del a
    assert torch.zeros(7, device=DEVICE).data_ptr() == address


def test_storages_tell_who_shares_memory():
    a, b = torch.zeros(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    for view in (a[2:], a.view(2, 3), a.view(2, 3).t(), a.detach(), a.as_strided((2,), (3,)), a.unfold(0, 2, 2)):
        assert view.untyped_storage()._cdata == a.untyped_storage()._cdata
        assert view._is_view() or view.data_ptr() == a.data_ptr()
    assert a.untyped_storage()._cdata != b.untyped_storage()._cdata
    assert a.untyped_storage().nbytes() == 24 and a.device == DEVICE == a.untyped_storage().device


def test_no_elements_have_no_address():
    empty = torch.zeros(0, device=DEVICE)
    assert empty.data_ptr() == 0 and empty.sum().item() == 0 and torch.cat([empty, empty]).shape == (0,)


# ---- values ----


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_copies_and_conversions(source, target):
    host = torch.tensor([[0, 1, 2], [3, 200, 5]]).to(source)
    theirs = host.to(DEVICE)
    assert_close(theirs.to(target).cpu(), host.to(target))
    assert_close(torch.empty(2, 3, dtype=target).copy_(theirs), host.to(target))
    assert_close(torch.empty(3, 2, dtype=target, device=DEVICE).t().copy_(host).cpu(), host.to(target))
    assert_close(torch.empty(3, 2, dtype=target, device=DEVICE).t().copy_(theirs).cpu(), host.to(target))
    assert_close(theirs.t()[::2].cpu(), host.t()[::2])


def test_what_was_never_written_is_not_zero():
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.empty_strided((3,), (2,), device=DEVICE).isnan().all()


def test_a_copy_to_the_host_that_was_not_waited_for_is_not_there():
    host, x = on_device(5)
    copied = x.to("cpu", non_blocking=True)
    x.zero_()
    assert copied.isnan().all()
    torch.mpslike.synchronize()
    assert_close(copied, host)


def test_the_source_of_a_copy_that_was_not_waited_for_must_stay():
    host = torch.ones(5)
    copied = host.to(DEVICE, non_blocking=True)
    host.zero_()
    with pytest.raises(RuntimeError, match="changed before the copy was made"):
        copied.cpu()


OPERATIONS = {
    "add_": lambda x: x.add_(x, alpha=2),
    "a slice": lambda x: x[1:, ::2].mul_(3),
    "a column": lambda x: x[:, 1].zero_(),
    "setitem": lambda x: x.__setitem__((slice(None), 2), 5.0),
    "transposed": lambda x: x.t().add_(x.t().contiguous()),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, -1),
    "a mask": lambda x: x.__setitem__(x < 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index_put_": lambda x: x.index_put_((torch.tensor([0, 2], device=x.device),), torch.tensor(3.0, device=x.device)),
    "index": lambda x: x[torch.tensor([2, 0], device=x.device), 1:],
    "index_copy_": lambda x: x.index_copy_(0, torch.tensor([1], device=x.device), x[:1].clone()),
    "index_add_": lambda x: x.index_add_(1, torch.tensor([1, 1], device=x.device), x[:, :2].clone()),
    "scatter_": lambda x: x.scatter_(0, torch.zeros(1, 5, dtype=torch.int64, device=x.device), 2.0),
    "clamp_": lambda x: x.clamp_(-0.5, 0.5),
    "copysign_": lambda x: x.copysign_(torch.tensor(-1.0)),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "out=": lambda x: torch.mul(x, 2, out=torch.empty(0, device=x.device)),
    "out= a view": lambda x: torch.add(x[0], 1, out=x[1]),
    "max": lambda x: torch.stack(list(x.max(1)[:1])),
    "sort": lambda x: x.sort(1).indices,
    "nonzero": lambda x: (x > 0).nonzero(),
    "quantile": lambda x: x.quantile(0.3),
    "kthvalue": lambda x: x.flatten().kthvalue(3).values,
    "frexp": lambda x: torch.frexp(x).exponent,
    "cumsum": lambda x: x.cumsum(1),
    "linalg": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "addcmul_": lambda x: x.addcmul_(x, x, value=0.1),
    "foreach_mul_": lambda x: torch._foreach_mul_([x, x[0].clone()], 2.0),
    "foreach_mul_ of a tensor": lambda x: torch._foreach_mul_([x], torch.tensor(2.0, device=x.device)),
    "foreach_addcdiv_": lambda x: torch._foreach_addcdiv_([x], [x.clone()], [x.abs() + 1], [0.5]),
    "foreach_norm": lambda x: torch.stack(torch._foreach_norm([x, x[0]])),
    "unbind": lambda x: x.unbind()[1].neg_(),
    "split": lambda x: x.split(2, 1)[1].fill_(4),
    "chunk": lambda x: [piece.mul_(2) for piece in x.chunk(2, 1)],
    "unfold": lambda x: x.unfold(1, 2, 3).add_(1),
    "expand": lambda x: x[0].expand(3, 5).sum(0),
    "diagonal": lambda x: x[:, :3].diagonal().zero_(),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.flatten()[:14].clone().view(7, 2)).conj() * 2j),
    "complex in place": lambda x: torch.view_as_complex(x.flatten()[:14].clone().view(7, 2)).mul_(2j).real,
    "imaginary parts": lambda x: torch.complex(x, x + 1).imag.neg_(),
    "resize_": lambda x: x.flatten().clone().resize_(3),
    "larger": lambda x: x.flatten().clone().resize_(30)[:15],
    "cat": lambda x: torch.cat([x, x[:1]]),
    "matmul": lambda x: x @ x.t(),
    "bfloat16": lambda x: x.bfloat16().mul_(1.7).float(),
    "any": lambda x: (x > 3).any(),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "argsort": lambda x: x.flatten().argsort(),
    "logical": lambda x: ~(x > 0) | (x < -1),
    "nan_to_num_": lambda x: x.div_(0).nan_to_num_(1, 2, 3),
}


def _back(result):
    return (
        [_back(r) for r in result] if isinstance(result, (list, tuple)) else result.cpu() if result is not None else 0
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_what_they_do_on_a_cpu(name):
    torch.manual_seed(3)
    host = torch.randn(3, 5)
    device = host.to(DEVICE)
    expected, actual = OPERATIONS[name](host), OPERATIONS[name](device)
    assert_close(device.cpu(), host)
    assert_close(_back(actual), _back(expected))
    if isinstance(actual, torch.Tensor):
        assert actual.device == DEVICE and (actual.untyped_storage()._cdata == device.untyped_storage()._cdata) == (
            expected.untyped_storage()._cdata == host.untyped_storage()._cdata
        )


def test_set_and_storages():
    host, x = on_device(6)
    y = torch.empty(0, device=DEVICE).set_(x.untyped_storage())
    assert y.numel() == 24 // 4 and y.data_ptr() == x.data_ptr()
    z = torch.empty(0, device=DEVICE).set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    assert_close(z.cpu(), host[2:].view(2, 2))
    assert torch.empty(0, device=DEVICE).set_(z).data_ptr() == z.data_ptr()
    assert x.set_().numel() == 0
    x = host.to(DEVICE)
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0 and x.numel() == 6 and x.data_ptr() == 0
    assert host.to(DEVICE).is_set_to(y) is False


def test_pinning_saving_and_copying():
    host, x = on_device(3, 4)
    assert_close(host.pin_memory().to(DEVICE, non_blocking=True).cpu(), host)
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert_close(torch.load(file, map_location="cpu")["x"], host)
    assert_close(copy.deepcopy(x).cpu(), host)


def test_the_host_counts_its_waits():
    _, x = on_device(3)
    before = no_float64.sync_count()
    y = (x * 2).add_(1).sum()
    torch.where(y > 0, y, x.max())
    assert no_float64.sync_count() == before
    y.item()
    y.cpu()
    bool(y > 0)
    x.tolist()
    x[x > 0]
    assert no_float64.sync_count() == before + 5


# ---- training ----


def _net():
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(0.0), torch.nn.Linear(8, 4))


def _backward(net, device):
    tokens = torch.arange(6, device=device) % 10
    loss = torch.nn.functional.cross_entropy(net(tokens), torch.arange(6, device=device) % 4)
    loss.backward()
    return loss


def test_backward():
    host, device = _net(), _net().to(DEVICE)
    assert_close(_backward(device, DEVICE).cpu(), _backward(host, "cpu"))
    for ours, theirs in zip(device.parameters(), host.parameters()):
        assert ours.grad.device == DEVICE
        assert_close(ours.grad.cpu(), theirs.grad)


def test_backward_from_the_host_to_the_device_and_back():
    x = torch.randn(4, requires_grad=True)
    x.to(DEVICE).square().sum().cpu().backward()
    assert_close(x.grad, 2 * x.detach())


OPTIMIZERS = {
    "SGD": lambda ps, **kw: torch.optim.SGD(ps, 0.1, momentum=0.9, **kw),
    "AdamW": lambda ps, **kw: torch.optim.AdamW(ps, 0.01, **kw),
    "Adagrad": lambda ps, **kw: torch.optim.Adagrad(ps, 0.01, **{k: v for k, v in kw.items() if k != "fused"}),
}


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, options):
    nets = [_net(), _net().to(DEVICE)]
    for net, device in zip(nets, ("cpu", DEVICE)):
        optimizer = OPTIMIZERS[name](net.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            _backward(net, device)
            optimizer.step()
    for theirs, ours in zip(nets[0].parameters(), nets[1].parameters()):
        assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_fused_optimizers_take_no_scale_as_on_mps():
    """Adam and AdamW pass over what a GradScaler gives them; SGD refuses it."""
    for kind in ("Adam", "AdamW", "SGD"):
        nets = [_net().to(DEVICE) for _ in range(2)]
        for net, scale in zip(nets, (None, torch.tensor(100.0, device=DEVICE))):
            optimizer = getattr(torch.optim, kind)(net.parameters(), 0.1, fused=True)
            _backward(net, DEVICE)
            optimizer.grad_scale, optimizer.found_inf = scale, None if scale is None else torch.ones((), device=DEVICE)
            if kind == "SGD" and scale is not None:
                with pytest.raises(RuntimeError, match="grad_scale and found_inf are not supported"):
                    optimizer.step()
            else:
                optimizer.step()
        if kind != "SGD":
            assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_torchs_own_clipping():
    for foreach in (None, False, True):
        net = _net().to(DEVICE)
        _backward(net, DEVICE)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, foreach=foreach)
        assert norm.device == DEVICE and norm.dtype == torch.float32
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.01, foreach=foreach)


def test_a_grad_scaler():
    net = _net().to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    loss = torch.nn.functional.cross_entropy(net(torch.arange(4, device=DEVICE)), torch.arange(4, device=DEVICE))
    scaler.scale(loss).backward()
    assert scaler._scale.device == DEVICE and scaler.get_scale() == 8
