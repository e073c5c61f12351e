"""What a packer is, what it makes, and the CPU kernels that work on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor


class NativeGroup(Protocol):
    """A group as a packer made it: csrc/torch/bindings.cpp, or groups.py."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def positions(self) -> list[int]: ...
    @property
    def tensors(self) -> list[Tensor]: ...
    def __len__(self) -> int: ...
    def addresses_and_sizes(self) -> Tensor: ...
    def units(self) -> NativeGroup | None: ...
    def bump_version(self) -> None: ...
    def fingerprint(self) -> int: ...  # another number where a gradient is elsewhere, or of another size


class NativeStepGroup(Protocol):
    """What an optimizer steps, as a packer made it."""

    def addresses(self) -> Tensor: ...
    def bump_version(self, gradients: bool) -> None: ...


# What one fused call measured and did: power [T], absmax [T], norm [], coef [], whether a gradient is float64.
FusedStats = tuple[Tensor, Tensor, Tensor, Tensor, bool]


# What one read tells of gradients that are not held: power [T], absmax [T], norm [], whether they are float64, and the
# fingerprint of where they are.
ReadStats = tuple[Tensor, Tensor, Tensor, bool, int]
# (parameters, norm_type) -> their gradients read without being held; where that has no use, what `Packer.pack` gives.
MeasureGradients = Callable[[list[Any], float], ReadStats | list[NativeGroup] | None]


class FusedClip(Protocol):
    """What has the commonest call in one go: pack, measure, decide and apply.

    ``clip_norm_fused`` clips the gradients of parameters to `max_norm`; or, unless `of_parameters`, measures tensors.
    It takes the arguments as the user gave them: what it does not know it leaves to the general path, which says what
    is wrong.

    Returns the norm before; with `per_tensor` a :data:`FusedStats`. Where it is another case (gradients on another
    device, say) nothing is done, and it returns the packed groups, or None if it has not packed.
    """

    measure_gradients: MeasureGradients | None  # None: there is none

    @overload
    def clip_norm_fused(
        self, items: list[Any], of_parameters: bool, max_norm: Any, norm_type: float, error_if_nonfinite: bool,
        per_tensor: Literal[False], /,
    ) -> Tensor | list[NativeGroup] | None: ...  # fmt: skip
    @overload
    def clip_norm_fused(
        self, items: list[Any], of_parameters: bool, max_norm: Any, norm_type: float, error_if_nonfinite: bool,
        per_tensor: Literal[True], /,
    ) -> FusedStats | list[NativeGroup] | None: ...  # fmt: skip


class Packer(FusedClip, Protocol):
    """From lists of Python objects to tables. csrc/torch/bindings.cpp says what each function does."""

    def pack(self, items: list[Any], gradients_of: bool, /) -> list[NativeGroup] | None: ...
    def pack_step(
        self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor], /
    ) -> NativeStepGroup | None: ...
    def bump_versions(self, tensors: list[Tensor], /) -> None: ...
    def same_items(self, a: list[Any], b: list[Any], /) -> bool: ...

    # None where it has none: fastclip.distributed.unwrap does the same in Python
    unwrap: Any


class Kernels(Protocol):
    """The CPU kernels, over the groups of the packer that they came with."""

    def measure(
        self, group: Any, p: float, max_norm: float | None, before: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]: ...
    def apply_(self, group: Any, coef: Tensor, /) -> None: ...
    def clamp_(self, group: Any, low: float, high: float, /) -> bool: ...
    def adamw_(
        self, step: Any, coef: Tensor, frozen: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, maximize: bool, zero_grad: bool, seed: int | None, /,
    ) -> None: ...  # fmt: skip
    def sgd_(
        self, step: Any, coef: Tensor, frozen: Tensor | None, lr: float, momentum: float, one_minus_dampening: float,
        weight_decay: float, nesterov: bool, maximize: bool, zero_grad: bool, seed: int | None, /,
    ) -> None: ...  # fmt: skip
    def isa(self) -> str: ...
    def work_alone(self) -> None: ...
