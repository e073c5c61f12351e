"""AdamW with the clip inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.base import AdamWOptions, StepBackend, StepDecision, StepTable
from .base import ClippingOptimizer
from .in_backward import BUCKET_BYTES
from .step_inputs import StepInputs, rate_for_torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel


class AdamW(ClippingOptimizer):
    r"""``torch.optim.AdamW``, with the clip inside.

    .. math::
        g &\leftarrow c\,g,\quad
        m \leftarrow \beta_1 m + (1-\beta_1) g,\quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        p &\leftarrow (1 - lr\,\lambda)\,p
            - lr\,\frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    with c the coefficient of the rule. Loshchilov and Hutter, "Decoupled Weight Decay Regularization".

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as torch's. A tensor is read once, but for
            `lr`, which may change on its device.
        foreach, fused, differentiable: accepted for torch's sake; the step is always fused, never differentiable.
        max_norm: what :class:`~fastclip.Clipper` takes as its rule: a number (the limit of the global norm), a rule, or
            a list of rules. None: the gradients are taken as they are.
        nonfinite: as :class:`~fastclip.Clipper`'s.
        stochastic_rounding: a seed. bfloat16 parameters and states are then rounded stochastically, right on
            average, so that updates too small for bfloat16 are not lost and no float32 copy is needed. The same seed
            gives the same numbers, also after a checkpoint. Other dtypes round as ever.
        process_group: of ranks that hold other parameters, as :class:`~fastclip.Clipper`'s.
        step_in_backward: clip, step and free each gradient as soon as it is complete, within ``loss.backward()``, so
            that all of them are never there at the same time. `max_norm` must then be rules that go by each gradient
            alone, or None. Of a model in DistributedDataParallel, pass that model instead of True. See below.
        bucket_bytes: of gradients that are stepped together then. More are faster, fewer take less memory.
        measure_in_backward: as :class:`~fastclip.Clipper`'s: the step then reads no gradient for its norm.

    With ``step_in_backward``, :meth:`step` uses the gradients that are left, counts the step, and leaves the statistics
    of all of it in :attr:`stats`. It must be called after each backward pass, but for those within
    :meth:`accumulate`. ``nonfinite="skip"`` leaves single parameters alone, those whose gradient is not finite
    (``stats.nonfinite``, whose coefficient is 1), and ``stats.skipped`` is whether all were; ``"raise"`` is refused.
    A learning rate that is set between backward and :meth:`step` comes too late for what was stepped already. Hooks
    that others register later (``register_post_accumulate_grad_hook``) may find no gradient any more. Freeze the
    parameters (``requires_grad_(False)``) while the backward pass of another network reaches them, as in a GAN. No
    other optimizer and no Clipper finds gradients of theirs; a second optimizer that steps them in backward is refused.
    There must be no GradScaler, no closure and no ``Clipper.step``. Of DTensors (FSDP2) the gradients of this rank's
    parts come once they are summed; FSDP1 and declared parameters are refused. Of DistributedDataParallel
    the optimizer becomes the communication hook, for good, and steps each bucket once it is averaged; every parameter
    must get a gradient on every rank, and :meth:`accumulate` must be around the forward pass too. Rounding
    stochastically, the random numbers are others than without ``step_in_backward``.

    Parameters may be DTensors, whose states are DTensors too: every parameter's from the first step on, so that
    ``torch.distributed.checkpoint`` finds the same on all ranks. Each rank steps its own parts.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    _names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps!r}")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(
            *(params, defaults, max_norm, nonfinite, stochastic_rounding, process_group, step_in_backward),
            *(bucket_bytes, measure_in_backward),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                if saved := self.state.get(p):
                    saved["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).to(p.device)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> tuple[list[Tensor], Tensor | None, bool]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [state["exp_avg"], state["exp_avg_sq"]]
        if group["amsgrad"]:
            if "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            states.append(state["max_exp_avg_sq"])
        return states, state["step"], False

    def _step_table(
        self,
        backend: StepBackend,
        table: StepTable,
        decision: StepDecision,
        group: dict[str, Any],
        inputs: StepInputs,
    ) -> None:
        options = AdamWOptions(
            *(group["lr"], group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"]),
            *(group["amsgrad"], group["maximize"]),
        )
        backend.adamw_(table, decision, options)

    def _fused_torch(
        self, inputs: StepInputs, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        steps = torch._foreach_add(inputs.steps, 1)
        torch._fused_adamw_(  # type: ignore[call-overload]
            inputs.params, inputs.grads, *inputs.states[:2], inputs.states[2] if group["amsgrad"] else [], steps,
            lr=rate_for_torch(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1], eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]), amsgrad=bool(group["amsgrad"]), maximize=bool(group["maximize"]),
            grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        torch._foreach_copy_(inputs.steps, steps)
