"""AdamW and SGD that clip as they step: torch.optim's, with the clip inside the optimizer's own pass.

One read of the gradients for their norm, and one pass over everything for the step, in which each gradient is
multiplied by its coefficient as it is read: no gradient is written back. Arguments, ``state_dict`` and checkpoints are
torch.optim's, both ways.

The step is one multi-tensor kernel of the backend, whatever the number of tensors. Where a tensor is not as the kernels
need it (a gradient laid out otherwise than its parameter, a gradient that two parameters share), or there is no C++
compiler to pack with, it is torch's own fused kernel, fed with the coefficient.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .arrays import Arrays, Planned, for_torch, rows_of, shared_addresses, zero_
from .clipper import Clipper, Pending, check_names
from .feed import Fed, TakesDecision, divisor_of, flat_params, given_by_scaler, has_divisor
from .rules import Rule
from .stats import Stats, measure
from .table import has_memory, pack, pack_step, refuse_set

NUMBERS = ("eps", "momentum", "dampening", "weight_decay")  # entries of a parameter group, besides lr and betas
OWN = ("stochastic_rounding", "rounding_step", "clipper")  # entries of a parameter group that torch's do not have


class _Last:
    """What the last step clipped. Wrappers that copy an optimizer's attributes share it with the optimizer."""

    stats: Stats | None = None


class _Optimizer(TakesDecision, torch.optim.Optimizer):
    """What AdamW and SGD share: the decision, and the pass over all parameters."""

    clipper: Clipper | None  # of the `max_norm`, over the parameters of all groups
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf, see step()

    def __init__(
        self, params: Any, defaults: dict[str, Any], max_norm: Any, nonfinite: str, stochastic_rounding: int | None
    ) -> None:
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
        if stochastic_rounding is not None:
            if isinstance(stochastic_rounding, bool) or not isinstance(stochastic_rounding, numbers.Integral):
                raise TypeError(f"stochastic_rounding must be a seed (an int) or None, got {stochastic_rounding!r}")
            stochastic_rounding = int(stochastic_rounding)
        if max_norm is None and nonfinite != "propagate":
            raise ValueError(f"nonfinite={nonfinite!r} needs a max_norm; float('inf') only measures")
        if max_norm is not None:
            _refuse_one_rank()
        self.clipper = None if max_norm is None else Clipper([], max_norm, nonfinite=nonfinite)
        self._last = _Last()
        defaults = {**defaults, "stochastic_rounding": stochastic_rounding, "rounding_step": 0}
        _read_numbers(defaults)
        super().__init__(params, defaults)
        self._update_clipper()

    @property
    def stats(self) -> Stats | None:
        """Of the gradients of the last step, if they were clipped."""
        return self._last.stats

    def _update_clipper(self) -> None:
        """Let the clipper go by the groups as they are now: parameters may have been added, replaced or removed."""
        if self.clipper is None:
            return
        names: tuple[str, ...] | None = None
        if all(len(group.get("param_names", ())) == len(group["params"]) for group in self.param_groups):
            names = tuple(name for group in self.param_groups for name in group.get("param_names", ())) or None
        self.clipper.set_parameters(flat_params(self), names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        refuse_set(given, "params")
        param_group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        for item in param_group["params"]:
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, Tensor) and not p.is_floating_point():
                raise TypeError(f"params must be floating-point tensors, got one of {p.dtype}")
        _read_numbers(param_group)
        if self.clipper is not None:
            check_names(pair for group in (*self.param_groups, param_group) for pair in _pairs(group))
            if not self.param_groups:  # state_dict() fills it in; torch.distributed.checkpoint looks for the key here
                param_group["clipper"] = {}
        super().add_param_group(param_group)

    def init_state(self) -> None:
        """Make the states of all parameters that require a gradient, and of the rules, as a first step would, without a
        step: for checkpoints that are loaded into memory that is there (``torch.distributed.checkpoint``)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._state_of(p, group)
        self._update_clipper()
        if self.clipper is not None:
            self.clipper.init_state()

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, and what the rule of `max_norm` remembers as "clipper" of the first parameter group, where
        torch.optim and torch.distributed.checkpoint keep entries that they do not know.

        Raises:
            ValueError: the rule names a parameter that is in no group any more.
        """
        self._update_clipper()  # what rules remember is saved in the order of the parameters as they are now
        found = super().state_dict()
        if self.clipper is not None:
            found["param_groups"][0]["clipper"] = self.clipper.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, torch.optim's too.

        Raises:
            ValueError: it is of other parameter groups, or of another rule; nothing is changed then.
        """
        self._update_clipper()
        saved = [dict(group) for group in state_dict["param_groups"]]
        remembered = saved[0].pop("clipper", None) if saved else None
        clipper = self.clipper
        before = None
        if clipper is not None and remembered:
            before = clipper.state_dict()
            clipper.load_state_dict(remembered)
        if len(saved) == len(self.param_groups):  # torch's know nothing of these
            own = [{name: group[name] for name in OWN if name in group} for group in self.param_groups]
            saved = [{**mine, **theirs} for mine, theirs in zip(own, saved)]
        try:
            super().load_state_dict({**state_dict, "param_groups": saved})
        except Exception:
            if clipper is not None and before is not None:
                clipper.load_state_dict(before)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            _read_numbers(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "clipper": self.clipper, "_last": _Last()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """One step; clipped first, if the optimizer was given a `max_norm`.

        Args:
            closure: evaluated first, with gradients enabled; its result is returned.
            zero_grad: set the gradients to zero in the same pass.

        `stats` is then the :class:`~fastclip.Stats` of the gradients, if they were clipped.
        """
        if torch.compiler.is_dynamo_compiling():
            from . import graph_breaks

            return graph_breaks.optimizer_step(self, closure, zero_grad=zero_grad)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.decision is None and not self.state and self._is_initial():
            self.init_state()
            return loss
        fed = self.decision or self._decided()
        if fed is not None and _must_know(self.param_groups) and fed.skipped():
            if zero_grad:
                zero_(p.grad for group in self.param_groups for p in group["params"])
        else:
            self._advance(fed, zero_grad)
        return loss

    def _is_initial(self) -> bool:
        """Whether this step is meant to make the states and nothing else: torch.distributed.checkpoint takes one with
        gradients of zeros and a learning rate of 0."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates) or any(rates):
            return False
        table = pack(flat_params(self), gradients=False, write=False)
        return len(table) > 0 and not measure(table, math.inf)[0].norm

    def _decided(self) -> Fed | None:
        """The decision of the optimizer's own rule, and of a GradScaler whose ``step`` called this one's."""
        scale, found_inf = given_by_scaler(self)
        factor = None if scale is None else scale.double().reciprocal()
        skip = None if found_inf is None else found_inf > 0
        clipper = self.clipper
        if clipper is not None:
            self._update_clipper()
            table = pack(clipper.parameters, gradients=False, write=True)
            if not len(table):
                nothing, _ = measure(table, clipper.norm_type, repair=clipper.nonfinite == "zero")
                nothing.decided(torch.ones((), dtype=torch.float64, device=table.device))
                nothing.names = None if clipper.names is None else ()
                self._last.stats = nothing
                return None
            factor = None if factor is None else factor.to(table.device)
            skip = None if skip is None else skip.to(table.device)
            self._last.stats, pending = clipper.decide(table, factor, skip, scale is not None)
            return Fed(pending, clipper.owners)
        if factor is None and skip is None:
            return None
        one = torch.ones((), dtype=torch.float64, device=(found_inf if factor is None else factor).device)  # type: ignore[union-attr]
        return Fed(Pending(one if factor is None else factor, skip), list)

    def _advance(self, fed: Fed | None, zero_grad: bool) -> None:
        held = fed.held() if fed and _must_know(self.param_groups) else []
        plan = self._plan(set(map(id, held)))  # complains before anything is written
        shared = shared_addresses(plan)
        zero_later = [p.grad for p in held]
        positions = fed.positions() if fed and fed.each_its_own() else {}
        coef, idle = (None, None) if fed is None else (fed.pending.coef, fed.idle())
        for group, arrays, kernel, table, seed in plan:
            if kernel is None or table is None or shared:
                zero_later += arrays.grads
            if kernel is None or table is None:
                self._fused(arrays, group, fed, positions, shared)
            else:
                mine = torch.ones((), dtype=torch.float64, device=table.device) if coef is None else coef
                rows = [None if t is None else rows_of(t, arrays, positions) for t in (mine, idle)]
                kernel(table, *rows, group, zero_grad and not shared, seed, *self._more(arrays, group))
            if arrays.first:
                for p, momentum in zip(arrays.params, arrays.states[0]):
                    self.state[p]["momentum_buffer"] = momentum
        for group in self.param_groups:
            if group["stochastic_rounding"] is not None:
                group["rounding_step"] += 1
        zero_(zero_later if zero_grad else [])

    def _plan(self, held: set[int]) -> list[Planned]:
        """What is to be stepped, and how; an error if any of it cannot be."""
        found = []
        for number, group in enumerate(self.param_groups):
            parts = self._arrays(group, held)
            for part, arrays in enumerate(parts):
                kernel = getattr(backends.choose(arrays.params[0].device), self._verb, None)
                table = pack_step(arrays.params, arrays.grads, arrays.states, arrays.steps) if kernel else None
                if table is None:
                    self._check(arrays)
                    if arrays.overlap():  # each sees what those before it wrote, as in torch
                        parts += arrays.one_by_one()
                        continue
                seed = _seed(group, number, part) if arrays.params[0].dtype == torch.bfloat16 else None
                if seed is not None and table is None:
                    raise NotImplementedError(
                        "stochastic_rounding needs a backend with kernels, a C++ compiler, and gradients laid out as "
                        "their parameters are, one each"
                    )
                if seed is not None and backends.capturing(arrays.params[0].device):
                    raise NotImplementedError(
                        "stochastic_rounding cannot be captured in a CUDA graph: every replay would round alike"
                    )
                found.append(Planned(group, arrays, kernel, table, seed))
        return found

    def _check(self, arrays: Arrays) -> None:
        """An error where torch's kernel, which asks nothing, would read or write memory that is not there, or raise
        after others have been stepped."""
        if not arrays.params[0].is_floating_point():
            raise TypeError(
                f"parameter must be of a floating-point dtype, got {arrays.params[0].dtype}; nothing was changed"
            )
        columns = {"parameter": arrays.params, "gradient": arrays.grads, **dict(zip(self._names, arrays.states))}
        for name, tensors in columns.items():
            for p, t in zip(arrays.params, tensors):
                if t.is_nested:
                    raise NotImplementedError(f"{name} is a nested tensor, which is not supported; nothing was changed")
                if t.shape != p.shape:
                    raise ValueError(
                        f"{name} has the shape {tuple(t.shape)}, and its parameter {tuple(p.shape)}; nothing was "
                        f"changed"
                    )
        for name, tensors in {**columns, "step": arrays.steps}.items():
            for t in tensors:
                if not has_memory(t):
                    raise RuntimeError(
                        f"{name} of shape {tuple(t.shape)} has no memory: its storage was freed or shrunk; nothing was "
                        f"changed"
                    )

    def _fused(
        self, arrays: Arrays, group: dict[str, Any], fed: Fed | None, positions: dict[int, int], shared: set[int]
    ) -> None:
        """The step by torch's fused kernel."""
        if fed is not None and fed.pending.held is not None:
            arrays = arrays.without(set(map(id, fed.held())))
            if not arrays.params:
                return
        grad_scale, found_inf = None, None
        plain, copies = for_torch(arrays, shared)
        if fed is not None:
            device, pending = arrays.params[0].device, fed.pending
            wide = any(g.dtype == torch.float64 for g in plain.grads) or not has_divisor(pending.common)
            in_place = pending.coef if wide else pending.each
            if in_place is not None:
                mine = rows_of(pending.unless_skipped(in_place), arrays, positions)
                pack(plain.grads, gradients=True, write=True, argument="grads").apply_(mine)
            grad_scale = None if wide else divisor_of(pending.common.to(device))
            if pending.skip is not None:
                found_inf = pending.skip.to(device, torch.float32)
            else:
                found_inf = torch.zeros((), device=device)
        self._by_torch(plain, group, grad_scale, found_inf)
        for original, copy in copies:
            original.copy_(copy)
        torch.autograd.graph.increment_version(arrays.params)

    def _arrays(self, group: dict[str, Any], held: set[int]) -> list[Arrays]:
        """The group's parameters that have a gradient and are not held, by device and dtype."""
        found: dict[Any, Arrays] = {}
        for p in group["params"]:
            gradient = p.grad
            if gradient is None or id(p) in held:
                continue
            if gradient.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            states, step, first = self._state_of(p, group)
            key = (p.device, p.dtype, first)
            arrays = found.get(key)
            if arrays is None:
                arrays = found[key] = Arrays([], [], [[] for _ in states], [], first)
            arrays.params.append(p)
            arrays.grads.append(gradient)
            for column, state in zip(arrays.states, states):
                column.append(state)
            if step is not None:
                arrays.steps.append(step)
        return list(found.values())

    _verb: str
    _names: tuple[str, ...]  # of the states, in order

    def _more(self, arrays: Arrays, group: dict[str, Any]) -> tuple[float, ...]:
        """What the verb takes besides."""
        return ()

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> tuple[list[Tensor], Tensor | None, bool]:
        raise NotImplementedError

    def _by_torch(
        self, arrays: Arrays, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        raise NotImplementedError


class AdamW(_Optimizer):
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
        stochastic_rounding: a seed. bfloat16 parameters and states are then rounded up or down by chance, right on
            average, so that updates too small for bfloat16 are not lost and no float32 copy is needed. The same seed
            gives the same numbers, also after a checkpoint. Other dtypes round as ever.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    _verb = "adamw_"
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
        max_norm: float | Rule | list[Rule] | None = None,
        nonfinite: str = "propagate",
        stochastic_rounding: int | None = None,
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
        super().__init__(params, defaults, max_norm, nonfinite, stochastic_rounding)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                if mine := self.state.get(p):
                    mine["step"] = torch.as_tensor(mine["step"], dtype=torch.float32).to(p.device)

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

    def _by_torch(
        self, arrays: Arrays, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        steps = torch._foreach_add(arrays.steps, 1)
        torch._fused_adamw_(  # type: ignore[call-overload]
            arrays.params, arrays.grads, *arrays.states[:2], arrays.states[2] if group["amsgrad"] else [], steps,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            weight_decay=group["weight_decay"], amsgrad=group["amsgrad"], maximize=group["maximize"],
            grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        torch._foreach_copy_(arrays.steps, steps)


class SGD(_Optimizer):
    r"""``torch.optim.SGD``, with the clip inside.

    .. math::
        g \leftarrow c\,g + \lambda p,\quad b \leftarrow \mu b + (1-\tau) g,\quad
        p \leftarrow p - lr\,(g + \mu b \text{ with Nesterov momentum, else } b)

    with c the coefficient of the rule, and b = g in the first step.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch's.
        foreach, fused, differentiable: accepted for torch's sake; the step is always fused, never differentiable.
        max_norm, nonfinite, stochastic_rounding: as :class:`AdamW`'s.

    Raises:
        ValueError, TypeError: an argument out of range, named with its value.
    """

    _verb = "sgd_"
    _names = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | Rule | list[Rule] | None = None,
        nonfinite: str = "propagate",
        stochastic_rounding: int | None = None,
    ) -> None:
        if not momentum >= 0:
            raise ValueError(f"momentum must be >= 0, got {momentum!r}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs a momentum and no dampening, got momentum={momentum!r}, dampening={dampening!r}"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, max_norm, nonfinite, stochastic_rounding)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> tuple[list[Tensor], Tensor | None, bool]:
        if group["momentum"] == 0:
            return [], None, False
        state = self.state[p]
        momentum = state.get("momentum_buffer")
        first = momentum is None and group["dampening"] != 0
        if momentum is None:  # from zeros, the first step gives torch's b = g, unless there is dampening
            momentum = torch.zeros_like(p, memory_format=torch.preserve_format)
            if not first:  # kept only once that step, which is another one, was taken
                state["momentum_buffer"] = momentum
        return [momentum], None, first

    def _more(self, arrays: Arrays, group: dict[str, Any]) -> tuple[float, ...]:
        return (1.0 if arrays.first else 1 - group["dampening"],)

    def _by_torch(
        self, arrays: Arrays, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        torch._fused_sgd_(
            arrays.params, arrays.grads, arrays.states[0] if arrays.states else [],
            weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
            dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"],
            is_first_step=arrays.first, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip


def _refuse_one_rank() -> None:
    """ValueError where ZeroRedundancyOptimizer makes the optimizer: of this rank's share of the parameters alone."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe(2)
    while frame is not None:
        if module is not None and isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise ValueError(
                "max_norm must be left out inside ZeroRedundancyOptimizer, which gives each rank's optimizer a part of "
                "the parameters: their norm is not that of the model. Clip before its step, with fastclip.clip_norm_ "
                "or a Clipper of all parameters"
            )
        frame = frame.f_back


def _must_know(groups: list[dict[str, Any]]) -> bool:
    """Whether the host must know what is skipped or held: the first step of SGD with dampening is another one."""
    return any(group.get("dampening") for group in groups)


def _read_numbers(group: dict[str, Any]) -> None:
    """Tensors among a group's numbers as Python numbers: to read one at every step would wait for its device."""
    group.update({name: group[name].item() for name in NUMBERS if isinstance(group.get(name), Tensor)})
    if "betas" in group:
        group["betas"] = tuple(map(float, group["betas"]))


def _seed(group: dict[str, Any], number: int, part: int) -> int | None:
    """32 bits for the random numbers of this step of a part of the group, from the seed and the count of steps."""
    if group["stochastic_rounding"] is None:
        return None
    mixed = group["stochastic_rounding"] * 0x9E3779B97F4A7C15 + group["rounding_step"] * 0xD1B54A32D192ED03
    mixed = (mixed + number * 0x8CB92BA72F3D8DD7 + part * 0xABC98388FB8FAC03) % 2**64
    return (mixed ^ mixed >> 32) % 2**32


def _pairs(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The named parameters of a group, as torch.optim takes them."""
    return [
        *zip(group.get("param_names", ()), group["params"]),
        *(item for item in group["params"] if isinstance(item, tuple)),
    ]


__all__ = ["SGD", "AdamW"]
