"""What torch.compile leaves to Python: a call that is a graph break, and runs as it would without torch.compile.

Decisions change what rules remember, count steps and call native code, none of which a compiler can follow; where it
tried, it lost some of the changes. Only compiled code imports this file: it imports torch._dynamo, which takes seconds.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="a Clipper and the steps of fastclip.optim run outside of the graph; fastclip.clip_norm_ stays inside"
)
def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)
