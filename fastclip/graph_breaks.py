"""What torch.compile leaves to Python: each call is a graph break, and runs as it would without torch.compile.

Decisions change what rules remember, count steps and call native code, none of which a compiler can follow; where it
tried, it lost some of the changes. Only compiled code imports this file: it imports torch._dynamo, which takes seconds.
"""

from collections.abc import Callable
from typing import Any

import torch

from .clipper import Clipper
from .optim import _Optimizer


def _outside(function: Callable[..., Any]) -> Any:
    reason = "a Clipper and the steps of fastclip.optim run outside of the graph; fastclip.clip_norm_ stays inside"
    return torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]


clip_ = _outside(Clipper.clip_)
step = _outside(Clipper.step)
optimizer_step = _outside(_Optimizer.step)
