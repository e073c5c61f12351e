"""Modes in which operations are looked at: a kernel on bare addresses would pass by them."""

from __future__ import annotations

from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _get_dispatch_mode,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)


def is_watched() -> bool:
    """Whether a TorchDispatchMode wants to see every operation: FakeTensorMode, make_fx, FlopCounterMode."""
    return _len_torch_dispatch_stack() > 0 or _before_autograd()


def _before_autograd() -> bool:
    """In make_fx(pre_dispatch=True), which keeps its mode elsewhere, together with one for __torch_function__."""
    return _is_torch_function_mode_enabled() and _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)


def check_not_traced() -> None:
    """NotImplementedError under FakeTensorMode and in make_fx, which do not see what a kernel does to bare addresses:
    real memory would be written, and a graph would hold what was measured now as constants."""
    if not (_len_torch_dispatch_stack() or _is_torch_function_mode_enabled()):
        return
    if _before_autograd() or any(map(_get_dispatch_mode, (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY))):
        raise NotImplementedError(
            "a Clipper and the optimizers of fastclip.optim cannot be traced by make_fx or run under FakeTensorMode; "
            "the functions (fastclip.clip_norm_ and the like) can"
        )
