"""What fastclip asks torch that torch does not promise to answer for ever, and what is done where it does not.

tests/test_torch_internals.py names everything of that kind in the package, and takes each of these away.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def found(path: str) -> Any | None:
    """The object at a dotted path below torch; None where this torch has none."""
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        return None


dispatch_keys = found("_C._dispatch_keys")
dispatch_key = found("_C.DispatchKey")
functorch_wrapped = found("_C._functorch.is_functorch_wrapped_tensor")
internal_overlap = found("_debug_has_internal_overlap")
dense = found("ops.aten.is_non_overlapping_and_dense.default")
modes_on_stack = found("_C._len_torch_dispatch_stack")
function_mode = found("_C._is_torch_function_mode_enabled")
functions_disabled = found("_C.DisableTorchFunction")
key_included = found("_C._dispatch_tls_is_dispatch_key_included")
mode_of = found("_C._get_dispatch_mode")
mode_key = found("_C._TorchDispatchModeKey")
modes_disabled = found("utils._python_dispatch._disable_current_modes")
graph_task = found("_C._current_graph_task_id")


def is_wrapper(tensor: Tensor) -> bool:
    """Whether operations on `tensor` go to a Python class, which keeps the memory elsewhere. Else: by its type."""
    if dispatch_keys is None or dispatch_key is None:
        return type(tensor) not in (Tensor, Parameter)
    return bool(dispatch_keys(tensor).has(dispatch_key.Python))


def is_in_transform(tensor: Tensor) -> bool:
    """Whether it is one of torch.func's, of vmap or grad. Else: no, and asking for its memory raises."""
    return functorch_wrapped is not None and bool(functorch_wrapped(tensor))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each once, in whatever order. Else: by sizes and strides."""
    if dense is not None:
        return bool(dense(tensor))
    expected = 1
    for stride, size in sorted((t, s) for t, s in zip(tensor.stride(), tensor.shape) if s != 1):
        if stride != expected and tensor.numel():
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several of its elements share memory, as in an expanded view. Else: whether a stride is 0."""
    if internal_overlap is not None:
        return bool(internal_overlap(tensor) == 1)
    return tensor.numel() > 0 and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that no other storage has at the same time. Else: its address, or what stands for it."""
    return getattr(storage, "_cdata", None) or storage.data_ptr()


def any_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode is active. Else: no."""
    return modes_on_stack is not None and modes_on_stack() > 0


def any_function_mode() -> bool:
    """Whether a TorchFunctionMode is active. Else: no."""
    return function_mode is not None and bool(function_mode())


def no_functions() -> contextlib.AbstractContextManager[Any]:
    """Within it neither a TorchFunctionMode nor a subclass sees what is asked of tensors. Else: they do."""
    return contextlib.nullcontext() if functions_disabled is None else functions_disabled()


def no_modes() -> contextlib.AbstractContextManager[Any]:
    """Within it no TorchDispatchMode is active. Else: those that are stay."""
    return contextlib.nullcontext() if modes_disabled is None else modes_disabled()


def traces_before_autograd() -> bool:
    """Whether make_fx(pre_dispatch=True) is tracing, which keeps its mode elsewhere, together with one for
    __torch_function__. Else: no."""
    if function_mode is None or key_included is None or dispatch_key is None or not function_mode():
        return False
    return bool(key_included(dispatch_key.PreDispatch))


def fakes_or_traces() -> bool:
    """Whether FakeTensorMode is active, or make_fx tracing. Else: if any mode is."""
    if mode_of is None or mode_key is None:
        return any_dispatch_mode()
    return any(map(mode_of, (mode_key.FAKE, mode_key.PROXY)))


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass. Else: yes."""
    return graph_task is None or graph_task() != -1
