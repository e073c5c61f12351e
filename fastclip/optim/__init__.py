"""AdamW and SGD that clip as they step: torch.optim's, with the clip inside the optimizer's own pass.

One read of the gradients for their norm, and one pass over everything for the step, in which each gradient is
multiplied by its coefficient as it is read: no gradient is written back. Arguments, ``state_dict`` and checkpoints are
torch.optim's, both ways.

The step is one multi-tensor kernel of the backend, whatever the number of tensors. Where a tensor is not as the kernels
need it (a gradient laid out otherwise than its parameter, a gradient that two parameters share), or there are no
kernels, it is torch's own fused kernel, fed with the coefficient.
"""

from .adamw import AdamW
from .sgd import SGD

__all__ = ["SGD", "AdamW"]
