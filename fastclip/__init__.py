"""fastclip: gradient clipping at the speed of memory.

    fastclip.clip_norm_(model.parameters(), 1.0)

takes the place of ``torch.nn.utils.clip_grad_norm_``. See :mod:`fastclip.functional` for the functions,
:class:`fastclip.Clipper` for the object, :mod:`fastclip.rules` for what it can do, :mod:`fastclip.optim` for optimizers
that clip as they step, :mod:`fastclip.monitor` to watch a run, :func:`fastclip.patch_torch` and
:mod:`fastclip.integrations` where a framework does the clipping.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import rules
from .backends import use_backend
from .clipper import Clipper
from .functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    clip_norm_,
    clip_tensor_norm_,
    clip_value_,
    clip_with_norm_,
    get_total_norm,
    mask_small_,
    total_norm,
)
from .stats import Stats
from .version import __version__

if TYPE_CHECKING:
    from . import integrations, monitor, optim
    from .integrations.torch_patch import patch_torch, unpatch_torch

__all__ = [
    "Clipper",
    "Stats",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_norm_",
    "clip_tensor_norm_",
    "clip_value_",
    "clip_with_norm_",
    "get_total_norm",
    "integrations",
    "mask_small_",
    "monitor",
    "optim",
    "patch_torch",
    "rules",
    "total_norm",
    "unpatch_torch",
    "use_backend",
]


# Imported when first asked for, since many programs do without.
_LATER = {
    "integrations": ("integrations", None),
    "monitor": ("monitor", None),
    "optim": ("optim", None),
    "patch_torch": ("integrations.torch_patch", "patch_torch"),
    "unpatch_torch": ("integrations.torch_patch", "unpatch_torch"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LATER[name]
    module = importlib.import_module(f".{module_name}", __name__)
    globals()[name] = found = module if attribute is None else getattr(module, attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
