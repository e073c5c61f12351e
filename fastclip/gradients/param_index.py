"""Which parameters the gradients of a decision belong to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends import capturing, upload
from ..distributed.unwrap import local_of
from .pack import identity

Made = TypeVar("Made")


class ParamIndex:
    """The parameters of the T distinct gradients of a decision, among all that a Clipper has.

    Attributes:
        owners: for each gradient, the parameters that have it.
        names: the T names, if the Clipper was given named parameters.
        indices: of the T gradients' first owners among all parameters of the Clipper.
        total: how many parameters the Clipper has.
    """

    def __init__(
        self, owners: list[list[Tensor]], names: tuple[str, ...] | None, indices: Sequence[int], total: int
    ) -> None:
        self.owners, self.names, self.indices, self.total = owners, names, indices, total
        self.shared = any(len(each) > 1 for each in owners)  # whether parameters share a gradient
        self._cache: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, parameters: list[Tensor], names: tuple[str, ...] | None) -> ParamIndex:
        """Those of `parameters` that have a gradient now."""
        distinct: dict[Any, int] = {}
        owners: list[list[Tensor]] = []
        indices: list[int] = []
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            position = distinct.setdefault(identity(local_of(parameter.grad)), len(owners))
            if position == len(owners):
                owners.append([])
                indices.append(i)
            owners[position].append(parameter)
        return cls(owners, names and tuple(names[i] for i in indices), indices, len(parameters))

    @classmethod
    def all_of(cls, parameters: list[Tensor], names: tuple[str, ...] | None) -> ParamIndex:
        """All `parameters`, each with a gradient of its own."""
        return cls([[p] for p in parameters], names, range(len(parameters)), len(parameters))

    @classmethod
    def now(
        cls, parameters: list[Tensor], names: tuple[str, ...] | None, count: int, before: ParamIndex | None
    ) -> ParamIndex:
        """Those of the `count` distinct gradients that there are now: `before`, if they are the same still."""
        total = len(parameters)
        if count == total:
            if before is None or before.total != total or len(before.indices) != total:
                return cls.all_of(parameters, names)
            return before
        present = [i for i, p in enumerate(parameters) if p.grad is not None]
        if (
            before is not None
            and (before.total, before.indices, before.shared) == (total, present, False)
            and len(present) == count
        ):
            return before
        index = cls.of(parameters, names)
        return before if before is not None and index.same_as(before) else index

    def same_as(self, other: ParamIndex | None) -> bool:
        """Whether the parameters are those of `other`, and share the same gradients."""
        return (
            other is not None
            and self.total == other.total
            and [list(map(id, o)) for o in self.owners] == [list(map(id, o)) for o in other.owners]
        )

    @property
    def parameters(self) -> list[Tensor]:
        """[T] the first owner of each gradient."""
        return [owners[0] for owners in self.owners]

    def only(self, key: Hashable, positions: list[int]) -> ParamIndex:
        """Those at `positions` of the T."""

        return self.cached((key, "only"), lambda: self.at(positions))

    def at(self, positions: list[int]) -> ParamIndex:
        """:meth:`only`, made anew."""
        names = self.names and tuple(self.names[i] for i in positions)
        owners = [self.owners[i] for i in positions]
        return ParamIndex(owners, names, [self.indices[i] for i in positions], self.total)

    def index(self, device: torch.device) -> Tensor | None:
        """[T] int64 on `device`, `indices`; None if they are all, in order."""
        if len(self.indices) == self.total:
            return None
        return self.cached_on(device, "index", lambda: upload(list(self.indices), torch.int64, device))

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """make(), or what it gave for this key before: the parameters of a decision seldom change."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def cached_on(self, device: torch.device, key: Hashable, make: Callable[[], Made]) -> Made:
        """:meth:`cached`, of something on `device`: in a CUDA graph made anew, since every replay copies it."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0  # which it is ready on
        return make() if capturing(device) else self.cached((key, device, stream), make)


def named(items: list[Any]) -> tuple[list[Tensor], tuple[str, ...] | None]:
    """The tensors of a flat list of parameters or of (name, parameter) pairs, and the names; an error that names what
    is neither."""
    pairs = [isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items]
    if any(pairs) and not all(pairs):
        raise ValueError(f"parameters must be all named or all unnamed; parameters[{pairs.index(False)}] is not a pair")
    names = tuple(item[0] for item in items) if items and all(pairs) else None
    tensors = [item[1] for item in items] if names else items
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(tensor).__name__} {tensor!r}")
    check_names(zip(names or (), tensors))
    return tensors, names


def check_names(pairs: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError if two different parameters have one name: whatever goes by names would show only one of them.

    A parameter may come twice under one name, and (tied weights) under several.
    """
    first: dict[str, tuple[int, Tensor]] = {}
    for i, (name, parameter) in enumerate(pairs):
        before, other = first.setdefault(name, (i, parameter))
        if other is not parameter:
            raise ValueError(
                f"parameters[{before}] and parameters[{i}] are different parameters of one name, {name!r}: give each "
                f"a name of its own"
            )
