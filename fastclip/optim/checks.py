"""What AdamW and SGD refuse, before anything is changed, and how they read their numbers."""

from __future__ import annotations

import numbers
import sys
from typing import Any

from torch import Tensor

from ..gradients.pack import has_memory, refuse_set
from .step_inputs import StepInputs

NUMBERS = ("eps", "momentum", "dampening", "weight_decay")  # entries of a parameter group, besides lr and betas


def check_defaults(params: Any, defaults: dict[str, Any], stochastic_rounding: Any) -> int | None:
    """ValueError or TypeError for what the constructor of an optimizer was given; the seed as an int."""
    refuse_set(params, "params")
    if defaults["foreach"] or defaults["fused"] is False:
        raise ValueError("foreach=True and fused=False are not supported: this optimizer is always fused")
    if defaults["differentiable"]:
        raise ValueError("differentiable=True is not supported")
    for name in ("lr", "weight_decay"):
        value = defaults[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        if not (isinstance(value, Tensor) and value.device.type != "cpu") and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value!r}")
    if stochastic_rounding is None:
        return None
    if isinstance(stochastic_rounding, bool) or not isinstance(stochastic_rounding, numbers.Integral):
        raise TypeError(f"stochastic_rounding must be a seed (an int) or None, got {stochastic_rounding!r}")
    return int(stochastic_rounding)


def refuse_one_rank(argument: str) -> None:
    """ValueError where ZeroRedundancyOptimizer makes the optimizer: of this rank's share of the parameters alone."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe(2)
    while frame is not None:
        if module is not None and isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise ValueError(
                f"{argument} must be left out inside ZeroRedundancyOptimizer, which gives each rank's optimizer a part "
                f"of the parameters: their norm is not that of the model. Clip before its step, with "
                f"fastclip.clip_norm_ or a Clipper of all parameters"
            )
        frame = frame.f_back


def read_numbers(group: dict[str, Any]) -> None:
    """Tensors among a group's numbers as Python numbers: to read one at every step would wait for its device."""
    group.update({name: group[name].item() for name in NUMBERS if isinstance(group.get(name), Tensor)})
    if "betas" in group:
        group["betas"] = tuple(map(float, group["betas"]))


def named_pairs(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The named parameters of a group, as torch.optim takes them."""
    return [
        *zip(group.get("param_names", ()), group["params"]),
        *(item for item in group["params"] if isinstance(item, tuple)),
    ]


def check_inputs(inputs: StepInputs, names: tuple[str, ...]) -> None:
    """An error where torch's kernel, which asks nothing, would read or write memory that is not there, or raise after
    others have been stepped. `names`: of the states."""
    if not inputs.params[0].is_floating_point():
        raise TypeError(
            f"parameter must be of a floating-point dtype, got {inputs.params[0].dtype}; nothing was changed"
        )
    columns = {"parameter": inputs.params, "gradient": inputs.grads, **dict(zip(names, inputs.states))}
    for name, tensors in columns.items():
        for p, t in zip(inputs.params, tensors):
            if t.is_nested:
                raise NotImplementedError(f"{name} is a nested tensor, which is not supported; nothing was changed")
            if t.shape != p.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(t.shape)}, and its parameter {tuple(p.shape)}; nothing was changed"
                )
    for name, tensors in {**columns, "step": inputs.steps}.items():
        for t in tensors:
            if not has_memory(t):
                raise RuntimeError(
                    f"{name} of shape {tuple(t.shape)} has no memory: its storage was freed or shrunk; nothing was "
                    f"changed"
                )
