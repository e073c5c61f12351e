"""Modes in which operations are looked at: a kernel on bare addresses would pass by them."""

from __future__ import annotations

from .torch_internals import any_dispatch_mode, fakes_or_traces, traces_before_autograd


def is_watched() -> bool:
    """Whether a TorchDispatchMode wants to see every operation: FakeTensorMode, make_fx, FlopCounterMode."""
    return any_dispatch_mode() or traces_before_autograd()


def check_not_traced() -> None:
    """NotImplementedError under FakeTensorMode and in make_fx, which do not see what a kernel does to bare addresses:
    real memory would be written, and a graph would hold what was measured now as constants."""
    if not is_watched():
        return
    if traces_before_autograd() or fakes_or_traces():
        raise NotImplementedError(
            "a Clipper and the optimizers of fastclip.optim cannot be traced by make_fx or run under FakeTensorMode; "
            "the functions (fastclip.clip_norm_ and the like) can"
        )
