"""Steps inside backward with DistributedDataParallel (DDP): in its communication hook, once a bucket is averaged."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

LEAVE = "_set_optimizer_in_backward"  # of a Reducer: leaves it to the hook where gradients are after backward

# Parameters and their averaged gradients, of one bucket; returns those that it has not taken.
Take = Callable[[list[Tensor], list[Tensor]], list[int]]


def is_ddp(value: Any) -> TypeGuard[DistributedDataParallel]:
    """Whether it is a DistributedDataParallel."""
    return torch.distributed.is_available() and isinstance(value, torch.nn.parallel.DistributedDataParallel)


def averaged_parameters(ddp: DistributedDataParallel) -> list[Tensor]:
    """Those whose gradients its hook is called with."""
    named = ddp.module.named_parameters()
    return [p for name, p in named if p.requires_grad and name not in ddp.parameters_to_ignore]


def check_ddp(ddp: DistributedDataParallel) -> None:
    """ValueError for a DDP that steps cannot be taken in."""
    if ddp.find_unused_parameters:
        raise ValueError(
            "step_in_backward: which parameters are used on no rank, and so are not to be stepped, "
            "DistributedDataParallel(find_unused_parameters=True) knows only after backward"
        )
    if ddp.mixed_precision is not None:
        raise ValueError("step_in_backward: DistributedDataParallel(mixed_precision=...) is not supported")
    if not hasattr(ddp.reducer, LEAVE):
        raise ValueError(
            f"step_in_backward: the DistributedDataParallel of torch {torch.__version__} gives parameters their "
            f"gradients back after backward, which there is no way to prevent"
        )


class DdpSteps:
    """Averages the gradients of a DDP over the ranks, bucket by bucket, and hands them over.

    Args:
        ddp: without a communication hook; it has one for good then.
        take: a method, held weakly: where its object is gone, gradients are averaged as if there were no hook. It may
            be called in a thread of the backend (gloo's), but by one at a time.
    """

    def __init__(self, ddp: DistributedDataParallel, take: Take) -> None:
        check_ddp(ddp)
        assert isinstance(take, types.MethodType)
        self._take = weakref.WeakMethod(take)
        self._group = ddp.process_group
        self._lock = threading.Lock()
        try:
            ddp.register_comm_hook(self, lambda steps, bucket: steps._averaged(bucket))
        except RuntimeError as error:
            raise ValueError(
                "step_in_backward: the DistributedDataParallel has a communication hook already, perhaps of an "
                "optimizer made before, and takes no second one"
            ) from error
        getattr(ddp.reducer, LEAVE)()

    def _averaged(self, bucket: Any) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hand_over(future: torch.futures.Future[Tensor]) -> Tensor:
            buffer = future.value()
            with self._lock, torch.no_grad():
                self._hand_over(bucket.parameters(), bucket.gradients())
            return buffer

        return allreduce_hook(self._group, bucket).then(hand_over)

    def _hand_over(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        take = self._take()
        left = range(len(parameters)) if take is None else take(parameters, gradients)
        for i in left:
            own, gradient = parameters[i].grad, gradients[i]
            if own is not None and own.data_ptr() != gradient.data_ptr():  # else it is the bucket's own memory
                own.copy_(gradient)
