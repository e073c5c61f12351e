"""What an optimizer's step works on: the tensors of its parameters, as the kernels, or else torch's, take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import place_of, upload, wide_device
from ..backends.base import StepBackend, StepTable
from ..distributed.unwrap import local_of
from ..gradients.pack import are_apart, clusters, may_overlap
from ..torch_internals import is_dense


class StepInputs(NamedTuple):
    """What a step works on: tensors of one device and dtype, in the same order; of DTensors this rank's parts."""

    owners: list[Tensor]  # the parameters themselves
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]  # float32 [] counters; empty for SGD
    momenta: list[Tensor]  # in the first step of SGD with dampening, which starts from none: what is to be kept

    @property
    def first(self) -> bool:
        """Whether it is such a first step."""
        return bool(self.momenta)

    def without(self, params: set[int]) -> StepInputs:
        """Those whose parameter's id is not among `params`."""
        return self._at([i for i, p in enumerate(self.owners) if id(p) not in params])

    def one_by_one(self) -> list[StepInputs]:
        """Each tensor's by itself, in order."""
        return [self._at([i]) for i in range(len(self.params))]

    def overlap(self) -> bool:
        """Whether there are several parameters, and memory of one, or of its states, may be another's too."""
        states = [state for column in (*self.states, self.steps) for state in column]
        return len(self.params) > 1 and may_overlap([*self.params, *states])

    def _at(self, positions: list[int]) -> StepInputs:
        def only(column: list[Tensor]) -> list[Tensor]:
            return [column[i] for i in positions] if column else []

        states = [only(column) for column in self.states]
        tensors = only(self.owners), only(self.params), only(self.grads)
        return StepInputs(*tensors, states, only(self.steps), only(self.momenta))


class SomeOfGroup(NamedTuple):
    """Parameters of a group that are stepped together."""

    number: int  # of the group
    group: dict[str, Any]
    params: list[Tensor]
    places: dict[int, int] | None = None  # where only some are, id of each -> its place among all


class StepPlan(NamedTuple):
    """The step of some inputs: by the kernel of a backend on a table, or by torch's where there is none."""

    group: dict[str, Any]
    inputs: StepInputs
    backend: StepBackend | None
    table: StepTable | None
    seed: int | None  # to round stochastically with


def rows_of(each: Tensor, inputs: StepInputs, positions: dict[int, int]) -> Tensor:
    """What [] or [T of a decision] is for the parameters of `inputs`, on their device."""
    if each.dim():
        order = [positions[id(p)] for p in inputs.owners]
        if order != list(range(len(each))):
            each = each[upload(order, torch.int64, each.device)]
    return each.to(wide_device(inputs.params[0].device)).contiguous()


def zero_(gradients: Iterable[Tensor | None]) -> None:
    """Set those that are there to zero."""
    parts = [local_of(g) for g in gradients if g is not None]
    plain = [torch._neg_view(g) if g.is_neg() else g for g in parts]  # foreach takes no negative
    if plain:
        torch._foreach_zero_(plain)


def shared_places(plan: list[StepPlan]) -> set[Any]:
    """The places of gradients that reach into another: what is written to one would be read of the other."""
    if len(plan) == 1 and plan[0].table is not None:  # in a table each is there once
        return set()
    gradients = [gradient for one in plan for gradient in one.inputs.grads]
    if are_apart(gradients):
        return set()
    return {place_of(gradient) for cluster in clusters(gradients) if len(cluster) > 1 for gradient in cluster}


def for_torch(inputs: StepInputs, shared: set[Any]) -> tuple[StepInputs, list[tuple[Tensor, Tensor]]]:
    """The inputs as torch's fused kernels take them, and which of them are copies to be copied back (original, copy).

    The kernels go through memory, whatever the strides, and take all inputs for the same dtype; they write gradients
    back, of which several parameters may share one; and torch's SGD steps wrongly on CPUs in 16 bits, from 16 elements
    on.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    plain = StepInputs(inputs.owners, [], [], [[] for _ in inputs.states], inputs.steps, inputs.momenta)
    for p, gradient, *states in zip(inputs.params, inputs.grads, *inputs.states):
        narrow = p.device.type == "cpu" and p.itemsize < 4
        dense = is_dense(p)
        tensors = [p.detach(), gradient.detach().resolve_neg(), *states]
        if narrow or not dense or any(t.stride() != p.stride() or t.dtype != p.dtype for t in tensors):
            tensors = [t.to(torch.float32 if narrow else p.dtype, copy=True).contiguous() for t in tensors]
            copies += [(p, tensors[0]), *zip(states, tensors[2:])]
        elif place_of(gradient) in shared:
            tensors[1] = tensors[1].clone()
        plain.params.append(tensors[0])
        plain.grads.append(tensors[1])
        for column, state in zip(plain.states, tensors[2:]):
            column.append(state)
    return plain, copies


def rate_for_torch(lr: Any) -> float | Tensor:
    """A learning rate as torch's fused kernels take it, which know no numbers of numpy's."""
    return lr if isinstance(lr, Tensor) else float(lr)


def seed_of(group: dict[str, Any], number: int, part: int) -> int | None:
    """32 bits for the random numbers of this step of a part of the group, from the seed and the count of steps."""
    if group["stochastic_rounding"] is None:
        return None
    mixed = group["stochastic_rounding"] * 0x9E3779B97F4A7C15 + group["rounding_step"] * 0xD1B54A32D192ED03
    mixed = (mixed + number * 0x8CB92BA72F3D8DD7 + part * 0xABC98388FB8FAC03) % 2**64
    return (mixed ^ mixed >> 32) % 2**32
