"""SGD with the clip inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.base import SGDOptions, StepBackend, StepDecision, StepTable
from .base import ClippingOptimizer
from .in_backward import BUCKET_BYTES
from .step_inputs import StepInputs, rate_for_torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel


class SGD(ClippingOptimizer):
    r"""``torch.optim.SGD``, with the clip inside.

    .. math::
        g \leftarrow c\,g + \lambda p,\quad b \leftarrow \mu b + (1-\tau) g,\quad
        p \leftarrow p - lr\,(g + \mu b \text{ with Nesterov momentum, else } b)

    with c the coefficient of the rule, and b = g in the first step.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch's.
        foreach, fused, differentiable: accepted for torch's sake; the step is always fused, never differentiable.
        max_norm, nonfinite, stochastic_rounding, process_group: as :class:`AdamW`'s.
        step_in_backward, bucket_bytes, measure_in_backward: as :class:`AdamW`'s.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    _names = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: Any = None,
        nonfinite: str = "propagate",
        stochastic_rounding: int | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        step_in_backward: bool | DistributedDataParallel = False,
        bucket_bytes: int = BUCKET_BYTES,
        measure_in_backward: bool = False,
    ) -> None:
        if not momentum >= 0:
            raise ValueError(f"momentum must be >= 0, got {momentum!r}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs a momentum and no dampening, got momentum={momentum!r}, dampening={dampening!r}"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(
            *(params, defaults, max_norm, nonfinite, stochastic_rounding, process_group, step_in_backward),
            *(bucket_bytes, measure_in_backward),
        )

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> tuple[list[Tensor], Tensor | None, bool]:
        if group["momentum"] == 0:
            return [], None, False
        state = self.state[p]
        momentum = state.get("momentum_buffer")
        first = momentum is None and group["dampening"] != 0
        if momentum is None:  # from zeros, the first step gives torch's b = g, unless there is dampening
            momentum = torch.zeros_like(p, memory_format=torch.preserve_format)
            if not first:  # kept only once that step, which is another one, was taken
                state["momentum_buffer"] = momentum
        return [momentum], None, first

    def _step_table(
        self,
        backend: StepBackend,
        table: StepTable,
        decision: StepDecision,
        group: dict[str, Any],
        inputs: StepInputs,
    ) -> None:
        one_minus_dampening = 1.0 if inputs.first else 1 - group["dampening"]
        options = SGDOptions(
            *(group["lr"], group["momentum"], one_minus_dampening, group["weight_decay"]),
            *(group["nesterov"], group["maximize"]),
        )
        backend.sgd_(table, decision, options)

    def _fused_torch(
        self, inputs: StepInputs, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        torch._fused_sgd_(
            inputs.params, inputs.grads, inputs.states[0] if inputs.states else [],
            lr=rate_for_torch(group["lr"]), weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]), dampening=float(group["dampening"]), nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]), is_first_step=inputs.first, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
