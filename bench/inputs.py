"""The gradients that clip.py times a call on, and the check of what the call made of them, against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from . import method
from .models import Model
from .providers import CLIPS, Call

CHUNK = 1 << 20  # elements checked at a time


class Inputs:
    """A model's gradients, in as many sets as are wanted, and what clipping them should give."""

    @set_torch_threads(1)  # many small operations, and a busy machine makes each wait for its second thread
    def __init__(self, model: Model, dtype: torch.dtype, device: str, sets: int) -> None:
        self.flat = torch.empty(model.elements + model.elements % 2, dtype=dtype, device=device)
        some = torch.randn(min(self.flat.numel(), CHUNK), device=device).to(dtype)  # so that no norm is tiny
        for piece in self.flat.split(CHUNK):
            piece.copy_(some[: piece.numel()])
        sizes = [math.prod(shape) for shape in model.shapes]
        self.pristine = self.flat[: model.elements].split(sizes)
        self.sets = [[self._parameter(shape, model.misaligned) for shape in model.shapes] for _ in range(sets)]
        self.norms = torch.stack([_norm(t) for t in self.pristine])
        self.norm = self.norms.norm().item()
        self.maxima = torch.stack([t.abs().max() for t in self.pristine]).double()

    def _parameter(self, shape: tuple[int, ...], misaligned: bool) -> torch.nn.Parameter:
        # The parameter itself is never touched, so it takes no memory.
        parameter = torch.nn.Parameter(self.flat.new_zeros(()).expand(shape))
        room = self.flat.new_empty(math.prod(shape) + misaligned)
        parameter.grad = room[int(misaligned) :].view(shape)
        return parameter

    @set_torch_threads(1)
    def restore(self, sets: int | None = None) -> None:
        """Give the gradients the values they had at first."""
        for parameters in self.sets[:sets]:
            for parameter, values in zip(parameters, self.pristine):
                parameter.grad.view(-1).copy_(values)

    def limits(self, mode: str) -> tuple[float, float]:
        """The limit to check a mode with, and the one to time it with where that does not fall from call to call."""
        return {
            "norm": (math.inf, math.inf),
            "not triggered": (self.norm * 2, self.norm * 2),
            "triggered": (self.norm / 2, math.nan),
            "per tensor": (self.norms.median().item(), math.nan),
            "mask": (self.maxima.median().item(), self.maxima.min().item() / 2),
            "value": (self.maxima.max().item() / 4, self.maxima.max().item() * 2),
        }[mode]

    def factors(self, mode: str, limit: float) -> list[float]:
        """What each gradient should be multiplied by."""
        ones = torch.ones_like(self.norms)
        if mode in CLIPS:
            return (ones * limit / (self.norm + 1e-6)).clamp(max=1).tolist()
        if mode == "per tensor":
            return (limit / (self.norms + 1e-6)).clamp(max=1).tolist()
        return (ones * (self.maxima >= limit) if mode == "mask" else ones).tolist()

    @set_torch_threads(1)
    def error(self, mode: str, limit: float) -> float:
        """The largest relative error of an element of the first set, after a call with this limit."""
        dtype = self.flat.dtype
        least = torch.finfo(dtype).smallest_normal  # below it, rounding is no longer relative
        worst = 0.0
        for parameter, values, factor in zip(self.sets[0], self.pristine, self.factors(mode, limit)):
            for new, old in zip(parameter.grad.view(-1).split(CHUNK), values.split(CHUNK)):
                expected = old.float() * factor
                if mode == "value":
                    expected = expected.clamp(-limit, limit).to(dtype).float()
                error = ((new.float() - expected).abs() / expected.abs().clamp(min=least)).max().item()
                worst = error if math.isnan(error) else max(worst, error)
        return worst


def _norm(values: Tensor) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(v, dtype=torch.float64) for v in values.split(CHUNK)]).norm()


def tolerance(dtype: torch.dtype, exact: bool) -> float:
    """Of an element: its own rounding; and, for all but fastclip, that of norms and coefficient to its dtype, and 1 %
    for running sums in float32: in GPT-2's or Llama's embedding that is what they lose on a CPU (see `norm_error`)."""
    eps = torch.finfo(dtype).eps
    return eps + 2e-6 if exact else 2 * eps + 1e-2


def check(call: Call, exact: bool, mode: str, inputs: Inputs, device: str) -> tuple[float | None, float, str | None]:
    """A first call: the relative error of its norm (None if it tells none), the seconds that it took, and what is wrong
    with its results, if anything is."""
    limit = inputs.limits(mode)[0]
    inputs.restore(1)
    returned, seconds = method.first_call(lambda: call(limit), device)
    norm_error = None
    expected = inputs.norms if mode == "per tensor" else torch.tensor(inputs.norm, dtype=torch.float64)
    norm = getattr(returned, "total_norm", returned)
    if isinstance(norm, Tensor) and norm.shape == expected.shape and norm.is_floating_point():
        norm_error = ((norm.detach().double() - expected.to(norm.device)).abs() / expected.to(norm.device)).max().item()
        if exact and not norm_error <= 1e-6:
            return norm_error, seconds, f"its norm is off by {norm_error:.1e}"
    error = inputs.error(mode, limit)
    if not error <= tolerance(inputs.flat.dtype, exact):
        return norm_error, seconds, f"its gradients are off by {error:.1e}"
    return norm_error, seconds, None
