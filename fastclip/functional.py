"""The functional API: torch.nn.utils' four gradient-clipping functions, and two more of the same kind.

`parameters` may be a tensor, an iterable of tensors (a generator too) or torch.optim's parameter-group dicts; those
without a gradient are passed over. A gradient that appears twice (tied weights) counts, and is scaled, once. Bad input
raises before anything is written. `foreach` is accepted for torch's sake and ignored: there is one implementation.

A call works on the gradients that there are when it begins, also if another thread sets ``p.grad = None`` meanwhile.
Under torch.compile, make_fx, FakeTensorMode and other modes that look at every operation, a call is one operation of
:mod:`fastclip.torch_ops`: what it returns is no constant in a graph, and fake tensors stay fake. In a child of
``os.fork()`` gradients on the CPU are clipped by one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import backends, torch_ops
from .arguments import checked_limit, checked_norm, nonnegative, number, one_number
from .distributed import declare
from .distributed.declare import MARKED
from .distributed.groups import checked_group
from .distributed.unwrap import any_dtensor
from .gradients.pack import check_not_gradients, flatten_params, from_native, pack
from .modes import is_watched
from .pipeline.decide import clip, clip_by_norm, refuse_nonfinite
from .rules import GlobalNorm, Mask, TensorNorm, Value

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .gradients.table import GradTable

Parameters = Tensor | Iterable[Tensor] | Iterable[dict[str, Any]]


def clip_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Scale the gradients of `parameters` in place so that their common norm is at most `max_norm`.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{N + 10^{-6}}\right),\quad N = \|(g_1, g_2, \dots)\|_p

    Follows ``torch.nn.utils.clip_grad_norm_``, with the norm accumulated so that no dtype or size loses it, and without
    writing anything when nothing is to be clipped.

    Args:
        parameters: whose ``.grad`` is clipped; float32, float64, bfloat16, float16 or complex, on any devices.
        max_norm: the limit, >= 0, in the gradients' unit; ``inf`` only measures. A tensor of one element is a number
            too. On a GPU it is not checked, since that would wait for the device: a negative number there counts as 0,
            and NaN makes all gradients NaN.
        norm_type: p: 2, 1, ``inf`` (or ``"inf"``), 0 (the number of tensors that are not all zero), any other p > 0.
        error_if_nonfinite: raise instead of clipping by a norm that is inf or NaN. Reads the norm back to the host.
        foreach: ignored.
        process_group: of ranks that hold other parameters of the same model, as pipeline stages do: the norm is that of
            all of them, and all of them must call. DTensors need no group: their placements tell where they are.

    Returns:
        The norm before clipping: [] float32 (float64 if a gradient is), on the first gradient's device.

    Raises:
        ValueError: `max_norm` or `norm_type` is negative or NaN.
        TypeError: an argument is of another kind; a gradient is integer; plain tensors without ``.grad`` were passed.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set; a gradient is an expanded view; two
            gradients overlap; with DTensors or a `process_group`, another rank raised, or the ranks disagree.
        NotImplementedError: a gradient is a wrapper subclass other than DTensor.
    """
    if is_dynamo_compiling():
        items = flatten_params(parameters)
        if _leaves_the_graph(items, process_group):
            return cast(
                Tensor, _in_python(clip_norm_, items, max_norm, norm_type, error_if_nonfinite, group=process_group)
            )
        return _global_norm_in_graph(items, "parameters", max_norm, norm_type, error_if_nonfinite)
    return _global_norm(parameters, True, max_norm, norm_type, error_if_nonfinite, process_group)


def total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""The p-norm of `tensors` (gradients, not parameters) as one vector.

    .. math:: N = \Big(\sum_t \sum_i |x_{t,i}|^p\Big)^{1/p}

    Follows ``torch.nn.utils.get_total_norm``. Args, returns and raises as :func:`clip_norm_`.
    """
    if is_dynamo_compiling():
        items = flatten_params(tensors, "tensors")
        if _leaves_the_graph(items, process_group):
            return cast(Tensor, _in_python(total_norm, items, norm_type, error_if_nonfinite, group=process_group))
        return _global_norm_in_graph(items, "tensors", None, norm_type, error_if_nonfinite)
    return _global_norm(tensors, False, None, norm_type, error_if_nonfinite, process_group)


def clip_with_norm_(parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
    r"""Scale the gradients of `parameters` in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    Follows ``torch.nn.utils.clip_grads_with_norm_``: for a norm measured elsewhere, over more parameters, say.

    Args:
        parameters: whose ``.grad`` is scaled.
        max_norm: the limit, as :func:`clip_norm_`'s.
        total_norm: one number >= 0, a tensor on any device or a float. NaN makes all gradients NaN.
        foreach: ignored.

    Raises as :func:`clip_norm_`; TypeError too where gradients were passed instead of parameters.
    """
    items = flatten_params(parameters)
    if _leaves_the_graph(items):
        _in_python(clip_with_norm_, items, max_norm, total_norm)
        return
    if _in_a_graph(items):
        bound, norm = _in_graph(max_norm, "max_norm"), _in_graph(total_norm, "total_norm")
        if grads := _gradients(items):
            torch_ops.clip_with_norm_(grads, bound, norm)
        return
    limit, norm = checked_limit(max_norm, "max_norm"), checked_norm(total_norm)
    clip_by_norm(pack(items, gradients=False, write=True), norm, limit)


def clip_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Limit every element of the gradients of `parameters` to [-clip_value, clip_value], in place.

    Follows ``torch.nn.utils.clip_grad_value_``; complex elements are limited by magnitude, and NaN stays NaN.

    Args:
        parameters: whose ``.grad`` is clipped.
        clip_value: the limit, >= 0, in the gradients' unit.
        foreach: ignored.

    Raises as :func:`clip_norm_`.
    """
    items = flatten_params(parameters)
    if _leaves_the_graph(items):
        _in_python(clip_value_, items, clip_value)
        return
    if _in_a_graph(items):
        limit = _in_graph(clip_value, "clip_value")
        if grads := _gradients(items):
            torch_ops.clip_value_(grads, limit)
        return
    rule = Value(nonnegative(clip_value, "clip_value"))
    pack(items, gradients=False, write=True).clamp_(rule.low, rule.high)


def clip_tensor_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    process_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Scale each gradient of `parameters` in place, on its own, so that its norm is at most `max_norm`.

    .. math:: g_t \leftarrow g_t \cdot \min\left(1, \frac{max\_norm}{\|g_t\|_p + 10^{-6}}\right)

    DINO's ``clip_gradients``; Keras' ``clipnorm`` but for the 1e-6.

    Args and Raises: as :func:`clip_norm_`.

    Returns:
        [T] the norms before clipping, in the order of the parameters that have a gradient.
    """
    items = flatten_params(parameters)
    if _leaves_the_graph(items, process_group):
        return cast(Tensor, _in_python(clip_tensor_norm_, items, max_norm, norm_type, group=process_group))
    if process_group is None and not MARKED and _in_a_graph(items):
        limit, p = _in_graph(max_norm, "max_norm"), _order(norm_type)
        grads = _gradients(items)
        return torch_ops.clip_tensor_norm_(grads, limit, p) if grads else _nothing(items, 0)
    rule = TensorNorm(max_norm, norm_type)
    table = _pack_parameters(items, process_group)
    return table.at_home(clip(table, [rule], rule.norm_type).tensor_norms)


def mask_small_(
    parameters: Parameters, threshold: float, *, process_group: ProcessGroup | DeviceMesh | None = None
) -> Tensor:
    """Zero, in place, the gradients of `parameters` whose largest magnitude is below `threshold`.

    A gradient that holds a NaN is left alone.

    Args:
        parameters: whose ``.grad`` is masked.
        threshold: in the gradients' unit, >= 0.
        process_group: as :func:`clip_norm_`'s.

    Returns:
        [T] bool, True where a gradient was zeroed, in the order of the parameters that have a gradient.

    Raises as :func:`clip_norm_`.
    """
    items = flatten_params(parameters)
    if _leaves_the_graph(items, process_group):
        return cast(Tensor, _in_python(mask_small_, items, threshold, group=process_group))
    if process_group is None and not MARKED and _in_a_graph(items):
        limit = _in_graph(threshold, "threshold")
        grads = _gradients(items)
        return torch_ops.mask_small_(grads, limit) if grads else _nothing(items, 0).bool()
    rule = Mask(threshold)
    table = _pack_parameters(items, process_group)
    return table.at_home(clip(table, [rule], math.inf).coef.expand(len(table)) == 0)


def _pack_parameters(items: list[Tensor], process_group: ProcessGroup | DeviceMesh | None) -> GradTable:
    if process_group is not None:
        checked_group(process_group, "process_group")
    return pack(items, gradients=False, write=True, process_group=process_group, reduces=True)


_ARGUMENT = {True: "parameters", False: "tensors"}


def _global_norm(
    tensors: Parameters,
    clips: bool,
    max_norm: float | None,
    norm_type: float,
    error_if_nonfinite: bool,
    process_group: ProcessGroup | DeviceMesh | None,
) -> Tensor:
    packed: list[backends.NativeGroup] | None = None
    alone = process_group is None and not MARKED
    items = tensors if type(tensors) is list else flatten_params(tensors, _ARGUMENT[clips], stacklevel=4)
    if alone and (fused := backends.choose_fused()) is not None:
        done = fused.clip_norm_fused(items, clips, max_norm, norm_type, error_if_nonfinite, False)
        if isinstance(done, Tensor):
            return done
        packed = done
    argument = _ARGUMENT[clips]
    if not packed and not (type(items) is list and any_dtensor(items[:1])):  # thousands of which take their time
        items = flatten_params(items, argument)
        if alone and _in_a_graph(items):
            return _global_norm_in_graph(items, argument, max_norm, norm_type, error_if_nonfinite)
    if process_group is not None:
        checked_group(process_group, "process_group")
    rule = GlobalNorm(checked_limit(max_norm, "max_norm") if clips else math.inf, norm_type)
    if packed:
        table = from_native(packed)
    else:
        table = pack(
            items,
            gradients=not clips,
            write=clips,
            argument=argument,
            process_group=process_group,
            reduces=True,
        )
    stats = clip(table, [rule], rule.norm_type, refuse_nonfinite if error_if_nonfinite else None)
    return table.at_home(stats.take_total_norm())


def _global_norm_in_graph(
    items: list[Tensor],
    argument: str,
    max_norm: float | None,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Tensor:
    p, refuse = _order(norm_type), bool(error_if_nonfinite)
    if argument == "tensors":
        _check_tensors(items, argument)
        return torch_ops.total_norm([t.detach() for t in items], p, refuse) if items else _nothing([], ())
    limit, grads = _in_graph(max_norm, "max_norm"), _gradients(items)
    return torch_ops.clip_norm_(grads, limit, p, refuse) if grads else _nothing(items, ())


def _leaves_the_graph(items: list[Tensor], process_group: ProcessGroup | DeviceMesh | None = None) -> bool:
    """Whether torch.compile must leave the call to Python: where there are several ranks, it is a graph break."""
    if not is_dynamo_compiling():
        return False
    return process_group is not None or declare.ever_marked or any(type(t).__name__ == "DTensor" for t in items)


def _in_python(function: Callable[..., Any], *arguments: Any, group: ProcessGroup | DeviceMesh | None = None) -> Any:
    from . import graph_breaks

    options = {} if group is None else {"process_group": group}
    return graph_breaks.call(function, *arguments, **options)


def _in_a_graph(items: list[Tensor]) -> bool:
    """Whether operations are looked at (torch.compile, make_fx, FakeTensorMode and any other TorchDispatchMode), which
    a kernel on bare addresses would pass by: in a graph its result would be a constant. DTensors, of which an operation
    would know too little, are clipped as ever under modes that only look."""
    if is_dynamo_compiling():
        return True
    return is_watched() and not any_dtensor(items)  # where export compiles without Dynamo, a mode is watching


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """For a graph: the gradients, each once."""
    _check_tensors(parameters, "parameters")
    distinct = dict.fromkeys(p.grad for p in parameters if p.grad is not None)
    grads = [g.detach() if g.requires_grad else g for g in distinct]  # a view too many hides what shares memory
    if not grads:
        check_not_gradients(parameters, "parameters")
    return grads


def _check_tensors(items: list[Any], argument: str) -> None:
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise TypeError(f"{argument}[{i}] must be a tensor, got {type(item).__name__} {item!r}")


def _in_graph(value: Any, argument: str) -> Tensor:
    """For a graph: a limit as a tensor of shape [], whose value is checked when the graph runs.

    A number that changes from call to call has no value here. Multiplied by a tensor, torch.compile makes it an input
    of the graph; anything else would compile its value in.
    """
    if isinstance(value, Tensor):
        return one_number(value, argument)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = number(value, argument)
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def _order(norm_type: Any) -> float:
    """For a graph: the norm type, checked when the graph runs."""
    if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)):
        return nonnegative(norm_type, "norm_type")
    return norm_type * 1.0


def _nothing(parameters: list[Tensor], shape: Any) -> Tensor:
    return torch.zeros(shape, device=parameters[0].device if parameters else "cpu")


clip_grad_norm_ = clip_norm_
clip_grad_value_ = clip_value_
get_total_norm = total_norm
clip_grads_with_norm_ = clip_with_norm_

__all__ = [
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_norm_",
    "clip_tensor_norm_",
    "clip_value_",
    "clip_with_norm_",
    "get_total_norm",
    "mask_small_",
    "total_norm",
]
