"""torchtitan: its clip, of one message for any mix of meshes and pipeline stages, and fastclip.optim in its optimizers.

    import torchtitan.distributed.utils
    torchtitan.distributed.utils.clip_grad_norm_ = fastclip.integrations.torchtitan.clip_grad_norm_
    config.optimizer = fastclip.integrations.torchtitan.fast_adamw(lr=8e-4)

Either line works without the other. :func:`fastclip.patch_torch` alone speeds up torchtitan's own function too, which
then still sends a message for each mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torchtitan.components.optimizer as titan
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from .. import functional, optim

FACTORIES: dict[str, Callable[..., Optimizer]] = {"FastAdamW": optim.AdamW, "FastSGD": optim.SGD}


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
) -> Tensor:
    """``torchtitan.distributed.utils.clip_grad_norm_`` by :func:`fastclip.clip_norm_`.

    `pp_mesh` is that of the pipeline stages, which hold other parameters of the same model (fastclip's
    `process_group`). `ep_enabled` is ignored: experts on a mesh of their own need no other way. The others are as
    :func:`fastclip.clip_norm_`'s.

    Returns:
        The norm of the whole model before clipping: a plain [] tensor, the same bits on all ranks.

    Raises as :func:`fastclip.clip_norm_`.
    """
    return functional.clip_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach, process_group=pp_mesh)


class OptimizersContainer(titan.OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container, whose ``ParamGroupConfig(optimizer_name=...)`` may also be ``"FastAdamW"`` or
    ``"FastSGD"``: :class:`fastclip.optim.AdamW` and :class:`fastclip.optim.SGD`."""

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):  # type: ignore[misc]
        """torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        factory = FACTORIES.get(name)
        return titan.OptimizersContainer._resolve_optimizer_factory(name) if factory is None else factory


def fast_adamw(lr: float = 8e-4, **kwargs: Any) -> OptimizersContainer.Config:
    """``torchtitan.components.optimizer.default_adamw`` with :class:`fastclip.optim.AdamW` for all parameters."""
    settings = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **kwargs}
    group = titan.ParamGroupConfig(pattern=r".*", optimizer_name="FastAdamW", optimizer_kwargs=settings)
    return OptimizersContainer.Config(param_groups=[group])
