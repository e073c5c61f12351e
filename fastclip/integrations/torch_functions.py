"""torch.nn.utils' clipping functions: where their implementations are kept, so that others can be put there.

They are wrappers whose closure has the implementation in a cell named ``func``. What is put there is what every caller
gets, also one that imported the function by name before, and the functions stay the objects they are. Where a torch has
no such cell, the attributes of its modules are replaced, which reaches those who look them up later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import clip_grad

from .. import functional

# The name in torch.nn.utils.clip_grad -> ours. `clip_grad_norm`, the fifth, calls `clip_grad_norm_` by name.
OURS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": functional.clip_norm_,
    "clip_grad_value_": functional.clip_value_,
    "_get_total_norm": functional.total_norm,
    "_clip_grads_with_norm_": functional.clip_with_norm_,
}


class TorchFunction:
    """One of torch's functions.

    Attributes:
        original: torch's own implementation.
    """

    def __init__(self, name: str) -> None:
        function = getattr(clip_grad, name)
        free = getattr(getattr(function, "__code__", None), "co_freevars", ())
        self._cell = function.__closure__[free.index("func")] if "func" in free else None
        self._function = function
        self._attributes = [
            (module, attribute)
            for module in (clip_grad, torch.nn.utils)
            for attribute, value in vars(module).items()
            if value is function
        ]
        self.original: Callable[..., Any] = function if self._cell is None else self._cell.cell_contents

    def set_implementation(self, implementation: Callable[..., Any]) -> None:
        """What everyone who calls the function calls from now on."""
        if self._cell is not None:
            self._cell.cell_contents = implementation
            return
        if implementation is not self.original:
            implementation = functools.wraps(self._function)(torch.no_grad()(implementation))
        for module, attribute in self._attributes:
            setattr(module, attribute, implementation)


@functools.cache
def torch_functions() -> dict[str, TorchFunction]:
    """Those that this torch has."""
    return {name: TorchFunction(name) for name in OURS if hasattr(clip_grad, name)}
