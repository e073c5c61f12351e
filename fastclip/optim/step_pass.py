"""The pass of AdamW and SGD over their parameters, which carries out a decision: by a backend's kernels, or torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.base import StepBackend, StepDecision, StepTable
from ..distributed.unwrap import any_dtensor, is_copy, laid_out_as, local_of
from ..gradients.pack import pack, pack_step
from ..pipeline.decide import ClipDecision
from ..pipeline.step import FUSED_DEVICES, TakesDecision, divisor_of, has_divisor
from .checks import check_inputs
from .step_inputs import SomeOfGroup, StepInputs, StepPlan, for_torch, rows_of, seed_of, shared_places, zero_


class StepPass(TakesDecision, torch.optim.Optimizer):
    """An optimizer that carries out a decision as it reads its gradients."""

    def _step_groups(
        self,
        decision: ClipDecision | None,
        zero_grad: bool,
        groups: list[SomeOfGroup] | None = None,
        plan: list[StepPlan] | None = None,
    ) -> None:
        """Step the parameters of `groups` (None: all) as decided; None: with their gradients as they are. `plan`: of
        all of them."""
        frozen = decision.frozen_params() if decision and needs_host_decision(self.param_groups) else []
        if plan is None or frozen:
            plan = self._plan(set(map(id, frozen)), groups)  # complains before anything is written
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
        zero_(zero_later if zero_grad else [])

    def _plan(self, left_out: set[int], groups: list[SomeOfGroup] | None = None) -> list[StepPlan]:
        """What is to be stepped, and how; an error if any of it cannot be. `left_out`: ids of parameters. `groups`: of
        some parameters only, in backward; None: all."""
        plan = []
        if groups is None:
            groups = [SomeOfGroup(i, group, group["params"]) for i, group in enumerate(self.param_groups)]
        for number, group, params, places in groups:
            parts = self._step_inputs(group, params, left_out)
            for part, inputs in enumerate(parts):
                backend = backends.choose_step(inputs.params[0].device)
                table = pack_step(inputs.params, inputs.grads, inputs.states, inputs.steps) if backend else None
                if table is None:
                    check_inputs(inputs, self._names)
                    if inputs.overlap():  # each sees what those before it wrote, as in torch
                        parts += inputs.one_by_one()
                        continue
                if places is not None:  # other numbers for each bucket
                    part = places[id(inputs.owners[0])]
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
        if grad_scale is not None:  # torch's kernel writes the quotients back, and tells nobody
            torch.autograd.graph.increment_version([g for g in inputs.grads if not g.is_inference()])

    def _step_inputs(self, group: dict[str, Any], params: list[Tensor], left_out: set[int]) -> list[StepInputs]:
        """Those of `params`, all of the group, that have a gradient and are not left out, by device and dtype."""
        by_kind: dict[Any, StepInputs] = {}
        cut = any_dtensor(params)
        for p in params:
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


def needs_host_decision(groups: list[dict[str, Any]]) -> bool:
    """Whether the host must know what is skipped or frozen: the first step of SGD with dampening is another one."""
    return any(group.get("dampening") for group in groups)
