"""Process groups: which ranks they have, and which of those that exist are to be summed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # torch may have been built without them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Ranks = frozenset[int]


def checked_group(group: Any, argument: str) -> Any:
    """`group`; TypeError unless it is a ProcessGroup that this rank is in, or a DeviceMesh."""
    if not dist.is_available() or not (isinstance(group, dist.ProcessGroup) or _is_mesh(group)):
        raise TypeError(f"{argument} must be a ProcessGroup or a DeviceMesh, got {type(group).__name__} {group!r}")
    return group


def _is_mesh(group: Any) -> TypeGuard[DeviceMesh]:
    return isinstance(group, dist.device_mesh.DeviceMesh)


def ranks_of(group: ProcessGroup | DeviceMesh) -> Ranks:
    if _is_mesh(group):
        return frozenset(group.mesh.flatten().tolist())
    return frozenset(dist.get_process_group_ranks(cast("ProcessGroup", group)))


def find(ranks: Ranks) -> ProcessGroup | None:
    """The first group ever made of exactly these ranks. All of its members find the same one."""
    for group in _all_groups():
        if frozenset(dist.get_process_group_ranks(group)) == ranks:
            return group
    return None


def _all_groups() -> list[ProcessGroup]:
    """Those that this rank is in, the whole world's first, then by age."""
    return list(dist.distributed_c10d._world.pg_map)


def chain(group: ProcessGroup | DeviceMesh) -> list[ProcessGroup]:
    """Groups to sum over, one after the other, so that the sum is over all ranks of `group`: one, if there is one."""
    if not _is_mesh(group):
        return [cast("ProcessGroup", group)]
    if (whole := find(ranks_of(group))) is not None:
        return [whole]
    return [group.get_group(i) for i in range(group.ndim) if group.size(i) > 1]


def device_for(groups: list[ProcessGroup], local: torch.device) -> torch.device:
    """Where messages to these groups must lie: with the gradients if they can, else on a device that they can."""
    for group in groups:
        kinds = [device.type for device in group._device_types]
        if local.type not in kinds:
            kind = kinds[0]
            return torch.device("cpu") if kind == "cpu" else torch.device(kind, getattr(torch, kind).current_device())
    return local


def all_reduce(
    message: Tensor, groups: list[ProcessGroup], op: Any = None, device: torch.device | None = None
) -> Tensor:
    """`message`, summed (or `op`) over these groups one after the other, on its device; sent from `device`, and from
    where it is in its own memory."""
    sent = message if device in (None, message.device) else message.to(device)
    for group in groups:
        dist.all_reduce(sent, dist.ReduceOp.SUM if op is None else op, group)
    return sent.to(message.device)


def gather_strings(text: str, groups: list[ProcessGroup]) -> list[str]:
    """What each rank has to say, where it is not empty. For errors: every rank must be here."""
    texts = [text] if text else []
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, texts, group)
        texts = [line for lines in gathered for line in lines]
    return list(dict.fromkeys(texts))
