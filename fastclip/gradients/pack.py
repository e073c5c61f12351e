"""Pack: parameters in, gradients grouped by (device, dtype) out.

Addresses are read anew on every call, so a table cannot be stale. Plain gradients (dense, real) are packed natively;
this file is the general packer: it handles what is not plain, and says clearly what cannot be handled.
"""

from __future__ import annotations

import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, packers
from ..backends import GradGroup, NativeGroup, place_of
from ..backends.base import StepTable
from ..distributed.declare import MARKED, Marks, marks_of
from ..distributed.plan import latest_specs, plan_of
from ..distributed.reduce import Shards
from ..distributed.unwrap import Unwrapped, any_dtensor, local_of, spec_of, unwrap
from ..modes import check_not_traced
from ..packers import Packer
from ..torch_internals import is_dense, is_in_transform, is_wrapper, overlaps_itself
from .table import GradTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def flatten_params(
    parameters: Any, argument: str = "parameters", stacklevel: int = 3, ordered: bool = False
) -> list[Any]:
    """A tensor, an iterable of tensors, or of torch.optim's parameter-group dicts, as a flat list.

    `stacklevel`: of the user's call, seen from here. `ordered`: refuse sets.
    """
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, (str, bytes, dict)) or not isinstance(parameters, Iterable):
        raise TypeError(f"{argument} must be a tensor or an iterable of tensors, got {_shown(parameters)}")
    if ordered:
        refuse_set(parameters, argument)
    items = list(parameters)
    if not items and isinstance(parameters, types.GeneratorType):  # torch's words, which people filter
        warnings.warn(f"`{argument}` is an empty generator, no gradient clipping will occur.", stacklevel=stacklevel)
    if not any(issubclass(kind, dict) for kind in set(map(type, items))):
        return items
    flat: list[Any] = []
    for i, item in enumerate(items):
        if isinstance(item, dict):
            if "params" not in item:
                raise ValueError(f"{argument}[{i}] is a dict without the key 'params'; its keys are {list(item)}")
            flat += flatten_params(item["params"], f"{argument}[{i}]['params']", stacklevel + 1, ordered)
        else:
            flat.append(item)
    return flat


def refuse_set(parameters: Any, argument: str) -> None:
    """TypeError for a set: what is remembered of its elements would belong to others in the next run."""
    if isinstance(parameters, (set, frozenset)):
        raise TypeError(
            f"{argument} must be in an order that is the same in every run, which a {type(parameters).__name__} has "
            f"not: pass a list"
        )


def pack(
    items: list[Any],
    *,
    gradients: bool,
    write: bool,
    argument: str = "parameters",
    process_group: ProcessGroup | DeviceMesh | None = None,
    reduces: bool = False,
) -> GradTable:
    """The table of the gradients of `items`, or of the tensors themselves where they are `gradients` already.

    Of DTensors and declared tensors it holds this rank's parts. `reduces`: a reduce follows, by which an error of one
    rank reaches the others; the table then carries it there.
    """
    check_not_traced()
    packer = packers.get().packer
    plain = process_group is None and not MARKED
    packed = packer.pack(items, not gradients) if plain else None
    if packed:
        return from_native(packed)
    if not plain or any_dtensor(items):
        return _pack_sharded(items, gradients, write, argument, packer, process_group, reduces)
    return _pack_plain(items, gradients, write, argument, packer)


def _pack_plain(items: list[Any], gradients: bool, write: bool, argument: str, packer: Packer) -> GradTable:
    labelled = _labelled(items, gradients, argument)
    if not labelled and not gradients:
        check_not_gradients(items, argument)
    return _pack_any(labelled, write, packer) if labelled else _nothing(items)


def _nothing(items: list[Any]) -> GradTable:
    return GradTable([], items[0].device if items else torch.device("cpu"))


def from_native(packed: list[NativeGroup]) -> GradTable:
    """The table of groups that the native packer made, in the order of their first gradients."""
    groups = [GradGroup(backends.choose(g.device), g.positions, None, g) for g in packed]
    return GradTable(groups, groups[0].device)


def _labelled(
    items: list[Any], gradients: bool, argument: str, marks: list[Marks] | None = None
) -> list[tuple[str, Tensor]]:
    """The gradients that there are, with what to call them in messages."""
    labelled = []
    for i, item in enumerate(items):
        label = f"{argument}[{i}]"
        if not isinstance(item, Tensor):
            raise TypeError(f"{label} must be a tensor, got {_shown(item)}")
        declared = marks is not None and marks[i].sharded is not None
        if not gradients and not declared and getattr(item, "_fsdp_flattened", False):
            raise NotImplementedError(
                f"{label} is flattened by FullyShardedDataParallel (FSDP1): each rank has another part of it, so its "
                f"norm here is not the model's. Use the wrapped model's own clip_grad_norm_ instead, or declare it by "
                f"fastclip.distributed.mark_sharded"
            )
        if gradients:
            labelled.append((label, item))
        elif item.grad is not None:
            labelled.append((f"the gradient of {label}", item.grad))
    return labelled


def _pack_sharded(
    items: list[Any],
    gradients: bool,
    write: bool,
    argument: str,
    packer: Packer,
    process_group: ProcessGroup | DeviceMesh | None,
    reduces: bool,
) -> GradTable:
    """:func:`pack`, where some of the tensors may be parts of larger ones."""
    unwrapped = unwrap(items, gradients, packer, latest_specs())
    if unwrapped is None:  # an item is no tensor, but perhaps a parameter group
        flat = flatten_params(items, argument)
        if not any(isinstance(item, dict) for item in items):
            return _pack_plain(flat, gradients, write, argument, packer)
        return _pack_sharded(flat, gradients, write, argument, packer, process_group, reduces)
    marks = marks_of(items)
    sharded = marks is not None or process_group is not None or any(spec is not None for spec in unwrapped.specs)
    if not sharded:
        return _pack_plain(items, gradients, write, argument, packer)
    shards = Shards(plan_of(unwrapped.specs, marks, process_group, same_items))
    try:
        table = _pack_parts(items, unwrapped, gradients, write, argument, packer, shards)
    except Exception as error:
        if not reduces:
            raise
        table, shards = _nothing(items), Shards(shards.plan, error)  # of which the other ranks hear in the reduce
    table.shards = shards
    return table


def _pack_parts(
    items: list[Any],
    unwrapped: Unwrapped,
    gradients: bool,
    write: bool,
    argument: str,
    packer: Packer,
    shards: Shards,
) -> GradTable:
    """The table of this rank's parts."""
    plan = shards.plan
    parts = unwrapped.parts
    shards.index, shards.wrappers = unwrapped.positions, unwrapped.gradients
    layouts = plan.gradient_layouts(unwrapped.gradient_specs, unwrapped.positions, argument, same_items)
    shards.partial, shards.other_layouts = layouts.partial, layouts.other
    packed = packer.pack(parts, False)
    if packed and plan.all_dtensors:
        table = from_native(packed)
    else:
        labelled = _labelled(items, gradients, argument, plan.marks)
        relabelled = [(label, part) for (label, _), part in zip(labelled, parts)]
        table = from_native(packed) if packed else _pack_any(relabelled, write, packer) if parts else _nothing(items)
    if len(table) < len(parts):  # tied ones
        firsts = {identity(part): i for i, part in reversed(list(enumerate(parts)))}
        shards.keep(sorted(firsts.values()))
    return table


def _pack_any(labelled: list[tuple[str, Tensor]], write: bool, packer: Packer) -> GradTable:
    """The general packer; at least one gradient."""
    memories: list[Tensor] = []
    numels: list[int] = []
    plain: set[int] = set()
    seen: set[Any] = set()
    uncoalesced: list[tuple[int, Tensor, Tensor]] = []
    for label, gradient in labelled:
        gradient = gradient if spec_of(gradient) is not None else local_of(gradient)
        if (same := identity(gradient)) in seen:
            continue
        seen.add(same)
        if gradient.layout is torch.sparse_coo and not gradient.is_coalesced():
            coalesced = gradient.coalesce()
            uncoalesced.append((len(memories), gradient, coalesced))
            gradient = coalesced
        memory = _memory_of(gradient, label, write)
        if _is_plain(memory):
            plain.add(len(memories))
        memories.append(memory)
        numels.append(gradient.numel())
    if write:
        _check_overlaps(memories)
        for position, gradient, coalesced in uncoalesced:
            memories[position] = gradient.copy_(coalesced)._values().detach()  # the same values, each index once

    members: dict[tuple[torch.device, torch.dtype, bool], list[int]] = defaultdict(list)
    for position, memory in enumerate(memories):
        members[memory.device, memory.dtype, position in plain].append(position)
    groups = []
    for (device, _, is_plain), positions in members.items():
        tensors = [memories[p] for p in positions]
        packed = packer.pack(tensors, False) if is_plain else None
        backend = backends.choose(device) if is_plain else backends.get("reference")
        if backend.name == "cpu" and not packed:  # views that overlap, to be read only
            backend = backends.get("reference")
        groups.append(
            GradGroup(backend, positions, tensors, packed[0] if packed else None, [numels[p] for p in positions])
        )
    return GradTable(groups, memories[0].device)


def pack_step(
    params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]
) -> StepTable | None:
    """The StepTable of these, `steps` being float32 counters or empty; None if it is for another path."""
    check_not_traced()
    packed = packers.get().packer.pack_step(params, grads, states, steps)
    return None if packed is None else StepTable(params, len(states), packed)


def unit_tables(table: GradTable, parameters: list[Tensor]) -> list[tuple[GradTable, GradTable]]:
    """The units (rows, see :meth:`GradGroup.units`) of a table's gradients, each with those of the same parameters.

    All units of a group in one pair where the memory of gradients and parameters can be cut that way; else tensor by
    tensor, as views.
    """
    pairs: list[tuple[GradTable, GradTable]] = []
    for group in table.groups:
        params = [parameters[p] for p in group.positions or range(len(group))]
        weights = pack(params, gradients=True, write=False)
        if len(weights.groups) == 1 and len(weights) == len(group):
            rows, weight_rows = group.units(), weights.groups[0].units()
            if rows is not None and weight_rows is not None:
                pairs.append((GradTable([rows], group.device), GradTable([weight_rows], group.device)))
                continue
        for tensors in zip(group.tensors, map(local_of, params)):
            views = [list(t.detach().unbind()) if t.dim() > 1 else [t.detach()] for t in tensors]
            if views[0]:
                grad_rows, weight_rows_ = (pack(v, gradients=True, write=False, argument="rows") for v in views)
                pairs.append((grad_rows, weight_rows_))
    return pairs


def are_apart(tensors: list[Tensor]) -> bool:
    """Whether no two share memory, for certain: False also where the native packer cannot tell."""
    packed = packers.get().packer.pack(tensors, False)
    return packed is not None and sum(map(len, packed)) == len(tensors)


def may_overlap(tensors: list[Tensor]) -> bool:
    """Whether the memory of one tensor may reach into another's."""
    return not are_apart(tensors) and any(len(cluster) > 1 for cluster in clusters(tensors))


def same_items(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return packers.get().packer.same_items(a, b)


def identity(gradient: Tensor) -> Any:
    """Equal for two gradients that are the same values in memory, such as those of tied weights."""
    plain = gradient.layout is torch.strided and not _is_wrapped(gradient) and not gradient.is_meta
    if not plain or gradient.is_nested or not gradient.numel():
        return id(gradient)
    elements = gradient.numel() if is_dense(gradient) else (gradient.shape, gradient.stride())
    return place_of(gradient), elements, gradient.dtype


def _is_wrapped(gradient: Tensor) -> bool:
    return is_wrapper(gradient) or is_in_transform(gradient)


def _memory_of(gradient: Tensor, label: str, write: bool) -> Tensor:
    """The strided tensor whose elements are the (coalesced) gradient's values; an error if there is none to be had."""
    if is_in_transform(gradient):
        raise NotImplementedError(f"{label} is a tensor inside torch.func.vmap or grad, which is not supported")
    if is_wrapper(gradient):
        raise NotImplementedError(
            f"{label} is a {type(gradient).__name__}; wrapper subclasses other than DTensor are not supported"
        )
    if gradient.is_nested:
        raise NotImplementedError(f"{label} is a nested tensor, which is not supported")
    if gradient.is_meta:
        raise ValueError(f"{label} is on the meta device and has no values")
    if not (gradient.is_floating_point() or gradient.is_complex()) or gradient.dtype.itemsize < 2:
        raise TypeError(f"{label} must be float32, float64, bfloat16, float16 or complex, got {gradient.dtype}")
    if gradient.layout is torch.sparse_coo:
        return gradient._values().detach()
    if gradient.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return gradient.values().detach()
    if gradient.layout is not torch.strided:
        raise TypeError(f"{label} has the layout {gradient.layout}, which is not supported")
    memory = gradient.detach()
    if memory.is_complex():  # of which only magnitudes matter: those of the memory itself
        memory = memory.conj() if memory.is_conj() else memory
        memory = torch._neg_view(memory) if memory.is_neg() else memory
    if not has_memory(memory):
        raise RuntimeError(f"{label} has no memory: its storage was freed or shrunk")
    if write and overlaps_itself(memory):
        raise RuntimeError(
            f"{label} is expanded: several elements (shape {tuple(memory.shape)}, stride {memory.stride()}) share one "
            f"place in memory, so it cannot be changed in place. Clone it first"
        )
    return memory


def _is_plain(memory: Tensor) -> bool:
    dense = memory.is_contiguous() or is_dense(memory)
    return bool(dense and memory.dtype in PLAIN_DTYPES and not memory.is_neg())


def check_not_gradients(items: list[Any], argument: str) -> None:
    """Raise if `items`, none of which has a gradient, look like gradients themselves."""
    for i, item in enumerate(items):
        if not item.requires_grad and not isinstance(item, torch.nn.Parameter):
            raise TypeError(
                f"{argument} must be parameters, whose .grad is clipped; {argument}[{i}] is a plain tensor of shape "
                f"{tuple(item.shape)} without one. To clip a tensor in place, set it as the .grad of a parameter"
            )


def _check_overlaps(tensors: list[Tensor]) -> None:
    """Raise if two tensors share memory: the shared part would be scaled twice."""
    for cluster in clusters(tensors):
        _check_cluster(cluster)


def clusters(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, those together that lie one in the reach of another."""
    spans = sorted((*place_of(t), i) for i, t in enumerate(tensors) if t.numel())
    cluster: list[int] = []
    end: tuple[Any, int] = (None, 0)
    for space, begin, i in spans:
        stop = begin + _extent(tensors[i])
        if cluster and space == end[0] and begin < end[1]:
            cluster.append(i)
            end = space, max(end[1], stop)
        else:
            yield [tensors[k] for k in cluster]
            cluster, end = [i], (space, stop)
    yield [tensors[k] for k in cluster]


def _check_cluster(cluster: list[Tensor]) -> None:
    # Views with gaps may interleave without sharing an element, so tick off every element.
    if len(cluster) < 2:
        return
    begins = [place_of(t)[1] for t in cluster]
    start, size = min(begins), cluster[0].itemsize
    last = max(begin + _extent(t) for begin, t in zip(begins, cluster))
    taken = torch.zeros((last - start) // size, dtype=torch.bool, device="cpu")
    for begin, t in zip(begins, cluster):
        offset, remainder = divmod(begin - start, size)
        if not remainder and t.itemsize == size:
            own = taken.as_strided(t.shape, t.stride(), offset)
            if not own.any():
                own.fill_(True)
                continue
        raise RuntimeError(
            f"two gradients overlap in memory (one has shape {tuple(t.shape)} and stride {t.stride()}), so the shared "
            f"elements would be scaled twice. Clone one of them first"
        )


def has_memory(t: Tensor) -> bool:
    """Whether the storage reaches to the end of the tensor."""
    return not t.numel() or t.untyped_storage().nbytes() >= t.storage_offset() * t.itemsize + _extent(t)


def _extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))) * t.itemsize


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
