"""Pack: parameters in, gradients grouped by (device, dtype) out.

Addresses are read anew on every call, so a table cannot be stale. Plain gradients (dense, real) are packed natively;
this file is the general packer: it handles what is not plain, and says clearly what cannot be handled.

A table owns the memory it was made of until the call is over. Where a rule or another thread sets a gradient to None or
gives it other memory (``p.grad.data = x``) meanwhile, that first memory is what is clipped.
"""

from __future__ import annotations

import functools
import operator
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _get_dispatch_mode,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)

from . import backends
from .backends import native

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Group:
    """Gradients of one device and dtype, and the backend that works on them."""

    __slots__ = ("_numels", "_tensors", "backend", "device", "dtype", "native", "positions", "uploaded")

    def __init__(
        self,
        backend: Any,
        positions: list[int],
        tensors: list[Tensor] | None,
        native: Any = None,
        numels: list[int] | None = None,
    ) -> None:
        self.backend = backend
        self.positions = positions  # of each gradient among all of the table; empty if there is no other group
        self.native = native  # the C++ group, where there is one
        self.uploaded: Any = None  # what the backend keeps of the group between the verbs of one call
        self._tensors = tensors
        self._numels = numels  # None: as the native group has them
        first = native if tensors is None else tensors[0]
        self.device: torch.device = first.device
        self.dtype: torch.dtype = first.dtype

    def __len__(self) -> int:
        return len(self.native) if self._tensors is None else len(self._tensors)

    @property
    def tensors(self) -> list[Tensor]:
        if self._tensors is None:
            self._tensors = self.native.tensors
        return self._tensors

    def addresses_and_sizes(self) -> Tensor:
        """int64 [2, T] on the host."""
        if self.native is not None:
            return self.native.addresses_and_sizes()
        rows = [[t.data_ptr() for t in self.tensors], [t.numel() for t in self.tensors]]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def numels(self) -> Tensor:
        """int64 [T] on the host, the element counts of the gradients; of a sparse one as if it were dense."""
        if self._numels is None:
            return self.native.addresses_and_sizes()[1]
        return torch.tensor(self._numels, dtype=torch.int64, device="cpu")

    def units(self) -> Group | None:
        """The rows (slices along dimension 0) of all tensors of two or more dimensions, and the others whole, in order,
        as one group; None where they are not contiguous pieces of memory, or no kernel works on this one."""
        units = None if self.native is None or self.backend.name == "reference" else self.native.units()
        return None if units is None else Group(self.backend, [], None, units)

    def bump_version(self) -> None:
        """Tell autograd that the tensors were written."""
        if self.native is not None:
            self.native.bump_version()
        else:
            torch.autograd.graph.increment_version([t for t in self.tensors if not t.is_inference()])


_sizes: backends.Recent[Tensor] = backends.Recent()


class GradTable:
    """All gradients of a call, in the order of the parameters, each once."""

    def __init__(self, groups: list[Group], device: torch.device) -> None:
        self.groups = groups
        self.device = device  # where statistics are gathered: the first gradient's, else the first parameter's
        wide = any(group.dtype in (torch.float64, torch.complex128) for group in groups)
        self.dtype = torch.float64 if wide else torch.float32  # of norms and coefficients

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @property
    def tensors(self) -> list[Tensor]:
        """The memory of all gradients, in order."""
        found: dict[int, Tensor] = {}
        for group in self.groups:
            found.update(zip(group.positions or range(len(group)), group.tensors))
        return [found[position] for position in range(len(found))]

    def sizes(self) -> Tensor:
        """float64 [T] on the table's device, the element counts of the gradients."""
        if len(self.groups) == 1:
            host = self.groups[0].numels()
        else:
            host = torch.empty(len(self), dtype=torch.int64, device="cpu")
            for group in self.groups:
                host[group.positions] = group.numels()
        if self.device.type == "cpu":
            return host.double()
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        upload = functools.partial(backends.upload, host, torch.float64, self.device)
        return _sizes.get(self.device, (self.device, stream), host, upload)

    def apply_(self, coef: Tensor) -> None:
        """Multiply every gradient by its coefficient: float64, [] or [T], on the table's device."""
        for group in self.groups:
            mine = coef
            if len(self.groups) > 1 and coef.dim() == 1:
                mine = coef[backends.upload(group.positions, torch.int64, coef.device)]
            group.backend.apply_(group, mine.to(group.device).contiguous())

    def clamp_(self, low: float, high: float) -> Tensor:
        """Limit every element to [low, high]; [] bool on the table's device, whether anything was changed."""
        changed = torch.zeros((), dtype=torch.bool, device=self.device)
        for group in self.groups:
            changed = changed | group.backend.clamp_(group, low, high).to(self.device)
        return changed


def listed(parameters: Any, argument: str = "parameters", stacklevel: int = 3, ordered: bool = False) -> list[Any]:
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
    if not any(isinstance(item, dict) for item in items):
        return items
    flat: list[Any] = []
    for i, item in enumerate(items):
        if isinstance(item, dict):
            if "params" not in item:
                raise ValueError(f"{argument}[{i}] is a dict without the key 'params'; its keys are {list(item)}")
            flat += listed(item["params"], f"{argument}[{i}]['params']", stacklevel + 1, ordered)
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


def pack(items: list[Any], *, gradients: bool, write: bool, argument: str = "parameters") -> GradTable:
    """The table of the gradients of `items`, or of the tensors themselves where they are `gradients` already."""
    check_not_traced()
    library = native.cpp.load()
    packed = library.pack(items, not gradients) if library is not None else None
    if packed:
        return from_native(packed)
    return _pack_any(items, gradients, write, argument, library)


def from_native(packed: list[Any]) -> GradTable:
    """The table of groups that the native packer made, in the order of their first gradients."""
    groups = [Group(backends.choose(g.device), g.positions, None, g) for g in packed]
    return GradTable(groups, groups[0].device)


def _pack_any(items: list[Any], gradients: bool, write: bool, argument: str, library: Any) -> GradTable:
    found: list[Tensor] = []
    numels: list[int] = []
    plain: set[int] = set()
    seen: set[Any] = set()
    uncoalesced: list[tuple[int, Tensor, Tensor]] = []
    for i, item in enumerate(items):
        label = f"{argument}[{i}]"
        if not isinstance(item, Tensor):
            raise TypeError(f"{label} must be a tensor, got {_shown(item)}")
        if not gradients and getattr(item, "_fsdp_flattened", False):
            raise NotImplementedError(
                f"{label} is flattened by FullyShardedDataParallel (FSDP1): each rank has another part of it, so its "
                f"norm here is not the model's. Use the wrapped model's own clip_grad_norm_ instead"
            )
        gradient = item if gradients else item.grad
        if gradient is None:
            continue
        if not gradients:
            label = f"the gradient of {label}"
        if (same := identity(gradient)) in seen:
            continue
        seen.add(same)
        if gradient.layout is torch.sparse_coo and not gradient.is_coalesced():
            coalesced = gradient.coalesce()
            uncoalesced.append((len(found), gradient, coalesced))
            gradient = coalesced
        memory = _memory_of(gradient, label, write)
        if _is_plain(memory):
            plain.add(len(found))
        found.append(memory)
        numels.append(gradient.numel())
    if not found:
        if not gradients:
            check_not_gradients(items, argument)
        devices = [item.device for item in items]
        return GradTable([], devices[0] if devices else torch.device("cpu"))
    if write:
        _check_overlaps(found)
        for position, gradient, coalesced in uncoalesced:
            found[position] = gradient.copy_(coalesced)._values().detach()  # the same values, each index once

    members: dict[tuple[torch.device, torch.dtype, bool], list[int]] = defaultdict(list)
    for position, memory in enumerate(found):
        members[memory.device, memory.dtype, position in plain].append(position)
    groups = []
    for (device, _, is_plain), positions in members.items():
        tensors = [found[p] for p in positions]
        packed = library.pack(tensors, False) if library is not None and is_plain else None
        backend = backends.choose(device) if is_plain else backends.get("reference")
        if backend.name == "cpu" and not packed:  # views that overlap, to be read only
            backend = backends.get("reference")
        groups.append(Group(backend, positions, tensors, packed[0] if packed else None, [numels[p] for p in positions]))
    return GradTable(groups, found[0].device)


class StepTable:
    """What one multi-tensor optimizer step works on: tensors of one device and dtype, row by row in the same order.

    Every tensor is dense and has its elements where its gradient has them.
    """

    __slots__ = ("_tensors", "device", "dtype", "native", "states")

    def __init__(self, params: list[Tensor], grads: list[Tensor], states: int, native: Any) -> None:
        self.device, self.dtype = params[0].device, params[0].dtype
        self.states = states  # how many of the three rows of states there are
        self.native = native  # the C++ group, where there is one
        self._tensors = (params, grads)

    def __len__(self) -> int:
        return len(self._tensors[0])

    def addresses(self) -> Tensor:
        """int64 [7, T] on the host: addresses of gradient, parameter, three states and step count (0: there is none),
        and the element counts."""
        return self.native.addresses()

    def bump_version(self, gradients: bool) -> None:
        """Tell autograd that the parameters, and perhaps the gradients, were written."""
        self.native.bump_version(gradients)


def pack_step(params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]) -> Any:
    """The StepTable of these, `steps` being float32 counters or empty; None if it is for another path."""
    check_not_traced()
    library = native.cpp.load()
    packed = library.pack_step(params, grads, states, steps) if library is not None else None
    return None if packed is None else StepTable(params, grads, len(states), packed)


def are_apart(tensors: list[Tensor]) -> bool:
    """Whether no two share memory, for certain: False also where the native packer cannot tell."""
    library = native.cpp.load()
    packed = library.pack(tensors, False) if library is not None else None
    return packed is not None and sum(map(len, packed)) == len(tensors)


def may_overlap(tensors: list[Tensor]) -> bool:
    """Whether the memory of one tensor may reach into another's."""
    return not are_apart(tensors) and any(len(cluster) > 1 for cluster in clusters(tensors))


def same_items(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    library = native.cpp.load()
    return library.same_items(a, b) if library is not None else len(a) == len(b) and all(map(operator.is_, a, b))


def is_watched() -> bool:
    """Whether a TorchDispatchMode wants to see every operation: FakeTensorMode, make_fx, FlopCounterMode."""
    return _len_torch_dispatch_stack() > 0 or _before_autograd()


def _before_autograd() -> bool:
    """In make_fx(pre_dispatch=True), which keeps its mode elsewhere, together with one for __torch_function__."""
    return _is_torch_function_mode_enabled() and _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)


def check_not_traced() -> None:
    """NotImplementedError under FakeTensorMode and in make_fx, which do not see what a kernel does to bare addresses:
    real memory would be written, and a graph would hold what was measured now as constants."""
    if not (_len_torch_dispatch_stack() or _is_torch_function_mode_enabled()):
        return
    if _before_autograd() or any(map(_get_dispatch_mode, (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY))):
        raise NotImplementedError(
            "a Clipper and the optimizers of fastclip.optim cannot be traced by make_fx or run under FakeTensorMode; "
            "the functions (fastclip.clip_norm_ and the like) can"
        )


def identity(gradient: Tensor) -> Any:
    """Equal for two gradients that are the same values in memory, such as those of tied weights."""
    plain = gradient.layout is torch.strided and not _is_wrapped(gradient) and not gradient.is_meta
    if not plain or gradient.is_nested or not gradient.numel():
        return id(gradient)
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(gradient)
    return gradient.data_ptr(), gradient.numel() if dense else (gradient.shape, gradient.stride()), gradient.dtype


def _is_wrapped(gradient: Tensor) -> bool:
    keys = torch._C._dispatch_keys(gradient)
    return keys.has(torch._C.DispatchKey.Python) or torch._C._functorch.is_functorch_wrapped_tensor(gradient)


def _memory_of(gradient: Tensor, label: str, write: bool) -> Tensor:
    """The strided tensor whose elements are the (coalesced) gradient's values; an error if there is none to be had."""
    if torch._C._functorch.is_functorch_wrapped_tensor(gradient):
        raise NotImplementedError(f"{label} is a tensor inside torch.func.vmap or grad, which is not supported")
    if torch._C._dispatch_keys(gradient).has(torch._C.DispatchKey.Python):
        raise NotImplementedError(
            f"{label} is a {type(gradient).__name__}; DTensor and other wrapper subclasses are not supported yet"
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
    if write and torch._debug_has_internal_overlap(memory) == 1:
        raise RuntimeError(
            f"{label} is expanded: several elements (shape {tuple(memory.shape)}, stride {memory.stride()}) share one "
            f"place in memory, so it cannot be changed in place. Clone it first"
        )
    return memory


def _is_plain(memory: Tensor) -> bool:
    dense = memory.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(memory)
    return (
        dense and memory.dtype in PLAIN_DTYPES and not memory.is_neg() and memory.device.type in ("cpu", "cuda", "xpu")
    )


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
    spans = sorted(
        (t.device.type, t.device.index or 0, t.data_ptr(), t.data_ptr() + _extent(t), i)
        for i, t in enumerate(tensors)
        if t.numel()
    )
    cluster: list[int] = []
    end: tuple[Any, ...] = ()
    for kind, index, begin, stop, i in spans:
        if cluster and (kind, index) == end[:2] and begin < end[2]:
            cluster.append(i)
            end = (kind, index, max(end[2], stop))
        else:
            yield [tensors[k] for k in cluster]
            cluster, end = [i], (kind, index, stop)
    yield [tensors[k] for k in cluster]


def _check_cluster(cluster: list[Tensor]) -> None:
    # Views with gaps may interleave without sharing an element, so tick off every element.
    if len(cluster) < 2:
        return
    start = min(t.data_ptr() for t in cluster)
    size = cluster[0].itemsize
    last = max(t.data_ptr() + _extent(t) for t in cluster)
    taken = torch.zeros((last - start) // size, dtype=torch.bool, device="cpu")
    for t in cluster:
        offset, rest = divmod(t.data_ptr() - start, size)
        if not rest and t.itemsize == size:
            mine = taken.as_strided(t.shape, t.stride(), offset)
            if not mine.any():
                mine.fill_(True)
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
