"""What AdamW and SGD share: the decision, the plan of a step, and checkpoints."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..backends.base import StepBackend, StepDecision, StepTable
from ..clipper import Clipper
from ..distributed.reduce import Wanted, reduce
from ..distributed.unwrap import any_dtensor, is_copy, laid_out_as, local_of
from ..gradients.measure import measure
from ..gradients.pack import has_memory, pack, pack_step, refuse_set
from ..gradients.param_index import check_names
from ..pipeline.amp import given_by_scaler
from ..pipeline.decide import ClipDecision
from ..pipeline.step import FUSED_DEVICES, TakesDecision, divisor_of, flat_params, has_divisor
from ..stats import Stats
from .step_inputs import StepInputs, StepPlan, for_torch, rows_of, seed_of, shared_places, zero_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

NUMBERS = ("eps", "momentum", "dampening", "weight_decay")  # entries of a parameter group, besides lr and betas
OWN = ("stochastic_rounding", "rounding_step", "clipper")  # entries of a parameter group that torch's do not have


class _Last:
    """What the last step clipped. Wrappers that copy an optimizer's attributes share it with the optimizer."""

    stats: Stats | None = None


class ClippingOptimizer(TakesDecision, torch.optim.Optimizer):
    """What AdamW and SGD share: the decision, and the pass over all parameters."""

    clipper: Clipper | None  # of the `max_norm`, over the parameters of all groups
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf, see step()

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        max_norm: Any,
        nonfinite: str,
        stochastic_rounding: int | None,
        process_group: ProcessGroup | DeviceMesh | None,
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
        if max_norm is None and process_group is not None:
            raise ValueError("process_group needs a max_norm, of a norm over its ranks")
        self.clipper = (
            None if max_norm is None else Clipper([], max_norm, nonfinite=nonfinite, process_group=process_group)
        )
        self._last = _Last()
        defaults = {**defaults, "stochastic_rounding": stochastic_rounding, "rounding_step": 0}
        _read_numbers(defaults)
        super().__init__(params, defaults)
        self._update_clipper()

    @property
    def _process_group(self) -> ProcessGroup | DeviceMesh | None:
        return None if self.clipper is None else self.clipper.process_group

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
                elif self._process_group is not None and group.get("momentum") != 0:
                    self.state[p]  # empty: whether there are states must not differ between stages
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
        saved = super().state_dict()
        if self.clipper is not None:
            saved["param_groups"][0]["clipper"] = self.clipper.state_dict()
        return saved

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
            saved = [{**group_own, **group_saved} for group_own, group_saved in zip(own, saved)]
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
            from .. import graph_breaks

            return graph_breaks.call(ClippingOptimizer.step, self, closure, zero_grad=zero_grad)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state:
            if self.decision is None and self._is_initial():
                self.init_state()
                return loss
            if self._process_group is not None or any_dtensor(flat_params(self)):
                self.init_state()  # checkpoints, and the question above, need the same states on all ranks
        decision = self.decision or self._decided()
        if decision is not None and _needs_host_decision(self.param_groups) and decision.is_skipped():
            if zero_grad:
                zero_(p.grad for group in self.param_groups for p in group["params"])
        else:
            self._step_groups(decision, zero_grad)
        return loss

    def _is_initial(self) -> bool:
        """Whether this step is meant to make the states and nothing else: torch.distributed.checkpoint takes one with
        gradients of zeros and a learning rate of 0."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates) or any(rates):
            return False
        table = pack(flat_params(self), gradients=False, write=False, process_group=self._process_group, reduces=True)
        stats, _ = measure(table, math.inf)
        if table.shards is not None:
            stats = reduce(stats, table.shards, Wanted(False, False, "initial")).stats
        return (len(table) > 0 or table.shards is not None) and not stats.norm

    def _decided(self) -> ClipDecision | None:
        """The decision of the optimizer's own rule, and of a GradScaler whose ``step`` called this one's."""
        scale, found_inf = given_by_scaler(self)
        inv_scale = None if scale is None else backends.widened(scale).reciprocal()
        skip = None if found_inf is None else found_inf.to(backends.wide_device(found_inf.device)) > 0
        clipper = self.clipper
        if clipper is not None:
            self._update_clipper()
            table = clipper.pack()
            if not len(table) and table.shards is None:
                nothing, _ = measure(table, clipper.norm_type, repair=clipper.nonfinite == "zero")
                nothing.record(torch.ones((), dtype=torch.float64, device=table.device))
                nothing.names = None if clipper.names is None else ()
                self._last.stats = nothing
                return None
            inv_scale = None if inv_scale is None else inv_scale.to(table.device)
            skip = None if skip is None else skip.to(table.device)
            self._last.stats, decision = clipper.decide(table, inv_scale, skip, scale is not None)
            return decision
        given = skip if inv_scale is None else inv_scale
        if given is None:
            return None
        one = torch.ones((), dtype=torch.float64, device=given.device)
        return ClipDecision(one if inv_scale is None else inv_scale, skip)

    def _step_groups(self, decision: ClipDecision | None, zero_grad: bool) -> None:
        """Step all parameters as decided; None: with their gradients as they are."""
        frozen = decision.frozen_params() if decision and _needs_host_decision(self.param_groups) else []
        plan = self._plan(set(map(id, frozen)))  # complains before anything is written
        shared = shared_places(plan)
        zero_later = [p.grad for p in frozen]
        positions = decision.positions() if decision and decision.differs_by_tensor() else {}
        coef, mask = (None, None) if decision is None else (decision.coef, decision.frozen_mask())
        for group, inputs, backend, table, seed in plan:
            if backend is None or table is None or shared:
                zero_later += inputs.grads
            if backend is None or table is None:
                self._step_by_torch(inputs, group, decision, positions, shared)
            else:
                one = torch.ones((), dtype=torch.float64, device=table.device) if coef is None else coef
                table_coef = rows_of(one, inputs, positions)
                table_mask = None if mask is None else rows_of(mask, inputs, positions)
                table_decision = StepDecision(table_coef, table_mask, zero_grad and not shared, seed)
                self._step_table(backend, table, table_decision, group, inputs)
            zero_later += [p.grad for p, g in zip(inputs.owners, inputs.grads) if zero_grad and is_copy(p.grad, g)]
            for p, momentum in zip(inputs.owners, inputs.momenta):
                self.state[p]["momentum_buffer"] = momentum
            wrappers = [p for p, part in zip(inputs.owners, inputs.params) if p is not part]
            torch.autograd.graph.increment_version([p for p in wrappers if not p.is_inference()])
        for group in self.param_groups:
            if group["stochastic_rounding"] is not None:
                group["rounding_step"] += 1
        zero_(zero_later if zero_grad else [])

    def _plan(self, left_out: set[int]) -> list[StepPlan]:
        """What is to be stepped, and how; an error if any of it cannot be. `left_out`: ids of parameters."""
        plan = []
        for number, group in enumerate(self.param_groups):
            parts = self._step_inputs(group, left_out)
            for part, inputs in enumerate(parts):
                backend = backends.choose_step(inputs.params[0].device)
                table = pack_step(inputs.params, inputs.grads, inputs.states, inputs.steps) if backend else None
                if table is None:
                    self._check(inputs)
                    if inputs.overlap():  # each sees what those before it wrote, as in torch
                        parts += inputs.one_by_one()
                        continue
                seed = seed_of(group, number, part) if inputs.params[0].dtype == torch.bfloat16 else None
                if seed is not None and table is None:
                    raise NotImplementedError(
                        "stochastic_rounding needs a backend with kernels, and gradients laid out as their parameters "
                        "are, one each"
                    )
                if seed is not None and backends.capturing(inputs.params[0].device):
                    raise NotImplementedError(
                        "stochastic_rounding cannot be captured in a CUDA graph: every replay would round alike"
                    )
                plan.append(StepPlan(group, inputs, backend, table, seed))
        return plan

    def _check(self, inputs: StepInputs) -> None:
        """An error where torch's kernel, which asks nothing, would read or write memory that is not there, or raise
        after others have been stepped."""
        if not inputs.params[0].is_floating_point():
            raise TypeError(
                f"parameter must be of a floating-point dtype, got {inputs.params[0].dtype}; nothing was changed"
            )
        columns = {"parameter": inputs.params, "gradient": inputs.grads, **dict(zip(self._names, inputs.states))}
        for name, tensors in columns.items():
            for p, t in zip(inputs.params, tensors):
                if t.is_nested:
                    raise NotImplementedError(f"{name} is a nested tensor, which is not supported; nothing was changed")
                if t.shape != p.shape:
                    raise ValueError(
                        f"{name} has the shape {tuple(t.shape)}, and its parameter {tuple(p.shape)}; nothing was "
                        f"changed"
                    )
        for name, tensors in {**columns, "step": inputs.steps}.items():
            for t in tensors:
                if not has_memory(t):
                    raise RuntimeError(
                        f"{name} of shape {tuple(t.shape)} has no memory: its storage was freed or shrunk; nothing was "
                        f"changed"
                    )

    def _step_by_torch(
        self,
        inputs: StepInputs,
        group: dict[str, Any],
        decision: ClipDecision | None,
        positions: dict[int, int],
        shared: set[Any],
    ) -> None:
        """The step by torch's fused kernel."""
        if decision is not None and decision.frozen is not None:
            inputs = inputs.without(set(map(id, decision.frozen_params())))
            if not inputs.params:
                return
        grad_scale, found_inf = None, None
        plain, copies = for_torch(inputs, shared)
        device = inputs.params[0].device
        if decision is not None and device.type not in FUSED_DEVICES:
            if decision.is_skipped():
                return
            pack(plain.grads, gradients=True, write=True, argument="grads").apply_(
                rows_of(decision.coef, inputs, positions)
            )
        elif decision is not None:
            in_float32 = all(g.dtype != torch.float64 for g in plain.grads) and has_divisor(decision.common)
            in_place = decision.each if in_float32 else decision.coef
            if in_place is not None:
                rows = rows_of(decision.unless_skipped(in_place), inputs, positions)
                pack(plain.grads, gradients=True, write=True, argument="grads").apply_(rows)
            grad_scale = divisor_of(decision.common).to(device) if in_float32 else None  # torch's is float32
            if decision.skip is not None:
                found_inf = decision.skip.to(device, torch.float32)
            else:
                found_inf = torch.zeros((), device=device)
        self._fused_torch(plain, group, grad_scale, found_inf)
        for original, copy in copies:
            original.copy_(copy)
        torch.autograd.graph.increment_version(inputs.params)

    def _step_inputs(self, group: dict[str, Any], left_out: set[int]) -> list[StepInputs]:
        """The group's parameters that have a gradient and are not left out, by device and dtype."""
        by_kind: dict[Any, StepInputs] = {}
        cut = any_dtensor(group["params"])
        for p in group["params"]:
            gradient = p.grad
            if gradient is None or id(p) in left_out:
                continue
            if gradient.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            states, step, first = self._state_of(p, group)
            key = (p.device, p.dtype, first)
            inputs = by_kind.get(key)
            if inputs is None:
                inputs = by_kind[key] = StepInputs([], [], [], [[] for _ in states], [], [])
            inputs.owners.append(p)
            inputs.params.append(local_of(p) if cut else p)
            inputs.grads.append(gradient if type(gradient) is Tensor else local_of(laid_out_as(gradient, p)))
            for column, state in zip(inputs.states, states):
                column.append(local_of(state) if cut else state)
            if first:
                inputs.momenta.append(states[0])
            if step is not None:
                inputs.steps.append(step)
        return list(by_kind.values())

    _names: tuple[str, ...]  # of the states, in order

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> tuple[list[Tensor], Tensor | None, bool]:
        """A parameter's states, made if there are none; its step count; and :attr:`StepInputs.first`."""
        raise NotImplementedError

    def _step_table(
        self,
        backend: StepBackend,
        table: StepTable,
        decision: StepDecision,
        group: dict[str, Any],
        inputs: StepInputs,
    ) -> None:
        """The step of a table by a backend."""
        raise NotImplementedError

    def _fused_torch(
        self, inputs: StepInputs, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """The step by torch's fused kernel, which divides by `grad_scale` and does nothing where `found_inf` is 1."""
        raise NotImplementedError


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


def _needs_host_decision(groups: list[dict[str, Any]]) -> bool:
    """Whether the host must know what is skipped or frozen: the first step of SGD with dampening is another one."""
    return any(group.get("dampening") for group in groups)


def _read_numbers(group: dict[str, Any]) -> None:
    """Tensors among a group's numbers as Python numbers: to read one at every step would wait for its device."""
    group.update({name: group[name].item() for name in NUMBERS if isinstance(group.get(name), Tensor)})
    if "betas" in group:
        group["betas"] = tuple(map(float, group["betas"]))


def _pairs(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The named parameters of a group, as torch.optim takes them."""
    return [
        *zip(group.get("param_names", ()), group["params"]),
        *(item for item in group["params"] if isinstance(item, tuple)),
    ]
