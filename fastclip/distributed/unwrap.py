"""From a DTensor to the memory that this rank holds of it. The only file that knows what DTensors look like inside."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from torch import Tensor
from torch.nn import Parameter

from ..backends.packers import Packer

if TYPE_CHECKING:  # torch may have been built without them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Spec(Protocol):
    """torch's DTensorSpec: how a DTensor lies on a mesh. One object for all steps of a parameter."""

    @property
    def mesh(self) -> DeviceMesh: ...
    @property
    def placements(self) -> tuple[Any, ...]: ...


def _dtensor() -> Any:
    """DTensor, if anything has loaded it: without that there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def any_dtensor(tensors: list[Any]) -> bool:
    cls = _dtensor()
    return cls is not None and any(isinstance(t, cls) for t in tensors)


def specs_of(tensors: list[Any]) -> list[Spec | None]:
    """How each lies on its mesh; None for what is no DTensor."""
    cls = _dtensor()
    if cls is None:
        return [None] * len(tensors)
    return [t._spec if type(t) is cls or isinstance(t, cls) else None for t in tensors]


def spec_of(tensor: Tensor) -> Spec | None:
    return specs_of([tensor])[0]


def is_async(tensor: Tensor) -> bool:
    """Whether it is the result of a functional collective that may still be under way."""
    return hasattr(tensor, "trigger_wait") and hasattr(tensor, "elem")


def local_of(tensor: Tensor) -> Tensor:
    """The memory of this rank's part of a DTensor; of a pending collective's result, once it has come; else itself."""
    cls = _dtensor()
    if cls is not None and isinstance(tensor, cls):
        tensor = cast(Any, tensor)._local_tensor
    if type(tensor) is not Tensor and is_async(tensor):
        return cast(Tensor, cast(Any, tensor).trigger_wait())
    return tensor


Expected = tuple["list[Spec | None] | None", "list[Spec | None] | None"]


class Unwrapped(NamedTuple):
    """Tensors, or the gradients of parameters, and this rank's parts of them."""

    specs: list[Spec | None]  # how each item lies on its mesh; None: it is no DTensor
    gradients: list[Tensor]  # those that there are
    gradient_specs: list[Spec | None]
    parts: list[Tensor]
    positions: list[int] | None  # of each gradient among the items; None: all have one


def unwrap(items: list[Any], gradients: bool, packer: Packer, expected: Expected = (None, None)) -> Unwrapped | None:
    """The parts of `items`, or unless they are `gradients` of the gradients of parameters; None if one is no tensor.

    `expected`: specs of items and of gradients, as they were in an earlier call; the same lists where they still are.
    """
    if packer.unwrap is not None and type(items) is list:
        unwrapped = packer.unwrap(items, not gradients, *expected)
        if unwrapped is None:
            return None
        specs, present, gradient_specs, parts, positions = unwrapped
        specs = expected[0] if specs is None else specs
        gradient_specs = expected[1] if gradient_specs is None else gradient_specs
        assert specs is not None and gradient_specs is not None
        if not set(map(type, parts)) <= {Tensor, Parameter}:
            parts = [local_of(part) for part in parts]
        return Unwrapped(specs, present, gradient_specs, parts, positions)
    if not all(isinstance(item, Tensor) for item in items):
        return None
    index = [i for i, item in enumerate(items) if gradients or item.grad is not None]
    present = [items[i] if gradients else items[i].grad for i in index]
    specs = specs_of(items)
    parts = [local_of(gradient) for gradient in present]
    return Unwrapped(specs, present, specs_of(present), parts, None if len(index) == len(items) else index)


def is_shard(placement: Any) -> bool:
    """Whether each rank of a mesh dimension has another part (Shard, a strided one too)."""
    return not placement.is_replicate() and not placement.is_partial()


def partial_dims(spec: Spec) -> list[int]:
    """The mesh dimensions over which a tensor is yet to be summed."""
    return [i for i, placement in enumerate(spec.placements) if placement.is_partial()]


def reduction_of(spec: Spec) -> tuple[list[ProcessGroup], float]:
    """The groups over which a Partial tensor is yet to be summed, and what that sum is to be multiplied by."""
    groups, share = [], 1.0
    for i in partial_dims(spec):
        operation = spec.placements[i].reduce_op
        if operation not in ("sum", "avg"):
            raise NotImplementedError(
                f"a gradient is {spec.placements[i]}: only sums and means over ranks are supported"
            )
        groups.append(spec.mesh.get_group(i))
        share = share / spec.mesh.size(i) if operation == "avg" else share
    return groups, share


def same_layout(a: Spec, b: Spec) -> bool:
    return a is b or (a.placements == b.placements and a.mesh == b.mesh)


def laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """`gradient`, laid out over the mesh as its parameter is: summed, say, where it was Partial."""
    spec, expected = spec_of(gradient), spec_of(parameter)
    if spec is None or expected is None or same_layout(spec, expected):
        return gradient
    return cast(Tensor, cast(Any, gradient).redistribute(placements=expected.placements))


def is_copy(gradient: Tensor | None, part: Tensor) -> bool:
    """Whether `part` is not this rank's part of `gradient`."""
    return gradient is not None and spec_of(gradient) is not None and local_of(gradient) is not part


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether each row of a tensor (its slices along dimension 0; of fewer than two dimensions all of it) lies whole on
    a rank."""
    spec, cut = spec_of(tensor), tensor.dim() > 1
    return spec is None or all(p.is_replicate() or (cut and is_shard(p) and p.dim == 0) for p in spec.placements)
