"""Steps inside backward with DistributedDataParallel (DDP): in its communication hook, once a bucket is averaged."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import is_bool
from ..torch_internals import is_dense, is_in_backward

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

LEAVE = "_set_optimizer_in_backward"  # of a Reducer: leaves it to the hook where gradients are after backward

# Takes parameters and their averaged gradients, of one bucket; returns the places of those that it has not taken.
Take = Callable[[list[Tensor], list[Tensor]], list[int]]


def ddp_of(step_in_backward: Any) -> DistributedDataParallel | None:
    """The DDP that was given as this argument, perhaps compiled; None if it is a bool. TypeError if it is neither."""
    if is_bool(step_in_backward):
        return None
    ddp = getattr(step_in_backward, "_orig_mod", step_in_backward)
    if not torch.distributed.is_available() or not isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
        got = type(step_in_backward).__name__
        raise TypeError(f"step_in_backward must be True, False or a DistributedDataParallel, got {got}")
    return ddp


def _check(ddp: DistributedDataParallel) -> None:
    """ValueError for a DDP that steps cannot be taken in."""
    if ddp.find_unused_parameters:
        raise ValueError(
            "step_in_backward: which parameters are used on no rank, and so are not to be stepped, "
            "DistributedDataParallel(find_unused_parameters=True) knows only after backward"
        )
    if ddp.mixed_precision is not None:
        raise ValueError("step_in_backward: DistributedDataParallel(mixed_precision=...) is not supported")
    if any(getattr(module, "sparse", False) is True for module in ddp.module.modules()):
        raise ValueError("step_in_backward: sparse gradients (Embedding(sparse=True)) are not supported")
    if not hasattr(ddp.reducer, LEAVE):
        raise ValueError(
            f"step_in_backward: the DistributedDataParallel of torch {torch.__version__} gives parameters their "
            f"gradients back after backward, which there is no way to prevent"
        )


class DdpBuckets:
    """Averages the gradients of a DDP over the ranks, bucket by bucket, and hands them over.

    Args:
        ddp: one without a communication hook.
        begins: a method, held weakly, that is called as a bucket's averaging begins, in backward, and may raise there.
            What it returns is called with the bucket once it is averaged, for gloo in a thread of its own, on a GPU on
            a stream of its own, which backward's ends by waiting for. Where its object is gone, gradients are averaged
            as if there were no hook.
    """

    def __init__(self, ddp: DistributedDataParallel, begins: Callable[[], Take]) -> None:
        _check(ddp)
        self._ddp = weakref.ref(ddp)  # whose reducer holds this, where the garbage collector does not look
        named = ddp.module.named_parameters()
        averaged = [p for name, p in named if p.requires_grad and name not in ddp.parameters_to_ignore]
        self._averaged = {id(p): p for p in averaged}  # held, so that no others get their ids
        self._begins = weakref.WeakMethod(begins)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> Any:
        return type(None), ()  # the copy of a DDP, which has this in a list, has no hook

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """The DDP's, as long as there is one."""
        ddp = self._ddp()
        return contextlib.nullcontext() if ddp is None else ddp.no_sync()

    def __contains__(self, parameter: Tensor) -> bool:
        """Whether the DDP averages its gradient."""
        return id(parameter) in self._averaged

    def register(self) -> None:
        """Become the one communication hook that the DDP can have, for good. ValueError if it has another."""
        ddp = self._ddp()
        assert ddp is not None
        try:
            ddp.register_comm_hook(self, _hook)
        except RuntimeError as error:
            if "once" not in str(error):
                raise
            raise ValueError(
                "step_in_backward: the DistributedDataParallel has a communication hook already, perhaps of an "
                "optimizer made before, and takes no second one"
            ) from error
        getattr(ddp.reducer, LEAVE)()

    def wait(self) -> None:
        """Let the current streams wait for what was launched for the buckets so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def _average(self, bucket: Any) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        if not hasattr(bucket, "gradients"):
            raise RuntimeError(
                "step_in_backward needs the buckets of DistributedDataParallel, which torch.compile does without where "
                "torch._dynamo.config.optimize_ddp is 'python_reducer'"
            )
        ddp = self._ddp()
        assert ddp is not None
        begins = self._begins() if is_in_backward() else None  # else this rank has joined the others (ddp.join())
        take = None if begins is None else begins()

        def hand_over(future: torch.futures.Future[Tensor]) -> Tensor:
            buffer = future.value()
            parameters = bucket.parameters()
            gradients = [_laid_out(gradient, p) for gradient, p in zip(bucket.gradients(), parameters)]
            with torch.no_grad(), self._one_after_the_other(buffer.device):
                left = range(len(parameters)) if take is None else take(parameters, gradients)
                for i in left:
                    own = parameters[i].grad
                    if own is not None and own.data_ptr() != gradients[i].data_ptr():  # else it is the bucket's memory
                        own.copy_(gradients[i])
            return buffer

        return allreduce_hook(ddp.process_group, bucket).then(hand_over)

    @contextlib.contextmanager
    def _one_after_the_other(self, device: torch.device) -> Iterator[None]:
        """A stream for all buckets, which each come on another one."""
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        came_on, stream = torch.cuda.current_stream(device), self._streams[device]
        stream.wait_stream(came_on)
        with torch.cuda.stream(stream):
            yield
        came_on.wait_stream(stream)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A bucket's gradient as it is in memory: a dense one by the strides of its parameter, whatever its own say."""
    if not is_dense(parameter):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())


def _hook(buckets, bucket):  # type: ignore[no-untyped-def]  # annotations that are strings DDP refuses
    return buckets._average(bucket)
