"""What placements do not tell: plain tensors of which each rank has another part, and parameters of several stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .groups import checked_group
from .unwrap import spec_of

if TYPE_CHECKING:  # torch may have been built without them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Marks(NamedTuple):
    """What was declared of a parameter."""

    sharded: ProcessGroup | DeviceMesh | None = None
    shared: ProcessGroup | DeviceMesh | None = None


NOTHING = Marks()
_marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
ever_marked = False  # for torch.compile, which cannot look into that
MARKED = _marks.data  # true while anything is declared of a tensor that lives: one look, in calls of a microsecond


def mark_sharded(parameters: Tensor | Iterable[Tensor], process_group: ProcessGroup | DeviceMesh) -> None:
    """Declare plain parameters of which every rank of `process_group` holds another part (or another tensor).

    A DTensor tells this by its placements; a plain tensor does not: the flat parameters of FSDP1 (sharded), of ZeRO or
    of Megatron's distributed optimizer, and experts that are plain tensors on each rank. Their gradients then count
    once each in every norm, which is one over all ranks of the group. Where the norm of each tensor is wanted
    (``TensorNorm``, ``AdaGC``), what has the same place in the list of parameters on all ranks is one tensor.

    Holds for the tensor object, while it lives: mark again what was copied or loaded from a pickle, and for
    :func:`fastclip.total_norm` the gradients themselves.

    Raises:
        TypeError: an argument of another kind, or a DTensor.
    """
    _mark(parameters, process_group, "sharded")


def mark_shared(parameters: Tensor | Iterable[Tensor], process_group: ProcessGroup | DeviceMesh) -> None:
    """Declare parameters that all ranks of `process_group` hold alike although they are different pipeline stages.

    An embedding that the first and the last stage both have, say, whose gradients were summed over the two. It then
    counts once in the norm of the model, see `process_group` of :func:`fastclip.clip_norm_`.

    Raises:
        TypeError: an argument of another kind.
    """
    _mark(parameters, process_group, "shared")


def _mark(parameters: Tensor | Iterable[Tensor], process_group: ProcessGroup | DeviceMesh, kind: str) -> None:
    checked_group(process_group, "process_group")
    items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(item).__name__} {item!r}")
        if kind == "sharded" and spec_of(item) is not None:
            raise TypeError(f"parameters[{i}] is a DTensor, whose placements say how it is sharded: leave it out")
    global ever_marked
    ever_marked = ever_marked or len(items) > 0
    for item in items:
        _marks[item] = _marks_of(item)._replace(**{kind: process_group})


def _marks_of(parameter: Tensor) -> Marks:
    return cast(Marks, _marks.get(parameter, NOTHING))  # type: ignore[no-untyped-call]


def is_marked_sharded(parameter: Tensor) -> bool:
    return bool(MARKED) and _marks_of(parameter).sharded is not None


def marks_of(parameters: list[Tensor]) -> list[Marks] | None:
    """What was declared of each; None if nothing of any."""
    if not MARKED:
        return None
    marks = [_marks_of(p) for p in parameters]
    return marks if any(mark is not NOTHING for mark in marks) else None
