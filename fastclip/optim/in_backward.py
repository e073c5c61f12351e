"""Steps inside backward: each gradient is clipped, used and freed as soon as it is complete, a bucket at a time."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import at_least_one
from ..backends import added, wide_device
from ..clipper import Clipper
from ..distributed.declare import MARKED, marks_of
from ..distributed.unwrap import specs_of
from ..gradients.buckets import Buckets, owners_of, share_of
from ..gradients.measure import measure
from ..gradients.pack import pack, same_items
from ..gradients.param_index import ParamIndex
from ..gradients.table import GradTable
from ..pipeline.decide import ClipDecision, decide
from ..rules.base import StepContext
from ..stats import Stats
from .ddp import DdpBuckets, Take
from .step_inputs import SomeOfGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 32 * 2**20  # a launch's cost is small beside reading as much; a 7B model has some 400 of them
MOST_INDICES = 4096  # that are remembered of buckets: those of a model whose backward is another one each time are not


class StepsSome(Protocol):
    """An optimizer that steps inside backward."""

    param_groups: list[dict[str, Any]]

    def prepare_some(self, params: list[Tensor]) -> tuple[Stats | None, Callable[[], None]]:
        """Decide about some parameters, whose gradients are complete, or raise. Their statistics, if they are clipped,
        and what steps them."""


class InBackward:
    """What an optimizer that steps inside backward knows of the step that is under way.

    A step begins as its first gradient comes, and ends with ``optimizer.step()``.

    Args:
        optimizer: held weakly.
        clipper: the optimizer's.
        ddp: whose buckets are stepped as soon as they are averaged over the ranks.
    """

    def __init__(
        self,
        optimizer: StepsSome,
        clipper: Clipper | None,
        process_group: ProcessGroup | DeviceMesh | None,
        bucket_bytes: int,
        ddp: DistributedDataParallel | None = None,
    ) -> None:
        self.bucket_bytes = at_least_one(bucket_bytes, "bucket_bytes")
        if process_group is not None:
            raise ValueError(
                "process_group must be left out with step_in_backward: each gradient is clipped by itself alone, and "
                "other stages have other parameters"
            )
        if clipper is not None:
            _check_clipper(clipper)
        self._optimizer = weakref.ref(optimizer)
        self._clipper = clipper
        self._buckets = Buckets(self._ready, self.bucket_bytes, self._again)
        self._parameters: list[Tensor] = []
        self._positions: dict[int, int] = {}  # id of a parameter -> its place among those of all groups
        self._group_of: list[int] = []
        self._index: ParamIndex | None = None
        self._indices: dict[tuple[int, ...], ParamIndex] = {}
        self._checked = False  # whether somebody else writes or takes the gradients
        self._stepped: set[int] = set()  # positions
        self._parts: list[tuple[list[int], Stats]] = []
        self._lock = threading.RLock()  # autograd has threads, and so has what averages the buckets of a DDP
        self._round = 0  # counts reset()
        self._failed = False  # whether a bucket of a DDP failed in this step
        self._ddp = None if ddp is None else DdpBuckets(ddp, self._bucket_begins)
        self.is_copy = False  # of one that had a DDP

    def attach(self, groups: list[dict[str, Any]]) -> None:
        """Watch the parameters of these groups; then, since it cannot be undone, become the hook of the DDP."""
        self.watch(groups)
        if self._ddp is not None:
            if not any(p in self._ddp for p in self._parameters):
                raise ValueError(
                    "step_in_backward: the optimizer holds none of the parameters of the DistributedDataParallel"
                )
            self._ddp.register()

    @property
    def has_ddp(self) -> bool:
        """Whether it has a DDP, or is a copy of one that had."""
        return self._ddp is not None or self.is_copy

    @property
    def began(self) -> bool:
        """Whether a step is under way."""
        return bool(self._stepped) or len(self._buckets) > 0

    def watch(self, groups: list[dict[str, Any]]) -> None:
        """Go by the parameters of these groups from now on, unless a step is under way."""
        flat = [p for group in groups for p in group["params"]]
        hooked = self._hooked(flat)
        if self._buckets.changes(hooked):
            self._checked = False
        if not same_items(flat, self._parameters):
            _check_parameters(hooked)
            self._parameters = flat
            self._positions = {id(p): i for i, p in enumerate(flat)}
            self._group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
            self._index, self._indices = None, {}
        self._buckets.watch(hooked)

    def _hooked(self, parameters: list[Tensor]) -> list[Tensor]:
        """Those whose own hooks tell of their gradients: all that are not in `ddp`."""
        return parameters if self._ddp is None else [p for p in parameters if p not in self._ddp]

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError if the parameters of a group cannot be added to those that there are."""
        added = [item if isinstance(item, tuple) else (None, item) for item in group["params"]]
        tensors = [p for _, p in added if isinstance(p, Tensor)]
        _check_parameters(self._hooked([*self._parameters, *tensors]))
        self._refuse_shared(tensors, [name for name, _ in added if name is not None])

    def _refuse_shared(self, parameters: list[Tensor], names: list[str]) -> None:
        """ValueError if another optimizer steps one of them inside backward too: each would take gradients away from
        the other."""
        if not self._shared(parameters):
            return
        gc.collect()  # one that was dropped may be in a circle of references still
        for i in self._shared(parameters):
            name = names[i] if len(names) == len(parameters) else f"parameter {i}"
            raise ValueError(
                f"step_in_backward: {name}, of shape {tuple(parameters[i].shape)}, is stepped inside backward by "
                f"another optimizer too, and each would take its gradient away from the other. Drop that one"
            )

    def _shared(self, parameters: list[Tensor]) -> list[int]:
        return [i for i, p in enumerate(parameters) if any(map(self._is_rival, owners_of(p)))]

    def _is_rival(self, owner: Any) -> bool:
        return isinstance(owner, InBackward) and owner is not self and owner._optimizer() is not None

    def by_group(self, parameters: list[Tensor], groups: list[dict[str, Any]]) -> list[SomeOfGroup]:
        """These parameters by their groups, of the optimizer's `groups`."""
        found: dict[int, list[Tensor]] = {}
        for p in parameters:
            found.setdefault(self._group_of[self._positions[id(p)]], []).append(p)
        return [SomeOfGroup(i, groups[i], params, self._positions) for i, params in found.items()]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradients that come within are left where they are, to be added to."""
        if self.began:
            raise RuntimeError(
                "accumulate() must come before the last backward pass of a step, and gradients of this step have been "
                "used already: call step() first"
            )
        before, self._buckets.paused = self._buckets.paused, True
        try:
            with nullcontext() if self._ddp is None else self._ddp.no_sync():
                yield
        finally:
            self._buckets.paused = before

    def decide(self, parameters: list[Tensor]) -> tuple[Stats, ClipDecision]:
        """What the clipper's rules say of the gradients of these parameters, which all have one."""
        clipper = self._clipper
        assert clipper is not None
        table = pack(parameters, gradients=False, write=True, reduces=True)
        if len(table) < len(parameters):
            raise RuntimeError("parameters share a gradient, which step_in_backward would free under the other")
        index = self._index_of(tuple(self._positions[id(p)] for p in parameters))
        context = StepContext(clipper.steps, params=lambda: index)
        return decide(
            *(table, clipper.rules, clipper.norm_type, context, None, clipper.nonfinite, lambda: index.owners),
            skip_each=True,
        )

    def finish(self) -> Stats | None:
        """End the step: use what gradients are left, and count it. The statistics of all, if they were clipped."""
        if self._buckets.paused:
            raise RuntimeError("step() must come after accumulate(), not within")
        self._refuse_copy()
        self._buckets.flush()
        rest = [p for p in self._parameters if p.grad is not None]
        for p in rest:
            if self._ddp is not None and p in self._ddp:
                raise RuntimeError(
                    f"the gradient of {self._name_of(p)} was not used in backward: that raised an error, or the last "
                    f"pass of the step ran within accumulate() or no_sync(). Nothing was done with this gradient"
                )
            if self._positions[id(p)] in self._stepped:
                self._again(p)
        batch: list[Tensor] = []
        size = 0
        for p in rest:
            batch.append(p)
            size += share_of(p)
            if size >= self.bucket_bytes or p is rest[-1]:
                self._ready(batch)  # which empties it
                size = 0
        stats = None if self._clipper is None else self._joined(self._clipper)
        self.reset()
        return stats

    def drop(self) -> None:
        """The gradients were dropped: begin anew, unless some of them have been used."""
        if not self._stepped:
            self.reset()

    def reset(self) -> None:
        """Begin a new step. Gradients that have come and were not used stay where they are."""
        self._buckets.clear()
        with self._lock:
            self._stepped.clear()
            self._parts.clear()
            self._round += 1
            self._failed = False

    def _refuse_copy(self) -> None:
        if self.is_copy:
            raise RuntimeError(
                "this optimizer is a copy of one with step_in_backward=model, and belongs to no "
                "DistributedDataParallel: make one with the new model, and load the state_dict() of the other"
            )

    def _begin(self, optimizer: StepsSome) -> None:
        """What must be so before the first gradient of a step is used."""
        self._refuse_copy()
        self.watch(optimizer.param_groups)
        if not self._checked:  # which takes long
            _check_parameters(self._hooked(self._parameters))
            names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
            self._refuse_shared(self._parameters, names)
            self._checked = True
        _check_marks(self._parameters)

    @torch.no_grad()
    def _ready(self, batch: list[Tensor]) -> None:
        with self._lock:
            optimizer = self._optimizer()
            if optimizer is not None:  # else it is about to go, and this too
                self._step_some(optimizer, batch)

    def _step_some(self, optimizer: StepsSome, batch: list[Tensor]) -> None:
        """Use the gradients of a bucket, and empty it."""
        if not self._stepped:
            self._begin(optimizer)
        if self._ddp is not None:
            self._ddp.wait()
        # Others may have set a gradient to None, or taken the parameter out of the optimizer, while it waited.
        parameters = [p for p in batch if p.grad is not None and id(p) in self._positions]
        parameters.sort(key=lambda p: self._positions[id(p)])
        if parameters:
            positions = [self._positions[id(p)] for p in parameters]
            stats, step = optimizer.prepare_some(parameters)
            if stats is not None:
                self._parts.append((positions, stats))
            self._stepped.update(positions)
            batch.clear()  # what is half written, if a kernel fails, must not be stepped again
            try:
                step()
            finally:
                for p in parameters:
                    p.grad = None
        batch.clear()

    def _bucket_begins(self) -> Take:
        """The averaging of a bucket of the DDP begins: what is to be done afterwards."""
        if self._buckets.paused:
            raise RuntimeError(
                "accumulate() enters no_sync() of DistributedDataParallel, and so must be around the forward pass too. "
                "Nothing was done with the gradients"
            )
        return functools.partial(self._take_averaged, self._round)

    def _take_averaged(self, begun_in: int, parameters: list[Tensor], gradients: list[Tensor]) -> list[int]:
        """Step those parameters of a bucket that are the optimizer's; the places of the others."""
        with self._lock:
            optimizer = self._optimizer()
            if optimizer is None:
                return list(range(len(parameters)))
            if self._failed or begun_in != self._round:  # backward has raised an error, and did not wait for this one
                return []
            try:
                if not self._stepped:
                    self._begin(optimizer)
                own = [i for i, p in enumerate(parameters) if id(p) in self._positions]
                self._step_averaged([parameters[i] for i in own], [gradients[i] for i in own])
                return [i for i in range(len(parameters)) if i not in own]
            except BaseException:
                self._failed = True
                raise

    def _step_averaged(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        before = [p.grad for p in parameters]
        for p in parameters:
            if self._positions[id(p)] in self._stepped:
                self._again(p)
            if p.grad is None:
                raise RuntimeError(
                    f"{self._name_of(p)} has no gradient on this rank, which step_in_backward needs with "
                    f"DistributedDataParallel: on the other ranks it may have one"
                )
        try:
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
            self._ready(list(parameters))
        except BaseException:
            for p, former in zip(parameters, before):
                if p.grad is not None:  # else it has been used
                    p.grad = former
            raise

    def _name_of(self, parameter: Tensor) -> str:
        position = self._positions.get(id(parameter), 0)
        names = None if self._clipper is None else self._clipper.names
        return f"{names[position] if names else f'parameter {position}'}, of shape {tuple(parameter.shape)},"

    def _again(self, parameter: Tensor) -> None:
        raise RuntimeError(
            f"the gradient of {self._name_of(parameter)} came twice before step(), and the optimizer steps with the "
            f"first as soon as it is complete: run all backward passes of a step but the last within "
            f"optimizer.accumulate(). Nothing was done with the second"
        )

    def _index_of(self, positions: tuple[int, ...]) -> ParamIndex:
        found = self._indices.get(positions)
        if found is None:
            if self._index is None:
                names = None if self._clipper is None else self._clipper.names
                self._index = ParamIndex.all_of(self._parameters, names)
            if len(self._indices) >= MOST_INDICES:
                self._indices.clear()
            found = self._indices[positions] = self._index.at(list(positions))
        return found

    def _joined(self, clipper: Clipper) -> Stats:
        """The statistics of the step, which the clipper counts."""
        device = wide_device(self._parameters[0].device if self._parameters else torch.device("cpu"))
        if not self._parts:
            nothing, _ = measure(GradTable([], device), clipper.norm_type, repair=clipper.nonfinite == "zero")
            nothing.names = None if clipper.names is None else ()
            return nothing.record(torch.ones((), dtype=torch.float64, device=nothing.device))
        parts = [stats for _, stats in self._parts]
        listed = [position for positions, _ in self._parts for position in positions]
        present = sorted(listed)
        place = {position: i for i, position in enumerate(present)}
        first = next(stats for positions, stats in self._parts if present[0] in positions)
        stats = Stats.joined(parts, [place[position] for position in listed], first.device)
        if clipper.names is not None:
            stats.names = tuple(clipper.names[position] for position in present)
        if clipper.nonfinite == "skip":
            stats.skip = stats.nonfinite.all()
            clipper.skips = added(clipper.skips, stats.skip)
        if stats.zeroed is not None:
            clipper.zeroed = added(clipper.zeroed, stats.zeroed_count().round().long())
        clipper.steps += 1
        return stats


def _check_clipper(clipper: Clipper) -> None:
    """ValueError unless it decides each gradient by itself."""
    for rule in clipper.rules:
        if not rule.per_tensor:
            raise ValueError(
                f"max_norm={rule!r} needs the gradients of all parameters at once, which step_in_backward never has. "
                f"These go by each gradient alone: TensorNorm, BlockRMS, AdaGC(warmup=0), AGC, Mask, Value, Only and "
                f"Except of these, and a rule of your own that says so (per_tensor = True)"
            )
    if clipper.nonfinite == "raise":
        raise ValueError(
            "nonfinite='raise' changes nothing if it raises, but with step_in_backward other parameters have been "
            "stepped by then: use 'skip', which leaves those alone whose gradient is not finite"
        )


def _check_parameters(parameters: list[Tensor]) -> None:
    """ValueError where a hook would come before the gradient is summed over the ranks."""
    specs = specs_of(parameters)
    plain = all(spec is None for spec in specs)
    for i, p in enumerate(parameters):
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"step_in_backward: parameter {i} is flattened by FullyShardedDataParallel (FSDP1), whose gradient is "
                f"summed over the ranks only after it is complete on this one. Use fully_shard (FSDP2)"
            )
        if specs[i] is None and not plain:
            raise ValueError(
                f"step_in_backward: parameter {i} is a plain tensor beside DTensors, whose gradient nobody has summed "
                f"over the ranks when it is complete on this one. Step it after backward, by an optimizer of its own"
            )
    _check_marks(parameters)
    trained = [p for p in parameters if p.requires_grad]
    if plain and trained and dist.is_available() and dist.is_initialized() and _in_ddp(trained):
        raise ValueError(
            "step_in_backward: DistributedDataParallel sums the gradients over the ranks only after they are complete "
            "on this one, and the optimizer would step with those of this rank alone. Pass it, step_in_backward=model, "
            "or use fully_shard (FSDP2). What it averages must have required a gradient when it was made, and must not "
            "be ignored or delayed by it"
        )


def _check_marks(parameters: list[Tensor]) -> None:
    """ValueError where the ranks would send messages about different parameters."""
    if MARKED and marks_of(parameters) is not None:
        raise ValueError(
            "step_in_backward: parameters that were declared by mark_sharded or mark_shared are not supported, since "
            "their gradients come on each rank in an order of its own"
        )


def _in_ddp(parameters: list[Tensor]) -> bool:
    """Whether a parameter is one of a DistributedDataParallel, of which parameters tell nothing. Takes some 50 ms."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    if module is None:
        return False
    kinds = {module.DistributedDataParallel}
    while more := {kind for known in kinds for kind in known.__subclasses__()} - kinds:
        kinds |= more
    ours = set(map(id, parameters))
    wrappers = [obj for obj in gc.get_objects() if type(obj) in kinds]
    return any(id(p) in ours for wrapper in wrappers for p in wrapper.module.parameters())
