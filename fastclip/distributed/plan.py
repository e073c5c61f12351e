"""What each tensor of a call weighs in a sum over the ranks, and which groups make that sum: worked out once.

U is the set of the ranks that hold parts or copies of the tensors: those of their meshes and declared groups. A tensor
that is cut into S different parts lies in |U| / S copies on them, so its power sum enters the sum over U with the
weight w = S / |U|, and each element counts once, whatever mix of meshes there is. Ranks of a `process_group` hold other
tensors: a sum over them needs no weights.

A plan depends on parameters and configuration only, never on gradients, and is thus the same on all ranks.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import wide_device
from . import groups
from .declare import NOTHING, Marks, marks_of
from .groups import ranks_of
from .unwrap import Expected, Spec, is_shard, partial_dims, same_layout, specs_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

CACHED = 16  # plans: one for each model and kind of call


SameItems = Callable[[list[Any], list[Any]], bool]


class Layouts(NamedTuple):
    """Gradients that do not lie as their parameters do, by their position."""

    specs: list[Spec | None]  # of all
    positions: list[int] | None  # of each among the parameters; None: as they come
    other: dict[int, Spec]
    partial: dict[int, Spec]  # yet to be summed over some dimensions of their mesh


class Plan:
    """The ranks of a list of N tensors.

    Attributes:
        holders: meshes and declared groups whose ranks, multiplied, are U.
        specs: how each lies on its mesh; None for what is no DTensor.
        weights: [N] float64, w of each in a sum over `mesh_groups`.
        shared: [N] float64, 1 / how many stages hold it; None: 1 for all.
        all_dtensors: whether none of them is a plain tensor.
        unread: an error flag on its way from the device, see :mod:`.reduce`.
    """

    def __init__(
        self, specs: list[Spec | None], marks: list[Marks] | None, process_group: ProcessGroup | DeviceMesh | None
    ) -> None:
        self.specs, self.marks, self.process_group = specs, marks, process_group
        self.world = dist.group.WORLD
        self.unread: tuple[Tensor, Any] | None = None
        self._weight_of: dict[Any, float] = {}
        self._agreements: dict[tuple[str, bool], Hashable] = {}
        self._sent_from: dict[torch.device, torch.device] = {}
        self._on: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

        self.all_dtensors = all(spec is not None for spec in specs)
        self.layouts: Layouts | None = None  # of the gradients of the latest call
        self.holders: list[DeviceMesh | ProcessGroup] = []  # which U is the product of
        self._cover()
        self.size = _product(len(ranks_of(holder)) for holder in self.holders)  # |U|
        self.everybody = self.size
        self._stages = stages = frozenset() if process_group is None else ranks_of(process_group)
        if process_group is not None:
            if any(len(stages & ranks_of(holder)) > 1 for holder in self.holders):
                raise ValueError(
                    f"process_group must be of ranks that hold other parameters, and its ranks {sorted(stages)} hold "
                    f"parts of the same ones"
                )
            self.everybody *= len(stages)
        self.weights = torch.tensor([self._weight(i) for i in range(len(specs))], dtype=torch.float64, device="cpu")
        self.shared: Tensor | None = None
        if marks is not None and any(mark.shared is not None for mark in marks):
            counts = [1 if mark.shared is None else max(1, len(ranks_of(mark.shared) & stages)) for mark in marks]
            self.shared = torch.tensor(counts, dtype=torch.float64, device="cpu").reciprocal()

    @functools.cached_property
    def mesh_groups(self) -> list[ProcessGroup]:
        """To be summed over one after the other for a sum over U."""
        if len(self.holders) > 1 and self.world is not None and self.size == dist.get_world_size():
            return [self.world]
        return [group for holder in self.holders for group in groups.chain(holder)]

    @functools.cached_property
    def stage_groups(self) -> list[ProcessGroup]:
        """For a sum over the ranks of `process_group`."""
        return [] if self.process_group is None else groups.chain(self.process_group)

    @functools.cached_property
    def groups(self) -> list[ProcessGroup]:
        """For a sum over both."""
        return [*self.mesh_groups, *self.stage_groups]

    def is_everybody(self) -> bool:
        """Whether both together are the whole world, as far as this stage knows: others may lie on fewer ranks."""
        return self.world is not None and self.everybody == dist.get_world_size()

    def agreement(self, configuration: str, vectors: bool) -> Hashable:
        """What is the same on all ranks that make the same call."""
        key = configuration, vectors
        if key not in self._agreements:
            self._agreements[key] = self._stages, *self.digests(configuration, vectors)
        return self._agreements[key]

    def _cover(self) -> None:
        """Find meshes and groups whose ranks, multiplied, are U."""
        holders: list[DeviceMesh | ProcessGroup] = []
        seen: set[Any] = set()
        for spec, mark in zip(self.specs, self.marks or [NOTHING] * len(self.specs)):
            holder = spec.mesh if spec is not None else mark.sharded
            if holder is not None and holder not in seen:
                seen.add(holder)
                holders.append(holder)
        for holder in sorted(holders, key=lambda holder: -len(ranks_of(holder))):
            ranks = ranks_of(holder)
            if any(ranks <= ranks_of(wider) for wider in self.holders):
                continue
            if any(len(ranks & ranks_of(wider)) > 1 for wider in self.holders):
                shown = ", ".join(str(sorted(ranks_of(one))) for one in (*self.holders, holder))
                raise ValueError(f"the parameters lie on ranks that overlap without one holding the other: {shown}")
            self.holders.append(holder)

    def _weight(self, i: int) -> float:
        spec, mark = self.specs[i], self.marks[i] if self.marks else NOTHING
        if spec is not None:
            return self.weight_of(spec)
        return (1 if mark.sharded is None else len(ranks_of(mark.sharded))) / self.size

    def weight_of(self, spec: Spec) -> float:
        """w of a tensor that lies like this: of a gradient that lies on the mesh otherwise than its parameter, too."""
        key = spec.mesh, spec.placements
        if key not in self._weight_of:
            parts = _product(spec.mesh.size(i) for i, p in enumerate(spec.placements) if is_shard(p))
            if self.size % parts or not any(ranks_of(spec.mesh) <= ranks_of(holder) for holder in self.holders):
                raise ValueError(
                    f"a tensor in {parts} parts on the ranks {sorted(ranks_of(spec.mesh))} does not fit those of the "
                    f"parameters, {self.size} ranks"
                )
            self._weight_of[key] = parts / self.size
        return self._weight_of[key]

    def gradient_layouts(
        self, specs: list[Spec | None], positions: list[int] | None, argument: str, same_items: SameItems
    ) -> Layouts:
        """Which gradients lie otherwise than their parameters. ValueError or TypeError if one does not fit."""
        latest = self.layouts
        if latest is not None and latest.positions == positions and _same(latest.specs, specs, same_items):
            return latest
        layouts = Layouts(specs, positions, {}, {})
        for position, spec in enumerate(specs):
            i = position if positions is None else positions[position]
            expected = self.specs[i]
            if (spec is None) != (expected is None):
                kinds = ["a plain tensor" if one is None else "a DTensor" for one in (expected, spec)]
                raise TypeError(f"{argument}[{i}] is {kinds[0]}, and its gradient {kinds[1]}")
            if spec is None or expected is None:
                continue
            if not same_layout(spec, expected):
                layouts.other[position] = spec
                self.weight_of(spec)
            if partial_dims(spec):
                layouts.partial[position] = spec
        self.layouts = layouts
        return layouts

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """`weights` and `shared`, on `device`."""
        if device not in self._on:
            self._on[device] = self.weights.to(device), None if self.shared is None else self.shared.to(device)
        return self._on[device]

    def all_reduce(self, message: Tensor, over: list[ProcessGroup], op: Any = None) -> Tensor:
        """`message`, summed (or `op`) over these groups, in its own memory where they can take it."""
        if message.device not in self._sent_from:
            self._sent_from[message.device] = groups.device_for(self.groups, message.device)
        return groups.all_reduce(message, over, op, self._sent_from[message.device])

    def replicated(self) -> list[int]:
        """The tensors that should be the same on all ranks of U."""
        everywhere = 1 / self.size
        return [i for i, w in enumerate(self.weights.tolist()) if w == everywhere and self.size > 1]

    def digests(self, configuration: str, vectors: bool) -> list[int]:
        """Two numbers below 2^20 that differ where ranks were called differently: with other tensors too, but for
        stages, and for declared parts of which nothing but their sum is wanted: ranks may have more or fewer."""
        text = configuration
        if self.process_group is None and (vectors or self.marks is None):
            text += "".join(
                f"{spec.placements if spec else None} {tuple(spec.mesh.shape) if spec else ''};" for spec in self.specs
            )
        digest = hashlib.sha256(text.encode()).digest()
        return [int.from_bytes(digest[i : i + 3], "big") >> 4 for i in (0, 3)]

    def fits(
        self,
        specs: list[Spec | None],
        marks: list[Marks] | None,
        process_group: ProcessGroup | DeviceMesh | None,
        same_items: SameItems,
    ) -> bool:
        """Whether it is the plan of these."""
        if self.process_group != process_group or self.world is not dist.group.WORLD or self.marks != marks:
            return False
        if len(specs) != len(self.specs):
            return False
        if _same(specs, self.specs, same_items):
            return True
        if all(_alike(a, b) for a, b in zip(specs, self.specs)):
            self.specs = specs  # equal ones, anew in every step
            return True
        return False


_plans: list[Plan] = []  # the latest first
# What all ranks were seen to agree on, and whether all of them found themselves in a sum over the whole world. Never
# forgotten, and the same on all ranks, since they must know alike whether a call is a first one.
agreed: dict[Hashable, bool] = {}


def plan_of(
    specs: list[Spec | None],
    marks: list[Marks] | None,
    process_group: ProcessGroup | DeviceMesh | None,
    same_items: SameItems = operator.eq,
) -> Plan:
    """The plan of these tensors: one made before, if it fits. `same_items`: whether lists hold the same objects."""
    for i, plan in enumerate(_plans):
        if plan.fits(specs, marks, process_group, same_items):
            if i:
                _plans.insert(0, _plans.pop(i))
            return plan
    plan = Plan(specs, marks, process_group)
    if any(old.world is not plan.world for old in _plans):
        agreed.clear()
    _plans[:] = [plan, *(old for old in _plans if old.world is plan.world)][:CACHED]
    return plan


def latest_specs() -> Expected:
    """What the specs of a call's items and gradients are, if it is like the latest one."""
    if not _plans:
        return None, None
    layouts = _plans[0].layouts
    return _plans[0].specs, None if layouts is None else layouts.specs


def _same(a: list[Spec | None], b: list[Spec | None], same_items: SameItems) -> bool:
    return a is b or same_items(a, b)


def _alike(a: Spec | None, b: Spec | None) -> bool:
    return a is b or (a is not None and b is not None and same_layout(a, b))


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def warm_up(parameters: list[Tensor], process_group: ProcessGroup | DeviceMesh | None) -> None:
    """Make the plan of `parameters`, and send a first message to each of its groups. Where a mesh has no group of all
    its ranks, one is made first."""
    specs, marks = specs_of(parameters), marks_of(parameters)
    if process_group is None and marks is None and all(spec is None for spec in specs):
        return
    plan = plan_of(specs, marks, process_group)
    if len(plan.mesh_groups) > 1:
        for holder in plan.holders:
            if isinstance(holder, dist.device_mesh.DeviceMesh) and holder.ndim > 1:
                holder._flatten()
        _plans.remove(plan)
        plan = plan_of(specs, marks, process_group)
    message = torch.zeros(1, dtype=torch.float64, device=wide_device(parameters[0].device) if parameters else "cpu")
    for group in dict.fromkeys((*plan.groups, *plan.mesh_groups, *plan.stage_groups)):
        plan.all_reduce(message, [group])
