"""Rules whose limits follow the norms they have seen.

What they remember is small tensors on the device of the gradients, changed in place: no step waits for the device, a
CUDA graph's replay goes on from where the last one was, and ``Clipper.state_dict`` saves them. A norm that is not
finite is never remembered, nor one of exactly 0 (``torch.distributed.checkpoint`` takes a step with gradients of zeros
when it loads an optimizer), nor that of a step that is skipped; a step without gradients changes nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import at_least_one, fraction, is_bool, nonnegative, number, positive
from ..backends import capturing, choose, get
from ..stats import Stats
from .arithmetic import (
    Number,
    as_tensor,
    ceil,
    clamped,
    divided,
    either,
    every,
    floor,
    put,
    root,
    taken,
    where,
)
from .base import STATES, Needs, Rule, StepContext, saved_by
from .coefficients import EPS, clip_coefficient


class Adaptive(Rule):
    """A rule with running statistics, `state`: tensors by name, made in the first step on the gradients' device.

    From then on they are changed where they are, since a CUDA graph may know their memory; only a move to another
    device, or another number of parameters, gives them a new one.
    """

    norm_type = 2.0
    needs = Needs.TOTAL_NORM
    finite_zero = True

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def _new(self, device: torch.device) -> dict[str, Tensor]:
        """The state before the first step."""
        raise NotImplementedError

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The state, on `device`."""
        if not self.state or next(iter(self.state.values())).device != device:  # they are always together
            if capturing(device):
                raise RuntimeError(
                    f"{self!r} remembers nothing on {device} yet: call it once before it is captured in a CUDA graph, "
                    f"whose replays would otherwise each begin anew"
                )
            with torch.inference_mode(False):
                made = self.state or self._new(device)
                self.state = {name: t.to(device, copy=True) for name, t in made.items()}
        return self.state

    def init_state(self, device: torch.device, count: int) -> None:
        self._on(device)

    def _to_remember(self, norm: Tensor, context: StepContext) -> Tensor:
        """`norm`, or NaN if the step is skipped."""
        return norm if context.skip is None else torch.where(context.skip, math.nan, norm)

    def _remember(self, *new: Number) -> None:
        if isinstance(new[0], Tensor):
            tensors = [value for value in new if isinstance(value, Tensor)]
            if len(tensors) == len(new):
                torch._foreach_copy_(list(self.state.values()), tensors)
                return
        for own, value in zip(self.state.values(), new):
            own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)

    def state_dict(self) -> dict[str, Any]:
        return {name: t.detach().clone() for name, t in self.state.items()}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError unless `state` is one of this rule's."""
        if state and set(state) != set(self._names):
            names = ", ".join(self._names)
            raise ValueError(
                f"state_dict holds {', '.join(state)} for {self!r}, which remembers {names}{saved_by(state)}"
            )
        for name, own in self._new(torch.device("cpu")).items() if state else ():
            shape = tuple(torch.as_tensor(state[name]).shape)
            if not self._fits(name, shape, tuple(own.shape)):
                raise ValueError(f"state_dict: {name!r} must be of shape {tuple(own.shape)} for {self!r}, got {shape}")

    def _fits(self, name: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
        return shape == own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, an empty one too. ValueError if it is another rule's."""
        self.check_state_dict(state)
        loaded = {name: torch.as_tensor(state[name], dtype=torch.float64) for name in self._names if state}
        with torch.inference_mode(False):  # a tensor made in inference mode could not be changed outside of it
            if not self.state:
                self.state = {name: t.detach().clone() for name, t in loaded.items()}
                return
            for name, own in self.state.items():
                value = loaded[name] if loaded else self._new(own.device)[name]
                if len(value) > len(own) if own.dim() else False:  # more parameters than there were
                    self.state[name] = value.detach().to(own.device, copy=True)
                elif own.dim():
                    own.zero_()[: len(value)].copy_(value)
                else:
                    own.copy_(value)

    _names: tuple[str, ...]


class ZClip(Adaptive):
    r"""Clip norms that stand out from those before them.

    .. math:: z = \frac{N - \mu}{\sigma + \epsilon},\quad
        \tau = \mu + \frac{z_{max}\,\sigma}{z / z_{max}} \text{ where } z > z_{max}

    All gradients are scaled so that their norm N is at most tau; where z is not that large they are left alone. Then mu
    and sigma^2 follow, with ``alpha``, the norm as it was clipped: :math:`\mu \leftarrow \alpha\mu + (1-\alpha)N`,
    :math:`\sigma^2 \leftarrow \alpha\sigma^2 + (1-\alpha)(N-\mu)^2`. The first `warmup` norms are not clipped; their
    mean and variance are what mu and sigma^2 start from. A norm of 0 or one that is not finite changes neither, and is
    no step of the warm-up. Kumar et al. 2025, "ZClip" (arXiv 2504.02507).

    Parameters may come and go: only their common norm counts. ``stats.limit`` is tau where something was clipped,
    elsewhere the norm above which something would have been.

    Args:
        z_max: how many standard deviations above the mean a norm may be, > 0.
        alpha: how slowly mean and variance follow, in [0, 1).
        warmup: the number of norms to start from, >= 1.
        eps: added to sigma, >= 0.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    _names = STATES["ZClip"]

    def __init__(self, z_max: float = 2.5, alpha: float = 0.97, warmup: int = 25, eps: float = 1e-6) -> None:
        super().__init__()
        self.z_max = positive(z_max, "z_max")
        self.alpha = fraction(alpha, "alpha")
        self.warmup = at_least_one(warmup, "warmup")
        self.eps = nonnegative(eps, "eps")

    def _new(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.float64, device=device) for name in self._names}

    def decide(self, stats: Stats, context: StepContext) -> Tensor | float:
        state = self._on(stats.device)
        norm = stats.norm
        coef, context.limit, *new = fused(
            *(_zclip, norm, self._to_remember(norm, context)),
            *state.values(),
            self.z_max,
            self.alpha,
            float(self.warmup),
            self.eps,
        )
        self._remember(*new)
        return coef

    def __repr__(self) -> str:
        return f"ZClip(z_max={self.z_max}, alpha={self.alpha}, warmup={self.warmup}, eps={self.eps})"


def _zclip(
    norm: Number,
    observed: Number,
    count: Number,
    mean: Number,
    var: Number,
    z_max: float,
    alpha: float,
    warmup: float,
    eps: float,
) -> tuple[Number, ...]:
    """(coefficient, limit, and count, mean and var afterwards)."""
    std = root(var)
    z = divided(norm - mean, std + eps)
    warm = count >= warmup
    has_mean = warm & (mean > 0)  # a mean of 0 comes from a checkpoint of a version that remembered zeros
    spike = has_mean & (z > z_max)
    above = where(has_mean, mean + z_max * (std + eps), math.inf)
    limit = where(spike, mean + divided(z_max * z_max * std, z), above)
    coef = either(spike, lambda: clip_coefficient(norm, limit), lambda: 1.0)
    # A NaN is no spike; it and inf go on as torch's clip would let them, for whatever rule or policy comes after.
    seen = where(spike, limit, norm)
    toward = seen - mean
    share = where(warm, 1 - alpha, divided(1.0, count + 1))
    new_mean = mean + share * toward
    new_var = var + share * (where(warm, seen - new_mean, toward) * (seen - new_mean) - var)
    usable = (observed > 0) & (observed < math.inf)
    return (
        coef,
        limit,
        where(usable, clamped(count + 1, high=warmup), count),
        where(usable, new_mean, mean),
        where(usable, new_var, var),
    )


class AutoClip(Adaptive):
    r"""Clip to a percentile of the norms so far.

    .. math:: \tau = \mathrm{percentile}_p(N_{t-window+1}, \dots, N_t),\quad
        g \leftarrow g \cdot \min\left(1, \frac{\tau}{N_t + 10^{-6}}\right)

    with the present norm among them, so that the first is its own limit, and linear interpolation between two norms,
    as ``numpy.percentile`` has it. Norms of 0 and those that are not finite are left out. Seetharaman et al. 2020,
    "AutoClip" (arXiv 2007.14469), with a bounded window.

    Args:
        percentile: p, in [0, 100]. Small is the paper's way: most steps are clipped, and nearly equally long.
        window: how many norms are remembered, >= 1.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    _names = STATES["AutoClip"]

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        super().__init__()
        self.percentile = number(percentile, "percentile")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be in [0, 100], got {percentile!r}")
        self.window = at_least_one(window, "window")

    def _new(self, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            # the last place is written when there is nothing to remember
            "history": torch.full((self.window + 1,), math.inf, dtype=torch.float64, device=device),
        }

    def decide(self, stats: Stats, context: StepContext) -> Tensor | float:
        state = self._on(stats.device)
        norm = stats.norm
        coef, context.limit, *new = fused(
            _autoclip, norm, self._to_remember(norm, context), *state.values(), self.percentile / 100
        )
        self._remember(*new)
        return coef

    def __repr__(self) -> str:
        return f"AutoClip({self.percentile}, window={self.window})"


def _autoclip(norm: Number, observed: Number, count: Number, history: Tensor, share: float) -> tuple[Number, ...]:
    """(coefficient, limit, and count and history afterwards)."""
    window = len(history) - 1
    usable = (observed > 0) & (observed < math.inf)
    history = put(history, where(usable, count % window, window), where(usable, observed, math.inf))
    count = count + usable
    filled = clamped(count, high=window)
    ordered = history[:window].sort().values  # what is not filled yet is inf, and so comes last
    rank = share * clamped(filled - 1, low=0)
    low = floor(rank)
    below, above = taken(ordered, low), taken(ordered, ceil(rank))
    limit = where(above > below, below + (above - below) * (rank - low), below)
    return clip_coefficient(norm, limit), limit, count, history


class AdaGC(Adaptive):
    r"""Clip each gradient relative to the norms that it had.

    .. math:: h_i = \min\left(1, \frac{\lambda_{rel}\,\gamma_i}{n_i + 10^{-6}}\right),\quad
        g_i \leftarrow h_i g_i,\quad \gamma_i \leftarrow \beta\gamma_i + (1-\beta) h_i n_i

    with n_i the norm of tensor i. In the first `warmup` steps all gradients are scaled together to a norm of at most
    `lambda_abs` instead, and gamma_i is the least norm that tensor i had after that. Wang et al. 2025, "AdaGC" (arXiv
    2502.11034).

    A norm of 0 or one that is not finite leaves gamma_i as it is. (By the paper's formula a tensor whose gradient was 0
    once would have the limit 0 for ever.) A tensor that has no gamma_i when the warm-up is over starts with its norm
    then, unclipped. gamma_i belongs to the i-th parameter of the Clipper, so a parameter without a gradient keeps it;
    where the number of parameters has changed, those added at the end start anew.

    Args:
        lambda_rel: how much larger than gamma_i a norm may be, > 0.
        beta: how slowly gamma_i follows, in [0, 1).
        warmup: steps whose norm is finite and not 0, >= 0. With 0 it goes by each tensor alone (``step_in_backward``).
        lambda_abs: the limit of the global norm in the warm-up, > 0.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    needs = Needs.TOTAL_NORM | Needs.TENSOR_NORMS
    _names = STATES["AdaGC"]

    def __init__(
        self, lambda_rel: float = 1.05, beta: float = 0.98, warmup: int = 100, lambda_abs: float = 1.0
    ) -> None:
        super().__init__()
        self.lambda_rel = positive(lambda_rel, "lambda_rel")
        self.beta = fraction(beta, "beta")
        self.warmup = at_least_one(warmup, "warmup") if warmup != 0 or is_bool(warmup) else 0
        self.lambda_abs = positive(lambda_abs, "lambda_abs")

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        return self.warmup == 0  # whose limit is one of the norm of all gradients

    def _new(self, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "gamma": torch.zeros(0, dtype=torch.float64, device=device),  # 0: none yet
        }

    def _fits(self, name: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
        return len(shape) == len(own)  # as many as there were parameters

    def init_state(self, device: torch.device, count: int) -> None:
        gamma = self._on(device)["gamma"]
        if len(gamma) < count:
            if capturing(device):
                raise RuntimeError(
                    f"{self!r} has met new parameters: call it once before it is captured in a CUDA graph"
                )
            with torch.inference_mode(False):
                self.state["gamma"] = torch.cat([gamma, gamma.new_zeros(count - len(gamma))])

    def reorder(self, came_from: list[int]) -> None:
        if (gamma := self.state.get("gamma")) is not None:
            places = [i if i < len(gamma) else -1 for i in came_from]
            index = torch.tensor(places, dtype=torch.int64, device=gamma.device)
            with torch.inference_mode(False):
                self.state["gamma"] = torch.cat([gamma, gamma.new_zeros(1)])[index]  # -1: the zero

    def decide(self, stats: Stats, context: StepContext) -> Tensor:
        params = context.params()
        self.init_state(stats.device, params.total)
        state = self._on(stats.device)
        count, gamma = state["count"], state["gamma"]
        index = params.index(stats.device)
        means = gamma[: params.total] if index is None else gamma[index]
        norms = stats.norms
        coef, new_count, new = fused(
            *(_adagc, stats.norm, norms, self._to_remember(norms, context), count, means),
            self.lambda_rel,
            self.beta,
            self.warmup,
            self.lambda_abs,
        )
        count.copy_(as_tensor(new_count, stats.device))
        if index is None:
            gamma[: params.total] = new
        else:
            assert isinstance(new, Tensor)
            gamma.index_copy_(0, index, new)
        return as_tensor(coef, stats.device).expand(len(norms))

    def __repr__(self) -> str:
        return f"AdaGC({self.lambda_rel}, beta={self.beta}, warmup={self.warmup}, lambda_abs={self.lambda_abs})"


def _adagc(
    norm: Number,
    norms: Tensor,
    observed: Tensor,
    count: Number,
    gamma: Tensor,
    rel: float,
    beta: float,
    warmup: int,
    absolute: float,
) -> tuple[Number, ...]:
    """(coefficients, and count and gamma afterwards)."""
    warming = count < warmup
    remembered = gamma > 0
    coef = either(
        warming,
        # Not by clip_coefficient, whose look at the limit a compiler could not follow.
        lambda: where(norm == math.inf, -0.0, clamped(divided(absolute, norm + EPS), high=1.0)),
        lambda: where(remembered, clip_coefficient(norms, rel * gamma), 1.0),
    )
    clipped = coef * norms
    followed = either(warming, lambda: torch.minimum(gamma, clipped), lambda: beta * gamma + (1 - beta) * clipped)
    finite = observed < math.inf  # not NaN either
    usable = (clipped > 0) & (clipped < math.inf) & finite
    new = where(usable, where(remembered, followed, clipped), gamma)
    # The norm too must be finite: with pipeline stages it is what all of them know.
    return coef, count + (warming & every(finite, norm) & (norm > 0) & (norm < math.inf)), new


# ---- one kernel out of a few lines ----


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}  # a function that cannot be compiled stands for itself
_compiled_for: set[Any] = set()  # what a compiled function was called with


def fused(function: Callable[..., tuple[Number, ...]], *arguments: Any) -> tuple[Number, ...]:
    """function(*arguments), on a GPU compiled into one kernel or two if torch.compile can do that here, on a CPU with
    Python's numbers in the place of [] tensors.

    `function` must not change anything, so that it can be called again where compiling fails.
    """
    device = arguments[0].device
    if device.type == "cpu":
        return function(*[x.item() if isinstance(x, Tensor) and not x.dim() else x for x in arguments])
    if _compiled.get(function) is function:
        return function(*arguments)
    key = function, device, tuple(x.shape if isinstance(x, Tensor) else x for x in arguments)
    if capturing(device) and key not in _compiled_for:
        return function(*arguments)  # nothing can be compiled in the middle of a capture
    if function not in _compiled:
        if choose(device).name == "reference" or get("triton").why_not(device) is not None:
            return function(*arguments)
        _compiled[function] = torch.compile(function, fullgraph=True)
    try:
        with torch.no_grad():  # one of the modes that would each be compiled for
            results = _compiled[function](*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the compiler lacks: the lines run one by one instead
        _compiled[function] = function
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"fastclip: torch.compile failed for a rule, which runs uncompiled: {reason[0]}", stacklevel=2)
        return function(*arguments)
    _compiled_for.add(key)
    return results
